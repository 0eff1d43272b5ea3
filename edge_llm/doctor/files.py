"""Reading a board's files under a root folder: /proc, /sys, /etc and /boot of this machine, or of a copy in a test.

Owns that a file which is missing, locked, binary or lies is None and never an error. Refuses to know what files mean.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SIZES = {"kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}


@dataclass(frozen=True, slots=True)
class Files:
    """Files below `root`; names are relative (`proc/cmdline`)."""

    root: Path = Path("/")

    @property
    def is_this_machine(self) -> bool:
        """Whether asking the running kernel and programs says something about the same board."""
        return self.root == Path("/")

    def text(self, name: str) -> str | None:
        try:
            return (self.root / name).read_text(errors="replace").strip("\0\n ")
        except OSError:  # sysfs answers EINVAL for the speed of a port that is down
            return None

    def number(self, name: str) -> float | None:
        try:
            return float(self.text(name) or "")
        except ValueError:
            return None

    def exists(self, name: str) -> bool:
        """A link counts wherever it leads: in a copy of /sys it leads nowhere."""
        return os.path.lexists(self.root / name)

    def is_locked(self, name: str) -> bool:
        """It may be there, but this user must not read it."""
        try:
            with (self.root / name).open("rb"):
                return False
        except PermissionError:
            return True
        except OSError:
            return False

    def is_open_to_all(self, name: str) -> bool:
        """It is there, and every user of the machine may read it."""
        try:
            return bool((self.root / name).stat().st_mode & 0o004)
        except OSError:
            return False

    def names(self, folder: str) -> list[str]:
        """What is in a folder, sorted."""
        try:
            return sorted(os.listdir(self.root / folder))
        except OSError:
            return []

    def link(self, name: str) -> str | None:
        """Where a symbolic link points, as written."""
        try:
            return os.readlink(self.root / name)
        except OSError:
            return None

    def fields(self, name: str, separator: str = ":") -> dict[str, str]:
        """`key<separator>value` lines; the first of a key counts (/proc/cpuinfo repeats them for every core)."""
        found: dict[str, str] = {}
        for line in (self.text(name) or "").splitlines():
            key, is_field, value = line.partition(separator)
            if is_field:
                found.setdefault(key.strip(), value.strip())
        return found

    def rows(self, name: str, skip: int = 0) -> Iterator[list[str]]:
        """The words of every line."""
        for line in (self.text(name) or "").splitlines()[skip:]:
            yield line.split()


def size_bytes(text: str | None) -> int | None:
    """`8063488 kB` as bytes."""
    found = re.fullmatch(r"(\d+)\s*([kMG]B)?", text or "")
    return int(found[1]) * _SIZES.get((found[2] or "").lower(), 1) if found else None


def gib(size: float) -> str:
    """For people."""
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"
