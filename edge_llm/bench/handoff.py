"""`edge-llm bench handoff`: what splitting costs, and what a long prompt does to streams that run.

Owns the experiment: a long prompt arrives at a cluster whose decode worker is idle or has streams running. It reads
the parts of TTFT that the gateway reports, the gaps that clients of the running streams see, and (on a cluster of its
own, below) the memory of sender and receiver. The same arrival is repeated on a cluster that ships all KV after
prefill, on one mixed worker, and on llama-server of the same source. Refuses to know how clusters are started
(`Launch`) and what KV is.

Streams get their pace first; a stall ratio is the largest gap over the mean gap before, the worst of the streams, the
median over repetitions. `prompt_stall_ratio` looks while the prompt arrives, its adoption included: what splitting is
to hide. `stall_ratio` looks on through the answer's first steps: one more row, deeper than the others, costs what it
costs wherever it came from. Of a decode worker `decode_stall_ratio` is the worst of the former, `answer_stall_ratio` of
the latter; on one worker that does both, and on llama-server, the prompt's last step makes the first token: there the
whole counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

import aiohttp

from edge_llm.bench.engine import MEASURE, BenchModel
from edge_llm.bench.layout import Launch, Layout, LocalProcess, Started
from edge_llm.bench.processes import MeasureFailed, Measurer
from edge_llm.bench.record import Process
from edge_llm.bench.run import Run
from edge_llm.bench.streams import StreamClient, client_of, gaps_around, largest_gap_before, prompt_ids
from edge_llm.catalogue.memory import CHUNKS_ON_THEIR_WAY
from edge_llm.errors import EdgeLLMError
from edge_llm.machine import peak_memory_bytes, process_usage, reset_peak_memory

PARTS: Final = ("queue", "wait", "prefill", "last_chunk", "adopt", "first_decode", "ttft")
BARS: Final[Mapping[str, tuple[str, float]]] = {
    "export_share": ("at most", 0.01),
    "overlap_share": ("at least", 0.90),
    "decode_stall_ratio": ("at most", 2.0),
    "mixed_stall_ratio": ("at most", 4.0),
}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. `stall_streams` are the numbers of running streams that stall ratios are taken over."""

    core: int
    repetitions: int
    vocab_size: int
    chunk_tokens: int
    n_ctx: int = 4096
    prompt_tokens: int = 1700
    ttft_streams: tuple[int, ...] = (0, 1, 4, 8)
    stall_streams: tuple[int, ...] = (1, 4)
    answer_tokens: int = 4

    @property
    def stream_tokens(self) -> int:
        """Long enough to run through the arrival."""
        return self.n_ctx - 64


SPLIT, ONE_PIECE, MEMORY, MIXED, SERVER = "split", "one_piece", "memory", "mixed", "llama_server"
# glibc: map every larger block by itself and give it back when it is freed. Kept for later, what one hand-off took
# would hide what the next one takes.
_GIVES_BACK: Final = "MALLOC_MMAP_THRESHOLD_=65536"


def layouts(plan: Plan) -> dict[str, Layout]:
    """The clusters of the experiment. Nine slots: eight streams and the new prompt; more than `verify` compares, so
    the workers are told to promise no more than same-plan. It changes no kernel."""
    nine = ("--slots", "9", "--level-cap", "same-plan", "--n-ctx", str(plan.n_ctx))
    return {
        SPLIT: Layout(SPLIT, prefill=1, decode=1, options=nine),
        ONE_PIECE: Layout(ONE_PIECE, prefill=1, decode=1, options=(*nine, "--handoff", "serialized")),
        MEMORY: Layout(MEMORY, prefill=1, decode=1, options=nine, environ=(_GIVES_BACK,)),
        MIXED: Layout(MIXED, mixed=1, options=("--slots", "8", "--n-ctx", str(plan.n_ctx))),
    }


