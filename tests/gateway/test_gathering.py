"""On how many mixed nodes streams run: the arithmetic, and when it changes something."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import pytest
from msgspec import structs

from edge_llm.cluster.cost import NodeCost
from edge_llm.gateway.demand import Typical
from edge_llm.gateway.gathering import SUSTAINED_S, Candidate, Cluster, Gathering
from edge_llm.worker.messages import Rates
from tests.nodes import PACED

BY_MEMORY: Final = structs.replace(PACED, run_s=0.030, row_s=0.003, token_s=0.004)
BY_ARITHMETIC: Final = structs.replace(PACED, run_s=0.001, row_s=0.012, token_s=0.004)
# a step of one stream takes 33 ms
CHAT: Final = Typical(rate_per_s=1.0, prompt_tokens=250, answer_tokens=60, tpot_s=0.066, computed_tokens=250)
KV_BYTES: Final = 1000
GIGABIT: Final = 117e6


def nodes(
    count: int, rates: Rates = BY_MEMORY, slots: int = 8, kv_bytes_per_s: float = GIGABIT, chunk_tokens: int = 128
) -> list[Candidate]:
    return [Candidate(f"n{at}", NodeCost(rates, chunk_tokens, KV_BYTES), slots, kv_bytes_per_s) for at in range(count)]


def watched(
    gathering: Gathering, seen: list[Candidate], typical: Typical | None, seconds: int = 20, since_s: float = 0.0
) -> list[frozenset[str]]:
    """The homes after each change."""
    changes = []
    for second in range(seconds):
        if gathering.observe(seen, typical, since_s + second):
            changes.append(frozenset(gathering.homes))
    return changes


def capacity_per_s(seen: list[Candidate], homes: list[str], typical: Typical) -> float:
    return Cluster(seen, typical).capacity_per_s(homes)


def best_homes(seen: list[Candidate], typical: Typical, now: frozenset[str] = frozenset()) -> frozenset[str]:
    return Cluster(seen, typical).best_homes(now)


def gathered(*homes: str) -> Gathering:
    return Gathering(dict.fromkeys(homes, 4.0))


# -- how many are served


def test_a_home_for_all_streams_leaves_the_others_whole() -> None:
    """By hand: a prompt takes 1 s, tokens come 59.4 ms apart. At 1.27 requests/s a home has 4.5 streams, a step takes
    43.5 ms, 27 % of its time are left for prompts: with the other node's 1.27 of them a second. At 1.01 each of two
    homes has 1.8 streams, none for 17 % of the time, and 41 % of the rest is left: 0.5 prompts a second."""
    one, everywhere = (capacity_per_s(nodes(2), homes, CHAT) for homes in (["n0"], ["n0", "n1"]))
    assert one == pytest.approx(1.27, abs=0.01)
    assert everywhere == pytest.approx(1.01, abs=0.01)
    assert best_homes(nodes(2), CHAT) == {"n0"}


def test_a_large_cluster_gets_as_many_homes_as_its_streams_need() -> None:
    few, many = (len(best_homes(nodes(count), CHAT)) for count in (4, 40))
    assert 1 <= few < 4
    assert 8 * few <= many <= 12 * few


def test_a_slow_node_that_cannot_keep_the_pace_reads_prompts() -> None:
    slow = structs.replace(BY_MEMORY, run_s=0.09, row_s=0.009, token_s=0.012)
    pair = [*nodes(1, slow), replace(nodes(1)[0], worker="fast")]
    assert best_homes(pair, CHAT) == {"fast"}


def test_slots_bound_what_a_home_can_take() -> None:
    roomy, tight = (capacity_per_s(nodes(2, slots=slots), ["n0"], CHAT) for slots in (8, 2))
    assert tight < roomy


def test_what_others_read_has_to_be_carried() -> None:
    """A prompt's KV takes 250 kB: half a prompt a second comes over 125 kB/s."""
    fast, slow = (capacity_per_s(nodes(2, kv_bytes_per_s=rate), ["n0"], CHAT) for rate in (GIGABIT, 125e3))
    assert slow < fast - 0.2
    assert best_homes(nodes(2, kv_bytes_per_s=125e3), CHAT) == {"n0", "n1"}


def test_held_positions_are_read_by_steps_and_not_computed() -> None:
    deep = structs.replace(BY_MEMORY, cell_s=4e-6)
    held = replace(CHAT, prompt_tokens=2000)
    assert capacity_per_s(nodes(2, deep), ["n0"], held) < capacity_per_s(nodes(2, deep), ["n0"], CHAT)


