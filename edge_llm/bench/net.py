"""`edge-llm bench net`: round trip, bandwidth and hand-off rate between nodes, on a running cluster or on a bare link.

Owns both experiments and their figures. Refuses to know files, and how workers are found: places are given.

On a cluster, as KV really travels: for each pair of a worker that reads prompts and one that decodes, the decode worker
is asked for one token of a new prompt, twice over. `computed`: the prefill worker computes the prompt, so what the
hand-off costs is what comes after that (`handoff_ms`). `kept`: it has the prompt's KV already (this machine let it be
computed before), so bytes over time say how fast a hand-off can be: `handoff_rate`. Round trip and bandwidth are what
the decode worker itself publishes of its peers (worker/links.py): shortest question to first answer, and bytes of
bursts. Prompts are random, of a tenant of our own, and take a slot for a token: a cluster that serves stays up.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from edge_llm.bench.processes import MeasureFailed
from edge_llm.bench.run import Run
from edge_llm.bench.stats import median, percentile
from edge_llm.bench.streams import prompt_ids
from edge_llm.bench.tcp_link import Link
from edge_llm.errors import EdgeLLMError, WorkerError
from edge_llm.kv.frames import Error
from edge_llm.kv.snapshot import ids_digest
from edge_llm.worker.client import Peer, WorkerClient
from edge_llm.worker.messages import (
    DecodeRequest,
    PrefillCandidate,
    PrefillRequest,
    PromptReport,
    Sampling,
    WorkerStatus,
)
from edge_llm.worker.pull import Expected, Puller
from edge_llm.worker.tickets import KeyRing

DEFINITIONS: Final[Mapping[str, str]] = {
    "round_trip_ms": "cluster: shortest time from a question for KV to the first byte of its answer, as the worker "
    "that asked has seen it; link: 64 bytes there and back",
    "bandwidth": "MB/s (10^6 bytes) of bytes that were there to be sent",
    "handoff_rate": "MB/s of KV that was there to be sent, from the first frame to the last",
    "handoff_ms": "what a split adds after the prompt was computed: the last chunk on its way, then adopting it",
    "connect_ms": "from this machine: a TCP connection to the worker, which is one round trip",
}
TENANT: Final = "bench-net"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """`prompt_tokens`: of the prompts whose KV travels (less where a context is smaller)."""

    prompt_tokens: int = 1024
    repetitions: int = 3
    seed: int = 0
    timeout_s: float = 300.0
    connects: int = 20


@dataclass(frozen=True, slots=True)
class Places:
    """Workers and the key of their cluster. `name`: of this client, as gateways have one; no two at a time alike."""

    peers: tuple[Peer, ...]
    keys: KeyRing
    name: str
    clock: Callable[[], float] = time.time


@dataclass(slots=True)
class Tally:
    """What is known so far, by worker and by pair."""

    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    statuses: dict[str, WorkerStatus] = field(default_factory=dict)
    pairs: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def figures(self, run: Run) -> dict[str, Any]:
        """Medians over repetitions; null is what was not measured."""
        pairs = [_pair(source, target, facts, run.samples) for (source, target), facts in self.pairs.items()]
        return {"definitions": dict(DEFINITIONS), "nodes": self.nodes, "pairs": pairs, "notes": self.notes}


async def measure(places: Places, plan: Plan, run: Run, tally: Tally, progress: Progress) -> None:
    """Fills `tally` and `run` as it goes. A pair that fails is noted and leaves the others. Raises MeasureFailed when
    there is no pair."""
    async with _cluster(places) as cluster:
        for number, peer in enumerate(places.peers):
            progress(f"asking {peer.worker}", number, len(places.peers))
            await _look(cluster.client, peer, plan, run, tally)
        if not tally.statuses:
            why = run.failures[0].why if run.failures else "the file names none"
            raise MeasureFailed(f"none of {len(places.peers)} workers can be asked: {why}")
        pairs = _pairs(places.peers, tally, run.failures[0].why if run.failures else "")
        for number, (source, target) in enumerate(pairs):
            facts = tally.pairs.setdefault((source.worker, target.worker), {})
            for repetition in range(plan.repetitions):
                done, total = number * plan.repetitions + repetition, len(pairs) * plan.repetitions
                progress(f"{source.worker} to {target.worker}", done, total)
                try:
                    async with asyncio.timeout(plan.timeout_s):
                        await _hand_over(cluster, plan, source, target, repetition, run, tally)
                except (EdgeLLMError, TimeoutError) as error:
                    why = f"no answer within {plan.timeout_s:g} s" if isinstance(error, TimeoutError) else str(error)
                    run.fail(f"{source.worker} to {target.worker}", why)
                    break
            await _read_link(cluster.client, source, target, facts, run)


async def _look(client: WorkerClient, peer: Peer, plan: Plan, run: Run, tally: Tally) -> None:
    """What a worker is, and how far it is from here."""
    try:
        status = await client.status(peer)
        connects_s = [await asyncio.to_thread(_connect_s, peer.address) for _ in range(plan.connects)]
    except EdgeLLMError as error:
        run.fail(peer.worker, error.message)
        return
    except OSError as error:
        run.fail(peer.worker, f"no connection to {peer.address}: {error}")
        return
    tally.statuses[peer.worker] = status
    tally.nodes[peer.worker] = {
        "address": peer.address,
        "role": status.role,
        "model": status.model,
        "kv_bytes_per_token": status.kv_bytes_per_token,
        "connect_ms": round(1e3 * median(connects_s), 4),
    }
    for took_s in connects_s:
        run.add(f"{peer.worker}: connect_ms", 1e3 * took_s)
    run.case({"case": peer.worker, **tally.nodes[peer.worker]})


def _connect_s(address: str) -> float:
    host, _, port = address.rpartition(":")
    began_s = time.monotonic()
    with socket.create_connection((host.strip("[]"), int(port)), timeout=5.0):
        return time.monotonic() - began_s


def _pairs(peers: Sequence[Peer], tally: Tally, trouble: str) -> list[tuple[Peer, Peer]]:
    """Who may hand over to whom, by what they say of themselves. `trouble`: of a worker that said nothing."""
    found: list[tuple[Peer, Peer]] = []
    for source in peers:
        for target in peers:
            giving, taking = tally.statuses.get(source.worker), tally.statuses.get(target.worker)
            if source is target or giving is None or taking is None or not (giving.serves_prompts and taking.slots):
                continue
            if not giving.splits or giving.compatibility != taking.compatibility:
                why = giving.split_reason or "they run other models or cache types"
                tally.notes.append(f"{source.worker} to {target.worker}: no hand-off: {why}")
                continue
            found.append((source, target))
    silent = [f"{peer.worker} at {peer.address}" for peer in peers if peer.worker not in tally.statuses]
    if not found and silent:
        raise MeasureFailed(
            f"no pair is left to measure, because {' and '.join(silent)} {'do' if len(silent) > 1 else 'does'} not "
            f"answer ({trouble}): start it, or correct its address in the workers file"
        )
    if not found:
        raise MeasureFailed(
            "no two of these workers hand KV over: one has to serve prompts (role prefill or mixed) and another one to "
            "decode. A bare link is measured with --listen on one board and --to on the other"
        )
    return found


async def _hand_over(
    cluster: _Cluster, plan: Plan, source: Peer, target: Peer, repetition: int, run: Run, tally: Tally
) -> None:
    """A prompt that is computed while it is sent, and one that is there already."""
    giving, taking = tally.statuses[source.worker], tally.statuses[target.worker]
    tokens = min(plan.prompt_tokens, giving.n_ctx - 2, taking.n_ctx - 2)
    rng = random.Random(f"{plan.seed}/{source.worker}/{target.worker}/{repetition}/{cluster.places.name}")
    for kind in ("computed", "kept"):
        ids = prompt_ids(tokens, giving.vocab_size, rng.getrandbits(32))
        if kind == "kept":
            await cluster.let_keep(source, giving, ids, plan.timeout_s)
        report = await cluster.ask(source, target, ids, plan.timeout_s)
        if report.mode != "split":
            raise WorkerError(f"{target.worker} did not take KV from {source.worker}: {report.fallback or 'no reason'}")
        figures = _figures(report, kind)
        for name, value in figures.items():
            if value is not None:
                run.add(f"{source.worker} to {target.worker}: {name}", value)
        run.case(
            {
                "case": f"{source.worker} to {target.worker}, {kind}, {repetition + 1}",
                "prompt_tokens": tokens,
                "wait_ms": report.wait_ms,
                "prefill_ms": report.prefill_ms,
                "handoff_ms": report.handoff_ms,
                "adopt_ms": report.adopt_ms,
                "handoff_bytes": report.handoff_bytes,
                "overlapped_bytes": report.overlapped_bytes,
                "prefill_cached_tokens": report.prefill_cached_tokens,
                "restored_tokens": report.restored_tokens,
            }
        )


def _figures(report: PromptReport, kind: str) -> dict[str, float | None]:
    if kind == "computed":
        overlapped = report.overlapped_bytes / report.handoff_bytes if report.handoff_bytes else None
        return {"handoff_ms": report.handoff_ms, "adopt_ms": report.adopt_ms, "overlapped_share": overlapped}
    came_ms = report.prefill_ms + report.handoff_ms - report.adopt_ms
    # a worker that keeps nothing computes again, and its bytes over time would be its speed in computing
    is_kept = 2 * report.prefill_cached_tokens > report.restored_tokens
    return {
        "handoff_rate_mb_per_s": report.handoff_bytes / 1e3 / came_ms if is_kept and came_ms > 0 else None,
        "handoff_tokens_per_s": 1e3 * report.restored_tokens / came_ms if is_kept and came_ms > 0 else None,
        "handoff_bytes": float(report.handoff_bytes),
    }


async def _read_link(client: WorkerClient, source: Peer, target: Peer, facts: dict[str, Any], run: Run) -> None:
    """What the decode worker has measured itself, of all that came from there since it started."""
    try:
        status = await client.status(target)
    except EdgeLLMError as error:
        run.fail(f"{source.worker} to {target.worker}: link", error.message)
        return
    for link in status.load.links:
        if link.peer == source.worker:
            facts["round_trip_ms"] = round(1e3 * link.round_trip_s, 4)
            facts["bandwidth_mb_per_s"] = round(link.bytes_per_s / 1e6, 3) if link.bytes_per_s else None
            facts["transfers"] = link.samples


def _pair(source: str, target: str, facts: Mapping[str, Any], samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    names = (
        "handoff_rate_mb_per_s", "handoff_tokens_per_s", "handoff_ms", "adopt_ms", "overlapped_share", "handoff_bytes"
    )  # fmt: skip
    found: dict[str, Any] = {"from": source, "to": target}
    found |= {name: facts.get(name) for name in ("round_trip_ms", "bandwidth_mb_per_s", "transfers")}
    for name in names:
        values = samples.get(f"{source} to {target}: {name}")
        found[name] = round(median(values), 4) if values else None
    return found


# -- a client of all workers, as a gateway is one


class _Cluster:
    """Asks decode workers for one token, and hears how each prompt came to be."""

    def __init__(self, places: Places, client: WorkerClient, puller: Puller) -> None:
        self.places, self.client, self._puller = places, client, puller
        self._numbers = iter(range(1 << 31))
        self._waiting: dict[str, asyncio.Future[PromptReport]] = {}
        self._hearing: dict[str, asyncio.Task[None]] = {}

    async def ask(self, source: Peer, target: Peer, ids: Sequence[int], timeout_s: float) -> PromptReport:
        """How the prompt came to `target`. Raises WorkerError and what the worker says."""
        if target.worker not in self._hearing:
            self._hearing[target.worker] = asyncio.create_task(self._hear(target), name=f"events of {target.worker}")
        request_id = f"{self.places.name}-{next(self._numbers)}"
        future: asyncio.Future[PromptReport] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future
        request = DecodeRequest(
            request_id=request_id,
            epoch=0,
            gateway=self.places.name,
            prompt_ids=list(ids),
            max_tokens=1,
            sampling=Sampling(temperature=0.0),
            candidates=[self._candidate(source, request_id, ids)],
            tenant=TENANT,
            time_left_s=timeout_s,
            must_split=True,
        )
        try:
            await self.client.decode(target, request)
            return await future
        finally:
            self._waiting.pop(request_id, None)

    async def let_keep(self, source: Peer, status: WorkerStatus, ids: Sequence[int], timeout_s: float) -> None:
        """Have a prompt computed and kept, by reading its KV here."""
        request_id = f"{self.places.name}-{next(self._numbers)}"
        candidate = self._candidate(source, request_id, ids)
        request = PrefillRequest(
            request_id=request_id,
            ids=list(ids),
            compatibility=status.compatibility,
            tenant=TENANT,
            time_left_s=timeout_s,
        )
        key = self.places.keys.transfer_key(candidate.ticket)
        expected = Expected(status.kv_bytes_per_token, status.chunk_tokens, len(ids) - 1, 0, ids_digest(ids))
        async with aclosing(self._puller.pull(candidate, request, key, expected)) as events:
            async for event in events:
                if isinstance(event, Error):
                    raise WorkerError(f"{source.worker} did not compute a prompt: {event.message}")

    def _candidate(self, source: Peer, request_id: str, ids: Sequence[int]) -> PrefillCandidate:
        ticket = self.client.prefill_ticket(source, request_id, ids_digest(ids), TENANT)
        return PrefillCandidate(worker=source.worker, address=source.address, ticket=ticket)

    async def _hear(self, peer: Peer) -> None:
        """Reports and failures of one worker; who waits hears of a lost connection, too."""
        try:
            async for batch in self.client.events(peer):
                for prompted in batch.prompted:
                    self._settle(prompted.request_id, prompted.report)
                for failed in batch.failed:
                    self._settle(failed.request_id, WorkerError(f"{peer.worker}: {failed.message}"))
        except EdgeLLMError as error:
            self._hearing.pop(peer.worker, None)
            for request_id in list(self._waiting):
                self._settle(request_id, error)

    def _settle(self, request_id: str, outcome: PromptReport | EdgeLLMError) -> None:
        future = self._waiting.get(request_id)
        if future is None or future.done():
            return
        if isinstance(outcome, EdgeLLMError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    async def close(self) -> None:
        tasks = list(self._hearing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def _cluster(places: Places) -> AsyncIterator[_Cluster]:
    nonces = (f"{places.name}-{number}" for number in iter(range(1 << 62)))
    async with aiohttp.ClientSession() as session, Puller() as puller:
        client = WorkerClient(session, places.keys, places.name, places.clock, lambda: next(nonces))
        cluster = _Cluster(places, client, puller)
        try:
            yield cluster
        finally:
            await cluster.close()


# -- a bare link


@dataclass(frozen=True, slots=True)
class LinkPlan:
    """`burst_bytes`: as much as the KV of a prompt."""

    seconds: float = 5.0
    pings: int = 200
    burst_bytes: int = 16 << 20
    bursts: int = 10
    kv_bytes_per_token: int = 0


def measure_link(link: Link, plan: LinkPlan, run: Run, progress: Progress) -> dict[str, Any]:
    """Fills `run` as it goes; a part that fails is noted and leaves the others. Raises MeasureFailed when nothing was
    measured before it."""
    parts: dict[str, Callable[[], None]] = {
        "round trips": lambda: _round_trips(link, plan, run),
        "to peer": lambda: _one_way("to_peer", link.to_peer, plan, run),
        "from peer": lambda: _one_way("from_peer", link.from_peer, plan, run),
        "bursts": lambda: _bursts(link, plan, run),
    }
    for number, (name, part) in enumerate(parts.items()):
        progress(name, number, len(parts))
        try:
            part()
        except MeasureFailed as error:
            if not run.samples:
                raise
            run.fail(name, error.message)
    return link_figures(plan, run)


def _round_trips(link: Link, plan: LinkPlan, run: Run) -> None:
    for took_s in link.round_trips_s(plan.pings):
        run.add("round_trip_ms", 1e3 * took_s)
    run.case({"case": "round trips", "ms": run.samples["round_trip_ms"]})


def _one_way(name: str, measured: Callable[[float], tuple[int, float]], plan: LinkPlan, run: Run) -> None:
    size, seconds = measured(plan.seconds)
    run.add(f"{name}_mb_per_s", size / 1e6 / seconds if seconds > 0 else 0.0)
    run.case({"case": name, "bytes": size, "seconds": seconds})


def _bursts(link: Link, plan: LinkPlan, run: Run) -> None:
    for took_s in link.bursts_s(plan.burst_bytes, plan.bursts):
        run.add("burst_ms", 1e3 * took_s)
    run.case({"case": "bursts", "bytes": plan.burst_bytes, "ms": run.samples["burst_ms"]})


def link_figures(plan: LinkPlan, run: Run) -> dict[str, Any]:
    """What is there so far."""
    found: dict[str, Any] = {"definitions": {name: DEFINITIONS[name] for name in ("round_trip_ms", "bandwidth")}}
    if trips := run.samples.get("round_trip_ms"):
        shares = {"min": 0.0, "p50": 0.5, "p95": 0.95, "p99": 0.99}
        found["round_trip_ms"] = {key: round(percentile(trips, share), 4) for key, share in shares.items()}
    for name in ("to_peer_mb_per_s", "from_peer_mb_per_s"):
        if values := run.samples.get(name):
            found[name] = round(median(values), 3)
    if bursts := run.samples.get("burst_ms"):
        rate = plan.burst_bytes / 1e3 / median(bursts)
        found["handoff"] = {
            "bytes": plan.burst_bytes,
            "ms": round(median(bursts), 3),
            "mb_per_s": round(rate, 3),
            "tokens_per_s": round(1e6 * rate / plan.kv_bytes_per_token, 1) if plan.kv_bytes_per_token else None,
        }
    return found
