"""Requests on their way through the cluster: queue, plan, send, follow, replan.

Owns the way of a request. Refuses to know OpenAI JSON (answer.py turns updates into it), the queue's order, how workers
are heard (listen.py) and chosen (planner.py).

A request leaves the queue (queue.py) when the planner finds workers with room for it. A lost worker sends its
requests to REPLANNING: they queue again at the front with prompt + delivered tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Final

import structlog

from edge_llm.cluster.capacity import serves_per_s
from edge_llm.cluster.probe import Prober
from edge_llm.cluster.view import ClusterView, Node
from edge_llm.errors import (
    DeadlinePassed,
    Draining,
    EdgeLLMError,
    Overloaded,
    RemoteProtocolError,
    UnknownModel,
    WorkerError,
)
from edge_llm.gateway import queue
from edge_llm.gateway.checkpoints import Checkpoints
from edge_llm.gateway.listen import Listener
from edge_llm.gateway.metrics import GatewayMetrics
from edge_llm.gateway.orders import Orders, peer_of
from edge_llm.gateway.planner import Planner
from edge_llm.gateway.running import Finish, Job, Running
from edge_llm.gateway.scheduler import Plan
from edge_llm.gateway.session import Event, Session, State
from edge_llm.trace import HEADER
from edge_llm.worker.client import WorkerClient
from edge_llm.worker.messages import CancelRequest, DecodeRequest

REFUSED_S: Final = 0.1
# What a worker is told at least: to it, no time left means no deadline.
MIN_TIME_S: Final = 0.001
# How long the end of a gateway waits for its last cancellations to arrive; a lease frees what they did not reach.
CLOSE_S: Final = 1.0
# How long news of workers may lie before those who wait are planned for again.
LOOK_AGAIN_S: Final = 0.1
# Rates of idle engines flatter, and who is refused for nothing is worse off than who waits a little.
HOPE: Final = 1.5
log = structlog.get_logger()


class Dispatcher:
    """All requests of this gateway."""

    def __init__(
        self,
        client: WorkerClient,
        gateway: str,
        bounds: queue.Bounds,
        replan_limit: int,
        metrics: GatewayMetrics,
        planner: Planner,
        clock: Callable[[], float] = time.monotonic,
        buffer_bytes: int = 256 << 10,
        checkpoint_tokens: int = 0,
    ) -> None:
        """`buffer_bytes`: what a client may leave unread of one answer. `checkpoint_tokens`: after so many of an
        answer each time, another worker fetches its KV (checkpoints.py); 0: never."""
        self._client, self._metrics, self._orders = client, metrics, Orders(client, gateway)
        self._queue_wait_s, self._replan_limit, self._clock = bounds.wait_s, replan_limit, clock
        self._planner = planner
        self._checkpoints = Checkpoints(
            client.keep, self._orders, planner, metrics, lambda: self.view, checkpoint_tokens
        )
        self._running: dict[str, Running] = {}
        self._held: Counter[str] = Counter()
        self._listener = Listener(client, self._running, self, metrics, clock, buffer_bytes)
        self._queue = queue.PlanQueue(bounds, clock=clock)
        self._endings: set[asyncio.Task[None]] = set()
        self._looking: asyncio.TimerHandle | None = None
        self.prober: Prober | None = None

    @property
    def view(self) -> ClusterView:
        return self.prober.view if self.prober else ClusterView()

    @property
    def planner(self) -> Planner:
        return self._planner

    @property
    def requests(self) -> dict[str, int]:
        """How many requests are in which state."""
        return dict(Counter(running.session.state.value for running in self._running.values()))

    @property
    def is_idle(self) -> bool:
        """Nobody is served, and nobody is on the way there."""
        return not self._running and not len(self._queue)

    @property
    def states(self) -> Counter[tuple[str, State]]:
        """The same per model."""
        return Counter((running.job.model, running.session.state) for running in self._running.values())

    # -- called by the HTTP side

    def enter(self, demand: queue.Demand) -> queue.Place:
        """A place in the queue, on an estimate of the prompt. Raises Overloaded."""
        demand = replace(demand, answer_tokens=self._planner.typical_answer(demand.model))
        return self._queue.enter(self._promised(demand), self._free_slots(demand.model))

    def _promised(self, demand: queue.Demand) -> queue.Demand:
        """With what the workers' rates promise, while nothing else is known: a gateway that has just begun would let in
        more than can be served."""
        if self._queue.service.tokens_per_s(demand.model) is not None:
            return demand
        answer = max(1, demand.expected_tokens - demand.prompt_tokens)
        per_s = serves_per_s(self.view.ready(demand.model), demand.prompt_tokens, answer)
        return replace(demand, promised_tokens_per_s=per_s and HOPE * per_s * (demand.prompt_tokens + answer))

    def _free_slots(self, model: str) -> int:
        slots = sum(node.status.slots for node in self.view.ready(model) if node.decodes)
        return max(0, slots - self._held[model])

    def leave(self, place: queue.Place) -> None:
        """The place is not needed any more, if it ever was."""
        self._queue.leave(place)

    def _hold(self, model: str, change: int) -> None:
        """Counted as it changes: adding up a thousand streams would be most of what a request costs."""
        self._held[model] += change

    @asynccontextmanager
    async def running(self, job: Job, place: queue.Place, arrived_s: float) -> AsyncIterator[Running]:
        """Run a job from its place on; leaving the block early cancels it everywhere. Raises what refuses it."""
        session = Session(job.request_id, on_held=partial(self._hold, job.model))
        running = Running(job, session, self._clock(), arrived_s)
        self._running[job.request_id] = running
        try:
            running.place = place
            free_slots = self._free_slots(job.model)
            demand = self._demand(running)
            if len(self._queue) > 1:
                demand = self._with_held(running, demand)
            self._queue.ready(place, demand, lambda: self._plan(running), _lane(running), free_slots)
            if not place.planned.done():
                place.demand = self._with_held(running, place.demand)
            task = asyncio.create_task(self._run(running, place), name=f"request {job.request_id}")
            try:
                yield running
            finally:
                self._leave(running, task)
        finally:
            self._planner.over(running)  # also of one that was refused while it waited for a plan
            del self._running[job.request_id]
            self._queue.service.ended(job.model, job.request_id, self._clock(), _work_done(running))
            self._listener.hang_up()
            self._queue.move()

    # -- one request

    async def _run(self, running: Running, place: queue.Place) -> None:
        """Top of a request's task: plan and follow until it is over."""
        try:
            async with asyncio.timeout(self._time_left_s(running.job)):
                await self._attempt(running, await self._queue.turn(place))
                while not running.session.is_over:
                    await self._attempt(running, await self._queue.turn(self._rejoin(running)))
        except TimeoutError:
            self.drop(running, DeadlinePassed("the request's time is over"))
        except EdgeLLMError as error:
            self.give_up(running, error)
        except Exception as error:
            log.error("request failed", request_id=running.job.request_id, error=repr(error), exc_info=True)
            self.give_up(running, WorkerError("the gateway failed on this request; see its log"))

    def _rejoin(self, running: Running) -> queue.Place:
        demand = self._with_held(running, self._demand(running))
        running.place = self._queue.rejoin(demand, lambda: self._plan(running), _lane(running))
        return running.place

    def _demand(self, running: Running) -> queue.Demand:
        job, delivered = running.job, len(running.session.delivered)
        demand = queue.Demand(
            request_id=job.request_id,
            key=job.key,
            model=job.model,
            prompt_tokens=len(job.prompt_ids) + delivered,
            max_tokens=job.max_tokens - delivered,
            mode=job.mode,
            held_bytes=job.held_bytes,
            deadline_s=job.deadline_s,
            answer_tokens=self._planner.answer_left(running),
        )
        return self._promised(demand)

    def _with_held(self, running: Running, demand: queue.Demand) -> queue.Demand:
        """With what says who may pass whom. Who waits for nobody does not wait for this to be found out either."""
        return replace(demand, held_tokens=self._planner.held_at_most(running, self.view))

    def _time_left_s(self, job: Job) -> float | None:
        return None if job.deadline_s is None else max(MIN_TIME_S, job.deadline_s - self._clock())

    async def _attempt(self, running: Running, plan: Plan) -> None:
        if running.session.state is not State.PREFILLING:
            return  # over, or its worker was lost before anything was sent: it needs another plan
        running.ended.clear()
        try:
            await self._send(running, plan)
        except (WorkerError, Overloaded, RemoteProtocolError) as error:
            self.lose(running, error)
            # a refusal comes at once: do not ask the same full worker in a tight loop
            await asyncio.sleep(REFUSED_S)
            return
        await running.ended.wait()

    async def _send(self, running: Running, plan: Plan) -> None:
        """Hand the request to its worker, if somebody still waits for it when that is heard. Does not wait for one that
        is found lost meanwhile."""
        sending = asyncio.timeout(None)
        try:
            async with sending:
                running.sending = sending
                await self._listener.heard(plan.decode)
                if running.session.is_over:
                    return
                request = self._order(running, plan)
                running.sent_s = running.sent_s or self._clock()  # its tokens may be here sooner than the reply
                await self._client.decode(peer_of(plan.decode), request, running.job.trace)
        except TimeoutError:
            if not sending.expired():
                raise
        finally:
            running.sending = None
            self._planner.write_down(running.job.request_id)

    def _order(self, running: Running, plan: Plan) -> DecodeRequest:
        """What its worker is told: as of now."""
        waits = self._planner.waits(running, plan, self.view)
        age_s = self._clock() - running.first_token_s if running.first_token_s else 0.0
        return self._orders.decode_request(running, plan, self._time_left_s(running.job) or 0.0, waits, age_s)

    def _plan(self, running: Running) -> Plan:
        job = running.job
        try:
            others, ahead = max(0, self._queue.waiting(job.model) - 1), self._queue.passed(job.model)
            plan = self._planner.plan(running, self.view, others, ahead)
        except UnknownModel as error:
            # somebody served it when the request came: workers come back
            raise Overloaded(f"no worker serves {job.model} any more", retry_after_s=2.0) from error
        if running.made_by is not None:
            running.is_as_promised &= _goes_on_the_same(running.made_by, plan.decode)
        running.plan, running.report = plan, None
        running.notes = [plan.note] if plan.note else []
        running.session.on(Event.PLANNED)
        self._metrics.planned(job.model, plan)
        return plan

    def lose(self, running: Running, error: EdgeLLMError) -> None:
        """The decode worker failed this request: plan again elsewhere, or give up."""
        session = running.session
        if not session.is_with_worker:
            return
        worker = running.plan.decode.worker if running.plan else "?"
        said = {"worker": worker, "code": error.code, "epoch": session.epoch}
        if running.job.trace:  # this may be the task that hears workers
            said[HEADER] = running.job.trace
        log.warning("replanning", request_id=session.request_id, **said)
        is_full = isinstance(error, Overloaded)
        is_draining = isinstance(error, Draining)
        if running.plan is not None and is_draining:
            self.gone(running.plan.decode)  # its next answer to a probe will say that it drains
        running.failures += not (is_full or is_draining)
        if running.plan is not None and not (is_full or is_draining):
            self._end(running, running.plan)  # it may live, and work on for nobody
        has_waited_s = self._clock() - running.waits_since_s
        if has_waited_s > self._queue_wait_s if is_full else running.failures > self._replan_limit:
            self.give_up(running, error)
            return
        session.on(Event.WORKER_LOST)
        if is_full or is_draining:
            self._planner.left(running)
        else:
            self._planner.failed(running)
        self._metrics.replanned(running.job.model, error.code)
        # a full worker is not a broken one: it may be planned with again
        if not is_full:
            session.lost.append(worker)
            running.waits_since_s = self._clock()
        running.turn_ends()

    def drop(self, running: Running, error: EdgeLLMError) -> None:
        """End a request whose worker is well: its time is over, or its client does not read."""
        if running.session.is_with_worker and running.plan is not None:
            self._end(running, running.plan)
        self.give_up(running, error)

    def give_up(self, running: Running, error: EdgeLLMError) -> None:
        if running.session.is_over:
            return
        running.session.on(Event.GAVE_UP)
        self._planner.left(running)
        self._metrics.failed(running.job.model, error.code)
        running.tell(Finish(None, error))
        running.turn_ends()
        self._queue.move()

    def _leave(self, running: Running, task: asyncio.Task[None]) -> None:
        """The client has its answer or is gone. Does not wait for anything: whoever leaves may be cancelled already."""
        session, plan = running.session, running.plan
        is_with_worker = session.is_with_worker
        is_early = not session.is_over
        if is_early:
            session.on(Event.CLIENT_GONE)
            running.ended.set()  # the cancellation waits for the call that hands it over: it must not overtake that
        self._metrics.ended(running)
        _log_end(running)
        if not is_with_worker:
            task.cancel()
            if running.place is not None:
                self._queue.leave(running.place)
        if is_early and plan is not None:
            self._end(running, plan, task)

    def _end(self, running: Running, plan: Plan, task: asyncio.Task[None] | None = None) -> None:
        """Cancel at the decode worker, once `task` has ended: a cancellation must not overtake what it cancels."""
        self.stray(plan.decode, running.job.request_id, running.session.epoch, task)

    def stray(self, node: Node, request_id: str, epoch: int, task: asyncio.Task[None] | None = None) -> None:
        """A worker computes for nobody: tell it to stop, once `task` has ended."""
        request = CancelRequest(request_id=request_id, epoch=epoch)

        async def cancel() -> None:
            if task is not None:
                await asyncio.wait({task})
            try:
                await self._client.cancel(peer_of(node), request)
            except EdgeLLMError as error:
                log.info("cancel not delivered", request_id=request_id, code=error.code)

        ending = asyncio.create_task(cancel(), name=f"cancel {request_id}")
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    def end_all(self, error: EdgeLLMError) -> None:
        """The gateway stops: tell every client that its answer ends here."""
        for running in list(self._running.values()):
            self.drop(running, error)

    def progressed(self, running: Running, done: int) -> None:
        self._planner.progressed(running, done)

    def prompted(self, running: Running) -> None:
        """There may be room for another prompt."""
        self._planner.prompted(running)
        self._queue.move()

    def delivered(self, running: Running) -> None:
        self._checkpoints.on_token(running)

    def finished(self, running: Running) -> None:
        """A slot is free."""
        self._planner.left(running)
        self._queue.move()

    def gone(self, node: Node) -> None:
        """A worker's event connection broke: not to be planned with until it answers again."""
        now = self.view.node(node.worker)
        if self.prober is not None and now is not None and now.place == node.place:
            self.prober.lost(node.worker)

    def on_view(self, before: ClusterView, after: ClusterView) -> None:
        """Keep one event connection to every node of the view."""
        self._listener.on_view(before, after)
        self._planner.on_view(after)
        self._look_again()

    def _look_again(self) -> None:
        """Plan for who waits, soon: each worker is heard once a second, and planning anew for all that wait each time
        would be most of what a gateway of many workers does."""
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(LOOK_AGAIN_S, self._look)

    def _look(self) -> None:
        self._looking = None
        self._queue.move()

    async def close(self) -> None:
        """Let cancellations arrive, bounded, and end all connections."""
        if self._looking is not None:
            self._looking.cancel()
        if self._endings:
            await asyncio.wait(self._endings, timeout=CLOSE_S)
        for task in self._endings:
            task.cancel()
        await asyncio.gather(self._listener.close(), self._checkpoints.close(), *self._endings, return_exceptions=True)


