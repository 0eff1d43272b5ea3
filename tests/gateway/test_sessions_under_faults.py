"""Any schedule of kills, cuts, lies and lost replies: what a client has heard is how the undisturbed answer begins, and
in the end it is the whole of it.

Real dispatcher, planner, queue, listener, prober and sessions, on an event loop whose time passes only while nobody has
anything to do. Workers are written here: they make tokens as a hash of all ids before, so that a token that was lost,
repeated or made of something else changes all that follow. What a worker has to say it says when the schedule lets it,
also when nobody waits for it any more.
"""

from __future__ import annotations

import asyncio
import hashlib
import selectors
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Final

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prometheus_client import CollectorRegistry

from edge_llm.cluster.discovery import Discovery
from edge_llm.cluster.probe import Prober
from edge_llm.cluster.view import ClusterView, Place
from edge_llm.errors import Draining, EdgeLLMError, EngineFailed, Overloaded, WorkerUnreachable
from edge_llm.gateway import queue
from edge_llm.gateway.dispatch import Dispatcher
from edge_llm.gateway.metrics import GatewayMetrics
from edge_llm.gateway.planner import Planner
from edge_llm.gateway.running import Finish, Job, Running, Text
from edge_llm.gateway.session import State
from edge_llm.gateway.situation import CrossClass
from edge_llm.request import FinishReason, SamplingParams
from edge_llm.worker.client import CALL_S, SILENCE_S, STATUS_S, Peer, WorkerClient
from edge_llm.worker.messages import (
    CancelReply,
    CancelRequest,
    DecodeReply,
    DecodeRequest,
    EventBatch,
    Failed,
    Progress,
    Prompted,
    PromptReport,
    Token,
    WorkerStatus,
)
from tests.nodes import node_of

SLOTS: Final = 2
STOP_SHARE: Final = 40  # one id in so many ends an answer
DECODERS: Final = ("d1", "d2", "d3")
EVER: Final = 1e9
OPENING_S: Final = 0.01  # a connection needs longer than a worker may need for a whole answer


# -- time


class Leaping(selectors.SelectSelector):
    """Never waits: when nothing is ready, the time that would have been waited has passed."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits for nobody"
            self.now_s += timeout
        return ready


class LeapingLoop(asyncio.SelectorEventLoop):
    """An event loop on that time."""

    def __init__(self) -> None:
        self._leaping = Leaping()
        super().__init__(self._leaping)

    def time(self) -> float:
        return self._leaping.now_s


# -- answers


def next_id(ids: Sequence[int]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(list(ids)).encode(), digest_size=4).digest(), "big") % 1000


def ending(token_id: int, index: int, max_tokens: int) -> FinishReason | None:
    if token_id % STOP_SHARE == 0:
        return "stop"
    return "length" if index + 1 == max_tokens else None


def undisturbed(prompt: Sequence[int], max_tokens: int) -> tuple[list[int], FinishReason]:
    made: list[int] = []
    while True:
        made.append(next_id([*prompt, *made]))
        if (reason := ending(made[-1], len(made) - 1, max_tokens)) is not None:
            return made, reason


def text_of(token_id: int, epoch: int) -> str:
    """It tells who said it."""
    return f"{token_id}@{epoch}"


# -- workers


@dataclass
class Decoding:
    """One request at one worker, in one epoch."""

    request: DecodeRequest
    made: list[int] = field(default_factory=list)
    is_prompted: bool = False
    is_over: bool = False

    def step(self) -> EventBatch:
        """What its next step has to say."""
        request = self.request
        if not self.is_prompted:
            self.is_prompted = True
            total = len(request.prompt_ids) + len(request.delivered_ids) - 1
            report = PromptReport(
                mode="split" if request.candidates else "local",
                prefill_worker=request.candidates[0].worker if request.candidates else "itself",
                wait_ms=0.0,
                prefill_ms=0.0,
                handoff_ms=0.0,
                adopt_ms=0.0,
                handoff_bytes=0,
                overlapped_bytes=0,
                restored_tokens=0,
                computed_tokens=total,
                is_same_class=True,
            )
            return EventBatch(
                progress=[Progress(request_id=request.request_id, epoch=request.epoch, done=total, total=total)],
                prompted=[Prompted(request_id=request.request_id, epoch=request.epoch, report=report)],
            )
        token_id = next_id([*request.prompt_ids, *request.delivered_ids, *self.made])
        index = len(request.delivered_ids) + len(self.made)
        self.made.append(token_id)
        reason = ending(token_id, index, request.max_tokens)
        self.is_over = reason is not None
        token = Token(
            request_id=request.request_id,
            epoch=request.epoch,
            index=index,
            token_id=token_id,
            text=text_of(token_id, request.epoch),
            finish_reason=reason,
        )
        return EventBatch(tokens=[token])


@dataclass
class Worker:
    """A worker and the network before it. `is_cut`: nothing gets through either way, and nobody is told.
    `loses_replies`: it hears and acts, but its replies to calls are lost. `talks_to_nobody`: the gateway has given its
    connection up, which it does not know: what it says is lost until there is a new one."""

    name: str
    life: int = 1
    is_up: bool = True
    is_cut: bool = False
    loses_replies: bool = False
    is_draining: bool = False
    sequences: dict[str, Decoding] = field(default_factory=dict)
    outbox: deque[EventBatch] = field(default_factory=deque)
    said: EventBatch | None = None
    connections: int = 0
    talks_to_nobody: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def running(self) -> list[Decoding]:
        return [sequence for sequence in self.sequences.values() if not sequence.is_over]

    def say(self, batch: EventBatch) -> None:
        if not self.talks_to_nobody:
            self.outbox.append(batch)
        self.said = batch
        self.changed.set()

    def hang_up(self) -> None:
        """The gateway's connection breaks; both ends live."""
        self.connections += 1
        self.changed.set()

    def fail(self, sequence: Decoding, error: EdgeLLMError) -> None:
        sequence.is_over = True
        failed = Failed(
            request_id=sequence.request.request_id,
            epoch=sequence.request.epoch,
            code=error.code,
            message=error.message,
            status=error.status,
            is_retryable=error.is_retryable,
        )
        self.say(EventBatch(failed=[failed]))

    def die(self) -> None:
        self.is_up = False
        self.sequences.clear()
        self.outbox.clear()
        self.said = None
        self.changed.set()

    def come_back(self) -> None:
        """A worker of the same name; the dead one's life is over."""
        self.die()
        self.life, self.is_up, self.is_draining, self.talks_to_nobody = self.life + 1, True, False, False