@pytest.mark.parametrize("number", [0.0, 1e-300, 1e300, math.inf, math.nan])
@pytest.mark.parametrize("name", ["run_s", "row_s", "token_s"])
def test_a_worker_that_says_odd_things_of_itself_is_nobody_s_home(name: str, number: float) -> None:
    odd = structs.replace(BY_MEMORY, **{name: number})
    seen = [*nodes(1, odd), *(replace(one, worker=f"m{at}") for at, one in enumerate(nodes(2)))]
    gathering = Gathering()
    watched(gathering, seen, CHAT)
    assert all(math.isfinite(room) and room >= 1.0 for room in gathering.homes.values())
    assert number < 1.0 or gathering.homes.keys() <= {"m0", "m1"}


def test_workers_that_hear_of_no_limits_are_left_as_they_are() -> None:
    assert watched(Gathering(), nodes(2, structs.replace(BY_MEMORY, of_limit=0.0)), CHAT) == []


# -- when it changes something


def test_a_change_waits_until_it_has_been_due_for_a_while() -> None:
    gathering = Gathering()
    assert watched(gathering, nodes(2), CHAT, seconds=int(SUSTAINED_S)) == []
    assert gathering.observe(nodes(2), CHAT, SUSTAINED_S)
    assert gathering.homes == {"n0": pytest.approx(8.0, abs=2.0)}
    assert "gathered on 1" in gathering.why
    assert watched(gathering, nodes(2), CHAT) == [], "once"


@pytest.mark.parametrize(
    "typical",
    [
        None,
        replace(CHAT, rate_per_s=0.2),
        replace(CHAT, limited_share=0.5),
        replace(CHAT, tpot_s=0.02),
        replace(CHAT, tpot_s=1.0),
    ],
    ids=["unknown", "too few", "half of them without a limit", "kept by nobody", "kept beside anything"],
)
def test_requests_that_do_not_ask_for_it_change_nothing(typical: Typical | None) -> None:
    assert watched(Gathering(), nodes(2), typical) == []


def test_where_a_further_stream_costs_as_much_as_the_first_streams_stay_everywhere() -> None:
    typical = replace(CHAT, tpot_s=0.026)
    assert best_homes(nodes(2, BY_ARITHMETIC), typical) == {"n0", "n1"}
    assert watched(Gathering(), nodes(2, BY_ARITHMETIC), typical) == []


@pytest.mark.parametrize("field", ["rate_per_s", "limited_share"])
def test_between_the_marks_nothing_changes(field: str) -> None:
    between, below = {"rate_per_s": (0.3, 0.1), "limited_share": (0.5, 0.3)}[field]
    for gathering in (Gathering(), gathered("n0")):
        assert watched(gathering, nodes(2), replace(CHAT, **{field: between})) == []
    assert watched(gathered("n0"), nodes(2), replace(CHAT, **{field: below})) == [frozenset()]


def test_what_was_due_before_does_not_shorten_the_wait_for_something_else() -> None:
    gathering = gathered("n0")
    little = replace(CHAT, rate_per_s=0.1)
    assert watched(gathering, nodes(2), little, seconds=5) == []
    gathering.keep(["n1", "n2"])
    again = nodes(3)[1:]
    assert watched(gathering, again, CHAT, seconds=5, since_s=5.0) == []
    assert watched(gathering, again, CHAT, seconds=1, since_s=10.0) == [frozenset({"n1"})]


def test_a_home_that_is_gone_is_forgotten_at_once_and_the_others_stay() -> None:
    gathering = gathered("n0", "n1")
    assert not gathering.keep(["n0", "n1", "n2"])
    assert gathering.keep(["n1", "n2"])
    assert gathering.homes.keys() == {"n1"}
    assert gathering.keep(["n2"])
    assert not gathering.homes, "streams go everywhere"


def test_homes_are_not_moved_among_equals() -> None:
    assert best_homes(nodes(2), CHAT, now=frozenset({"n1"})) == {"n1"}
    assert watched(gathered("n1"), nodes(2), CHAT) == []


def test_what_a_slow_node_would_read_too_late_counts_for_nothing() -> None:
    """A prompt takes n0 1 s and n1 3 s: with 2 s to the first token n1 reads none, and is where streams are."""
    fast, slow = nodes(2)
    slow = replace(slow, cost=NodeCost(structs.replace(BY_MEMORY, token_s=0.012), 128, KV_BYTES))
    patient, hurried = replace(CHAT, ttft_s=60.0), replace(CHAT, ttft_s=2.0)
    late, timely = (Cluster([fast, slow], typical).capacity_per_s(["n0"]) for typical in (hurried, patient))
    alone = Cluster([fast], patient).capacity_per_s(["n0"])
    assert late == pytest.approx(alone, rel=0.01)
    assert timely > 1.2 * alone
    assert Cluster([fast, slow], hurried).best_homes(()) == {"n1"}


def test_among_equals_limits_of_the_first_token_change_nothing() -> None:
    for ttft_s in (0.5, 1.5, 60.0):
        assert capacity_per_s(nodes(2), ["n0"], replace(CHAT, ttft_s=ttft_s)) == capacity_per_s(nodes(2), ["n0"], CHAT)
