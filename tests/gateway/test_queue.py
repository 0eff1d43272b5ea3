"""Who gets a plan when: order, lanes, bounds, and places given up."""

from __future__ import annotations

import asyncio

import pytest

from edge_llm.errors import DeadlinePassed, Overloaded, UnknownModel, WorkerError, WorthAWait
from edge_llm.gateway.queue import ASKED_TO_WAIT, PATIENCE_S, Bounds, Demand, Place, PlanQueue
from edge_llm.gateway.scheduler import Plan
from tests.nodes import node_of

pytestmark = pytest.mark.anyio
PLAN = Plan(node_of("d1", "decode"), ())


class Slots:
    """A clock, and plans while a lane has slots, for prompts up to `longest`; notes who got one."""

    def __init__(self, **bounds: float) -> None:
        self.free: dict[str, int] = {}
        self.longest = 1_000_000
        self.planned: list[str] = []
        self.now_s = 100.0
        self.queue = PlanQueue(Bounds(**bounds), clock=lambda: self.now_s)  # type: ignore[arg-type]

    def demand(self, name: str, **changes: object) -> Demand:
        values = {"key": "k", "model": "m", "prompt_tokens": 10, "max_tokens": 10} | changes
        return Demand(request_id=name, **values)  # type: ignore[arg-type]

    def join(self, name: str, lane: str = "m", *, is_returning: bool = False, **changes: object) -> Place:
        demand = self.demand(name, **changes)

        def plan() -> Plan:
            if not self.free.get(lane, 0) or demand.prompt_tokens - demand.held_tokens > self.longest:
                raise Overloaded(f"{lane} is full")
            self.free[lane] -= 1
            self.planned.append(name)
            return PLAN

        if is_returning:
            return self.queue.rejoin(demand, plan, lane)
        place = self.queue.enter(demand, 0)
        self.queue.ready(place, demand, plan, lane)
        return place

    def give(self, lane: str = "m", slots: int = 1) -> None:
        self.free[lane] = self.free.get(lane, 0) + slots
        self.queue.move()

    def serve(self, *, seconds: float, tokens: int = 20, requests: int = 8, still_running: int = 1) -> None:
        """Requests of `tokens` that took `seconds` each; so many more run now."""
        service = self.queue.service
        for number in range(requests):
            service.began("m", f"past {number}", self.now_s - seconds)
            service.ended("m", f"past {number}", self.now_s, tokens)
        for number in range(still_running):
            service.began("m", f"now {number}", self.now_s)


@pytest.fixture
def slots() -> Slots:
    return Slots()


async def test_who_finds_a_slot_does_not_wait(slots: Slots) -> None:
    slots.free["m"] = 1
    assert await slots.queue.turn(slots.join("a")) is PLAN
    assert len(slots.queue) == 0


async def test_requests_of_one_key_leave_in_order(slots: Slots) -> None:
    places = [slots.join(name) for name in "abc"]
    slots.give()
    assert slots.planned == ["a"]
    slots.give(slots=2)
    assert slots.planned == ["a", "b", "c"]
    for place in places:
        assert await slots.queue.turn(place) is PLAN


async def test_nobody_overtakes_who_waits_for_the_same(slots: Slots) -> None:
    slots.join("a")
    slots.free["m"] = 1  # free, but nobody has been told yet
    slots.join("b")
    assert slots.planned == ["a"]


async def test_a_lane_that_is_stuck_holds_up_no_other(slots: Slots) -> None:
    slots.join("a", "full")
    slots.join("b", "full")
    slots.free["idle"] = 2
    slots.join("c", "idle", model="other")
    assert slots.planned == ["c"]
    slots.give("full")
    assert slots.planned == ["c", "a"]


async def test_a_short_request_passes_a_long_one_that_cannot_go_and_a_long_one_does_not(slots: Slots) -> None:
    slots.longest = 50
    for name, prompt_tokens in (("long", 100), ("longer", 200), ("short", 20)):
        slots.join(name, prompt_tokens=prompt_tokens)
    slots.give(slots=3)
    assert slots.planned == ["short"]
    slots.longest = 500
    slots.give(slots=0)
    assert slots.planned == ["short", "long", "longer"]


async def test_a_long_prompt_that_is_kept_passes_a_shorter_one_that_is_not(slots: Slots) -> None:
    slots.longest = 50
    slots.join("new", prompt_tokens=100)
    slots.join("longer", prompt_tokens=120)
    slots.join("next turn", prompt_tokens=110, held_tokens=90)
    slots.give(slots=3)
    assert slots.planned == ["next turn"]


