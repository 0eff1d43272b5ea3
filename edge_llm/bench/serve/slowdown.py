"""How much slower requests are under load than the same ones alone: the nine limits of Splitwise. Pure.

Owns the table (Splitwise, ISCA 2024, Table VI: P50, P90 and P99 of the slowdowns of TTFT, TBT and E2E; all nine must
hold) and what a request takes alone when not every one was sent alone. Refuses to know how they are sent.

Some requests, chosen evenly by size, are sent alone (other words, same lengths). TTFT alone is a line between the two
next prompt lengths that were; TBT alone their mean time per token (TPOT), likewise; E2E alone follows from both:
ttft + (tokens - 1) * tbt. Where every request was sent alone, nothing is between. Answers in one piece have no TTFT.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec

from edge_llm.bench.serve.answers import Answer
from edge_llm.bench.stats import mean, percentile

SHARES: Final[Mapping[str, float]] = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
LIMITS: Final[Mapping[str, Mapping[str, float]]] = {
    "ttft": {"p50": 2.0, "p90": 3.0, "p99": 6.0},
    "tbt": {"p50": 1.25, "p90": 1.5, "p99": 5.0},
    "e2e": {"p50": 1.25, "p90": 1.5, "p99": 5.0},
}
Item = TypeVar("Item")


class Cell(msgspec.Struct, frozen=True):
    slowdown: float
    limit: float
    is_kept: bool


class Slowdown(msgspec.Struct, frozen=True):
    """`table[metric][percentile]`. `requests` complete ones of `of`; a request that is not complete is not in the
    percentiles, and the limits do not hold while there are any (`holds`). `alone`: how many were sent alone."""

    table: dict[str, dict[str, Cell]]
    holds: bool
    requests: int
    of: int
    alone: int


@dataclass(frozen=True, slots=True)
class Alone:
    """What requests take alone, by length of prompt (ascending)."""

    prompt_tokens: tuple[int, ...]
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]

    def ttft_of(self, prompt_tokens: int) -> float:
        return _between(self.prompt_tokens, self.ttft_s, prompt_tokens)

    def tpot_of(self, prompt_tokens: int) -> float:
        return _between(self.prompt_tokens, self.tpot_s, prompt_tokens)


def chosen(items: Sequence[Item], size: Callable[[Item], int], count: int) -> list[Item]:
    """`count` of them, evenly by size, smallest and largest among them; all when there are no more."""
    ordered = sorted(items, key=size)
    if len(ordered) <= count:
        return ordered
    if count == 1:
        return [ordered[len(ordered) // 2]]
    return [ordered[round(place * (len(ordered) - 1) / (count - 1))] for place in range(count)]


def alone_of(answers: Sequence[Answer]) -> Alone | None:
    """None when no answer has both times. Requests with prompts of one length count as their mean. An answer whose
    tokens all came at once has no time between them that another one could be a multiple of."""
    by_length: dict[int, list[tuple[float, float]]] = {}
    for answer in answers:
        if answer.is_complete and answer.ttft_s and answer.tpot_s:
            by_length.setdefault(_prompt_tokens(answer), []).append((answer.ttft_s, answer.tpot_s))
    if not by_length:
        return None
    lengths = sorted(by_length)
    return Alone(
        tuple(lengths),
        tuple(mean([ttft_s for ttft_s, _ in by_length[length]]) for length in lengths),
        tuple(mean([tpot_s for _, tpot_s in by_length[length]]) for length in lengths),
    )


def slowdown(answers: Sequence[Answer], alone: Alone, sent_alone: int) -> Slowdown | None:
    """None without a complete answer that has all three times."""
    ratios: dict[str, list[float]] = {name: [] for name in LIMITS}
    for answer in answers:
        if not answer.is_complete or answer.ttft_s is None or answer.tpot_s is None or answer.e2e_s is None:
            continue
        length = _prompt_tokens(answer)
        ttft_s, tpot_s = alone.ttft_of(length), alone.tpot_of(length)
        if ttft_s <= 0 or tpot_s <= 0:
            continue
        ratios["ttft"].append(answer.ttft_s / ttft_s)
        ratios["tbt"].append(answer.tpot_s / tpot_s)
        ratios["e2e"].append(answer.e2e_s / (ttft_s + (answer.tokens - 1) * tpot_s))
    count = len(ratios["ttft"])
    if not count:
        return None
    table = {
        name: {key: _cell(percentile(ratios[name], share), limits[key]) for key, share in SHARES.items()}
        for name, limits in LIMITS.items()
    }
    is_kept = all(cell.is_kept for row in table.values() for cell in row.values())
    is_whole = all(answer.is_complete for answer in answers)
    return Slowdown(table, is_kept and is_whole, count, len(answers), sent_alone)


def _cell(value: float, limit: float) -> Cell:
    return Cell(value, limit, value <= limit)


def _prompt_tokens(answer: Answer) -> int:
    return answer.asked_prompt_tokens or answer.prompt_tokens or 0


def _between(places: Sequence[int], values: Sequence[float], place: int) -> float:
    """On the line between the two next ones; the last one beyond them."""
    above = bisect_left(places, place)
    if above == 0:
        return values[0]
    if above == len(places):
        return values[-1]
    share = (place - places[above - 1]) / (places[above] - places[above - 1])
    return values[above - 1] + share * (values[above] - values[above - 1])
