"""`edge-llm bench gateway`: what one gateway process costs per token and per request, at a thousand streams.

Owns the experiment. The gateway has one core for itself; the workers (simulated, many slots each, so that a step brings
many tokens) and the client share another. While the streams run, probes ask a further worker that is idle and as fast
as it goes, by turns through the gateway (text: it is tokenized) and directly (token ids, the worker's own protocol):
the difference of the medians is what the gateway adds to the time to the first token. The loaded workers step back for
the client and the probed one (nice): they are on the same core here, and on other boards in a cluster. CPU is the
process's own accounting over the steady part, divided by the tokens it passed on in it.
Refuses to know how clusters are started, and the gateway's code.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from edge_llm.bench.layout import Layout, LocalProcess, Started
from edge_llm.bench.load_client import LoadClient
from edge_llm.bench.processes import MeasureFailed
from edge_llm.bench.record import Process
from edge_llm.bench.run import Run
from edge_llm.bench.streams import StreamClient
from edge_llm.machine import peak_memory_bytes, process_usage
from edge_llm.worker.client import Peer, WorkerClient
from edge_llm.worker.messages import DecodeRequest, Sampling
from edge_llm.worker.tickets import KeyRing

SLOTS: Final = 64
PROBE_MODEL: Final = "probe"
LOAD_MODEL: Final = "simulated"
BARS: Final[Mapping[str, float]] = {"ttft_added_ms_p50": 4.0, "cpu_us_per_token": 60.0, "rss_mb": 150.0, "failed": 0}
_START_S: Final = 60.0
_PROBE_TEXT: Final = "What does a gateway add to the time until the first token of an answer? " * 2
_BEHIND: Final = 10
_PROBE_EVERY_S: Final = 0.05
_PROBE_TOKENS: Final = 4
# What the gateway itself says of a probe, to find out where time goes.
_PARTS: Final = ("queue_ms", "wait_ms", "prefill_ms", "first_decode_ms", "ttft_ms")
# A worker begins about one prompt per decode step: faster, and they would queue there.
_PER_S: Final = 40.0
Neighbours = tuple[tuple[str, str], ...]
LoadLaunch = Callable[[Layout, Neighbours], AbstractAsyncContextManager[Started]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """`window_s` is the steady part; streams go on until after it."""

    streams: int
    tokens_per_s: float
    window_s: float
    gateway_core: int
    load_core: int

    @property
    def workers(self) -> int:
        """A few slots stay free, so that a stream never waits for one."""
        return -(-self.streams // (SLOTS - 2))

    @property
    def answer_tokens(self) -> int:
        """Enough for the start of all streams, the window, and a rest."""
        return int(self.tokens_per_s * (self.streams / _PER_S + self.window_s + 8.0))


async def measure(plan: Plan, launch: LoadLaunch, keys: KeyRing, run: Run, progress: Progress) -> dict[str, Any]:
    """Start everything on the load core, move the gateway to its own, load, probe, count."""
    run.workload |= {
        **asdict(plan),
        "answer_tokens": plan.answer_tokens,
        "arrivals": f"{_PER_S:g} streams/s",
    }
    size = ("--slots", str(SLOTS), "--n-ctx", str(plan.answer_tokens + 64), "--simulated-prompt-tokens-per-s", "0")
    step = ("--simulated-step-s", str(1 / plan.tokens_per_s))
    fast = ("--simulated-prompt-tokens-per-s", "0", "--simulated-step-s", "0")
    probe = Layout("probe", mixed=1, options=("--model", PROBE_MODEL, *fast))
    async with launch(probe, ()) as alone:
        target = next(process for process in alone.processes if process.name == "mixed-1")
        place = f"127.0.0.1:{target.port}"
        load = Layout("load", decode=plan.workers, options=(*size, *step))
        async with launch(load, (("mixed-1", place),)) as cluster:
            gateway = next(process for process in cluster.processes if process.name == "gateway")
            move(gateway.pid, plan.gateway_core)
            for process in cluster.processes:
                if process is not gateway:
                    await asyncio.to_thread(step_back, process.pid)
            await _loaded(plan, cluster.url, gateway, Peer("mixed-1", place), keys, run, progress)
    return figures(run)


def move(pid: int, core: int) -> None:
    """All threads of a process to one core."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {core})


