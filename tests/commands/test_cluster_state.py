"""How `edge-llm down` and `status` find a cluster: by port or as the only one, and never a stranger's process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from click.testing import CliRunner

from edge_llm.cli import cli
from edge_llm.commands.cluster_state import (
    ClusterState,
    forget_state,
    key_path,
    need_state,
    read_state,
    state_path,
    url_of_the_only_one,
    write_state,
)
from edge_llm.commands.supervisor import free_port
from edge_llm.errors import ConfigError
from edge_llm.machine import process_life

pytestmark = pytest.mark.usefixtures("tmp_cache")


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Somebody's process that ends at SIGTERM."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as running:
        yield running
        running.kill()


def state(port: int, pid: int | None = None) -> ClusterState:
    mine = ClusterState.of_this_process(port, "m", {}, stop_s=20.0)
    return mine if pid is None else replace(mine, pid=pid, life=process_life(pid))


def said(*arguments: str) -> str:
    """What a command says that fails."""
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 1, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.output


def test_the_key_of_a_cluster_is_its_users_only_and_gone_with_it() -> None:
    write_state(state(9001), b"old")
    key_path(9001).chmod(0o644)
    write_state(state(9001), b"secret")
    assert key_path(9001).read_bytes() == b"secret"
    assert key_path(9001).stat().st_mode & 0o777 == 0o600
    forget_state(9001)
    assert not key_path(9001).exists()
    assert read_state(9001) is None


def test_a_cluster_that_fails_to_start_leaves_the_files_of_the_one_that_serves(
    process: subprocess.Popen[bytes],
) -> None:
    write_state(state(9001, process.pid), b"secret")
    forget_state(9001)
    assert read_state(9001) is not None
    assert key_path(9001).exists()


def test_a_process_that_has_the_id_of_a_dead_cluster_is_not_touched(process: subprocess.Popen[bytes]) -> None:
    write_state(replace(state(9001, process.pid), life="another boot:123"))
    assert read_state(9001) is None
    assert "no cluster" in said("down", "--port", "9001")
    assert process.poll() is None


def test_a_file_of_a_version_that_did_not_note_lives_is_no_cluster() -> None:
    write_state(state(9001))
    old = json.loads(state_path(9001).read_text())
    state_path(9001).write_text(json.dumps({key: old[key] for key in ("pid", "url", "model", "workers")}))
    assert read_state(9001) is None


def test_down_stops_the_only_cluster_whatever_its_port(process: subprocess.Popen[bytes]) -> None:
    write_state(state(9001, process.pid))
    done = CliRunner().invoke(cli, ["down"])
    assert done.output.startswith("stopped the cluster on port 9001 (")
    assert process.wait(10) == -signal.SIGTERM


def test_among_several_none_is_meant_until_its_port_is_named() -> None:
    write_state(state(8080))
    write_state(state(9002))
    with pytest.raises(ConfigError, match=r"several clusters run: say --port 8080 .* or --port 9002"):
        need_state(None)
    assert need_state(9002).port == 9002


def test_chat_finds_the_only_cluster_asks_the_default_port_without_one_and_names_several() -> None:
    assert url_of_the_only_one() == "http://127.0.0.1:8080"
    write_state(state(9001))
    assert url_of_the_only_one() == state(9001).url
    write_state(state(9002))
    with pytest.raises(ConfigError, match=r"several clusters run: say --url http://127.0.0.1:9001 .* or --url"):
        url_of_the_only_one()


def test_a_port_that_is_named_is_the_only_one_that_counts() -> None:
    write_state(state(9001))
    assert "port 9002; others run: --port 9001" in said("status", "--port", "9002")


@pytest.mark.parametrize("answers", ["nobody", "nothing"])
def test_a_gateway_that_does_not_answer_is_said_in_words(answers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_llm.commands.up.STATUS_S", 0.2)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1/")  # an answer from there would come at once
    monkeypatch.delenv("no_proxy", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1] if answers == "nothing" else free_port()
        write_state(state(port))
        words = said("status")
    assert f"the cluster on port {port} runs (pid {os.getpid()}), but its gateway does not answer" in words
    assert ("timed out" in words) == (answers == "nothing")
