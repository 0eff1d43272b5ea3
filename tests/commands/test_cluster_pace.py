"""Tokens a second out of counters: what two looks at a node say."""

from __future__ import annotations

from typing import Any

import pytest

from edge_llm.commands.cluster_pace import Pace, Paces


def node(generated: int, computed: int = 0, *, seen_ago_s: float = 0.0, pid: int = 1) -> dict[str, Any]:
    load = {"generated_tokens": generated, "computed_tokens": computed}
    return {"worker": "d1", "pid": pid, "started_at": 5.0, "seen_ago_s": seen_ago_s, "load": load}


def test_a_pace_is_what_was_added_between_two_answers_of_the_node() -> None:
    paces = Paces()
    assert paces.of([node(100, 1000)], 10.0) == {"d1": Pace()}
    assert paces.of([node(140, 1500)], 12.0) == {"d1": Pace(20.0, 250.0)}


def test_time_counts_from_when_the_node_answered_not_from_when_we_asked() -> None:
    paces = Paces()
    paces.of([node(100, seen_ago_s=0.9)], 10.0)
    pace = paces.of([node(140, seen_ago_s=0.1)], 12.0)["d1"].generated
    assert pace == pytest.approx(40 / 2.8)


def test_the_last_pace_stays_until_the_node_has_said_something_new() -> None:
    paces = Paces()
    paces.of([node(100)], 10.0)
    paces.of([node(140)], 12.0)
    assert paces.of([node(140, seen_ago_s=0.5)], 12.5) == {"d1": Pace(20.0, 0.0)}
    assert paces.of([node(140)], 14.0) == {"d1": Pace(0.0, 0.0)}


def test_a_node_that_was_started_again_begins_anew() -> None:
    paces = Paces()
    paces.of([node(100)], 10.0)
    assert paces.of([node(3, pid=2)], 12.0) == {"d1": Pace()}
    assert paces.of([node(23, pid=2)], 14.0) == {"d1": Pace(10.0, 0.0)}


def test_a_node_that_is_gone_is_forgotten() -> None:
    paces = Paces()
    paces.of([node(100)], 10.0)
    assert paces.of([], 11.0) == {}
    assert paces.of([node(140)], 12.0) == {"d1": Pace()}
