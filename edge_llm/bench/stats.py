"""What samples mean: median, percentiles, seeded bootstrap intervals, whether two runs differ. Pure.

Owns the arithmetic of reports; every figure that a command prints goes through here, so that two commands cannot
mean different things by "median" or "p95". Refuses to know files, clocks and units.
Invariant: the same samples and seed give the same numbers on every machine.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_Z: Final = 1.959964  # 95 %, both sides

# Enough for a 95 % interval whose ends move by less than a percent of its width from seed to seed.
_RESAMPLES: Final = 2000
# Of more samples, medians of resamples are drawn as they are distributed: a record of thousands of requests would cost
# a small board minutes.
_DRAWN_ABOVE: Final = 500
# Up to so many samples of both, ranks are counted; with more, the normal distribution is as good.
_EXACT: Final = 24


@dataclass(frozen=True, slots=True)
class Summary:
    """Of `n` samples. `low` and `high` are the 95 % bootstrap interval of the median."""

    n: int
    mean: float
    median: float
    std: float
    minimum: float
    maximum: float
    p5: float
    p25: float
    p75: float
    p95: float
    p99: float
    low: float
    high: float


def percentile(samples: Sequence[float], share: float) -> float:
    """`share` in 0..1, linear between the two nearest ranks. Raises ValueError without samples."""
    if not samples:
        raise ValueError("no samples")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"a percentile's share lies in 0..1, got {share}")
    ordered = sorted(samples)
    rank = share * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    low, high = ordered[below], ordered[above]
    between = low + (high - low) * (rank - below)
    return min(max(between, low), high)  # rounding must not leave the two samples


def median(samples: Sequence[float]) -> float:
    return percentile(samples, 0.5)


def mean(samples: Sequence[float]) -> float:
    if not samples:
        raise ValueError("no samples")
    return math.fsum(samples) / len(samples)


def deviation(samples: Sequence[float]) -> float:
    """Standard deviation of the population that the samples come from; 0 for one sample."""
    middle = mean(samples)
    if len(samples) == 1:
        return 0.0
    return math.sqrt(math.fsum((sample - middle) ** 2 for sample in samples) / (len(samples) - 1))


def bootstrap(samples: Sequence[float], seed: int = 0, share: float = 0.95) -> tuple[float, float]:
    """Interval of the median that holds `share` of the medians of resampled samples."""
    if not samples:
        raise ValueError("no samples")
    draw = random.Random(seed)
    if len(samples) > _DRAWN_ABOVE:
        ordered = sorted(samples)
        medians = [_drawn_median(ordered, draw) for _ in range(_RESAMPLES)]
    else:
        medians = [median(draw.choices(samples, k=len(samples))) for _ in range(_RESAMPLES)]
    rest = (1.0 - share) / 2.0
    return percentile(medians, rest), percentile(medians, 1.0 - rest)


def summary(samples: Sequence[float], seed: int = 0) -> Summary:
    low, high = bootstrap(samples, seed)
    return Summary(
        n=len(samples),
        mean=mean(samples),
        median=median(samples),
        std=deviation(samples),
        minimum=min(samples),
        maximum=max(samples),
        p5=percentile(samples, 0.05),
        p25=percentile(samples, 0.25),
        p75=percentile(samples, 0.75),
        p95=percentile(samples, 0.95),
        p99=percentile(samples, 0.99),
        low=low,
        high=high,
    )


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Pairwise quotients of interleaved repetitions: what slowed the machine slowed both of a pair."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} samples of ours against {len(theirs)} of theirs")
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def wilson(successes: int, total: int) -> tuple[float, float]:
    """95 % interval of a share. Of nothing, everything is possible."""
    if not total:
        return 0.0, 1.0
    share = successes / total
    middle = share + _Z**2 / (2 * total)
    half = _Z * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2))
    scale = 1 + _Z**2 / total
    low, high = (middle - half) / scale, (middle + half) / scale
    return (low if successes else 0.0), (high if successes < total else 1.0)


def median_ratio_interval(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """95 % bootstrap interval of median(ours) / median(theirs), two independent runs; None when theirs may be 0.

    The median of a resample is drawn directly (an order statistic of uniform draws has a beta distribution), which is
    the same as resampling and takes no time for thousands of samples on a small board.
    """
    if not ours or not theirs:
        raise ValueError("no samples")
    draw = random.Random(seed)
    mine, others = sorted(ours), sorted(theirs)
    drawn = [(_drawn_median(mine, draw), _drawn_median(others, draw)) for _ in range(_RESAMPLES)]
    if not all(other for _, other in drawn):
        return None
    quotients = [own / other for own, other in drawn]
    return percentile(quotients, 0.025), percentile(quotients, 0.975)


def _drawn_median(ordered: Sequence[float], draw: random.Random) -> float:
    """Of as many samples drawn from these with replacement."""
    n = len(ordered)
    middle = (n + 1) // 2
    place = draw.betavariate(middle, n - middle + 1)
    lower = ordered[min(int(n * place), n - 1)]
    if n % 2:
        return lower
    place += (1.0 - place) * draw.betavariate(1, n - middle)
    return (lower + ordered[min(int(n * place), n - 1)]) / 2


def least_p(n: int, m: int) -> float:
    """The smallest p that a rank test of so many samples can give: too few can never show anything."""
    return min(1.0, 2 / math.comb(n + m, n))


def rank_test(one: Sequence[float], other: Sequence[float]) -> float:
    """Two-sided p of the Mann-Whitney test: whether one of the two tends to larger values. Exact for few samples, ties
    included; else normal, corrected for ties and continuity."""
    if not one or not other:
        raise ValueError("no samples")
    n, m = len(one), len(other)
    ranks = _doubled_ranks([*one, *other])
    off = abs(sum(ranks[:n]) - n * (n + m + 1))  # doubled, as the ranks are
    if n + m <= _EXACT:
        counts = _subset_sums(ranks, n)
        extreme = sum(count for total, count in counts.items() if abs(total - n * (n + m + 1)) >= off)
        return extreme / math.comb(n + m, n)
    ties = sum(count**3 - count for count in Counter(ranks).values())
    variance = n * m / 12 * (n + m + 1 - ties / ((n + m) * (n + m - 1)))
    return math.erfc(max(0.0, off / 2 - 0.5) / math.sqrt(2 * variance)) if variance > 0 else 1.0


def _doubled_ranks(samples: Sequence[float]) -> list[int]:
    """Twice the rank of each, which is whole for equal ones, too: they share the mean of theirs."""
    ordered = sorted(samples)
    first: dict[float, int] = {}
    for place, sample in enumerate(ordered, 1):
        first.setdefault(sample, place)
    count = Counter(ordered)
    return [2 * first[sample] + count[sample] - 1 for sample in samples]


def _subset_sums(ranks: Sequence[int], size: int) -> Counter[int]:
    """How many subsets of `size` have each sum."""
    sums: list[Counter[int]] = [Counter() for _ in range(size + 1)]
    sums[0][0] = 1
    for rank in ranks:
        for taken in range(size - 1, -1, -1):
            for total, count in sums[taken].items():
                sums[taken + 1][total + rank] += count
    return sums[size]