async def test_among_those_that_were_overtaken_keys_take_turns_too(slots: Slots) -> None:
    slots.longest = 50
    for number in range(5):
        slots.join(f"a{number}", key="a", prompt_tokens=100)
    slots.join("short", key="b")
    slots.give()
    slots.now_s += 1.0
    slots.join("c", key="c", prompt_tokens=100)
    slots.join("short too", key="b")
    slots.give()
    slots.now_s += PATIENCE_S
    slots.longest = 500
    slots.give(slots=3)
    assert slots.planned[:2] == ["short", "short too"]
    assert "c" in slots.planned, "it was overtaken later, and only two of the other key come before it"


async def test_what_waits_of_another_model_is_not_counted() -> None:
    slots = Slots()
    for number in range(3):
        slots.join(f"other {number}", "other", model="other")
    slots.join("local", mode="local")
    seen: list[tuple[int, int]] = []

    def plan() -> Plan:
        seen.append((slots.queue.waiting("m"), slots.queue.passed("m")))
        raise Overloaded("no")

    for name, prompt_tokens in (("x", 10), ("y", 9)):
        demand = slots.demand(name, prompt_tokens=prompt_tokens)
        slots.queue.ready(slots.queue.enter(demand, 9), demand, plan, "m", 9)
    assert seen == [(2, 0), (3, 0), (3, 1)], "nor is one that would not split among those that come before"
    assert slots.queue.waiting("other") == 3


async def test_who_is_told_to_wait_for_something_better_does_not_keep_those_behind_from_being_asked(
    slots: Slots,
) -> None:
    asked: list[str] = []
    for number in range(ASKED_TO_WAIT + 4):
        demand = slots.demand(f"r{number}")

        def plan(name: str = demand.request_id) -> Plan:
            asked.append(name)
            raise WorthAWait("p1 will still be sooner")

        slots.queue.ready(slots.queue.enter(demand, 99), demand, plan, "m", 99)
    asked.clear()
    slots.queue.move()
    assert asked == [f"r{number}" for number in range(ASKED_TO_WAIT)], "nor is everybody asked each time"


async def test_how_long_a_request_waits_is_predicted_by_what_waits_of_its_own_model() -> None:
    slots = Slots(predicted_wait_s=7.0)
    slots.serve(seconds=10.0)  # with a second slot taken 4 tokens a second
    for number in range(8):
        demand = slots.demand(f"other {number}", model="other")
        slots.queue.ready(slots.queue.enter(demand, 9), demand, _full, "other", 9)
    for name, free in (("a", 9), ("b", 9), ("c", 1)):
        demand = slots.demand(name)
        slots.queue.ready(slots.queue.enter(demand, 9), demand, _full, "m", free)
    assert slots.queue.waiting("m") == 3, "20 of the 40 tokens before it wait for the slot that is free"


async def test_who_was_overtaken_for_a_while_is_tried_before_all_others(slots: Slots) -> None:
    slots.longest = 50
    long = slots.join("long", prompt_tokens=100)
    slots.join("short")
    slots.give()
    assert (slots.planned, long.overtaken_s) == (["short"], slots.now_s)
    slots.join("other", key="k2")  # its turn comes before: its key has waited for less
    slots.now_s += PATIENCE_S
    slots.longest = 500
    slots.give()
    assert slots.planned == ["short", "long"]


async def test_who_only_waits_is_not_overtaken(slots: Slots) -> None:
    first, second = slots.join("a"), slots.join("b")
    slots.now_s += 2 * PATIENCE_S
    slots.give()
    assert (first.overtaken_s, second.overtaken_s) == (None, None)


async def test_who_was_under_way_before_comes_in_front_of_the_new_but_in_order(slots: Slots) -> None:
    for name in "ab":
        slots.join(name)
    for name in "xy":
        slots.join(name, is_returning=True)
    slots.give(slots=4)
    assert slots.planned == ["x", "y", "a", "b"]


async def test_keys_take_turns_however_many_wait_of_one(slots: Slots) -> None:
    for number in range(6):
        slots.join(f"a{number}", key="a", prompt_tokens=118)
    for number in range(2):
        slots.join(f"b{number}", key="b", prompt_tokens=118)
    slots.give(slots=4)
    assert slots.planned == ["a0", "b0", "a1", "b1"]