async def measure(
    plan: Plan, model: BenchModel, launch: Launch, launch_server: Launch | None, run: Run, progress: Progress
) -> dict[str, Any]:
    """All figures. Fills `run` as it goes; a part that fails is noted there and leaves the others."""
    run.models.append(model.facts)
    run.workload |= asdict(plan)
    clusters = layouts(plan)
    everywhere = sorted({*plan.ttft_streams, *plan.stall_streams})
    few = sorted({0, *plan.stall_streams})
    steps: list[tuple[str, Callable[[], Awaitable[None]]]] = [
        ("KV export", lambda: asyncio.to_thread(_measure_export, plan, model, run)),
        ("split", lambda: _arrivals(plan, clusters[SPLIT], launch, everywhere, run, progress)),
        ("one piece after prefill", lambda: _arrivals(plan, clusters[ONE_PIECE], launch, few, run, progress)),
        ("memory", lambda: _memories(plan, clusters[MEMORY], launch, run, progress)),
        ("mixed", lambda: _arrivals(plan, clusters[MIXED], launch, plan.stall_streams, run, progress)),
    ]
    if launch_server is not None:
        layout = Layout(SERVER)
        steps.append(
            ("llama-server", lambda: _arrivals(plan, layout, launch_server, plan.stall_streams, run, progress))
        )
    for what, step in steps:
        try:
            await step()
        except (EdgeLLMError, aiohttp.ClientError, OSError) as error:
            run.fail(what, str(error) or type(error).__name__)
    return figures(run, plan)


def _measure_export(plan: Plan, model: BenchModel, run: Run) -> None:
    """In the engine, on one core: seconds of reading KV out per second of computing it."""
    arguments = ["--model", str(model.path), "--n-ctx", str(plan.n_ctx), "--slots", "1"]
    arguments += ["--chunk-tokens", str(plan.chunk_tokens)]
    with Measurer("engine", MEASURE, arguments, [plan.core]) as engine:
        run.engine("edge_llm", engine.facts["build"])
        for repetition in range(plan.repetitions):
            with run.one_case("KV export", repetition=repetition):
                answer = engine.ask("export", tokens=plan.prompt_tokens)
                run.add("export_share", answer["export_s"] / answer["compute_s"])
        run.used(engine.usage())


async def _arrivals(
    plan: Plan, layout: Layout, launch: Launch, streams: Sequence[int], run: Run, progress: Progress
) -> None:
    """Long prompts arrive while 0, 1, 4, ... streams run."""
    extra: dict[str, Any] = {"cache_prompt": False}
    if layout.name != SERVER:
        extra["edge_llm"] = {"mode": _mode(layout)}
    started_s = time.monotonic()
    async with launch(layout) as cluster, client_of(cluster.url, extra) as client:
        before = {process.pid: _rss(process.pid) for process in cluster.processes}
        # pages of the KV cache, connections and code that are touched for the first time are no part of a hand-off
        await client.ask(prompt_ids(plan.prompt_tokens, plan.vocab_size, seed=10**6), 1)
        try:
            for repetition in range(plan.repetitions):
                for place, count in enumerate(streams):
                    progress(
                        f"{layout.name}, {count} streams",
                        repetition * len(streams) + place,
                        plan.repetitions * len(streams),
                    )
                    ids = prompt_ids(plan.prompt_tokens, plan.vocab_size, seed=100 * repetition + count)
                    with run.one_case(f"{layout.name}, {count} streams", repetition=repetition):
                        await _arrival(plan, layout, client, ids, count, run)
        finally:
            for process in cluster.processes:
                run.used(_usage(process, layout, before[process.pid], time.monotonic() - started_s))


def _mode(layout: Layout) -> str:
    return "local" if layout.mixed else "split"


