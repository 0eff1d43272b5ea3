"""`--config FILE` is one file for all that a command reads and starts, not only for the command's own section."""

from __future__ import annotations

import os
import socket
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


def test_up_takes_the_port_of_the_gateway_and_the_model_of_the_workers_where_nothing_says_otherwise(
    tmp_path: Path,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}" in refusal(tmp_path, f"gateway: {{port: {port}}}\n", "up")
        both = f"gateway: {{port: {port}}}\nup: {{port: {free_port()}, model: no-such-model}}\n"
        assert "no-such-model" in refusal(tmp_path, both, "up"), "what is said of up counts"
    assert "nor-this-one" in refusal(tmp_path, "worker: {model: nor-this-one}\n", "up", "--port", str(free_port()))


def test_the_workers_of_up_read_the_file_too(tmp_path: Path) -> None:
    model = make_model(tmp_path, quantization="F16")
    settings = f"worker: {{v_type: q8_0}}\nup: {{model: {model}}}\n"  # only who loads the model knows that it cannot be
    words = refusal(tmp_path, settings, "up", "--port", str(free_port()))
    assert "could not start" in words
    assert "V q8_0" in words
