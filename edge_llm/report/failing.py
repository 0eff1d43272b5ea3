"""Requests that came to nothing, in two records beside each other: of which kind, how many. Pure.

Owns what counts as a failure, wherever it stands in a tree of figures, and the test of two shares of completed
requests. Refuses to know verdicts and records.

Records say `failed: n`, or `failed: {kind: n}` with only the kinds that happened: a kind that one side does not name
happened 0 times there, or a first failure would be a figure of one side alone, which nobody judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from edge_llm.bench.stats import least_p, rank_test

Path = tuple[str, ...]
Numbers = Mapping[Path, float | bool]
COMPLETED_SHARE: Final = "completed_share"
_COUNTS: Final = ("failed", "lost", "refused_late")
_KINDS: Final = "failed"


class Completed(NamedTuple):
    """Shares of completed requests. `p`: of the test; None: so few requests that no test can show anything."""

    path: Path
    a: float
    b: float
    p: float | None


def is_failure(path: Path) -> bool:
    """Whether a figure counts failures, of all kinds or of one."""
    return path[-1] in _COUNTS or _KINDS in path


def with_kinds_of(figures: Numbers, others: Numbers) -> dict[Path, float | bool]:
    """The figures, and 0 for each kind of failure that only the others name, of what both measured."""
    measured = {path[:depth] for path in figures for depth in range(len(path))}
    missing = (path for path in others if path not in figures and _KINDS in path[:-1])
    return {**figures, **{path: 0 for path in missing if path[: path.index(_KINDS)] in measured}}


def completed_shares(a: Numbers, b: Numbers, alpha: float) -> Iterator[Completed]:
    """Wherever both sides count requests and completed ones."""
    for path in a:
        if path[-1] != "completed":
            continue
        of_a, of_b = _counts(a, path), _counts(b, path)
        if of_a is None or of_b is None:
            continue
        (done_a, all_a), (done_b, all_b) = of_a, of_b
        is_enough = least_p(all_a, all_b) <= alpha
        # a request is a sample of 0 or 1: exact for few of them, as Fisher's test is
        p = rank_test(_outcomes(*of_a), _outcomes(*of_b)) if is_enough else None
        yield Completed((*path[:-1], COMPLETED_SHARE), done_a / all_a, done_b / all_b, p)


def _counts(figures: Numbers, path: Path) -> tuple[int, int] | None:
    """Completed and all requests; None where there are none, or where these are means of several passes."""
    done, count = figures.get(path), figures.get((*path[:-1], "requests"))
    is_counted = isinstance(done, int) and isinstance(count, int) and 0 <= done <= count and count > 0
    return (int(done), int(count)) if is_counted and done is not None and count is not None else None


def _outcomes(done: int, count: int) -> list[float]:
    return [1.0] * done + [0.0] * (count - done)
