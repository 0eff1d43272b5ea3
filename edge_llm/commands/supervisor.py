"""The embedded cluster: gateway and workers as child processes on loopback, watched and restarted.

Owns starting, readiness, restart with back-off and stopping. It starts the very same `edge-llm serve ...` processes
that a real cluster runs; there is no second code path. The cluster key is made here and inherited by descriptor.

Invariants: a worker keeps its port over restarts, so that the workers file stays true; whatever happens, children do
not outlive the supervisor (they also watch for its death).
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from edge_llm.config import UpConfig
from edge_llm.errors import ConfigError, WorkerError
from edge_llm.machine import usable_cores

READY_S: Final = 300.0
# Ctrl-C shall not wait for long answers.
GATEWAY_DRAIN_S: Final = 3.0
STOP_S: Final = 15.0
MAX_BACKOFF_S: Final = 10.0
LOOPBACK: Final = "127.0.0.1"
# A child that lived so long was well: its next death is not the latest of a series.
WELL_S: Final = 10.0
SIMULATED_MODEL: Final = "simulated"
# About a small model on one core of a small board; options after `--` change it.
SIMULATED_SPEED: Final = ("--simulate", "--simulated-prompt-tokens-per-s", "400", "--simulated-step-s", "0.02")
Say = Callable[[str], None]


@dataclass(slots=True)
class Child:
    """One supervised process. `cores` empty = not pinned. `restarts` counts a series of deaths one soon after another;
    `ready_s` is on the event loop's clock."""

    name: str
    arguments: list[str]
    port: int
    cores: tuple[int, ...] = ()
    process: asyncio.subprocess.Process | None = None
    ready: dict[str, Any] | None = None
    restarts: int = 0
    ready_s: float = 0.0
    tail: list[str] = field(default_factory=list)


