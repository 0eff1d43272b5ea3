"""Does a server keep up with an open loop, or does its backlog grow? Pure.

Owns the rule. Two signs, both needed: more requests are open at the end of the arrivals than in their middle, by more
than a tenth of what arrived between and more than chance explains; and the time to first token grows with it. Only the
second half of the arrivals is looked at: the first requests find an empty server. Who refuses (429, 503) instead of
queueing shows as `refused_share`, and more than a tenth of that is saturation as well.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Final

import msgspec

from edge_llm.bench.serve.answers import Answer
from edge_llm.bench.stats import mean, median

LEAST: Final = 16
_GROWTH_SHARE: Final = 0.1
_CHANCES: Final = 1.0
_SLOWER: Final = 1.25
_REFUSED_SHARE: Final = 0.1
_REFUSALS: Final = frozenset({"http_429", "http_503"})


class Saturation(msgspec.Struct, frozen=True):
    """`is_saturated` None: too few requests to say. `backlog_growth`: open requests, last quarter of arrivals against
    the second; `arrived`: how many came between these. `why`: for people."""

    is_saturated: bool | None
    backlog_growth: float
    arrived: int
    ttft_growth: float | None
    refused_share: float
    why: str


def saturation(passes: Sequence[Sequence[Answer]]) -> Saturation:
    """Of all passes; one that is saturated makes it so."""
    found = [_of_pass(one) for one in passes if one]
    if not found:
        return Saturation(None, 0.0, 0, None, 0.0, "no requests")
    ranks = {True: 2, False: 1, None: 0}
    return max(found, key=lambda one: (ranks[one.is_saturated], one.backlog_growth))


def _of_pass(answers: Sequence[Answer]) -> Saturation:
    refused = sum(answer.kind in _REFUSALS for answer in answers) / len(answers)
    if refused > _REFUSED_SHARE:
        return Saturation(True, 0.0, len(answers), None, refused, f"{refused:.0%} of the requests were refused")
    if len(answers) < LEAST:
        why = f"{len(answers)} requests, and {LEAST} are needed to see a trend"
        return Saturation(None, 0.0, len(answers), None, refused, why)
    quarter = len(answers) // 4
    middle, end = answers[quarter : 2 * quarter], answers[-quarter:]
    arrived = len(answers) - 2 * quarter
    growth = _open_at(answers, end) - _open_at(answers, middle)
    slower = _slower(middle, end)
    least = max(_GROWTH_SHARE * arrived, _CHANCES * math.sqrt(arrived))
    is_growing = growth > least and (slower is None or slower > _SLOWER)
    why = (
        f"{growth:+.1f} open requests while {arrived} arrived, time to first token times "
        f"{'unknown' if slower is None else f'{slower:.2f}'}: the backlog {'grows' if is_growing else 'does not grow'}"
    )
    return Saturation(is_growing, growth, arrived, slower, refused, why)


def _open_at(answers: Sequence[Answer], moments: Sequence[Answer]) -> float:
    """How many requests are open when these arrive, on average."""
    began_s = sorted(answer.at_s for answer in answers)
    ended_s = sorted(math.inf if answer.ended_s is None else answer.ended_s for answer in answers)
    return mean([bisect_left(began_s, one.at_s) - bisect_right(ended_s, one.at_s) for one in moments])


def _slower(middle: Sequence[Answer], end: Sequence[Answer]) -> float | None:
    """Median time to first token at the end over that in the middle; None where one has none."""
    before = [answer.ttft_s for answer in middle if answer.ttft_s is not None]
    after = [answer.ttft_s for answer in end if answer.ttft_s is not None]
    return median(after) / median(before) if before and after and median(before) > 0 else None
