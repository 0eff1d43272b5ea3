"""The figures of `edge-llm bench net` of a cluster: Markdown for people, rows of pairs for programs.

Owns the layout. Refuses to know how anything was measured: it reads what `--json` prints. Tables are narrow enough for
80 columns with names as `edge-llm up` gives them, and are never broken into pieces: short words, units below.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import click

FORMATS: Final = ("md", "csv", "json", "jsonl")
_NODES: Final = {"name": "node", "address": "address", "role": "role", "connect_ms": "connect ms"}
_LINKS: Final = {
    "from": "from", "to": "to", "round_trip_ms": "round trip ms", "bandwidth_mb_per_s": "MB/s", "transfers": "hand-offs"
}  # fmt: skip
_HANDOFFS: Final = {
    "from": "from",
    "to": "to",
    "handoff_rate_mb_per_s": "MB/s",
    "handoff_tokens_per_s": "tok/s",
    "handoff_ms": "after",
    "adopt_ms": "adopt",
    "overlapped_share": "overlap",
    "handoff_mb": "MB",
}
_UNITS: Final = (
    "MB/s, tok/s: of KV that was there to be sent",
    "after: ms that a split adds once the prompt is computed; adopt: of these, taking it",
    "overlap: share of the KV sent while it was computed; MB: of KV in one hand-off",
)


def show(found: Mapping[str, Any], kind: str) -> None:
    """With rows for programs nothing else is on standard output."""
    if kind == "md":
        for line in _lines(found):
            click.echo(line)
    elif kind == "csv":
        click.echo(_csv(found["pairs"]), nl=False)
    elif kind == "json":
        click.echo(json.dumps(found["pairs"]))
    else:
        for pair in found["pairs"]:
            click.echo(json.dumps(pair))


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    nodes = [{"name": name, **facts} for name, facts in found["nodes"].items()]
    pairs = [{**pair, "handoff_mb": _mega(pair["handoff_bytes"])} for pair in found["pairs"]]
    yield "Nodes\n"
    yield from _table(_NODES, nodes)
    models = {(node["model"], node["kv_bytes_per_token"]): None for node in nodes}
    for model, kv_bytes in models:
        who = "" if len(models) == 1 else " of " + ", ".join(n["name"] for n in nodes if n["model"] == model)
        yield f"model{who}: {model}, {kv_bytes} bytes of KV a token"
    if pairs:
        yield "\nLinks, as the worker that receives has seen them\n"
        yield from _table(_LINKS, pairs)
        yield "\nHand-offs\n"
        yield from _table(_HANDOFFS, pairs)
        yield from _UNITS
    yield from found["notes"]
    yield ""
    yield from (f"{word:<15}{meaning}" for word, meaning in found["definitions"].items())


def _table(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown, aligned: words left, numbers right."""
    cells = [[_word(row[key]) for key in columns] for row in rows]
    words = [all(isinstance(row[key], str) for row in rows) for key in columns]
    widths = [max(len(line[at]) for line in [list(columns.values()), *cells]) for at in range(len(columns))]
    rule = ["-" * width if is_left else "-" * (width - 1) + ":" for width, is_left in zip(widths, words, strict=True)]
    for line in [list(columns.values()), rule, *cells]:
        padded = [
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(line, widths, words, strict=True)
        ]
        yield f"| {' | '.join(padded)} |"


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Empty: not measured."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _mega(size: float | None) -> float | None:
    return None if size is None else size / 1e6


def _word(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    return "-" if value is None else str(value)
