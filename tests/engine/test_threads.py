"""Threads that compute: only the one that steps the engine has a team of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from edge_llm.engine.random_model import make_model

# A process of its own: in this one, other tests have made their threads already.
LOADED = """
import os, sys, time
from pathlib import Path
from edge_llm.engine.load import LlamaSettings, load_backend
before = len(os.listdir("/proc/self/task"))
backend = load_backend(LlamaSettings(Path(sys.argv[1]), "m", "0" * 64, n_ctx=64, slots=1, threads=2, threads_batch=2))
for _ in range(600):  # threads that were told to end do so when they are scheduled
    more = len(os.listdir("/proc/self/task")) - before
    if not more:
        break
    time.sleep(0.05)
print(more)
"""


def test_loading_leaves_no_threads_behind(models_dir: Path) -> None:
    """Teams that together outnumber the cores sleep at every barrier: steps took 2.4 times as long."""
    command = [sys.executable, "-c", LOADED, str(make_model(models_dir, "dense", "Q4_0"))]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split() == ["0"]
