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
# What may tell the rows of a list apart, by itself or together.
_NAMES: Final = (
    *(("from", "to"), ("name",), ("test",), ("task",), ("model",), ("node",), ("placement",), ("label",), ("case",)),
    *(("rate_per_s",), ("concurrency",), ("model", "node"), ("model", "node", "placement")),
    ("model", "policy", "type_k", "type_v", "flash_attention", "n_ctx"),
    *(
        (
            "model_type",
            "test",
            "policy",
            "n_threads",
            "n_threads_batch",
            "n_batch",
            "n_ubatch",
            "type_k",
            "type_v",
            "flash_attn",
        ),
    ),
)
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
        yield matrix(heading, {name: flat(value) for name, value in alike.items()}, path, is_path=True)
        return
    for name, value in nested.items():
        inner = f"{heading}: {title(name)}" if heading else title(name)
        if isinstance(value, Mapping):
            yield from _tables(value, (*path, name), inner)
        else:
            yield listed(inner, value, (*path, name))


def listed(heading: str, rows: Sequence[Mapping[str, Any]], path: tuple[str, ...] = ()) -> Table:
    """A list of alike things; what tells them apart is the first column, else their number."""
    keys = telling(rows)
    found: dict[str, Row] = {}
    for number, row in enumerate(rows, 1):
        name = ", ".join(shown((*path, key), row[key]) for key in keys) or str(number)
        found[name] = flat({inner: value for inner, value in row.items() if inner not in keys})
    return matrix(heading, found, path)


def telling(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The figures that tell rows apart; empty when none of the known ones do."""
    return next((keys for keys in _NAMES if _tell_apart(keys, rows)), ())


def _tell_apart(keys: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bool:
    names = [tuple(str(row.get(key)) for key in keys) for row in rows]
    return all(key in row for row in rows for key in keys) and len(set(names)) == len(names)


def matrix(heading: str, rows: Mapping[str, Row], path: Path = (), *, is_path: bool = False) -> Table:
    """One row each, or, of few rows with many figures, one column each: that is what fits on a page. `is_path`: a row's
    name belongs to the paths of its figures, which say how they are shown."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    headings = [" ".join(title(part) for part in column) for column in columns]
    cells = {
        name: [
            shown((*path, *((name,) if is_path else ()), *column), row[column]) if column in row else NOT_READ
            for column in columns
        ]
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
