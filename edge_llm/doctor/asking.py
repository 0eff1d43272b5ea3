"""What no file says: programs, the running kernel's clock, free room, and this build of llama.cpp.

Owns asking, with deadlines; every question that gets no answer is None. Refuses to judge answers, and to load llama.cpp
in this process.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from edge_llm import bootstrap
from edge_llm.doctor.build import BuildFacts

PROGRAM_S: Final = 5.0
# Importing llama_cpp from an SD card takes a Pi some seconds; loading a model of 4 GB from one, a minute and a half.
BUILD_S: Final = 60.0
LOAD_S: Final = 600.0
_PACKAGE: Final = "llama-cpp-python"
# systemd's rule (src/basic/time-util.c): below what the kernel sets its bound to when no time server is heard.
_UNSYNCHRONIZED_US: Final = 16_000_000


def ask_program(command: Sequence[str]) -> str | None:
    """A program's output."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROGRAM_S, check=False, text=True
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return done.stdout if done.returncode == 0 else None


def no_program(_command: Sequence[str]) -> None:
    """For files of another board: the programs of this one know nothing of it."""


def free_bytes(folder: Path) -> int | None:
    """Of the disk that a folder is on or will be on."""
    try:
        stat = os.statvfs(next(place for place in (folder, *folder.parents) if place.is_dir()))
    except (OSError, StopIteration):
        return None
    return stat.f_bavail * stat.f_frsize


class _Timex(ctypes.Structure):
    """struct timex of adjtimex(2), as far as the C library writes it on 64-bit Linux."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("rest", ctypes.c_char * 256),
    )


def kernel_clock() -> tuple[bool, float] | None:
    """Whether the clock is kept by a time server, and the bound on its error in seconds. Reading needs no rights."""
    timex = _Timex()
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if library.adjtimex(ctypes.byref(timex)) < 0:
            return None
    except (OSError, AttributeError):
        return None
    return timex.maxerror < _UNSYNCHRONIZED_US, timex.maxerror / 1e6


# --- the build ----------------------------------------------------------------------------------------------------


def ask_build(
    environ: Mapping[str, str], settings: Mapping[str, Any] | None = None
) -> tuple[BuildFacts, dict[str, str]]:
    """What the build says of itself; with a worker's `settings` also the level that this worker would publish."""
    command = [sys.executable, "-m", "edge_llm.engine.about"]
    if settings is not None:
        command += ["--settings", json.dumps(settings)]
    status, answer, error = _answer(command, BUILD_S if settings is None else LOAD_S)
    build = answer.get("build", {})
    facts = BuildFacts(
        python=sys.version_info[:3],
        pointer_bytes=struct.calcsize("P"),
        status=status,
        error=error,
        version=build.get("llama_cpp_python"),
        wanted_version=_wanted_version(),
        system_info=build.get("system_info", ""),
        has_wheel=_has_wheel(environ),
    )
    return facts, answer.get("published", {})


def built_s(package: str = _PACKAGE) -> float | None:
    """When the package was installed, in seconds since the epoch: its list of files is written last."""
    try:
        files = importlib.metadata.files(package) or []
        record = next(Path(str(file.locate())) for file in files if file.name == "RECORD")
        return record.stat().st_mtime
    except (importlib.metadata.PackageNotFoundError, StopIteration, OSError):
        return None


def _answer(command: Sequence[str], deadline_s: float) -> tuple[int | None, dict[str, Any], str]:
    """Status, the JSON that was said (before a death counts too), and the last line of what went wrong."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=deadline_s, check=False, text=True
        )
    except subprocess.TimeoutExpired:
        return None, {}, f"no answer within {deadline_s:.0f} s"
    except (OSError, UnicodeDecodeError) as error:
        return None, {}, str(error)
    answer: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        try:
            part = json.loads(line)
        except ValueError:
            continue
        answer |= part if isinstance(part, dict) else {}
    return done.returncode, answer, done.stderr.strip().rpartition("\n")[2][-300:]


def _wanted_version() -> str | None:
    """What edge-llm itself asks for."""
    try:
        wanted = importlib.metadata.requires("edge-llm") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (re.fullmatch(rf"{_PACKAGE}\s*\(?==\s*([\w.+]+)\)?", line.strip()) for line in wanted)
    return next((match[1] for match in found if match), None)


def _has_wheel(environ: Mapping[str, str]) -> bool | None:
    """None where it cannot be told: no checkout, or no compiler, which is a part of the wheel's name."""
    paths = bootstrap.Paths(bootstrap.ROOT, bootstrap.ROOT / ".venv", bootstrap.cache_folder(environ))
    try:
        compiler = bootstrap.compiler_version(environ)
        return None if compiler is None else bootstrap.cached_wheel(paths, compiler) is not None
    except (OSError, bootstrap.SetupError):
        return None
