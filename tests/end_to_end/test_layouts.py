"""Models of other layouts through the whole of it: real workers, real sockets, weights drawn at random."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edge_llm.bench.layout import Layout
from edge_llm.bench.theorem import WAYS, prove
from edge_llm.commands.local_cluster import local_cluster
from edge_llm.engine.random_model import make_model
from tests.programs import DEADLINE_S, at_home_in, edge_llm

pytestmark = pytest.mark.timeout(600)
# of wide KV (384 KiB per token) more would not fit into a small machine, nor would a CI wait for it
SMALL = ("--n-ctx", "320", "--slots", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("shape", "prompts"), [("sliding-window", 16), ("wide-kv", 10), ("head-size-256", 16), ("mqa", 16), ("moe", 16)]
)
async def test_a_layout_goes_through_the_theorem(folder: Path, shape: str, prompts: int) -> None:
    model = make_model(folder, shape)
    async with local_cluster(Layout("test", 1, 1, 0, SMALL), str(model)) as started:
        proof = await prove(started.url, prompts, seed=3)
    assert proof.missed() == []
    assert proof.comparisons == (WAYS - 1) * prompts


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return int(bound.getsockname()[1])


def answered(port: int, mode: str) -> dict[str, Any]:
    vendor = {"mode": mode, "return_token_ids": True}
    body = {"prompt": "one two three", "max_tokens": 16, "temperature": 0, "edge_llm": vendor}
    peer = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    peer.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    said = json.load(peer.getresponse())
    peer.close()
    own: dict[str, Any] = said["timings"]["edge_llm"]
    return own


def test_a_recurrent_model_runs_unsplit_by_the_same_command_and_says_why(folder: Path, tmp_path: Path) -> None:
    port, home = free_port(), at_home_in(tmp_path)
    command = [sys.executable, "-m", "edge_llm", "up", "--model", str(make_model(folder, "recurrent"))]
    log = tmp_path / "log"
    with log.open("w") as output:
        up = subprocess.Popen([*command, "--port", str(port), "--", *SMALL], env=home, stdout=output, stderr=output)
        try:
            deadline_s = time.monotonic() + DEADLINE_S
            while "curl" not in log.read_text():
                assert up.poll() is None, log.read_text()
                assert time.monotonic() < deadline_s, log.read_text()
                time.sleep(0.1)
            nodes = json.loads(edge_llm(home, "status", "--json").stdout)["nodes"]
            split, local = [answered(port, mode) for mode in ("split", "local")]
        finally:
            up.send_signal(signal.SIGINT)
            up.wait(DEADLINE_S)
    assert "is a recurrent model" in log.read_text()
    assert [node["worker"] for node in nodes] == ["mixed-1"]
    assert (split["mode"], split["prefill_node"]) == ("local", "mixed-1")
    assert "recurrent" in split["fallback"]
    assert split["token_ids"] == local["token_ids"]


def test_roles_that_were_asked_for_are_not_changed_but_refused(folder: Path, tmp_path: Path) -> None:
    model = make_model(folder, "recurrent")
    done = edge_llm(at_home_in(tmp_path), "up", "--model", str(model), "--prefill", "1", "--port", str(free_port()))
    assert done.returncode == 1
    assert "--prefill 0 --decode 0 --mixed 1" in done.stderr
