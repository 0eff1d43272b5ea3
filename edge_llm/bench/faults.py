"""`edge-llm bench faults`: live streams, faults from outside, and what the clients of the streams got.

Owns the campaign: a cluster of real processes behind the proxy, streams with a target among them, one blow at a time,
and the comparison with an undisturbed run on another worker. A blow counts only when its kind can prove that it met
the target; else it is struck again on new streams. Refuses to know how clusters are started (`Launch`).

Every prompt is used once: what workers keep of earlier prompts must not make a transfer unnecessary. All begin with the
same few tokens, as chats do with those of their template: what is known of a beginning must not stand in the way.
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

from edge_llm.bench.fault_figures import Outcome, Plan, Tally, figures
from edge_llm.bench.fault_kinds import KINDS, Kind
from edge_llm.bench.fault_scene import Blow, NotStruck, Scene, wait_for_moment
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
# More streams than two decode workers have slots for (8 each): then the third has one, whoever is liked better.
MOST_LANES: Final = 18
READY_S: Final = 60.0
# The longest that a stream may be disturbed is a few detections of 6 s, one after another.
STREAM_S: Final = 120.0
_POLL_S: Final = 0.1
_ALIKE_TOKENS: Final = 8
_BETWEEN_STREAMS_S: Final = 0.02
_STALE_TOKENS: Final = "edge_llm_stale_tokens_total"
Place = Callable[[str, int], str]
PlacedLaunch = Callable[[Layout, Place | None], AbstractAsyncContextManager[Started]]
Progress = Callable[[str, int, int], None]


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

    async def stale_tokens(self) -> int:
        """How many the gateway dropped so far because they came for a plan that was over."""
        async with self.session.get("/metrics") as reply:
            lines = (await reply.text()).splitlines()
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith(_STALE_TOKENS))


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request and its stream."""

    body: Mapping[str, Any]
    stream: Followed


async def measure(plan: Plan, launch: PlacedLaunch, tally: Tally, run: Run, progress: Progress) -> dict[str, Any]:
    """All kinds, interleaved, so that a slow minute of the machine is not one kind's."""
    sizes = {"prompt_tokens": plan.prompt_tokens, "answer_tokens": plan.answer_tokens, "streams": plan.streams}
    sizes["long_answer_tokens"] = plan.long_answer_tokens
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


class _Lanes:
    """The streams of a trial: side by side, and in a lane one after another as long as the blow wants them.

    `asked` and `streams` grow; the first is the target. A stream that failed is the last of its lane: it is a verdict.
    """

    def __init__(self, stage: _Stage, kind: Kind, name: str) -> None:
        self._stage, self._kind, self._name = stage, kind, name
        self._goes_on = kind.keeps_streams
        self._tasks: list[asyncio.Task[None]] = []
        self.asked: list[_Asked] = []
        self.streams: list[Followed] = []
        for _ in range(stage.plan.streams):
            self._another()

    async def begin(self) -> None:
        for one in tuple(self.asked):
            self._tasks.append(asyncio.create_task(self._lane(one)))
            await asyncio.sleep(_BETWEEN_STREAMS_S)  # the target is the first to be planned

    def join(self) -> None:
        """One more lane, unless there are many."""
        if self._goes_on and len(self._tasks) < MOST_LANES:
            self._tasks.append(asyncio.create_task(self._lane(self._another())))

    async def finish(self) -> None:
        """Begin no more streams, and wait for those that run."""
        self._goes_on = False
        await asyncio.wait(self._tasks, timeout=STREAM_S)
        await self.end()

    async def end(self) -> None:
        """Whatever still runs is cut off, which is its failure."""
        await _end(self._tasks)

    async def _lane(self, one: _Asked) -> None:
        await follow(self._stage.session, one.body, one.stream, self._stage.pulse.set)
        while self._goes_on and not one.stream.failure:
            one = self._another()
            await follow(self._stage.session, one.body, one.stream, self._stage.pulse.set)

    def _another(self) -> _Asked:
        self.asked.append(_ask(self._stage, self._kind, self._name, len(self.asked)))
        self.streams.append(self.asked[-1].stream)
        return self.asked[-1]


