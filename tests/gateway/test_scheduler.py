"""Who serves a request, over views written down by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.cluster.view import ClusterView, Node
from edge_llm.errors import Overloaded, UnknownModel
from edge_llm.gateway.scheduler import MAX_CANDIDATES, Booked, Mode, Plan, Wish, decide
from edge_llm.worker.messages import Role
from tests.nodes import load_of, node_of

NOTHING: Final[Mapping[str, Booked]] = {}
CHUNK: Final = 8
MODES: Final[tuple[Mode, ...]] = ("auto", "split", "local")


def plan(nodes: Iterable[Node], booked: Mapping[str, Booked] = NOTHING, **wish: Any) -> Plan:
    """A decision for a prompt of several chunks unless `wish` says otherwise."""
    return decide(
        Wish(**{"model": "m", "prompt_tokens": 100, "max_tokens": 20, **wish}), ClusterView(tuple(nodes)), booked
    )


def names(made: Plan) -> tuple[str, list[str]]:
    return made.decode.worker, [node.worker for node in made.candidates]


P1, P2, P3 = (node_of(f"p{number}", "prefill") for number in (1, 2, 3))
D1, D2 = (node_of(f"d{number}", "decode") for number in (1, 2))
M1, M2 = (node_of(f"m{number}", "mixed") for number in (1, 2))


# -- modes


@pytest.mark.parametrize("mode", ["auto", "split"])
def test_a_long_prompt_is_split(mode: Mode) -> None:
    made = plan([P1, D1], mode=mode)
    assert names(made) == ("d1", ["p1"])
    assert (made.mode, made.note) == ("split", None)


def test_a_prompt_of_one_chunk_is_split_only_on_request() -> None:
    assert names(plan([P1, D1], prompt_tokens=CHUNK)) == ("d1", [])
    assert names(plan([P1, D1], prompt_tokens=CHUNK, mode="split")) == ("d1", ["p1"])
    assert names(plan([P1, D1], prompt_tokens=CHUNK + 1)) == ("d1", ["p1"])


def test_local_needs_nobody_else() -> None:
    made = plan([P1, D1], mode="local")
    assert names(made) == ("d1", [])
    assert (made.mode, made.note) == ("local", None)


@pytest.mark.parametrize("mode", MODES)
def test_one_token_has_no_kv_to_fetch(mode: Mode) -> None:
    made = plan([P1, D1], prompt_tokens=1, mode=mode)
    assert (made.mode, made.note) == ("local", None)


def test_split_without_a_prefill_worker_becomes_local_and_says_so() -> None:
    made = plan([D1, D2], mode="split")
    assert names(made) == ("d1", [])
    assert made.note == "not split: no other worker prefills this model"
    assert plan([D1, D2], mode="auto").note is None, "auto promised nothing"


def test_split_of_a_model_that_cannot_says_why() -> None:
    recurrent = node_of("d1", "decode", splits=False, split_reason="recurrent models have no KV rows")
    made = plan([P1, recurrent], mode="split")
    assert (made.candidates, made.note) == ((), "not split: recurrent models have no KV rows")


# -- who decodes


def test_a_prefill_worker_never_decodes() -> None:
    with pytest.raises(Overloaded, match=r"no worker that decodes m is ready.*p1 \(prefill\)"):
        plan([P1])


def test_the_decode_worker_with_the_larger_share_of_free_slots_is_chosen() -> None:
    busy = node_of("d1", "decode", load=load_of(sequences_running=2))
    assert plan([busy, D2], mode="local").decode.worker == "d2"
    assert plan([D1, D2], {"d1": Booked(sequences=1)}, mode="local").decode.worker == "d2"
    # 3 of 16 is less than 1 of 4
    large = node_of("d1", "decode", slots=16, load=load_of(sequences_running=3))
    assert plan([large, D2], {"d2": Booked(sequences=1)}, mode="local").decode.worker == "d1"


def test_what_is_booked_and_what_is_reported_are_the_same_sequences() -> None:
    """A status that already counts what this gateway sent must not count it twice."""
    half = node_of("d1", "decode", load=load_of(sequences_running=3))
    assert plan([half], {"d1": Booked(sequences=3)}, mode="local").decode.worker == "d1"


def test_prompts_that_wait_on_a_decode_worker_count_against_it() -> None:
    reading = node_of("d1", "decode", load=load_of(pending_prompt_tokens=1000, prefill_tokens_per_s=500.0))
    assert plan([reading, D2], mode="local").decode.worker == "d2"


def test_equal_workers_are_taken_by_name_so_that_a_view_has_one_plan() -> None:
    assert names(plan([D2, P2, D1, P1])) == names(plan([P1, D1, P2, D2])) == ("d1", ["p1", "p2"])


@pytest.mark.parametrize("mode", MODES)
def test_without_a_free_slot_there_is_no_plan_now(mode: Mode) -> None:
    full = node_of("d1", "decode", load=load_of(sequences_running=4))
    with pytest.raises(Overloaded, match="all slots of all decode workers are taken"):
        plan([P1, full], mode=mode)
    with pytest.raises(Overloaded, match="all slots"):
        plan([P1, D1], {"d1": Booked(sequences=4)}, mode=mode)
    assert plan([P1, full, D2], mode=mode).decode.worker == "d2"


def test_a_request_goes_where_its_prompt_and_answer_fit() -> None:
    large = node_of("d2", "decode", n_ctx=2048, load=load_of(sequences_running=3))
    assert plan([D1, large], prompt_tokens=400, max_tokens=112).decode.worker == "d1"
    assert plan([D1, large], prompt_tokens=400, max_tokens=113).decode.worker == "d2"
    with pytest.raises(Overloaded, match="context of 2049 tokens"):
        plan([D1, large], prompt_tokens=2000, max_tokens=49)


def test_a_worker_that_is_not_ready_takes_nothing() -> None:
    leaving = node_of("d1", "decode", is_ready=False, is_draining=True)
    assert plan([leaving, D2], mode="local").decode.worker == "d2"
    with pytest.raises(Overloaded, match="no worker that decodes m is ready"):
        plan([leaving])
    assert names(plan([node_of("p1", "prefill", is_ready=False), P2, D1])) == ("d1", ["p2"])


def test_a_model_that_nobody_serves_is_unknown_and_the_known_ones_are_named() -> None:
    with pytest.raises(UnknownModel, match=r"'other'; served are: m, n") as caught:
        plan([D1, node_of("d2", "decode", model="n")], model="other")
    assert (caught.value.status, caught.value.param) == (404, "model")
    with pytest.raises(UnknownModel, match="none yet"):
        plan([])


def test_workers_of_another_model_have_no_part_in_a_plan() -> None:
    other = {"model": "n", "model_sha256": "1" * 64}
    made = plan([node_of("d1", "decode", **other), node_of("p1", "prefill", **other), D2, P2])
    assert names(made) == ("d2", ["p2"])


def test_workers_that_failed_this_request_are_avoided_in_both_roles() -> None:
    assert names(plan([P1, P2, D1, D2], avoid=frozenset({"d1", "p1"}))) == ("d2", ["p2"])
    with pytest.raises(Overloaded, match="have failed and no other is left"):
        plan([P1, D1], avoid=frozenset({"d1"}))
    assert plan([P1, D1], avoid=frozenset({"p1"}), mode="split").note is not None


# -- who prefills


def test_kv_that_the_decode_worker_cannot_adopt_is_never_asked_for() -> None:
    foreign = node_of("p1", "prefill", compatibility="c" * 64)
    assert names(plan([foreign, P2, D1], mode="split")) == ("d1", ["p2"])
    made = plan([foreign, D1], mode="split")
    assert (made.mode, made.note) == ("local", "not split: no other worker prefills this model")


def test_prefill_workers_of_the_same_class_come_first_even_when_they_are_busier() -> None:
    foreign = node_of("p1", "prefill", exactness_class="c" * 64)
    busy = node_of("p2", "prefill", load=load_of(pending_prompt_tokens=5000))
    assert names(plan([foreign, busy, D1])) == ("d1", ["p2", "p1"])


def test_a_prefill_worker_that_decodes_too_comes_after_one_that_does_not() -> None:
    busy = node_of("p1", "prefill", load=load_of(pending_prompt_tokens=500))
    assert names(plan([D1, M1, busy], {"m1": Booked(sequences=2)})) == ("d1", ["p1", "m1"])


def test_the_shortest_wait_is_the_first_candidate_and_the_rate_counts() -> None:
    slow = node_of("p1", "prefill", load=load_of(pending_prompt_tokens=500, prefill_tokens_per_s=50.0))
    fast = node_of("p2", "prefill", load=load_of(pending_prompt_tokens=2000, prefill_tokens_per_s=400.0))
    assert names(plan([slow, fast, D1])) == ("d1", ["p2", "p1"])
    more = {"p2": Booked(prompts=1, prompt_tokens=3000)}
    assert names(plan([slow, fast, D1], more)) == ("d1", ["p1", "p2"])


def test_there_are_a_few_candidates_not_all() -> None:
    assert len(plan([P1, P2, P3, D1]).candidates) == MAX_CANDIDATES


def test_a_prefill_worker_whose_context_is_too_short_is_no_candidate() -> None:
    short = node_of("p1", "prefill", n_ctx=99)
    assert names(plan([short, D1], mode="split")) == ("d1", [])
    assert names(plan([node_of("p1", "prefill", n_ctx=100), D1], mode="split")) == ("d1", ["p1"])


def test_a_mixed_worker_serves_another_but_never_itself() -> None:
    assert names(plan([M1], mode="split")) == ("m1", [])
    assert names(plan([M1, M2])) == ("m1", ["m2"])


# -- the queue bound of prefill workers


def test_a_prefill_worker_gets_two_prompts_and_no_third() -> None:
    one, two = {"p1": Booked(prompts=1)}, {"p1": Booked(prompts=2)}
    assert names(plan([P1, D1], one, mode="split")) == ("d1", ["p1"])
    with pytest.raises(Overloaded, match="all prefill workers have a prompt waiting"):
        plan([P1, D1], two, mode="split")
    assert names(plan([P1, P2, D1], two, mode="split")) == ("d1", ["p2"])


def test_prompts_that_other_gateways_made_wait_count_too() -> None:
    full = node_of("p1", "prefill", load=load_of(sequences_waiting=2))
    with pytest.raises(Overloaded, match="prompt waiting"):
        plan([full, D1], mode="split")


def test_when_all_prefill_workers_have_a_queue_auto_computes_where_nobody_is_disturbed() -> None:
    full = {"p1": Booked(prompts=2)}
    assert names(plan([P1, D1], full)) == ("d1", [])
    with pytest.raises(Overloaded, match="prompt waiting"):
        plan([P1, D1], full | {"d1": Booked(sequences=1)})


@pytest.mark.parametrize("mode", MODES)
def test_a_full_prefill_worker_does_not_hold_up_what_needs_none(mode: Mode) -> None:
    full = {"p1": Booked(prompts=2), "d1": Booked(sequences=1)}
    assert names(plan([P1, D1], full, mode="local")) == ("d1", [])
    assert names(plan([P1, D1], full, mode=mode, prompt_tokens=1)) == ("d1", [])
    assert names(plan([P1, D1], full, mode="auto", prompt_tokens=CHUNK)) == ("d1", [])


# -- all plans

ROLES: st.SearchStrategy[Role] = st.sampled_from(get_args(Role))
LOADS = st.builds(load_of, sequences_running=st.integers(0, 5), sequences_waiting=st.integers(0, 3))
NODES = st.lists(
    st.tuples(ROLES, LOADS, st.booleans(), st.sampled_from([64, 512]), st.sampled_from("ab")), max_size=6
).map(
    lambda rows: [
        node_of(f"w{at}", role, load=load, is_ready=ready, n_ctx=n_ctx, compatibility=kv * 64)
        for at, (role, load, ready, n_ctx, kv) in enumerate(rows)
    ]
)


@given(NODES, st.sampled_from(MODES), st.integers(1, 600), st.sets(st.sampled_from(["w0", "w1", "w2"])))
def test_whatever_the_view_a_plan_can_be_carried_out(
    nodes: list[Node], mode: Mode, tokens: int, avoid: set[str]
) -> None:
    try:
        made = plan(nodes, mode=mode, prompt_tokens=tokens, avoid=frozenset(avoid))
    except (Overloaded, UnknownModel):
        return
    decode = made.decode
    assert decode.decodes
    assert decode.status.load.sequences_running < decode.status.slots
    assert tokens + 20 <= decode.status.n_ctx
    for node in (decode, *made.candidates):
        assert node.status.is_ready
        assert node.worker not in avoid
    for candidate in made.candidates:
        assert candidate.prefills
        assert candidate.worker != decode.worker
        assert candidate.status.compatibility == decode.status.compatibility
    assert len(made.candidates) <= (0 if mode == "local" else MAX_CANDIDATES)
