"""The embedded cluster: gateway and workers as child processes on loopback, watched and restarted.

Owns who is started with what, restart with back-off, and the order of starting and stopping; one process is child.py.
It starts the very same `edge-llm serve ...` processes that a real cluster runs; there is no second code path. The
cluster key is made here and inherited by descriptor; who may ask the workers, too, is given it (up.py).

Invariants: all listen on loopback only, without API keys, whatever a settings file says for a real cluster; a worker
keeps its port over restarts, so that the workers file stays true; a child that cannot be started again is tried again
and takes nobody with it; workers of one machine share its memory out; whatever happens, children do not outlive the
supervisor (they also watch for its death).
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from edge_llm.cluster.static import text_of
from edge_llm.commands.child import Child, Say
from edge_llm.config import UpConfig, WorkerConfig, load_settings
from edge_llm.errors import ConfigError, WorkerError
from edge_llm.machine import available_memory_bytes, usable_cores

# Ctrl-C shall not wait for long answers.
GATEWAY_DRAIN_S: Final = 3.0
# What stopping takes beside the drain: open connections (5 s, serving.py), the engine's last step, the interpreter.
BESIDE_DRAIN_S: Final = 12.0
# Here the gateway ends first, and nobody fetches what a worker gives away: only one that hangs takes so long.
WORKER_DRAIN_S: Final = 30.0
MAX_BACKOFF_S: Final = 10.0
LOOPBACK: Final = "127.0.0.1"
_given: Final = deque[int](maxlen=1000)
# A child that lived so long was well: its next death is not the latest of a series.
WELL_S: Final = 10.0
SIMULATED_MODEL: Final = "simulated"
# About a small model on one core of a small board; options after `--` change it.
SIMULATED_SPEED: Final = ("--simulate", "--simulated-prompt-tokens-per-s", "400", "--simulated-step-s", "0.02")


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
        available_bytes: Callable[[], int] = available_memory_bytes,
        gateway_arguments: Sequence[str] = (),
    ) -> None:
        """`place` says at which address the gateway shall find a worker, given its name and port. `key` is that of
        another cluster that this one shall trust, `neighbours` are names and addresses of workers there that its
        gateway shall know too. `available_bytes`: the memory that real workers share out. `gateway_arguments`: more
        options of the gateway."""
        self._say, self._place = say, place or (lambda _name, port: f"{LOOPBACK}:{port}")
        self._neighbours = neighbours
        self.key = key or new_key()
        self._show = _to_stderr if config.show_logs else None
        self._available_bytes = available_bytes
        self.workers = self._plan_workers(config, model, worker_arguments)
        stop_s = GATEWAY_DRAIN_S + BESIDE_DRAIN_S
        arguments = [*self._gateway_arguments(config), *gateway_arguments]
        self.gateway = Child("gateway", arguments, config.port, stop_s=stop_s, show=self._show)

    @property
    def children(self) -> list[Child]:
        return [*self.workers, self.gateway]

    @property
    def stop_s(self) -> float:
        """The longest that stopping all may take."""
        return self.gateway.stop_s + max(child.stop_s for child in self.workers)

    async def run(self, stop: asyncio.Event, on_ready: Callable[[], None]) -> None:
        """Start all, call `on_ready`, restart what dies, stop all when `stop` is set. Raises WorkerError when a
        child cannot start at all."""
        with tempfile.TemporaryDirectory(prefix="edge-llm-up-") as folder:
            self.gateway.arguments += ["--workers-file", str(self._write_workers(Path(folder)))]
            try:
                await self._start_all()
                on_ready()
                async with asyncio.TaskGroup() as group:
                    watchers = [group.create_task(self._watch(child)) for child in self.children]
                    await stop.wait()
                    for watcher in watchers:
                        watcher.cancel()
            finally:
                await self._stop_all()

    # -- plan

    def _plan_workers(self, config: UpConfig, model: str, extra: Sequence[str]) -> list[Child]:
        roles = config.roles
        cores = sorted(os.sched_getaffinity(0))
        threads = config.threads or max(1, usable_cores() // len(roles))
        settings = _worker_settings()
        share = () if config.simulated or settings.memory_limit_bytes else self._memory_share(len(roles))
        drain_s = settings.drain_s if "drain_s" in settings.model_fields_set else WORKER_DRAIN_S
        stop_s = drain_s + BESIDE_DRAIN_S
        workers = []
        for number, role in enumerate(roles):
            name = f"{role}-{roles[:number].count(role) + 1}"
            port = free_port()
            arguments = ["serve", "worker", "--role", role, "--name", name, "--host", LOOPBACK, "--port", str(port)]
            arguments += ["--model", model, "--threads", str(threads), "--threads-batch", str(threads)]
            arguments += SIMULATED_SPEED if config.simulated else share
            mine = tuple(cores[(number * threads + i) % len(cores)] for i in range(threads)) if config.pin else ()
            workers.append(Child(name, [*arguments, *extra], port, mine, stop_s, self._show))
        return workers

    def _memory_share(self, workers: int) -> tuple[str, ...]:
        """They all start at once and would each see the whole of it. An option of the user comes later and wins."""
        return ("--memory-limit-bytes", str(self._available_bytes() // workers))

    def _gateway_arguments(self, config: UpConfig) -> list[str]:
        place = ["--host", LOOPBACK, "--port", str(config.port), "--name", f"gateway-{config.port}"]
        return ["serve", "gateway", *place, "--no-auth", "--drain-s", str(GATEWAY_DRAIN_S)]

    def _write_workers(self, folder: Path) -> Path:
        """The gateway's list of workers."""
        file = folder / "workers.yaml"
        mine = [(child.name, self._place(child.name, child.port)) for child in self.workers]
        file.write_text(text_of((*mine, *self._neighbours)))
        return file

    # -- start

    async def _start_all(self) -> None:
        """Workers all at once. When one of them fails, those that are not ready are not waited for."""
        names = ", ".join(child.name for child in self.workers)
        self._say(f"starting {names}: each checks and loads its model")
        starts = [asyncio.create_task(self._start(child), name=f"start {child.name}") for child in self.workers]
        try:
            await asyncio.wait(starts, return_when=asyncio.FIRST_EXCEPTION)
            for start in starts:
                if start.done():
                    start.result()
        finally:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await asyncio.gather(*(child.kill() for child in self.workers if child.ready is None))
        await self._start(self.gateway)

    async def _start(self, child: Child) -> None:
        await child.start(self.key)
        assert child.ready is not None
        assert child.process is not None
        self._say(f"{child.name} ready on {child.ready['address']} (pid {child.process.pid})")

    # -- watch and stop

    async def _watch(self, child: Child) -> None:
        while True:
            assert child.process is not None
            code = await child.process.wait()
            if asyncio.get_running_loop().time() - child.ready_s > WELL_S:
                child.restarts = 0
            self._say(f"{child.name} died (exit code {code})")
            await self._start_again(child)

    async def _start_again(self, child: Child) -> None:
        """Until it is ready, after longer and longer pauses."""
        is_ready = False
        while not is_ready:
            child.restarts += 1
            pause_s = min(MAX_BACKOFF_S, 0.25 * 2 ** min(child.restarts, 8))
            self._say(f"starting {child.name} again in {pause_s:.1f} s")
            await asyncio.sleep(pause_s)
            try:
                await self._start(child)
                is_ready = True
            except WorkerError as error:
                self._say(error.message)

    async def _stop_all(self) -> None:
        """Gateway first, so that no request meets a missing worker."""
        for group in ([self.gateway], self.workers):
            await asyncio.gather(*(child.stop() for child in group))


def _worker_settings() -> WorkerConfig:
    """What the workers will read from file and environment. Where that is wrong, they say so when they start."""
    try:
        return load_settings(WorkerConfig, {})
    except ConfigError:
        return WorkerConfig()


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")


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
            raise ConfigError(f"port {port} is in use: choose another with --port") from error


def free_port() -> int:
    """A port that nobody listens on, below those that systems give to outgoing connections (Linux: from 32768): one of
    those could take it while a worker is being started again. None that was given lately: benches start several
    clusters at once, and a port is free until its worker listens."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        if port in _given:
            continue
        with socket.socket() as probe, suppress(OSError):
            probe.bind((LOOPBACK, port))
            _given.append(port)
            return port