# -- bounds


async def test_a_full_queue_refuses_the_new_and_never_who_returns() -> None:
    slots = Slots(length=1)
    slots.join("a")
    with pytest.raises(Overloaded, match="1 requests wait for a slot already"):
        slots.join("b")
    slots.join("x", is_returning=True)
    assert len(slots.queue) == 2
    slots.give(slots=3)
    assert slots.planned == ["x", "a"], "a refused request kept its place"


async def test_no_queue_at_all_still_serves_who_need_not_wait() -> None:
    slots = Slots(length=0)
    slots.free["m"] = 1
    demand = slots.demand("a")
    slots.queue.ready(slots.queue.enter(demand, 1), demand, lambda: PLAN, "m")
    with pytest.raises(Overloaded):
        slots.join("b")
    late = slots.queue.enter(demand, 1)  # the slot it saw is gone when its prompt is known
    with pytest.raises(Overloaded):
        slots.queue.ready(late, demand, _full, "m")
    assert len(slots.queue) == 0


async def test_who_waits_for_a_prefill_worker_beside_free_slots_is_not_refused() -> None:
    slots = Slots(length=0)
    demand = slots.demand("a", max_tokens=4000)
    place = slots.queue.enter(demand, 3)
    slots.queue.ready(place, demand, _full, "m", 3)
    assert len(slots.queue) == 1
    assert not place.planned.done()


def _full() -> Plan:
    raise Overloaded("full")


async def test_requests_that_arrive_together_count_before_their_prompts_are_known() -> None:
    slots = Slots(length=2)
    for name in "abcde":
        slots.queue.enter(slots.demand(name), free_slots=3)
    with pytest.raises(Overloaded):
        slots.queue.enter(slots.demand("f"), free_slots=3)


async def test_one_key_never_takes_every_place() -> None:
    slots = Slots(length=36)
    taken = 0
    with pytest.raises(Overloaded, match="32 requests of key greedy"):
        while True:
            slots.join(f"g{taken}", key="greedy")
            taken += 1
    assert taken == 32
    slots.join("modest", key="modest")


async def test_bytes_are_bounded_whoever_holds_them() -> None:
    slots = Slots(held_bytes=1000)
    slots.join("a", held_bytes=600)
    with pytest.raises(Overloaded, match="600 of 1000 bytes"):
        slots.join("b", held_bytes=600)
    slots.give()
    slots.join("c", held_bytes=600)


async def test_a_predicted_wait_beyond_the_bound_is_refused_at_once_with_the_time_to_come_back() -> None:
    slots = Slots(predicted_wait_s=30.0)
    slots.serve(seconds=10.0)  # 20 tokens in 10 s, one at a time
    for name in "abcd":
        slots.join(name)  # 0, 10, 20, 30 s
    with pytest.raises(Overloaded, match="about 40 s: more than 30 s") as caught:
        slots.join("e")
    assert caught.value.retry_after_s == 10.0
    slots.join("other", key="other")  # before it in turn: one request of the full key, no more
    slots.serve(seconds=10.0, still_running=5)  # five at a time
    slots.join("e")


async def test_who_has_less_time_than_the_wait_is_refused_at_once() -> None:
    slots = Slots()
    slots.serve(seconds=10.0)
    slots.join("a")
    with pytest.raises(Overloaded, match="more than 5 s"):
        slots.join("b", deadline_s=slots.now_s + 5.0)
    slots.join("c", deadline_s=slots.now_s + 15.0)


async def test_answers_that_might_be_long_and_will_be_short_are_waited_for_as_short_ones() -> None:
    slots = Slots(predicted_wait_s=30.0)
    slots.serve(seconds=10.0)  # 20 tokens in 10 s, one at a time
    for name in "abcd":
        slots.join(name, max_tokens=4000, answer_tokens=9.5)  # 0, 10, 20, 30 s
    with pytest.raises(Overloaded, match="about 40 s: more than 30 s"):
        slots.join("e", max_tokens=4000, answer_tokens=9.5)
    short = Slots(predicted_wait_s=30.0)
    short.serve(seconds=10.0)
    for name in "abcd":
        short.join(name, max_tokens=10, answer_tokens=500.0)  # none is expected to be longer than it may be


