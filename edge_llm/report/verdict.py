"""A comparison of two records in words and aligned Markdown tables. Pure.

Owns the order (what is worse comes first) and the warnings. Refuses to know how the verdicts came about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from edge_llm.report.compare import Comparison, FigureChange, SampleChange, Side, Verdict
from edge_llm.report.document import Table
from edge_llm.report.failing import COMPLETED_SHARE
from edge_llm.report.markdown import aligned
from edge_llm.report.surroundings import Difference
from edge_llm.report.words import NOT_READ, Better, of_sample, short, shown

_SAID: Final[dict[Verdict, str]] = {
    "worse": "WORSE",
    "better": "better",
    "changed": "changed",
    "same": "same",
    "too_few": "not testable",
    "untested": "",
}
_ORDER: Final[tuple[Verdict, ...]] = ("worse", "better", "changed", "same", "too_few", "untested")
_AREAS: Final = {
    "machine": "DIFFERENT MACHINES: ratios compare boards, not versions",
    "model": "DIFFERENT MODEL FILES: ratios compare models",
    "engine": "DIFFERENT BUILDS of what computes",
    "workload": "DIFFERENT WORKLOADS: ratios compare what was asked",
    "run": "NOT BOTH RUNS ARE WHOLE",
}
_MOST_NAMES: Final = 10
_JUDGED: Final = (Better.HIGHER.value, Better.LOWER.value)
# An untested figure that moved by less is not said to lean.
_LEANS: Final = 0.01


def written(found: Comparison, *, only_changed: bool = False, shows_all: bool = False) -> str:
    """`only_changed`: what is proven to differ. `shows_all`: figures that are equal in both, too: most of a record are
    settings, and counts of what was asked."""
    lines = [f"# bench {found.kind}", "", *_side("A", found.a), *_side("B", found.b), ""]
    lines += _same_run(found)
    lines += _warnings(found.differences)
    lines += _samples(found, only_changed=only_changed)
    lines += _figures(found.figures, only_changed=only_changed, shows_all=shows_all)
    lines += _only("A", found.only_in_a)
    lines += _only("B", found.only_in_b)
    lines += _conclusion(found)
    return "\n".join(lines) + "\n"


def _side(name: str, side: Side) -> Iterator[str]:
    commit = side.commit[:10] if side.commit else "unknown"
    yield f"- {name}: {side.file} ({side.started_at[:16].replace('T', ' ')}, commit {commit}, {side.machine})"


def _same_run(found: Comparison) -> Iterator[str]:
    if found.a.run_id == found.b.run_id:
        yield from ("**A AND B ARE THE SAME RUN (one file, or a copy of it): nothing can differ**", "")


def _warnings(differences: Sequence[Difference]) -> Iterator[str]:
    for area in dict.fromkeys(one.area for one in differences if one.is_loud):
        yield f"**{_AREAS[area]}**"
        yield ""
        yield from (_line(one) for one in differences if one.area == area and one.is_loud)
        yield ""
    quiet = [one for one in differences if not one.is_loud]
    if quiet:
        yield from ("What else differs:", "", *map(_line, quiet), "")


def _line(one: Difference) -> str:
    return f"- {one.area}, {one.what}: {one.a or NOT_READ} | {one.b or NOT_READ}"


def _samples(found: Comparison, *, only_changed: bool) -> Iterator[str]:
    kept = [one for one in found.samples if not only_changed or one.verdict in ("worse", "better", "changed")]
    if not kept:
        return
    kept.sort(key=lambda one: _ORDER.index(one.verdict))
    columns = ("samples", "n", "A", "B", "B/A (95 %)", "p", "p95 of A", "p95 of B", "")
    yield from aligned(Table("", columns, tuple(_sample(one) for one in kept)))
    yield ""
    yield (
        f"A, B: medians. Interval: bootstrap of the ratio of medians. p: Mann-Whitney, two-sided, at {found.alpha:g}; "
        f"{found.tests} tests, of which about {found.by_chance:g} would differ between two runs of the same. "
        "Tails are shown, not tested."
    )
    yield ""


def _sample(one: SampleChange) -> tuple[str, ...]:
    path = of_sample(one.name)
    ratio = NOT_READ if one.ratio is None else short(one.ratio)
    if one.verdict != "too_few" and one.low is not None and one.high is not None:  # of few values it is no interval
        ratio += f" ({short(one.low)} to {short(one.high)})"
    return (
        one.name,
        f"{one.n_a}, {one.n_b}",
        shown(path, one.median_a),
        shown(path, one.median_b),
        ratio,
        NOT_READ if one.p is None else f"{one.p:.2g}",
        shown(path, one.p95_a),
        shown(path, one.p95_b),
        _sample_word(one),
    )


def _sample_word(one: SampleChange) -> str:
    word = _word(one.verdict, one.better)
    return f"{word} {_leaning(one)}".rstrip() if one.verdict == "too_few" else word


def _figures(figures: Sequence[FigureChange], *, only_changed: bool, shows_all: bool) -> Iterator[str]:
    kept = [one for one in figures if not only_changed or one.verdict in ("worse", "better", "changed")]
    if not shows_all and not only_changed:
        kept = [one for one in kept if one.a != one.b or one.verdict == "too_few"]
        if hidden := len(figures) - len(kept):
            yield from (f"{hidden} of {len(figures)} figures are equal in both: --all shows them.", "")
    if not kept:
        return
    kept.sort(key=lambda one: _ORDER.index(one.verdict) if one.verdict in ("worse", "better", "changed") else 3)
    rows = tuple(
        (
            " / ".join(one.path),
            shown(one.path, one.a),
            shown(one.path, one.b),
            NOT_READ if one.ratio is None else short(one.ratio),
            _word(one.verdict, one.better) or _leaning(one),
        )
        for one in kept
    )
    yield from aligned(Table("", ("figures", "A", "B", "B/A", ""), rows))
    yield ""


def _word(verdict: Verdict, way: str) -> str:
    """A figure of somebody else's that changed tells of the machine."""
    return "changed (not ours)" if verdict == "changed" and way == "reference" else _SAID[verdict]


