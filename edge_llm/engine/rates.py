"""How long this engine's work takes, fitted while it works: seconds as sums of a few products.

    decode call  = run_s + row_s * rows + cell_s * (KV cells read by all rows)
    prompt piece = call_s + token_s * n + pair_s * n * (p0 + p1) / 2

Quadratic in the prompt, linear in context and batch: the form DistServe fits (papers.md 3.4). Owns the fit; refuses to
know engines, clocks and networks. Pure: durations come in, coefficients go out.

Method: least squares on relative errors with forgetting, kept as decayed sums (a normal matrix and a vector), solved
for coefficients >= 0. A first estimate pulls with little, constant weight: a direction that the work never varies (one
row, one depth) keeps the shape of that estimate instead of drifting.
Guards: a duration that is not finite and positive is ignored; one that is far off what is expected (the process was
stopped for a while) counts as `_SURPRISE` times that, unless the last few were as far off on the same side: then the
machine has changed.

Thread rule: one thread observes, any thread reads; what is read belongs together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Final

Vector = tuple[float, float, float]
Matrix = tuple[Vector, Vector, Vector]

# About the last 200 samples count, 1,000 steps once the law is known: at 10 ms they forget a throttled minute in 10 s.
_FORGETTING: Final = 0.995
_LEARNT: Final = 64
# Pieces must differ in length before a call can be told from its tokens.
_LEARNT_PIECES: Final = 16
_OBSERVED_STEPS: Final = 5  # odd: prompt work of two kinds takes turns beside decode steps
_SURPRISE: Final = 1.5
_BELIEVED_AFTER: Final = 4
# Weight of a first estimate against one sample; the sums hold up to 1 / (1 - _FORGETTING) samples.
_KNOWN_WEIGHT: Final = 0.02
# Where nothing is known at first a coefficient may be anything up to a whole duration, at next to no price; beside
# others that are known it takes a smaller part of what they do not explain.
_UNKNOWN_WEIGHT: Final = 2e-4
_SIDE_SHARE: Final = 0.1


@dataclass(frozen=True, slots=True)
class Rates:
    """Coefficients in seconds; all 0 with `decode_samples` or `prompt_samples` 0 means nothing is known."""

    run_s: float = 0.0
    row_s: float = 0.0
    cell_s: float = 0.0
    call_s: float = 0.0
    token_s: float = 0.0
    pair_s: float = 0.0
    decode_samples: int = 0
    prompt_samples: int = 0


NOTHING_KNOWN: Final = Rates()


@dataclass(frozen=True, slots=True)
class _Sums:
    """Decayed sums over samples, each divided by its expected duration. Replaced as a whole."""

    matrix: Matrix = ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    vector: Vector = (0.0, 0.0, 0.0)
    count: int = 0
    largest: Vector = (1.0, 1.0, 1.0)


class Fit:
    """One linear law of three products, coefficients >= 0."""

    def __init__(self, first: Vector = (0.0, 0.0, 0.0)) -> None:
        self._first = first
        self._sums = _Sums()
        self._expected = first
        self._surprises = 0  # in a row, > 0 slower than expected, < 0 faster

    @property
    def samples(self) -> int:
        return self._sums.count

    @property
    def expected(self) -> Vector:
        """The coefficients as last solved: they may lag a few samples behind, and cost nothing."""
        return self._expected

    def observe(self, features: Vector, seconds: float) -> None:
        """Take one sample. Features are counts >= 0, the first one 1."""
        if not (math.isfinite(seconds) and seconds > 0.0):
            return
        expected_s = _dot(self._expected, features)
        if expected_s > 0.0:
            seconds = self._credible(seconds, expected_s)
        about_s = expected_s if expected_s > 0.0 else seconds
        weight = 1.0 / (about_s * about_s)
        old = self._sums
        matrix = tuple(
            tuple(_FORGETTING * old.matrix[i][j] + weight * features[i] * features[j] for j in range(3))
            for i in range(3)
        )
        vector = tuple(_FORGETTING * old.vector[i] + weight * seconds * features[i] for i in range(3))
        largest = tuple(max(now, before) for now, before in zip(features, old.largest, strict=True))
        self._sums = _Sums(matrix, vector, old.count + 1, largest)  # type: ignore[arg-type]
        # solving costs more than adding: what is expected may lag behind, while little is known it must not
        if old.count < 16 or old.count % 16 == 0:
            self._expected = self.solve()

    def _credible(self, seconds: float, expected_s: float) -> float:
        side = (seconds > expected_s * _SURPRISE) - (seconds < expected_s / _SURPRISE)
        self._surprises = self._surprises + side if side * self._surprises > 0 else side
        if not side or abs(self._surprises) > _BELIEVED_AFTER:
            return seconds
        return min(max(seconds, expected_s / _SURPRISE), expected_s * _SURPRISE)

    def solve(self) -> Vector:
        """The coefficients now; the first estimate when nothing was seen."""
        sums = self._sums
        if not sums.count:
            return self._first
        matrix, vector = [list(row) for row in sums.matrix], list(sums.vector)
        mean_s = sums.vector[0] / sums.matrix[0][0] if sums.matrix[0][0] else 0.0
        is_blank = not any(self._first)
        for i in range(3):
            # how much of this coefficient costs as much as one sample that is off by its whole duration
            unknown = (1.0 if is_blank else _SIDE_SHARE) * mean_s / sums.largest[i]
            scale = max(self._first[i], unknown, 1e-15)
            ridge = (_UNKNOWN_WEIGHT if is_blank else _KNOWN_WEIGHT) / (scale * scale)
            matrix[i][i] += ridge
            vector[i] += ridge * self._first[i]
        return _non_negative(matrix, vector)


class RateBook:
    """Both laws of one engine."""

    def __init__(self, first: Rates = NOTHING_KNOWN) -> None:
        self._decode = Fit((first.run_s, first.row_s, first.cell_s))
        self._prompt = Fit((first.call_s, first.token_s, first.pair_s))
        self._steps, self._knows_calls = 0, first.call_s > 0.0

    def begin_step(self) -> bool:
        """Whether the decode calls of the step that begins shall be observed: all while little is known, then every
        fifth step. Observing costs as much as drawing a token."""
        self._steps += 1
        return self._decode.samples < _LEARNT or self._steps % _OBSERVED_STEPS == 0

    @property
    def decode_law(self) -> Vector:
        """(run_s, row_s, cell_s) as last solved."""
        return self._decode.expected

    def step_s(self, rows: int, cells: int) -> float | None:
        """A decode step of one call; None while too little is known."""
        return _dot(self._decode.expected, (1.0, rows, cells)) if self._decode.samples >= _BELIEVED_AFTER else None

    def tokens_in(self, seconds: float, p0: int) -> float | None:
        """How long a prompt piece from position p0 on is that takes so long; None while too little is known."""
        call_s, token_s, pair_s = self._prompt.expected
        each_s = token_s + pair_s * p0
        if (self._prompt.samples < _LEARNT_PIECES and not self._knows_calls) or each_s <= 0.0:
            return None
        return (seconds - call_s) / each_s

    def on_decode(self, rows: int, cells: int, seconds: float) -> None:
        """A decode call of `rows` rows that read `cells` KV cells in all."""
        self._decode.observe((1.0, float(rows), float(cells)), seconds)

    def on_prompt(self, p0: int, p1: int, seconds: float) -> None:
        """A prompt piece, positions [p0, p1)."""
        self._prompt.observe((1.0, float(p1 - p0), (p1 - p0) * (p0 + p1) / 2), seconds)

    @property
    def rates(self) -> Rates:
        run_s, row_s, cell_s = self._decode.solve()
        call_s, token_s, pair_s = self._prompt.solve()
        return Rates(run_s, row_s, cell_s, call_s, token_s, pair_s, self._decode.samples, self._prompt.samples)


def _non_negative(matrix: list[list[float]], vector: list[float]) -> Vector:
    """Least squares with coefficients >= 0: three unknowns have few enough supports to try them all."""
    best, best_cost = (0.0, 0.0, 0.0), 0.0
    for size in (3, 2, 1):
        for support in combinations(range(3), size):
            found = _solve([[matrix[i][j] for j in support] for i in support], [vector[i] for i in support])
            if found is None or min(found) < 0.0:
                continue
            # at a minimum on its support the cost falls by vector . x / 2
            cost = -sum(vector[i] * x for i, x in zip(support, found, strict=True))
            if cost < best_cost:
                full = [0.0, 0.0, 0.0]
                for i, x in zip(support, found, strict=True):
                    full[i] = x
                best, best_cost = (full[0], full[1], full[2]), cost
    return best


def _solve(matrix: list[list[float]], vector: list[float]) -> list[float] | None:
    """Gaussian elimination on a symmetric positive matrix, scaled to a diagonal of ones; None when it is singular."""
    n = len(vector)
    if any(matrix[i][i] <= 0.0 for i in range(n)):
        return None
    scale = [1.0 / math.sqrt(matrix[i][i]) for i in range(n)]
    rows = [[matrix[i][j] * scale[i] * scale[j] for j in range(n)] + [vector[i] * scale[i]] for i in range(n)]
    for i in range(n):
        if rows[i][i] < 1e-12:
            return None
        for k in range(i + 1, n):
            factor = rows[k][i] / rows[i][i]
            rows[k] = [a - factor * b for a, b in zip(rows[k], rows[i], strict=True)]
    found = [0.0] * n
    for i in reversed(range(n)):
        found[i] = (rows[i][n] - sum(rows[i][j] * found[j] for j in range(i + 1, n))) / rows[i][i]
    return [x * s for x, s in zip(found, scale, strict=True)]


def _dot(a: Vector, b: Vector) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
