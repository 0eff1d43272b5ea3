"""On how many mixed nodes streams run: the arithmetic, and when it changes something."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import pytest
from msgspec import structs

from edge_llm.cluster.cost import NodeCost
from edge_llm.gateway.demand import Demand, Typical
from edge_llm.gateway.gathering import SUSTAINED_S, Candidate, Change, Gathering, best_homes, capacity_per_s
from edge_llm.worker.messages import Rates
from tests.nodes import PACED

BY_MEMORY: Final = structs.replace(PACED, run_s=0.030, row_s=0.003, token_s=0.004)
BY_ARITHMETIC: Final = structs.replace(PACED, run_s=0.001, row_s=0.012, token_s=0.004)
# a step of one stream takes 33 ms
CHAT: Final = Typical(rate_per_s=1.0, prompt_tokens=250, answer_tokens=60, tpot_s=0.066)


def nodes(count: int, rates: Rates = BY_MEMORY, slots: int = 8, streams: int = 0) -> list[Candidate]:
    return [Candidate(f"n{at}", NodeCost(rates, 128, 64), slots, streams) for at in range(count)]


def watched(gathering: Gathering, seen: list[Candidate], typical: Typical | None, seconds: int = 20) -> list[Change]:
    changes = [gathering.observe(seen, typical, float(now_s)) for now_s in range(seconds)]
    return [change for change in changes if change is not None]


def test_a_home_for_all_streams_leaves_the_others_whole() -> None:
    """By hand: a prompt takes 1 s, tokens come 59.4 ms apart. At 1.27 requests/s a home has 4.5 streams, a step takes
    43.5 ms, 27 % of its time are left for prompts: with the other node's 1.27 of them a second. At 1.01 each of two
    homes has 1.8 streams, none for 17 % of the time, and 41 % of the rest is left: 0.5 prompts a second."""
    one, everywhere = (capacity_per_s(nodes(2), homes, CHAT) for homes in (["n0"], ["n0", "n1"]))
    assert one == pytest.approx(1.27, abs=0.01)
    assert everywhere == pytest.approx(1.01, abs=0.01)
    assert best_homes(nodes(2), CHAT) == {"n0"}


def test_where_a_further_stream_costs_as_much_as_the_first_streams_stay_everywhere() -> None:
    typical = replace(CHAT, tpot_s=0.026)
    assert best_homes(nodes(2, BY_ARITHMETIC), typical) == {"n0", "n1"}
    assert watched(Gathering(), nodes(2, BY_ARITHMETIC), typical) == []


def test_a_large_cluster_gets_as_many_homes_as_its_streams_need() -> None:
    few, many = (len(best_homes(nodes(count), CHAT)) for count in (4, 40))
    assert 1 <= few < 4
    assert 8 * few <= many <= 12 * few


def test_what_no_node_can_keep_gathers_nobody() -> None:
    lost = replace(CHAT, tpot_s=0.02)
    assert capacity_per_s(nodes(2), ["n0"], lost) == 0.0
    assert watched(Gathering(), nodes(2), lost) == []


def test_a_slow_node_that_cannot_keep_the_pace_reads_prompts() -> None:
    slow = structs.replace(BY_MEMORY, run_s=0.09, row_s=0.009, token_s=0.012)
    pair = [Candidate("a-slow", NodeCost(slow, 128, 64), 8), Candidate("fast", NodeCost(BY_MEMORY, 128, 64), 8)]
    assert best_homes(pair, CHAT) == {"fast"}


def test_slots_bound_what_a_home_can_take() -> None:
    roomy, tight = (capacity_per_s(nodes(2, slots=slots), ["n0"], CHAT) for slots in (8, 2))
    assert tight < roomy


def test_a_change_waits_until_it_has_been_due_for_a_while() -> None:
    gathering = Gathering()
    assert watched(gathering, nodes(2), CHAT, seconds=int(SUSTAINED_S)) == []
    change = gathering.observe(nodes(2), CHAT, SUSTAINED_S)
    assert change is not None
    assert gathering.homes == change.homes == frozenset({"n0"})
    assert "1.00 come" in change.why
    assert watched(gathering, nodes(2), CHAT) == [], "once"


def test_few_requests_and_requests_without_a_pace_change_nothing() -> None:
    for typical in (None, replace(CHAT, rate_per_s=0.2), replace(CHAT, tpot_s=None)):
        assert watched(Gathering(), nodes(2), typical) == []


def test_streams_go_everywhere_again_when_little_comes() -> None:
    gathering = Gathering(frozenset({"n0"}))
    assert watched(gathering, nodes(2), replace(CHAT, rate_per_s=0.42)) == [], "between the marks nothing changes"
    (change,) = watched(gathering, nodes(2), replace(CHAT, rate_per_s=0.1))
    assert gathering.homes is None
    assert change.homes == {"n0", "n1"}


def test_when_a_home_is_gone_those_that_are_left_begin_anew_at_once() -> None:
    gathering = Gathering(frozenset({"n0"}))
    gathering.observe(nodes(3)[1:], CHAT, 0.0)
    assert gathering.homes is None
    watched(gathering, nodes(3)[1:], CHAT)
    assert gathering.homes == {"n1"}


def test_homes_stay_where_streams_are() -> None:
    seen = [*nodes(1), *(replace(node, worker="n1") for node in nodes(1, streams=3))]
    assert best_homes(seen, CHAT) == {"n1"}
    assert best_homes(seen, CHAT, now={"n0"}) == {"n0"}, "homes are not moved for it"


def test_demand_knows_how_often_requests_come_and_how_they_are() -> None:
    demand = Demand()
    assert demand.typical("m", 0.0) is None
    for at in range(60):
        demand.arrived("m", 0.05, float(at) / 2)
        demand.planned("m", 200, held_tokens=100)
        demand.answered("m", 30, is_cut=False)
    typical = demand.typical("m", 29.5)
    assert typical is not None
    assert typical.rate_per_s == pytest.approx(2.0)
    assert typical.prompt_tokens == 100.0
    assert typical.tpot_s == pytest.approx(0.05)
    assert 30 < typical.answer_tokens < 40
    assert demand.prompt_tokens("m") == 200.0
    later = demand.typical("m", 60.0)
    assert later is not None
    assert later.rate_per_s < typical.rate_per_s, "nobody has come since"
    assert demand.typical("another", 60.0) is None


def test_a_pace_that_few_ask_for_is_nobody_s() -> None:
    demand = Demand()
    for at in range(60):
        demand.arrived("m", 0.05 if at % 4 == 0 else None, float(at))
        demand.planned("m", 200, held_tokens=0)
    typical = demand.typical("m", 60.0)
    assert typical is not None
    assert typical.tpot_s is None


def test_a_capacity_is_finite_whatever_workers_say() -> None:
    odd = structs.replace(PACED, run_s=0.0, row_s=0.0, token_s=0.0)
    for rates in (odd, Rates(), structs.replace(PACED, run_s=1e6)):
        assert math.isfinite(capacity_per_s(nodes(3, rates), ["n0", "n1", "n2"], CHAT))
        best_homes(nodes(3, rates), CHAT)
