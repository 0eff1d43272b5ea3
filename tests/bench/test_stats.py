"""The arithmetic behind every printed figure."""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.bench.stats import (
    bootstrap,
    deviation,
    least_p,
    mean,
    median,
    median_ratio_interval,
    percentile,
    rank_test,
    ratios,
    summary,
    wilson,
)

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


@pytest.mark.parametrize("count", [501, 1000])
def test_the_interval_of_many_samples_is_the_one_that_resampling_gives(count: int) -> None:
    draw = random.Random(5)
    samples = [draw.lognormvariate(0, 1) for _ in range(count)]
    resampled = [median(draw.choices(samples, k=count)) for _ in range(2000)]

    def rank(end: float) -> int:
        """Neighbours may lie far apart: ends are compared by how many samples are below them."""
        return sum(sample < end for sample in samples)

    low, high = bootstrap(samples)
    assert rank(low) == pytest.approx(rank(percentile(resampled, 0.025)), abs=4)
    assert rank(high) == pytest.approx(rank(percentile(resampled, 0.975)), abs=4)
    assert bootstrap(samples, seed=3) == bootstrap(samples[::-1], seed=3)


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


def test_the_rank_test_is_exact_for_few_samples() -> None:
    assert rank_test([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / 252)
    assert rank_test([6, 7, 8, 9, 10], [1, 2, 3, 4, 5]) == pytest.approx(2 / 252)
    assert rank_test([1, 3], [2, 4]) == pytest.approx(4 / 6)
    assert rank_test([1, 1, 1], [1, 1, 1]) == 1.0


def test_the_rank_test_of_many_samples_is_as_the_one_of_few() -> None:
    """Against the exact distribution, counted to the end: 13 and 13 samples are just beyond it."""
    draw = random.Random(3)
    one, other = [draw.gauss(0, 1) for _ in range(13)], [draw.gauss(0.8, 1) for _ in range(13)]
    ranks = {value: place for place, value in enumerate(sorted([*one, *other]), 1)}
    off = abs(sum(ranks[value] for value in one) - 13 * 27 / 2)
    sums = Counter({(0, 0): 1})
    for place in range(1, 27):
        for (taken, total), count in list(sums.items()):
            sums[taken + 1, total + place] += count
    extreme = sum(count for (taken, total), count in sums.items() if taken == 13 and abs(total - 13 * 27 / 2) >= off)
    assert rank_test(one, other) == pytest.approx(extreme / math.comb(26, 13), rel=0.1)


def test_the_rank_test_finds_its_level_of_differences_where_there_are_none() -> None:
    draw = random.Random(5)
    found = sum(
        rank_test([draw.random() for _ in range(30)], [draw.random() for _ in range(30)]) <= 0.05 for _ in range(1000)
    )
    assert 25 <= found <= 75


def test_too_few_samples_can_show_nothing() -> None:
    assert least_p(2, 2) > 0.05
    assert least_p(5, 5) == pytest.approx(2 / 252)
    assert least_p(1, 1) == 1.0


@pytest.mark.parametrize(("n", "m"), [(5, 5), (6, 5), (40, 41)])
def test_the_interval_of_a_ratio_of_medians_is_that_of_resampling(n: int, m: int) -> None:
    draw = random.Random(7)
    ours, theirs = [draw.gauss(12, 1) for _ in range(n)], [draw.gauss(10, 1) for _ in range(m)]
    resampled = [median(draw.choices(ours, k=n)) / median(draw.choices(theirs, k=m)) for _ in range(4000)]
    low, high = median_ratio_interval(ours, theirs) or (0.0, 0.0)
    assert low == pytest.approx(percentile(resampled, 0.025), rel=0.02)
    assert high == pytest.approx(percentile(resampled, 0.975), rel=0.02)
    assert median_ratio_interval(ours, theirs) == (low, high)


def test_a_ratio_to_nothing_has_no_interval() -> None:
    assert median_ratio_interval([1.0, 2.0], [0.0, 1.0]) is None
    assert median_ratio_interval([1.0], [2.0]) == (0.5, 0.5)
