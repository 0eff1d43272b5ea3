"""`--config FILE` is one file for all that a command reads and starts, not only for the command's own section."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_llm.commands.supervisor import free_port
from edge_llm.engine.random_model import make_model

FOLDERS = ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME")


def refusal(folder: Path, settings: str, *arguments: str) -> str:
    """What a command says that fails because of its settings file."""
    (folder / "mine.yaml").write_text(settings)
    done = subprocess.run(
        [sys.executable, "-m", "edge_llm", *arguments, "--config", "mine.yaml"],
        cwd=folder,
        env={**os.environ, **{name: str(folder / name) for name in FOLDERS}},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("arguments", [("up",), ("serve", "worker")])
def test_the_catalogue_of_the_file_is_used(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "key").write_text(f"k1:{'a' * 64}\n")
    (tmp_path / "key").chmod(0o600)
    settings = f"worker: {{key_file: {tmp_path}/key}}\ncatalogue: {{models_file: {tmp_path}/no-such-list.yaml}}\n"
    assert "no-such-list.yaml" in refusal(tmp_path, settings, *arguments)


def test_the_workers_of_up_read_the_file_too(tmp_path: Path) -> None:
    model = make_model(tmp_path, quantization="F16")  # its header is read; it is never loaded
    words = refusal(tmp_path, f"worker: {{slots: 0}}\nup: {{model: {model}}}\n", "up", "--port", str(free_port()))
    assert "could not start" in words
    assert f"worker.slots in {tmp_path}/mine.yaml" in words
