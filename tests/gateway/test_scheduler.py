"""Who serves a request, over views written down by hand."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any, Final, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.cluster.cost import PromptWork, Stream, Work
from edge_llm.cluster.slo import Slo, Verdict
from edge_llm.cluster.view import ClusterView, Node
from edge_llm.errors import Overloaded, UnknownModel
from edge_llm.gateway.policies import LeastBusy, Policy, Random, RoundRobin
from edge_llm.gateway.pools import Pool
from edge_llm.gateway.scheduler import MAX_CANDIDATES, SHORTLIST, Plan, decide
from edge_llm.gateway.situation import Mode, Situation, Wish
from edge_llm.worker.messages import Link, Rates, Role
from tests.nodes import load_of, node_of

MODES: Final[tuple[Mode, ...]] = ("auto", "split", "local")
# 10 ms a token; a step of one row takes 50 ms, each further one 10 ms
RATES = Rates(run_s=0.04, row_s=0.01, token_s=0.010, prompt_steps=1.5)
POOLS: Final[Mapping[Role, Pool]] = {"prefill": "prompt", "decode": "token", "mixed": "mixed"}


def node(worker: str, role: Role, rates: Rates = RATES, **changes: Any) -> Node:
    load = load_of(**{"rates": rates, **changes.pop("load", {})})
    return node_of(worker, role, **{"load": load, "n_ctx": 4096, **changes})


def spare(worker: str, role: Role, **changes: Any) -> Node:
    """A worker that can do the other role's work too."""
    return node(worker, role, **{"slots": 2 if role == "prefill" else 4, "serves_prompts": True, **changes})


def plan(
    nodes: Iterable[Node],
    works: Mapping[str, Work] | None = None,
    *,
    situation: Mapping[str, Any] | None = None,
    **wish: Any,
) -> Plan:
    """A decision for a prompt of 100 tokens unless `wish` says otherwise, nodes standing where their roles say."""
    return decide(
        Wish(**{"model": "m", "prompt_tokens": 100, "max_tokens": 20, **wish}),
        ClusterView(tuple(nodes)),
        Situation(**{"works": works or {}, "pool_of": lambda node: POOLS[node.status.role], **(situation or {})}),
    )


def names(made: Plan) -> tuple[str, list[str]]:
    return made.decode.worker, [candidate.worker for candidate in made.candidates]


def streams(count: int, left_each: float = 100.0) -> Work:
    return Work(sequences=count, decoding=count, tokens_left=count * left_each, cells=count * 100)


def reading(*tokens: int) -> Work:
    """Prompts of others that a prefill worker has."""
    return Work(prompts=tuple(PromptWork(count, is_served=True) for count in tokens))


P1, P2, P3 = (node(f"p{number}", "prefill") for number in (1, 2, 3))
D1, D2 = (node(f"d{number}", "decode") for number in (1, 2))
M1, M2 = (node(f"m{number}", "mixed") for number in (1, 2))
FULL = streams(4)


# -- split or local


def test_on_an_idle_cluster_a_prompt_stays_where_its_answer_is_made() -> None:
    made = plan([P1, D1])
    assert (names(made), made.reason) == (("d1", []), "sooner"), "the hand-off costs time and nobody is disturbed"


def test_a_second_node_that_is_hardly_faster_is_left_to_who_comes_next() -> None:
    def other(token_s: float) -> Node:
        return node("p1", "prefill", Rates(run_s=0.10, row_s=0.01, token_s=token_s))

    # m1 reads 100 tokens in 1 s and writes 20 in 1 s, with p1 it would be a twentieth sooner, or a quarter
    made = plan([M1, other(0.009)])
    assert (names(made), made.reason) == (("m1", []), "one_node")
    assert names(plan([M1, other(0.005)])) == ("m1", ["p1"]), "clearly sooner"
    assert names(plan([M1, other(0.009)], {"m1": streams(1)})) == ("m1", ["p1"]), "not idle"
    assert names(plan([M1, other(0.009)], mode="split")) == ("m1", ["p1"]), "as asked"


