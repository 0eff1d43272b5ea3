"""Programs of the machine: run to their end with a deadline, or kept running until they are stopped.

Owns starting, finding and ending them, also those of a run that was killed (their ids lie in files). Refuses to know
what they are for. A program of a network namespace is started by `nsenter`: `ip netns exec` hides the cgroups.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from edge_llm.errors import EdgeLLMError

_CLONE_NEWNET: Final = 0x40000000
_STOP_S: Final = 8.0


class Broken(EdgeLLMError):
    """A program that the test cluster needs failed, or something did not come about in time."""

    code = "broken"


def run(
    *command: str | Path,
    deadline_s: float = 60.0,
    stdin: str | None = None,
    may_fail: bool = False,
    environment: dict[str, str] | None = None,
) -> str:
    """Standard output. Raises Broken with what the program said, unless it may fail."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            env={**os.environ, **(environment or {})},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        if may_fail:
            return ""
        raise Broken(f"{' '.join(words[:6])}: {error}") from error
    if done.returncode and not may_fail:
        said = " | ".join((done.stderr or done.stdout).strip().splitlines()[-6:])
        raise Broken(f"{' '.join(words[:8])} ended with status {done.returncode}: {said}")
    return done.stdout


def end_runs() -> None:
    """End what `run` waits for in other threads, so that these go on. Daemons have sessions of their own."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            words = path.read_text().rpartition(")")[2].split()
            if int(words[1]) == os.getpid() and int(words[3]) == os.getsid(0):
                os.kill(int(path.parent.name), signal.SIGTERM)


def inside(namespace: str) -> list[str]:
    """The beginning of a command that runs in this network namespace."""
    return ["nsenter", f"--net=/run/netns/{namespace}"]


@contextmanager
def moved_to(namespace: str) -> Iterator[None]:
    """This thread, and threads and programs that it starts from now on, are in that network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(path: str | int) -> None:
        descriptor = os.open(path, os.O_RDONLY) if isinstance(path, str) else path
        try:
            if libc.setns(descriptor, _CLONE_NEWNET):
                raise Broken(f"cannot enter network namespace {namespace}: {os.strerror(ctypes.get_errno())}")
        finally:
            os.close(descriptor)

    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    enter(f"/run/netns/{namespace}")
    try:
        yield
    finally:
        enter(home)


@dataclass(slots=True)
class Daemons:
    """Programs that run until they are stopped. `folder`: `pids/` says which process each is, `log/` what it says."""

    folder: Path
    _children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, namespace: str, *command: str | Path) -> None:
        """Its log goes on where an earlier one of the same name ended."""
        for part in ("pids", "log"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        with self.log(name).open("ab") as log:
            child = subprocess.Popen(
                [*inside(namespace), *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the harness, which stops them in order
            )
        self._children[name] = child
        (self.folder / "pids" / name).write_text(f"{child.pid} {_born(child.pid)}")

    def log(self, name: str) -> Path:
        return self.folder / "log" / f"{name}.log"

    def pid(self, name: str) -> int | None:
        """Its process, if it is still that one: ids are used again."""
        try:
            pid, born = map(int, (self.folder / "pids" / name).read_text().split())
        except (OSError, ValueError):
            return None
        child = self._children.get(name)
        if child is not None and child.poll() is not None:
            return None
        return pid if _born(pid) == born else None

    def check(self) -> None:
        """Raises Broken when one is gone that nobody stopped."""
        for name, child in self._children.items():
            if child.poll() is not None:
                raise Broken(f"{name} ended with status {child.returncode}: {self.last_words(name)}")

    def last_words(self, name: str, lines: int = 3) -> str:
        with suppress(OSError):
            return " | ".join(self.log(name).read_text(errors="replace").strip().splitlines()[-lines:])
        return "it said nothing"

    def stop(self, name: str, first: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to end, then make it."""
        pid = self.pid(name)
        deadline_s = time.monotonic() + _STOP_S
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, first)
                os.kill(pid, signal.SIGCONT)
        while self.pid(name) is not None and time.monotonic() < deadline_s:
            time.sleep(0.05)
        if (pid := self.pid(name)) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child = self._children.pop(name, None)
        if child is not None:
            child.wait()
        (self.folder / "pids" / name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """All that were started and not stopped, by this run or by the one that left this folder."""
        try:
            return sorted(path.name for path in (self.folder / "pids").iterdir())
        except OSError:
            return []


def _born(pid: int) -> int:
    """When a process began, in ticks since the machine did; 0: it is gone, whether anybody took notice or not."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if words[0] == "Z" else int(words[19])
