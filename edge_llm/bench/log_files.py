"""Files inside a log: how a Job hands its record to whoever reads its log. Pure.

Owns the lines: a head with name, size and digest, the file (gzip, base64) and an end. Refuses to know who writes and
reads logs. Invariant: a file is whole, checked by its digest, or BadFile; every other line is somebody else's.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import hashlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from edge_llm.errors import EdgeLLMError

# Container runtimes cut lines of more than 16 KiB.
_LINE_BYTES: Final = 3000
_HEAD: Final = re.compile(r"edge-llm file ([\w.+-]{1,200}) bytes (\d{1,12}) sha256 ([0-9a-f]{64})")
_END: Final = "edge-llm file end"
MAX_BYTES: Final = 256 << 20


class BadFile(EdgeLLMError):
    """A file in a log is cut off or damaged."""

    code = "bad_file"


def lines_of_file(name: str, data: bytes) -> Iterator[str]:
    """Raises ValueError for a name that is no plain one."""
    head = f"edge-llm file {name} bytes {len(data)} sha256 {hashlib.sha256(data).hexdigest()}"
    if not _HEAD.fullmatch(head) or name.startswith("."):
        raise ValueError(f"{name!r} is no name for a file in a log")
    yield head
    packed = gzip.compress(data, mtime=0)
    for start in range(0, len(packed), _LINE_BYTES):
        yield base64.b64encode(packed[start : start + _LINE_BYTES]).decode()
    yield _END


@dataclass(slots=True)
class LogReader:
    """Takes a log line by line. `files`: those that were whole, by name."""

    files: dict[str, bytes] = field(default_factory=dict)
    _name: str = ""
    _size: int = 0
    _digest: str = ""
    _packed: list[str] = field(default_factory=list)

    def take(self, line: str) -> str | None:
        """The line when it is for people, None when it is part of a file. Raises BadFile."""
        if self._name:
            if line == _END:
                self._keep()
            elif _HEAD.fullmatch(line):
                raise BadFile(f"{self._name} is cut off in the log")
            else:
                self._packed.append(line)
            return None
        head = _HEAD.fullmatch(line)
        if head is None:
            return line
        if int(head[2]) > MAX_BYTES or head[1].startswith("."):
            raise BadFile(f"{head[1]} in the log is no record: {head[2]} bytes")
        self._name, self._size, self._digest, self._packed = head[1], int(head[2]), head[3], []
        return None

    def end(self) -> None:
        """The log is over. Raises BadFile when a file is not."""
        if self._name:
            raise BadFile(f"{self._name} is cut off in the log")

    def _keep(self) -> None:
        name, self._name = self._name, ""
        try:
            packed = b"".join(base64.b64decode(line, validate=True) for line in self._packed)
            unpacking = zlib.decompressobj(wbits=31)
            data = unpacking.decompress(packed, self._size + 1)
        except (binascii.Error, ValueError, zlib.error) as error:
            raise BadFile(f"{name} is damaged in the log: {error}") from error
        if len(data) != self._size or hashlib.sha256(data).hexdigest() != self._digest:
            raise BadFile(f"{name} is damaged in the log: its digest differs")
        self.files[name] = data
