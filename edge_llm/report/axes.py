"""From values to places on paper: scales, their ticks, and the words at the ticks. Pure.

Owns linear and logarithmic scales. Refuses to know SVG and what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_STEPS: Final = (1.0, 2.0, 2.5, 5.0, 10.0)
_TICKS: Final = 5
# A logarithmic axis over more than this many decades has a tick for each only.
_FEW_DECADES: Final = 1.7
_ROOM: Final = 0.04


@dataclass(frozen=True, slots=True)
class Axis:
    """`low` and `high`: ends that are fixed, not taken from the values. `is_share`: 0..1 as percent."""

    label: str
    is_log: bool = False
    low: float | None = None
    high: float | None = None
    is_share: bool = False


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high` lie from `start` to `end`, in pixels."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False
    is_share: bool = False

    def at(self, value: float) -> float:
        """Values beyond the ends lie at the ends."""
        value = min(max(value, self.low), self.high)
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.is_log else _linear_ticks(self.low, self.high)

    def word(self, tick: float) -> str:
        if self.is_share:
            return f"{100 * tick:.4g} %"
        return f"{tick:,.0f}" if abs(tick) >= 10_000 else f"{tick:.4g}"


def scale(axis: Axis, values: Iterable[float], start: float, end: float) -> Scale:
    """A scale for all finite values, with a little room where an end is not fixed. Log scales hold positive values
    only; without two different values the scale is around what there is."""
    known = [value for value in values if math.isfinite(value) and (value > 0 or not axis.is_log)]
    low = axis.low if axis.low is not None else min(known, default=0.1 if axis.is_log else 0.0)
    high = axis.high if axis.high is not None else max(known, default=1.0)
    if high <= low:
        low, high = (low / 2, low * 2) if axis.is_log else (low - (abs(low) / 2 or 0.5), low + (abs(low) / 2 or 0.5))
    if axis.is_log:
        room = (high / low) ** _ROOM
        low, high = low if axis.low is not None else low / room, high if axis.high is not None else high * room
        return Scale(low, high, start, end, is_log=True)
    room = (high - low) * _ROOM
    is_from_zero = axis.low is None and 0 <= low < (high - low)
    low = axis.low if axis.low is not None else 0.0 if is_from_zero else low - room
    return Scale(low, axis.high if axis.high is not None else high + room, start, end, is_share=axis.is_share)


def spans_decades(values: Iterable[float]) -> bool:
    """Whether values are better shown on a logarithmic axis: all positive, the largest 30 times the smallest."""
    known = list(values)
    return bool(known) and min(known) > 0 and max(known) > 30 * min(known)


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in _STEPS if step * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = math.log10(high / low)
    inner = (1.0,) if decades > _FEW_DECADES else (1.0, 2.0, 5.0)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in inner]
    inside = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
    return inside if len(inside) > 1 else _linear_ticks(low, high)
