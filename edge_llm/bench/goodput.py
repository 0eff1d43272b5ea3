"""Limits on latency, the share of requests that keep them, and the highest rate at which enough do. Pure.

Owns the words of DistServe (OSDI 2024, section 2): a request is served well when it keeps its limits of TTFT and of
TPOT, both; attainment is the share of requests that do; goodput is the highest rate with an attainment of a goal.
Refuses to know servers, traces and clocks.

Rules: whatever failed, was cut off or never came misses. Attainment can only fall with the rate, so a measured curve is
first made monotone (pool adjacent violators, weighted by requests); between two rates it is a line, and no request
comes late at rate 0. TPOT is (last token - first token) / (tokens - 1), as vLLM and DistServe count it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from edge_llm.bench.stats import percentile

GOALS: Final = (0.90, 0.99)
_DRAWS: Final = 1000
Bound = Literal["between", "at_most", "at_least"]


@dataclass(frozen=True, slots=True)
class Limits:
    """In seconds."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Unloaded:
    """What one request alone takes on one node: until its first token, and from each token to the next."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Regime:
    """Limits as multiples of what a request takes alone, fixed before anything is measured (DistServe's SLO scale)."""

    name: str
    ttft_scale: float
    tpot_scale: float
    should_split_win: bool
    why: str

    def limits(self, unloaded: Unloaded) -> Limits:
        return Limits(self.ttft_scale * unloaded.ttft_s, self.tpot_scale * unloaded.tpot_s)


# The request alone has a prompt that 90 % of the trace's do not exceed: below 1.0 of its TTFT nobody could attain 90 %.
STRICT_TPOT: Final = Regime(
    "strict_tpot_long_prompts",
    ttft_scale=3.0,
    tpot_scale=2.0,
    should_split_win=True,
    why="2.0 leaves a mixed node one decode step's worth of prompt beside each step (engine/pacing.py): a prompt takes "
    "twice as long there, or waits; where they are read elsewhere no stream waits for them, and there is time to queue",
)
STRICT_TTFT: Final = Regime(
    "strict_ttft_loose_tpot",
    ttft_scale=1.5,
    tpot_scale=8.0,
    should_split_win=False,
    why="hardly time to queue, and a pace that a stream keeps beside prompts and other streams: two nodes that read "
    "prompts have twice the room of one",
)
REGIMES: Final = (STRICT_TPOT, STRICT_TTFT)


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one request, in seconds. ttft_s: None when no token came; tpot_s: None with fewer than two."""

    ttft_s: float | None
    tpot_s: float | None
    is_complete: bool

    def meets_ttft(self, limits: Limits) -> bool:
        return self.ttft_s is not None and self.ttft_s <= limits.ttft_s

    def meets_tpot(self, limits: Limits) -> bool:
        return self.is_complete and (self.tpot_s is None or self.tpot_s <= limits.tpot_s)

    def meets(self, limits: Limits) -> bool:
        return self.is_complete and self.meets_ttft(limits) and self.meets_tpot(limits)


@dataclass(frozen=True, slots=True)
class Point:
    """One rate: which of its requests kept the limits, in the order of their arrival."""

    rate_per_s: float
    met: tuple[bool, ...]

    @property
    def attainment(self) -> float:
        return sum(self.met) / len(self.met)


@dataclass(frozen=True, slots=True)
class Goodput:
    """`bound`: at_most, the lowest rate measured was too high already; at_least, the highest was not yet."""

    rate_per_s: float
    bound: Bound


def monotone(points: Sequence[Point]) -> list[float]:
    """Attainments of points in order of rate, made to fall: neighbours that rise share their weighted mean."""
    blocks: list[tuple[float, int, int]] = []  # attainment, requests, points
    for point in points:
        blocks.append((point.attainment, len(point.met), 1))
        while len(blocks) > 1 and blocks[-1][0] > blocks[-2][0]:
            (later, n, k), (earlier, m, j) = blocks.pop(), blocks.pop()
            blocks.append(((later * n + earlier * m) / (n + m), n + m, j + k))
    return [attainment for attainment, _, count in blocks for _ in range(count)]


def goodput(points: Sequence[Point], goal: float) -> Goodput:
    """The highest rate with an attainment of `goal`, interpolated; above 0. Raises ValueError without points."""
    if not points:
        raise ValueError("no rate was measured")
    if not 0.0 < goal < 1.0:
        raise ValueError(f"a goal lies between 0 and 1, got {goal}")
    ordered = sorted(points, key=lambda point: point.rate_per_s)
    below, above = 0.0, 1.0
    for number, (point, attainment) in enumerate(zip(ordered, monotone(ordered), strict=True)):
        if attainment < goal:
            share = (above - goal) / (above - attainment)
            rate = below + share * (point.rate_per_s - below)
            return Goodput(rate, "between" if number else "at_most")
        below, above = point.rate_per_s, attainment
    return Goodput(below, "at_least")


Curve = Sequence[Point]


def certain(points: Curve, goal: float) -> tuple[float, float]:
    """Between which rates the goodput lies for certain (but for chance): one below or above all rates that were
    measured may be any of those."""
    found = goodput(points, goal)
    if found.bound == "at_least":
        return found.rate_per_s, math.inf
    if found.bound == "at_most":
        return 0.0, min(point.rate_per_s for point in points)
    return found.rate_per_s, found.rate_per_s


def certain_ratio(mine: Curve, others: Sequence[Curve], goal: float) -> tuple[float, float]:
    """Between which figures the ratio to the best of the others lies for certain; infinite without an upper one."""
    low, high = certain(mine, goal)
    ranges = [certain(other, goal) for other in others]
    best_low, best_high = max(one for one, _ in ranges), max(one for _, one in ranges)
    return low / best_high, high / best_low if best_low else math.inf


def interval(points: Curve, goal: float, seed: int = 0) -> tuple[float, float]:
    """95 % of the goodputs of resampled requests."""
    return _interval([points], lambda curves: goodput(curves[0], goal).rate_per_s, seed)


def ratio_to_best(mine: Curve, others: Sequence[Curve], goal: float, seed: int = 0) -> tuple[float, float, float]:
    """Goodput of `mine` over the best of the others', and its 95 % interval. Requests are drawn together: number i of a
    rate is the same request everywhere, so what makes it hard to serve cancels out."""

    def ratio(curves: Sequence[Curve]) -> float:
        own, *rest = (goodput(curve, goal).rate_per_s for curve in curves)
        return own / max(rest)

    curves = [mine, *others]
    low, high = _interval(curves, ratio, seed)
    return ratio(curves), low, high


def _interval(curves: Sequence[Curve], figure: Callable[[Sequence[Curve]], float], seed: int) -> tuple[float, float]:
    draws = [figure([_redrawn(curve, f"{seed}/{draw}") for curve in curves]) for draw in range(_DRAWS)]
    return percentile(draws, 0.025), percentile(draws, 0.975)


def _redrawn(curve: Curve, seed: str) -> list[Point]:
    """Requests of each rate drawn with replacement; the draw depends on seed, rate and number of requests only."""
    redrawn = []
    for point in curve:
        rng = random.Random(f"{seed}/{point.rate_per_s:.9g}")
        redrawn.append(Point(point.rate_per_s, tuple(rng.choices(point.met, k=len(point.met)))))
    return redrawn
