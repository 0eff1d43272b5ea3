"""What workers say: one event connection per worker carries everything it has to say to this gateway.

Owns those connections and what an event does to its request. A connection that breaks loses the worker's requests; one
to a place that is not in the view any more is closed once none of our requests is there. Nothing is sent to a worker
before its connection is open (`heard`): what it says would go to one that broke without its knowing.
Refuses to know planning and sending (dispatch.py) and clients.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextvars import Context
from dataclasses import dataclass
from typing import Final, Protocol

import structlog

from edge_llm.cluster.view import ClusterView, Node, Place
from edge_llm.errors import Draining, EdgeLLMError, ReaderTooSlow, RemoteProtocolError, WorkerUnreachable
from edge_llm.gateway.metrics import GatewayMetrics
from edge_llm.gateway.running import Finish, Progress, Running
from edge_llm.gateway.session import Event, State
from edge_llm.worker import messages
from edge_llm.worker.client import Peer, WorkerClient, error_of
from edge_llm.worker.messages import ErrorReply, EventBatch

MAX_STRAYS: Final = 1024
# A step of many sequences writes to, or wakes, as many streams: all at once they would hold up whoever comes in
# meanwhile, several times on its way. So many tokens, of one worker at a time, and then whoever else is ready gets
# the loop.
TOKENS_AT_ONCE: Final = 4
log = structlog.get_logger()


class Outcomes(Protocol):
    """Who acts on what workers say. Implementation: Dispatcher."""

    def lose(self, running: Running, error: EdgeLLMError) -> None:
        """The worker failed this request."""

    def give_up(self, running: Running, error: EdgeLLMError) -> None:
        """No worker will do better."""

    def drop(self, running: Running, error: EdgeLLMError) -> None:
        """The request itself must end; its worker does not know."""

    def progressed(self, running: Running, done: int) -> None:
        """`done` positions of its prompt are computed."""

    def prompted(self, running: Running) -> None:
        """Its prompt is whole."""

    def delivered(self, running: Running) -> None:
        """A token came that is not its last one."""

    def finished(self, running: Running) -> None:
        """Its last token came."""

    def stray(self, node: Node, request_id: str, epoch: int) -> None:
        """`node` works on a request that this gateway does not have in that epoch."""

    def gone(self, node: Node) -> None:
        """The connection to `node` broke."""


@dataclass(slots=True)
class _Connection:
    """`is_open` is set when the worker has answered, and when it is gone: who waits for it must not wait for ever.
    `task` reads it until then."""

    is_open: asyncio.Event
    task: asyncio.Task[None]


class Listener:
    """The event connections, and what comes over them."""

    def __init__(
        self,
        client: WorkerClient,
        running: Mapping[str, Running],
        outcomes: Outcomes,
        metrics: GatewayMetrics,
        clock: Callable[[], float],
        buffer_bytes: int,
    ) -> None:
        self._client, self._running, self._outcomes = client, running, outcomes
        self._metrics, self._clock, self._buffer_bytes = metrics, clock, buffer_bytes
        self._connections: dict[Place, _Connection] = {}
        self._places: frozenset[Place] = frozenset()
        self._turn = asyncio.Lock()
        self._strays: OrderedDict[tuple[str, int], None] = OrderedDict()

    def on_view(self, before: ClusterView, after: ClusterView) -> None:
        """Keep one event connection to every node of the view."""
        for node in after.nodes:
            if node.decodes and node.place not in self._connections:
                is_open = asyncio.Event()
                following = self._follow(node, is_open)
                task = asyncio.create_task(following, name=f"events {node.worker}", context=Context())
                self._connections[node.place] = _Connection(is_open, task)
        self._places = frozenset(node.place for node in after.nodes)
        self.hang_up()

    async def heard(self, node: Node) -> None:
        """Returns when what the node says comes here. Raises WorkerUnreachable where nobody listens to it; a connection
        that does not come about loses it its requests, as one that breaks."""
        connection = self._connections.get(node.place)
        if connection is not None:
            await connection.is_open.wait()
        if connection is None or self._connections.get(node.place) is not connection:
            raise WorkerUnreachable(f"decode worker {node.worker} is not heard any more")

    def hang_up(self) -> None:
        """On all places that nobody speaks of any more and where nothing of ours is. To be called when requests end."""
        gone = self._connections.keys() - self._places
        if not gone:
            return
        gone -= {
            running.plan.decode.place
            for running in self._running.values()
            if running.plan is not None and running.session.is_with_worker
        }
        for place in gone:
            if self._connections[place].task is not asyncio.current_task():  # that one ends by itself
                connection = self._connections.pop(place)
                connection.task.cancel()
                connection.is_open.set()  # here: a task that is cancelled before its first turn never gets there

    async def _follow(self, node: Node, is_open: asyncio.Event) -> None:
        """Read a worker's events until it is gone; then its requests are replanned. When it answers again there is a
        new connection, at once."""
        try:
            async for batch in self._client.events(Peer(node.worker, node.place.address), is_open.set):
                self._end_strays(batch, node)  # before: what loses a worker its request is no stray yet
                await self._on_batch(batch)
        except EdgeLLMError as error:
            log.warning("event connection lost", worker=node.worker, message=error.message)
            self._lose_all(node, error.message)
        except Exception as error:  # top of the task: what was not heard may have been somebody's last token
            log.error("events failed", worker=node.worker, error=repr(error), exc_info=True)
            self._lose_all(node, "the gateway failed on what it said")
        finally:
            is_open.set()

    def _lose_all(self, node: Node, why: str) -> None:
        """To be called by the task of its connection, which ends."""
        if (connection := self._connections.get(node.place)) and connection.task is asyncio.current_task():
            del self._connections[node.place]
        self._outcomes.gone(node)
        lost = WorkerUnreachable(f"decode worker {node.worker} was lost: {why}")
        for running in list(self._running.values()):
            if running.plan is not None and running.plan.decode.place == node.place:
                self._outcomes.lose(running, lost)

    def _end_strays(self, batch: EventBatch, node: Node) -> None:
        """Sequences of an earlier gateway of this name, or that a cancellation overtook or did not reach, would
        otherwise hold their slots until they are whole, here or beside the same request in a later epoch. One
        cancellation each."""
        for token in batch.tokens:
            running = self._running.get(token.request_id)
            if (running is None or token.epoch < running.session.epoch) and token.finish_reason is None:
                self._end_stray(node, token.request_id, token.epoch)

    def _end_stray(self, node: Node, request_id: str, epoch: int) -> None:
        stray = (request_id, epoch)
        if stray in self._strays:
            return
        self._strays[stray] = None
        if len(self._strays) > MAX_STRAYS:
            self._strays.popitem(last=False)
        self._outcomes.stray(node, *stray)

    async def _on_batch(self, batch: EventBatch) -> None:
        for prompted in batch.prompted:
            self._on_prompted(prompted)
        for progress in batch.progress:
            running = self._current(progress.request_id, progress.epoch)
            if running is not None and running.session.state is State.PREFILLING:
                running.tell(Progress(progress.done, progress.total))
                self._outcomes.progressed(running, progress.done)
        async with self._turn:
            for number, token in enumerate(batch.tokens):
                if number and number % TOKENS_AT_ONCE == 0:
                    await asyncio.sleep(0)
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
        if running.prompted(prompted.report):
            self._metrics.prompted(running, prompted.report)
        if not running.first_token_s:
            running.prompted_s = self._clock()
        if prompted.report.fallback:
            running.notes.append(prompted.report.fallback)
        if running.session.state is State.PREFILLING:
            running.session.on(Event.PROMPTED)
            self._outcomes.prompted(running)

    def _on_token(self, token: messages.Token) -> None:
        running = self._current(token.request_id, token.epoch)
        if running is None:
            self._drop(token)
            return
        try:
            if not running.session.deliver(token):
                return
        except RemoteProtocolError as error:
            self._outcomes.lose(running, error)
            return
        if running.plan is not None:
            running.made_by = running.plan.decode
        now_s = self._clock()
        self._metrics.token(running, now_s)
        running.last_token_s = now_s
        running.first_token_s = running.first_token_s or now_s
        running.say(token.text)
        if token.finish_reason is not None:
            running.tell(Finish(token.finish_reason))
            running.turn_ends()
            self._outcomes.finished(running)
        elif running.unread_bytes > self._buffer_bytes:
            unread = f"the client left {running.unread_bytes} bytes of its answer unread"
            self._outcomes.drop(running, ReaderTooSlow(unread))
        else:
            self._outcomes.delivered(running)

    def _drop(self, token: messages.Token) -> None:
        """A late token of a plan that is over. Its request may be gone: then nobody misses it."""
        running = self._running.get(token.request_id)
        if running is not None and token.epoch < running.session.epoch:
            self._metrics.dropped(running.job.model)
            log.debug("late token dropped", request_id=token.request_id, epoch=token.epoch, index=token.index)

    def _on_failed(self, failed: messages.Failed) -> None:
        running = self._current(failed.request_id, failed.epoch)
        if running is None:
            return
        worker = running.plan.decode.worker if running.plan else "?"
        error = error_of(ErrorReply(code=failed.code, message=failed.message), worker)
        if isinstance(error, Draining) and running.plan is not None:
            running.holder = running.plan.decode
        if failed.is_retryable:
            self._outcomes.lose(running, error)
        else:
            self._outcomes.give_up(running, error)

    async def close(self) -> None:
        """End all connections."""
        tasks = [connection.task for connection in self._connections.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