async def test_turns_are_paid_with_what_an_answer_may_have_and_take_what_it_will_have() -> None:
    slots = Slots(predicted_wait_s=30.0)
    slots.serve(seconds=10.0)
    for name in "abc":
        slots.join(name, key="long", max_tokens=190, answer_tokens=10.0)  # 200 tokens of turns, 20 of work each
    slots.join("d", key="short", max_tokens=190, answer_tokens=10.0)  # behind one of the other key's
    with pytest.raises(Overloaded, match="60 tokens of work"):  # two of the other key's, and its own key's one
        slots.join("e", key="short", max_tokens=190, answer_tokens=10.0, deadline_s=slots.now_s + 29.0)


async def test_before_anything_was_measured_the_workers_promise_is_believed_and_then_no_more() -> None:
    slots = Slots(predicted_wait_s=30.0)
    for name in "abcd":
        slots.join(name, promised_tokens_per_s=2.0)  # 20 tokens each: 0, 10, 20, 30 s
    with pytest.raises(Overloaded, match="about 40 s: more than 30 s") as caught:
        slots.join("e", promised_tokens_per_s=2.0)
    assert caught.value.retry_after_s == 10.0
    slots.serve(seconds=1.0)  # ten times as fast as promised
    slots.join("e", promised_tokens_per_s=2.0)


async def test_a_promise_for_long_prompts_is_not_judged_by_that_for_a_long_answer() -> None:
    slots = Slots(predicted_wait_s=30.0)
    for name in "ab":
        slots.join(name, prompt_tokens=1000, max_tokens=10, promised_tokens_per_s=250.0)  # 4 s each
    # 2,020 tokens ahead: 67 s at its own rate, 12 s at that of all three
    slots.join("chat", prompt_tokens=10, max_tokens=130, promised_tokens_per_s=30.0, deadline_s=slots.now_s + 13.0)
    with pytest.raises(Overloaded, match=r"more than 11 s"):
        slots.join("late", prompt_tokens=10, max_tokens=130, promised_tokens_per_s=30.0, deadline_s=slots.now_s + 11.0)


async def test_without_a_measurement_nothing_is_predicted(slots: Slots) -> None:
    slots.serve(seconds=1000.0, requests=2)
    for number in range(50):
        slots.join(f"{number}")
    assert len(slots.queue) == 50


# -- ends


async def test_what_can_never_be_planned_is_said_at_once_or_in_its_turn(slots: Slots) -> None:
    is_known = True

    def plan() -> Plan:
        raise Overloaded("later") if is_known else UnknownModel("gone")

    place = slots.queue.rejoin(slots.demand("a"), plan, "x")
    is_known = False
    slots.queue.move()
    with pytest.raises(UnknownModel):
        await slots.queue.turn(place)
    with pytest.raises(UnknownModel):
        slots.queue.rejoin(slots.demand("b"), plan, "x")
    assert len(slots.queue) == 0


async def test_who_waited_too_long_is_told_for_what() -> None:
    slots = Slots(wait_s=0.01)
    with pytest.raises(Overloaded, match=r"no slot became free within 0 s \(m is full\)") as caught:
        await slots.queue.turn(slots.join("a"))
    assert caught.value.retry_after_s == 5.0
    slots.give()
    assert slots.planned == []


async def test_whose_time_is_over_is_not_planned_and_told_so(slots: Slots) -> None:
    place = slots.join("a", deadline_s=slots.now_s + 3.0)
    slots.now_s += 3.0
    slots.give()
    assert slots.planned == []
    with pytest.raises(DeadlinePassed, match=r"after 3\.0 s of waiting \(m is full\)"):
        await slots.queue.turn(place)
    assert len(slots.queue) == 0


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
    early = slots.queue.enter(slots.demand("b"), 0)
    slots.queue.leave(early)
    assert len(slots.queue) == 0


async def test_a_bug_in_one_plan_ends_that_request_and_nobody_elses_turn() -> None:
    slots = Slots()

    def broken() -> Plan:
        if not slots.free:
            raise Overloaded("full")
        raise ZeroDivisionError("a bug")

    place = slots.queue.enter(slots.demand("broken"), 0)
    slots.queue.ready(place, slots.demand("broken"), broken, "other lane")
    after = slots.join("after it")
    slots.give()
    with pytest.raises(WorkerError, match="see its log"):
        await slots.queue.turn(place)
    assert await slots.queue.turn(after) is PLAN
    assert len(slots.queue) == 0
