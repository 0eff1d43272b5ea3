"""The one queue: who waits for a plan, and in which order they get one.

Owns order, bounds and the words for waiting too long. Refuses to know how a plan is made and what becomes of it.

Those who compete leave in order: a request that cannot be planned now holds up those behind it in its lane. A lane is
whatever shares workers; a request that waits for workers of its own (another model, or any worker but the one that
failed it) holds up nobody else. Requests that were under way before come in front of new ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from edge_llm.errors import EdgeLLMError, Overloaded
from edge_llm.gateway.scheduler import Plan


@dataclass(eq=False, slots=True)
class Place:
    """One request's place. `plan` is called when its turn comes; Overloaded means not yet."""

    plan: Callable[[], Plan]
    lane: Hashable
    is_returning: bool
    planned: asyncio.Future[Plan]
    reason: str = "the queue did not move"


class PlanQueue:
    """At most `length` new requests wait, each at most `wait_s`."""

    def __init__(self, length: int, wait_s: float) -> None:
        self._length, self._wait_s = length, wait_s
        self._places: list[Place] = []

    def __len__(self) -> int:
        return len(self._places)

    def join(self, plan: Callable[[], Plan], lane: Hashable, *, is_returning: bool = False) -> Place:
        """Take a place. Raises what `plan` raises at once, or Overloaded when too many wait already."""
        place = Place(plan, lane, is_returning, asyncio.get_running_loop().create_future())
        at = sum(other.is_returning for other in self._places) if is_returning else len(self._places)
        self._places.insert(at, place)
        self.move()
        if place.planned.done():
            place.planned.result()
        elif not is_returning and len(self._places) > self._length:
            self.leave(place)
            raise Overloaded(f"{self._length} requests wait already", retry_after_s=5.0)
        return place

    async def turn(self, place: Place) -> Plan:
        """The plan, when there is one. Raises Overloaded when the wait was too long. Cancelled: the place is free."""
        try:
            async with asyncio.timeout(self._wait_s):
                return await place.planned
        except TimeoutError as late:
            raise Overloaded(
                f"no slot became free within {self._wait_s:.0f} s ({place.reason})", retry_after_s=10.0
            ) from late
        finally:
            self.leave(place)

    def leave(self, place: Place) -> None:
        """Give the place up, if it is still held; somebody else may be next."""
        if place in self._places:
            self._places.remove(place)
            self.move()

    def move(self) -> None:
        """Plan for everybody whose turn it is. To be called whenever a plan may have become possible."""
        held: set[Hashable] = set()
        for place in self._places.copy():
            # done while it is in the list: whoever waited was cancelled and has not run since
            if place.lane in held or place.planned.done():
                continue
            try:
                plan = place.plan()
            except Overloaded as error:
                place.reason = error.message
                held.add(place.lane)
            except EdgeLLMError as error:
                self._places.remove(place)
                place.planned.set_exception(error)
            else:
                self._places.remove(place)
                place.planned.set_result(plan)
