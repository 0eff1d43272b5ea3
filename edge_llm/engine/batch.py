"""Which tokens go into the next llama_decode: pure arithmetic on positions, slots and measured seconds.

Owns three rules. Prompt pieces: end at the next absolute chunk border, or earlier when running streams leave less time.
Holes: llama.cpp splits a call whose sequence ids have holes into one graph run per
unbroken stretch (blueprint section 4); a hole is cheaper filled with a throw-away row when that row costs less than
another run. Depths: llama.cpp reads for every row of a graph run as many KV cells as its deepest row has
(llama_kv_cache::get_n_kv); a long sequence gets a call of its own when that costs less than making its neighbours
read as far.
Refuses to know engines, requests and clocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

# llama.cpp reads whole blocks of KV cells (llama_kv_cache::get_n_kv).
CELL_BLOCK: Final = 256
# A call costs something whatever a fit says: at 0 every row would get its own, and nothing else would be learnt.
_LEAST_RUN: Final = 0.05
# Weight of the newest sample in running means; about the last eight samples count.
_SMOOTHING: Final = 0.125


@dataclass(frozen=True, slots=True)
class RowCost:
    """Seconds of a decode call: `run_s` for each graph run (weights are read once), `row_s` for each row, `cell_s` for
    each KV cell that a row reads."""

    run_s: float
    row_s: float
    cell_s: float = 0.0

    @classmethod
    def fit(cls, one_row_s: float, many_rows_s: float, rows: int) -> RowCost:
        """From the time of a one-row call and of a call of `rows` rows."""
        if rows < 2:
            return cls(run_s=0.0, row_s=one_row_s)
        row_s = max(0.0, (many_rows_s - one_row_s) / (rows - 1))
        return cls(run_s=max(0.0, one_row_s - row_s), row_s=row_s)


def smoothed(mean: float, sample: float) -> float:
    """Running mean; the first sample is the mean."""
    return sample if mean == 0.0 else mean + _SMOOTHING * (sample - mean)


def next_border(position: int, chunk_tokens: int) -> int:
    """The first absolute multiple of `chunk_tokens` after `position`."""
    return (position // chunk_tokens + 1) * chunk_tokens


def piece_end(position: int, total: int, chunk_tokens: int, token_budget: int | None) -> int:
    """End of the prompt piece that starts at `position`: a chunk border, its end, or the budget (pacing.py)."""
    end = min(total, next_border(position, chunk_tokens))
    return end if token_budget is None else min(end, position + max(1, token_budget))


def fillers(slots: Sequence[int], filled: Set[int], cost: RowCost, cells: int = 0) -> list[int]:
    """Idle slots between running ones worth evaluating too, so that the call stays one graph run.

    `slots` is ascending; the deepest has `cells` KV cells, and a throw-away row beside it reads as many. Filling a hole
    of g slots costs g rows, leaving it costs one more run. A hole with a slot in it that holds KV (`filled`: its prompt
    is not done) stays: a row there would be a wrong position of that sequence.
    """
    chosen: list[int] = []
    row_s = cost.row_s + cells_read(cells) * cost.cell_s
    for left, right in pairwise(slots):
        hole = range(left + 1, right)
        if hole and len(hole) * row_s < cost.run_s and filled.isdisjoint(hole):
            chosen.extend(hole)
    return chosen


def cells_read(cells: int) -> int:
    """Cells that llama.cpp reads for a sequence of `cells` (llama_kv_cache::get_n_kv)."""
    return -(-cells // CELL_BLOCK) * CELL_BLOCK


def calls(cells: Sequence[int], cost: RowCost) -> list[range]:
    """The cheapest way to decode neighbouring slots with `cells` KV cells each: consecutive calls, as index ranges.

    One call reads max(cells) for each of its rows. Stretches of neighbours only: others would leave holes.
    """
    count, cells = len(cells), [cells_read(depth) for depth in cells]
    run_s = max(cost.run_s, _LEAST_RUN * cost.row_s)
    # a second call costs at least run_s and saves at most what one call reads in vain
    if (count * max(cells) - sum(cells)) * cost.cell_s <= run_s:
        return [range(count)]
    best_s = [0.0] + [math.inf] * count
    begins = [0] * (count + 1)
    for end in range(1, count + 1):
        deepest = 0
        for begin in reversed(range(end)):
            deepest = max(deepest, cells[begin])
            seconds = best_s[begin] + run_s + (end - begin) * deepest * cost.cell_s
            if seconds <= best_s[end]:  # of equals the wider one
                best_s[end], begins[end] = seconds, begin
    found: list[range] = []
    end = count
    while end:
        found.append(range(begins[end], end))
        end = begins[end]
    return found[::-1]
