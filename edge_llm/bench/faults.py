"""`edge-llm bench faults`: live streams, faults from outside, and what the clients of the streams got.

Owns the campaign: a cluster of real processes behind the proxy, streams with a target among them, one blow at a time,
the comparison with an undisturbed run on another worker, and the counting. A blow counts only when its kind can prove
that it met the target; else it is struck again on new streams. Refuses to know how clusters are started (`Launch`).

Every prompt is used once: what workers keep of earlier prompts must not make a transfer unnecessary.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import aiohttp

from edge_llm.bench.fault_kinds import KINDS, Blow, Kind, NotStruck, Scene, wait_for_moment
from edge_llm.bench.followed import Followed, Verdict, follow, judge
from edge_llm.bench.layout import Layout, Started
from edge_llm.bench.memory_limit import NoCgroup
from edge_llm.bench.processes import MeasureFailed
from edge_llm.bench.proxy import FaultProxy
from edge_llm.bench.run import Run
from edge_llm.bench.streams import prompt_ids

PLACES: Final = {"prefill": 2, "decode": 3}
# So many must be there for the next blow; the others may still be starting after the last one.
ENOUGH: Final = {"prefill": 2, "decode": 2}
READY_S: Final = 60.0
# The longest that a stream may be disturbed is a few detections of 6 s, one after another.
STREAM_S: Final = 120.0
_POLL_S: Final = 0.1
_BETWEEN_STREAMS_S: Final = 0.02
_DETECTION_GOALS_S: Final = {"dead": 1.0, "silent": 6.0}
Place = Callable[[str, int], str]
PlacedLaunch = Callable[[Layout, Place | None], AbstractAsyncContextManager[Started]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """Options of the workers, of the undisturbed one, and of those that serve another model."""

    kinds: tuple[Kind, ...]
    per_kind: int
    options: tuple[str, ...]
    reference_options: tuple[str, ...]
    stranger_options: tuple[str, ...]
    prompt_tokens: int
    answer_tokens: int
    streams: int = 3
    attempts: int = 5
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One blow that met its target."""

    kind: str
    proof: str
    verdicts: tuple[Verdict, ...]
    resumed_s: float | None
    failures: tuple[str, ...]