def test_a_node_that_could_do_all_of_a_request_reads_for_another_one_only_where_that_is_clearly_better() -> None:
    def other(role: Role) -> Node:
        return node("m2", role, Rates(run_s=0.10, row_s=0.01, token_s=0.008))

    # beside m1's stream, which ends soon, everybody together waits 2.32 s for m1 alone, 1.99 s for m2 and m1
    beside = {"m1": streams(1, left_each=1.0)}
    made = plan([M1, other("mixed")], beside)
    assert (names(made), made.reason) == (("m1", []), "one_node")
    assert names(plan([M1, other("prefill")], beside)) == ("m1", ["m2"]), "it can do nothing else"
    longer = {"m1": streams(1, left_each=3.0)}
    assert names(plan([M1, other("mixed")], longer)) == ("m1", ["m2"]), "2.57 s to 1.99 s"


def test_nobody_waits_for_a_mixed_reader_that_is_full() -> None:
    fast = Rates(run_s=9.0, row_s=0.01, token_s=0.0001)  # at reading
    work = {"m1": streams(3), "m2": reading(10, 10)}
    assert names(plan([M1, node("m2", "mixed", fast)], work)) == ("m1", [])
    with pytest.raises(Overloaded, match="will still be sooner"):
        plan([M1, node("m2", "prefill", fast)], work)


def test_beside_streams_a_prompt_goes_elsewhere() -> None:
    made = plan([P1, D1], {"d1": streams(3)})
    assert (names(made), made.mode, made.reason) == (("d1", ["p1"]), "split", "sooner")


def test_streams_that_would_lose_much_are_spared_though_the_request_itself_would_be_sooner_local() -> None:
    slow = node("p1", "prefill", Rates(token_s=0.020))
    made = plan([slow, D1], {"d1": streams(3)}, prompt_tokens=50)
    # local: 0.49 s of prompt, 5.44 turns with a step of 70 ms; split: 0.98 s
    assert (names(made), made.reason) == (("d1", ["p1"]), "less_harm")
    assert made.prediction is not None
    local = plan([slow, D1], {"d1": streams(3)}, prompt_tokens=50, mode="local").prediction
    assert local is not None
    assert local.completion_s < made.prediction.completion_s
    assert local.harm_s > made.prediction.harm_s


def test_streams_that_are_nearly_done_are_no_reason_to_split() -> None:
    assert names(plan([P1, D1], {"d1": streams(3, left_each=0.0)})) == ("d1", [])


def test_a_queue_at_the_prefill_worker_can_make_local_better() -> None:
    assert names(plan([P1, D1], {"d1": streams(1), "p1": reading(3000)}, max_tokens=5)) == ("d1", [])


def test_a_slow_link_can_make_local_better() -> None:
    link = Link(peer="p1", bytes_per_s=1e3, round_trip_s=0.001, samples=9)
    far = node("d1", "decode", load={"links": [link]})
    assert names(plan([P1, far], {"d1": streams(1)})) == ("d1", [])


@pytest.mark.parametrize("mode", MODES)
def test_one_token_has_no_kv_to_fetch(mode: Mode) -> None:
    made = plan([P1, D1], prompt_tokens=1, mode=mode)
    assert (made.mode, made.note) == ("local", None)


def test_who_asks_for_a_mode_gets_it() -> None:
    assert (names(plan([P1, D1], mode="split")), plan([P1, D1], mode="split").reason) == (("d1", ["p1"]), "asked")
    assert names(plan([P1, D1], {"d1": streams(3)}, mode="local")) == ("d1", [])


def test_split_without_a_prefill_worker_becomes_local_and_says_so() -> None:
    made = plan([D1, D2], mode="split")
    assert (names(made), made.reason) == (("d1", []), "not_possible")
    assert made.note == "not split: no other worker prefills this model"
    assert plan([D1, D2], mode="auto").note is None, "auto promised nothing"


def test_split_of_a_model_that_cannot_says_why() -> None:
    recurrent = node("d1", "decode", splits=False, split_reason="recurrent models have no KV rows")
    made = plan([P1, recurrent], mode="split")
    assert (made.candidates, made.note) == ((), "not split: recurrent models have no KV rows")


