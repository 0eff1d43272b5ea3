"""Gaps of a stream around an arrival: what its pace was, and the longest that a client waited meanwhile."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.bench.processes import MeasureFailed
from edge_llm.bench.streams import Gaps, gaps_around, largest_gap_before, prompt_ids


def test_the_pace_is_from_before_and_the_stall_from_while_the_prompt_is_worked_on() -> None:
    gaps = gaps_around([0.0, 1.0, 3.0, 3.5, 7.5, 8.0, 20.0], sent_s=3.0, answered_s=7.6)
    assert gaps == Gaps(mean_before_s=1.5, largest_during_s=4.0)
    assert gaps.stall_ratio == pytest.approx(4.0 / 1.5)


def test_a_gap_that_began_before_the_prompt_came_or_ends_after_its_answer_counts_whole() -> None:
    assert gaps_around([0.0, 1.0, 6.0], sent_s=2.0, answered_s=3.0).largest_during_s == 5.0
    assert gaps_around([0.0, 1.0, 2.0, 9.0], sent_s=1.5, answered_s=2.5).largest_during_s == 7.0


def test_what_comes_after_the_answer_is_no_stall() -> None:
    assert gaps_around([0.0, 1.0, 2.0, 3.0, 50.0], sent_s=1.0, answered_s=3.0).largest_during_s == 1.0


@pytest.mark.parametrize("arrivals_s", [[], [1.0], [0.0, 1.0, 2.0], [6.0, 7.0], [20.0, 21.0]])
def test_a_stream_that_was_not_there_before_and_during_shows_nothing(arrivals_s: list[float]) -> None:
    with pytest.raises(MeasureFailed, match="too early"):
        gaps_around(arrivals_s, sent_s=5.0, answered_s=10.0)


@given(st.lists(st.floats(0.01, 2.0), min_size=6, max_size=30), st.floats(0.0, 1.0))
def test_an_even_stream_has_no_stall_and_no_clock_matters(gaps: list[float], start_s: float) -> None:
    gap_s = gaps[0]
    arrivals_s = [start_s + gap_s * number for number in range(len(gaps))]
    found = gaps_around(arrivals_s, sent_s=arrivals_s[2], answered_s=arrivals_s[-1])
    assert found.stall_ratio == pytest.approx(1.0, rel=1e-6)


def test_prompts_of_two_seeds_share_no_beginning_and_stay_in_the_vocabulary() -> None:
    first, second = prompt_ids(50, 1000, seed=1), prompt_ids(50, 1000, seed=2)
    assert first == prompt_ids(50, 1000, seed=1)
    assert first[0] != second[0]
    assert all(50 <= token < 1000 for token in first + second)


def test_what_a_prompt_does_to_a_stream_leaves_out_the_steps_that_make_tokens_of_its_answer() -> None:
    arrivals_s = [0.0, 1.0, 2.0, 4.5, 5.5, 9.0, 12.5]
    assert largest_gap_before(arrivals_s, sent_s=2.1, first_s=9.01, answer_s=3.4) == 2.5
    assert largest_gap_before(arrivals_s, sent_s=2.1, first_s=8.99, answer_s=3.4) == 2.5
    assert largest_gap_before([0.0, 1.0, 9.0], sent_s=1.0, first_s=9.0, answer_s=8.5) == 0.0


def test_a_stream_that_stands_still_all_the_while_is_no_stream_without_a_stall() -> None:
    """Silent from before the prompt was sent until after its first token: nothing but one gap is there to be seen."""
    assert largest_gap_before([0.0, 1.0, 2.0, 13.5], sent_s=2.5, first_s=13.0, answer_s=1.0) == 10.0
    assert largest_gap_before([0.0, 1.0, 2.0, 3.0, 13.5], sent_s=2.5, first_s=13.0, answer_s=1.0) == 9.0
    assert largest_gap_before([0.0, 1.0, 2.0, 8.0, 8.5, 9.5], sent_s=2.5, first_s=9.4, answer_s=1.0) == 6.0


def test_a_stream_that_ended_while_the_prompt_arrived_shows_nothing() -> None:
    with pytest.raises(MeasureFailed, match="too early"):
        largest_gap_before([0.0, 1.0, 2.0], sent_s=2.5, first_s=9.0, answer_s=1.0)


def test_pieces_that_came_together_before_it_do_not_let_the_first_step_of_an_answer_count() -> None:
    arrivals_s = [0.0, 1.0, 1.0, 2.0, 3.0, 5.0, 9.0]
    assert largest_gap_before(arrivals_s, sent_s=3.1, first_s=9.01, answer_s=3.5) == 2.0
