"""Ways on which nothing came, and what is planned over them."""

from __future__ import annotations

import msgspec

from edge_llm.gateway.ways import APART_S, Ways
from edge_llm.worker.messages import PromptReport

SPLIT = PromptReport(
    mode="split",
    prefill_worker="p2",
    wait_ms=0.0,
    prefill_ms=0.0,
    handoff_ms=0.0,
    adopt_ms=0.0,
    handoff_bytes=0,
    overlapped_bytes=0,
    restored_tokens=0,
    computed_tokens=0,
    is_same_class=True,
)
LOCAL = msgspec.structs.replace(SPLIT, mode="local", prefill_worker="", trouble="timeout")


def test_a_way_on_which_nothing_came_is_not_planned_with_for_a_while() -> None:
    ways = Ways()
    ways.reported(["p1"], "d1", LOCAL, 10.0)
    assert set(ways.apart(10.0 + APART_S - 0.1)) == {("p1", "d1")}
    assert not ways.apart(10.0 + APART_S)


def test_of_several_only_those_before_the_one_that_gave_it_are_apart() -> None:
    ways = Ways()
    ways.reported(["p1", "p2"], "d1", msgspec.structs.replace(SPLIT, trouble="timeout"), 0.0)
    assert set(ways.apart(0.0)) == {("p1", "d1")}
    ways.reported(["p1", "p2"], "d2", LOCAL, 0.0)
    assert set(ways.apart(0.0)) == {("p1", "d1"), ("p1", "d2"), ("p2", "d2")}


def test_a_worker_that_refused_at_once_is_not_apart() -> None:
    ways = Ways()
    ways.reported(["p1"], "d1", msgspec.structs.replace(LOCAL, trouble="", fallback="p1 drains"), 0.0)
    ways.reported(["p2"], "d1", SPLIT, 0.0)
    assert not ways.apart(0.0)
