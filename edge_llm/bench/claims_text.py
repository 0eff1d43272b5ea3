"""Claims in words: README's table, a list for a terminal, and lines of what was missed. Pure.

Owns the wording. Refuses to know how a verdict came about. A figure that misses its bar is in bold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from edge_llm.bench.claims import TOPICS
from edge_llm.bench.claims_judged import HOLDS, MISSED, UNTESTED, Figure, Verdict, shown

ALWAYS: Final = "Raspberry Pi 5"
_FEW: Final = 4
_BEGIN: Final = "<!-- claims -->"
_END: Final = "<!-- /claims -->"


def markdown(columns: Mapping[str, Sequence[Verdict]]) -> str:
    """A row for each claim, a column for each kind of board: those that were measured, and the one that this is for."""
    boards = [*(name for name in columns if name != ALWAYS), ALWAYS]
    by_board = {board: {verdict.id: verdict for verdict in columns.get(board, ())} for board in boards}
    rows = {verdict.id: verdict for verdicts in columns.values() for verdict in verdicts}
    lines = [_row("claim", "bar", *boards), _row(*["---"] * (2 + len(boards)))]
    for name, claim in rows.items():
        cells = (_cell(by_board[board].get(name)) for board in boards)
        lines.append(_row(f"`{name}` {claim.sentence}", claim.bar, *cells))
    return "\n".join(lines)


def table_between_marks(text: str) -> str | None:
    """The table that stands in a document between the marks; None: there are none."""
    _, begin, rest = text.partition(_BEGIN)
    table, end, _ = rest.partition(_END)
    return table.strip() if begin and end else None


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _cell(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    records = ", ".join(
        f"[{'record' if len(verdict.records) == 1 else number}]({file})"
        for number, file in enumerate(verdict.records, 1)
    )
    if verdict.verdict == UNTESTED:
        return f"{UNTESTED}: {verdict.reason}" + (f" ({records})" if verdict.figures else "")
    word = f"**{MISSED}**" if verdict.verdict == MISSED else HOLDS
    quick = ", a quick run" if verdict.is_quick else ""
    beside = f"; {verdict.reason}" if verdict.reason else ""
    return f"{word}: {figures_words(verdict, '**')} ({records}{quick}){beside}"


def figures_words(verdict: Verdict, mark: str = "") -> str:
    """The figures that decide, each bar's together, and what they were taken of. `mark`: around one that misses."""
    groups: dict[tuple[str, str], list[Figure]] = {}
    for figure in verdict.figures:
        groups.setdefault((figure.words, figure.unit), []).append(figure)
    said = [_group(figures, words, unit, mark) for (words, unit), figures in groups.items()]
    return ", ".join((*said, *_counted(verdict.counted)))


def _group(figures: Sequence[Figure], words: str, unit: str, mark: str) -> str:
    texts = [_marked(shown(figure.value, unit), figure, mark) for figure in figures]
    if len(dict.fromkeys(texts)) == 1:
        return _with(texts[0], words, figures[0].value)
    if len(texts) <= _FEW:
        return _with(", ".join(texts), words, None)
    numbers = sorted((figure for figure in figures if isinstance(figure.value, int | float)), key=_value)
    if not numbers:
        return _with(", ".join(texts), words, None)
    first, last = (_marked(shown(figure.value, unit), figure, mark) for figure in (numbers[0], numbers[-1]))
    return _with(f"{first} to {last}", words, None)


def _with(text: str, words: str, value: object) -> str:
    """`yes` and a level say less than their words do."""
    if value is True and words:
        return words
    if isinstance(value, str):
        return f"{words} {text}".strip()
    return f"{text} {words}".strip()


def _value(figure: Figure) -> float:
    return float(figure.value or 0)


def _marked(text: str, figure: Figure, mark: str) -> str:
    return f"{mark}{text}{mark}" if figure.keeps is False else text


def _counted(figures: Sequence[Figure]) -> Iterator[str]:
    sums: dict[tuple[str, str], float] = {}
    for figure in figures:
        if isinstance(figure.value, int | float):
            key = (figure.words, figure.unit)
            sums[key] = sums.get(key, 0) + figure.value
    yield from (f"{shown(total, unit)} {words}" for (words, unit), total in sums.items())


# -- for a terminal


def listed(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """A heading for each topic, a line for each claim."""
    topic = ""
    for verdict in verdicts:
        now = verdict.id.partition(".")[0]
        if now != topic:
            topic = now
            yield f"{TOPICS[topic]}"
        word = verdict.verdict.upper() if verdict.verdict == MISSED else verdict.verdict
        quick = " (a quick run)" if verdict.is_quick and verdict.verdict != UNTESTED else ""
        yield f"  {word:<15} {verdict.id:<20} {verdict.sentence}"
        found = "" if verdict.verdict == UNTESTED else f"{figures_words(verdict)}; bar: {verdict.bar}{quick}"
        detail = "; ".join(filter(None, (found, verdict.reason)))
        yield f"  {'':<15} {'':<20} {detail}"


def missed_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """One for each claim that does not hold, with the figures that say so."""
    return [
        f"{verdict.id}: "
        + ", ".join(
            f"{figure.where} is {shown(figure.value, figure.unit)}"
            for figure in verdict.figures
            if figure.keeps is False
        )
        + f" (bar: {verdict.bar})"
        for verdict in verdicts
        if verdict.verdict == MISSED
    ]
