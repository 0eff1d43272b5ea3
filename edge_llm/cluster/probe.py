"""Asking workers how they are, and keeping the view true.

Owns the view: every `interval_s` each place is asked for its status, one that has not answered yet is not asked again
meanwhile and holds up nobody. An answer makes or renews a node. A node leaves the view at once when nobody listens at
its place or its connection is reset, after `LEASE_S` without an answer, and after `MISSES` answers in a row that are
none. Refuses to know scheduling.

Places that have not answered for `FORGOTTEN_S` or ever share `SILENT_A_ROUND` questions a round: a board that is off is
still asked every round, of hundreds that are gone each has its turn, and what they cost does not grow with their
number. What discovery has news of is asked at once.

Silence: a question is given up after 1.5 s (worker/client.py). Last answer at 0 s, asked again at 1 s and, after that
was given up, at 2.5 to 3.5 s, given up at 5 s at the latest: a silent worker is out of the view within 6 s.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import aiohttp
import structlog

from edge_llm.cluster.discovery import Discovery
from edge_llm.cluster.view import ClusterView, Node, Place
from edge_llm.errors import ConfigError, EdgeLLMError, RemoteProtocolError
from edge_llm.worker.client import Peer, WorkerClient

MISSES: Final = 3
LEASE_S: Final = 4.0
FORGOTTEN_S: Final = 60.0
SILENT_A_ROUND: Final = 20
_GONE: Final = frozenset({errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE})
log = structlog.get_logger()


@dataclass(slots=True)
class Known:
    """What came of asking at one place."""

    turn: int = 0
    """When it was asked last, as a number that grows with every question; 0: never."""
    misses: int = 0
    """In a row."""
    answered_s: float | None = None
    problem: EdgeLLMError | None = None
    """Why it did not answer the last time."""
    said: type[EdgeLLMError] | None = None
    """What kind of problem the log has of it."""


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
        self._known: dict[Place, Known] = {}
        self._asking: dict[Place, asyncio.Task[None]] = {}
        self._turn = 0
        self._news: set[str] = set()
        self._complaint = ""
        self._woken = asyncio.Event()
        self.view = ClusterView()

    async def run(self) -> None:
        try:
            while True:
                self._guarded(self._due)
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._interval_s):
                        while True:
                            await self._woken.wait()
                            self._woken.clear()
                            self._guarded(self._new)
        finally:
            for task in self._asking.values():
                task.cancel()

    async def probe_all(self) -> None:
        """One round at all places, to its end. Places that cannot be read are those of the last time."""
        self._look_up()
        await asyncio.gather(*(self._ask(place) for place in self._known))

    def news(self, workers: Collection[str]) -> None:
        """Discovery has these or has them no longer: ask now, and as if they had never been asked."""
        self._news.update(workers)
        self._woken.set()

    @property
    def places(self) -> int:
        """How many are known."""
        return len(self._known)

    @property
    def silent(self) -> tuple[tuple[Place, str], ...]:
        """Places that are not in the view, and why; empty where nobody has failed to answer yet."""
        seen = {node.place for node in self.view.nodes}
        return tuple(
            (place, known.problem.message if known.problem else "")
            for place, known in self._known.items()
            if place not in seen
        )

    def _guarded(self, choice: Callable[[], Collection[Place]]) -> None:
        """Look where workers may be, and ask those of the choice."""
        try:
            self._look_up()
            for place in choice():
                self._ask(place)
        except Exception as error:  # top of the task: a view that nobody renews would be believed for ever
            log.error("probing failed", error=repr(error), exc_info=True)

    def _look_up(self) -> None:
        """Where workers may be now; who is not named any more is gone."""
        try:
            places = self._discovery.places()
        except ConfigError as error:
            if error.message != self._complaint:  # once, not every second
                self._complaint = error.message
                log.error("workers file", message=error.message)
            return
        self._complaint = ""
        self._known = {place: self._known.get(place) or Known() for place in places}
        for place, known in self._known.items():
            if place.worker in self._news:
                known.turn = 0
        self._news.clear()
        self._set(self.view.without(node.worker for node in self.view.nodes if node.place not in self._known))

    def _new(self) -> list[Place]:
        return [place for place, known in self._known.items() if not known.turn]

    def _due(self) -> list[Place]:
        return due(self._known, self._clock())

    def _ask(self, place: Place) -> asyncio.Task[None]:
        """Ask, unless an answer is still awaited."""
        task = self._asking.get(place)
        if task is None:
            self._turn += 1
            self._known[place].turn = self._turn
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
        known = self._known.get(place)
        if known is None:
            return  # not named any more since it was asked
        known.misses, known.problem, known.said, known.answered_s = 0, None, None, self._clock()
        self._set(self.view.with_node(Node(place, status, known.answered_s)))

    def _missed(self, place: Place, error: EdgeLLMError) -> None:
        known = self._known.get(place)
        if known is None:
            return
        known.misses, known.problem = known.misses + 1, error
        node = self.view.node(place.worker)
        is_seen = node is not None and node.place == place
        if (known.misses >= MISSES or is_seen) and known.said is not type(error):
            known.said = type(error)
            log.warning("worker does not answer", worker=place.worker, message=error.message)
        silent_s = self._clock() - known.answered_s if known.answered_s is not None else 0.0
        if is_seen and (known.misses >= MISSES or silent_s >= LEASE_S or _is_gone(error)):
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


def due(known: Mapping[Place, Known], now_s: float) -> list[Place]:
    """Whom a round asks: all that are new or have answered lately, and a share of the others in turn."""
    lively: list[Place] = []
    silent: list[Place] = []
    for place, what in known.items():
        is_lively = not what.turn or (what.answered_s is not None and now_s - what.answered_s <= FORGOTTEN_S)
        (lively if is_lively else silent).append(place)
    silent.sort(key=lambda place: known[place].turn)
    return lively + silent[:SILENT_A_ROUND]
