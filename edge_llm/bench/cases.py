"""What a run finished, one JSON line at a time: a run that is cut short keeps every line it has.

Owns the file of lines beside a record (`<stem of the record>.cases.jsonl`), its name, and what the record says of it:
name, number of lines, digest. Refuses to know what a case means: a line is what the bench gave, with a name and a time.

Invariants: a line is whole or absent, and is in the kernel's hands when `add` returns (a power cut may cost the last
ones: a sync for each request would be what an SD card is measured with); no path of this machine is in it; two runs
never share a file. A disk that is full costs lines, counted, and never the run.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from edge_llm.errors import EdgeLLMError

SUFFIX: Final = ".cases.jsonl"


class BadCases(EdgeLLMError):
    """A file of cases is not what its record says, or holds lines that are none."""

    code = "bad_cases"


class Cases(msgspec.Struct, frozen=True):
    """What a record says of its lines. `file` is a name beside the record; None: they were not kept on a disk.
    `sha256` is empty in the record of a run that was cut off: whatever lines there are belong to it."""

    file: str | None
    lines: int
    sha256: str
    lost: int = 0


class CaseLine(msgspec.Struct, frozen=True):
    """The part of a line that every bench writes; each adds fields of its own, and times in seconds from a moment
    that it names. `case`: what was measured. `at`: when it was finished, UTC."""

    case: str
    at: datetime


class CaseLog:
    """Where lines go: appended to a file in `folder`, or kept in memory without one. May be called by any thread."""

    def __init__(self, folder: Path | None, stem: str, run_id: str) -> None:
        self.kept: list[dict[str, Any]] = []  # what no file has
        self.trouble: str | None = None
        self._path: Path | None = None
        self._file = -1
        self._lost = 0
        self._lock = threading.Lock()
        if folder is not None:
            try:
                self._file, self._path = _created(folder, stem, run_id)
            except OSError as error:
                self.trouble = f"no lines are kept in {folder.name}: {error.strerror}"

    def add(self, line: dict[str, Any]) -> None:
        """Keep one line (JSON's own types); one that cannot be written is counted, the first reason is in `trouble`."""
        data = msgspec.json.encode(line) + b"\n"
        with self._lock:
            if self._path is None:
                self.kept.append(line)
            elif not self._is_written(data):
                self._lost += 1

    def begun(self) -> Cases | None:
        """What a record says that is written before the lines are; None: there is no file."""
        return None if self._path is None else Cases(self._path.name, 0, "")

    def facts(self) -> Cases:
        """What the record says of the lines so far. They are on the disk then, whatever happens to the power."""
        with self._lock:
            if self._path is None:
                data = b"".join(msgspec.json.encode(line) + b"\n" for line in self.kept)
                return Cases(None, len(self.kept), hashlib.sha256(data).hexdigest())
            os.fsync(self._file)
            data = self._path.read_bytes()
            return Cases(self._path.name, data.count(b"\n"), hashlib.sha256(data).hexdigest(), self._lost)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _is_written(self, data: bytes) -> bool:
        """Whole, or taken back: half a line would spoil the next one, too."""
        try:
            start = os.fstat(self._file).st_size
            if os.write(self._file, data) == len(data):
                return True
            os.ftruncate(self._file, start)
        except OSError as error:
            self.trouble = self.trouble or f"a line was not written: {error.strerror}"
        else:
            self.trouble = self.trouble or "a line was not written: no space is left"
        return False


def read(folder: Path, cases: Cases) -> Iterator[dict[str, Any]]:
    """The lines that a record in `folder` speaks of. Raises BadCases when they are not those, OSError."""
    if cases.file is None or Path(cases.file).name != cases.file:
        raise BadCases("this record's lines were not kept in a file beside it")
    data = (folder / cases.file).read_bytes()
    if cases.sha256 and hashlib.sha256(data).hexdigest() != cases.sha256:
        raise BadCases(f"{cases.file} is not the file that its record speaks of: its digest differs")
    return lines_of(data, cases.file)


def lines_of(data: bytes, name: str) -> Iterator[dict[str, Any]]:
    """Every whole line; a last one without its end was cut off with the run and is left out. Raises BadCases."""
    whole = data[: data.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            yield msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise BadCases(f"line {number} of {name} is no case: {error}") from error


def stems(stem: str, run_id: str) -> Iterator[str]:
    """Names to try for a record or its lines: the plain one, then with the run's id, then numbered."""
    yield stem
    for end in itertools.chain(("",), (f"-{number}" for number in itertools.count(2))):
        yield f"{stem}-{run_id[-6:]}{end}"


def with_name(facts: Mapping[str, Any], name: str, at: datetime) -> dict[str, Any]:
    """A line: what is common to all first, then the bench's own."""
    return {"case": name, "at": at.isoformat(), **facts}


def _created(folder: Path, stem: str, run_id: str) -> tuple[int, Path]:
    """A file under a name that no lines and no record have yet."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
    for name in stems(stem, run_id):
        path = folder / f"{name}{SUFFIX}"
        if (folder / f"{name}.json").exists():
            continue
        try:
            return os.open(path, flags, 0o644), path
        except FileExistsError:
            continue
    raise AssertionError("names never end")
