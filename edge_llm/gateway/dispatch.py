"""Requests on their way through the cluster: queue, plan, send, follow, replan.

Owns what this gateway has booked on each worker, and one event connection per worker that carries everything the
worker has to say to this gateway. Refuses to know OpenAI JSON (app.py turns updates into it) and the queue's order.

A request leaves the queue (queue.py) when `decide` finds a decode worker with a free slot. A lost worker sends its
requests to REPLANNING: they queue again at the front with prompt + delivered tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import structlog

from edge_llm.cluster.probe import Prober
from edge_llm.cluster.view import ClusterView, Node, Place
from edge_llm.errors import EdgeLLMError, Overloaded, RemoteProtocolError, UnknownModel, WorkerError, WorkerUnreachable
from edge_llm.gateway import queue
from edge_llm.gateway.scheduler import Booked, Mode, Plan, Wish, decide
from edge_llm.gateway.session import Event, Session, State
from edge_llm.kv.snapshot import Level, ids_digest
from edge_llm.request import FinishReason, SamplingParams, TokenEvent
from edge_llm.worker import messages
from edge_llm.worker.client import Peer, WorkerClient, error_of
from edge_llm.worker.messages import (
    CancelRequest,
    DecodeRequest,
    ErrorReply,
    EventBatch,
    PrefillCandidate,
    PromptReport,
    TokenizeReply,
    TokenizeRequest,
)

RECONNECT_S: Final = 0.5
REFUSED_S: Final = 0.1
# How long the end of a gateway waits for its last cancellations to arrive; a lease frees what they did not reach.
CLOSE_S: Final = 1.0
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be generated, in token ids."""

    request_id: str
    model: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    mode: Mode


@dataclass(frozen=True, slots=True)
class Text:
    """Text that became certain; may be empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Progress:
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The last update of a request."""

    reason: FinishReason | None
    error: EdgeLLMError | None = None


Update = Text | Progress | Finish


@dataclass(slots=True)
class Running:
    """One request and its clock readings (monotonic seconds).

    `is_as_promised` ends for good when KV of another class came in, or the answer went on where it may come out
    otherwise.
    """

    job: Job
    session: Session
    waits_since_s: float
    updates: asyncio.Queue[Update] = field(default_factory=asyncio.Queue)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    place: queue.Place | None = None
    plan: Plan | None = None
    sent_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    prompted_s: float = 0.0
    report: PromptReport | None = None
    notes: list[str] = field(default_factory=list)
    is_as_promised: bool = True

    @property
    def level(self) -> Level:
        """What may be promised of the whole answer."""
        if self.plan is None:
            return "unverified"
        return self.plan.decode.status.level if self.is_as_promised else "none"


