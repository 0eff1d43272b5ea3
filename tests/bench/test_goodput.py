"""Goodput is the highest rate at which enough requests keep both limits; what failed never does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.bench.goodput import (
    REGIMES,
    Limits,
    Point,
    Timing,
    Unloaded,
    certain_ratio,
    goodput,
    interval,
    monotone,
    ratio_to_best,
)

LIMITS = Limits(ttft_s=1.0, tpot_s=0.1)


def point(rate: float, met: int, total: int) -> Point:
    return Point(rate, (True,) * met + (False,) * (total - met))


def curve(*shares: float, total: int = 100) -> list[Point]:
    """Attainments at the rates 1, 2, 3, ..."""
    return [point(number + 1.0, round(share * total), total) for number, share in enumerate(shares)]


@pytest.mark.parametrize(
    ("timing", "is_met"),
    [
        (Timing(1.0, 0.1, is_complete=True), True),
        (Timing(1.01, 0.1, is_complete=True), False),
        (Timing(1.0, 0.101, is_complete=True), False),
        (Timing(0.5, 0.05, is_complete=False), False),
        (Timing(None, None, is_complete=True), False),
        (Timing(0.5, None, is_complete=True), True),
    ],
)
def test_a_request_is_served_well_when_it_is_whole_and_keeps_both_limits(timing: Timing, is_met: bool) -> None:
    assert timing.meets(LIMITS) is is_met


def test_limits_are_multiples_of_what_a_request_takes_alone_and_the_regimes_pull_apart() -> None:
    strict_tpot, strict_ttft = (regime.limits(Unloaded(2.0, 0.01)) for regime in REGIMES)
    assert strict_tpot.tpot_s < strict_ttft.tpot_s
    assert strict_ttft.ttft_s < strict_tpot.ttft_s
    assert min(strict_tpot.tpot_s, strict_ttft.tpot_s) > 0.01
    assert min(strict_tpot.ttft_s, strict_ttft.ttft_s) > 2.0, "a goal that nobody meets alone is no goal"
    assert [regime.should_split_win for regime in REGIMES] == [True, False]


def test_goodput_lies_on_the_line_between_the_two_rates_around_the_goal() -> None:
    found = goodput(curve(1.0, 0.95, 0.85, 0.2), 0.90)
    assert found.bound == "between"
    assert found.rate_per_s == pytest.approx(2.5)


def test_a_curve_that_never_falls_or_is_below_from_the_start_says_so() -> None:
    never = goodput(curve(1.0, 0.99, 0.95), 0.90)
    assert (never.rate_per_s, never.bound) == (3.0, "at_least")
    always = goodput(curve(0.5, 0.4), 0.90)
    assert always.bound == "at_most"
    assert always.rate_per_s == pytest.approx(0.2), "the line from all at rate 0 to half at rate 1"
    with pytest.raises(ValueError, match="no rate"):
        goodput([], 0.9)
    with pytest.raises(ValueError, match="goal"):
        goodput(curve(1.0), 1.0)


def test_a_lucky_point_after_a_bad_one_is_luck() -> None:
    lucky = [point(1.0, 100, 100), point(2.0, 80, 100), point(3.0, 98, 100), point(4.0, 10, 100)]
    assert monotone(lucky) == pytest.approx([1.0, 0.89, 0.89, 0.1])
    assert goodput(lucky, 0.90).rate_per_s < 2.0


def test_a_point_counts_by_its_requests() -> None:
    assert monotone([point(1.0, 0, 1), point(2.0, 99, 99)]) == pytest.approx([0.99, 0.99])


points = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=8).map(
    lambda pairs: [point(1.0 + number, min(met, total), total) for number, (met, total) in enumerate(pairs)]
)


@given(points, st.floats(0.05, 0.95))
def test_goodput_exists_within_what_was_measured_and_a_stricter_goal_gives_no_more(
    measured: Sequence[Point], goal: float
) -> None:
    smoothed = monotone(measured)
    assert smoothed == sorted(smoothed, reverse=True)
    mean = sum(share * len(each.met) for share, each in zip(smoothed, measured, strict=True))
    assert mean == pytest.approx(sum(sum(each.met) for each in measured)), "no request is won or lost"
    found = goodput(measured, goal).rate_per_s
    assert 0 < found <= measured[-1].rate_per_s
    assert goodput(measured, goal + 0.04).rate_per_s <= found
    assert goodput(list(reversed(measured)), goal).rate_per_s == found


def test_intervals_hold_the_figure_and_shrink_with_more_requests() -> None:
    few, many = (curve(1.0, 0.95, 0.8, 0.3, total=total) for total in (20, 2000))
    low, high = interval(few, 0.9)
    assert low < goodput(few, 0.9).rate_per_s < high
    narrow_low, narrow_high = interval(many, 0.9)
    assert narrow_high - narrow_low < (high - low) / 3
    assert interval(few, 0.9) == (low, high), "the same samples, the same interval"


def test_who_serves_the_same_requests_as_the_best_is_exactly_as_good_in_every_draw() -> None:
    one = curve(1.0, 0.9, 0.5, 0.2)
    assert ratio_to_best(one, [one, curve(0.2, 0.1)], 0.9) == (1.0, 1.0, 1.0)
    ratio, low, high = ratio_to_best(curve(1.0, 0.8, 0.2), [curve(1.0, 1.0, 0.8), curve(0.9, 0.5)], 0.9)
    assert ratio == pytest.approx(1.5 / 2.5)
    assert low < ratio < high


def test_a_ratio_is_certain_only_as_far_as_rates_were_measured() -> None:
    between, above, below = curve(1.0, 0.8, 0.0), curve(1.0, 1.0, 1.0), curve(0.5, 0.4, 0.3)
    assert certain_ratio(between, [between, below], 0.9) == (1.0, 1.0)
    assert certain_ratio(between, [above], 0.9) == (0.0, 0.5), "the other one may have served any rate"
    assert certain_ratio(above, [between], 0.9) == (2.0, math.inf)
    assert certain_ratio(above, [above], 0.9) == (0.0, math.inf)
    assert certain_ratio(below, [between], 0.9) == pytest.approx((0.0, 1.0 / 1.5))
    assert certain_ratio(below, [below], 0.9) == (0.0, math.inf)