@pytest.mark.parametrize("policy", [None, LeastBusy()])
def test_split_waits_for_the_decode_workers_that_can_be_fed_rather_than_become_local(policy: Policy | None) -> None:
    foreign = node("d0", "decode", compatibility="c" * 64)
    situation = {"policy": policy}
    assert names(plan([P1, foreign, D1], {"d1": streams(3)}, mode="split", situation=situation)) == ("d1", ["p1"])
    with pytest.raises(Overloaded, match="that can take over a prompt are taken"):
        plan([P1, foreign, D1], {"d1": FULL}, mode="split", situation=situation)
    with pytest.raises(Overloaded, match="that can take over a prompt are taken"):
        plan([spare("p1", "prefill"), D1], {"d1": FULL}, mode="split", situation=situation)
    short = node("d1", "decode", n_ctx=119)
    made = plan([P1, foreign, short], {"d1": FULL}, mode="split", situation=situation)
    assert names(made) == ("d0", []), "d1 will never have the context"


def limited(count: int, tpot_s: float, left: float = 20.0) -> Work:
    """Streams with a limit. A step of one takes 50 ms, so 100 ms are twice its pace alone."""
    return Work(
        sequences=count,
        decoding=count,
        tokens_left=count * left,
        cells=count * 100,
        streams=(Stream(left, 100, tpot_s=tpot_s),) * count,
    )


STRICT_TPOT, STRICT_TTFT = Slo(ttft_s=10.0, tpot_s=0.100), Slo(ttft_s=1.5, tpot_s=0.400)


def test_strict_limits_of_pace_let_one_of_two_equal_nodes_read_and_the_other_write() -> None:
    """Unlimited it would read its own prompt, undisturbed; then the next prompt would disturb somebody anywhere."""
    works = {"m1": limited(1, 0.100)}
    assert names(plan([M1, M2], works, prompt_tokens=200)) == ("m2", [])
    made = plan([M1, M2], works, prompt_tokens=200, slo=STRICT_TPOT)
    assert (names(made), made.reason, made.verdict) == (("m1", ["m2"]), "limits", Verdict(0, 0))


def test_limits_of_pace_that_bear_a_prompt_leave_both_nodes_to_read() -> None:
    made = plan([M1, M2], {"m1": limited(1, 0.400)}, slo=STRICT_TTFT)
    assert (names(made), made.reason) == (("m2", []), "sooner")


def test_no_time_to_queue_sends_a_prompt_beside_streams_that_bear_it() -> None:
    works = {"d1": limited(3, 0.400, left=100.0), "p1": reading(100)}
    assert names(plan([P1, D1], works)) == ("d1", ["p1"]), "unlimited it waits for the prefill worker"
    made = plan([P1, D1], works, slo=Slo(ttft_s=2.0, tpot_s=0.400))
    assert (names(made), made.reason) == (("d1", []), "limits")


def test_a_prompt_waits_for_a_full_prefill_worker_while_that_keeps_more_limits() -> None:
    works = {"d1": limited(2, 0.100), "p1": reading(100, 100)}
    with pytest.raises(Overloaded, match="better for limits of latency"):
        plan([P1, D1], works, slo=STRICT_TPOT, waited_s=5.0)
    bearing = {**works, "d1": limited(2, 0.400)}
    made = plan([P1, D1], bearing, slo=STRICT_TPOT, waited_s=5.0)
    assert made.mode == "local", "nobody is late by it"


def test_a_request_without_limits_spares_those_who_have_them() -> None:
    """The prefill worker has 9 s of prompts: to everybody together, waiting for it costs more than one late stream."""
    bearing, strict = ({"d1": limited(1, tpot_s), "p1": reading(900)} for tpot_s in (0.400, 0.080))
    assert names(plan([P1, D1], bearing)) == ("d1", [])
    made = plan([P1, D1], strict)
    assert (names(made), made.reason) == (("d1", ["p1"]), "limits")


def test_limits_nobody_can_keep_change_nothing() -> None:
    works = {"d1": streams(3)}
    assert names(plan([P1, D1], works, slo=Slo(ttft_s=0.001, tpot_s=0.001))) == names(plan([P1, D1], works))


def test_who_asks_for_a_mode_gets_it_whatever_its_limits() -> None:
    works = {"d1": limited(1, 0.100)}
    assert names(plan([P1, D1], works, mode="local", slo=STRICT_TPOT)) == ("d1", [])
    assert names(plan([P1, D1], mode="split", slo=Slo(ttft_s=0.001))) == ("d1", ["p1"])


def test_a_plan_carries_its_prediction() -> None:
    made = plan([D1], answer_tokens=10)
    assert made.prediction is not None
    assert made.prediction.ttft_s == pytest.approx(0.99 + 0.05)
    assert made.prediction.completion_s == pytest.approx(0.99 + 10 * 0.05)
    assert (made.prediction.harm_s, made.reason) == (0.0, "only_choice")


