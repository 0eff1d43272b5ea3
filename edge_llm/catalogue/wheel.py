"""Getting a wheel with the user's own pip, watched: how much of it has come, and that it goes on coming.

Owns the pip command, its temporary folder and its end. Refuses to know what is in a wheel.

pip has no progress for programs before 24.1 (Debian 12 has 23), so what is watched is the file that grows in a
temporary folder of ours. That folder is beside the target on purpose: /tmp may be memory.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from edge_llm.catalogue.manifest import Wheel
from edge_llm.errors import CatalogueError

# pip says so when it tries again, each time within its own 15 s.
SILENT_S: Final = 120.0
RESUMES_SINCE: Final = (25, 1)
_RESUMES: Final = 10
_LOOK_S: Final = 0.2
_PIP: Final = (sys.executable, "-m", "pip")


def download(
    wheel: Wheel,
    folder: Path,
    report: Callable[[int], None],
    silent_s: float = SILENT_S,
    pip: Sequence[str] = _PIP,
) -> Path:
    """The wheel's path somewhere in `folder`, which the caller removes. `report` gets the bytes so far.

    Raises CatalogueError, also when for `silent_s` nothing came and pip said nothing."""
    scratch, log = folder / "tmp", folder / "pip.log"
    scratch.mkdir(parents=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["env", f"TMPDIR={scratch}", *pip, *options(wheel, folder / "wheel", installed_pip())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            status = _watched(process, folder, report, silent_s)
        except TimeoutError:
            raise CatalogueError(f"pip download brought nothing for {silent_s:.0f} s: {_end_of(log)}") from None
        finally:
            process.kill()  # does nothing to one that has ended
            process.wait()
    found = next((folder / "wheel").glob("*.whl"), None)
    if status or found is None:
        raise CatalogueError(f"pip download failed: {_end_of(log)}")
    return found


def options(wheel: Wheel, target: Path, pip_version: tuple[int, ...]) -> list[str]:
    """pip's command line. Where to look is left to the user's configuration."""
    given = ["download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    if pip_version >= RESUMES_SINCE:
        given += ["--resume-retries", str(_RESUMES)]
    return [*given, "--dest", str(target), f"{wheel.package}=={wheel.version}"]


def installed_pip() -> tuple[int, ...]:
    """Major and minor version of this environment's pip; (0,) without one."""
    try:
        return tuple(int(part) for part in version("pip").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return (0,)


def _watched(process: subprocess.Popen[bytes], folder: Path, report: Callable[[int], None], silent_s: float) -> int:
    """The exit status. Raises TimeoutError."""
    seen, seen_s = -1, time.monotonic()
    while True:
        try:
            return process.wait(_LOOK_S)
        except subprocess.TimeoutExpired:
            pass
        sizes = _sizes(folder)
        if sum(sizes) != seen:
            seen, seen_s = sum(sizes), time.monotonic()
            report(max(sizes))  # pip may keep a second copy for its cache
        elif time.monotonic() - seen_s > silent_s:
            raise TimeoutError


def _sizes(folder: Path) -> list[int]:
    """Of all files below; pip removes its own at any moment."""
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size if path.is_file() else 0)
        except OSError:
            continue
    return sizes


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-500:] or "it said nothing"
