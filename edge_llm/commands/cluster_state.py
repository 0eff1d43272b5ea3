"""The state file of a running `edge-llm up`: how `down` and `status` find it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_llm.config import state_dir
from edge_llm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ClusterState:
    """One embedded cluster: the supervisor's process and the endpoint."""

    pid: int
    url: str
    model: str
    workers: dict[str, str]


def state_path(port: int) -> Path:
    return state_dir() / "up" / f"{port}.json"


def write_state(port: int, state: ClusterState) -> None:
    path = state_path(port)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(asdict(state)))
    draft.replace(path)


def read_state(port: int) -> ClusterState | None:
    """The cluster on this port, if its supervisor lives."""
    try:
        values = json.loads(state_path(port).read_text())
        state = ClusterState(**values)
        os.kill(state.pid, 0)
    except (OSError, ValueError, TypeError):
        return None
    return state


def need_state(port: int) -> ClusterState:
    state = read_state(port)
    if state is None:
        raise ConfigError(f"no cluster of `edge-llm up` runs on port {port}")
    return state


def forget_state(port: int) -> None:
    state_path(port).unlink(missing_ok=True)
