"""The arithmetic behind every printed figure."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.bench.stats import bootstrap, deviation, mean, median, percentile, ratios, summary, wilson

FLOATS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


@given(FLOATS)
def test_median_mean_and_deviation_agree_with_the_standard_library(samples: list[float]) -> None:
    assert median(samples) == pytest.approx(statistics.median(samples), abs=1e-6)
    assert mean(samples) == pytest.approx(statistics.fmean(samples), abs=1e-6)
    if len(samples) > 1:
        assert deviation(samples) == pytest.approx(statistics.stdev(samples), abs=1e-4)


@given(FLOATS, st.floats(0, 1))
def test_a_percentile_never_leaves_the_range_of_its_samples(samples: list[float], share: float) -> None:
    assert min(samples) <= percentile(samples, share) <= max(samples)


def test_percentiles_are_linear_between_ranks() -> None:
    assert percentile([10.0, 20.0, 30.0, 40.0], 0.25) == 17.5
    assert percentile([40.0, 10.0, 30.0, 20.0], 0.95) == pytest.approx(38.5)
    assert percentile([5.0], 0.99) == 5.0


def test_the_bootstrap_interval_is_the_same_for_the_same_seed_and_holds_the_median() -> None:
    samples = [1.0, 1.1, 0.9, 1.05, 0.97, 1.4, 0.99]
    low, high = bootstrap(samples, seed=7)
    assert bootstrap(samples, seed=7) == (low, high)
    assert low < median(samples) < high


def test_the_bootstrap_interval_narrows_with_more_samples() -> None:
    few = [1.0, 2.0, 3.0, 4.0, 5.0]
    low, high = bootstrap(few)
    many_low, many_high = bootstrap(few * 40)
    assert many_high - many_low < high - low


def test_a_summary_of_one_sample_is_that_sample() -> None:
    one = summary([3.0])
    assert (one.n, one.median, one.low, one.high, one.std) == (1, 3.0, 3.0, 3.0, 0.0)


def test_ratios_pair_repetitions_and_refuse_a_lost_one() -> None:
    assert ratios([1.0, 4.0], [2.0, 2.0]) == [0.5, 2.0]
    with pytest.raises(ValueError, match="2 samples of ours against 1"):
        ratios([1.0, 2.0], [1.0])


def test_no_samples_is_an_error_and_not_a_zero() -> None:
    for function in (median, mean, deviation, bootstrap, summary):
        with pytest.raises(ValueError, match="no samples"):
            function([])
    with pytest.raises(ValueError, match=r"0\.\.1"):
        percentile([1.0], 95)


def test_the_interval_of_a_share_is_wilsons() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(9, 10)
    assert [low, high] == pytest.approx([0.596, 0.982], abs=1e-3)
    assert wilson(10, 10)[1] == 1.0
    assert wilson(0, 10)[0] == 0.0
