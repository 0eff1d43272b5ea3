"""Predictions, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from edge_llm.cluster.cost import (
    Limits,
    NodeCost,
    Piece,
    PromptWork,
    Request,
    Side,
    Stream,
    Work,
    beside,
    handoff_tail_s,
    predict_local,
    predict_split,
    read_in_turn,
    work_of,
)
from edge_llm.engine.pacing import Pace, room_s, whole_rows
from edge_llm.worker.messages import Link, Rates
from tests.nodes import PACED, load_of, node_of

# 2 ms a token and 10 ms a call in chunks of 100; a step of one row takes 20 ms, each further one 5 ms
RATES = Rates(run_s=0.015, row_s=0.005, call_s=0.010, token_s=0.002, prompt_steps=1.5)
KV = 1000


def cost_of(rates: Rates = RATES, **changes: Any) -> NodeCost:
    return NodeCost(**{"rates": rates, "chunk_tokens": 100, "kv_bytes_per_token": KV, **changes})


def idle(held: int = 0) -> Side:
    return Side(cost_of(), Work(), held)


def streaming(streams: int, left_each: float, **more: Any) -> Side:
    return Side(
        cost_of(), Work(**{"sequences": streams, "decoding": streams, "tokens_left": streams * left_each, **more})
    )


# -- one node


def test_a_prompt_costs_a_call_for_every_border_it_crosses_and_every_token() -> None:
    assert cost_of().prefill_s(250) == pytest.approx(3 * 0.010 + 250 * 0.002)
    assert cost_of().prefill_s(100, start=50) == pytest.approx(2 * 0.010 + 100 * 0.002)
    assert cost_of().prefill_s(0) == 0.0


def test_what_lies_deeper_in_a_prompt_costs_more() -> None:
    deep = cost_of(Rates(pair_s=1e-6))
    assert deep.prefill_s(100) == pytest.approx(1e-6 * 100 * 50)
    assert deep.prefill_s(100, start=1000) == pytest.approx(1e-6 * 100 * 1050)
    assert deep.prefill_s(200) == pytest.approx(deep.prefill_s(100) + deep.prefill_s(100, start=100))


def test_a_step_costs_its_rows_and_the_cells_they_read() -> None:
    cost = cost_of(Rates(run_s=0.01, row_s=0.002, cell_s=1e-6))
    assert cost.step_s(4, 8000) == pytest.approx(0.01 + 4 * 0.002 + 0.008)
    assert cost.step_s(0, 0) == 0.0
    assert cost.row_s(1000) == pytest.approx(0.003)


def test_work_that_waits_is_the_sum_of_its_prompts() -> None:
    work = Work(prompts=(PromptWork(100), PromptWork(50, start=100)))
    assert cost_of().queued_s(work) == pytest.approx(0.210 + 0.110)


def test_prompt_work_between_steps_is_bounded_by_steps_by_a_chunk_and_by_one_token() -> None:
    assert cost_of().piece(step_s=0.020).takes_s == pytest.approx(0.030)
    assert cost_of().piece(step_s=9.0).takes_s == pytest.approx(0.210), "never more than a chunk"
    assert cost_of().piece(step_s=0.0).takes_s == pytest.approx(0.002), "never less than a token"
    fixed = cost_of(Rates(run_s=0.02, token_s=0.002, prompt_steps=0.0, of_limit=0.9))
    assert fixed.piece(step_s=0.020).takes_s == pytest.approx(0.200), "level same-plan computes whole chunks"
    assert fixed.piece(0.020, Limits((0.030,))).takes_s == pytest.approx(0.200), "whatever limits there are"


def test_beside_a_stream_with_a_limit_a_piece_leaves_room_for_its_next_token() -> None:
    room = cost_of(structs.replace(RATES, of_limit=0.9, least_prompt_steps=0.5))
    assert room.piece(0.020, Limits((0.040,))).takes_s == pytest.approx(0.016), "36 ms of the limit, less the step"
    assert room.piece(0.020, Limits((0.9,))).takes_s == pytest.approx(0.030), "an older worker never makes more of it"
    assert room.piece(0.020, Limits((0.025,))).takes_s == pytest.approx(0.010), "prompts go on where a limit is lost"
    assert cost_of().piece(0.020, Limits((0.025,))).takes_s == pytest.approx(0.030), "a worker that hears of no limits"


def test_where_every_stream_has_a_limit_and_can_bear_it_a_piece_is_longer_than_without() -> None:
    wide = cost_of(structs.replace(RATES, of_limit=0.9, least_prompt_steps=0.5, most_prompt_steps=8.0))
    assert wide.piece(0.020, Limits((0.100,))).takes_s == pytest.approx(0.070), "90 ms of the limit, less the step"
    assert wide.piece(0.020, Limits((0.9,))).takes_s == pytest.approx(0.160), "eight steps at most"
    assert wide.piece(0.020, Limits((0.100,), is_each=False)).takes_s == pytest.approx(0.030), "somebody said nothing"
    assert wide.piece(0.020).takes_s == pytest.approx(0.030), "nobody said anything"


def test_a_short_piece_reads_less_in_its_time_because_each_is_a_call() -> None:
    calls = cost_of(structs.replace(RATES, of_limit=0.9, least_prompt_steps=0.5))
    assert tuple(calls.piece(9.0)) == pytest.approx((0.210, 0.210)), "a chunk is what it is compared with"
    takes_s, reads_s = calls.piece(0.020, Limits((0.025,)))
    assert (takes_s, reads_s) == pytest.approx((0.010, 0.010 * (0.002 / 0.012) / (0.200 / 0.210)), rel=1e-6)
    saved = cost_of(structs.replace(RATES, of_limit=0.9, least_prompt_steps=0.5, least_piece_steps=1.0))
    assert saved.piece(0.020, Limits((0.025,))).takes_s == pytest.approx(takes_s)
    assert saved.piece(0.020, Limits((0.025,))).reads_s > 2 * reads_s, "two steps' worth of it at a time"


@pytest.mark.parametrize("is_each", [True, False])
@pytest.mark.parametrize("tpot_s", [None, 0.004, 0.025, 0.030, 0.053, 0.060, 1.0])
@pytest.mark.parametrize("step_s", [0.005, 0.018, 0.040])
def test_what_is_predicted_between_two_steps_is_what_an_engine_computes_there_on_average(
    tpot_s: float | None, step_s: float, is_each: bool
) -> None:
    """The gateway must not import the engine, so the rule is written twice; its numbers come from the worker."""
    rates = structs.replace(PACED, run_s=0.015, token_s=0.0001)
    spent_s, skipped, age_s, steps = 0.0, 0, 0.0, 400
    for made in range(1, steps + 1):
        paces = [Pace(tpot_s, made, age_s, steps)] if is_each else [Pace(tpot_s, made, age_s, steps), Pace()]
        room = room_s(step_s, paces, skipped)
        skipped = 0 if room else skipped + 1
        piece_s = whole_rows(room / 0.0001) * 0.0001 if room else 0.0
        spent_s, age_s = spent_s + piece_s, age_s + piece_s + step_s
    predicted = NodeCost(rates, chunk_tokens=10_000, kv_bytes_per_token=1).piece(
        step_s, Limits(() if tpot_s is None else (tpot_s,), is_each)
    )
    assert spent_s / steps == pytest.approx(predicted.takes_s, rel=0.1)


def test_the_limit_that_counts_on_a_node_is_the_strictest_of_its_streams() -> None:
    assert Work().limits == Limits()
    some = Work(streams=(Stream(5.0), Stream(5.0, tpot_s=0.2), Stream(5.0, tpot_s=0.1)))
    assert some.limits == Limits((0.1, 0.2), is_each=False)
    known = Work(decoding=2, streams=(Stream(5.0, tpot_s=0.2), Stream(5.0, tpot_s=0.1)))
    assert known.limits == Limits((0.1, 0.2))
    assert replace(known, decoding=3).limits == Limits((0.1, 0.2), False), "nobody knows what another gateway's bear"
    assert known.limits.beside(None) == Limits((0.1, 0.2), is_each=False)
    assert known.limits.beside(0.05) == Limits((0.05, 0.1, 0.2))
    assert [known.limits.to_keep_s(step_s) for step_s in (0.05, 0.15, 0.3)] == [0.1, 0.2, None]
    lost = replace(known, streams=(Stream(5.0, tpot_s=0.2), Stream(5.0, tpot_s=0.1, tokens=5, age_s=1.1)))
    assert lost.limits == Limits((0.2,)), "whatever comes, it is late"


def test_a_worker_without_measurements_is_taken_by_its_running_means_or_for_an_average_one() -> None:
    said = NodeCost.of(node_of("d1", "decode", load=load_of(prefill_tokens_per_s=500.0, decode_step_s=0.01)).status)
    assert (said.prefill_s(100), said.step_s(3, 1000)) == pytest.approx((0.2, 0.01))
    silent = NodeCost.of(node_of("d1", "decode").status)
    assert silent.prefill_s(100) > 0.0
    assert silent.step_s(1, 0) > 0.0
    measured = NodeCost.of(node_of("d1", "decode", load=load_of(rates=RATES)).status)
    assert measured.rates == RATES


def test_what_a_node_says_of_its_load_is_work() -> None:
    load = load_of(sequences_running=2, sequences_waiting=1, pending_prompt_tokens=300)
    work = work_of(node_of("p1", "mixed", load=load).status)
    assert (work.sequences, work.decoding, work.served, work.pending_tokens) == (2, 2, 2, 300)
    assert work_of(node_of("d1", "decode", load=load).status).served == 0, "its own prompts"
    assert work_of(node_of("d1", "decode").status) == Work()


# -- side by side


def test_prompt_and_stream_take_turns_until_one_of_them_is_done() -> None:
    # 3 s of prompt in pieces of 30 ms: 100 turns with a step of 20 ms each
    longer = beside(prompt_s=3.0, piece=Piece(0.030, 0.030), step_s=0.020, tokens=1000)
    assert (longer.prompt_loses_s, longer.stream_loses_s) == pytest.approx((2.0, 3.0))
    shorter = beside(prompt_s=3.0, piece=Piece(0.030, 0.030), step_s=0.020, tokens=10)
    assert (shorter.prompt_loses_s, shorter.stream_loses_s) == pytest.approx((0.2, 0.3))
    assert beside(3.0, Piece(0.03, 0.03), 0.02, tokens=0).prompt_loses_s == 0.0


def test_of_a_handoff_only_the_last_piece_remains_unless_the_way_is_slower_than_the_computing() -> None:
    link = Link(peer="p1", bytes_per_s=100e6, round_trip_s=0.002, samples=5)
    assert handoff_tail_s(link, total_bytes=50e6, last_bytes=1e6, compute_s=10.0) == pytest.approx(0.012)
    assert handoff_tail_s(link, total_bytes=50e6, last_bytes=1e6, compute_s=0.1) == pytest.approx(0.402)
    assert handoff_tail_s(None, total_bytes=0, last_bytes=117e6, compute_s=9.0) == pytest.approx(1.001)


# -- whole requests


def test_a_local_request_on_an_idle_node_is_prompt_then_steps() -> None:
    made = predict_local(Request(prompt_tokens=201, answer_tokens=10), idle())
    assert made.ttft_s == pytest.approx(0.420 + 0.020)
    assert made.completion_s == pytest.approx(0.420 + 10 * 0.020)
    assert made.harm_s == 0.0


def test_what_is_held_of_a_prompt_is_not_computed() -> None:
    made = predict_local(Request(prompt_tokens=201, answer_tokens=10), idle(held=150))
    assert made.ttft_s == pytest.approx(0.010 + 50 * 0.002 + 0.020)
    whole = predict_local(Request(prompt_tokens=201, answer_tokens=10), idle(held=500))
    assert whole.ttft_s == pytest.approx(0.020)


def test_a_local_prompt_is_slowed_by_streams_and_slows_them() -> None:
    # 4 streams, a step of 35 ms, pieces of 52.5 ms, 10 of them for the call; 0.40 s of tokens are 9.41 turns
    made = predict_local(Request(prompt_tokens=201, answer_tokens=10), streaming(4, left_each=1000))
    turns = 0.420 * (0.200 / 0.210) / 0.0425
    assert made.ttft_s == pytest.approx(turns * (0.0525 + 0.035) + 0.040)
    left_then = 1000 - 0.824 / 0.035
    assert left_then > 10
    assert made.harm_s == pytest.approx(4 * turns * 0.0525 + 4 * 10 * 0.005), (
        "each waits for the prompt, then for one more row"
    )


def test_streams_that_end_soon_lose_little() -> None:
    made = predict_local(Request(prompt_tokens=201, answer_tokens=10), streaming(4, left_each=2))
    assert made.harm_s == pytest.approx(4 * 2 * 0.0525)


def test_a_prompt_behind_another_one_is_read_beside_its_answer_and_slows_it() -> None:
    queued = Work(sequences=1, prompts=(PromptWork(100),), coming=(Stream(left=4, ahead=1),))
    _, read_s, lose_s = read_in_turn(cost_of(), queued, [0.210, 0.420])
    # four turns of a step of 20 ms and a piece of 30 ms, of which 20 ms are the prompt's and 10 ms its call's
    reads_s = 0.030 * (20 / 30) / (200 / 210)
    assert read_s == pytest.approx(0.210 + 4 * 0.050 + 0.420 - 4 * reads_s)
    assert lose_s == pytest.approx(4 * 0.030)
    served = replace(queued, sequences=0, coming=())
    assert read_in_turn(cost_of(), served, [0.210, 0.420]) == pytest.approx((0.210, 0.630, 0.0)), "answered elsewhere"


@settings(max_examples=200, deadline=None)
@given(
    prompts_s=st.lists(st.floats(0.05, 2.0), min_size=1, max_size=4),
    decoding=st.integers(0, 3),
    left=st.floats(1, 60),
    coming=st.lists(st.tuples(st.floats(1, 60), st.integers(1, 4)), max_size=5),
)
def test_reading_in_turn_is_what_turn_after_turn_comes_to(
    prompts_s: list[float], decoding: int, left: float, coming: list[tuple[float, int]]
) -> None:
    streams = tuple(Stream(left=tokens, ahead=ahead) for tokens, ahead in coming)
    work = Work(decoding + len(coming), decoding, tokens_left=decoding * left, coming=streams)
    _, read_s, lose_s = read_in_turn(cost_of(), work, prompts_s)
    walked_s, walked_lose_s, turn_s = _walked(cost_of(), work, prompts_s)
    # each end may fall into the middle of a turn
    ends = len(coming) + len(prompts_s) + 1
    assert read_s == pytest.approx(walked_s, abs=ends * turn_s)
    assert lose_s == pytest.approx(walked_lose_s, abs=(decoding + len(coming)) * ends * turn_s)


def _walked(cost: NodeCost, work: Work, prompts_s: list[float]) -> tuple[float, float, float]:
    """One turn after another; and how long the longest one is."""
    now_s = lose_s = longest_s = 0.0
    rows = [work.left] * work.decoding
    for number, rest_s in enumerate(prompts_s, 1):
        lose_s = 0.0
        while rest_s > 1e-9:
            rows = [left for left in rows if left > 0]
            step_s = cost.step_s(len(rows), 0)
            piece = cost.piece(step_s)
            reads_s = min(rest_s, piece.reads_s) if rows else rest_s
            takes_s = piece.takes_s if rows else reads_s
            longest_s = max(longest_s, step_s + piece.takes_s)
            now_s, rest_s, rows = now_s + step_s + takes_s, rest_s - reads_s, [left - 1 for left in rows]
            lose_s += len(rows) * takes_s
        rows += [stream.left for stream in work.coming if stream.ahead == number]
    return now_s, lose_s, longest_s


def test_a_split_request_waits_for_the_queue_of_the_prefill_node_and_the_tail() -> None:
    busy = Side(cost_of(), Work(prompts=(PromptWork(100, is_served=True),)))
    link = Link(peer="p1", bytes_per_s=1e6, round_trip_s=0.001, samples=1)
    made = predict_split(Request(prompt_tokens=201, answer_tokens=10), busy, streaming(4, left_each=1000), link)
    ready_s = 0.210 + 0.420 + 0.001 + 100 * KV / 1e6
    assert made.ttft_s == pytest.approx(ready_s + 0.040)
    assert made.completion_s == pytest.approx(ready_s + 10 * 0.040)
    assert made.harm_s == pytest.approx(4 * 10 * 0.005), "streams feel the new row, not the prompt"


def test_kv_of_a_prompt_is_not_carried_while_others_are_computed_before_it() -> None:
    slow = Link(peer="p1", bytes_per_s=200 * KV / 2.0, round_trip_s=0.001, samples=1)  # 2 s for all of it
    busy = Side(cost_of(), Work(prompts=(PromptWork(2000, is_served=True),)))
    made = predict_split(Request(prompt_tokens=201, answer_tokens=10), busy, idle(), slow)
    queued_s = cost_of().prefill_s(2000)
    assert queued_s > 2.0
    assert made.ttft_s == pytest.approx(queued_s + 0.420 + 0.001 + (2.0 - 0.420) + 0.020)


def test_whoever_waits_behind_a_prompt_loses_its_seconds() -> None:
    request = Request(prompt_tokens=201, answer_tokens=10, behind=2.0)
    assert predict_split(request, idle(), idle(), None).harm_s == pytest.approx(2 * 0.420)
    assert predict_local(request, idle(held=200)).harm_s == 0.0


def test_a_decode_node_that_reads_a_prompt_of_its_own_gives_slower_tokens_meanwhile() -> None:
    reading = Side(cost_of(), Work(sequences=1, prompts=(PromptWork(1000),)))
    free = Side(cost_of(), Work(sequences=1))
    request = Request(prompt_tokens=2, answer_tokens=10)
    loss_s = predict_split(request, idle(), reading, None).completion_s - (
        predict_split(request, idle(), free, None).completion_s
    )
    # steps of two rows, 25 ms: ten of them with a piece of 37.5 ms before each
    assert loss_s == pytest.approx(10 * 0.0375)
