"""A tree of figures as tables: what is alike becomes the rows of one, the rest name and value. Pure.

Owns this one rule for every kind of record, those of tomorrow included: nothing that a record's `figures` hold is left
out. Refuses to know what any figure is for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from edge_llm.report.document import Table
from edge_llm.report.words import NOT_READ, Path, shown, title

# Each of several rows has at least so much of its figures in common with the longest one.
_ALIKE: Final = 0.5
# A row holds figures so deep inside; deeper ones are tables of their own.
_DEEP: Final = 3
_LEAVES: Final = 60
_WIDE: Final = 8
# What names a row of a list.
_NAMES: Final = ("name", "test", "task", "model", "node", "placement", "label", "case", "rate_per_s", "concurrency")
Row = Mapping[tuple[str, ...], Any]


def figure_tables(figures: Mapping[str, Any], heading: str = "") -> list[Table]:
    """Everything, in the order in which it is in the record."""
    return list(_tables(figures, (), heading))


def _tables(tree: Mapping[str, Any], path: tuple[str, ...], heading: str) -> Iterator[Table]:
    plain = {name: value for name, value in tree.items() if not _is_nested(value)}
    nested = {name: value for name, value in tree.items() if _is_nested(value)}
    if plain:
        rows = tuple((title(name), shown((*path, name), value)) for name, value in plain.items())
        yield Table(heading, ("figure", "value"), rows)
    alike = {name: value for name, value in nested.items() if isinstance(value, Mapping)}
    if len(alike) > 1 and len(alike) == len(nested) and _are_alike(list(alike.values())):
        yield matrix(heading, {name: flat(value) for name, value in alike.items()}, path)
        return
    for name, value in nested.items():
        inner = f"{heading}: {title(name)}" if heading else title(name)
        if isinstance(value, Mapping):
            yield from _tables(value, (*path, name), inner)
        else:
            yield listed(inner, value, (*path, name))


def listed(heading: str, rows: Sequence[Mapping[str, Any]], path: tuple[str, ...] = ()) -> Table:
    """A list of alike things; what names them is the first column."""
    key = next((name for name in _NAMES if all(name in row for row in rows)), None)
    found: dict[str, Row] = {}
    for number, row in enumerate(rows, 1):
        name = shown((*path, key), row[key]) if key else str(number)
        rest = {inner: value for inner, value in row.items() if inner != key}
        found[name if name not in found else f"{name} ({number})"] = flat(rest)
    return matrix(heading, found, path)


def matrix(heading: str, rows: Mapping[str, Row], path: Path = ()) -> Table:
    """One row each, or, of few rows with many figures, one column each: that is what fits on a page."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    headings = [" ".join(title(part) for part in column) for column in columns]
    cells = {
        name: [shown((*path, *column), row[column]) if column in row else NOT_READ for column in columns]
        for name, row in rows.items()
    }
    if len(columns) > _WIDE and len(columns) > len(rows):
        turned = tuple((head, *(cells[name][i] for name in rows)) for i, head in enumerate(headings))
        return Table(heading, ("figure", *rows), turned)
    return Table(heading, ("", *headings), tuple((name, *cells[name]) for name in rows))


def flat(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Figures by their paths."""
    found: dict[tuple[str, ...], Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, (*path, name)))
        else:
            found[(*path, name)] = value
    return found


def _is_nested(value: Any) -> bool:
    """A table of its own, not a cell."""
    if isinstance(value, Mapping):
        return bool(value)
    return isinstance(value, list) and bool(value) and all(isinstance(one, Mapping) for one in value)


def _are_alike(trees: Sequence[Mapping[str, Any]]) -> bool:
    if any(_depth(tree) > _DEEP for tree in trees):
        return False
    columns = [set(flat(tree)) for tree in trees]
    widest = max(columns, key=len)
    is_alike = all(len(one & widest) >= _ALIKE * len(one) for one in columns)
    return is_alike and len(set.union(*columns)) <= _LEAVES


def _depth(tree: Any) -> int:
    """A list of things inside makes it too deep for a row."""
    if isinstance(tree, list):
        return _DEEP + 1 if _is_nested(tree) else 0
    if not isinstance(tree, Mapping):
        return 0
    return 1 + max((_depth(value) for value in tree.values()), default=0)
