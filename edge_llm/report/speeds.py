"""Records of bench engine and bench node: tokens per second of a board, its memory and its roofline. Pure.

Owns their tables and drawings. Refuses to know other kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from edge_llm.bench.record import Record
from edge_llm.bench.stats import median
from edge_llm.report.axes import Axis
from edge_llm.report.document import Plot, Table
from edge_llm.report.svg import Range, Series, curves, ranges
from edge_llm.report.tables import figure_tables
from edge_llm.report.words import NOT_READ, of_sample, short, shown

_AXIS: Final = "tokens/s: median, from least to most"
# Columns of a node's row that are the same in all rows are said once, below.
_COLUMNS: Final[Mapping[str, str]] = {
    "model_type": "model",
    "test": "test",
    "policy": "policy",
    "level": "level",
    "n_threads": "threads",
    "n_batch": "batch",
    "n_ubatch": "micro-batch",
    "type_k": "K",
    "type_v": "V",
    "flash_attn": "flash attention",
}
_FIGURES: Final[Mapping[str, str]] = {
    "roofline_share": "roofline",
    "rss_peak_bytes": "peak memory",
    "pss_bytes": "PSS",
    "cpu_share": "CPU",
    "power_w": "power",
    "llama_bench_ts": "llama-bench",
    "ratio": "ratio",
}
_MAIN: Final = 4
Rows = Sequence[Mapping[str, Any]]


def engine_plots(record: Record) -> list[Plot]:
    """Medians of tokens/s with the fastest and slowest repetition, by what was measured."""
    short_names = _short_names(record)
    by_word: dict[str, list[Range]] = {}
    for name, values in record.samples.items():
        whose, word = of_sample(name)
        if word.endswith("_tokens_per_s") and values:
            model, _, who = whose.rpartition(": ")
            label = f"{short_names.get(model, model)}, {who}" if model else who
            row = Range(label, min(values), median(values), max(values), who)
            by_word.setdefault(word.removesuffix("_tokens_per_s"), []).append(row)
    plots = []
    for word, rows in by_word.items():
        title = f"{word.replace('_', ' ')}: tokens per second"
        plots.append(Plot(title, ranges(title, rows, Axis(_AXIS, low=0.0))))
    return plots


def _short_names(record: Record) -> dict[str, str]:
    """Models by quantization where that tells them apart."""
    kinds = [model.quantization for model in record.models]
    return {model.name: model.quantization for model in record.models} if len(set(kinds)) == len(kinds) else {}


# -- node


def node_tables(record: Record) -> list[Table]:
    """Rows with what differs between them; then the rest of the figures."""
    rows = _rows(record)
    if not rows:
        return figure_tables(record.figures)
    same = [name for name in _COLUMNS if len({str(row.get(name)) for row in rows}) == 1 and name != "test"]
    columns = [name for name in _COLUMNS if name not in same]
    figures = [name for name in _FIGURES if any(row.get(name) is not None for row in rows)]
    cells = tuple(
        (
            *(str(row.get(name)) for name in columns),
            _speed(row),
            *(shown((name,), row.get(name)) for name in figures),
            "" if row.get("is_complete", True) else "cut short",
        )
        for row in rows
    )
    heads = (*(_COLUMNS[name] for name in columns), "tokens/s", *(_FIGURES[name] for name in figures), "")
    note = "All rows: " + ", ".join(f"{_COLUMNS[name]} {rows[0].get(name)}" for name in same) if same else ""
    rest = {name: value for name, value in record.figures.items() if name not in ("rows", "definitions")}
    return [Table("Rows as llama-bench gives them", heads, cells, note), *figure_tables(rest)]


def node_main(record: Record) -> str:
    """For the overview: the first row of each phase and model."""
    first: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in _rows(record):
        if row.get("avg_ts") is not None:
            first.setdefault((str(row.get("model_type")), _phase(row)), row)
    words = [f"{row.get('test')} {short(row['avg_ts'])} tokens/s" for row in first.values()]
    return "; ".join(words[:_MAIN])


def node_plots(record: Record) -> list[Plot]:
    rows = _rows(record)
    plots = []
    for phase, title in (("prefill", "prompt: tokens per second"), ("decode", "decode: tokens per second")):
        some = [row for row in rows if _phase(row) == phase and row.get("samples_ts")]
        drawn = [_range(row, _labels(some)[number]) for number, row in enumerate(some)]
        if drawn:
            plots.append(Plot(title, ranges(title, drawn, Axis(_AXIS, low=0.0))))
    return [*plots, *_memory_curve(record)]


def _rows(record: Record) -> Rows:
    rows = record.figures.get("rows")
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def _phase(row: Mapping[str, Any]) -> str:
    return "prefill" if not row.get("n_gen") else "decode" if not row.get("n_prompt") else "both"


def _labels(rows: Rows) -> list[str]:
    """Each row by its test and what else it takes to tell it from the others: a label has little room."""
    kept = ["test"]
    for name in _COLUMNS:
        if name != "test" and len(_told(rows, [*kept, name])) > len(_told(rows, kept)):
            kept.append(name)
    return [", ".join([str(row.get("test")), *(_said(name, row.get(name)) for name in kept[1:])]) for row in rows]


def _told(rows: Rows, names: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(str(row.get(name)) for name in names) for row in rows}


def _said(column: str, value: Any) -> str:
    return str(value) if column in ("model_type", "policy") else f"{_COLUMNS[column]} {value}"


def _range(row: Mapping[str, Any], label: str) -> Range:
    samples = [float(sample) for sample in row["samples_ts"]]
    return Range(label, min(samples), median(samples), max(samples), str(row.get("model_type")))


def _speed(row: Mapping[str, Any]) -> str:
    mean, spread = row.get("avg_ts"), row.get("stddev_ts")
    return NOT_READ if mean is None else f"{short(mean)} +- {short(spread or 0.0)}"


def _memory_curve(record: Record) -> list[Plot]:
    """Peak memory over the context, with and without flash attention: while a prompt fills it, and while it decodes."""
    points = record.figures.get("memory_curve")
    series: dict[str, list[tuple[float, float]]] = {}
    for point in points if isinstance(points, list) else []:
        for phase in ("prefill", "decode"):
            peak, context = point.get(f"{phase}_peak_bytes"), point.get("n_ctx")
            if peak is not None and context is not None:
                name = f"{point.get('model')}, {phase}, flash attention {point.get('flash_attention')}"
                series.setdefault(name, []).append((float(context), 1e-6 * float(peak)))
    if not series:
        return []
    title = "peak memory at each context"
    drawn = [Series(name, tuple(sorted(known))) for name, known in series.items()]
    return [Plot(title, curves(title, drawn, Axis("context, tokens", low=0.0), Axis("MB", low=0.0)))]
