"""`edge-llm verify --if-unknown`: what an init container calls at every start measures once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def verify(folder: Path, *more: str) -> dict[str, Any]:
    own = {name: str(folder / name) for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME")}
    command = [sys.executable, "-m", "edge_llm", "verify", "--random", "Q4_0", "--json", "--if-unknown", *more]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_level_that_is_recorded_is_not_measured_again_and_what_is_not_recorded_is(tmp_path: Path) -> None:
    first = verify(tmp_path)
    assert {row["name"] for row in first["rows"]} > {"batch", "split"}
    assert verify(tmp_path) == {
        "model": first["model"],
        "level": first["level"],
        "reason": first["reason"],
        "width": first["width"],
        "is_recorded": True,
    }
    # another class: nobody has measured that
    assert "rows" in verify(tmp_path, "--policy", "fast", "--no-write")
