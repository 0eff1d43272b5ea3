"""A report as data: chapters of records, each with tables, plots and what went wrong. Pure.

Owns the words that those who read records (chapters.py) and those who write pages (markdown.py, page.py) share.
Refuses to know records, HTML and Markdown; a plot is SVG already, since nothing else is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec


@dataclass(frozen=True, slots=True)
class Table:
    """All rows are as long as `columns`. `note` is said below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Plot:
    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """One record. `alarms` say what is wrong with it (cut short, failures, another commit than it says); `tables` and
    `plots` are what it is about, `more_plots` more of the same, `all_figures` everything in it."""

    file: str
    title: str
    facts: tuple[tuple[str, str], ...]
    alarms: tuple[str, ...] = ()
    sentences: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    more_plots: tuple[Plot, ...] = ()
    all_figures: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chapter:
    """All records of one kind, newest first. `definitions` are of the words in their figures."""

    kind: str
    title: str
    what: str
    definitions: tuple[tuple[str, str], ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """`unreadable`: files that are no records, and why; runs that left lines and no record."""

    title: str
    made_by: str
    overview: Table
    chapters: tuple[Chapter, ...]
    across: tuple[Plot, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()


def schema() -> dict[str, Any]:
    """JSON schema of what `edge-llm bench report --json` prints: a report whose drawings are their titles."""
    found = msgspec.json.schema(Report)
    found["$defs"]["Plot"] = {"type": "string", "description": "The title of a drawing; the page has the drawing."}
    return found