# -- who decodes


def test_the_decode_worker_where_the_answer_is_complete_soonest_is_taken() -> None:
    assert plan([D1, D2], {"d1": streams(1)}, mode="local").decode.worker == "d2"
    slow = node("d2", "decode", Rates(run_s=0.4, row_s=0.01, token_s=0.010))
    assert plan([D1, slow], {"d1": streams(1)}, mode="local").decode.worker == "d1", "busier and still sooner"


def test_a_worker_that_holds_the_beginning_of_the_prompt_is_credited_for_it() -> None:
    assert names(plan([D1, D2], {"d2": streams(1)}, held={"d2": 96}, prompt_tokens=100)) == ("d2", [])
    assert names(plan([P1, P2, D1], {"d1": streams(3)}, held={"p2": 96})) == ("d1", ["p2", "p1"])
    assert names(plan([D1, D2], {"d2": streams(3)}, held={"d2": 8}, prompt_tokens=100)) == ("d1", []), "too little"


def test_equal_workers_are_taken_by_name_so_that_a_view_has_one_plan() -> None:
    assert names(plan([D2, P2, D1, P1], mode="split")) == ("d1", ["p1", "p2"])
    assert names(plan([P1, D1, P2, D2], mode="split")) == ("d1", ["p1", "p2"])


@pytest.mark.parametrize("mode", MODES)
def test_without_a_free_slot_there_is_no_plan_now(mode: Mode) -> None:
    with pytest.raises(Overloaded, match="all slots of all decode workers are taken"):
        plan([P1, D1], {"d1": FULL}, mode=mode)
    assert plan([P1, D1, D2], {"d1": FULL}, mode=mode).decode.worker == "d2"


def test_a_worker_that_nobody_has_counted_is_taken_at_its_word() -> None:
    full = node("d1", "decode", load={"sequences_running": 4})
    with pytest.raises(Overloaded, match="all slots"):
        plan([full])
    assert plan([full], {"d1": Work()}).decode.worker == "d1"


def test_cells_are_reserved_for_prompt_and_longest_answer() -> None:
    large = node("d2", "decode", n_ctx=8192)
    assert plan([D1, large], {"d2": streams(3)}, prompt_tokens=4000, max_tokens=96).decode.worker == "d1"
    assert plan([D1, large], {"d2": streams(3)}, prompt_tokens=4000, max_tokens=97).decode.worker == "d2"
    with pytest.raises(Overloaded, match="context of 8193 tokens"):
        plan([D1, large], prompt_tokens=8100, max_tokens=93)
    reserved = Work(sequences=3, reserved_cells=4 * 4096 - 100)
    assert plan([D1, D2], {"d1": reserved}).decode.worker == "d2"


def test_a_worker_that_is_not_ready_takes_nothing() -> None:
    leaving = node("d1", "decode", is_ready=False, is_draining=True)
    assert plan([leaving, D2]).decode.worker == "d2"
    with pytest.raises(Overloaded, match="no worker that decodes m is ready"):
        plan([leaving])
    assert names(plan([node("p1", "prefill", is_ready=False), P2, D1], mode="split")) == ("d1", ["p2"])


def test_a_model_that_nobody_serves_is_unknown_and_the_known_ones_are_named() -> None:
    with pytest.raises(UnknownModel, match=r"'other'; served are: m, n") as caught:
        plan([D1, node("d2", "decode", model="n")], model="other")
    assert (caught.value.status, caught.value.param) == (404, "model")
    with pytest.raises(UnknownModel, match="none yet"):
        plan([])


def test_workers_of_another_model_have_no_part_in_a_plan() -> None:
    other: dict[str, Any] = {"model": "n", "model_sha256": "1" * 64}
    made = plan([node("d1", "decode", **other), node("p1", "prefill", **other), D2, P2], mode="split")
    assert names(made) == ("d2", ["p2"])


def test_workers_that_failed_this_request_are_avoided_in_both_roles() -> None:
    assert names(plan([P1, P2, D1, D2], avoid=frozenset({"d1", "p1"}), mode="split")) == ("d2", ["p2"])
    with pytest.raises(Overloaded, match="have failed and no other is left"):
        plan([P1, D1], avoid=frozenset({"d1"}))