class Wire(WorkerClient):
    """The calls of a gateway, to workers in this process."""

    def __init__(self, workers: dict[str, Worker]) -> None:
        self._workers = workers

    async def _reached(self, peer: Peer, patience_s: float) -> Worker:
        worker = self._workers[peer.worker]
        if not worker.is_up:
            raise WorkerUnreachable(f"{peer.worker} is dead") from ConnectionRefusedError(111, "refused")
        if worker.is_cut:
            await asyncio.sleep(patience_s)
            raise WorkerUnreachable(f"{peer.worker} says nothing")
        return worker

    async def _answered(self, worker: Worker) -> None:
        if worker.loses_replies:
            await asyncio.sleep(CALL_S)
            raise WorkerUnreachable(f"{worker.name} was heard, and not understood")

    async def status(self, peer: Peer) -> WorkerStatus:
        worker = await self._reached(peer, STATUS_S)
        role = "decode" if peer.worker in DECODERS else "prefill"
        return node_of(
            peer.worker,
            role,  # type: ignore[arg-type]
            pid=worker.life,
            slots=SLOTS if role == "decode" else 0,
            is_draining=worker.is_draining,
            is_ready=not worker.is_draining,
        ).status

    async def decode(self, peer: Peer, request: DecodeRequest, trace: str = "") -> DecodeReply:
        worker = await self._reached(peer, CALL_S)
        if worker.is_draining:
            raise Draining(f"{worker.name} drains")
        known = worker.sequences.get(request.request_id)
        assert known is None or known.request.epoch < request.epoch, "the same epoch was sent twice"
        if known is None and len(worker.running) >= SLOTS:
            raise Overloaded(f"{worker.name} is full")
        worker.sequences[request.request_id] = Decoding(request)
        await self._answered(worker)
        return DecodeReply()

    async def cancel(self, peer: Peer, request: CancelRequest) -> CancelReply:
        worker = await self._reached(peer, CALL_S)
        known = worker.sequences.get(request.request_id)
        is_found = known is not None and known.request.epoch <= request.epoch
        if is_found:
            del worker.sequences[request.request_id]
        await self._answered(worker)
        return CancelReply(found=is_found)

    async def events(self, peer: Peer, on_open: Callable[[], None] = lambda: None) -> AsyncIterator[EventBatch]:
        worker = await self._reached(peer, SILENCE_S)
        await asyncio.sleep(OPENING_S)
        worker.connections += 1
        worker.talks_to_nobody = False
        on_open()
        worker.changed.set()  # an older connection ends
        life, mine = worker.life, worker.connections
        while True:
            if not worker.is_up or (worker.life, worker.connections) != (life, mine):
                raise WorkerUnreachable(f"{peer.worker} hung up")
            if worker.outbox and not worker.is_cut:
                yield worker.outbox.popleft()
                continue
            worker.changed.clear()
            try:
                async with asyncio.timeout(SILENCE_S if worker.is_cut else None):
                    await worker.changed.wait()
            except TimeoutError as late:
                worker.talks_to_nobody = True
                worker.outbox.clear()
                raise WorkerUnreachable(f"{peer.worker} is silent") from late

    def prefill_ticket(self, *_args: object, **_more: object) -> str:
        return "a ticket"


