"""What is known of a model's requests."""

from __future__ import annotations

import pytest

from edge_llm.cluster.cost import TYPICAL_ANSWER_TOKENS
from edge_llm.cluster.slo import Slo
from edge_llm.gateway.demand import Demand, Typical


def steady(per_s: float, seconds: float, demand: Demand | None = None, since_s: float = 0.0) -> Demand:
    """Requests of 200 tokens, of which 100 are held, with answers of 30."""
    demand = demand or Demand()
    for at in range(round(per_s * seconds)):
        demand.arrived("m", Slo(tpot_s=0.05), since_s + at / per_s)
        demand.planned("m", 200, held_tokens=100, may_split=True)
        demand.answered("m", 30, is_cut=True, may_split=True)
    return demand


def typical(demand: Demand, now_s: float) -> Typical:
    found = demand.typical("m", now_s)
    assert found is not None
    return found


def test_how_often_requests_come_and_how_they_are() -> None:
    found = typical(steady(2.0, 120.0), 120.0)
    assert found.rate_per_s == pytest.approx(2.0, rel=0.05)
    assert (found.prompt_tokens, found.computed_tokens, found.answer_tokens) == (200.0, 100.0, 30.0)
    assert found.tpot_s == pytest.approx(0.05)
    assert found.limited_share == 1.0


def test_a_beginning_is_not_taken_for_a_whole_window() -> None:
    assert typical(steady(2.0, 5.0), 5.0).rate_per_s == pytest.approx(2.0, rel=0.3)


def test_a_pause_is_forgotten_when_requests_come_again() -> None:
    demand = steady(2.0, 120.0)
    assert demand.typical("m", 500.0) is None, "nobody came for minutes"
    assert typical(steady(2.0, 60.0, demand, since_s=3600.0), 3660.0).rate_per_s == pytest.approx(2.0, rel=0.2)


def test_nothing_is_known_before_enough_came() -> None:
    demand = Demand()
    assert demand.typical("m", 0.0) is None
    demand.arrived("m", Slo(tpot_s=0.05), 0.0)
    assert demand.typical("m", 0.0) is None
    assert steady(2.0, 60.0).typical("another", 60.0) is None


def test_answers_that_were_cut_count_for_what_nodes_did_and_not_for_what_is_to_be_expected() -> None:
    demand = steady(2.0, 60.0)
    assert typical(demand, 60.0).answer_tokens == 30.0
    assert demand.answer_tokens("m") == TYPICAL_ANSWER_TOKENS
    demand.answered("m", 30, is_cut=False, may_split=True)
    assert demand.answer_tokens("m") < TYPICAL_ANSWER_TOKENS


def test_requests_that_never_split_say_nothing_of_those_that_do() -> None:
    demand = steady(2.0, 60.0)
    for _ in range(100):
        demand.planned("m", 4000, held_tokens=0, may_split=False)
        demand.answered("m", 500, is_cut=False, may_split=False)
    found = typical(demand, 60.0)
    assert (found.prompt_tokens, found.answer_tokens) == (200.0, 30.0)
    assert (demand.prompt_tokens("m") or 0.0) > 3000


@pytest.mark.parametrize("odd_s", [86400.0, 1e-300])
def test_one_odd_limit_hardly_moves_the_others(odd_s: float) -> None:
    demand = steady(2.0, 60.0)
    demand.arrived("m", Slo(tpot_s=odd_s), 60.0)
    assert typical(demand, 60.0).tpot_s == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize("odd_s", [86400.0, 1e-300])
def test_an_odd_limit_that_came_first_is_forgotten(odd_s: float) -> None:
    demand = Demand()
    demand.arrived("m", Slo(tpot_s=odd_s), 0.0)
    assert typical(steady(2.0, 60.0, demand, 1.0), 61.0).tpot_s == pytest.approx(0.05, rel=0.2)


def test_others_limits_are_followed_when_all_change() -> None:
    demand = steady(2.0, 60.0)
    for at in range(120):
        demand.arrived("m", Slo(tpot_s=1.0), 60.0 + at / 2)
    assert typical(demand, 120.0).tpot_s == pytest.approx(1.0, rel=0.2)


def test_a_pace_that_few_ask_for_is_told_as_such() -> None:
    demand = Demand()
    for at in range(80):
        demand.arrived("m", Slo(tpot_s=0.05 if at % 4 == 0 else None), float(at) / 4)
        demand.planned("m", 200, held_tokens=0, may_split=True)
        demand.answered("m", 30, is_cut=False, may_split=True)
    assert typical(demand, 20.0).limited_share == pytest.approx(0.25, abs=0.1)


def test_a_time_to_the_first_token_is_typical_where_most_have_a_limit() -> None:
    demand = steady(1.0, 40.0)
    typical = demand.typical("m", 40.0)
    assert typical is not None
    assert typical.ttft_s is None
    for at in range(40):
        demand.arrived("m", Slo(ttft_s=2.0 if at % 4 else None, tpot_s=0.05), 40.0 + at)
    typical = demand.typical("m", 80.0)
    assert typical is not None
    assert typical.ttft_s == pytest.approx(2.0)
    for at in range(40):
        demand.arrived("m", Slo(ttft_s=None if at % 4 else 2.0, tpot_s=0.05), 80.0 + at)
    typical = demand.typical("m", 120.0)
    assert typical is not None
    assert typical.ttft_s is None


def test_a_patient_limit_of_a_slow_board_is_believed_as_it_is() -> None:
    demand = steady(1.0, 40.0)
    for at in range(40):
        demand.arrived("m", Slo(ttft_s=300.0, tpot_s=0.05), 40.0 + at)
    typical = demand.typical("m", 80.0)
    assert typical is not None
    assert typical.ttft_s == pytest.approx(300.0)