# -- who prefills


def test_kv_that_the_decode_worker_cannot_adopt_is_never_asked_for() -> None:
    foreign = node("p1", "prefill", compatibility="c" * 64)
    assert names(plan([foreign, P2, D1], mode="split")) == ("d1", ["p2"])
    assert plan([foreign, D1], mode="split").note == "not split: no other worker prefills this model"


def test_the_shortest_wait_is_the_first_candidate_and_the_rate_counts() -> None:
    slow, fast = node("p1", "prefill", Rates(token_s=0.02)), node("p2", "prefill", Rates(token_s=0.0025))
    works = {"p1": reading(500), "p2": reading(2000)}
    assert names(plan([slow, fast, D1], works, mode="split")) == ("d1", ["p2", "p1"])
    assert names(plan([slow, fast, D1], works | {"p2": reading(5000)}, mode="split")) == ("d1", ["p1", "p2"])


def test_there_are_a_few_candidates_not_all() -> None:
    assert len(plan([P1, P2, P3, D1], mode="split").candidates) == MAX_CANDIDATES


def test_a_prefill_worker_whose_context_is_too_short_is_no_candidate() -> None:
    short = node("p1", "prefill", n_ctx=99)
    assert names(plan([short, D1], mode="split")) == ("d1", [])
    assert names(plan([node("p1", "prefill", n_ctx=100), D1], mode="split")) == ("d1", ["p1"])


def test_a_mixed_worker_serves_another_but_never_itself() -> None:
    assert names(plan([M1], mode="split")) == ("m1", [])
    assert names(plan([M1, M2], mode="split")) == ("m1", ["m2"])


def test_in_a_large_cluster_the_best_are_still_found() -> None:
    many = [node(f"p{number:02}", "prefill") for number in range(3 * SHORTLIST)]
    works = {entry.worker: reading(1000) for entry in many} | {"p11": reading(10)}
    decoders = [node(f"d{number:02}", "decode") for number in range(3 * SHORTLIST)]
    works |= {entry.worker: streams(3) for entry in decoders} | {"d07": streams(1)}
    decode, candidates = names(plan([*many, *decoders], works, mode="split"))
    assert (decode, candidates[0]) == ("d07", "p11")


@pytest.mark.parametrize("mode", ["auto", "split"])
def test_nodes_that_do_not_fit_hide_none_that_does(mode: Mode) -> None:
    foreign: dict[str, Any] = {"compatibility": "c" * 64}
    readers = [node(f"p{number}", "prefill", **foreign) for number in range(SHORTLIST)]
    slow = node("p9", "prefill", Rates(token_s=0.011))
    assert names(plan([*readers, slow, D1], {"d1": streams(3)}, mode=mode)) == ("d1", ["p9"])
    decoders = [node(f"d{number}", "decode", **foreign) for number in range(SHORTLIST)]
    works = {entry.worker: streams(3) for entry in decoders} | {"d9": streams(4)}
    large = node("d9", "decode", slots=8)
    assert names(plan([P1, *decoders, large], works, mode=mode)) == ("d9", ["p1"])


def test_the_reason_for_local_is_the_right_one_in_a_large_cluster() -> None:
    foreign = [node(f"p{number}", "prefill", compatibility="c" * 64) for number in range(SHORTLIST)]
    slow = node("p9", "prefill", Rates(token_s=0.011), exactness_class="c" * 64)
    made = plan([*foreign, slow, D1], mode="split", situation={"cross_class": "never"})
    assert made.note == "not split: the other prefill workers are of another exactness class (setting cross_class)"
    assert plan([*foreign, slow, D1], mode="split").note is None


# -- classes


def test_another_class_is_worth_it_only_when_clearly_faster() -> None:
    foreign = node("p1", "prefill", Rates(token_s=0.0099), exactness_class="c" * 64)
    assert names(plan([foreign, P2, D1], mode="split")) == ("d1", ["p2", "p1"])
    fast = node("p1", "prefill", Rates(token_s=0.001), exactness_class="c" * 64)
    made = plan([fast, P2, D1], mode="split")
    assert (names(made), made.is_cross_class) == (("d1", ["p1", "p2"]), True)
    assert not plan([P2, D1], mode="split").is_cross_class


