"""What records say of each claim: it holds, it does not, or it was not tested here, with the figures. Pure.

Owns the choice of the records that decide, the walk to their figures, and the verdicts (msgspec structs: their JSON
schema is published). Refuses to know files and how anything was run.

Rules: what is missing is never guessed: no figure, no verdict. The newest full run decides, a quick one only where
there is no other. A run that was cut short, or in which something could not be measured, can refute a claim of which
one counterexample decides, and can confirm none. Runs of parts (some kinds of faults, one model of two) are read
together, each part from the newest run that has it; a part that lacks what a claim needs leaves it to the others, and
that is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Final, Literal

import msgspec

from edge_llm.bench.claims import Bar, Claim
from edge_llm.bench.claims_plan import STEPS, Step
from edge_llm.bench.record import Node, Record

HOLDS: Final = "holds"
MISSED: Final = "does not hold"
UNTESTED: Final = "not tested here"
Value = bool | float | str | None
Word = Literal["holds", "does not hold", "not tested here"]
_MACHINES: Final = {"x86_64": "x86-64", "aarch64": "arm64"}


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure: `where` in the record it is, and whether it keeps its bar; null: it could not be read."""

    words: str
    unit: str
    where: str
    value: Value
    keeps: bool | None


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """`records`: names of the files that decided. `counted`: what the figures were taken of. `reason`: why it was not
    tested, or what could not decide beside what did."""

    id: str
    sentence: str
    bar: str
    source: str
    verdict: Word
    reason: str = ""
    figures: list[Figure] = []
    counted: list[Figure] = []
    command: str = ""
    records: list[str] = []
    is_quick: bool = False


@dataclass(frozen=True, slots=True)
class Evidence:
    """A record under the name of its file, as it is to be linked."""

    file: str
    record: Record


# -- which records decide


@dataclass(frozen=True, slots=True)
class _Said:
    """Figures of one run, or of the parts of several. `partial`: why it confirms nothing."""

    figures: Mapping[str, Any]
    files: tuple[str, ...]
    is_quick: bool
    partial: str = ""


def judged(claim: Claim, evidence: Sequence[Evidence], reason: str = "") -> Verdict:
    """`evidence` in any order, of any kind. `reason`: why nothing was run for it, if somebody knows."""
    step = STEPS[claim.step]
    ours = [one for one in evidence if step.left(one.record)]
    ours.sort(key=lambda one: one.record.started_at, reverse=True)
    if not ours:
        return _verdict(claim, UNTESTED, reason or f"no record of `{step.command_words}`")
    chosen, cut = _chosen(claim, step, ours)
    for said in cut if claim.one_refutes else ():
        first = _read(claim.bars[0], said.figures)
        if any(figure.keeps is False for figure in first):
            return _verdict(claim, MISSED, "", said, first)
    if chosen is None:
        return _verdict(claim, UNTESTED, reason or f"its run is no evidence: {cut[0].partial}", cut[0])
    return _decided(claim, *_with_occasion(claim, step.parts, chosen))


def _chosen(claim: Claim, step: Step, ours: Sequence[Evidence]) -> tuple[_Said | None, list[_Said]]:
    """Who decides, and what was cut short after it; newest first."""
    said = [_said(claim, step, one) for one in ours]
    whole = [one for one in said if not one.partial]
    best = [one for one in whole if not one.is_quick] or whole
    if not best:
        return None, said
    cut = [one for one in said[: said.index(best[0])] if one.partial]
    return (_together(step.parts, best) if step.parts else best[0]), cut


def _said(claim: Claim, step: Step, one: Evidence) -> _Said:
    record, partial = one.record, ""
    if not record.is_complete:
        partial = "it was cut short"
    elif record.failures and not claim.is_of_what_there_is:
        first = record.failures[0]
        partial = f"{first.what}: {first.why}"
    return _Said(record.figures, (one.file,), step.is_quick(record), partial)


def _together(parts: str, runs: Sequence[_Said]) -> _Said:
    """Each part from the newest run that has it; whatever is beside the parts from the newest of all."""
    members: dict[str, Any] = {}
    files: list[str] = []
    for run in runs:
        added = {name: one for name, one in _object(run.figures.get(parts)).items() if name not in members}
        if added:
            members |= added
            files += run.files
    return replace(runs[0], figures={**runs[0].figures, parts: members}, files=tuple(files) or runs[0].files)


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


# -- what they say


def _with_occasion(claim: Claim, parts: str, said: _Said) -> tuple[_Said, str]:
    """What is left of a run when the parts that cannot decide are left out, where others can; and why these cannot."""
    members = _object(said.figures.get(parts))
    lacks = {name: _lack(claim, {**said.figures, parts: {name: one}})[0] for name, one in members.items()}
    kept = {name: one for name, one in members.items() if not lacks[name]}
    if not kept:
        return said, ""
    words = "; ".join(f"{name}: {why}" for name, why in lacks.items() if why)
    return replace(said, figures={**said.figures, parts: kept}), words


def _lack(claim: Claim, figures: Mapping[str, Any]) -> tuple[str, list[Figure]]:
    """What a claim needs and is not there, with the figures that say so; empty: everything is."""
    for need in claim.needs:
        found = _read(need.bar, figures)
        if not found:
            return f"the record has no {need.bar.path}", []
        if any(figure.keeps is not True for figure in found):
            return need.otherwise, found
    return _unsure(claim, figures)


