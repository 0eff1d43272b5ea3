"""A memory limit put on a running process from outside, through a cgroup of its own: how boards kill what is too big.

Owns making the group below this process's own, moving one process in, limiting, and removing it. Refuses to know why.
Both cgroup versions; where neither may be written, NoCgroup says why.
"""

from __future__ import annotations

import errno
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog

from edge_llm.errors import EdgeLLMError

_ROOT: Final = Path("/sys/fs/cgroup")
_LIMITS: Final = ("memory.max", "memory.limit_in_bytes")
_COUNTERS: Final = ("memory.events", "memory.oom_control")
_TRIES: Final = 100
_PAUSE_S: Final = 0.02
log = structlog.get_logger()


class NoCgroup(EdgeLLMError):
    """This machine lets us make no memory cgroup."""

    code = "no_cgroup"


class MemoryGroup:
    """One group. Use as a context; processes still inside at the end go back to the group above."""

    def __init__(self, name: str) -> None:
        self._above = _own_group()
        self._folder = self._above / name

    def __enter__(self) -> MemoryGroup:
        try:
            self._folder.mkdir()
            if not any((self._folder / name).exists() for name in _LIMITS):
                self._folder.rmdir()
                raise NoCgroup("the memory controller is not delegated to this cgroup")
        except OSError as error:
            raise NoCgroup(f"no cgroup can be made here: {error.strerror}") from error
        return self

    def __exit__(self, *_exception: object) -> None:
        # a process that the kernel has killed leaves the list of members before it leaves the group
        for _attempt in range(_TRIES):
            try:
                self._move_all_out()
                self._folder.rmdir()
                return
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                time.sleep(_PAUSE_S)
        log.warning("an empty cgroup is left behind", folder=str(self._folder))

    def _move_all_out(self) -> None:
        for pid in (self._folder / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                (self._above / "cgroup.procs").write_text(pid)

    def confine(self, pid: int, limit_bytes: int) -> None:
        """Move a process in and leave it so much new memory. Raises NoCgroup."""
        try:
            (self._folder / "cgroup.procs").write_text(str(pid))
            for name in _LIMITS:
                if (self._folder / name).exists():
                    (self._folder / name).write_text(str(limit_bytes))
        except OSError as error:
            raise NoCgroup(f"process {pid} cannot be limited here: {error.strerror}") from error

    @property
    def kills(self) -> int:
        """How many processes the kernel killed in this group for their memory."""
        for name in _COUNTERS:
            path = self._folder / name
            if path.exists() and (found := re.search(r"^oom_kill (\d+)", path.read_text(), re.MULTILINE)):
                return int(found.group(1))
        return 0


def _own_group() -> Path:
    """This process's own memory cgroup: version 1 has a line of its own, version 2 is line 0."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError as error:
        raise NoCgroup("this system has no cgroups") from error
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _ROOT / "memory" / path.lstrip("/")
    path = next((line.split(":", 2)[2] for line in lines if line.startswith("0::")), "")
    if not path or not os.access(_ROOT / path.lstrip("/"), os.W_OK):
        raise NoCgroup("the memory cgroup of this process cannot be written")
    return _ROOT / path.lstrip("/")