def test_never_means_never() -> None:
    foreign = node("p1", "prefill", Rates(token_s=0.001), exactness_class="c" * 64)
    never = {"cross_class": "never"}
    assert names(plan([foreign, P2, D1], mode="split", situation=never)) == ("d1", ["p2"])
    made = plan([foreign, D1], mode="split", situation=never)
    assert names(made) == ("d1", [])
    assert made.note == "not split: the other prefill workers are of another exactness class (setting cross_class)"


def test_an_answer_goes_on_in_its_class_if_it_can_and_only_there_if_it_must() -> None:
    foreign = node("d1", "decode", exactness_class="c" * 64)
    begun: dict[str, Any] = {"exactness_class": D2.status.exactness_class}
    assert plan([foreign, D2], {"d2": streams(3)}, **begun).decode.worker == "d2"
    assert plan([foreign, D2], {"d2": FULL}, **begun).decode.worker == "d1"
    with pytest.raises(Overloaded, match="all slots"):
        plan([foreign, D2], {"d2": FULL}, situation={"cross_class": "never"}, **begun)
    with pytest.raises(Overloaded, match="exactness class"):
        plan([foreign], situation={"cross_class": "never"}, **begun)


# -- full prefill workers, and waiting for them


def test_a_prefill_worker_gets_two_prompts_and_no_third() -> None:
    one, two = {"p1": reading(10)}, {"p1": reading(10, 10)}
    assert names(plan([P1, D1], one, mode="split")) == ("d1", ["p1"])
    with pytest.raises(Overloaded, match="all prefill workers have a prompt waiting"):
        plan([P1, D1], two, mode="split")
    assert names(plan([P1, P2, D1], two, mode="split"))[1][0] == "p2"


def test_a_request_waits_for_a_full_worker_that_will_still_be_sooner_but_not_for_ever() -> None:
    works = {"p1": reading(10, 10), "d1": streams(3, left_each=1000)}
    with pytest.raises(Overloaded, match="p1 has a prompt waiting and will still be sooner"):
        plan([P1, D1], works, prompt_tokens=1000)
    assert names(plan([P1, D1], works, prompt_tokens=1000, waited_s=60.0)) == ("d1", [])


def test_a_request_does_not_wait_behind_so_many_others_that_it_would_be_later() -> None:
    works = {"p1": reading(10, 10), "d1": streams(3, left_each=1000)}
    with pytest.raises(Overloaded, match="will still be sooner"):
        plan([P1, D1], works, situation={"ahead": 1}, prompt_tokens=1000)
    assert names(plan([P1, D1], works, situation={"ahead": 20}, prompt_tokens=1000)) == ("d1", [])


def test_a_request_does_not_wait_for_a_full_worker_when_its_time_would_be_over_then() -> None:
    works = {"p1": reading(10, 10), "d1": streams(3, left_each=1000)}
    now = plan([P1, D1], works, prompt_tokens=1000, waited_s=60.0)
    assert now.prediction is not None
    in_time_s = now.prediction.completion_s + 0.1
    ahead = {"ahead": 2}
    with pytest.raises(Overloaded, match="will still be sooner"):
        plan([P1, D1], works, situation=ahead, prompt_tokens=1000)
    assert names(plan([P1, D1], works, situation=ahead, prompt_tokens=1000, time_left_s=in_time_s)) == ("d1", [])
    with pytest.raises(Overloaded, match="will still be sooner"):
        plan([P1, D1], works, situation=ahead, prompt_tokens=1000, time_left_s=1.0)


def test_limits_are_waited_for_only_while_they_can_be_kept_behind_those_who_wait_already() -> None:
    """p1 could have its first token after 1.7 s, d1 would make its streams late by reading it."""
    limited = Work(
        sequences=3,
        decoding=3,
        tokens_left=300,
        cells=300,
        streams=tuple(Stream(left=100, cells=100, tokens=10, age_s=0.7, tpot_s=0.075) for _ in range(3)),
    )
    works: dict[str, Work] = {"p1": reading(10, 10), "d1": limited}
    wish: dict[str, Any] = {"prompt_tokens": 150, "slo": Slo(ttft_s=3.0)}
    with pytest.raises(Overloaded, match="better for limits of latency"):
        plan([P1, D1], works, **wish)
    assert names(plan([P1, D1], works, situation={"ahead": 5}, **wish)) == ("d1", [])


