"""Who keeps its limits under a plan, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.cluster.cost import (
    NodeCost,
    Prediction,
    PromptWork,
    Request,
    Side,
    Stream,
    Work,
    predict_local,
    predict_split,
)
from edge_llm.cluster.slo import Judge, Past, Slo, Verdict, Watches, common_steps, own_tpot_s, paces_s
from edge_llm.worker.messages import Rates

# 10 ms a token of prompt; a step of one row takes 10 ms, each further one 10 ms; 15 ms of prompt between two steps
RATES = Rates(row_s=0.010, token_s=0.010, prompt_steps=1.5)
COST = NodeCost(RATES, chunk_tokens=100, kv_bytes_per_token=1)
REQUEST = Request(prompt_tokens=101, answer_tokens=20.0)
STRICT, LOOSE = Slo(ttft_s=10.0, tpot_s=0.021), Slo(ttft_s=1.5, tpot_s=0.080)


def side(*streams: Stream, prompts: tuple[PromptWork, ...] = ()) -> Side:
    running = [stream for stream in streams if not stream.begins_s]
    left = sum(stream.left for stream in running)
    return Side(COST, Work(len(streams), len(running), 0, left, 0, prompts, streams))


def stream(left: float = 40.0, tpot_s: float | None = 0.021, **more: Any) -> Stream:
    return Stream(left=left, tpot_s=tpot_s, **more)


def verdict(reader: Side, decode: Side, slo: Slo = STRICT, **more: Any) -> Verdict:
    """Of splitting, or of local when both are the same."""
    is_local = reader is decode
    sides = {"m1": decode} if is_local else {"m1": decode, "m2": reader}
    sides |= more.pop("others", {})
    made = predict_local(REQUEST, decode) if is_local else predict_split(REQUEST, reader, decode, None)
    judge = Judge(slo, REQUEST, sides, sides, 101, **more)
    return judge.verdict("m1" if is_local else "m2", "m1", made)


def test_a_request_names_limits_and_the_cluster_has_the_rest() -> None:
    assert Slo(tpot_s=0.1).or_else(Slo(2.0, 0.5)) == Slo(2.0, 0.1)
    assert Slo().or_else(Slo()) == Slo()
    assert (Slo().is_set, Slo(ttft_s=1.0).is_set) == (False, True)


def test_an_idle_node_keeps_all_limits_unless_the_request_waited_too_long() -> None:
    idle = side()
    assert verdict(idle, idle, Slo(ttft_s=1.1, tpot_s=0.011)).broken == 0
    assert verdict(idle, idle, Slo(ttft_s=1.1, tpot_s=0.011), past=Past(0.2)).broken == 1
    assert verdict(idle, idle, Slo(ttft_s=1.0)).broken == 1, "1 s of prompt and a step"
    assert verdict(idle, idle, Slo(tpot_s=0.009)).broken == 1, "a step takes 10 ms"


def test_an_answer_that_goes_on_elsewhere_keeps_the_time_of_its_first_token() -> None:
    """1 s of prompt and a step, then 20 steps of 10 ms; its client has had 20 tokens and counts on."""
    idle, limits = side(), Slo(tpot_s=0.050)
    assert verdict(idle, idle, limits, past=Past(9.0, 20, 0.7)).broken == 0, "1.91 s of 2 s"
    assert verdict(idle, idle, limits, past=Past(9.0, 20, 0.9)).broken == 1, "2.11 s"


def test_a_request_that_misses_both_of_its_limits_is_one_request() -> None:
    idle = side()
    assert verdict(idle, idle, Slo(ttft_s=0.5, tpot_s=0.005)).broken == 1


def test_a_prompt_beside_a_stream_makes_it_late_where_its_limit_is_strict() -> None:
    """1 s of prompt in pieces of 15 ms: all 40 steps become 25 ms, of 21 allowed and 80."""
    busy = side(stream())
    assert verdict(busy, busy).broken == 1
    bearing = side(stream(tpot_s=0.080))
    assert verdict(bearing, bearing, Slo(ttft_s=5.0, tpot_s=0.080)).broken == 0
    assert verdict(side(), busy).broken == 0, "read elsewhere it is one more row for 20 of 40 steps at most"


def test_what_a_stream_has_saved_so_far_it_can_lose() -> None:
    """200 tokens came in 2 s, of 4.2 s allowed; 40 steps with a piece of prompt each take 0.6 s more than without."""
    saved = side(stream(tokens=200, age_s=2.0))
    assert verdict(saved, saved).broken == 0


def test_who_is_late_already_cannot_be_made_late() -> None:
    late = side(stream(tokens=100, age_s=9.0))
    assert verdict(late, late).broken == 0


def test_streams_without_limits_count_as_rows_only() -> None:
    free = side(stream(tpot_s=None), stream(tpot_s=None))
    assert verdict(free, free, Slo(ttft_s=5.0)).broken == 0
    assert own_tpot_s(REQUEST, free, 0.0, 0.0) == pytest.approx(0.030)


def test_a_stream_that_will_begin_while_the_prompt_is_read_is_made_late_too() -> None:
    soon, later = side(stream(begins_s=0.5)), side(stream(begins_s=1.0))
    assert verdict(soon, soon).broken == 1
    assert verdict(later, later).broken == 0, "the prompt has been read by then"


def test_a_stream_does_not_lose_by_its_own_prompt_and_does_by_those_behind_it() -> None:
    """It is expected a little before its own prompt will have been read: predictions are never exact."""
    own, other = PromptWork(100), PromptWork(100)
    alone = side(stream(begins_s=0.9, ahead=1), prompts=(own,))
    assert verdict(side(), alone).broken == 0
    assert verdict(alone, alone).broken == 1
    doomed = side(stream(begins_s=0.9, ahead=1), prompts=(own, other))
    assert verdict(doomed, doomed, Slo()).broken == 0, "it is late already by the prompt behind it"


def test_the_pace_counts_others_as_long_as_both_decode() -> None:
    assert own_tpot_s(REQUEST, side(stream(left=10.0)), 0.0, 0.0) == pytest.approx(0.015)
    assert own_tpot_s(REQUEST, side(stream(left=10.0)), 5.0, 0.0) == pytest.approx(0.010), "it is over by then"
    unknown = Side(COST, Work(sequences=1, decoding=1, tokens_left=10.0))
    assert own_tpot_s(REQUEST, unknown, 5.0, 0.0) == pytest.approx(0.020), "of another gateway's it is not known when"
    assert own_tpot_s(REQUEST, side(), 0.0, 0.15) == pytest.approx(0.010 + 0.15 / 20), "prompts read beside it"


def test_sequences_have_the_steps_in_common_in_which_both_are() -> None:
    assert common_steps(0.0, 20, 0.1, 5, 0.01) == pytest.approx(5)
    assert common_steps(0.0, 20, 0.1, 50, 0.01) == pytest.approx(10)
    assert common_steps(0.0, 20, 0.3, 50, 0.01) == 0.0


def test_a_prompt_that_waits_is_late_when_a_stream_takes_its_time() -> None:
    """1 s of prompt that has 1.1 s; beside an answer from 0.1 s on, 20 steps of 10 ms come between its pieces."""
    waiting = side(prompts=(PromptWork(100, due_s=1.1),))
    judge = Judge(Slo(ttft_s=10.0, tpot_s=1.0), REQUEST, {"m1": waiting, "m2": side()}, {"m1", "m2"}, 101)
    assert judge.verdict("m2", "m1", Prediction(0.1, 0.3, 0.0)).broken == 1
    assert judge.verdict("m2", "m1", Prediction(2.0, 2.2, 0.0)).broken == 0, "it has been read by then"


def test_a_node_without_streams_is_kept_for_the_next_prompt_while_streams_cannot_bear_one() -> None:
    busy, idle = side(stream()), side()
    apart = Judge(STRICT, REQUEST, {"m1": busy, "m2": idle}, {"m1", "m2"}, 101)
    together = apart.verdict("m2", "m1", predict_split(REQUEST, idle, busy, None))
    spread = apart.verdict("m2", "m2", predict_local(REQUEST, idle))
    assert (together.broken, spread.broken) == (0, 0)
    assert (together.exposed, spread.exposed) == (0, 1)


def test_nothing_is_exposed_where_streams_can_bear_a_prompt() -> None:
    bearing, idle = side(stream(tpot_s=0.080)), side()
    judge = Judge(LOOSE, REQUEST, {"m1": bearing, "m2": idle}, {"m1", "m2"}, 101)
    assert judge.verdict("m2", "m2", predict_local(REQUEST, idle)) == Verdict(0, 0)


def test_a_quiet_node_that_cannot_read_the_next_prompt_in_time_is_no_refuge() -> None:
    busy, full = side(stream()), side(prompts=(PromptWork(900),))
    judge = Judge(STRICT, REQUEST, {"m1": busy, "m2": full}, {"m1", "m2"}, 101)
    made = predict_split(REQUEST, full, busy, None)
    assert judge.verdict("m2", "m1", made).exposed == 2, "11 s until the next one is read there, of 10: it goes to m1"


def test_streams_of_another_gateway_slow_those_that_are_watched() -> None:
    """40 steps of 10 ms have 0.84 s, and no time for 0.42 s of prompt when another gateway's row is in them."""
    reads = Request(prompt_tokens=43, answer_tokens=20.0)
    alone = side(stream())
    shared = replace(alone, work=replace(alone.work, sequences=2, decoding=2))
    broken = []
    for busy in (alone, shared):
        judge = Judge(Slo(), reads, {"m1": busy, "m2": side()}, {"m1"}, 101)
        broken.append(judge.verdict("m1", "m2", Prediction(0.5, 1.0, 0.0)).broken)
    assert broken == [0, 1]
    late = replace(shared, work=replace(shared.work, sequences=3, decoding=3))
    judge = Judge(Slo(), reads, {"m1": late, "m2": side()}, {"m1"}, 101)
    assert judge.verdict("m1", "m2", Prediction(0.5, 1.0, 0.0)).broken == 0, "two of them make it late by themselves"


