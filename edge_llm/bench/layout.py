"""What a bench wants started, and what it gets: the seam between measuring and starting processes.

Owns the words only. Who starts processes is above (commands/local_cluster.py); who measures does not know how.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layout:
    """A cluster to be started: numbers of workers, options for all of them, and for the gateway. `environ`: what is
    added to the workers' environment, NAME=VALUE."""

    name: str
    prefill: int = 0
    decode: int = 0
    mixed: int = 0
    options: tuple[str, ...] = ()
    gateway_options: tuple[str, ...] = ()
    environ: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LocalProcess:
    """`ready_s`: from the start of its cluster until it was ready; None: not known."""

    name: str
    pid: int
    cores: tuple[int, ...]
    port: int = 0
    ready_s: float | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """A server that answers at `url`."""

    url: str
    processes: tuple[LocalProcess, ...]


Launch = Callable[[Layout], AbstractAsyncContextManager[Started]]