async def _trial(stage: _Stage, kind: Kind, name: str) -> Outcome:
    """Streams, one blow, the comparison. Raises NotStruck when the blow met nothing, NoCgroup."""
    pids = await stage.pids(PLACES if kind.needs_all else ENOUGH)
    stage.proxy.forget()
    stale_before = await stage.stale_tokens()
    lanes = _Lanes(stage, kind, name)
    scene = Scene(
        proxy=stage.proxy,
        streams=lanes.streams,
        tokens=stage.plan.answer_tokens_of(kind),
        kv_bytes=(stage.plan.prompt_tokens - 1) * stage.kv_bytes_per_token,
        pids=pids,
        ended=stage.ended,
        stranger_ports=stage.stranger_ports,
        rng=random.Random(name),
        until=stage.until,
        all_ready=lambda: _ready(stage),
        join=lanes.join,
    )
    blow, missed = await _struck(kind, scene, lanes)
    if blow is not None:
        blow.stale_tokens = await stage.stale_tokens() - stale_before
    # a stream that came to harm counts, whatever is proven: nothing may hide behind a missed blow
    verdicts = tuple([judge(one.stream, *await _undisturbed(stage, one.body)) for one in lanes.asked])
    proof = kind.proof(scene, blow) if blow is not None else ""
    if not proof and all(verdict.is_good for verdict in verdicts):
        raise missed or NotStruck("nothing shows that the blow met the target")
    resumed_s, stale_tokens = (blow.resumed_s(scene.target), blow.stale_tokens) if blow is not None else (None, 0)
    again = str(scene.target.own.get("fallback") or "") if kind.moves_kv else ""
    return Outcome(kind.name, proof, verdicts, resumed_s, _failures(scene.streams, verdicts), stale_tokens, again)


async def _struck(kind: Kind, scene: Scene, lanes: _Lanes) -> tuple[Blow | None, NotStruck | None]:
    """The streams run to their end, and the blow falls at its moment, or why it did not. Then the cluster is healed."""
    missed: NotStruck | None = None
    blow = await kind.strike(scene) if kind.moment == "before" else None
    try:
        await lanes.begin()
        try:
            if blow is None:
                await wait_for_moment(scene, kind.moment)
                blow = await kind.strike(scene)
            if blow.second_half is not None:
                await blow.second_half
        except NotStruck as error:
            missed = error
        await lanes.finish()
    finally:
        await lanes.end()
        if blow is not None and blow.second_half is not None:
            await _end([blow.second_half])
        if blow is not None and blow.heal is not None:
            await blow.heal()
    return blow, missed


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _ready(stage: _Stage) -> None:
    await stage.pids()


def _failures(streams: Sequence[Followed], verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """For people: what is wrong with which stream."""
    return tuple(
        f"{stream.request_id}: {stream.failure or verdict}"
        for stream, verdict in zip(streams, verdicts, strict=True)
        if not verdict.is_good
    )


def _ask(stage: _Stage, kind: Kind, name: str, place: int) -> _Asked:
    """A prompt nobody had before; greedy and sampled in turn. Companions are of other lengths than the target."""
    request_id = f"{name}.{place:03}"  # no id is the beginning of another one
    rng, plan = random.Random(f"{stage.plan.seed}.{request_id}"), stage.plan
    length = plan.prompt_tokens if not place else rng.randrange(plan.prompt_tokens // 4, plan.prompt_tokens)
    sampled = {"temperature": 0.8, "top_p": 0.95, "seed": rng.randrange(1 << 31)}
    alike = prompt_ids(_ALIKE_TOKENS, stage.vocab_size, plan.seed)
    body = {
        "prompt": [*alike, *prompt_ids(length - _ALIKE_TOKENS, stage.vocab_size, rng.randrange(1 << 31))],
        "max_tokens": plan.answer_tokens_of(kind),
        "ignore_eos": True,
        "edge_llm": {"mode": "split", "return_token_ids": True},
        **(sampled if rng.random() < 0.5 else {"temperature": 0}),
    }
    return _Asked(body, Followed(request_id))


async def _undisturbed(stage: _Stage, body: Mapping[str, Any]) -> tuple[Sequence[int], str]:
    """Token ids and text of the same request on the worker that nobody disturbs."""
    asked = {**body, "edge_llm": {"mode": "local", "return_token_ids": True}}
    async with stage.reference.post("/v1/completions", json=asked) as reply:
        answer = await reply.json()
    if reply.status != 200:
        raise MeasureFailed(f"the undisturbed run failed: {answer}")
    return answer["timings"]["edge_llm"]["token_ids"], answer["choices"][0]["text"]


def chosen(names: Sequence[str]) -> tuple[Kind, ...]:
    """The kinds of these names, all without any. Raises MeasureFailed for an unknown one."""
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise MeasureFailed(f"no such kind of fault: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    return tuple(KINDS[name] for name in names or KINDS)