def step_back(pid: int) -> None:
    """All threads of a process behind others on their core: a cluster's workers have boards of their own, so what
    these take from the client and the probed worker is not the gateway's to answer for."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.setpriority(os.PRIO_PROCESS, int(thread), _BEHIND)
    # each worker is a session, and Linux shares a core out between sessions first (sched(7), autogroup)
    with suppress(FileNotFoundError):
        group = Path(f"/proc/{pid}/autogroup")
        try:
            group.write_text(str(_BEHIND))
        except BlockingIOError:  # the kernel takes ten a second from who is not root
            time.sleep(0.15)
            group.write_text(str(_BEHIND))


async def _loaded(
    plan: Plan, url: str, gateway: LocalProcess, peer: Peer, keys: KeyRing, run: Run, progress: Progress
) -> None:
    address = urlsplit(url)
    client = LoadClient(address.hostname or "", address.port or 0)
    bodies = [_body(number, plan.answer_tokens) for number in range(plan.streams)]
    began_s = time.monotonic()
    try:
        progress(f"starting {plan.streams} streams", 0, 0)
        await client.start(bodies, _PER_S)
        if not await client.until(lambda stream: stream.first_s > 0 or stream.ended_s > 0, _START_S):
            run.notes.append("not all streams had begun when the measuring did")
        progress(f"{plan.streams} streams run", 0, 0)
        await _window(plan, url, client, gateway, peer, keys, run)
        progress("streams end", 0, 0)
        await client.until(lambda stream: stream.ended_s > 0, plan.answer_tokens / plan.tokens_per_s + _START_S)
    finally:
        client.hang_up()
    failed = [stream for stream in client.streams if stream.tokens != plan.answer_tokens]
    run.add("failed", len(failed))
    for stream in failed[:5]:
        run.notes.append(f"a stream failed after {stream.pieces} pieces: {stream.complaint}")
    for number, stream in enumerate(client.streams):
        if stream.first_s:
            run.add("load_ttft_s", stream.first_s - stream.sent_s)
        run.case(
            {
                "case": "stream",
                "number": number,
                "sent_s": stream.sent_s - began_s,
                "first_s": stream.first_s - began_s if stream.first_s else None,
                "ended_s": stream.ended_s - began_s if stream.ended_s else None,
                "tokens": stream.tokens,
                "error": stream.complaint or None,
            }
        )


async def _window(
    plan: Plan, url: str, client: LoadClient, gateway: LocalProcess, peer: Peer, keys: KeyRing, run: Run
) -> None:
    """The steady part: CPU and memory of the gateway, tokens it passed on, probes all along."""
    before, pieces, began_s = _usage(gateway), client.pieces, time.monotonic()
    own_cpu_s = time.process_time()
    async with _direct(peer, keys) as ask_directly, aiohttp.ClientSession(url) as session:
        through = StreamClient(session, {"model": PROBE_MODEL, "edge_llm": {"mode": "local"}})
        for number in itertools.count():
            if time.monotonic() > began_s + plan.window_s:
                break
            with run.one_case("probe", number=number):
                await asyncio.sleep(_PROBE_EVERY_S)
                run.add("ttft_direct_s", await ask_directly(_ids(f"{number} directly. {_PROBE_TEXT}")))
                await asyncio.sleep(_PROBE_EVERY_S)
                last, ttft_s = await through.ask(f"{number} through it. {_PROBE_TEXT}", _PROBE_TOKENS)
                run.add("ttft_gateway_s", ttft_s)
                for part in _PARTS:
                    run.add(f"gateway_{part}", last["timings"]["edge_llm"][part])
    wall_s, after = time.monotonic() - began_s, _usage(gateway)
    tokens = client.pieces - pieces
    run.add("tokens_per_s", tokens / wall_s)
    run.add("cpu_us_per_token", 1e6 * (after.cpu_s - before.cpu_s) / max(1, tokens))
    run.add("gateway_cpu_share", (after.cpu_s - before.cpu_s) / wall_s)
    run.add("client_cpu_share", (time.process_time() - own_cpu_s) / wall_s)
    run.add("rss_bytes", after.rss_bytes)
    peak = peak_memory_bytes(gateway.pid) or after.rss_bytes
    cpu_s = after.cpu_s - before.cpu_s
    run.used(
        Process("gateway", (plan.gateway_core,), wall_s, cpu_s, before.rss_bytes, after.rss_bytes, peak, readings=2)
    )


def _ids(text: str) -> list[int]:
    """Token ids of the simulated vocabulary: a beginning, then bytes + 3 (engine/simulated.py)."""
    return [1, *(3 + byte for byte in text.encode())]


def _usage(gateway: LocalProcess) -> Any:
    usage = process_usage(gateway.pid)
    if usage is None:
        raise MeasureFailed("the gateway died under the load")
    return usage


def _body(number: int, tokens: int) -> dict[str, Any]:
    return {
        "model": LOAD_MODEL,
        "prompt": f"Stream number {number}.",
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "edge_llm": {"mode": "local"},
    }


@asynccontextmanager
async def _direct(peer: Peer, keys: KeyRing) -> AsyncIterator[Callable[[list[int]], Any]]:
    """Asks a worker as a gateway does; gives a function from token ids to the seconds until the first token."""
    first: dict[str, asyncio.Future[float]] = {}
    numbers = itertools.count()
    async with aiohttp.ClientSession() as session:
        client = WorkerClient(session, keys, "bench", time.time, lambda: secrets.token_hex(12))

        async def listen() -> None:
            async for batch in client.events(peer):
                for token in batch.tokens:
                    waiting = first.pop(token.request_id, None)
                    if waiting is not None:
                        waiting.set_result(time.monotonic())

        async def ask(ids: list[int]) -> float:
            request_id = f"probe.{next(numbers)}"
            came = first[request_id] = asyncio.get_running_loop().create_future()
            sampling = Sampling(temperature=0.0)
            sent_s = time.monotonic()
            request = DecodeRequest(
                request_id=request_id,
                epoch=0,
                gateway="bench",
                prompt_ids=ids,
                max_tokens=_PROBE_TOKENS,
                sampling=sampling,
            )
            await client.decode(peer, request)
            async with asyncio.timeout(_START_S):
                came_s: float = await came
            return came_s - sent_s

        listening = asyncio.create_task(listen(), name="events of the probed worker")
        # a worker that is gone (Ctrl-C ends all at once) shows in what is asked of it: nobody waits for this task then
        listening.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.sleep(_PROBE_EVERY_S)
        try:
            yield ask
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)


def figures(run: Run) -> dict[str, Any]:
    """What is there so far."""
    found: dict[str, Any] = {}
    direct, through = run.median("ttft_direct_s"), run.median("ttft_gateway_s")
    if direct is not None and through is not None:
        found["ttft_added_ms_p50"] = round(1e3 * (through - direct), 3)
        found["ttft_direct_ms_p50"], found["ttft_gateway_ms_p50"] = round(1e3 * direct, 3), round(1e3 * through, 3)
    for name in ("cpu_us_per_token", "tokens_per_s", "gateway_cpu_share", "client_cpu_share"):
        if (value := run.median(name)) is not None:
            found[name] = round(value, 3)
    if (rss := run.median("rss_bytes")) is not None:
        found["rss_mb"] = round(rss / 1e6, 1)
    if (failed := run.median("failed")) is not None:
        found["failed"] = int(failed)
    return found


def missed(found: Mapping[str, Any]) -> list[str]:
    """Which bars were not met, as lines for people."""
    unmeasured = [f"{name} was not measured" for name in BARS if name not in found]
    return unmeasured + [
        f"{name} is {found[name]:.4g}, not at most {bar:g}"
        for name, bar in BARS.items()
        if name in found and found[name] > bar
    ]
