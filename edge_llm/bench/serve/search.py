"""Which rate to measure next, so that the highest one that keeps a goal is found with few. Pure.

Owns the search: from a first guess up or down by doubling until the goal lies between two rates, then bisection (of the
logarithm) until they are close. Refuses to know how a rate is measured and what goodput is: goodput.py interpolates.

Every rate that was measured counts for every goal, and goals are searched one after the other: the second one needs few
more. Attainment can only fall with the rate; where noise says otherwise, the monotone curve (goodput.py) is followed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edge_llm.bench.goodput import Point, monotone


@dataclass(frozen=True, slots=True)
class Search:
    """`closeness`: upper over lower rate at which it is found. `most_rates`: what is spent on it, for all goals."""

    goals: tuple[float, ...]
    first_per_s: float
    closeness: float = 1.15
    most_rates: int = 12
    least_per_s: float = 0.001
    most_per_s: float = 10_000.0

    def next_rate(self, points: Sequence[Point]) -> float | None:
        """None: all goals are found, or as much as may be spent is spent."""
        if len(points) >= self.most_rates:
            return None
        if not points:
            return self.first_per_s
        wanted = (self._next_for(goal, points) for goal in self.goals)
        return next((rate for rate in wanted if rate is not None), None)

    def _next_for(self, goal: float, points: Sequence[Point]) -> float | None:
        below, above = bracket(points, goal)
        if above is None:
            assert below is not None
            return 2 * below if 2 * below <= self.most_per_s else None
        if below is None:
            return above / 2 if above / 2 >= self.least_per_s else None
        return math.sqrt(below * above) if above / below > self.closeness else None


def bracket(points: Sequence[Point], goal: float) -> tuple[float | None, float | None]:
    """The highest rate that keeps the goal and the lowest above it that does not; None where there is none."""
    ordered = sorted(points, key=lambda point: point.rate_per_s)
    below: float | None = None
    for point, attainment in zip(ordered, monotone(ordered), strict=True):
        if attainment < goal:
            return below, point.rate_per_s
        below = point.rate_per_s
    return below, None
