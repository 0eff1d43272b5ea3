"""What samples mean: median, percentiles, a seeded bootstrap interval. Pure.

Owns the arithmetic of reports; every figure that a command prints goes through here, so that two commands cannot
mean different things by "median" or "p95". Refuses to know files, clocks and units.
Invariant: the same samples and seed give the same numbers on every machine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_Z: Final = 1.959964  # 95 %, both sides

# Enough for a 95 % interval whose ends move by less than a percent of its width from seed to seed.
_RESAMPLES: Final = 2000


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