async def _arrival(plan: Plan, layout: Layout, client: StreamClient, ids: Sequence[int], count: int, run: Run) -> None:
    async with client.running(count, plan.stream_tokens) as streams:
        sent_s = time.monotonic()
        last, ttft_s = await client.ask(ids, plan.answer_tokens)
        answered_s = time.monotonic()
        for stream in streams:
            await client.next_text(stream, answered_s)
        found = [gaps_around(stream.arrivals_s, sent_s, answered_s) for stream in streams]
        answer_s = _own(last).get("first_decode_ms", 0.0) / 1e3
        before = [largest_gap_before(stream.arrivals_s, sent_s, sent_s + ttft_s, answer_s) for stream in streams]
    where = f"{layout.name}, {count} streams"
    run.add(f"{where}: client_ttft_s", ttft_s)
    if found:
        run.add(f"{where}: stall_ratio", max(gaps.stall_ratio for gaps in found))
        if layout.name != SERVER:  # there the step that makes the first token is the prompt's last one
            pairs = zip(before, found, strict=True)
            run.add(f"{where}: prompt_stall_ratio", max(largest_s / gaps.mean_before_s for largest_s, gaps in pairs))
        run.add(f"{where}: largest_gap_s", max(gaps.largest_during_s for gaps in found))
        run.add(f"{where}: mean_gap_s", max(gaps.mean_before_s for gaps in found))
    if layout.name != SERVER:
        _add_parts(where, last, run)


def _own(last: Mapping[str, Any]) -> Mapping[str, Any]:
    """What our gateway says of an answer; nothing from anybody else's."""
    own: Mapping[str, Any] = last.get("timings", {}).get("edge_llm", {})
    return own


def _add_parts(where: str, last: Mapping[str, Any], run: Run) -> None:
    """The gateway's report of the prompt. What splits must have split."""
    own = _own(last)
    if not where.startswith(MIXED):
        if own["mode"] != "split" or own["fallback"]:
            raise MeasureFailed(f"{where}: the prompt did not split as planned: {own['mode']}, {own['fallback']}")
        run.add(f"{where}: overlap_share", own["overlapped_bytes"] / own["handoff_bytes"])
    parts = {name: own[f"{name}_ms"] for name in ("queue", "wait", "prefill", "adopt", "first_decode", "ttft")}
    parts["last_chunk"] = own["handoff_ms"] - own["adopt_ms"]
    for name in PARTS:
        run.add(f"{where}: {name}_ms", parts[name])
    run.add(f"{where}: handoff_bytes", own["handoff_bytes"])


async def _memories(plan: Plan, layout: Layout, launch: Launch, run: Run, progress: Progress) -> None:
    """What a hand-off takes where it is sent and where it arrives, each on a cluster of its own: who receives keeps the
    memory of one snapshot for the next, so the first one that arrives counts; who sends has to have read a prompt."""
    for repetition in range(plan.repetitions):
        progress("memory", repetition, plan.repetitions)
        async with launch(layout) as cluster:
            pids = {process.name.partition("-")[0]: process.pid for process in cluster.processes}
            with run.one_case("memory", repetition=repetition):
                await _asked(plan, cluster, "local", 3 * repetition)  # touches the cells of the slot, and the code
                with _growth("receiver", pids["decode"], run):
                    await _asked(plan, cluster, "split", 3 * repetition + 1)
                with _growth("sender", pids["prefill"], run):
                    await _asked(plan, cluster, "split", 3 * repetition + 2)


async def _asked(plan: Plan, cluster: Started, mode: str, seed: int) -> None:
    """One prompt, computed anew. Raises MeasureFailed where it ran otherwise."""
    async with client_of(cluster.url, {"cache_prompt": False, "edge_llm": {"mode": mode}}) as client:
        last, _ = await client.ask(prompt_ids(plan.prompt_tokens, plan.vocab_size, 10**6 + seed), plan.answer_tokens)
    own = _own(last)
    if own.get("mode") != mode or own.get("fallback"):
        raise MeasureFailed(f"a prompt that was to run {mode} ran {own.get('mode')}, {own.get('fallback')}")


@contextmanager
def _growth(role: str, pid: int, run: Run) -> Iterator[None]:
    """How far the memory of a worker rises meanwhile above what it had before."""
    before, is_reset = _rss(pid), reset_peak_memory(pid)
    yield
    if is_reset:
        run.add(f"{role}_growth_bytes", max(0, (peak_memory_bytes(pid) or 0) - before))


def _rss(pid: int) -> int:
    usage = process_usage(pid)
    return usage.rss_bytes if usage else 0


