"""Goodput of whom over whose, with an interval: contenders that had the same requests, beside each other. Pure.

Owns who is compared with whom (the first one with each other, and with the best of them) and what is certain of a
ratio. Refuses to know how rates were measured; the arithmetic is bench/goodput.py's, as `bench goodput` has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from edge_llm.bench.goodput import GOALS, Curve, certain_ratio, goodput, ratio_to_best

BEST: Final = "the best of the others"


class RatioFigure(msgspec.Struct, frozen=True, kw_only=True):
    """`low`, `high`: 95 % bootstrap interval over requests, drawn together. `least`, `most`: between what the ratio
    lies for certain, but for chance; None: without an upper one. `bounds`: of each one's goodput (GoodputFigure)."""

    goal: float
    ratio: float
    low: float
    high: float
    least: float
    most: float | None
    bounds: dict[str, str]

    @property
    def is_certain(self) -> bool:
        """Each goodput lies between two rates that were measured."""
        return set(self.bounds.values()) == {"between"}


def ratios(curves: Mapping[str, Curve]) -> dict[str, dict[str, RatioFigure]]:
    """By "a over b" and goal. Empty without two contenders that were measured at two rates at least."""
    known = {name: curve for name, curve in curves.items() if len({point.rate_per_s for point in curve}) > 1}
    if len(known) < 2 or next(iter(curves)) not in known:
        return {}
    first, *others = known
    found = {f"{first} over {other}": _by_goal(known, first, [other]) for other in others}
    if len(others) > 1:
        found[f"{first} over {BEST}"] = _by_goal(known, first, others)
    return found


def words(found: RatioFigure) -> str:
    """For people: a ratio that the rates leave open says so."""
    text = f"{found.ratio:.2f} (95 % interval {found.low:.2f} to {found.high:.2f})"
    if found.is_certain:
        return text
    most = "more" if found.most is None else f"{found.most:.2f}"
    return f"{text}; by the rates measured it may be {found.least:.2f} to {most}"


def _by_goal(known: Mapping[str, Curve], mine: str, others: Sequence[str]) -> dict[str, RatioFigure]:
    return {f"goodput_{100 * goal:.0f}": _ratio(known, mine, others, goal) for goal in GOALS}


def _ratio(known: Mapping[str, Curve], mine: str, others: Sequence[str], goal: float) -> RatioFigure:
    own, rest = known[mine], [known[other] for other in others]
    ratio, low, high = ratio_to_best(own, rest, goal)
    least, most = certain_ratio(own, rest, goal)
    return RatioFigure(
        goal=goal,
        ratio=ratio,
        low=low,
        high=high,
        least=least,
        most=None if math.isinf(most) else most,
        bounds={name: goodput(known[name], goal).bound for name in (mine, *others)},
    )
