"""Accuracy, speed and memory of models against each other, over all records: what no other beats in everything. Pure.

Owns joining records by model file (its sha256) and the dots that come of it. Refuses to know how the figures were
measured; the newest record of each kind counts, and machines are never mixed: a speed is of one machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from edge_llm.bench.record import Record
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
    """Records are newest first. Accuracy is the model file's wherever it was measured, speed and memory a machine's."""
    accuracy: dict[str, float] = {}
    perplexity: dict[str, float] = {}
    speed: dict[tuple[str, str], float] = {}
    memory: dict[tuple[str, str], float] = {}
    names: dict[str, str] = {}
    for record in records:
        if record.kind not in ("accuracy", "cluster", "node", "engine"):
            continue
        machine = "; ".join(f"{node.board or node.cpu}, {len(node.usable_cores)} cores" for node in record.nodes)
        for sha256, name, figures in _by_model(record):
            names.setdefault(sha256, name)
            if name in (means := mean_accuracy(record)):
                accuracy.setdefault(sha256, means[name])
            _keep(accuracy, sha256, figures, _ACCURACY)
            _keep(perplexity, sha256, figures, _PERPLEXITY)
            _keep(speed, (sha256, machine), figures, _SPEED)
            _keep(memory, (sha256, machine), figures, _MEMORY)
    return [
        Candidate(
            names[sha256], machine, rate, accuracy.get(sha256), perplexity.get(sha256), memory.get((sha256, machine))
        )
        for (sha256, machine), rate in speed.items()
    ]


def _keep(known: dict[Any, float], key: Any, figures: Mapping[str, float], names: Sequence[str]) -> None:
    found = next((figures[name] for name in names if name in figures), None)
    if found is not None:
        known.setdefault(key, found)


def _by_model(record: Record) -> Iterator[tuple[str, str, dict[str, float]]]:
    """The figures of each of its models: those under its name, in rows that name it, or all of an only one."""
    for model in record.models:
        figures: dict[str, float] = {}
        for tree in _trees(record.figures, model.name) or ([record.figures] if len(record.models) == 1 else []):
            for path, value in flat(tree).items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    figures.setdefault(path[-1], float(value))
        yield model.sha256, model.name, figures


def _trees(tree: Any, name: str) -> list[Mapping[str, Any]]:
    if isinstance(tree, list):
        return [found for one in tree for found in _trees(one, name)]
    if not isinstance(tree, Mapping):
        return []
    if tree.get("model") == name:
        return [tree]
    own = [value for key, value in tree.items() if key == name and isinstance(value, Mapping)]
    return own + [found for key, value in tree.items() if key != name for found in _trees(value, name)]


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
    note = "The line joins models that no other beats in both. Accuracy is the model file's, wherever it was measured."
    return [Plot(title, cloud(title, dots, Axis("decode, tokens/s", low=0.0), y, line), note)]


def _label(one: Candidate) -> str:
    return one.model if one.memory_bytes is None else f"{one.model}, {shown(('rss_bytes',), one.memory_bytes)}"
