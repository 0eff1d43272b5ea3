"""Child processes of a bench: pinned to cores, given deadlines, their CPU and memory accounted for.

Owns starting, pinning, talking JSON lines to a measuring child, and ending what was started. Refuses to know what is
measured. Invariant: nothing started here outlives its `close` or the end of its `with`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from edge_llm.bench.record import Process
from edge_llm.errors import EdgeLLMError
from edge_llm.machine import peak_memory_bytes, process_usage
from edge_llm.pages import huge_page_environment

_END_S: Final = 10.0
# Loading the largest model that a board of ours holds, from an SD card.
_READY_S: Final = 300.0
_SHOWN: Final = 80


class MeasureFailed(EdgeLLMError):
    """A process that was to be measured failed, hung or said something else than was asked."""

    code = "measure_failed"


@contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """Children started inside run on these cores only; this process goes back to its own afterwards."""
    before = os.sched_getaffinity(0)
    if cores:
        try:
            os.sched_setaffinity(0, cores)
        except OSError as error:
            raise MeasureFailed(f"this machine gives no core {list(cores)}: it has {sorted(before)}") from error
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run_tool(
    command: Sequence[str], environment: Mapping[str, str], cores: Sequence[int], deadline_s: float
) -> tuple[str, Process]:
    """Run a program to its end; its standard output, and what it used. Raises MeasureFailed."""
    name = Path(command[0]).name
    started_s = time.monotonic()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        with pinned(cores):
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env={**os.environ, **environment}
            )
        alarm = _alarm(deadline_s, child)
        try:
            alarm.start()
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        finally:
            alarm.cancel()
            _end(child)
        if child.returncode:
            raise MeasureFailed(f"{name} ended with status {child.returncode}: {_tail(errors)}")
        output.seek(0)
        text = output.read().decode(errors="replace")
    peak_bytes = usage.ru_maxrss * 1024
    wall_s, cpu_s = time.monotonic() - started_s, usage.ru_utime + usage.ru_stime
    return text, Process(name, tuple(cores), wall_s, cpu_s, 0, peak_bytes, peak_bytes)


class Measurer:
    """A process that measures on request: one JSON line to it, one back (edge_llm/engine/measure.py). It runs on the
    pages that workers have, or on `ordinary_pages` throughout, as programs that ask for nothing do."""

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], cores: Sequence[int], *, ordinary_pages: bool = False
    ) -> None:
        self.name, self.cores = name, tuple(cores)
        self._errors = tempfile.TemporaryFile()
        self._started_s = time.monotonic()
        with pinned(cores):
            self._child = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                errors="replace",
                env={**os.environ, **({} if ordinary_pages else huge_page_environment(os.environ))},
            )
        try:
            self.facts = self._answer(_READY_S)
        except BaseException:  # Ctrl-C while a model loads, too: nobody else could end this child
            self.close()
            raise
        usage = process_usage(self._child.pid)
        self._rss_before = usage.rss_bytes if usage else 0

    def ask(self, operation: str, deadline_s: float = 600.0, **arguments: object) -> dict[str, Any]:
        """One measurement. Raises MeasureFailed."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps({"op": operation, **arguments}) + "\n")
            self._child.stdin.flush()
        except OSError as error:
            raise MeasureFailed(f"{self.name} is gone: {_tail(self._errors)}") from error
        return self._answer(deadline_s)

    @property
    def pid(self) -> int:
        return self._child.pid

    def usage(self) -> Process | None:
        """What it used so far; None when it is gone."""
        usage = process_usage(self._child.pid)
        if usage is None:
            return None
        wall_s = time.monotonic() - self._started_s
        peak_bytes = peak_memory_bytes(self._child.pid) or usage.rss_bytes
        return Process(
            self.name, self.cores, wall_s, usage.cpu_s, self._rss_before, usage.rss_bytes, peak_bytes, readings=2
        )

    def close(self) -> None:
        _end(self._child)
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _answer(self, deadline_s: float) -> dict[str, Any]:
        alarm = _alarm(deadline_s, self._child)
        assert self._child.stdout is not None
        try:
            alarm.start()
            line = self._child.stdout.readline()
        finally:
            alarm.cancel()
        if not line:
            raise MeasureFailed(f"{self.name} ended without an answer: {_tail(self._errors)}")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:  # of a child that was killed as it wrote
            raise MeasureFailed(
                f"{self.name} broke off in an answer, at {line[:_SHOWN]!r}: {_tail(self._errors)}"
            ) from error
        if answer.get("event") == "error":
            raise MeasureFailed(f"{self.name}: {answer.get('message')}")
        return answer


def _alarm(deadline_s: float, child: subprocess.Popen[Any]) -> threading.Timer:
    """Ends a child that takes too long. A daemon: Ctrl-C just when it starts must not make this process wait for it."""
    alarm = threading.Timer(deadline_s, child.kill)
    alarm.daemon = True
    return alarm


def _end(child: subprocess.Popen[Any]) -> None:
    """Stop a child that still runs, and take its status."""
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):  # what a child that is gone did not take
                stream.close()
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_END_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _tail(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return " | ".join(lines[-3:]) or "it said nothing"
