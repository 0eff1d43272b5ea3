"""Records of bench accuracy: shares of right items with their errors, perplexity, divergence, drift. Pure.

Owns their tables and drawings. Refuses to know other kinds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from edge_llm.bench.record import Record
from edge_llm.report.axes import Axis
from edge_llm.report.document import Plot, Table
from edge_llm.report.svg import Range, ranges
from edge_llm.report.tables import Row, figure_tables, flat, matrix
from edge_llm.report.words import NOT_READ, short, shown

SHARES: Final = ("acc", "acc_norm", "acc_flexible", "acc_loose", "mc2", "instructions", "instructions_loose")
_COMPARED: Final = ("perplexity", "kl", "same_top")
_TEXTS: Final = ("perplexity", "kl", "kl_median", "kl_p99", "same_top", "shift_rms", "word_perplexity")
_MAIN: Final = 4
Figures = Mapping[str, Any]


def accuracy_main(record: Record) -> str:
    """For the overview: the first figures of the first model."""
    first = next((model for model, _, _ in _rows(record)), None)
    words = []
    for task, found in ((task, found) for model, task, found in _rows(record) if model == first):
        share = next((found[name] for name in SHARES if isinstance(found.get(name), Mapping)), None)
        if share is not None:
            words.append(f"{task} {short(100 * share['value'])} %")
        elif found.get("perplexity") is not None:
            words.append(f"{task} perplexity {short(found['perplexity'])}")
    return "; ".join(words[:_MAIN])


def accuracy_tables(record: Record) -> list[Table]:
    """Items, then texts, then the comparison with the reference model."""
    rows = list(_rows(record))
    if not rows:
        return figure_tables(record.figures)
    items = [row for model, task, found in rows if (row := _items(model, task, found))]
    texts: dict[str, Row] = {
        f"{model}, {task}": {(name,): found[name] for name in ("tokens", *_TEXTS) if name in found}
        for model, task, found in rows
        if any(name in found for name in _TEXTS)
    }
    columns = ("model", "task", "n", "failed", *SHARES[:1], "95 %", *SHARES[1:], "chance", "differs from chance")
    used = [n for n, _ in enumerate(columns) if n < 3 or any(row[n] not in (NOT_READ, "0") for row in items)]
    note = "Share of right items +- standard error; interval: Wilson. Chance: the mean of 1 / choices, exact test."
    tables = []
    if items:
        kept = tuple(tuple(row[n] for n in used) for row in items)
        tables.append(Table("Tasks", tuple(columns[n] for n in used), kept, note))
    if texts:
        tables.append(matrix("Texts", texts))
    beside = list(_beside(record.figures.get("against_llama_perplexity")))
    if beside:
        heads = ("model, text", "windows", *(f"{name}: ours, theirs, ratio" for name in _COMPARED))
        note = "llama-perplexity of the same build on the same windows; the bars: perplexity 0.5 %, KL 2 %."
        tables.append(Table("Beside llama-perplexity", heads, tuple(beside), note))
    against = record.figures.get("against_reference")
    if isinstance(against, Mapping) and against:
        reference = str(record.figures.get("reference", "the reference"))
        drift: dict[str, Row] = {
            f"{model}, {task}": flat(found) for model, tasks in against.items() for task, found in tasks.items()
        }
        tables += [matrix(f"Beside {reference}, item by item", drift)] if drift else []
    return tables


def _beside(against: Any) -> Iterator[tuple[str, ...]]:
    """Ours, theirs and the ratio, of each model and text."""
    models = against.get("models") if isinstance(against, Mapping) else None
    for model, tasks in models.items() if isinstance(models, Mapping) else ():
        for task, found in tasks.items():
            yield f"{model}, {task}", shown((), found.get("windows")), *(_pair(found.get(name)) for name in _COMPARED)


def _pair(found: Any) -> str:
    if not isinstance(found, Mapping):
        return NOT_READ
    ratio = NOT_READ if found.get("ratio") is None else f"{found['ratio']:.4f}"
    return f"{found['ours']:.5g}, {found['llama_perplexity']:.5g}, {ratio}"


def _items(model: str, task: str, found: Figures) -> tuple[str, ...]:
    if not any(isinstance(found.get(name), Mapping) for name in SHARES):
        return ()
    first = found.get("acc")
    interval = NOT_READ
    if isinstance(first, Mapping):
        interval = f"{short(100 * first['low'])} to {short(100 * first['high'])} %"
    differs = found.get("differs_from_chance")
    return (
        model,
        task,
        shown(("n",), found.get("n")),
        shown(("failed",), found.get("failed")),
        _share(found.get("acc")),
        interval,
        *(_share(found.get(name)) for name in SHARES[1:]),
        shown(("chance",), found.get("chance")),
        NOT_READ if differs is None else f"{shown((), differs)} (p {short(found['p_value'])})",
    )


def _share(found: Any) -> str:
    if not isinstance(found, Mapping):
        return NOT_READ
    error = found.get("stderr")
    return f"{short(100 * found['value'])} %" + (f" +- {short(100 * error)}" if error is not None else "")


def accuracy_plots(record: Record) -> list[Plot]:
    """Each task with its interval, models beside each other, and chance."""
    by_task: dict[str, list[Range]] = {}
    chances: dict[str, float] = {}
    for model, task, found in _rows(record):
        share = next((found[name] for name in SHARES if isinstance(found.get(name), Mapping)), None)
        if share is not None:
            low, value, high = (100 * share[name] for name in ("low", "value", "high"))
            by_task.setdefault(task, []).append(Range(f"{task}, {model}", low, value, high, model))
        if found.get("chance") is not None:
            chances[task] = 100 * found["chance"]
    rows = []
    for task, known in by_task.items():
        rows += known
        if task in chances:
            rows.append(Range(f"{task}, chance", chances[task], chances[task], chances[task], "chance"))
    if not rows:
        return []
    title = "right items, with 95 % intervals"
    return [Plot(title, ranges(title, rows, Axis("percent", low=0.0)))]


def mean_accuracy(record: Record) -> dict[str, float]:
    """By model: the mean over the tasks that all models of this record have; of others nothing could be said."""
    found: dict[str, dict[str, float]] = {}
    for model, task, figures in _rows(record):
        if isinstance(figures.get("acc"), Mapping):
            found.setdefault(model, {})[task] = float(figures["acc"]["value"])
    common = set.intersection(*(set(tasks) for tasks in found.values())) if found else set()
    return (
        {model: sum(tasks[task] for task in common) / len(common) for model, tasks in found.items()} if common else {}
    )


def _rows(record: Record) -> Iterator[tuple[str, str, Figures]]:
    models = record.figures.get("models")
    for model, tasks in models.items() if isinstance(models, Mapping) else ():
        for task, found in tasks.items() if isinstance(tasks, Mapping) else ():
            if isinstance(found, Mapping):
                yield str(model), str(task), found
