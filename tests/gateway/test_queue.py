"""Who gets a plan when: order, lanes, bounds, and places given up."""

from __future__ import annotations

import asyncio

import pytest

from edge_llm.errors import Overloaded, UnknownModel
from edge_llm.gateway.queue import Place, PlanQueue
from edge_llm.gateway.scheduler import Plan
from tests.nodes import node_of

pytestmark = pytest.mark.anyio
PLAN = Plan(node_of("d1", "decode"), ())


class Slots:
    """Plans as long as there are slots, by lane; notes who got one."""

    def __init__(self, length: int = 10, wait_s: float = 10.0) -> None:
        self.free: dict[str, int] = {}
        self.planned: list[str] = []
        self.queue = PlanQueue(length, wait_s)

    def join(self, name: str, lane: str = "m", *, is_returning: bool = False) -> Place:
        def plan() -> Plan:
            if not self.free.get(lane, 0):
                raise Overloaded(f"{lane} is full")
            self.free[lane] -= 1
            self.planned.append(name)
            return PLAN

        return self.queue.join(plan, lane, is_returning=is_returning)

    def give(self, lane: str = "m", slots: int = 1) -> None:
        self.free[lane] = self.free.get(lane, 0) + slots
        self.queue.move()


@pytest.fixture
def slots() -> Slots:
    return Slots()


async def test_who_finds_a_slot_does_not_wait(slots: Slots) -> None:
    slots.free["m"] = 1
    assert await slots.queue.turn(slots.join("a")) is PLAN
    assert len(slots.queue) == 0


async def test_those_who_compete_leave_in_order(slots: Slots) -> None:
    places = [slots.join(name) for name in "abc"]
    slots.give()
    assert slots.planned == ["a"]
    slots.give(slots=2)
    assert slots.planned == ["a", "b", "c"]
    for place in places:
        assert await slots.queue.turn(place) is PLAN


async def test_nobody_overtakes_who_waits_in_the_same_lane(slots: Slots) -> None:
    slots.join("a")
    slots.free["m"] = 1  # free, but nobody has been told yet
    slots.join("b")
    assert slots.planned == ["a"]


async def test_a_lane_that_is_stuck_holds_up_no_other(slots: Slots) -> None:
    slots.join("a", "full")
    slots.join("b", "full")
    slots.free["idle"] = 2
    slots.join("c", "idle")
    assert slots.planned == ["c"]
    slots.give("full")
    assert slots.planned == ["c", "a"]


async def test_who_was_under_way_before_comes_in_front_of_the_new_but_in_order(slots: Slots) -> None:
    for name in "ab":
        slots.join(name)
    for name in "xy":
        slots.join(name, is_returning=True)
    slots.give(slots=4)
    assert slots.planned == ["x", "y", "a", "b"]


async def test_a_full_queue_refuses_the_new_and_never_who_returns() -> None:
    slots = Slots(length=1)
    slots.join("a")
    with pytest.raises(Overloaded, match="1 requests wait already"):
        slots.join("b")
    slots.join("x", is_returning=True)
    assert len(slots.queue) == 2
    slots.give(slots=3)
    assert slots.planned == ["x", "a"], "a refused request kept its place"


async def test_no_queue_at_all_still_serves_who_need_not_wait() -> None:
    slots = Slots(length=0)
    slots.free["m"] = 1
    slots.join("a")
    with pytest.raises(Overloaded):
        slots.join("b")
    assert slots.planned == ["a"]


async def test_what_can_never_be_planned_is_said_at_once_or_in_its_turn(slots: Slots) -> None:
    is_known = True

    def plan() -> Plan:
        raise Overloaded("later") if is_known else UnknownModel("gone")

    place = slots.queue.join(plan, "x")
    is_known = False
    slots.queue.move()
    with pytest.raises(UnknownModel):
        await slots.queue.turn(place)
    with pytest.raises(UnknownModel):
        slots.queue.join(plan, "x")
    assert len(slots.queue) == 0


async def test_who_waited_too_long_is_told_for_what() -> None:
    slots = Slots(wait_s=0.01)
    with pytest.raises(Overloaded, match=r"no slot became free within 0 s \(m is full\)") as caught:
        await slots.queue.turn(slots.join("a"))
    assert caught.value.retry_after_s == 10.0
    slots.give()
    assert slots.planned == []


async def test_who_leaves_makes_way_for_the_next(slots: Slots) -> None:
    waiting = asyncio.create_task(slots.queue.turn(slots.join("a")))
    behind = slots.join("b")
    await asyncio.sleep(0)
    waiting.cancel()
    slots.give()  # the cancelled task has not run since
    assert slots.planned == ["b"]
    await asyncio.gather(waiting, return_exceptions=True)
    assert await slots.queue.turn(behind) is PLAN


async def test_giving_up_a_place_twice_is_giving_it_up(slots: Slots) -> None:
    place = slots.join("a")
    slots.queue.leave(place)
    slots.queue.leave(place)
    slots.give()
    assert slots.planned == []
