"""Records of bench cluster: the Edge paper's table in three, who is how fast, and where an answer's time goes. Pure.

Owns their tables, drawings and headline. Refuses to know other kinds. The cells are those that the command prints; rows
of another version's shape are told by their figures, as any record's are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from edge_llm.bench.edge_claim import CLAIMED_TOKENS_PER_S
from edge_llm.bench.edge_table import Row
from edge_llm.bench.edge_table_text import columns
from edge_llm.bench.record import Record
from edge_llm.report.axes import Axis
from edge_llm.report.document import Plot, Table
from edge_llm.report.svg import Range, Span, ranges, stages
from edge_llm.report.svg import Row as Line
from edge_llm.report.tables import figure_tables
from edge_llm.report.words import NOT_READ, short

_WHO: Final = ("model", "placement", "node")
# Headings of the printed table, in the order in which a page can hold them.
_PARTS: Final = (
    (
        "A request alone, medians",
        (
            *("n", "prompt t/s", "generation t/s", "sampling t/s", "load s", "TTFT s", "TPOT ms", "total s"),
            "queue / prefill / transfer / decode ms",
        ),
    ),
    (
        "What it takes of the board",
        (
            *("CPU % (above idle)", "RAM % (above idle)", "mapped %", "peak RSS MiB (above idle)"),
            *("C", "throttled", "tokens/J"),
            "{:g}-{:g} t/s, < 50 % CPU, RAM".format(*CLAIMED_TOKENS_PER_S),
        ),
    ),
    (
        "What the model knows",
        ("quantization", "file MiB", "accuracy % (95 %, n)", "differs from chance", "perplexity"),
    ),
)
_STAGES: Final = {"queue": 0, "prefill": 2, "transfer of KV": 3, "decode": 7}


def rows_of(record: Record) -> list[Row]:
    """Empty where rows have another shape than this version's."""
    try:
        return msgspec.convert(record.figures.get("rows"), list[Row])
    except msgspec.ValidationError:
        return []


def edge_main(record: Record) -> str:
    """For the overview: how fast, and whether what the paper claims holds here."""
    rows = rows_of(record)
    speeds = [row.generation_tokens_per_s for row in rows if row.generation_tokens_per_s is not None]
    if not speeds:
        return ""
    held = sum(row.claim.holds is True for row in rows)
    span = short(min(speeds)) if len(speeds) == 1 else f"{short(min(speeds))} to {short(max(speeds))}"
    return f"{span} tokens/s generated; the paper's claim holds in {held} of {len(rows)} rows"


def edge_tables(record: Record) -> list[Table]:
    """The printed table, cut where a page ends. What no row could read is no column."""
    rows = rows_of(record)
    if not rows:
        return figure_tables(record.figures)
    cells, names = columns(rows), labels(rows)
    tables = []
    for heading, wanted in _PARTS:
        heads = [head for head in wanted if head in cells and set(cells[head]) != {NOT_READ}]
        if heads:
            lines = zip(names, *(cells[head] for head in heads), strict=True)
            tables.append(Table(heading, ("", *heads), tuple(_each_once(heading, list(lines), rows))))
    return tables


def _each_once(heading: str, lines: Sequence[tuple[str, ...]], rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What is of a model file is one line for each, not one for each placement."""
    if heading != _PARTS[-1][0]:
        return list(lines)
    by_model = {row.model: (row.model, *line[1:]) for row, line in zip(rows, lines, strict=True)}
    return list(by_model.values())


def labels(rows: Sequence[Row]) -> list[str]:
    """Each row by what tells it apart; by all of it where nothing does."""
    told = [name for name in _WHO if len({getattr(row, name) for row in rows}) > 1] or ["model", "placement"]
    return [", ".join(str(getattr(row, name)) for name in told) for row in rows]


def edge_plots(record: Record) -> list[Plot]:
    rows = rows_of(record)
    return [*_speeds(rows), *_times(rows)]


def _speeds(rows: Sequence[Row]) -> list[Plot]:
    """Generated tokens per second with their intervals; one row for each model and placement: boards of a placement
    share its answers."""
    drawn = []
    for row, name in _placements(rows):
        if row.generation_tokens_per_s is not None:
            at = row.intervals.get("generation_tokens_per_s")
            low, high = (at.low, at.high) if at else (row.generation_tokens_per_s,) * 2
            drawn.append(Range(name, low, row.generation_tokens_per_s, high, row.placement))
    if not drawn:
        return []
    title = "generated tokens per second of one stream"
    note = "The paper claims {:g} to {:g} tokens/s, with less than 50 % of CPU and RAM.".format(*CLAIMED_TOKENS_PER_S)
    axis = Axis("tokens/s: median, with its 95 % interval", low=0.0)
    return [Plot(title, ranges(title, drawn, axis), note)]


def _times(rows: Sequence[Row]) -> list[Plot]:
    """Medians of the parts, end to end: they need not add up to the median of the whole."""
    drawn = []
    for row, name in _placements(rows):
        parts = (row.queue_ms, row.prefill_ms, row.transfer_ms, row.decode_ms)
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            continue
        ends = [sum(known[:number]) / 1e3 for number in range(len(known) + 1)]
        spans = (Span(stage, ends[number], ends[number + 1]) for number, stage in enumerate(_STAGES))
        drawn.append(Line(name, tuple(spans)))
    if not drawn:
        return []
    title = "where the time of an answer goes, medians"
    return [Plot(title, stages(title, drawn, Axis("s", low=0.0), _STAGES))]


def _placements(rows: Sequence[Row]) -> list[tuple[Row, str]]:
    first = list({(row.model, row.placement): row for row in reversed(rows)}.values())[::-1]
    told = [name for name in _WHO[:2] if len({getattr(row, name) for row in first}) > 1] or list(_WHO[:2])
    return [(row, ", ".join(str(getattr(row, name)) for name in told)) for row in first]
