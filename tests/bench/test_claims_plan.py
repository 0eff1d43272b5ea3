"""Which steps run on which machine, and what is left out when time is short."""

from __future__ import annotations

import pytest

from edge_llm.bench.claims_plan import STEPS, Machine, Planned, fitted, planned

BOARD = Machine(cores=4, has_tools=True)
ALL = set(STEPS)


def test_without_a_budget_everything_runs_whole_exactness_first() -> None:
    plan = planned(ALL, BOARD)
    assert [one.step.name for one in plan] == list(STEPS)
    assert plan[0].step.name == "verify"
    assert not any(one.is_small or one.why_not for one in plan)


def test_only_wanted_steps_are_planned() -> None:
    assert [one.step.name for one in planned({"turns", "verify"}, BOARD)] == ["verify", "turns"]


@pytest.mark.parametrize("minutes", [1.0, 5.0, 20.0, 60.0, 120.0, 200.0, 500.0])
def test_a_budget_is_kept_and_says_what_is_left_out(minutes: float) -> None:
    plan = planned(ALL, BOARD, minutes)
    assert sum(one.minutes for one in plan) <= minutes
    for one in plan:
        assert (one.minutes == 0) == bool(one.why_not)
        assert not one.why_not or f"{minutes:g} minutes" in one.why_not


def test_more_time_makes_runs_whole_in_the_order_of_importance() -> None:
    all_small = sum(step.small_minutes for step in STEPS.values())
    first = STEPS["verify"]
    plan = planned(ALL, BOARD, all_small + first.minutes - first.small_minutes)
    assert [one.step.name for one in plan if not one.is_small] == ["verify"]
    assert not any(one.why_not for one in plan)


def test_quick_runs_everything_small_whatever_time_there_is() -> None:
    assert all(one.is_small for one in planned(ALL, BOARD, is_quick=True))
    assert all(one.is_small for one in planned(ALL, BOARD, 1000.0, is_quick=True))


def test_a_board_with_one_core_leaves_out_what_needs_two_and_says_so() -> None:
    plan = {one.step.name: one for one in planned(ALL, Machine(1, has_tools=True))}
    assert "2 cores" in plan["gateway"].why_not
    assert "2 cores" in plan["goodput"].why_not
    assert not plan["theorem"].why_not
    assert not plan["faults"].why_not


def test_without_llama_cpps_tools_their_comparison_is_left_out_and_the_rest_runs_without_them() -> None:
    bare = Machine(4, has_tools=False)
    plan = {one.step.name: one for one in planned(ALL, bare)}
    assert "reference-tools" in plan["engine"].why_not
    assert "--no-llama-server" in plan["handoff"].arguments(bare)
    assert "--no-llama-server" not in plan["handoff"].arguments(BOARD)
    assert plan["verify"].arguments(bare) == ("verify",)


def test_a_model_and_a_place_go_to_the_steps_that_know_them() -> None:
    where = {"theorem": ("--url", "http://pi-1:8080")}
    plan = {one.step.name: one.arguments(BOARD, "m.gguf", where) for one in planned(ALL, BOARD)}
    assert plan["theorem"] == ("bench", "theorem", "--model", "m.gguf", "--url", "http://pi-1:8080")
    assert plan["engine"][-2:] == ("--models", "m.gguf")
    assert "m.gguf" not in plan["pools"]


def test_a_slow_board_takes_smaller_runs_and_leaves_time_for_those_that_follow() -> None:
    step, later = STEPS["theorem"], [Planned(STEPS["handoff"]), Planned(STEPS["engine"], why_not="no tools")]
    kept = STEPS["handoff"].small_minutes
    assert fitted(Planned(step), later, step.minutes + kept, 1.0) == Planned(step)
    assert fitted(Planned(step), later, step.minutes + kept - 0.1, 1.0) == Planned(step, is_small=True)
    assert fitted(Planned(step), later, step.minutes + kept, 2.0) == Planned(step, is_small=True)
    left_out = fitted(Planned(step), later, step.small_minutes - 0.1, 1.0)
    assert "left out" in left_out.why_not
    assert left_out.minutes == 0
    assert fitted(later[1], [], 0.0, 1.0) == later[1]