class Named(Discovery):
    """Discovery of all workers of the test."""

    def places(self) -> tuple[Place, ...]:
        return tuple(Place(name, f"{name}:1") for name in ("p1", *DECODERS))


async def dispatching(wire: Wire, cross_class: CrossClass = "when_faster") -> tuple[Dispatcher, Prober]:
    """A dispatcher that waits and tries again for as long as it takes, and what keeps its view, which has begun."""
    clock = asyncio.get_running_loop().time
    bounds, metrics = queue.Bounds(predicted_wait_s=EVER, wait_s=EVER), GatewayMetrics(CollectorRegistry(), "g")
    planner = Planner(cross_class=cross_class, clock=clock)
    dispatcher = Dispatcher(wire, "g", bounds, 10**9, metrics, planner, clock=clock)
    dispatcher.prober = prober = Prober(Named(), wire, 1.0, dispatcher.on_view, clock)
    await prober.probe_all()
    return dispatcher, prober


def leaping(scene: Coroutine[object, object, None]) -> None:
    """Run a scene to its end in time that passes only while nobody has anything to do."""
    loop = LeapingLoop()
    try:
        loop.run_until_complete(scene)
    finally:
        loop.close()


# -- clients


@dataclass
class Client:
    """Who asked, what came so far, and how it ended."""

    prompt: list[int]
    max_tokens: int
    heard: list[int] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    finish: Finish | None = None
    running: Running | None = None
    task: asyncio.Task[None] | None = None
    has_left: bool = False

    @property
    def delivered(self) -> list[int]:
        return self.running.session.delivered if self.running else []

    async def ask(self, dispatcher: Dispatcher, name: str, now_s: float) -> None:
        demand = queue.Demand(name, "k", "m", len(self.prompt), self.max_tokens)
        place = dispatcher.enter(demand)
        job = Job(name, "m", tuple(self.prompt), self.max_tokens, SamplingParams(), (), (), "auto")
        async with dispatcher.running(job, place, now_s) as running:
            self.running = running
            while self.finish is None:
                update = await running.heard()
                if isinstance(update, Finish):
                    self.finish = update
                elif isinstance(update, Text):
                    token_id, _, epoch = update.text.partition("@")
                    self.heard.append(int(token_id))
                    self.epochs.append(int(epoch))


WORKERS: Final = st.sampled_from(DECODERS)
FAULTS: Final = (
    "kill",
    "kill and start again",
    "cut",
    "lose replies",
    "break the connection",
    "say it twice",
    "skip a token",
    "fail",
    "drain",
)
ANY: Final = st.integers(0, 5)