# -- many streams


@dataclass(frozen=True, slots=True)
class CountingCost(NodeCost):
    """Counts how often anybody asks what a row costs."""

    asked: list[float] = field(default_factory=list)

    def row_s(self, cells: float) -> float:
        self.asked.append(cells)
        return NodeCost.row_s(self, cells)


def crowded(streams: int) -> tuple[Side, list[float]]:
    cost = CountingCost(RATES, chunk_tokens=100, kv_bytes_per_token=1)
    return replace(side(*(stream(left=10.0 + at) for at in range(streams))), cost=cost), cost.asked


def test_twice_the_streams_are_twice_the_work() -> None:
    """A decision is made while all other requests wait."""
    asked = []
    for count in (50, 100):
        busy, rows = crowded(count)
        Judge(STRICT, REQUEST, {"m1": busy}, {"m1"}, 101)
        asked.append(len(rows))
    assert asked[1] <= 2 * asked[0]


def test_streams_are_looked_at_once_for_all_requests_that_are_judged_by_the_same_work() -> None:
    (busy, rows), watches = crowded(50), Watches()
    judges = [Judge(LOOSE, REQUEST, {"m1": busy}, {"m1"}, 101, watches=watches)]
    rows.clear()
    judges += [Judge(LOOSE, REQUEST, {"m1": busy}, {"m1"}, 101, watches=watches)]
    assert rows == []
    first, second = (judge.verdict("m1", "m1", predict_local(REQUEST, busy)) for judge in judges)
    assert first == second
    rows.clear()
    Judge(LOOSE, REQUEST, {"m1": replace(busy, work=replace(busy.work))}, {"m1"}, 101, watches=watches)
    assert len(rows) == 50, "other work may have other streams"


@given(st.lists(st.tuples(st.floats(1, 200), st.integers(0, 4000), st.floats(0, 3)), max_size=12))
def test_a_stream_has_the_rows_of_others_for_the_steps_in_which_both_are(drawn: list[tuple[float, int, float]]) -> None:
    cost = NodeCost(Rates(run_s=0.02, row_s=0.003, cell_s=1e-6), chunk_tokens=100, kv_bytes_per_token=1)
    streams = tuple(Stream(left, cells, begins_s) for left, cells, begins_s in drawn)
    depth = sum(one.cells for one in streams) / max(1, len(streams))
    for at, pace_s in enumerate(paces_s(cost, Work(streams=streams))):
        own = streams[at]
        expected_s = cost.step_s(1, own.cells)
        for other in (*streams[:at], *streams[at + 1 :]):
            steps = common_steps(own.begins_s, own.left, other.begins_s, other.left, cost.step_s(1, depth))
            expected_s += steps * cost.row_s(other.cells) / own.left
        assert pace_s == pytest.approx(expected_s)