class Supervisor:
    """Children of one cluster, from start to stop."""

    def __init__(
        self,
        config: UpConfig,
        model: str,
        worker_arguments: Sequence[str],
        say: Say,
        place: Callable[[str, int], str] | None = None,
        key: bytes | None = None,
        neighbours: Sequence[tuple[str, str]] = (),
    ) -> None:
        """`place` says at which address the gateway shall find a worker, given its name and port. `key` is that of
        another cluster that this one shall trust, `neighbours` are names and addresses of workers there that its
        gateway shall know too."""
        self._say, self._place = say, place or (lambda _name, port: f"{LOOPBACK}:{port}")
        self._neighbours = neighbours
        self._key = key or new_key()
        self._folder = tempfile.TemporaryDirectory(prefix="edge-llm-up-")
        self._is_stopping = False
        self.workers = self._plan_workers(config, model, worker_arguments)
        self.gateway = Child("gateway", self._gateway_arguments(config), config.port)

    @property
    def children(self) -> list[Child]:
        return [*self.workers, self.gateway]

    async def run(self, stop: asyncio.Event, on_ready: Callable[[], None]) -> None:
        """Start all, call `on_ready`, restart what dies, stop all when `stop` is set. Raises WorkerError when a
        child cannot start at all."""
        try:
            await self._start_all()
            on_ready()
            async with asyncio.TaskGroup() as group:
                watchers = [group.create_task(self._watch(child)) for child in self.children]
                await stop.wait()
                self._is_stopping = True
                for watcher in watchers:
                    watcher.cancel()
        finally:
            self._is_stopping = True
            await self._stop_all()
            self._folder.cleanup()

    # -- plan

    def _plan_workers(self, config: UpConfig, model: str, extra: Sequence[str]) -> list[Child]:
        roles = config.roles
        cores = sorted(os.sched_getaffinity(0))
        threads = config.threads or max(1, usable_cores() // len(roles))
        workers = []
        for number, role in enumerate(roles):
            name = f"{role}-{roles[:number].count(role) + 1}"
            port = free_port()
            arguments = ["serve", "worker", "--role", role, "--name", name, "--port", str(port)]
            arguments += ["--model", model, "--threads", str(threads), "--threads-batch", str(threads)]
            arguments += SIMULATED_SPEED if config.simulated else ()
            mine = tuple(cores[(number * threads + i) % len(cores)] for i in range(threads)) if config.pin else ()
            workers.append(Child(name, [*arguments, *extra], port, mine))
        return workers

    def _gateway_arguments(self, config: UpConfig) -> list[str]:
        file = Path(self._folder.name) / "workers.yaml"
        mine = [(child.name, self._place(child.name, child.port)) for child in self.workers]
        places = [{"name": name, "address": address} for name, address in (*mine, *self._neighbours)]
        file.write_text(yaml.safe_dump(places))
        place = ["--port", str(config.port), "--name", f"gateway-{config.port}", "--workers-file", str(file)]
        return ["serve", "gateway", *place, "--no-auth", "--drain-s", str(GATEWAY_DRAIN_S)]

    # -- start

    async def _start_all(self) -> None:
        results = await asyncio.gather(*(self._start(child) for child in self.workers), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        await self._start(self.gateway)

    async def _start(self, child: Child) -> None:
        """Start and wait until it says that it is ready."""
        reader, writer = os.pipe()
        os.write(writer, self._key)
        os.close(writer)
        command = [sys.executable, "-m", "edge_llm", *child.arguments, "--key-fd", str(reader), "--announce"]
        child.process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,  # its end tells the child that the supervisor is gone
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=(reader,),
            start_new_session=True,  # Ctrl-C reaches the supervisor alone
        )
        os.close(reader)
        if child.cores:
            os.sched_setaffinity(child.process.pid, child.cores)
        stderr = asyncio.create_task(self._read_stderr(child), name=f"stderr {child.name}")
        try:
            async with asyncio.timeout(READY_S):
                line = await child.process.stdout.readline() if child.process.stdout else b""
        except TimeoutError as late:
            raise WorkerError(f"{child.name} was not ready within {READY_S:.0f} s") from late
        if not line:
            await child.process.wait()
            await stderr
            why = "\n".join(child.tail[-8:]) or f"exit code {child.process.returncode}"
            raise WorkerError(f"{child.name} could not start:\n{why}")
        child.ready, child.ready_s = json.loads(line), asyncio.get_running_loop().time()
        self._say(f"{child.name} ready on {child.ready['address']} (pid {child.process.pid})")

    async def _read_stderr(self, child: Child) -> None:
        """Keep the last lines for error messages; pass them on when asked to."""
        assert child.process is not None
        assert child.process.stderr is not None
        async for line in child.process.stderr:
            text = line.decode(errors="replace").rstrip()
            child.tail = [*child.tail[-40:], text]
            if os.environ.get("EDGE_LLM_LOG"):
                sys.stderr.write(f"[{child.name}] {text}\n")

    # -- watch and stop

    async def _watch(self, child: Child) -> None:
        while True:
            assert child.process is not None
            code = await child.process.wait()
            if asyncio.get_running_loop().time() - child.ready_s > WELL_S:
                child.restarts = 0
            child.restarts += 1
            pause_s = min(MAX_BACKOFF_S, 0.25 * 2 ** min(child.restarts, 8))
            self._say(f"{child.name} died (exit code {code}), starting it again in {pause_s:.1f} s")
            await asyncio.sleep(pause_s)
            try:
                await self._start(child)
            except WorkerError as error:
                self._say(error.message)

    async def _stop_all(self) -> None:
        """Gateway first, so that no request meets a missing worker; SIGKILL after STOP_S."""
        for group in ([self.gateway], self.workers):
            await asyncio.gather(*(self._stop(child) for child in group))

    async def _stop(self, child: Child) -> None:
        process = child.process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


def new_key() -> bytes:
    """A cluster key as its file has it."""
    return f"up:{secrets.token_hex(32)}\n".encode()


def check_port_free(port: int) -> None:
    """Raises ConfigError before anything is started."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise ConfigError(f"port {port} is in use: choose another with --port, or `edge-llm down` first") from error


def free_port() -> int:
    """A port that nobody listens on, below those that systems give to outgoing connections (Linux: from 32768): one of
    those could take it while a worker is being started again."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port
