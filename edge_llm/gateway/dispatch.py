"""Requests on their way through the cluster: queue, plan, send, follow, replan.

Owns the one queue, what this gateway has booked on each worker, and one event connection per worker that carries
everything the worker has to say to this gateway. Refuses to know OpenAI JSON (app.py turns updates into it).

A request leaves the queue when `decide` finds a decode worker with a free slot; requests leave in order. A lost worker
sends its requests to REPLANNING: they queue again at the front with prompt + delivered tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import structlog

from edge_llm.cluster.probe import Prober
from edge_llm.cluster.view import ClusterView, Node
from edge_llm.errors import (
    ClientError,
    ContextTooLong,
    EdgeLLMError,
    Overloaded,
    RemoteProtocolError,
    WorkerError,
    WorkerUnreachable,
)
from edge_llm.gateway.scheduler import Booked, Mode, Plan, Wish, decide
from edge_llm.gateway.session import Event, Session, State
from edge_llm.kv.snapshot import Level, ids_digest
from edge_llm.request import FinishReason, SamplingParams, TokenEvent
from edge_llm.worker import messages
from edge_llm.worker.client import Peer, WorkerClient
from edge_llm.worker.messages import (
    CancelRequest,
    DecodeRequest,
    EventBatch,
    PrefillCandidate,
    PromptReport,
    TokenizeReply,
    TokenizeRequest,
)

RECONNECT_S: Final = 0.5
REFUSED_S: Final = 0.1
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
    """One request and its clock readings (monotonic seconds)."""

    job: Job
    session: Session
    arrived_s: float
    updates: asyncio.Queue[Update] = field(default_factory=asyncio.Queue)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    plan: Plan | None = None
    sent_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    prompted_s: float = 0.0
    report: PromptReport | None = None
    notes: list[str] = field(default_factory=list)
    error: EdgeLLMError | None = None

    @property
    def level(self) -> Level:
        """What may be promised: the decode worker's level, unless KV of another class came in or a resume broke it."""
        if self.plan is None:
            return "unverified"
        if self.report is not None and not self.report.is_same_class:
            return "none"
        return self.plan.decode.status.level


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
        self._queue_length, self._queue_wait_s, self._replan_limit = queue_length, queue_wait_s, replan_limit
        self._clock = clock
        self._running: dict[str, Running] = {}
        self._connections: dict[str, asyncio.Task[None]] = {}
        self._admission = asyncio.Lock()
        self._changed = asyncio.Event()
        self._queued = 0
        self.prober: Prober | None = None

    @property
    def view(self) -> ClusterView:
        return self.prober.view if self.prober else ClusterView()

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
            except WorkerError as error:
                failure = error
        raise failure

    @asynccontextmanager
    async def running(self, job: Job) -> AsyncIterator[Running]:
        """Run a job; leaving the block early cancels it everywhere."""
        if self._queued >= self._queue_length:
            raise Overloaded(f"{self._queued} requests wait already", retry_after_s=5.0)
        running = Running(job, Session(job.request_id), self._clock())
        self._running[job.request_id] = running
        task = asyncio.create_task(self._run(running), name=f"request {job.request_id}")
        try:
            yield running
        finally:
            if not running.session.is_over:
                running.session.on(Event.CLIENT_GONE)
                running.ended.set()
                await self._cancel(running)
            task.cancel()
            self._running.pop(job.request_id, None)
            self._changed.set()

    # -- one request

    async def _run(self, running: Running) -> None:
        """Top of a request's task: plan and follow until it is over."""
        try:
            while not running.session.is_over:
                await self._attempt(running)
        except EdgeLLMError as error:
            self._give_up(running, error)
        except Exception as error:
            log.error("request failed", request_id=running.job.request_id, error=repr(error), exc_info=True)
            self._give_up(running, WorkerError("the gateway failed on this request; see its log"))

    async def _attempt(self, running: Running) -> None:
        plan = await self._admit(running)
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

    async def _admit(self, running: Running) -> Plan:
        """Wait for a plan, in order, bounded. Raises Overloaded when the wait was too long."""
        self._queued += 1
        try:
            async with asyncio.timeout(self._queue_wait_s), self._admission:
                while True:
                    self._changed.clear()
                    try:
                        return self._plan(running)
                    except Overloaded as error:
                        running.notes = [f"waited: {error.message}"]
                    async with asyncio.timeout(self._queue_wait_s):
                        await self._changed.wait()
        except TimeoutError as late:
            reason = running.notes[-1] if running.notes else "the queue did not move"
            raise Overloaded(
                f"no slot became free within {self._queue_wait_s:.0f} s ({reason})", retry_after_s=10.0
            ) from late
        finally:
            self._queued -= 1

    def _plan(self, running: Running) -> Plan:
        job = running.job
        avoid = frozenset(running.session.lost)
        tokens = len(job.prompt_ids) + len(running.session.delivered)
        wish = Wish(job.model, tokens, job.max_tokens - len(running.session.delivered), job.mode, avoid)
        plan = decide(wish, self.view, self._booked())
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
        if len(session.lost) >= self._replan_limit:
            self._give_up(running, error)
            return
        session.on(Event.WORKER_LOST)
        # a full worker is not a broken one: it may be planned with again
        if not isinstance(error, Overloaded):
            session.lost.append(worker)
        running.ended.set()

    def _give_up(self, running: Running, error: EdgeLLMError) -> None:
        if running.session.is_over:
            return
        running.session.on(Event.GAVE_UP)
        running.error = error
        running.updates.put_nowait(Finish(None, error))
        running.ended.set()

    async def _cancel(self, running: Running) -> None:
        if running.plan is None:
            return
        request = CancelRequest(request_id=running.job.request_id, epoch=running.session.epoch)
        try:
            await asyncio.shield(self._client.cancel(_peer(running.plan.decode), request))
        except EdgeLLMError as error:
            log.info("cancel not delivered", request_id=running.job.request_id, code=error.code)

    # -- what workers say

    def on_view(self, before: ClusterView, after: ClusterView) -> None:
        """Keep one event connection to every node of the view."""
        self._changed.set()
        for node in after.nodes:
            task = self._connections.get(node.worker)
            if node.decodes and (task is None or task.done()):
                self._connections[node.worker] = asyncio.create_task(self._follow(node), name=f"events {node.worker}")

    async def _follow(self, node: Node) -> None:
        """Read a worker's events until it is gone; then its requests are replanned."""
        try:
            async for batch in self._client.events(_peer(node)):
                self._on_batch(batch)
        except EdgeLLMError as error:
            log.warning("event connection lost", worker=node.worker, message=error.message)
            if self.prober is not None:
                self.prober.lost(node.worker)
            lost = WorkerUnreachable(f"decode worker {node.worker} was lost: {error.message}")
            for running in list(self._running.values()):
                if running.plan is not None and running.plan.decode.worker == node.worker:
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
        running.report, running.prompted_s = prompted.report, self._clock()
        if prompted.report.fallback:
            running.notes.append(prompted.report.fallback)
        if running.session.state is State.PREFILLING:
            running.session.on(Event.PROMPTED)
            self._changed.set()

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
            self._changed.set()

    def _on_failed(self, failed: messages.Failed) -> None:
        running = self._current(failed.request_id, failed.epoch)
        if running is None:
            return
        if failed.is_retryable:
            self._lose(running, WorkerError(failed.message))
        else:
            self._give_up(
                running, ContextTooLong(failed.message) if failed.status == 400 else ClientError(failed.message)
            )

    async def close(self) -> None:
        """End all connections and requests."""
        tasks = [*self._connections.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


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