def _unsure(claim: Claim, figures: Mapping[str, Any]) -> tuple[str, list[Figure]]:
    """Figures that keep their limit, and whose intervals do not; and what is to be said of these."""
    said, found = list[str](), list[Figure]()
    for bar in claim.bars if figures else ():
        for figure in _read(bar, figures) if bar.has_interval else ():
            around = figure.where.rpartition("/")[0]
            ends = [value for end in ("low", "high") for _, value in figures_at(figures, f"{around}/{end}")]
            if figure.keeps and any(keeps(end, bar) is False for end in ends):
                said.append(f"{shown(figure.value, bar.unit)} ({' to '.join(shown(end, bar.unit) for end in ends)})")
                found.append(figure)
    return (f"too few requests to tell: {', '.join(said)}" if said else ""), found


def _decided(claim: Claim, said: _Said, beside: str) -> Verdict:
    """`beside`: what else is to be said of a verdict."""
    why, shows = _lack(claim, said.figures)
    if why:
        return _verdict(claim, UNTESTED, why, said, shows)
    if claim.needs_full and said.is_quick:
        return _verdict(claim, UNTESTED, "a quick run is too short for it", said)
    groups = [_read(bar, said.figures) for bar in claim.bars]
    figures = [figure for group in groups for figure in group]
    if any(figure.keeps is False for figure in figures):
        return _verdict(claim, MISSED, beside, said, figures)
    for bar, group in zip(claim.bars, groups, strict=True):
        if not group:
            return _verdict(claim, UNTESTED, f"the record has no {bar.path}", said, figures)
    if unread := [figure.where for figure in figures if figure.keeps is None]:
        return _verdict(claim, UNTESTED, f"could not be read: {', '.join(unread)}", said, figures)
    return _verdict(claim, HOLDS, beside, said, figures)


def _verdict(
    claim: Claim, word: Word, reason: str, said: _Said | None = None, figures: Sequence[Figure] = ()
) -> Verdict:
    return Verdict(
        id=claim.id,
        sentence=claim.sentence,
        bar=bar_words(claim),
        source=claim.source,
        verdict=word,
        reason=reason,
        figures=list(figures),
        counted=[figure for bar in claim.counted for figure in _read(bar, said.figures)] if said else [],
        command=STEPS[claim.step].command_words,
        records=list(said.files) if said else [],
        is_quick=said.is_quick if said else False,
    )


def _read(bar: Bar, figures: Mapping[str, Any]) -> list[Figure]:
    return [
        Figure(words=bar.words, unit=bar.unit, where=where, value=value, keeps=keeps(value, bar))
        for where, value in _values(bar, figures)
    ]


def _values(bar: Bar, figures: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    for where, value in figures_at(figures, bar.path):
        if not bar.less:
            yield where, value
            continue
        off = next((one for _, one in figures_at(figures, f"{where.rpartition('/')[0]}/{bar.less}")), None)
        is_known = isinstance(value, int | float) and isinstance(off, int | float)
        yield f"{where} - {bar.less}", float(value) - float(off) if is_known else None  # type: ignore[arg-type]


def figures_at(figures: object, path: str) -> Iterator[tuple[str, Value]]:
    """Every figure that a path of a bar leads to, and where it is."""
    yield from _at(figures, path.split("/"), ())


def _at(tree: object, path: Sequence[str], gone: tuple[str, ...]) -> Iterator[tuple[str, Value]]:
    if not path:
        if tree is None or isinstance(tree, bool | int | float | str):
            yield "/".join(gone), tree
        return
    head, rest = path[0], path[1:]
    if head == "#" and isinstance(tree, Sequence | Mapping) and not isinstance(tree, str):
        yield "/".join(gone), len(tree)
    elif isinstance(tree, Mapping):
        for name in tree if head not in tree else (head,):
            if name == head or fnmatchcase(name, head):
                yield from _at(tree[name], rest, (*gone, name))
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        for number, one in enumerate(tree):
            if head in ("*", str(number)):
                yield from _at(one, rest, (*gone, str(number)))


def keeps(value: object, bar: Bar) -> bool | None:
    """None: there is nothing to compare."""
    if value is None:
        return None
    if bar.direction == "is":
        return value == bar.limit
    if isinstance(value, str | bool) or not isinstance(value, int | float) or isinstance(bar.limit, str):
        return None
    match bar.direction:
        case "at most":
            return value <= bar.limit
        case "at least":
            return value >= bar.limit
        case "below":
            return value < bar.limit


# -- words


def bar_words(claim: Claim) -> str:
    """All bars of a claim; one that several figures share is said once."""
    said = dict.fromkeys(_of_bar(bar) for bar in claim.bars)
    return ", ".join(said)


def _of_bar(bar: Bar) -> str:
    if bar.direction == "is":
        return bar.words if bar.limit is True else f"{bar.words} {bar.limit}".strip()
    if bar.direction == "at most" and bar.limit == 0:
        return f"0 {bar.words}".strip()
    return f"{bar.direction} {shown(bar.limit, bar.unit)} {bar.words}".strip()


def shown(value: Value, unit: str = "") -> str:
    """A figure for people."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if unit == "%":
        return f"{_three(100 * value)} %"
    return f"{_three(value)} {unit}".strip()


def _three(value: float) -> str:
    """Three digits, more only before the point."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def board_words(node: Node) -> str:
    """What a column of the table is called: a board's name without model and revision, or a machine's size."""
    if node.board:
        return node.board.partition(" Model ")[0].partition(" Rev ")[0]
    machine = _MACHINES.get(node.machine, node.machine)
    return f"{machine}, {node.cores} core{'' if node.cores == 1 else 's'}"


def counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    found = Counter(verdict.verdict for verdict in verdicts)
    return {word.replace(" ", "_"): found[word] for word in (HOLDS, MISSED, UNTESTED)}
