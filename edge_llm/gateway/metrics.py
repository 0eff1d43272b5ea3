"""What a gateway counts, for /metrics: what its clients saw, what it decided, and what went wrong.

Owns names, types and labels, and what a token costs here: one counter and one histogram, on objects that were looked up
once per model (2 us of the gateway's 60). Refuses to know HTTP and how decisions are made. Every series is labelled
with the model, role `gateway` and this gateway's name; never with a request.

Durations are differences of the gateway's monotonic clock; the phases of a prompt are what its decode worker reported,
measured on that worker's clock. Phases that a replanned request went through twice are those of its last plan.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edge_llm.cluster.discovery import Heard
from edge_llm.cluster.view import ClusterView, Node
from edge_llm.exposition import GAP_SECONDS, LABELS, RATIOS, SECONDS, TOKENS
from edge_llm.gateway.running import Running
from edge_llm.gateway.scheduler import Plan
from edge_llm.gateway.session import State
from edge_llm.worker.messages import PromptReport

ROLE: Final = "gateway"
_RUNNING: Final = (State.PREFILLING, State.DECODING)
_WAITING: Final = (State.QUEUED, State.REPLANNING)
States = Mapping[tuple[str, State], int]
"""How many requests of a model are in a state."""


@dataclass(frozen=True, slots=True)
class _Series:
    """The series of one model that every request or token touches."""

    prompt_tokens: Counter
    generation_tokens: Counter
    first_token: Histogram
    gap: Histogram
    whole: Histogram
    queue: Histogram
    prefill: Histogram
    handoff: Histogram
    decode: Histogram
    prompt_length: Histogram
    answer_length: Histogram
    prefix_queries: Counter
    prefix_hits: Counter


class GatewayMetrics:
    """Counters and histograms of one gateway in `registry`."""

    def __init__(self, registry: CollectorRegistry, gateway: str) -> None:
        self._registry, self._gateway = registry, gateway
        self._series: dict[str, _Series] = {}
        self._request = {name: self._histogram(name, what, buckets) for name, what, buckets in _REQUEST_HISTOGRAMS}
        self._tokens = {name: self._counter(name, what) for name, what in _TOKEN_COUNTERS}
        self._success = self._counter("request_success", "Answers that ended, by what ended them.", "finished_reason")
        self._failed = self._counter("requests_failed", "Accepted requests that ended with an error.", "code")
        self._rejected = Counter(
            "edge_llm_rejected",
            "Requests that were refused before they were accepted.",
            ("role", "node", "code"),
            registry=registry,
        )
        self._decisions = self._counter("route_decisions", "Plans, and why they are as they are.", "mode", "reason")
        self._spills = self._counter(
            "spills", "Nodes that were planned with for the other pool, by whose work.", "pool"
        )
        self._replans = self._counter("replans", "Requests planned again after a worker failed them.", "reason")
        self._dropped = self._counter("stale_tokens", "Tokens that came for an older plan and were dropped.")
        self._checkpoints = self._counter(
            "checkpoints", "Copies of running answers' KV, by what came of it.", "outcome"
        )
        self._checkpoint_bytes = self._counter("checkpoint_bytes", "KV that went from worker to worker for these.")
        self._prediction = self._histogram(
            "prediction_error_ratio", "What came to pass over what the plan predicted.", RATIOS, "kind"
        )
        ProcessCollector(registry=registry)

    def watch(
        self, view: Callable[[], ClusterView], states: Callable[[], States], found: Callable[[], tuple[int, Heard]]
    ) -> None:
        """Read these at every scrape."""
        self._registry.register(_Now(self._gateway, view, states, found))

    # -- per token

    def token(self, running: Running, now_s: float) -> None:
        """A token is delivered; `running` has the clock readings of the ones before."""
        series = self._of(running.job.model)
        series.generation_tokens.inc()
        if running.last_token_s:
            series.gap.observe(now_s - running.last_token_s)
        else:
            series.first_token.observe(now_s - running.arrived_s)

    # -- per request

    def planned(self, model: str, plan: Plan) -> None:
        """A request has workers."""
        self._decisions.labels(model, ROLE, self._gateway, plan.mode, plan.reason).inc()
        for _, pool in plan.spills:
            self._spills.labels(model, ROLE, self._gateway, pool).inc()

    def judged(self, model: str, kind: Literal["ttft", "tpot"], error_ratio: float | None) -> None:
        """What came to pass over what was predicted; None where there is nothing to compare."""
        if error_ratio is not None:
            self._prediction.labels(model, ROLE, self._gateway, kind).observe(error_ratio)

    def prompted(self, running: Running, report: PromptReport) -> None:
        """A prompt is whole. What a request that was planned again computes anew counts again, as it costs again."""
        series = self._of(running.job.model)
        tokens = report.restored_tokens + report.computed_tokens
        series.prefix_queries.inc(tokens)
        series.prefix_hits.inc(min(tokens, max(report.cached_tokens, report.prefill_cached_tokens)))
        if not running.first_token_s:
            series.prompt_tokens.inc(len(running.job.prompt_ids))

    def ended(self, running: Running) -> None:
        """The client has its answer, or is gone."""
        model, session = running.job.model, running.session
        if session.state is State.CANCELLED:
            self._success.labels(model, ROLE, self._gateway, "abort").inc()
        elif session.state is State.DONE:
            self._success.labels(model, ROLE, self._gateway, session.finish_reason or "stop").inc()
            self._measure(running)

    def _measure(self, running: Running) -> None:
        """The phases of an answer that came to its end."""
        series, report = self._of(running.job.model), running.reading
        series.whole.observe(running.last_token_s - running.arrived_s)
        series.queue.observe(running.sent_s - running.arrived_s)
        series.decode.observe(running.last_token_s - running.first_token_s)
        series.prompt_length.observe(len(running.job.prompt_ids))
        series.answer_length.observe(len(running.session.delivered))
        if report is not None:
            series.prefill.observe((report.wait_ms + report.prefill_ms) / 1e3)
            if report.mode == "split":
                series.handoff.observe(report.handoff_ms / 1e3)

    def failed(self, model: str, code: str) -> None:
        self._failed.labels(model, ROLE, self._gateway, code).inc()

    def rejected(self, code: str) -> None:
        self._rejected.labels(ROLE, self._gateway, code).inc()

    def replanned(self, model: str, code: str) -> None:
        self._replans.labels(model, ROLE, self._gateway, code).inc()

    def dropped(self, model: str) -> None:
        self._dropped.labels(model, ROLE, self._gateway).inc()

    def checkpointed(self, model: str, outcome: str, fetched_bytes: int) -> None:
        """A checkpoint is kept (outcome `ok`), or failed with an error of that code."""
        self._checkpoints.labels(model, ROLE, self._gateway, outcome).inc()
        self._checkpoint_bytes.labels(model, ROLE, self._gateway).inc(fetched_bytes)

    # -- making series

    def _of(self, model: str) -> _Series:
        series = self._series.get(model)
        if series is None:
            labels = (model, ROLE, self._gateway)
            made = {name: family.labels(*labels) for name, family in self._tokens.items()}
            histograms = {name: family.labels(*labels) for name, family in self._request.items()}
            series = self._series[model] = _Series(
                prompt_tokens=made["prompt_tokens"],
                generation_tokens=made["generation_tokens"],
                first_token=histograms["time_to_first_token_seconds"],
                gap=histograms["inter_token_latency_seconds"],
                whole=histograms["e2e_request_latency_seconds"],
                queue=histograms["request_queue_time_seconds"],
                prefill=histograms["request_prefill_time_seconds"],
                handoff=histograms["request_handoff_time_seconds"],
                decode=histograms["request_decode_time_seconds"],
                prompt_length=histograms["request_prompt_tokens"],
                answer_length=histograms["request_generation_tokens"],
                prefix_queries=made["prefix_cache_queries"],
                prefix_hits=made["prefix_cache_hits"],
            )
        return series

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"edge_llm_{name}", what, (*LABELS, *labels), registry=self._registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"edge_llm_{name}", what, (*LABELS, *labels), registry=self._registry, buckets=buckets)


_TOKEN_COUNTERS: Final = (
    ("prompt_tokens", "Tokens of prompts that were read, kept ones included."),
    ("generation_tokens", "Tokens delivered to clients."),
    ("prefix_cache_queries", "Prompt positions looked up in what workers keep."),
    ("prefix_cache_hits", "Prompt positions that workers had kept."),
)
_REQUEST_HISTOGRAMS: Final = (
    ("time_to_first_token_seconds", "From arrival to the first token; tokenizing and queue included.", SECONDS),
    ("inter_token_latency_seconds", "Between two tokens of a stream, from the second on.", GAP_SECONDS),
    ("e2e_request_latency_seconds", "From arrival to the last token.", SECONDS),
    ("request_queue_time_seconds", "From arrival until a worker had the request.", SECONDS),
    ("request_prefill_time_seconds", "Until the prompt was computed, the wait at its worker included.", SECONDS),
    ("request_handoff_time_seconds", "What splitting added after that; split requests only.", SECONDS),
    ("request_decode_time_seconds", "From the first token to the last.", SECONDS),
    ("request_prompt_tokens", "Length of prompts.", TOKENS),
    ("request_generation_tokens", "Length of answers.", TOKENS),
)


class _Now(Collector):
    """What is read at a scrape."""

    def __init__(
        self,
        gateway: str,
        view: Callable[[], ClusterView],
        states: Callable[[], States],
        found: Callable[[], tuple[int, Heard]],
    ) -> None:
        self._gateway, self._view, self._states, self._found = gateway, view, states, found

    def collect(self) -> Iterator[Metric]:
        view, states = self._view(), self._states()
        models = sorted({*view.models, *(model for model, _ in states)})
        running = GaugeMetricFamily("edge_llm_num_requests_running", "Requests that a worker has.", labels=LABELS)
        waiting = GaugeMetricFamily("edge_llm_num_requests_waiting", "Requests that wait for a plan.", labels=LABELS)
        used = "Share of KV cells of all decode workers that is claimed, 0 to 1."
        cells = GaugeMetricFamily("edge_llm_kv_cache_usage_ratio", used, labels=LABELS)
        for model in models:
            labels = (model, ROLE, self._gateway)
            running.add_metric(labels, sum(states.get((model, state), 0) for state in _RUNNING))
            waiting.add_metric(labels, sum(states.get((model, state), 0) for state in _WAITING))
            if (ratio := _kv_usage(view, model)) is not None:
                cells.add_metric(labels, ratio)
        yield from (running, waiting, cells, _nodes(view), *_discovered(self._gateway, *self._found()))


def _kv_usage(view: ClusterView, model: str) -> float | None:
    """None where no worker decodes."""
    loads = [node.status for node in view.nodes if node.status.model == model]
    cells = sum(status.slots * status.n_ctx for status in loads)
    return 1 - sum(status.load.kv_cells_free for status in loads) / cells if cells else None


def _nodes(view: ClusterView) -> Metric:
    labels = ("model_name", "worker_role", "state")
    family = GaugeMetricFamily("edge_llm_cluster_nodes", "Workers that answer, by what they are.", labels=labels)
    for (model, role, state), count in Tally(map(_kind, view.nodes)).items():
        family.add_metric((model, role, state), count)
    return family


def _discovered(gateway: str, places: int, heard: Heard) -> Iterator[Metric]:
    what = "Places where workers may be, whether they answer or not."
    family = GaugeMetricFamily("edge_llm_discovery_places", what, labels=("role", "node"))
    family.add_metric((ROLE, gateway), places)
    yield family
    if heard.age_s is not None:
        what = "Since the Kubernetes API server was heard last; the places are as old."
        family = GaugeMetricFamily("edge_llm_discovery_age_seconds", what, labels=("role", "node"))
        family.add_metric((ROLE, gateway), heard.age_s)
        yield family


def _kind(node: Node) -> tuple[str, str, str]:
    status = node.status
    state = "draining" if status.is_draining else "ready" if status.is_ready else "not_ready"
    return status.model, status.role, state
