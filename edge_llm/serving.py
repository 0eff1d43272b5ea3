"""What worker and gateway processes share: the key, the port, announcing readiness, logging, and stopping well.

Owns process plumbing. Refuses to know what is served. Order at the end: SIGTERM or Ctrl-C -> `drain` (not ready,
running work finishes, bounded) -> uvicorn stops -> lifespan closes. A second signal stops at once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import resource
import signal
import stat
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from socket import AF_INET, AF_INET6, IPPROTO_TCP, SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, socket
from typing import Any, Final, Literal

import structlog
import uvicorn
from starlette.applications import Starlette

from edge_llm.config import LogLevel
from edge_llm.errors import ConfigError
from edge_llm.worker.tickets import KeyRing

# A worker's: gateways let go before (gateway/app.py).
IDLE_S: Final = 5.0
# Open at once, of files and connections.
MAX_FILES: Final = 1 << 16
log = structlog.get_logger()


def read_keys(file: Path | None, descriptor: int | None) -> KeyRing:
    """The cluster key from an inherited descriptor or a file; never from argv or the environment."""
    if descriptor is not None:
        with os.fdopen(descriptor) as stream:
            return KeyRing.parse(stream.read(), "the inherited key")
    if file is None:
        raise ConfigError("no cluster key: `edge-llm serve key > FILE`, then --key-file FILE, the same on all nodes")
    try:
        if file.stat().st_mode & 0o007:
            raise ConfigError(f"{file} can be read by everybody: chmod 600 {file}")
        return KeyRing.parse(file.read_text(), str(file))
    except OSError as error:
        raise ConfigError(f"cannot read the cluster key {file}: {error.strerror}") from error


def bind(host: str, port: int) -> socket:
    """A bound socket, so that a taken port is said before a model is loaded.

    It names its protocol: asyncio turns Nagle off only for such sockets, and tokens are small writes that must not wait
    for the receiver's delayed ACK (40 ms).
    """
    bound = socket(AF_INET6 if ":" in host else AF_INET, SOCK_STREAM, IPPROTO_TCP)
    bound.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port"
        ) from error
    bound.set_inheritable(True)
    return bound


class Server:
    """uvicorn around one app and one bound socket."""

    def __init__(
        self,
        app: Starlette,
        bound: socket,
        drain: Callable[[], Awaitable[None]],
        http: type[asyncio.Protocol] | Literal["auto"] = "auto",
        idle_s: float = IDLE_S,
    ) -> None:
        """`idle_s`: a connection on which nothing is asked is closed after so long."""
        config = uvicorn.Config(
            app,
            http=http,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=5,
            ws="none",
            server_header=False,
            timeout_keep_alive=math.ceil(idle_s),
        )
        self._server = _Uvicorn(config)
        self._socket, self._drain = bound, drain
        self._has_failed = False

    def fail(self) -> None:
        """Stop now and exit with a failure, so that a supervisor starts the process again."""
        self._has_failed = True
        self._server.should_exit = True

    def run(self, announce: bool, facts: dict[str, Any]) -> None:
        """Serve until told to stop. Exits the process with 1 after `fail`."""
        # uvicorn's choice: uvloop where it is installed, which halves what a token costs the gateway
        with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
            runner.run(self._serve(announce, facts))
        if self._has_failed:
            sys.exit(1)

    async def _serve(self, announce: bool, facts: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        if announce and _is_pipe(sys.stdin.fileno()):
            loop.add_reader(sys.stdin.fileno(), self._on_stdin)
        self._stopping: asyncio.Task[None] | None = None
        serving = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="uvicorn")
        starting = asyncio.create_task(self._server.has_started.wait(), name="starting")
        await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
        starting.cancel()
        host, port = self._socket.getsockname()[:2]
        structlog.get_logger().info("ready", address=f"{host}:{port}", **facts)
        if announce and not serving.done():
            print(json.dumps({"event": "ready", "address": f"{host}:{port}", "pid": os.getpid(), **facts}), flush=True)
        await serving

    def _on_stdin(self) -> None:
        """A supervised process ends with its supervisor, however that died: its end of our stdin is closed."""
        if not os.read(sys.stdin.fileno(), 4096):
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            _close_output()
            self._on_signal()

    def _on_signal(self) -> None:
        if self._stopping is not None:
            self._server.force_exit = self._server.should_exit = True
            return
        self._stopping = asyncio.create_task(self._stop(), name="drain")

    async def _stop(self) -> None:
        try:
            await self._drain()
        except Exception as error:  # whatever it was, the process was told to end
            log.error("draining failed", error=repr(error), exc_info=True)
        finally:
            self._server.should_exit = True


class _Uvicorn(uvicorn.Server):
    """Signals are ours: uvicorn's handlers would stop before the drain. `has_started` is set once the port answers."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.has_started = asyncio.Event()

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        self.has_started.set()

    def install_signal_handlers(self) -> None:
        return

    def capture_signals(self) -> Any:
        import contextlib

        return contextlib.nullcontext()


def _close_output() -> None:
    """Whoever read our output is gone: writing would fail in the middle of stopping."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _is_pipe(descriptor: int) -> bool:
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


class _Lines(structlog.PrintLogger):
    """A line that cannot be written (the card is full, its reader is gone) is lost, and nothing else with it: whoever
    says something is in the middle of what matters more."""

    def msg(self, message: str) -> None:
        with suppress(OSError, ValueError):
            super().msg(message)

    log = debug = info = warn = warning = fatal = failure = err = error = critical = exception = msg


def raise_file_limit() -> None:
    """As many connections as this process may have: what a service gets unasked (1,024) is less than a thousand
    streams, and who has none left takes every worker for dead."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def configure_logging(level: LogLevel = "info") -> None:
    """Lines on stderr: readable on a terminal, JSON elsewhere. Never prompt text.

    What is bound to the context (the request's id) is on every line that is written in it.
    """
    is_terminal = sys.stderr.isatty()
    renderer = structlog.dev.ConsoleRenderer() if is_terminal else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=lambda *_: _Lines(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)  # libraries' own lines, in the same form
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.processors.TimeStamper(fmt="iso"),
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
