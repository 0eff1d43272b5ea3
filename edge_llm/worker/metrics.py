"""What a worker counts about itself, for /metrics.

Owns names, types and labels. Every figure is a number about this worker as a whole: no text, no request, no tenant, so
that the route can be open to whoever may reach the port. Refuses to know HTTP and how the figures come to be.

Counters grow where things happen, a few per engine step; what a worker reports anyway (its status, its board) is read
when somebody scrapes. Durations are differences of this process's own monotonic clock.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from edge_llm.engine.engine import Step
from edge_llm.exposition import LABELS, SECONDS
from edge_llm.worker.messages import Board, Link, PromptReport, WorkerStatus
from edge_llm.worker.readings import Consumed, about_node, consumed

_BOARD_LABELS: Final = ("node",)
Family = CounterMetricFamily | GaugeMetricFamily


@dataclass(frozen=True, slots=True)
class Readings:
    """What is asked when something is counted (values for `LABELS`; a role may change while a worker runs), and at a
    scrape: the status, and requests that compute here (sequences, and a prompt for others)."""

    labels: Callable[[], tuple[str, str, str]]
    status: Callable[[], WorkerStatus]
    requests_running: Callable[[], int]
    consumed: Callable[[], Consumed] = consumed
    about_node: Callable[[], Mapping[str, str]] = about_node


class WorkerMetrics:
    """Counters of one worker in `registry`, and what of its state is read at a scrape."""

    def __init__(self, registry: CollectorRegistry, readings: Readings) -> None:
        self._readings = readings
        # the same as two of the counters, whatever the role was meanwhile
        self.generated_tokens = self.computed_tokens = 0

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"edge_llm_{name}", what, (*LABELS, *labels), registry=registry)

        self._prompt_tokens = counter(
            "prompt_tokens", "Prompt tokens computed here, for own and for others' sequences."
        )
        self._prompt_seconds = counter("prompt_seconds", "Seconds the engine spent on prompts.")
        self._generation_tokens = counter("generation_tokens", "Tokens generated here.")
        self._decode_seconds = counter("decode_seconds", "Seconds the engine spent on decode steps.")
        self._decode_steps = counter("decode_steps", "Decode steps: a token for every running sequence.")
        self._decode_rows = counter("decode_rows", "Sequences in all decode steps: over steps, the batch's mean width.")
        self._handoff_bytes = counter(
            "handoff_bytes", "KV that went to other workers (out, frames included) or came from them (in).", "direction"
        )
        self._handoffs = counter(
            "handoffs",
            "Prompts that were to come from a prefill worker: ok; mismatch or timeout where that is why one gave less; "
            "else partial (not all came from the first one asked), fallback (all was computed here).",
            "outcome",
        )
        self._handoff_seconds = Histogram(
            "edge_llm_handoff_seconds",
            "What a hand-off added after the prompt was computed: the last chunk on its way, and taking the KV over.",
            LABELS,
            registry=registry,
            buckets=SECONDS,
        )
        registry.register(_State(readings))
        ProcessCollector(registry=registry)

    def step(self, step: Step) -> None:
        """One engine step. Prefill and decode are never added up: one of them may fall while the other holds."""
        labels = self._readings.labels()
        self.computed_tokens += step.prompt_tokens
        if step.prompt_tokens:
            self._prompt_tokens.labels(*labels).inc(step.prompt_tokens)
            self._prompt_seconds.labels(*labels).inc(step.prompt_s)
        if step.decoded_rows:
            self.generated_tokens += len(step.events)
            self._generation_tokens.labels(*labels).inc(len(step.events))
            self._decode_seconds.labels(*labels).inc(step.decode_s)
            self._decode_steps.labels(*labels).inc()
            self._decode_rows.labels(*labels).inc(step.decoded_rows)

    def prompted(self, report: PromptReport) -> None:
        """A prompt of this worker is whole; the report says how."""
        labels = self._readings.labels()
        if report.handoff_bytes:
            self._handoff_bytes.labels(*labels, "in").inc(report.handoff_bytes)
        is_split = report.mode == "split"
        if report.fallback:
            self._handoffs.labels(*labels, report.trouble or ("partial" if is_split else "fallback")).inc()
        elif is_split:
            self._handoffs.labels(*labels, "ok").inc()
        if is_split:
            self._handoff_seconds.labels(*labels).observe(report.handoff_ms / 1e3)

    async def sent(self, parts: AsyncGenerator[bytes | memoryview, None]) -> AsyncGenerator[bytes | memoryview, None]:
        """The same parts of a hand-off, counted as they leave."""
        leaving = self._handoff_bytes.labels(*self._readings.labels(), "out")
        async with aclosing(parts):
            async for part in parts:
                leaving.inc(len(part))
                yield part


class _State(Collector):
    """What is read at a scrape."""

    def __init__(self, readings: Readings) -> None:
        self._readings = readings

    def collect(self) -> Iterator[Metric]:
        labels, status = self._readings.labels(), self._readings.status()
        yield from _load_of(labels, status, self._readings.requests_running())
        yield from _links_of(labels, status.load.links)
        if status.board is not None:
            yield from _board_of(status.worker, status.board)
        yield from _consumed_by(status.worker, self._readings.consumed())
        info = InfoMetricFamily("edge_llm_worker", "What this worker is and promises.", labels=LABELS)
        info.add_metric(labels, {"version": status.version, "level": status.level, "quantization": status.quantization})
        yield info
        node = InfoMetricFamily("edge_llm_node", "The board this worker runs on.", labels=_BOARD_LABELS)
        node.add_metric((status.worker,), dict(self._readings.about_node()))
        yield node


def _load_of(labels: tuple[str, str, str], status: WorkerStatus, requests_running: int) -> Iterator[Metric]:
    load = status.load

    def gauge(name: str, what: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"edge_llm_{name}", what, labels=LABELS)
        family.add_metric(labels, value)
        return family

    def counter(name: str, what: str, value: float) -> Metric:
        family = CounterMetricFamily(f"edge_llm_{name}", what, labels=LABELS)
        family.add_metric(labels, value)
        return family

    cells = status.slots * status.n_ctx
    yield gauge("ready", "Whether this worker takes requests.", status.is_ready)
    yield gauge("draining", "Whether this worker gives its sequences away and ends.", status.is_draining)
    yield gauge("num_requests_running", "Sequences here, and a prompt computed for others.", requests_running)
    yield gauge("num_requests_waiting", "Prompts for others that wait for their turn.", load.sequences_waiting)
    yield gauge("pending_prompt_tokens", "Prompt tokens to be computed here.", load.pending_prompt_tokens)
    yield gauge("slots", "Sequences that can decode at once.", status.slots)
    yield gauge("slots_used", "Slots that are claimed.", status.slots - load.slots_free)
    if cells:
        used = "Share of KV cells that are claimed for prompts and answers to come, 0 to 1."
        yield gauge("kv_cache_usage_ratio", used, 1 - load.kv_cells_free / cells)
    yield gauge("decode_step_seconds", "Mean duration of the latest decode steps; 0: none yet.", load.decode_step_s)
    rate = "Rate of the latest prompts; 0: none yet."
    yield gauge("prefill_tokens_per_second", rate, load.prefill_tokens_per_s)
    yield gauge("prefix_cache_bytes", "KV of finished prompts and answers kept in host memory.", load.prefix_bytes)
    yield gauge("prefix_cache_limit_bytes", "As much of it as may be kept.", load.prefix_limit_bytes)
    yield counter("prefix_cache_queries", "Tokens looked up among what is kept here.", load.prefix_query_tokens)
    yield counter("prefix_cache_hits", "Tokens that were kept here.", load.prefix_hit_tokens)


def _links_of(labels: tuple[str, str, str], links: Iterable[Link]) -> Iterator[Metric]:
    """Per worker that KV came from."""
    names = (*LABELS, "peer")
    rate = GaugeMetricFamily("edge_llm_link_bytes_per_second", "How fast KV came from a peer, latest.", labels=names)
    trip = GaugeMetricFamily("edge_llm_link_round_trip_seconds", "Shortest wait for a peer's answer.", labels=names)
    for link in links:
        if link.bytes_per_s:
            rate.add_metric((*labels, link.peer), link.bytes_per_s)
        trip.add_metric((*labels, link.peer), link.round_trip_s)
    yield from (rate, trip)


def _board_of(node: str, board: Board) -> Iterator[Metric]:
    """A board without a sensor has no series: a 0 would be a temperature."""

    def gauge(name: str, what: str, value: float | None) -> Iterator[Metric]:
        if value is not None:
            family = GaugeMetricFamily(f"edge_llm_node_{name}", what, labels=_BOARD_LABELS)
            family.add_metric((node,), value)
            yield family

    yield from gauge("temperature_celsius", "Of the processor.", board.temperature_c)
    yield from gauge("cpu_frequency_hertz", "Clock of the first core now.", board.frequency_hz)
    yield from gauge("cpu_usage_ratio", "Share of all cores in use lately, 0 to 1.", board.cpu_share)
    yield from gauge("memory_usage_ratio", "Share of memory in use, 0 to 1.", board.ram_share)
    if board.throttled:
        family = GaugeMetricFamily(
            "edge_llm_node_throttled", "What holds the board back now.", labels=(*_BOARD_LABELS, "kind")
        )
        for kind, is_held_back in board.throttled.items():
            family.add_metric((node, kind), is_held_back)
        yield family


def _consumed_by(node: str, used: Consumed) -> Iterator[Metric]:
    """Counters, so that whoever scrapes has rates of its own time; what is not known has no series."""

    def family(kind: type[Family], name: str, what: str, label: str, values: Mapping[str, float]) -> Iterator[Metric]:
        if values:
            made = kind(f"edge_llm_{name}", what, labels=(*_BOARD_LABELS, label))
            for key, value in values.items():
                made.add_metric((node, key), value)
            yield made

    def size(name: str, what: str, value: int | None) -> Iterator[Metric]:
        if value is not None:
            made = GaugeMetricFamily(f"edge_llm_{name}", what, labels=_BOARD_LABELS)
            made.add_metric((node,), value)
            yield made

    counter, gauge = CounterMetricFamily, GaugeMetricFamily
    busy = {str(core): times.busy_s for core, times in used.cores.items()}
    yield from family(counter, "node_core_busy_seconds", "Time that a core was busy since the boot.", "core", busy)
    passed = {str(core): times.all_s for core, times in used.cores.items()}
    yield from family(
        counter, "node_core_seconds", "All time of a core since the boot, by its own clock.", "core", passed
    )
    if used.network is not None:
        by = {"in": used.network.received, "out": used.network.sent, "loopback": used.network.loopback}
        what = "Bytes over the board's network cards, and between its own processes."
        yield from family(counter, "node_network_bytes", what, "direction", by)
    yield from family(counter, "node_energy_joules", "Of each processor package.", "package", used.energy_j)
    yield from family(gauge, "node_power_watts", "Of each rail that a sensor measures.", "rail", used.power_w)
    yield from size("node_memory_used_bytes", "Memory that a new process could not have.", used.ram_used_bytes)
    yield from size("worker_group_bytes", "Memory of this worker's control group, files too.", used.group_bytes)
    yield from size("worker_group_peak_bytes", "The most that it ever was.", used.group_peak_bytes)
    yield from size("worker_anonymous_bytes", "Memory of this worker without mapped files.", used.anonymous_bytes)