def _leaning(one: FigureChange | SampleChange) -> str:
    """Of what was not tested: which way it went, if it went anywhere."""
    if one.worse_by is None or abs(one.worse_by) < _LEANS:
        return ""
    return "(worse)" if one.worse_by > 0 else "(better)"


def _only(name: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        rest = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        yield from (f"Only in {name}: {'; '.join(names[:_MOST_NAMES])}{rest}", "")


def _conclusion(found: Comparison) -> Iterator[str]:
    over = f" by more than {found.fail_over:.1%}" if found.fail_over is not None else ""
    untested = _untested(found)
    if not found.is_tested and not found.regressions:
        yield "**NOTHING COULD BE TESTED: whether B is worse is not known.**"
    elif found.regressions:
        yield from (f"Significantly worse{over}:", "", *(f"- {line}" for line in found.regressions))
    else:
        what = "Nothing that could be tested" if untested else "Nothing"
        yield f"{what} is significantly worse{over}."
    if untested:
        yield from ("", f"Not testable: {'; '.join(untested)}.")


def _untested(found: Comparison) -> list[str]:
    """Silence about these is no verdict. Of figures, those of which one way is better and that differ."""
    parts = []
    samples = sum(one.verdict == "too_few" for one in found.samples)
    shares = [one for one in found.figures if one.path[-1] == COMPLETED_SHARE]
    few = sum(one.verdict == "too_few" for one in shares)
    figures = sum(one.verdict == "untested" and one.better in _JUDGED for one in found.figures)
    if samples:
        parts.append(f"{samples} of {len(found.samples)} samples (too few values)")
    if few:
        parts.append(f"{few} of {len(shares)} shares of completed requests (too few requests)")
    if figures:
        parts.append(f"{figures} of {len(found.figures)} figures (they differ, and have no interval)")
    return parts
