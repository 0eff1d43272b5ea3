"""What is different around two runs: boards, model files, builds, settings, code. Pure.

Owns the list and which of it makes a comparison one of boards or models instead of versions (`is_loud`). Refuses to
know figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from edge_llm.bench.record import Node, Record
from edge_llm.report.words import NOT_READ, shown

# Of a node: a figure of one such machine says nothing of another.
_BOARD: Final = ("board", "cpu", "machine", "cores", "usable_cores", "ram_bytes", "page_bytes", "governor")
_SYSTEM: Final = ("kernel",)
_SAME_RAM: Final = 0.05
_LOADS_APART: Final = 1.0
_HASH_CHARS: Final = 12
_LONG: Final = 60


class Difference(msgspec.Struct, frozen=True):
    """`area`: machine, model, engine, workload, settings, code, run. None: not there on that side."""

    area: str
    what: str
    a: str | None
    b: str | None
    is_loud: bool = False


def differences(a: Record, b: Record) -> list[Difference]:
    """Loud ones first."""
    found = [
        *_nodes(a, b),
        *_models(a, b),
        *_engines(a, b),
        *_workloads(a.workload, b.workload),
        *_trees("settings", a.config, b.config),
        *_code(a, b),
        *_runs(a, b),
    ]
    return sorted(found, key=lambda one: not one.is_loud)


def _nodes(a: Record, b: Record) -> Iterator[Difference]:
    one, other = {node.name: node for node in a.nodes}, {node.name: node for node in b.nodes}
    for name in dict.fromkeys([*one, *other]):
        before, after = one.get(name), other.get(name)
        if before is None or after is None:
            yield Difference(
                "machine", f"node {name}", before.cpu if before else None, after.cpu if after else None, True
            )
            continue
        for field in (*_BOARD, *_SYSTEM):
            mine, others = getattr(before, field), getattr(after, field)
            if mine != others and not (field == "ram_bytes" and abs(mine - others) < _SAME_RAM * mine):
                yield Difference(
                    "machine", f"{name}: {field}", _said(field, mine), _said(field, others), field in _BOARD
                )
        if found := _loads(before, after):
            yield found


def _loads(before: Node, after: Node) -> Difference | None:
    mine, others = before.load_before, after.load_before
    if mine is None or others is None or abs(mine - others) <= _LOADS_APART:
        return None
    return Difference("run", f"{before.name}: load before it", f"{mine:.1f}", f"{others:.1f}")


def _models(a: Record, b: Record) -> Iterator[Difference]:
    one = {model.name: f"{model.quantization}, sha256 {model.sha256[:_HASH_CHARS]}" for model in a.models}
    other = {model.name: f"{model.quantization}, sha256 {model.sha256[:_HASH_CHARS]}" for model in b.models}
    yield from _trees("model", one, other, is_loud=True)


def _engines(a: Record, b: Record) -> Iterator[Difference]:
    one = {f"{engine.name}: {name}": value for engine in a.engines for name, value in engine.facts.items()}
    other = {f"{engine.name}: {name}": value for engine in b.engines for name, value in engine.facts.items()}
    for found in _trees("engine", one, other, is_loud=True):
        yield msgspec.structs.replace(found, a=_apart(found.a, found.b), b=_apart(found.b, found.a))


def _apart(mine: str | None, others: str | None) -> str | None:
    """Of a long list of flags or features, those that the other side has not."""
    if mine is None or others is None or len(mine) <= _LONG:
        return mine
    mark = " | " if " | " in mine else " "
    known = {word.strip() for word in others.split(mark)}
    return mark.join(word.strip() for word in mine.split(mark) if word.strip() not in known) or "nothing more"


def _workloads(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[Difference]:
    """Older records do not say it, which is no difference of what was asked."""
    if one and other:
        yield from _trees("workload", one, other, is_loud=True)
    elif one or other:
        yield Difference("workload", "said in one record only", _said("", bool(one)), _said("", bool(other)))


def _trees(
    area: str, one: Mapping[str, Any], other: Mapping[str, Any], *, is_loud: bool = False
) -> Iterator[Difference]:
    for name in dict.fromkeys([*one, *other]):
        if one.get(name) != other.get(name):
            mine = _said(name, one[name]) if name in one else None
            yield Difference(area, name, mine, _said(name, other[name]) if name in other else None, is_loud)


def _code(a: Record, b: Record) -> Iterator[Difference]:
    if a.tool_version != b.tool_version:
        yield Difference("code", "version", a.tool_version, b.tool_version)
    if a.source.commit != b.source.commit:
        yield Difference("code", "commit", a.source.commit, b.source.commit)
    if a.source.is_dirty or b.source.is_dirty:
        yield Difference("code", "uncommitted changes", _said("", a.source.is_dirty), _said("", b.source.is_dirty))
    if a.source.compiled and b.source.compiled:  # older records do not know
        yield from _trees("llama-cpp-python", a.source.compiled, b.source.compiled, is_loud=True)


def _runs(a: Record, b: Record) -> Iterator[Difference]:
    if not (a.is_complete and b.is_complete):
        yield Difference("run", "complete", _said("", a.is_complete), _said("", b.is_complete), is_loud=True)
    if a.failures or b.failures:
        yield Difference("run", "failures", str(len(a.failures)), str(len(b.failures)), is_loud=True)


def _said(name: str, value: Any) -> str:
    return shown((name,), list(value) if isinstance(value, tuple) else value) if value is not None else NOT_READ
