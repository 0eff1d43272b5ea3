"""The `edge-llm` program as a user starts it, in folders of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

DEADLINE_S: Final = 180.0
_FOLDERS: Final = ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME")


def at_home_in(folder: Path) -> dict[str, str]:
    """An environment whose caches, settings and state lie in `folder`."""
    return {**os.environ, **{name: str(folder / name) for name in _FOLDERS}}


def bench_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "edge_llm", "bench", *arguments]


def bench(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`edge-llm bench ARGUMENTS` to its end, whatever that is."""
    return edge_llm(environment, "bench", *arguments)


def edge_llm(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`edge-llm ARGUMENTS` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "edge_llm", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
        stdin=subprocess.DEVNULL,
    )
