"""Recorded traffic keeps its shape when it is cut down, and what was cut is counted."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.bench.traces import BadTrace, Clipping, Row, Trace, parse, scaled, thinned

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens"
SHIPPED = Path(__file__).parents[2] / "edge_llm" / "bench" / "data"


def trace_of(*lengths: tuple[int, int], every_s: float = 1.0) -> Trace:
    rows = tuple(Row(number, number * every_s, *pair) for number, pair in enumerate(lengths))
    return Trace("made up", rows)


def test_times_count_from_the_first_request_whatever_the_order_of_lines_and_their_ends() -> None:
    text = f"{HEAD}\r\n2023-11-16 23:59:59.6805900,374,44\r\n2023-11-17 00:00:01.1805900,20,7\r\n"
    later_first = f"{HEAD}\n2023-11-17 00:00:01.1805900,20,7\n2023-11-16 23:59:59.6805900,374,44"
    rows = parse(text, "t").rows
    assert rows == parse(later_first, "t").rows
    assert [(row.number, row.prompt_tokens, row.answer_tokens) for row in rows] == [(0, 374, 44), (1, 20, 7)]
    assert [row.at_s for row in rows] == pytest.approx([0.0, 1.5])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "first line"),
        ("a,b,c\n1,2,3", "first line"),
        (HEAD, "no requests"),
        (f"{HEAD}\nyesterday,1,2", "line 2"),
        (f"{HEAD}\n2023-11-16 18:00:00,1,2\n2023-11-16 18:00:01,1", "line 3"),
        (f"{HEAD}\n2023-11-16 18:00:00,many,2", "line 2"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(text: str, complaint: str) -> None:
    with pytest.raises(BadTrace, match=complaint):
        parse(text, "t")


def test_a_beginning_has_only_what_arrived_in_it() -> None:
    cut = trace_of((1, 1), (2, 2), (3, 3), every_s=2.0).beginning(4.0)
    assert [row.prompt_tokens for row in cut.rows] == [1, 2]
    assert cut.span_s == 2.0
    assert trace_of((1, 1), (2, 2)).beginning(100.0).span_s == 1.0


def test_lengths_are_scaled_together_and_clipped_to_the_context_and_all_of_it_is_counted() -> None:
    trace, clipping = scaled(trace_of((400, 40), (3, 40), (4000, 40), (40, 4000)), 0.5, n_ctx=1000)
    assert [(row.prompt_tokens, row.answer_tokens) for row in trace.rows] == [(200, 20), (2, 20), (980, 20), (20, 500)]
    assert clipping == Clipping(
        requests=4, prompts_cut=1, prompt_tokens_cut=1020, answers_cut=1, answer_tokens_cut=1500, lengths_raised=0
    )
    assert scaled(trace_of((400, 2)), 0.25, 1000)[1].lengths_raised == 1, "one token has no time per token"


@given(
    st.lists(st.tuples(st.integers(1, 20_000), st.integers(1, 5_000)), min_size=1, max_size=20),
    st.floats(0.01, 1.0),
    st.integers(16, 4096),
)
def test_every_request_fits_and_can_be_measured(lengths: list[tuple[int, int]], factor: float, n_ctx: int) -> None:
    trace, clipping = scaled(trace_of(*lengths), factor, n_ctx)
    for row in trace.rows:
        assert row.prompt_tokens + row.answer_tokens <= n_ctx
        assert min(row.prompt_tokens, row.answer_tokens) >= 2
    kept = sum(row.prompt_tokens for row in trace.rows) + clipping.prompt_tokens_cut
    assert kept == sum(max(2, round(prompt * factor)) for prompt, _ in lengths)


def test_a_lower_rate_replays_some_of_the_requests_of_a_higher_one_over_the_same_time() -> None:
    trace = trace_of(*((100 + number, 10) for number in range(60)))
    few, many = thinned(trace, 10, over_s=5.9, seed=1), thinned(trace, 30, over_s=5.9, seed=1)
    assert (len(few), len(many)) == (10, 30)
    assert set(few) <= set(many)
    assert all(earlier.at_s < later.at_s for earlier, later in pairwise(many))
    assert [row.at_s for row in many] == pytest.approx([row.number / 10 for row in many])
    assert thinned(trace, 10, 6.0, seed=2) != few
    with pytest.raises(ValueError, match="61"):
        thinned(trace, 61, 6.0, seed=1)


def test_requests_are_left_out_at_random_so_that_bursts_and_gaps_stay() -> None:
    rows = thinned(trace_of(*[(9, 9)] * 100), 10, over_s=1.0, seed=0)
    assert len({later.number - earlier.number for earlier, later in pairwise(rows)}) > 3, (
        "every tenth would have one gap only"
    )


def test_all_at_once_is_a_replay_in_no_time() -> None:
    assert [row.at_s for row in thinned(trace_of((1, 1), (2, 2)), 2, over_s=0.0, seed=0)] == [0.0, 0.0]
    assert [row.at_s for row in thinned(trace_of((1, 1)), 1, over_s=5.0, seed=0)] == [0.0]


@pytest.mark.parametrize(("name", "requests"), [("azure_2023_conv", 2867), ("azure_2023_code", 1482)])
def test_the_traces_that_are_shipped_are_ten_minutes_of_the_ones_they_are_attributed_to(
    name: str, requests: int
) -> None:
    trace = parse((SHIPPED / f"{name}.csv").read_text(), name)
    assert len(trace.rows) == requests
    assert 580 < trace.span_s < 600
    readme = (SHIPPED / "README.md").read_text()
    assert f"{requests:,} requests" in readme
    assert "creativecommons.org/licenses/by/4.0" in readme