class Dispatcher:
    """All requests of this gateway."""

    def __init__(
        self,
        client: WorkerClient,
        gateway: str,
        queue_length: int,
        queue_wait_s: float,
        replan_limit: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._gateway = client, gateway
        self._queue_wait_s, self._replan_limit, self._clock = queue_wait_s, replan_limit, clock
        self._running: dict[str, Running] = {}
        self._connections: dict[Place, asyncio.Task[None]] = {}
        self._queue = queue.PlanQueue(queue_length, queue_wait_s)
        self._endings: set[asyncio.Task[None]] = set()
        self.prober: Prober | None = None

    @property
    def view(self) -> ClusterView:
        return self.prober.view if self.prober else ClusterView()

    @property
    def requests(self) -> dict[str, int]:
        """How many requests are in which state."""
        return dict(Counter(running.session.state.value for running in self._running.values()))

    # -- called by the HTTP side

    async def tokenize(self, model: str | None, request: TokenizeRequest) -> tuple[Node, TokenizeReply]:
        """Token ids by any ready worker of the model; the next one is asked when one fails."""
        nodes = self.view.ready(model)
        if model is not None and not nodes:
            decide(Wish(model, 0, 0), self.view, {})
        failure: EdgeLLMError = Overloaded("no worker is ready yet", retry_after_s=2.0)
        # the least busy first; prefill workers are as good as others: tokenizing has its own thread
        for node in sorted(nodes, key=lambda n: (n.status.load.sequences_running, n.worker)):
            try:
                return node, await self._client.tokenize(_peer(node), request)
            except (WorkerError, Overloaded, RemoteProtocolError) as error:
                failure = error
        raise failure

    @asynccontextmanager
    async def running(self, job: Job) -> AsyncIterator[Running]:
        """Run a job; leaving the block early cancels it everywhere. Raises what refuses it at once."""
        running = Running(job, Session(job.request_id), self._clock())
        self._running[job.request_id] = running
        try:
            place = self._join(running)
            task = asyncio.create_task(self._run(running, place), name=f"request {job.request_id}")
            try:
                yield running
            finally:
                self._leave(running, task)
        finally:
            del self._running[job.request_id]
            self._queue.move()

    # -- one request

    async def _run(self, running: Running, place: queue.Place) -> None:
        """Top of a request's task: plan and follow until it is over."""
        try:
            await self._attempt(running, await self._queue.turn(place))
            while not running.session.is_over:
                await self._attempt(running, await self._queue.turn(self._join(running)))
        except EdgeLLMError as error:
            self._give_up(running, error)
        except Exception as error:
            log.error("request failed", request_id=running.job.request_id, error=repr(error), exc_info=True)
            self._give_up(running, WorkerError("the gateway failed on this request; see its log"))

    def _join(self, running: Running) -> queue.Place:
        session = running.session
        lane = (running.job.model, frozenset(session.lost))
        place = self._queue.join(lambda: self._plan(running), lane, is_returning=session.epoch > 0)
        running.place = place
        return place

    async def _attempt(self, running: Running, plan: Plan) -> None:
        if running.session.is_over:
            return
        running.ended.clear()
        try:
            await self._client.decode(_peer(plan.decode), self._decode_request(running, plan))
        except (WorkerError, Overloaded, RemoteProtocolError) as error:
            self._lose(running, error)
            # a refusal comes at once: do not ask the same full worker in a tight loop
            await asyncio.sleep(REFUSED_S)
            return
        finally:
            running.sent_s = running.sent_s or self._clock()
        await running.ended.wait()

    def _plan(self, running: Running) -> Plan:
        job = running.job
        avoid = frozenset(running.session.lost)
        tokens = len(job.prompt_ids) + len(running.session.delivered)
        wish = Wish(job.model, tokens, job.max_tokens - len(running.session.delivered), job.mode, avoid)
        try:
            plan = decide(wish, self.view, self._booked())
        except UnknownModel as error:
            # somebody served it when the request came: workers come back
            raise Overloaded(f"no worker serves {job.model} any more", retry_after_s=2.0) from error
        if running.plan is not None and running.session.delivered:
            running.is_as_promised &= _goes_on_the_same(running.plan.decode, plan.decode)
        running.plan, running.report = plan, None
        running.notes = [plan.note] if plan.note else []
        running.session.on(Event.PLANNED)
        return plan

    def _booked(self) -> dict[str, Booked]:
        """Sequences and prompt tokens this gateway has on each worker."""
        booked: dict[str, Booked] = {}
        for running in self._running.values():
            if running.plan is None or running.session.state not in (State.PREFILLING, State.DECODING):
                continue
            decode = running.plan.decode.worker
            booked[decode] = booked.get(decode, Booked()).with_sequence()
            if running.session.state is State.PREFILLING:
                worker = running.plan.candidates[0].worker if running.plan.candidates else decode
                booked[worker] = booked.get(worker, Booked()).with_prompt(len(running.job.prompt_ids))
        return booked

    def _decode_request(self, running: Running, plan: Plan) -> DecodeRequest:
        job, session = running.job, running.session
        digest = ids_digest((*job.prompt_ids, *session.delivered))
        return DecodeRequest(
            request_id=job.request_id,
            epoch=session.epoch,
            gateway=self._gateway,
            prompt_ids=list(job.prompt_ids),
            delivered_ids=session.delivered,
            max_tokens=job.max_tokens,
            sampling=_sampling(job.sampling),
            stop=list(job.stop),
            stop_ids=list(job.stop_ids),
            candidates=[
                PrefillCandidate(
                    worker=node.worker,
                    address=node.place.address,
                    ticket=self._client.prefill_ticket(_peer(node), job.request_id, digest),
                )
                for node in plan.candidates
            ],
        )

    def _lose(self, running: Running, error: EdgeLLMError) -> None:
        """The decode worker failed this request: plan again elsewhere, or give up."""
        session = running.session
        if session.is_over or session.state not in (State.PREFILLING, State.DECODING):
            return
        worker = running.plan.decode.worker if running.plan else "?"
        log.warning("replanning", request_id=session.request_id, worker=worker, code=error.code, epoch=session.epoch)
        is_full = isinstance(error, Overloaded)
        if running.plan is not None and not is_full:
            self._end(running, running.plan)  # it may live, and work on for nobody
        has_waited_s = self._clock() - running.waits_since_s
        if has_waited_s > self._queue_wait_s if is_full else len(session.lost) >= self._replan_limit:
            self._give_up(running, error)
            return
        session.on(Event.WORKER_LOST)
        # a full worker is not a broken one: it may be planned with again
        if not is_full:
            session.lost.append(worker)
            running.waits_since_s = self._clock()
        running.ended.set()

    def _give_up(self, running: Running, error: EdgeLLMError) -> None:
        if running.session.is_over:
            return
        running.session.on(Event.GAVE_UP)
        running.updates.put_nowait(Finish(None, error))
        running.ended.set()
        self._queue.move()

    def _leave(self, running: Running, task: asyncio.Task[None]) -> None:
        """The client has its answer or is gone. Does not wait for anything: whoever leaves may be cancelled already."""
        session, plan = running.session, running.plan
        is_with_worker = session.state in (State.PREFILLING, State.DECODING)
        is_early = not session.is_over
        if is_early:
            session.on(Event.CLIENT_GONE)
            running.ended.set()
        if not is_with_worker:
            task.cancel()
            if running.place is not None:
                self._queue.leave(running.place)
        if is_early and plan is not None:
            self._end(running, plan, task)

    def _end(self, running: Running, plan: Plan, task: asyncio.Task[None] | None = None) -> None:
        """Cancel at the decode worker, once `task` has ended: a cancellation must not overtake what it cancels."""
        request = CancelRequest(request_id=running.job.request_id, epoch=running.session.epoch)

        async def cancel() -> None:
            if task is not None:
                await asyncio.wait({task})
            try:
                await self._client.cancel(_peer(plan.decode), request)
            except EdgeLLMError as error:
                log.info("cancel not delivered", request_id=request.request_id, code=error.code)

        ending = asyncio.create_task(cancel(), name=f"cancel {request.request_id}")
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    # -- what workers say

    def on_view(self, before: ClusterView, after: ClusterView) -> None:
        """Keep one event connection to every node of the view."""
        for node in after.nodes:
            task = self._connections.get(node.place)
            if node.decodes and (task is None or task.done()):
                self._connections[node.place] = asyncio.create_task(self._follow(node), name=f"events {node.worker}")
        self._queue.move()

    async def _follow(self, node: Node) -> None:
        """Read a worker's events until it is gone; then its requests are replanned."""
        try:
            async for batch in self._client.events(_peer(node)):
                self._on_batch(batch)
        except EdgeLLMError as error:
            log.warning("event connection lost", worker=node.worker, message=error.message)
            now = self.view.node(node.worker)
            if self.prober is not None and now is not None and now.place == node.place:
                self.prober.lost(node.worker)
            lost = WorkerUnreachable(f"decode worker {node.worker} was lost: {error.message}")
            for running in list(self._running.values()):
                if running.plan is not None and running.plan.decode.place == node.place:
                    self._lose(running, lost)
            await asyncio.sleep(RECONNECT_S)

    def _on_batch(self, batch: EventBatch) -> None:
        for prompted in batch.prompted:
            self._on_prompted(prompted)
        for progress in batch.progress:
            running = self._current(progress.request_id, progress.epoch)
            if running is not None and running.session.state is State.PREFILLING:
                running.updates.put_nowait(Progress(progress.done, progress.total))
        for token in batch.tokens:
            self._on_token(token)
        for failed in batch.failed:
            self._on_failed(failed)

    def _current(self, request_id: str, epoch: int) -> Running | None:
        running = self._running.get(request_id)
        return running if running is not None and running.session.is_current(epoch) else None

    def _on_prompted(self, prompted: messages.Prompted) -> None:
        running = self._current(prompted.request_id, prompted.epoch)
        if running is None:
            return
        running.report = prompted.report
        running.is_as_promised &= prompted.report.is_same_class
        if not running.first_token_s:
            running.prompted_s = self._clock()
        if prompted.report.fallback:
            running.notes.append(prompted.report.fallback)
        if running.session.state is State.PREFILLING:
            running.session.on(Event.PROMPTED)
            self._queue.move()

    def _on_token(self, token: messages.Token) -> None:
        running = self._current(token.request_id, token.epoch)
        if running is None:
            return
        event = TokenEvent(token.request_id, token.epoch, token.index, token.token_id, token.text, token.finish_reason)
        try:
            if not running.session.deliver(event):
                return
        except RemoteProtocolError as error:
            self._lose(running, error)
            return
        now_s = running.last_token_s = self._clock()
        running.first_token_s = running.first_token_s or now_s
        running.updates.put_nowait(Text(token.text))
        if token.finish_reason is not None:
            running.updates.put_nowait(Finish(token.finish_reason))
            running.ended.set()
            self._queue.move()

    def _on_failed(self, failed: messages.Failed) -> None:
        running = self._current(failed.request_id, failed.epoch)
        if running is None:
            return
        worker = running.plan.decode.worker if running.plan else "?"
        error = error_of(ErrorReply(code=failed.code, message=failed.message), worker)
        if failed.is_retryable:
            self._lose(running, error)
        else:
            self._give_up(running, error)

    async def close(self) -> None:
        """Let cancellations arrive, bounded, and end all connections."""
        if self._endings:
            await asyncio.wait(self._endings, timeout=CLOSE_S)
        tasks = [*self._connections.values(), *self._endings]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _goes_on_the_same(before: Node, after: Node) -> bool:
    """Whether tokens that `after` adds to those of `before` are the ones that `before` would have made."""
    return before.status.exactness_class == after.status.exactness_class and after.status.level != "same-plan"


def _peer(node: Node) -> Peer:
    return Peer(node.worker, node.place.address)


def _sampling(params: SamplingParams) -> messages.Sampling:
    return messages.Sampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repeat_penalty=params.repeat_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        penalty_last_n=params.penalty_last_n,
        seed=str(params.seed),
        logit_bias={str(token): bias for token, bias in params.logit_bias.items()},
    )
