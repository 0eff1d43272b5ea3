"""Room for snapshots: whoever waits, is cancelled or gives up, all of it is free in the end."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.worker.adopt import ByteBudget


async def _hold(budget: ByteBudget, size: int, ends: asyncio.Event) -> None:
    async with budget.reserved(size):
        await ends.wait()


async def _in_any_order(sizes: list[int], steps: list[tuple[str, int]]) -> None:
    budget, ends = ByteBudget(100), [asyncio.Event() for _ in sizes]
    tasks = [asyncio.create_task(_hold(budget, size, end)) for size, end in zip(sizes, ends, strict=True)]
    for what, which in steps:
        task, end = tasks[which % len(tasks)], ends[which % len(tasks)]
        if what == "turn":
            await asyncio.sleep(0)
        elif what == "cancel":
            task.cancel()
        else:
            end.set()
    for end in ends:
        end.set()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5.0)
    assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results), results
    assert budget.used_bytes == 0
    assert budget.has_room(100)


@given(
    sizes=st.lists(st.integers(1, 120), min_size=1, max_size=5),
    steps=st.lists(st.tuples(st.sampled_from(["turn", "cancel", "end"]), st.integers(0, 4)), max_size=20),
)
def test_whatever_is_cancelled_when_all_room_comes_back(sizes: list[int], steps: list[tuple[str, int]]) -> None:
    asyncio.run(_in_any_order(sizes, steps))


def test_a_waiter_that_is_cancelled_in_the_turn_in_which_room_is_given_back_gets_none_of_it() -> None:
    asyncio.run(_in_any_order([60, 60, 60], [("turn", 0), ("cancel", 1), ("cancel", 0), ("turn", 0)]))
    asyncio.run(_in_any_order([60, 60, 60], [("turn", 0), ("cancel", 0), ("cancel", 1), ("turn", 0)]))


@pytest.mark.anyio
async def test_who_has_waited_long_enough_goes_on_without() -> None:
    budget = ByteBudget(10)
    async with budget.reserved(10), budget.reserved(5, 0.01) as has_room:
        assert not has_room
        assert budget.used_bytes == 10
    assert budget.used_bytes == 0
    async with budget.reserved(5, 0.01) as has_room:
        assert has_room