@dataclass(slots=True)
class Tally:
    """What happened so far. `untested` says per kind why it could not be tried here."""

    outcomes: list[Outcome] = field(default_factory=list)
    attempts: dict[str, int] = field(default_factory=dict)
    untested: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Stage:
    """Everything a trial needs, from the start of the clusters to their end. `ended`: processes that were told to end;
    the gateway may not have noticed yet."""

    plan: Plan
    session: aiohttp.ClientSession
    reference: aiohttp.ClientSession
    proxy: FaultProxy
    stranger_ports: Mapping[str, int]
    vocab_size: int
    kv_bytes_per_token: int
    pulse: asyncio.Event
    ended: set[int] = field(default_factory=set)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Looked at again whenever bytes pass the proxy or a client gets text."""
        async with asyncio.timeout(STREAM_S):
            while not condition():
                self.pulse.clear()
                await self.pulse.wait()

    async def pids(self, enough: Mapping[str, int] = PLACES) -> dict[str, int]:
        """Process ids of the workers that are ready, by name, once there are enough. Raises MeasureFailed."""
        deadline_s = time.monotonic() + READY_S
        nodes: list[dict[str, Any]] = []
        while time.monotonic() < deadline_s:
            async with self.session.get("/cluster") as reply:
                nodes = (await reply.json())["nodes"]
            pids = {node["worker"]: int(node["pid"]) for node in nodes if node["is_ready"]}
            pids = {worker: pid for worker, pid in pids.items() if pid not in self.ended}
            if all(sum(worker.startswith(role) for worker in pids) >= count for role, count in enough.items()):
                return pids
            await asyncio.sleep(_POLL_S)
        there = ", ".join(node["worker"] for node in nodes if node["is_ready"]) or "none"
        raise MeasureFailed(f"not enough workers came back within {READY_S:.0f} s; ready are: {there}")


async def measure(plan: Plan, launch: PlacedLaunch, tally: Tally, run: Run, progress: Progress) -> dict[str, Any]:
    """All kinds, interleaved, so that a slow minute of the machine is not one kind's."""
    sizes = {"prompt_tokens": plan.prompt_tokens, "answer_tokens": plan.answer_tokens, "streams": plan.streams}
    run.workload |= {**sizes, "seed": plan.seed, "options": plan.options}
    pulse = asyncio.Event()
    timeout = aiohttp.ClientTimeout(total=None, sock_read=STREAM_S)
    layout = Layout("faults", prefill=PLACES["prefill"], decode=PLACES["decode"], options=plan.options)
    alone = Layout("reference", mixed=1, options=plan.reference_options)
    async with (
        FaultProxy(plan.seed, pulse.set) as proxy,
        launch(layout, proxy.front) as cluster,
        launch(alone, None) as undisturbed,
        _strangers(plan, launch) as strangers,
        aiohttp.ClientSession(cluster.url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session,
        aiohttp.ClientSession(undisturbed.url, timeout=timeout) as reference,
    ):
        async with session.get("/v1/models") as reply:
            meta = (await reply.json())["data"][0]["meta"]
        size = (meta["vocab_size"], int(meta["kv_bytes_per_token"]))
        stage = _Stage(plan, session, reference, proxy, strangers, *size, pulse)
        for number in range(plan.per_kind):
            for place, kind in enumerate(plan.kinds):
                progress(kind.name, number * len(plan.kinds) + place, plan.per_kind * len(plan.kinds))
                if kind.name not in tally.untested:
                    await _one(stage, kind, number, tally, run)
    return figures(tally, plan, run)


@asynccontextmanager
async def _strangers(plan: Plan, launch: PlacedLaunch) -> AsyncIterator[Mapping[str, int]]:
    """Ports of workers of another model by the names they share with ours; none when no kind needs them."""
    if not any(kind.needs_strangers for kind in plan.kinds):
        yield {}
        return
    async with launch(
        Layout("strangers", prefill=PLACES["prefill"], decode=1, options=plan.stranger_options), None
    ) as other:
        yield {process.name: process.port for process in other.processes}


async def _one(stage: _Stage, kind: Kind, number: int, tally: Tally, run: Run) -> None:
    """Strike until it met the target, or too often."""
    why = "?"
    for attempt in range(stage.plan.attempts):
        tally.attempts[kind.name] = tally.attempts.get(kind.name, 0) + 1
        try:
            outcome = await _trial(stage, kind, f"{kind.name}.{number}.{attempt}")
        except NoCgroup as error:
            tally.untested[kind.name] = error.message
            run.case({"case": kind.name, "number": number, "untested": error.message})
            return
        except NotStruck as error:
            why = error.message
            continue
        except (MeasureFailed, TimeoutError, aiohttp.ClientError) as error:
            run.fail(f"{kind.name} {number}", repr(error))
            run.case({"case": kind.name, "number": number, "attempt": attempt, "error": repr(error)})
            return
        tally.outcomes.append(outcome)
        run.case({"case": kind.name, "number": number, "attempt": attempt, **asdict(outcome)})
        if outcome.resumed_s is not None:
            run.add(f"{kind.name}: resumed_s", outcome.resumed_s)
        run.notes.append(f"{kind.name} {number}: {outcome.proof}")
        for failure in outcome.failures:
            run.fail(f"{kind.name} {number}", failure)
        return
    run.fail(f"{kind.name} {number}", f"met no target in {stage.plan.attempts} attempts; the last: {why}")
    run.case({"case": kind.name, "number": number, "attempt": stage.plan.attempts, "error": why})


async def _trial(stage: _Stage, kind: Kind, name: str) -> Outcome:
    """Streams, one blow, the comparison. Raises NotStruck when the blow met nothing, NoCgroup."""
    plan = stage.plan
    pids = await stage.pids(PLACES if kind.needs_all else ENOUGH)
    stage.proxy.forget()
    bodies = [_body(stage, f"{name}.{place}", place) for place in range(plan.streams)]
    streams = [Followed(f"{name}.{place}") for place in range(plan.streams)]
    scene = Scene(
        proxy=stage.proxy,
        target=streams[0],
        tokens=plan.answer_tokens,
        kv_bytes=(plan.prompt_tokens - 1) * stage.kv_bytes_per_token,
        pids=pids,
        ended=stage.ended,
        stranger_ports=stage.stranger_ports,
        rng=random.Random(name),
        until=stage.until,
        all_ready=lambda: _ready(stage),
    )
    blow, missed = await _struck(stage, kind, scene, bodies, streams)
    # a stream that came to harm counts, whatever is proven: nothing may hide behind a missed blow
    answers = [await _undisturbed(stage, body) for body in bodies]
    verdicts = tuple(judge(stream, *answer) for stream, answer in zip(streams, answers, strict=True))
    proof = kind.proof(scene, blow) if blow is not None else ""
    if not proof and all(verdict.is_good for verdict in verdicts):
        raise missed or NotStruck("nothing shows that the blow met the target")
    return Outcome(kind.name, proof, verdicts, _resumed_s(scene, blow), _failures(streams, verdicts))


async def _struck(
    stage: _Stage, kind: Kind, scene: Scene, bodies: Sequence[Mapping[str, Any]], streams: Sequence[Followed]
) -> tuple[Blow | None, NotStruck | None]:
    """The streams run to their end, and the blow falls at its moment, or why it did not. What it broke is healed."""
    missed: NotStruck | None = None
    blow = await kind.strike(scene) if kind.moment == "before" else None
    following = []
    for body, stream in zip(bodies, streams, strict=True):
        following.append(asyncio.create_task(follow(stage.session, body, stream, stage.pulse.set)))
        await asyncio.sleep(_BETWEEN_STREAMS_S)  # the target is the first to be planned
    try:
        if blow is None:
            try:
                await wait_for_moment(scene, kind.moment)
                blow = await kind.strike(scene)
            except NotStruck as error:
                missed = error
        _, late = await asyncio.wait(following, timeout=STREAM_S)
        for task in late:
            task.cancel()
        if blow is not None:
            await asyncio.gather(*blow.after)
    finally:
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)
        await _heal(blow)
    return blow, missed


