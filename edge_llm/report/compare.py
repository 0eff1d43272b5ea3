"""Two records of one kind beside each other: what changed, for better or worse, and whether chance explains it. Pure.

Owns the verdicts and the JSON of `bench compare`. Refuses to know files and how results are printed.

Rules: raw samples are tested (Mann-Whitney, two-sided: does one run tend to larger values?), the ratio of their medians
has a bootstrap interval, seed fixed. Which way is better is words.py's. A figure with an interval of its own (`low`,
`high`) changed when the intervals are apart, and shares of completed requests when the rank test says so of their
outcomes; other figures are shown and not judged, but for promises (lost streams, equal token ids) and kinds of failure
that were not there before, of which one is one too many. Each record is one run: heat, neighbours and other boards
differ between runs as versions do, so what differs around them is said first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from edge_llm.bench.record import Record
from edge_llm.bench.stats import least_p, median, median_ratio_interval, percentile, rank_test
from edge_llm.errors import ClientError
from edge_llm.report.failing import Completed, completed_shares, is_failure, with_kinds_of
from edge_llm.report.surroundings import Difference, differences
from edge_llm.report.tables import telling
from edge_llm.report.words import Better, better, of_sample, unit

Verdict = Literal["better", "worse", "changed", "same", "too_few", "untested"]
ALPHA: Final = 0.05
_TAIL: Final = 20  # fewer samples have no 95th percentile worth a column
Path = tuple[str, ...]


class NotComparable(ClientError):
    """Two records that have nothing to do with each other."""

    code = "not_comparable"


class Side(msgspec.Struct, frozen=True):
    """Which record."""

    file: str
    run_id: str
    started_at: str
    machine: str
    commit: str | None
    tool_version: str


class SampleChange(msgspec.Struct, frozen=True):
    """`ratio` is B over A, of medians, with its 95 % interval; None: of nothing. `p`: of the rank test; None: not
    tested. `worse_by`: a share, more than 0 when B is worse; None: neither way is."""

    name: str
    unit: str
    better: str
    n_a: int
    n_b: int
    median_a: float
    median_b: float
    p95_a: float | None
    p95_b: float | None
    ratio: float | None
    low: float | None
    high: float | None
    p: float | None
    worse_by: float | None
    verdict: Verdict


class FigureChange(msgspec.Struct, frozen=True):
    """A figure as both commands printed it. `path`: of keys."""

    path: list[str]
    unit: str
    better: str
    a: float | bool
    b: float | bool
    ratio: float | None
    worse_by: float | None
    verdict: Verdict


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """`regressions`: significant and worse by more than `fail_over`, or a promise broken, as lines for people.
    `by_chance`: how many of the tests alone would find a difference between two runs of the same. `is_tested`:
    something could be judged at all; where it is false, no regression is no verdict."""

    kind: str
    a: Side
    b: Side
    alpha: float
    fail_over: float | None
    differences: list[Difference]
    samples: list[SampleChange]
    figures: list[FigureChange]
    only_in_a: list[str]
    only_in_b: list[str]
    tests: int
    by_chance: float
    regressions: list[str]
    is_tested: bool


def compare(a: Record, b: Record, files: tuple[str, str], fail_over: float | None, alpha: float = ALPHA) -> Comparison:
    """Raises NotComparable for records of different kinds, or without anything in common."""
    if a.kind != b.kind:
        raise NotComparable(f"{files[0]} is a record of bench {a.kind}, {files[1]} one of bench {b.kind}")
    samples = [_sample(name, values, b.samples[name], alpha) for name, values in _both(a.samples, b.samples)]
    of_a, of_b = numbers(a.figures), numbers(b.figures)
    of_a, of_b = with_kinds_of(of_a, of_b), with_kinds_of(of_b, of_a)
    shares = list(completed_shares(of_a, of_b, alpha))
    figures = [
        *(_share(one, alpha) for one in shares),
        *(_figure(path, of_a, of_b) for path in of_a if path in of_b),
    ]
    if not samples and not figures:
        raise NotComparable(f"{files[0]} and {files[1]} have no figure and no sample in common")
    tests = sum(sample.p is not None for sample in samples) + sum(share.p is not None for share in shares)
    limit = 0.0 if fail_over is None else fail_over
    names_a, names_b = _names(a, of_a), _names(b, of_b)
    return Comparison(
        kind=a.kind,
        a=_side(a, files[0]),
        b=_side(b, files[1]),
        alpha=alpha,
        fail_over=fail_over,
        differences=differences(a, b),
        samples=samples,
        figures=figures,
        only_in_a=[name for name in names_a if name not in names_b],
        only_in_b=[name for name in names_b if name not in names_a],
        tests=tests,
        by_chance=round(alpha * tests, 1),
        regressions=[*_regressed_samples(samples, limit), *_regressed_figures(figures, limit)],
        is_tested=tests > 0 if samples else _are_judged(figures),
    )


def schema() -> dict[str, Any]:
    """JSON schema of `bench compare --json`."""
    return msgspec.json.schema(Comparison)


def numbers(tree: Any, path: Path = ()) -> dict[Path, float | bool]:
    """Every number and claim of a tree of figures by its path; rows of a list by what tells them apart. Rows that
    nothing known tells apart, and lists of numbers, are left out: by place, other things would be compared."""
    if isinstance(tree, bool | int | float):
        return {path: tree} if math.isfinite(tree) else {}
    found: dict[Path, float | bool] = {}
    for name, value in _children(tree):
        found.update(numbers(value, (*path, name)))
    return found


def _children(tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        yield from ((str(name), value) for name, value in tree.items())
    elif isinstance(tree, list) and all(isinstance(row, Mapping) for row in tree):
        keys = telling(tree)
        yield from ((", ".join(f"{key} {row[key]}" for key in keys), row) for row in tree if keys)


# -- samples


def _both(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, Sequence[float]]]:
    yield from ((name, values) for name, values in a.items() if values and b.get(name))


def _sample(name: str, a: Sequence[float], b: Sequence[float], alpha: float) -> SampleChange:
    path = of_sample(name)
    way, (before, after) = better(path), (median(a), median(b))
    interval = median_ratio_interval(b, a) if before else None
    is_enough = least_p(len(a), len(b)) <= alpha
    p = rank_test(a, b) if is_enough else None
    worse_by = _worse_by(way, before, after)
    return SampleChange(
        name=name,
        unit=unit(path),
        better=way.value,
        n_a=len(a),
        n_b=len(b),
        median_a=before,
        median_b=after,
        p95_a=percentile(a, 0.95) if len(a) >= _TAIL else None,
        p95_b=percentile(b, 0.95) if len(b) >= _TAIL else None,
        ratio=after / before if before else None,
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        p=p,
        worse_by=worse_by,
        verdict="too_few" if p is None else _verdict(worse_by, is_changed=p <= alpha),
    )


def _worse_by(way: Better, before: float, after: float) -> float | None:
    """A share of what there was; infinitely much more than nothing is 1, since JSON has no infinity."""
    if way not in (Better.HIGHER, Better.LOWER):
        return None
    change = (after - before) / abs(before) if before else float((after > before) - (after < before))
    return -change if way is Better.HIGHER else change


def _verdict(worse_by: float | None, *, is_changed: bool) -> Verdict:
    if not is_changed:
        return "same"
    if worse_by is None:
        return "changed"
    return "worse" if worse_by > 0 else "better" if worse_by < 0 else "changed"


def _regressed_samples(samples: Sequence[SampleChange], limit: float) -> Iterator[str]:
    for one in samples:
        if one.verdict == "worse" and one.worse_by is not None and one.worse_by > limit:
            yield f"{one.name}: worse by {one.worse_by:.1%} (p {one.p:.2g}, n {one.n_a} and {one.n_b})"


# -- figures


def _share(one: Completed, alpha: float) -> FigureChange:
    """Of completed requests: a worker that fails half of them may answer the others as fast as ever."""
    way = better(one.path)
    worse_by = _worse_by(way, one.a, one.b)
    return FigureChange(
        path=list(one.path),
        unit=unit(one.path),
        better=way.value,
        a=one.a,
        b=one.b,
        ratio=one.b / one.a if one.a else None,
        worse_by=worse_by,
        verdict="too_few" if one.p is None else _verdict(worse_by, is_changed=one.p <= alpha),
    )


def _figure(path: Path, of_a: Mapping[Path, float | bool], of_b: Mapping[Path, float | bool]) -> FigureChange:
    a, b, way = of_a[path], of_b[path], better(path)
    worse_by = _worse_by(way, float(a), float(b))
    return FigureChange(
        path=list(path),
        unit=unit(path),
        better=way.value,
        a=a,
        b=b,
        ratio=float(b) / float(a) if a and not isinstance(a, bool) else None,
        worse_by=worse_by,
        verdict=_figure_verdict(path, of_a, of_b, way, worse_by),
    )


def _figure_verdict(
    path: Path,
    of_a: Mapping[Path, float | bool],
    of_b: Mapping[Path, float | bool],
    way: Better,
    worse_by: float | None,
) -> Verdict:
    a, b = of_a[path], of_b[path]
    if a == b:
        return "same"
    if way is Better.PROMISE:
        return "worse" if _is_broken(a, b) else "better"
    if is_failure(path) and not a and isinstance(b, int):
        return "changed" if way is Better.REFERENCE else "worse"
    ends = [(of.get((*path[:-1], "low")), of.get((*path[:-1], "high"))) for of in (of_a, of_b)]
    if path[-1] in ("low", "high") or any(low is None or high is None for low, high in ends):
        return "untested"
    (low_a, high_a), (low_b, high_b) = ends
    if not (low_a <= a <= high_a and low_b <= b <= high_b):  # type: ignore[operator]
        return "untested"  # the interval is another figure's
    is_apart = high_a < low_b or high_b < low_a  # type: ignore[operator]
    return _verdict(worse_by, is_changed=is_apart)


def _is_broken(a: float | bool, b: float | bool) -> bool:
    """A claim that holds no more, or more of what there should be none of."""
    return bool(a) and not b if isinstance(a, bool) or isinstance(b, bool) else b > a


def _are_judged(figures: Sequence[FigureChange]) -> bool:
    """Any that differs has a verdict; or nothing differs."""
    different = [one for one in figures if one.a != one.b]
    return not different or any(one.verdict not in ("too_few", "untested") for one in different)


def _regressed_figures(figures: Sequence[FigureChange], limit: float) -> Iterator[str]:
    for one in figures:
        is_promise = one.better == Better.PROMISE.value or is_failure(tuple(one.path))
        if one.verdict == "worse" and (is_promise or (one.worse_by is not None and one.worse_by > limit)):
            yield f"{' / '.join(one.path)}: was {one.a}, is {one.b}"


def _names(record: Record, figures: Mapping[Path, Any]) -> list[str]:
    return [*(f"sample {name}" for name, values in record.samples.items() if values), *map(" / ".join, figures)]


def _side(record: Record, file: str) -> Side:
    return Side(
        file=file,
        run_id=record.run_id,
        started_at=record.started_at.isoformat(),
        machine="; ".join(f"{node.board or node.cpu}, {len(node.usable_cores)} cores" for node in record.nodes),
        commit=record.source.commit,
        tool_version=record.tool_version,
    )
