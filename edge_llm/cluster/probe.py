"""Asking workers how they are, and keeping the view true.

Owns the view: every `interval_s` each place is asked for its status; an answer makes or renews a node, a node that
does not answer `MISSES` times in a row, or whose connection is refused, leaves the view. Refuses to know scheduling.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable
from typing import Final, Protocol

import structlog

from edge_llm.cluster.view import ClusterView, Node, Place
from edge_llm.errors import ConfigError, EdgeLLMError, RemoteProtocolError
from edge_llm.worker.client import Peer, WorkerClient

MISSES: Final = 3
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
        self._places: tuple[Place, ...] = ()
        self.view = ClusterView()

    async def run(self) -> None:
        while True:
            try:
                await self.probe_all()
            except Exception as error:  # top of the task: a view that nobody renews would be believed for ever
                log.error("probing failed", error=repr(error), exc_info=True)
            await asyncio.sleep(self._interval_s)

    async def probe_all(self) -> None:
        """One round. Places that cannot be read are those of the last time."""
        try:
            self._places = self._discovery.places()
        except ConfigError as error:
            log.error("workers file", message=error.message)
        places = self._places
        await asyncio.gather(*(self._probe(place) for place in places))
        self._set(self.view.without({node.worker for node in self.view.nodes} - {place.worker for place in places}))

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
        self._set(self.view.with_node(Node(place, status, self._clock())))

    def _missed(self, place: Place, error: EdgeLLMError) -> None:
        misses = self._misses[place.worker] = self._misses.get(place.worker, 0) + 1
        if misses == MISSES or (misses == 1 and self.view.node(place.worker) is not None):
            log.warning("worker does not answer", worker=place.worker, message=error.message)
        if misses >= MISSES or _is_refused(error):
            self.lost(place.worker)

    def _set(self, view: ClusterView) -> None:
        if view != self.view:
            before, self.view = self.view, view
            self._on_change(before, view)


def _is_refused(error: EdgeLLMError) -> bool:
    """Whether nobody listens there: the process is gone, not slow."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno == errno.ECONNREFUSED
