"""What is read for a report: records with the lines beside them, and what could not be read.

Owns the only reading of files in report/: a folder or files in, evidence out. Refuses to know what is made of it.

Rule: a file that is no record, lines that are not those their record speaks of, and lines that no record speaks of
(their run was killed) are evidence, too: they are named in the report, never skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_llm.bench.cases import SUFFIX, BadCases, lines_of, read
from edge_llm.bench.record import BadRecord, Record, load
from edge_llm.errors import EdgeLLMError


class NothingToReport(EdgeLLMError):
    """There is no record where one was looked for."""

    code = "nothing_to_report"


@dataclass(frozen=True, slots=True)
class Evidence:
    """`file` as it is to be linked; `trouble` with its lines."""

    file: str
    record: Record
    lines: tuple[dict[str, Any], ...] = ()
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """Newest first. `unreadable`: file and reason."""

    evidence: tuple[Evidence, ...]
    unreadable: tuple[tuple[str, str], ...]


def gather(paths: Sequence[Path], beside: Path) -> Found:
    """Records in these files and folders, links relative to the folder `beside`. Raises NothingToReport."""
    files = _files(paths)
    evidence: list[Evidence] = []
    unreadable: list[tuple[str, str]] = []
    spoken_of: set[Path] = set()
    for path in (path for path in files if not path.name.endswith(SUFFIX)):
        try:
            record = load(path)
        except (BadRecord, OSError) as error:
            unreadable.append((path.name, str(error)))
            continue
        if record.cases is not None and record.cases.file is not None:
            spoken_of.add(path.parent / record.cases.file)
        lines, trouble = _lines(path, record)
        evidence.append(Evidence(_link(path, beside), record, lines, trouble))
    for path in (path for path in files if path.name.endswith(SUFFIX) and path not in spoken_of):
        unreadable.append((path.name, _orphaned(path)))
    if not evidence and not unreadable:
        where = ", ".join(str(path) for path in paths)
        raise NothingToReport(f"no records in {where}: every `edge-llm bench` command leaves one there")
    evidence.sort(key=lambda one: one.record.started_at, reverse=True)
    return Found(tuple(evidence), tuple(unreadable))


def only(found: Found, kinds: Sequence[str]) -> Found:
    """Records of these kinds; all without any. Raises NothingToReport, with the kinds that there are."""
    if not kinds:
        return found
    kept = tuple(one for one in found.evidence if one.record.kind in kinds)
    if not kept:
        there = ", ".join(sorted({one.record.kind for one in found.evidence})) or "none"
        raise NothingToReport(f"no record of kind {', '.join(kinds)}; there are: {there}")
    return Found(kept, found.unreadable)


def _files(paths: Iterable[Path]) -> list[Path]:
    found: dict[Path, None] = {}
    for path in paths:
        inside = sorted([*path.glob("*.json"), *path.glob(f"*{SUFFIX}")]) if path.is_dir() else [path]
        found.update(dict.fromkeys(one for one in inside if not one.name.startswith(".")))
    return list(found)


def _link(path: Path, beside: Path) -> str:
    """Relative when it lies below `beside` or next to it; else its name, which gives away no path of this machine."""
    relative = Path(os.path.relpath(path.resolve(), beside.resolve()))
    return path.name if relative.parts[:2] == ("..", "..") else relative.as_posix()


def _lines(path: Path, record: Record) -> tuple[tuple[dict[str, Any], ...], str]:
    if record.cases is None or record.cases.file is None:
        return (), ""
    try:
        return tuple(read(path.parent, record.cases)), ""
    except BadCases as error:
        return (), str(error)
    except OSError as error:
        return (), f"{record.cases.file} cannot be read: {error.strerror}"


def _orphaned(path: Path) -> str:
    try:
        count = sum(1 for _ in lines_of(path.read_bytes(), path.name))
    except (BadCases, OSError) as error:
        return str(error)
    return f"{count} finished cases of a run that left no record: it was killed, or is running still"