def _work_done(running: Running) -> int | None:
    """Tokens that workers read and made for a request that is over; None when it says nothing about their pace: it
    failed, or its client left while its prompt was being read."""
    state = running.session.state
    if state is State.DONE or (state is State.CANCELLED and running.prompted_s):
        return len(running.job.prompt_ids) + len(running.session.delivered)
    return None


def _log_end(running: Running) -> None:
    """One line that says what became of a request. No text of prompt or answer."""
    job, session, report = running.job, running.session, running.reading
    log.info(
        "request over",
        request_id=job.request_id,
        key=job.key,
        model=job.model,
        state=session.state.value,
        finish_reason=session.finish_reason,
        mode=report.mode if report else None,
        prefill_node=report.prefill_worker if report else None,
        decode_node=running.plan.decode.worker if running.plan else None,
        prompt_tokens=len(job.prompt_ids),
        tokens=len(session.delivered),
        queue_s=round(running.sent_s - running.arrived_s, 4) if running.sent_s else None,
        ttft_s=round(running.first_token_s - running.arrived_s, 4) if running.first_token_s else None,
        replanned=session.epoch,
    )


def _lane(running: Running) -> queue.Lane:
    """What requests share workers: others that lost the same ones, and go on in the same exactness class."""
    made_by = running.made_by
    return running.job.model, frozenset(running.session.lost), made_by and made_by.status.exactness_class


def _goes_on_the_same(before: Node, after: Node) -> bool:
    """Whether tokens that `after` adds to those of `before` are the ones that `before` would have made."""
    return before.status.exactness_class == after.status.exactness_class and after.status.level != "same-plan"