def test_nothing_is_planned_over_a_way_on_which_nothing_came_but_what_must_split() -> None:
    works, apart = {"d1": streams(3, left_each=1000)}, {"apart": {("p1", "d1")}}
    assert names(plan([P1, P2, D1], works, prompt_tokens=1000))[1] == ["p1", "p2"]
    assert names(plan([P1, P2, D1], works, situation=apart, prompt_tokens=1000)) == ("d1", ["p2"])
    assert names(plan([P1, D1], works, situation=apart, prompt_tokens=1000)) == ("d1", [])
    assert names(plan([P1, D1], works, situation=apart, mode="split")) == ("d1", ["p1"])


def test_a_policy_passes_over_nobody_for_a_request_that_has_to_wait() -> None:
    policy = RoundRobin()
    first = plan([P1, D1, D2], situation={"policy": policy}, mode="split")
    with pytest.raises(Overloaded):
        plan([P1, D1, D2], {"p1": reading(10, 10)}, situation={"policy": policy}, mode="split")
    second = plan([P1, D1, D2], situation={"policy": policy}, mode="split")
    assert (first.decode.worker, second.decode.worker) == ("d1", "d2")


def test_a_request_does_not_wait_for_a_full_worker_that_would_be_later() -> None:
    assert names(plan([P1, D1], {"p1": reading(2000, 2000)})) == ("d1", [])


def test_an_idle_node_does_not_make_a_request_wait_for_a_full_worker_that_is_hardly_sooner() -> None:
    # local: 1 s and 1 s; split: 0.14 s of others' prompts, 0.7 s, 1 s
    quick = node("p1", "prefill", Rates(token_s=0.007))
    assert names(plan([quick, D1], {"p1": reading(10, 10)})) == ("d1", [])
    with pytest.raises(Overloaded, match="will still be sooner"):
        plan([node("p1", "prefill", Rates(token_s=0.002)), D1], {"p1": reading(10, 10)})


# -- pools


def test_a_node_of_the_other_pool_helps_only_when_it_is_clearly_better() -> None:
    helper = spare("d2", "decode")
    nodes = [P1, helper, D1]
    only_d1 = {"d1": Work(), "d2": streams(4, left_each=0.0)}
    idle = plan(nodes, only_d1, mode="split")
    assert (names(idle), idle.spills) == (("d1", ["p1"]), ())
    busy = plan(nodes, only_d1 | {"p1": reading(900, 900)}, mode="split")
    assert names(busy)[1][0] == "d2"
    assert [(node.worker, pool) for node, pool in busy.spills] == [("d2", "prompt")]


def test_a_prefill_worker_decodes_when_no_decode_worker_can() -> None:
    helper = spare("p1", "prefill")
    made = plan([helper, D1], {"d1": FULL})
    assert (names(made), [(node.worker, pool) for node, pool in made.spills]) == (("p1", []), [("p1", "token")])
    assert plan([helper], mode="split").decode.worker == "p1", "all decode workers are gone"
    assert plan([helper, D1], {"d1": streams(3)}).decode.worker == "d1", "not while its pool has room"


def test_a_lent_node_is_no_helper() -> None:
    nodes = [spare("d2", "decode"), D1]
    at_home = plan(nodes, mode="split")
    lent = plan(nodes, mode="split", situation={"pool_of": lambda node: "prompt" if node.worker == "d2" else "token"})
    assert names(at_home) == names(lent) == ("d1", ["d2"])
    assert [(node.worker, pool) for node, pool in at_home.spills] == [("d2", "prompt")]
    assert lent.spills == ()


# -- policies for comparison


def test_round_robin_takes_each_in_turn() -> None:
    situation = {"policy": RoundRobin()}
    made = [names(plan([P1, P2, D1, D2], mode="split", situation=situation)) for _ in range(3)]
    assert [(decode, candidates[0]) for decode, candidates in made] == [("d1", "p1"), ("d2", "p2"), ("d1", "p1")]