def _usage(process: LocalProcess, layout: Layout, rss_before: int, wall_s: float) -> Process | None:
    usage = process_usage(process.pid)
    if usage is None:
        return None
    peak_bytes = peak_memory_bytes(process.pid) or usage.rss_bytes
    name = f"{layout.name}: {process.name}"
    return Process(name, process.cores, wall_s, usage.cpu_s, rss_before, usage.rss_bytes, peak_bytes, readings=2)


# -- figures


def figures(run: Run, plan: Plan) -> dict[str, Any]:
    """Medians of what is there."""
    found: dict[str, Any] = {}
    _put(found, "export_share", run.median("export_share"))
    _put(found, "overlap_share", run.median(f"{SPLIT}, 0 streams: overlap_share"))
    _put(found, "decode_stall_ratio", _worst(run, SPLIT, plan.stall_streams, "prompt_stall_ratio"))
    _put(found, "answer_stall_ratio", _worst(run, SPLIT, plan.stall_streams))
    _put(found, "mixed_stall_ratio", _worst(run, MIXED, plan.stall_streams))
    _put(found, "llama_server_stall_ratio", _worst(run, SERVER, plan.stall_streams))
    sender, receiver = run.median("sender_growth_bytes"), run.median("receiver_growth_bytes")
    if sender is not None and receiver is not None:
        found["peak_handoff_bytes"] = int(max(sender, receiver))
        found["memory"] = _memory(run, plan, int(sender), int(receiver))
    found["arrivals"] = {
        f"{name}, {count} streams": values
        for name in (SPLIT, ONE_PIECE, MIXED, SERVER)
        for count in sorted({*plan.ttft_streams, *plan.stall_streams})
        if (values := _arrival_figures(run, f"{name}, {count} streams"))
    }
    return found


def _memory(run: Run, plan: Plan, sender_bytes: int, receiver_bytes: int) -> dict[str, float]:
    """Of the sender in chunks; of the receiver in chunks beside its snapshot."""
    per_token = run.models[0].kv_bytes_per_token
    chunk_bytes, snapshot_bytes = plan.chunk_tokens * per_token, (plan.prompt_tokens - 1) * per_token
    return {
        "sender_growth_bytes": sender_bytes,
        "receiver_growth_bytes": receiver_bytes,
        "chunk_bytes": chunk_bytes,
        "snapshot_bytes": snapshot_bytes,
        "sender_chunks": sender_bytes / chunk_bytes,
        "receiver_chunks": max(0, receiver_bytes - snapshot_bytes) / chunk_bytes,
    }


def _arrival_figures(run: Run, where: str) -> dict[str, float]:
    names = [*(f"{part}_ms" for part in PARTS), "client_ttft_s", "overlap_share"]
    names += ["stall_ratio", "prompt_stall_ratio", "largest_gap_s", "mean_gap_s"]
    medians = {name: run.median(f"{where}: {name}") for name in names}
    return {name: value for name, value in medians.items() if value is not None}


def _worst(run: Run, name: str, streams: Sequence[int], ratio: str = "stall_ratio") -> float | None:
    """None unless it was measured with every number of streams: one that failed could be the worst."""
    medians = [run.median(f"{name}, {count} streams: {ratio}") for count in streams]
    known = [value for value in medians if value is not None]
    return max(known) if len(known) == len(medians) else None


def _put(found: dict[str, Any], name: str, value: float | None) -> None:
    if value is not None:
        found[name] = value


def missed(found: Mapping[str, Any]) -> list[str]:
    """Which bars were not met, as lines for people."""
    lines = []
    for name, (direction, bar) in BARS.items():
        if name not in found:
            lines.append(f"{name} was not measured")
        elif (found[name] > bar) if direction == "at most" else (found[name] < bar):
            lines.append(f"{name} is {found[name]:.4g}, not {direction} {bar}")
    memory = found.get("memory")
    if memory is None:
        return [*lines, "peak_handoff_bytes was not measured"]
    for role, beside in (("sender", ""), ("receiver", "one snapshot and ")):
        if memory[f"{role}_chunks"] > CHUNKS_ON_THEIR_WAY:
            rise = f"the {role}'s memory rose by {memory[f'{role}_growth_bytes']} bytes"
            lines.append(f"{rise}, above {beside}{CHUNKS_ON_THEIR_WAY} chunks")
    return lines
