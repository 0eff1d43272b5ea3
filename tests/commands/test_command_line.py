"""The command as a user runs it: a process, its words and its exit code."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_llm.catalogue.resolve import resolve
from edge_llm.config import DEFAULT_MODEL, cache_dir
from tests.programs import edge_llm

DEADLINE_S = 60.0


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """State of this test alone; models from the user's cache."""
    resolve(DEFAULT_MODEL)
    models = str(cache_dir() / "models")
    folders = {name: str(tmp_path / name) for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")}
    return {**os.environ, **folders, "EDGE_LLM_CATALOGUE_MODELS_DIR": models}


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return edge_llm(environment, *arguments)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield int(holder.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["up", "--model", "no-such-model"], "no-such-model"),
        (["up", "--prefill", "1", "--decode", "0"], "decodes"),
        (["up", "--", "--slots", "0"], "slots"),
        (["verify", "--model", "missing.gguf"], "missing.gguf"),
        (["verify", "--random", "Q9_9"], "Q9_9"),
        (["verify", "--random", "Q4_0", "--shape", "klein-bottle"], "sliding-window"),
        (["models", "show", "no-such-model"], "no-such-model"),
        (["models", "pull", "mine/model.gguf"], "is a path"),
        (["up", "--port", "0"], "--port"),
        (["up", "nonsense"], "nonsense"),
        (["up", "--model", "all-minilm-l6-v2-int8"], "no .gguf"),
        (["serve", "worker", "--simulate"], "key"),
        (["status"], "edge-llm up"),
        (["chat", "--url", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["nonsense"], "nonsense"),
    ],
)
def test_what_cannot_be_done_is_said_in_words_without_a_traceback(
    arguments: list[str], words: str, environment: dict[str, str]
) -> None:
    done = run(arguments, environment)
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_named_before_anything_starts(taken_port: int, environment: dict[str, str]) -> None:
    done = run(["up", "--port", str(taken_port)], environment)
    assert done.returncode == 1
    assert f"port {taken_port} is in use" in done.stderr
    assert "--port" in done.stderr


def test_a_worker_that_does_not_fit_says_the_sum(tmp_path: Path, environment: dict[str, str]) -> None:
    key = tmp_path / "key"
    key.write_text(run(["serve", "key"], environment).stdout)
    key.chmod(0o600)
    limits = {"EDGE_LLM_WORKER_MEMORY_LIMIT_BYTES": str(64 << 20)}
    done = run(["serve", "worker", "--key-file", str(key)], environment | limits)
    assert done.returncode == 1
    for part in ("weights", "KV", "64"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_a_corrupt_model_file_is_refused_with_its_name(tmp_path: Path, environment: dict[str, str]) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    done = run(["models", "show", str(broken)], environment)
    assert done.returncode == 1
    assert "broken.gguf" in done.stderr
    assert "Traceback" not in done.stderr


def up(port: int, environment: dict[str, str]) -> tuple[int, dict[str, int]]:
    """A detached cluster of simulated workers: the supervisor's pid and its workers' pids."""
    done = run(["up", "--port", str(port), "--detach", "--", "--simulate"], environment)
    assert done.returncode == 0, done.stderr
    assert f"http://127.0.0.1:{port}/v1" in done.stdout
    state = json.loads(run(["status", "--port", str(port), "--json"], environment).stdout)
    return state["pid"], {node["worker"]: node["pid"] for node in state["nodes"]}


def is_alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline_s, "processes are still there"
        time.sleep(0.05)


def test_a_cluster_comes_up_says_so_and_goes_down(port: int, environment: dict[str, str]) -> None:
    supervisor, workers = up(port, environment)
    assert set(workers) == {"prefill-1", "decode-1"}
    assert "already runs" in run(["up", "--port", str(port), "--", "--simulate"], environment).stderr
    assert f"stopped the cluster on port {port}" in run(["down", "--port", str(port)], environment).stdout
    wait_until_gone([supervisor, *workers.values()])


def test_a_detached_cluster_says_how_to_talk_to_it_and_how_to_stop_it(port: int, environment: dict[str, str]) -> None:
    said = run(
        ["up", "--port", str(port), "--mixed", "1", "--prefill", "0", "--decode", "0", "--detach", "--", "--simulate"],
        environment,
    ).stdout
    assert f"chat --url http://127.0.0.1:{port}`" in said
    assert f"down --port {port}` stops the cluster" in said
    assert '"mode": "split"' not in said, "a worker that does both has nobody to split with"
    run(["down"], environment)


def test_ctrl_c_before_a_detached_cluster_is_ready_leaves_none(port: int, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "edge_llm", "up", "--port", str(port), "--detach", "--", "--simulate"]
    log = Path(environment["XDG_STATE_HOME"]) / "edge-llm" / "up" / f"{port}.log"
    starting = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not log.exists():
        assert starting.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)  # the other process is there, and far from ready
    starting.send_signal(signal.SIGINT)
    _, said = starting.communicate(timeout=DEADLINE_S)
    assert starting.returncode == 130
    assert "stopped before the cluster was ready" in said
    assert run(["status", "--port", str(port)], environment).returncode == 1


def test_what_dies_is_started_again_under_the_same_name(port: int, environment: dict[str, str]) -> None:
    _, workers = up(port, environment)
    os.kill(workers["prefill-1"], signal.SIGKILL)
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        state = json.loads(run(["status", "--port", str(port), "--json"], environment).stdout)
        found = {node["worker"]: node["pid"] for node in state["nodes"] if node["is_ready"]}
        if found.get("prefill-1", workers["prefill-1"]) != workers["prefill-1"]:
            break
        assert time.monotonic() < deadline_s
    assert found["decode-1"] == workers["decode-1"]
    run(["down", "--port", str(port)], environment)
    wait_until_gone(list(found.values()))


def test_workers_end_with_a_supervisor_that_was_killed(port: int, environment: dict[str, str]) -> None:
    supervisor, workers = up(port, environment)
    os.kill(supervisor, signal.SIGKILL)
    wait_until_gone(list(workers.values()))
