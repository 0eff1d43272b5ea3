"""Accuracy, speed and memory of models against each other, over all records: what no other beats in everything. Pure.

Owns joining records by model file (its sha256) and the dots that come of it. Refuses to know how the figures were
measured. What stands in one drawing was measured in one run: accuracy in one, speed in another of one machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from edge_llm.bench.record import ModelFacts, Record
from edge_llm.report.axes import Axis
from edge_llm.report.document import Plot
from edge_llm.report.scores import mean_accuracy
from edge_llm.report.svg import Dot, cloud
from edge_llm.report.tables import flat
from edge_llm.report.words import shown

# Names that figures of a row have, in order of preference: a record's own words, other tools' after them.
_ACCURACY: Final = ("accuracy", "acc", "mean_accuracy", "acc_norm")
_PERPLEXITY: Final = ("perplexity", "ppl")
_SPEED: Final = ("decode_tokens_per_s", "generation_tokens_per_s", "tg_tokens_per_s", "tokens_per_s", "avg_ts")
_KINDS: Final = ("accuracy", "cluster", "node", "engine")
_Figures = tuple[str, str, dict[str, float]]
_MEMORY: Final = ("peak_rss_bytes", "peak_pss_bytes", "rss_peak_bytes", "peak_bytes", "memory_bytes", "rss_bytes")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model on one machine. `accuracy` is a share; `memory_bytes`: at its most."""

    model: str
    machine: str
    tokens_per_s: float
    accuracy: float | None = None
    perplexity: float | None = None
    memory_bytes: float | None = None


def frontier_plots(records: Sequence[Record]) -> list[Plot]:
    """Nothing without at least two models that have a speed and an accuracy on one machine."""
    plots = []
    known = candidates(records)
    for machine in dict.fromkeys(one.machine for one in known):
        here = [one for one in known if one.machine == machine]
        plots += _drawn(f"accuracy and speed, {machine}", "accuracy", here, [one.accuracy for one in here], is_up=True)
        plots += _drawn(
            f"perplexity and speed, {machine}", "perplexity", here, [one.perplexity for one in here], is_up=False
        )
    return plots


def best(dots: Sequence[tuple[float, float]], *, is_up: bool) -> list[tuple[float, float]]:
    """The points that no other beats in both, by speed. `is_up`: more of the second is better."""
    sign = 1.0 if is_up else -1.0
    kept: list[tuple[float, float]] = []
    for speed, value in sorted(dots, key=lambda dot: (-dot[0], -sign * dot[1])):
        if not kept or sign * value > sign * kept[-1][1]:
            kept.append((speed, value))
    return kept[::-1]


def candidates(records: Sequence[Record]) -> list[Candidate]:
    """Accuracy is the model file's wherever it was measured, speed and memory a machine's. What is compared is of one
    record: other items, threads or placements would be compared with it otherwise."""
    read = [(record, list(_by_model(record))) for record in records if record.kind in _KINDS]
    names: dict[str, str] = {}
    for _, models in read:
        for sha256, name, _ in models:
            names[sha256] = min(names.get(sha256, name), name, key=len)
    accuracy, _ = _widest([(_accuracies(record, models), models) for record, models in read])
    perplexity, _ = _widest([(_values(models, _PERPLEXITY), models) for _, models in read])
    found = []
    for machine in dict.fromkeys(_machine(record) for record, _ in read):
        here = [(_values(models, _SPEED), models) for record, models in read if _machine(record) == machine]
        speed, models = _widest(here)
        memory = _values(models, _MEMORY)
        for sha256, rate in speed.items():
            one = Candidate(names[sha256], machine, rate, accuracy.get(sha256), perplexity.get(sha256))
            found.append(replace(one, memory_bytes=memory.get(sha256)))
    return found


def _widest(found: Sequence[tuple[dict[str, float], list[_Figures]]]) -> tuple[dict[str, float], list[_Figures]]:
    """Of the record with the most models; the newest of several."""
    return max(found, key=lambda one: len(one[0]), default=({}, []))


def _machine(record: Record) -> str:
    return "; ".join(f"{node.board or node.cpu}, {len(node.usable_cores)} cores" for node in record.nodes)


def _accuracies(record: Record, models: Sequence[_Figures]) -> dict[str, float]:
    means = mean_accuracy(record)
    return _values(models, _ACCURACY) | {sha256: means[name] for sha256, name, _ in models if name in means}


def _values(models: Sequence[_Figures], names: Sequence[str]) -> dict[str, float]:
    """By sha256, of those models that have a figure of one of these names."""
    found = {}
    for sha256, _, figures in models:
        if (value := next((figures[name] for name in names if name in figures), None)) is not None:
            found[sha256] = value
    return found


def _by_model(record: Record) -> Iterator[_Figures]:
    """The figures of each of its models: those under its name, in rows that name it, or all of an only one."""
    for model in record.models:
        figures: dict[str, float] = {}
        for tree in _trees(record.figures, model) or ([record.figures] if len(record.models) == 1 else []):
            for path, value in flat(tree).items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    figures.setdefault(path[-1], float(value))
        yield model.sha256, model.name, figures


def _trees(tree: Any, model: ModelFacts) -> list[Mapping[str, Any]]:
    if isinstance(tree, list):
        return [found for one in tree for found in _trees(one, model)]
    if not isinstance(tree, Mapping):
        return []
    if tree.get("model") == model.name or _is_decode_row(tree, model):
        return [tree]
    own = [value for key, value in tree.items() if key == model.name and isinstance(value, Mapping)]
    return own + [found for key, value in tree.items() if key != model.name for found in _trees(value, model)]


def _is_decode_row(row: Mapping[str, Any], model: ModelFacts) -> bool:
    """One of llama-bench's rows, for this file, of decode alone."""
    return row.get("model_filename") == model.file and bool(row.get("n_gen")) and not row.get("n_prompt")


def _drawn(
    title: str, label: str, here: Sequence[Candidate], values: Sequence[float | None], *, is_up: bool
) -> list[Plot]:
    dots = [
        Dot(_label(one), one.tokens_per_s, value, f"{one.model}: {one.tokens_per_s:.1f} tokens/s, {label} {value:.3g}")
        for one, value in zip(here, values, strict=True)
        if value is not None
    ]
    if len(dots) < 2:
        return []
    line = best([(dot.x, dot.y) for dot in dots], is_up=is_up)
    y = Axis(label if is_up else f"{label}, less is better", is_share=is_up)
    note = (
        "The line joins models that no other beats in both. Accuracies are of one run, speeds of another; "
        "accuracy is the model file's, wherever it was measured."
    )
    return [Plot(title, cloud(title, dots, Axis("decode, tokens/s", low=0.0), y, line), note)]


def _label(one: Candidate) -> str:
    return one.model if one.memory_bytes is None else f"{one.model}, {shown(('rss_bytes',), one.memory_bytes)}"