class Sessions(RuleBasedStateMachine):
    """What may happen between a gateway, three decode workers and clients, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = LeapingLoop()
        self.clients: list[Client] = []
        self.loop.run_until_complete(self._begin())
        for number in range(3):
            self.ask([number] * (number + 1), 16)

    async def _begin(self) -> None:
        self.workers = {name: Worker(name) for name in ("p1", *DECODERS)}
        self.dispatcher, self.prober = await dispatching(Wire(self.workers))
        self.probing = asyncio.create_task(self.prober.run())

    def settle(self, seconds: float = 1e-6) -> None:
        """Let everybody do what can be done, then let time pass."""
        self.loop.run_until_complete(asyncio.sleep(seconds))

    # -- clients come and go

    @precondition(lambda self: len(self.clients) < 6)
    @rule(prompt=st.lists(st.integers(0, 200), min_size=1, max_size=30), max_tokens=st.integers(1, 16))
    def ask(self, prompt: list[int], max_tokens: int) -> None:
        client = Client(prompt, max_tokens)
        asking = client.ask(self.dispatcher, f"r{len(self.clients)}", self.loop.time())
        client.task = self.loop.create_task(asking)
        self.clients.append(client)
        self.settle()

    @precondition(lambda self: len(self.clients) > 3)
    @rule(which=ANY)
    def leave(self, which: int) -> None:
        client = self.clients[which % len(self.clients)]
        if client.task is not None and not client.task.done():
            client.has_left = True
            client.task.cancel()
        self.settle()

    # -- workers work, whoever listens

    def _step(self, name: str) -> None:
        for sequence in self.workers[name].running:
            self.workers[name].say(sequence.step())
        self.settle()

    @rule(steps=st.integers(1, 3))
    def all_work(self, steps: int) -> None:
        for name in DECODERS * steps:
            self._step(name)

    @rule(name=WORKERS, steps=st.integers(1, 6))
    def one_works(self, name: str, steps: int) -> None:
        for _ in range(steps):
            self._step(name)

    # -- faults

    @rule(name=WORKERS, kind=st.sampled_from(FAULTS))
    def strike(self, name: str, kind: str) -> None:
        worker = self.workers[name]
        match kind:
            case "kill":
                worker.die()
            case "kill and start again":
                worker.come_back()
            case "cut":
                worker.is_cut = True
            case "lose replies":
                worker.loses_replies = True
            case "break the connection":  # what was on its way is lost
                worker.outbox.clear()
                worker.hang_up()
            case "say it twice" if worker.said is not None:
                worker.say(worker.said)
            case "skip a token" if worker.running:
                skipped = worker.running[0]
                skipped.step()
                if skipped.is_over:  # no later token tells of the last one: it was on a connection that broke
                    worker.hang_up()
            case "fail" if worker.running:
                worker.fail(worker.running[0], EngineFailed("no cells"))
            case "drain":
                worker.is_draining = True
                for sequence in worker.running:
                    worker.fail(sequence, Draining(f"{name} drains"))
        worker.changed.set()
        self.settle()

    @rule()
    def faults_end(self) -> None:
        for worker in self.workers.values():
            worker.is_cut = worker.loses_replies = False
            if not worker.is_up or worker.is_draining:
                worker.come_back()
            worker.changed.set()
        self.settle(1.1)

    @rule(name=WORKERS)
    def drain(self, name: str) -> None:
        worker = self.workers[name]
        worker.is_draining = True
        for sequence in worker.running:
            worker.fail(sequence, Draining(f"{name} drains"))
        self.settle()

    @rule(seconds=st.sampled_from([0.15, 1.1, 7.0, 40.0]))
    def wait(self, seconds: float) -> None:
        self.settle(seconds)

    # -- what must hold

    @invariant()
    def what_was_heard_is_how_the_answer_begins(self) -> None:
        for client in self.clients:
            whole, _ = undisturbed(client.prompt, client.max_tokens)
            assert client.delivered == whole[: len(client.delivered)]
            assert client.has_left or client.heard == client.delivered
            assert client.epochs == sorted(client.epochs), "a late token of an older plan was heard"

    @invariant()
    def nobody_is_given_up(self) -> None:
        for client in self.clients:
            if client.task is not None and client.task.done() and not client.has_left:
                client.task.result()
            assert client.finish is None or client.finish.error is None, client.finish

    def teardown(self) -> None:
        """Faults end; then every answer that is still waited for comes to its end, and nothing stays behind."""
        try:
            self.faults_end()
            for _ in range(400):
                if not self.dispatcher.requests:
                    break
                self.all_work(1)
                self.settle(0.3)
            self.what_was_heard_is_how_the_answer_begins()
            self.nobody_is_given_up()
            assert self.dispatcher.requests == {}
            for client in self.clients:
                if not client.has_left:
                    whole, reason = undisturbed(client.prompt, client.max_tokens)
                    assert client.delivered == whole
                    assert client.heard == whole
                    assert client.finish == Finish(reason)
                elif client.running is not None:
                    assert client.running.session.state in (State.CANCELLED, State.DONE)
            assert self.dispatcher.planner.booked(ClusterView(self.dispatcher.view.nodes)) == {}
            for _ in range(20):  # a worker is told of what it does for nobody when it speaks of it
                self.all_work(1)
                self.settle(0.3)
            assert [worker.name for worker in self.workers.values() if worker.running] == []
        finally:
            self.loop.run_until_complete(self._end())
            self.loop.close()

    async def _end(self) -> None:
        tasks = [client.task for client in self.clients if client.task is not None]
        for task in (self.probing, *tasks):
            task.cancel()
        await asyncio.gather(self.probing, *tasks, return_exceptions=True)
        await self.dispatcher.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.loop.shutdown_asyncgens()


TestSessions = Sessions.TestCase
TestSessions.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
