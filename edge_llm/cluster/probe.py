"""Asking workers how they are, and keeping the view true.

Owns the view: every `interval_s` each place is asked for its status, one that has not answered yet is not asked again
meanwhile and holds up nobody. An answer makes or renews a node. A node leaves the view at once when nobody listens at
its place or its connection is reset, after `LEASE_S` without an answer, and after `MISSES` answers in a row that are
none. Refuses to know scheduling.

Silence: a question is given up after 1.5 s (worker/client.py). Last answer at 0 s, asked again at 1 s and, after that
was given up, at 2.5 to 3.5 s, given up at 5 s at the latest: a silent worker is out of the view within 6 s.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable
from typing import Final, Protocol

import aiohttp
import structlog

from edge_llm.cluster.view import ClusterView, Node, Place
from edge_llm.errors import ConfigError, EdgeLLMError, RemoteProtocolError
from edge_llm.worker.client import Peer, WorkerClient

MISSES: Final = 3
LEASE_S: Final = 4.0
_GONE: Final = frozenset({errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE})
log = structlog.get_logger()


class Discovery(Protocol):
    """Where workers may be. Implementations: StaticFile; Kubernetes comes with the manifests."""

    def places(self) -> tuple[Place, ...]: ...


class Prober:
    """Keeps `view` fresh while `run` runs."""

    def __init__(
        self,
        discovery: Discovery,
        client: WorkerClient,
        interval_s: float,
        on_change: Callable[[ClusterView, ClusterView], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._discovery, self._client, self._interval_s = discovery, client, interval_s
        self._on_change, self._clock = on_change, clock
        self._misses: dict[str, int] = {}
        self._answered_s: dict[str, float] = {}
        self._asking: dict[Place, asyncio.Task[None]] = {}
        self._places: tuple[Place, ...] = ()
        self.view = ClusterView()

    async def run(self) -> None:
        try:
            while True:
                try:
                    self._look_up()
                    for place in self._places:
                        self._ask(place)
                except Exception as error:  # top of the task: a view that nobody renews would be believed for ever
                    log.error("probing failed", error=repr(error), exc_info=True)
                await asyncio.sleep(self._interval_s)
        finally:
            for task in self._asking.values():
                task.cancel()

    async def probe_all(self) -> None:
        """One round, to its end. Places that cannot be read are those of the last time."""
        self._look_up()
        await asyncio.gather(*(self._ask(place) for place in self._places))

    def _look_up(self) -> None:
        """Where workers may be now; who is not named any more is gone."""
        try:
            self._places = self._discovery.places()
        except ConfigError as error:
            log.error("workers file", message=error.message)
        self._set(
            self.view.without({node.worker for node in self.view.nodes} - {place.worker for place in self._places})
        )

    def _ask(self, place: Place) -> asyncio.Task[None]:
        """Ask, unless an answer is still awaited."""
        task = self._asking.get(place)
        if task is None:
            task = self._asking[place] = asyncio.create_task(self._probe(place), name=f"probe {place.worker}")
            task.add_done_callback(lambda done: self._asked(place, done))
        return task

    def _asked(self, place: Place, done: asyncio.Task[None]) -> None:
        del self._asking[place]
        if not done.cancelled() and (error := done.exception()) is not None:
            log.error("probing failed", worker=place.worker, error=repr(error))

    def lost(self, worker: str) -> None:
        """A worker's connection broke: do not plan with it until it answers again."""
        self._set(self.view.without({worker}))

    async def _probe(self, place: Place) -> None:
        try:
            status = await self._client.status(Peer(place.worker, place.address))
            if status.worker != place.worker:
                raise RemoteProtocolError(
                    f"the worker at {place.address} calls itself {status.worker}, not {place.worker}"
                )
        except EdgeLLMError as error:
            self._missed(place, error)
            return
        self._misses.pop(place.worker, None)
        if place not in self._places:
            return  # not named any more since it was asked
        self._answered_s[place.worker] = self._clock()
        self._set(self.view.with_node(Node(place, status, self._clock())))

    def _missed(self, place: Place, error: EdgeLLMError) -> None:
        misses = self._misses[place.worker] = self._misses.get(place.worker, 0) + 1
        if misses == MISSES or (misses == 1 and self.view.node(place.worker) is not None):
            log.warning("worker does not answer", worker=place.worker, message=error.message)
        silent_s = self._clock() - self._answered_s.get(place.worker, self._clock())
        if misses >= MISSES or silent_s >= LEASE_S or _is_gone(error):
            self.lost(place.worker)

    def _set(self, view: ClusterView) -> None:
        if view != self.view:
            before, self.view = self.view, view
            self._on_change(before, view)


def _is_gone(error: EdgeLLMError) -> bool:
    """Whether nobody listens there or the connection broke: the process is gone, not slow. One that lives answers the
    next question."""
    cause = error.__cause__
    return isinstance(cause, aiohttp.ServerDisconnectedError) or (isinstance(cause, OSError) and cause.errno in _GONE)
