"""The top control group of each node, under which its kubelet makes those of the pods; version 1 (also hybrid) and 2.

Owns making and removing them. Refuses to know limits: those are the pods'.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/sys/fs/cgroup")
_V1: Final = ("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "systemd")
_V2: Final = ("cpuset", "cpu", "io", "memory", "pids")
# A whole board, not one process among those of this machine.
_WEIGHT: Final = 32


def is_v2() -> bool:
    return (_ROOT / "cgroup.controllers").exists()


def make(name: str) -> None:
    """Raises OSError."""
    if is_v2():
        control = _ROOT / "cgroup.subtree_control"
        for controller in _V2:
            with suppress(OSError):  # one that this kernel does not have; the kubelet says which it misses
                control.write_text(f"+{controller}")
        (_ROOT / name).mkdir(exist_ok=True)
        with suppress(OSError):
            (_ROOT / name / "cpu.weight").write_text(str(_WEIGHT * 100))
        return
    for controller in _V1:
        if (_ROOT / controller).is_dir():
            (_ROOT / controller / name).mkdir(exist_ok=True)
    (_ROOT / "cpu" / name / "cpu.shares").write_text(str(_WEIGHT * 1024))
    for file in ("cpuset.cpus", "cpuset.mems"):  # a new set is empty, and nothing may run in an empty one
        (_ROOT / "cpuset" / name / file).write_text((_ROOT / "cpuset" / file).read_text())


def processes(name: str, pods: Sequence[str] | None = None) -> set[int]:
    """All that are in it, below it too; or those of pods of these ids only."""
    found: set[int] = set()
    for top in _tops(name):
        for path in top.rglob("cgroup.procs"):
            if pods is None or any(f"pod{uid}" in str(path) for uid in pods):
                with suppress(OSError):
                    found |= set(map(int, path.read_text().split()))
    return found


def remove(name: str) -> None:
    """What is still in use stays."""
    for top in _tops(name):
        for path in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
            with suppress(OSError):
                path.rmdir()
        with suppress(OSError):
            top.rmdir()


def _tops(name: str) -> list[Path]:
    if is_v2():
        return [_ROOT / name] if (_ROOT / name).is_dir() else []
    # a hybrid machine has a version 2 tree beside the others; runc makes groups there, too
    return [path for path in (*(_ROOT / one / name for one in _V1), _ROOT / "unified" / name) if path.is_dir()]
