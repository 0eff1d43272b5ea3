"""The fit of how long work takes: it finds the law, follows changes, and does not believe nonsense."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_llm.engine.rates import Fit, RateBook, Rates

TRUE = Rates(run_s=0.008, row_s=0.002, cell_s=1e-6, call_s=0.003, token_s=0.002, pair_s=4e-7)


def decode_s(rates: Rates, rows: int, cells: int) -> float:
    return rates.run_s + rates.row_s * rows + rates.cell_s * cells


def piece_s(rates: Rates, p0: int, p1: int) -> float:
    return rates.call_s + rates.token_s * (p1 - p0) + rates.pair_s * (p1 - p0) * (p0 + p1) / 2


def worked(book: RateBook, truth: Rates, steps: int, noise: float = 0.0, seed: int = 0) -> RateBook:
    """A worker's day: batches that grow and shrink, contexts that deepen, prompts in chunks of 128."""
    rng = random.Random(seed)
    for _ in range(steps):
        rows = rng.randint(1, 8)
        cells = sum(rng.randint(1, 4000) for _ in range(rows))
        book.on_decode(rows, cells, decode_s(truth, rows, cells) * (1 + rng.uniform(-noise, noise)))
        p0 = 128 * rng.randint(0, 20)
        p1 = p0 + rng.randint(1, 128)
        book.on_prompt(p0, p1, piece_s(truth, p0, p1) * (1 + rng.uniform(-noise, noise)))
    return book


def worst_error(rates: Rates, truth: Rates) -> float:
    """Largest relative error of a prediction over the work a worker meets."""
    decode = [(rows, rows * depth) for rows in (1, 4, 8) for depth in (10, 1000, 4000)]
    pieces = [(p0, p0 + n) for p0 in (0, 1024, 2560) for n in (16, 128)]
    return max(
        *(abs(decode_s(rates, *work) / decode_s(truth, *work) - 1) for work in decode),
        *(abs(piece_s(rates, *work) / piece_s(truth, *work) - 1) for work in pieces),
    )


def test_the_law_is_found_from_exact_durations() -> None:
    book = worked(RateBook(), TRUE, 300)
    assert worst_error(book.rates, TRUE) < 0.02
    assert (book.rates.decode_samples, book.rates.prompt_samples) == (300, 300)


def test_noise_of_a_fifth_leaves_predictions_within_an_eighth() -> None:
    assert worst_error(worked(RateBook(), TRUE, 400, noise=0.2).rates, TRUE) < 0.125


def test_a_board_that_becomes_half_as_fast_is_believed_within_its_memory() -> None:
    slow = Rates(run_s=0.016, row_s=0.004, cell_s=2e-6, call_s=0.006, token_s=0.004, pair_s=8e-7)
    book = worked(RateBook(), TRUE, 300)
    worked(book, slow, 600, seed=1)
    assert worst_error(book.rates, slow) < 0.1


def test_nothing_seen_is_the_first_estimate() -> None:
    first = Rates(run_s=0.01, row_s=0.003, token_s=0.002)
    assert RateBook(first).rates == first
    assert RateBook().rates == Rates()


def test_a_direction_that_the_work_never_varies_keeps_the_shape_of_the_first_estimate() -> None:
    book = RateBook(Rates(run_s=0.008, row_s=0.002))
    for _ in range(500):
        book.on_decode(1, 100, 0.020)
    rates = book.rates
    assert decode_s(rates, 1, 100) == pytest.approx(0.020, rel=0.02), "what was seen is predicted"
    assert 0.020 < decode_s(rates, 8, 800) < 0.080, "eight rows cost more than one and less than eight times that"


def test_without_a_first_estimate_one_kind_of_work_is_predicted_too() -> None:
    book = RateBook()
    for _ in range(50):
        book.on_prompt(0, 128, 0.256)
    assert piece_s(book.rates, 0, 128) == pytest.approx(0.256, rel=0.02)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_duration_that_cannot_be_is_ignored(seconds: float) -> None:
    book = worked(RateBook(), TRUE, 50)
    before = book.rates
    book.on_decode(4, 400, seconds)
    book.on_prompt(0, 128, seconds)
    assert book.rates == before


def test_one_stopped_process_does_not_make_a_slow_worker() -> None:
    book = worked(RateBook(), TRUE, 200)
    book.on_decode(4, 4000, 30.0)
    book.on_prompt(0, 128, 30.0)
    assert worst_error(book.rates, TRUE) < 0.08


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 100_000), st.floats(1e-6, 100.0)), min_size=1, max_size=40)
)
def test_whatever_was_seen_no_coefficient_is_negative_or_not_a_number(samples: list[tuple[int, int, float]]) -> None:
    fit = Fit((0.01, 0.001, 0.0))
    for rows, cells, seconds in samples:
        fit.observe((1.0, float(rows), float(cells)), seconds)
    assert all(math.isfinite(x) and x >= 0.0 for x in fit.solve())


def test_once_the_law_is_known_every_fifth_step_is_observed() -> None:
    """Observing costs as much as drawing a token."""
    book = RateBook()
    for _ in range(64):
        assert book.begin_step()
        book.on_decode(1, 100, 0.01)
    assert sum(book.begin_step() for _ in range(500)) == 100
