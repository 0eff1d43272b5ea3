"""Which nodes change sides, and when they go home: counts over time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.gateway.pools import EVENTS_KEPT, SUSTAINED_S, PoolEvent, Pools, Standing
from edge_llm.worker.messages import Role


def prefill(number: int, prompts: float, *, token_work: float = 0.0, slots: int = 2, model: str = "m") -> Standing:
    return Standing(f"p{number}", model, "prefill", prompts, 1.0, token_work, slots)


def decode(number: int, taken: float, *, prompts: float = 0.0, serves: bool = True, model: str = "m") -> Standing:
    return Standing(f"d{number}", model, "decode", prompts, float(serves), taken, 8)


def watched(pools: Pools, standings: Iterable[Standing], seconds: int, since_s: float = 0.0) -> list[PoolEvent]:
    """The same loads, looked at every second."""
    nodes = list(standings)
    return [event for at in range(seconds) for event in pools.observe(nodes, since_s + at)]


BUSY_PROMPTS = (prefill(1, 1.0), prefill(2, 1.0), decode(1, 0.0), decode(2, 1.0))
BUSY_TOKENS = (prefill(1, 0.0), prefill(2, 0.0), decode(1, 8.0), decode(2, 8.0))
CALM = (prefill(1, 0.2), prefill(2, 0.2), decode(1, 1.0), decode(2, 1.0))


def test_a_node_stands_where_its_role_says() -> None:
    pools = Pools()
    assert [pools.of("x", "m", role) for role in ("prefill", "decode", "mixed")] == ["prompt", "token", "mixed"]


def test_a_lasting_shortage_of_prompts_is_lent_the_idlest_decode_node() -> None:
    pools = Pools()
    (event,) = watched(pools, BUSY_PROMPTS, 60)
    assert (event.kind, event.worker, event.born, event.to) == ("repurpose", "d1", "token", "prompt")
    assert event.at_s == SUSTAINED_S
    assert (pools.of("d1", "m", "decode"), pools.of("d2", "m", "decode")) == ("prompt", "token")


def test_a_lasting_shortage_of_slots_is_lent_a_prefill_node() -> None:
    (event,) = watched(Pools(), BUSY_TOKENS, 60)
    assert (event.kind, event.worker, event.to) == ("repurpose", "p1", "token")


def test_a_short_burst_moves_nobody() -> None:
    pools = Pools()
    half_s = int(SUSTAINED_S / 2)
    for at in range(5):
        assert watched(pools, BUSY_PROMPTS, half_s, since_s=4 * half_s * at) == []
        assert watched(pools, CALM, 3 * half_s, since_s=4 * half_s * at + half_s) == []
    assert pools.lent == {}


def test_a_pool_that_has_no_room_itself_lends_nothing() -> None:
    nodes = (prefill(1, 1.0), prefill(2, 1.0), decode(1, 3.0), decode(2, 3.0))
    assert watched(Pools(), nodes, 100) == [], "the one left would be three quarters full"


def test_the_last_node_of_a_pool_stays() -> None:
    assert watched(Pools(), (prefill(1, 1.0), decode(1, 0.0)), 100) == []


def test_a_node_that_cannot_do_the_work_is_not_lent() -> None:
    nodes = (prefill(1, 1.0), decode(1, 0.0, serves=False), decode(2, 0.0, serves=False))
    assert watched(Pools(), nodes, 100) == []


def test_a_mixed_node_counts_on_both_sides_and_is_never_lent() -> None:
    mixed = Standing("m1", "m", "mixed", 0.0, 1.0, 0.0, 8)
    assert watched(Pools(), (prefill(1, 1.0), mixed, decode(1, 0.0)), 100) == [], "it has room for prompts"
    busy = Standing("m1", "m", "mixed", 1.0, 1.0, 0.0, 8)
    (event,) = watched(Pools(), (prefill(1, 1.0), busy, decode(1, 0.0), decode(2, 0.0)), 100)
    assert event.worker == "d1"


def lent() -> Pools:
    pools = Pools()
    watched(pools, BUSY_PROMPTS, 60)
    assert pools.lent == {"d1": "prompt"}
    return pools


def test_a_lent_node_goes_home_when_it_is_not_needed_any_more() -> None:
    pools = lent()
    (event,) = watched(pools, CALM, 120, since_s=60)
    assert (event.kind, event.worker, event.to, event.why) == (
        "return",
        "d1",
        "token",
        "the prompt pool can do without",
    )
    assert pools.of("d1", "m", "decode") == "token"


def test_a_lent_node_goes_home_when_its_own_pool_is_short() -> None:
    nodes = (prefill(1, 1.0), prefill(2, 1.0), decode(1, 0.0, prompts=1.0), decode(2, 8.0))
    (event,) = watched(lent(), nodes, 90, since_s=60)
    assert (event.kind, event.why) == ("return", "the token pool is short")


def test_between_the_marks_nothing_changes() -> None:
    steady = (prefill(1, 0.8), prefill(2, 0.8), decode(1, 0.0, prompts=0.8), decode(2, 4.0))
    assert watched(lent(), steady, 300, since_s=60) == []


def test_a_lent_node_that_is_gone_is_forgotten() -> None:
    pools = lent()
    watched(pools, [node for node in CALM if node.worker != "d1"], 1, since_s=60)
    assert pools.lent == {}


def test_events_are_told_in_order_and_only_so_many_are_kept() -> None:
    pools = lent()
    for at in range(EVENTS_KEPT):
        pools.spilled("d2", "m", "decode", "prompt", 100.0 + at)
    assert len(pools.events) == EVENTS_KEPT
    assert {event.kind for event in pools.events} == {"spill"}, "the oldest went first"
    assert (pools.events[0].born, pools.events[0].to) == ("token", "prompt")


SHARES = st.floats(0, 1)
ROLES: st.SearchStrategy[Role] = st.sampled_from(["prefill", "decode", "mixed"])


@given(
    st.lists(ROLES, min_size=1, max_size=6),
    st.lists(st.lists(st.tuples(SHARES, SHARES), min_size=6, max_size=6), min_size=1, max_size=8),
)
def test_whatever_comes_nobody_is_lent_who_would_leave_a_pool_empty(
    roles: list[Role], phases: list[list[tuple[float, float]]]
) -> None:
    pools, now_s = Pools(), 0.0
    for phase in phases:
        nodes = [
            Standing(f"w{at}", "m", role, prompts, 1.0, 8 * tokens, 8.0)
            for at, (role, (prompts, tokens)) in enumerate(zip(roles, phase, strict=False))
        ]
        for _ in range(40):
            now_s += 1.0
            assert len(pools.observe(nodes, now_s)) <= 1
            for role, pool in (("prefill", "prompt"), ("decode", "token")):
                born = [node for node in nodes if node.role == role]
                assert not born or any(node.worker not in pools.lent for node in born), f"the {pool} pool is empty"
    assert all(pools.lent[worker] in ("prompt", "token") for worker in pools.lent)


@pytest.mark.parametrize("seconds", [1.0, 0.1])
def test_how_often_one_looks_does_not_matter(seconds: float) -> None:
    pools = Pools()
    events = [event for at in range(int(40 / seconds)) for event in pools.observe(BUSY_PROMPTS, at * seconds)]
    assert [event.at_s for event in events] == [pytest.approx(SUSTAINED_S)]


@pytest.mark.parametrize("role", ["prefill", "mixed"])
def test_a_node_that_was_given_another_role_is_lent_no_longer(role: Role) -> None:
    pools = Pools()
    watched(pools, BUSY_PROMPTS, 60)
    assert pools.lent == {"d1": "prompt"}
    changed = [replace(node, role=role) if node.worker == "d1" else node for node in BUSY_PROMPTS]
    pools.observe(changed, 60.0)
    assert pools.lent == {}
    assert pools.of("d1", "m", role) == {"prefill": "prompt", "mixed": "mixed"}[role]


def of_model(model: str, nodes: Iterable[Standing]) -> list[Standing]:
    """The same nodes of another model, with names of their own."""
    return [replace(node, worker=f"{model}-{node.worker}", model=model) for node in nodes]


def test_a_model_is_helped_as_if_it_were_alone() -> None:
    alone = watched(Pools(), BUSY_PROMPTS, 60)
    for others in (CALM, BUSY_PROMPTS, BUSY_TOKENS):
        events = watched(Pools(), [*of_model("n", others), *BUSY_PROMPTS], 60)
        assert [event for event in events if event.model == "m"] == alone


def test_events_of_all_models_are_one_list_in_order() -> None:
    pools = Pools()
    made = watched(pools, [*BUSY_PROMPTS, *of_model("n", BUSY_TOKENS)], 60)
    spill = pools.spilled("d2", "m", "decode", "prompt", 60.0)
    assert list(pools.events) == [*made, spill]
    assert [(event.kind, event.model, event.worker) for event in pools.events] == [
        ("repurpose", "m", "d1"),
        ("repurpose", "n", "n-p1"),
        ("spill", "m", "d2"),
    ]


def test_what_was_seen_of_a_model_is_forgotten_when_nobody_serves_it_any_more() -> None:
    pools = lent()
    events = list(pools.events)
    pools.observe(of_model("n", CALM), 60.0)
    assert (pools.lent, pools.of("d1", "m", "decode")) == ({}, "token")
    assert list(pools.events) == events, "what happened stays told"
    (event,) = watched(pools, BUSY_PROMPTS, 60, since_s=61)
    assert event.at_s == 61 + SUSTAINED_S, "a model that comes back is a new one"


def test_a_gateway_that_saw_many_models_come_and_go_remembers_events_only() -> None:
    pools = Pools()
    for at in range(5):
        watched(pools, of_model(f"model-{at}", BUSY_PROMPTS), 60, since_s=60.0 * at)
    pools.observe([], 300.0)
    assert pools == Pools(events=pools.events)
    assert len(pools.events) == 5
