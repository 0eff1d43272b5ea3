"""One child process of the embedded cluster: given the key, awaited until it says that it is ready, read, stopped.

Owns one process from its start to its end. Refuses to know what it serves and whether it is started again.

Invariants: whatever a child writes is read, so that it never waits for us; what is kept of it is bounded; a start that
fails leaves no process and no descriptor, and is one WorkerError whatever was the reason.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from edge_llm.errors import WorkerError

READY_S: Final = 300.0
# What SIGKILL may take: memory of a large model that is given back, a disk that is waited for.
KILL_S: Final = 10.0
KEPT_LINES: Final = 40
# Longer lines are cut: a log line that holds what a stranger sent must not fill our memory.
LINE_BYTES: Final = 4096
_ERROR: Final = "edge-llm: "  # how cli.py begins one
_BLOCK: Final = 1 << 16
Say = Callable[[str], None]


@dataclass(slots=True)
class Child:
    """One supervised process. `arguments` are those of `program`. `cores` empty = not pinned. `stop_s`: how long it
    may take after SIGTERM. `show` gets each line of its stderr. `restarts` counts a series of deaths one soon after
    another; `ready_s` is on the event loop's clock."""

    name: str
    arguments: list[str]
    port: int
    cores: tuple[int, ...] = ()
    stop_s: float = 15.0
    show: Say | None = None
    program: Sequence[str] = (sys.executable, "-m", "edge_llm")
    process: Process | None = None
    ready: dict[str, Any] | None = None
    restarts: int = 0
    ready_s: float = 0.0
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    readers: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self, key: bytes, within_s: float = READY_S) -> None:
        """Start and wait until it says that it is ready. Raises WorkerError; then nothing runs."""
        try:
            self.process = process = await self._launched(key)
        except OSError as error:
            raise WorkerError(f"{self.name} could not be started: {error}") from error
        self.tail.clear()
        assert process.stdout is not None
        assert process.stderr is not None
        self.readers = [asyncio.create_task(self._keep(process.stderr), name=f"stderr of {self.name}")]
        try:
            self._pin(process)
            async with asyncio.timeout(within_s):
                self.ready = await self._announced(process)
        except TimeoutError as late:
            await self.kill()
            raise WorkerError(f"{self.name} was not ready within {within_s:.0f} s{self._last_words}") from late
        except (OSError, ValueError) as error:
            await self.kill()
            raise WorkerError(f"{self.name} could not start: {error}{self._last_words}") from error
        # it has said all that it says there; whatever a library prints must not fill the pipe
        self.readers.append(asyncio.create_task(self._keep(process.stdout), name=f"stdout of {self.name}"))
        self.ready_s = asyncio.get_running_loop().time()

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL after `stop_s`."""
        if self.process is None or self.process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self.stop_s):
                await self.process.wait()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """The end at once. A pipe that somebody else holds open is not waited for."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            self.process.kill()
        with suppress(TimeoutError):
            async with asyncio.timeout(KILL_S):
                await self.process.wait()
                await asyncio.gather(*self.readers)

    async def _launched(self, key: bytes) -> Process:
        reader, writer = os.pipe()
        try:
            os.write(writer, key)
            return await asyncio.create_subprocess_exec(
                *(*self.program, *self.arguments, "--key-fd", str(reader), "--announce"),
                stdin=PIPE,  # its end tells the child that the supervisor is gone
                stdout=PIPE,
                stderr=PIPE,
                pass_fds=(reader,),
                start_new_session=True,  # Ctrl-C reaches the supervisor alone
            )
        finally:
            os.close(reader)
            os.close(writer)

    def _pin(self, process: Process) -> None:
        if self.cores:
            with suppress(ProcessLookupError):  # dead already: what it wrote says more
                os.sched_setaffinity(process.pid, self.cores)

    async def _announced(self, process: Process) -> dict[str, Any]:
        """What it says of itself once it is ready. Raises ValueError when it says something else, or nothing."""
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            raise ValueError(f"exit code {await process.wait()}")
        try:
            ready = json.loads(line)
        except ValueError:
            ready = None
        if not isinstance(ready, dict) or "address" not in ready:
            raise ValueError(f"it said {line[:200]!r} instead of being ready")
        return ready

    async def _keep(self, stream: asyncio.StreamReader) -> None:
        """Keep the last lines for error messages; pass them on when asked to."""
        rest = b""
        while block := await stream.read(_BLOCK):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                self._line(line)
            rest = rest[: LINE_BYTES + 1]  # one more tells that there was more
        if rest:
            self._line(rest)

    def _line(self, line: bytes) -> None:
        text = line[:LINE_BYTES].decode(errors="replace").rstrip() + (" ..." if len(line) > LINE_BYTES else "")
        self.tail.append(text)
        if self.show is not None:
            with suppress(OSError):  # nobody listens any more: the child must not wait for that
                self.show(f"[{self.name}] {text}")

    @property
    def _last_words(self) -> str:
        """The last lines: an error of ours from its beginning on, however long."""
        lines = list(self.tail)
        begins = [number for number, line in enumerate(lines) if line.startswith(_ERROR)]
        return "".join(f"\n{line}" for line in lines[min([*begins[-1:], max(0, len(lines) - 8)]) :])