async def _ready(stage: _Stage) -> None:
    await stage.pids()


async def _heal(blow: Blow | None) -> None:
    if blow is not None and blow.heal is not None:
        await blow.heal()


def _resumed_s(scene: Scene, blow: Blow | None) -> float | None:
    if blow is None:
        return None
    struck_s = blow.rule.first_touch_s if blow.rule is not None else blow.struck_s
    return scene.target.resumed_after_s(struck_s) if struck_s is not None else None


def _failures(streams: Sequence[Followed], verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """For people: what is wrong with which stream."""
    return tuple(
        f"{stream.request_id}: {stream.failure or verdict}"
        for stream, verdict in zip(streams, verdicts, strict=True)
        if not verdict.is_good
    )


def _body(stage: _Stage, seed: str, place: int) -> dict[str, Any]:
    """A prompt nobody had before; greedy and sampled in turn. Companions are of other lengths than the target."""
    rng, plan = random.Random(f"{stage.plan.seed}.{seed}"), stage.plan
    length = plan.prompt_tokens if not place else rng.randrange(plan.prompt_tokens // 4, plan.prompt_tokens)
    sampled = {"temperature": 0.8, "top_p": 0.95, "seed": rng.randrange(1 << 31)}
    return {
        "prompt": prompt_ids(length, stage.vocab_size, rng.randrange(1 << 31)),
        "max_tokens": plan.answer_tokens,
        "ignore_eos": True,
        "edge_llm": {"mode": "split", "return_token_ids": True},
        **(sampled if rng.random() < 0.5 else {"temperature": 0}),
    }


async def _undisturbed(stage: _Stage, body: Mapping[str, Any]) -> tuple[Sequence[int], str]:
    """Token ids and text of the same request on the worker that nobody disturbs."""
    asked = {**body, "edge_llm": {"mode": "local", "return_token_ids": True}}
    async with stage.reference.post("/v1/completions", json=asked) as reply:
        answer = await reply.json()
    if reply.status != 200:
        raise MeasureFailed(f"the undisturbed run failed: {answer}")
    return answer["timings"]["edge_llm"]["token_ids"], answer["choices"][0]["text"]


# -- figures


def figures(tally: Tally, plan: Plan, run: Run) -> dict[str, Any]:
    """Counts over all kinds, and a line per kind."""
    verdicts = [verdict for outcome in tally.outcomes for verdict in outcome.verdicts]
    tested = [kind for kind in plan.kinds if kind.name not in tally.untested]
    return {
        "kinds": len(tested),
        "faults": len(tested) * plan.per_kind,
        "hit_in_flight": sum(bool(outcome.proof) for outcome in tally.outcomes),
        "streams": len(verdicts),
        "streams_lost": sum(verdict.is_lost for verdict in verdicts),
        "tokens_missing": sum(verdict.missing for verdict in verdicts),
        "tokens_repeated": sum(verdict.repeated for verdict in verdicts),
        "streams_different": sum(verdict.is_different for verdict in verdicts),
        "detection_goals_s": dict(_DETECTION_GOALS_S),
        "not_tested": dict(tally.untested),
        "per_kind": {kind.name: _line(tally, kind, run) for kind in tested},
    }


def _line(tally: Tally, kind: Kind, run: Run) -> dict[str, Any]:
    outcomes = [outcome for outcome in tally.outcomes if outcome.kind == kind.name]
    resumed = sorted(run.samples.get(f"{kind.name}: resumed_s", []))
    return {
        "what": kind.words,
        "hit": sum(bool(outcome.proof) for outcome in outcomes),
        "attempts": tally.attempts.get(kind.name, 0),
        "bad_streams": sum(not verdict.is_good for outcome in outcomes for verdict in outcome.verdicts),
        "resumed_s_p50": round(run.median(f"{kind.name}: resumed_s") or 0.0, 3) if resumed else None,
        "resumed_s_max": round(resumed[-1], 3) if resumed else None,
    }


def broken(found: Mapping[str, Any]) -> list[str]:
    """Which promises were not kept, as lines for people."""
    lines = [
        f"{name} is {found[name]}, not 0"
        for name in ("streams_lost", "tokens_missing", "tokens_repeated", "streams_different")
        if found[name]
    ]
    if found["hit_in_flight"] < found["faults"]:
        lines.append(f"only {found['hit_in_flight']} of {found['faults']} faults are proven to have met a stream")
    return lines


def chosen(names: Sequence[str]) -> tuple[Kind, ...]:
    """The kinds of these names, all without any. Raises MeasureFailed for an unknown one."""
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise MeasureFailed(f"no such kind of fault: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    return tuple(KINDS[name] for name in names or KINDS)