def test_random_is_repeatable_by_its_seed_and_uses_everybody() -> None:
    def drawn(seed: int) -> list[str]:
        situation = {"policy": Random(random.Random(seed))}
        return [plan([D1, D2], mode="local", situation=situation).decode.worker for _ in range(20)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert set(drawn(1)) == {"d1", "d2"}


def test_least_busy_counts_and_knows_no_rates() -> None:
    situation = {"policy": LeastBusy()}
    slow = node("d2", "decode", Rates(run_s=9.0, token_s=9.0))
    assert plan([D1, slow], {"d1": streams(1)}, situation=situation, mode="local").decode.worker == "d2"


@pytest.mark.parametrize("policy", [RoundRobin(), Random(random.Random(0)), LeastBusy()])
def test_policies_split_what_is_longer_than_a_chunk_and_keep_to_what_is_possible(policy: Policy) -> None:
    situation = {"policy": policy}
    chunk = D1.status.chunk_tokens
    assert names(plan([P1, D1], prompt_tokens=chunk, situation=situation)) == ("d1", [])
    made = plan([P1, D1], prompt_tokens=chunk + 1, situation=situation)
    assert (names(made), made.reason) == (("d1", ["p1"]), "policy")
    with pytest.raises(Overloaded, match="prompt waiting"):
        plan([P1, D1], {"p1": reading(9, 9)}, situation=situation)
    assert plan([D1], mode="split", situation=situation).note is not None


# -- all plans

ROLES: st.SearchStrategy[Role] = st.sampled_from(get_args(Role))
WORKS = st.builds(
    Work,
    sequences=st.integers(0, 5),
    decoding=st.integers(0, 5),
    tokens_left=st.floats(0, 500),
    prompts=st.lists(st.builds(PromptWork, st.integers(1, 500), is_served=st.booleans()), max_size=3).map(tuple),
)
POLICIES = st.sampled_from([None, RoundRobin(), LeastBusy(), Random(random.Random(0))])
ROWS = st.lists(
    st.tuples(ROLES, WORKS, st.booleans(), st.sampled_from([64, 512]), st.sampled_from("ab"), st.booleans()), max_size=6
)


@given(
    ROWS, POLICIES, st.sampled_from(MODES), st.integers(1, 600), st.sets(st.sampled_from(["w0", "w1"])), st.booleans()
)
def test_whatever_the_view_a_plan_can_be_carried_out(
    rows: list[tuple[Role, Work, bool, int, str, bool]],
    policy: Policy | None,
    mode: Mode,
    tokens: int,
    avoid: set[str],
    never: bool,
) -> None:
    nodes = [
        node(f"w{at}", role, is_ready=ready, n_ctx=n_ctx, compatibility=kv * 64, exactness_class=kv * 64)
        if not helps
        else spare(f"w{at}", role, is_ready=ready, n_ctx=n_ctx, compatibility="a" * 64, exactness_class=kv * 64)
        for at, (role, _, ready, n_ctx, kv, helps) in enumerate(rows)
    ]
    works = {f"w{at}": work for at, (_, work, *_rest) in enumerate(rows)}
    situation = {"policy": policy, "cross_class": "never" if never else "when_faster"}
    try:
        made = plan(nodes, works, situation=situation, mode=mode, prompt_tokens=tokens, avoid=frozenset(avoid))
    except (Overloaded, UnknownModel):
        return
    decode = made.decode
    assert works[decode.worker].sequences < decode.status.slots
    assert tokens + 20 <= decode.status.n_ctx
    for chosen in (decode, *made.candidates):
        assert chosen.status.is_ready
        assert chosen.worker not in avoid
    for candidate in made.candidates:
        assert candidate.prefills
        assert candidate.worker != decode.worker
        assert candidate.status.compatibility == decode.status.compatibility
        assert not never or candidate.status.exactness_class == decode.status.exactness_class
    pairs = [
        (reader, decoder)
        for reader in nodes
        for decoder in nodes
        if reader is not decoder
        and reader.prefills
        and decoder.decodes
        and {reader.status.is_ready, decoder.status.is_ready} == {True}
        and not avoid & {reader.worker, decoder.worker}
        and reader.status.n_ctx >= tokens
        and decoder.status.n_ctx >= tokens + 20
        and reader.status.compatibility == decoder.status.compatibility
        and not (never and reader.status.exactness_class != decoder.status.exactness_class)
    ]
    if mode == "split" and tokens >= 2 and pairs:
        assert made.mode == "split", "who can have it waits for it"
    assert len({candidate.worker for candidate in made.candidates}) == len(made.candidates)
    assert len(made.candidates) <= (0 if mode == "local" else MAX_CANDIDATES)
    if made.candidates:
        assert works[made.candidates[0].worker].served < 2
