"""Ways on which nothing came, and what is planned over them."""

from __future__ import annotations

from edge_llm.gateway.ways import APART_S, Ways
from tests.nodes import report_of

SPLIT = report_of(mode="split", prefill_worker="p2")
SILENT = report_of(trouble="timeout", troubled=["p1"])


def test_a_way_on_which_nothing_came_is_not_planned_with_for_a_while() -> None:
    ways = Ways()
    ways.reported("d1", SILENT, 10.0)
    assert set(ways.apart(10.0 + APART_S - 0.1)) == {("p1", "d1")}
    assert not ways.apart(10.0 + APART_S)


def test_each_way_is_known_by_itself() -> None:
    ways = Ways()
    ways.reported("d1", SILENT, 0.0)
    ways.reported("d2", report_of(trouble="timeout", troubled=["p1", "p2"]), 1.0)
    ways.reported("d3", SPLIT, 1.0)
    assert set(ways.apart(1.0)) == {("p1", "d1"), ("p1", "d2"), ("p2", "d2")}
    assert set(ways.apart(APART_S)) == {("p1", "d2"), ("p2", "d2")}
