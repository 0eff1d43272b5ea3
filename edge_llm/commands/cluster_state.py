"""The state files of running `edge-llm up`: how `down`, `status` and `bench net` find a cluster.

Owns the files, two per port (the cluster, and the key of its workers), and telling whether their cluster still runs.
Refuses to know what a cluster does.

Invariants: a file whose process ended is no cluster, even when another process has its id now; a key is readable by its
user only, and gone when the cluster has stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from edge_llm.config import state_dir
from edge_llm.errors import ConfigError
from edge_llm.machine import process_life

DEFAULT_PORT: Final = 8080


@dataclass(frozen=True, slots=True)
class ClusterState:
    """One embedded cluster: the supervisor's process and the endpoint. `life` tells the process from others that get
    its id later; `stop_s`: the longest that stopping may take."""

    pid: int
    life: str | None
    port: int
    url: str
    model: str
    workers: dict[str, str]
    stop_s: float

    @classmethod
    def of_this_process(cls, port: int, model: str, workers: dict[str, str], stop_s: float) -> ClusterState:
        pid = os.getpid()
        return cls(pid, process_life(pid), port, f"http://127.0.0.1:{port}", model, workers, stop_s)

    @property
    def is_running(self) -> bool:
        return self.life is not None and process_life(self.pid) == self.life


def state_path(port: int) -> Path:
    return state_dir() / "up" / f"{port}.json"


def key_path(port: int) -> Path:
    return state_path(port).with_suffix(".key")


def write_state(state: ClusterState, key: bytes | None = None) -> None:
    """`key`: of its workers; before the state, so that whoever finds a cluster finds its key."""
    path = state_path(state.port)
    path.parent.mkdir(parents=True, exist_ok=True)
    if key is not None:
        key_path(state.port).unlink(missing_ok=True)  # of one that was killed, maybe with other permissions
        with open(os.open(key_path(state.port), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(asdict(state)))
    draft.replace(path)


def read_state(port: int) -> ClusterState | None:
    """The cluster on this port, if its supervisor lives."""
    try:
        state = ClusterState(**json.loads(state_path(port).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return state if state.is_running else None


def running_clusters() -> Iterator[ClusterState]:
    """All of this user, by port."""
    ports = sorted(int(path.stem) for path in state_path(0).parent.glob("*.json") if path.stem.isdigit())
    yield from filter(None, map(read_state, ports))


def need_state(port: int | None) -> ClusterState:
    """The cluster on `port`; None: the only one. Raises ConfigError, also where several could be meant."""
    running = {state.port: state for state in running_clusters()}
    if port is None and len(running) == 1:
        return next(iter(running.values()))
    if port in running:
        return running[port]
    named = " or ".join(f"--port {one.port} ({one.model})" for one in running.values())
    if port is None:
        raise ConfigError(f"several clusters run: say {named}" if running else "no cluster of `edge-llm up` runs")
    raise ConfigError(f"no cluster of `edge-llm up` runs on port {port}{f'; others run: {named}' if named else ''}")


def url_of_the_only_one() -> str:
    """Where a cluster of this user answers: the only one that runs, or the default port when none does. Raises
    ConfigError that names them where there are several."""
    running = list(running_clusters())
    if len(running) > 1:
        raise ConfigError(
            "several clusters run: say " + " or ".join(f"--url {one.url} ({one.model})" for one in running)
        )
    return running[0].url if len(running) == 1 else f"http://127.0.0.1:{DEFAULT_PORT}"


def forget_state(port: int) -> None:
    """What this process wrote: of two that were started for one port, the one that fails leaves the other's."""
    if (state := read_state(port)) is not None and state.pid != os.getpid():
        return
    state_path(port).unlink(missing_ok=True)
    key_path(port).unlink(missing_ok=True)
