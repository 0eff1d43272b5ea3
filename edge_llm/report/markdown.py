"""A report as Markdown that can be pasted into a README: tables, alarms and definitions. Pure.

Owns escaping and layout of tables. Drawings are for the page (page.py). Refuses to know records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from edge_llm.report.document import Chapter, Part, Report, Table

# Facts that a table's reader needs beside it; the page has all.
_FACTS: Final = ("command", "model", "node", "code")
# What ends a sentence of Markdown or begins something else in it.
_SPECIAL: Final = str.maketrans(
    {"|": "\\|", "<": "&lt;", ">": "&gt;", "\n": " ", "\r": " ", "`": "'", "*": "\\*", "[": "\\[", "]": "\\]"}
)


def markdown(report: Report) -> str:
    lines = [f"# {_text(report.title)}", "", *_table(report.overview, links=True)]
    for name, why in report.unreadable:
        lines += [f"- **not read**: `{_text(name)}`: {_text(why)}"]
    if report.unreadable:
        lines.append("")
    for chapter in report.chapters:
        lines += _chapter(chapter)
    return "\n".join(lines).rstrip() + "\n"


def _chapter(chapter: Chapter) -> Iterator[str]:
    yield from (f"## {_text(chapter.title)}", "", _text(chapter.what), "")
    for part in chapter.parts:
        yield from _part(part)
    if chapter.definitions:
        yield from (f"- *{_text(name)}*: {_text(text)}" for name, text in chapter.definitions)
        yield ""


def _part(part: Part) -> Iterator[str]:
    yield from (f"### {_text(part.title)}", "", f"Record: [{_text(part.file)}]({_link(part.file)}).")
    for name, value in part.facts:
        if name.startswith(_FACTS):
            yield f"{_text(name)}: {_text(value)}."
    yield ""
    if part.alarms:
        yield from (f"- **{_text(alarm)}**" for alarm in part.alarms)
        yield ""
    if part.sentences:
        yield from (f"- {_text(sentence)}" for sentence in part.sentences)
        yield ""
    for table in part.tables:
        yield from _table(table)


def _table(table: Table, *, links: bool = False) -> Iterator[str]:
    """Numbers to the right. `links`: it is words, and the last column is a file."""
    if table.title:
        yield from (f"**{_text(table.title)}**", "")
    yield _row([_text(column) for column in table.columns])
    yield _row(["---" if number == 0 or links else "---:" for number, _ in enumerate(table.columns)])
    for cells in table.rows:
        texts = [_text(cell) for cell in cells]
        if links:
            texts[-1] = f"[{texts[-1]}]({_link(cells[-1])})"
        yield _row(texts)
    yield ""
    if table.note:
        yield from (_text(table.note), "")


def aligned(table: Table) -> Iterator[str]:
    """For a terminal, too: columns as wide as their widest cell, the first one to the left."""
    rows = [[_text(cell) for cell in cells] for cells in (table.columns, *table.rows)]
    widths = [max(len(row[number]) for row in rows) for number in range(len(table.columns))]
    lines = [
        _row([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    rule = _row(["-" * widths[0], *(f"{'-' * max(1, width - 1)}:" for width in widths[1:])])
    yield from (lines[0], rule, *lines[1:])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(text: str) -> str:
    """One line that says what it says, whatever a server or a file name put into it."""
    return text.translate(_SPECIAL)


def _link(file: str) -> str:
    return file.replace(" ", "%20").replace("(", "%28").replace(")", "%29")
