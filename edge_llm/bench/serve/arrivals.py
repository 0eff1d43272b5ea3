"""When requests are sent in an open loop: the processes, in seconds after the beginning. Pure.

Owns the arithmetic of arrivals. Refuses to know requests; times of recorded traffic are traces.py's.

Invariant: the same seed at another rate is the same process, faster or slower: all times are divided by the rate.
"""

from __future__ import annotations

import itertools
import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Final, Literal

OpenProcess = Literal["poisson", "constant", "burst"]
OPEN: Final[tuple[OpenProcess, ...]] = ("poisson", "constant", "burst")


def times(
    process: OpenProcess, rate_per_s: float, seed: int, count: int | None, seconds: float | None, burst: int = 1
) -> list[float]:
    """`count` arrivals, or those of `seconds`, or whatever is less. `burst`: how many come at once in process burst,
    which are as many in all as at the same constant rate. Raises ValueError when neither or no rate bounds it."""
    if count is None and seconds is None:
        raise ValueError("a number of requests or a time bounds a replay")
    if rate_per_s <= 0:
        raise ValueError(f"a rate is more than 0 requests/s, got {rate_per_s:g}")
    endless = _units(process, random.Random(seed), max(1, burst))
    scaled = (unit / rate_per_s for unit in endless)
    within = scaled if seconds is None else itertools.takewhile(lambda at_s: at_s < seconds, scaled)
    return list(itertools.islice(within, count))


def poisson(rate_per_s: float, from_s: float, until_s: float, rng: random.Random) -> Iterator[float]:
    """Independent arrivals in [from_s, until_s), drawn from a generator that others draw from between them."""
    now_s = from_s
    while (now_s := now_s + rng.expovariate(rate_per_s)) < until_s:
        yield now_s


def _units(process: OpenProcess, rng: random.Random, burst: int) -> Iterator[float]:
    """Arrivals at a rate of 1/s."""
    match process:
        case "poisson":
            return itertools.accumulate(rng.expovariate(1.0) for _ in itertools.count())
        case "constant":
            return (float(number) for number in itertools.count())
        case "burst":
            return (float(number // burst * burst) for number in itertools.count())


def mean_rate_per_s(times_s: Sequence[float]) -> float | None:
    """What was offered from the first arrival until the last moment at which any came; None of a single moment. Those
    that came last, be they one or a burst, begin a time that is not in it."""
    if not times_s or times_s[-1] <= times_s[0]:
        return None
    return bisect_left(times_s, times_s[-1]) / (times_s[-1] - times_s[0])
