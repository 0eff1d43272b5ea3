"""`edge-llm cluster status|top|drain|role` against a cluster of real processes with the simulated engine."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from edge_llm.commands.supervisor import free_port

DEADLINE_S = 60.0
SLOW = ("--simulated-prompt-tokens-per-s", "20000", "--simulated-step-s", "0.02")


@dataclass(frozen=True, slots=True)
class Running:
    """A cluster of `edge-llm up`, and commands that find it."""

    port: int
    environment: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self, *words: str) -> list[str]:
        place = () if "--url" in words else ("--url", self.url)
        return [sys.executable, "-m", "edge_llm", "cluster", *words, *place]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*words),
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_S,
            stdin=subprocess.DEVNULL,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def node(self, name: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/cluster", timeout=10) as reply:
            nodes: list[dict[str, Any]] = json.load(reply)["nodes"]
        return next(node for node in nodes if node["worker"] == name)

    def answer(self, tokens: int) -> dict[str, Any]:
        body = {"prompt": "What is a prefill?", "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        body["edge_llm"] = {"return_token_ids": True}
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as reply:
            found: dict[str, Any] = json.load(reply)
        return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    port, home = free_port(), tmp_path_factory.mktemp("home")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home)}
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "edge_llm", "up", "--simulated", "3", "--prefill", "1", "--decode", "2"),
            *("--port", str(port), "--", *SLOW),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as process:
        try:
            assert process.stdout is not None
            assert next((line for line in process.stdout if "ready" in line), None) is not None
            yield Running(port, environment)
        finally:
            process.send_signal(signal.SIGTERM)


def test_status_shows_every_node_and_who_exchanges_kv(cluster: Running) -> None:
    done = cluster.run("status")
    assert done.returncode == 0, done.stderr
    for name in ("prefill-1", "decode-1", "decode-2"):
        assert name in done.stdout
    assert "decode-1, decode-2, prefill-1 exchange KV of simulated, token for token" in done.stdout


def test_status_as_json_is_the_gateways_overview_and_a_verdict(cluster: Running) -> None:
    found = json.loads(cluster.run("status", "--json").stdout)
    assert found["serves"] is True
    assert found["exchange"][0]["workers"] == ["decode-1", "decode-2", "prefill-1"]
    assert len(found["nodes"]) == 3


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_status_fits_the_terminal_and_cuts_nothing_off(cluster: Running, columns: int) -> None:
    shown = on_terminal(cluster.command("status"), {**cluster.environment, "TERM": "dumb", "COLUMNS": str(columns)})
    nodes = shown[1 : next(number for number, line in enumerate(shown) if "exchange KV" in line)]
    assert all(len(line) <= columns for line in nodes)
    text = " ".join(nodes)
    assert "…" not in text
    for word in ("prefill-1", "decode-1", "decode-2", "ready", "exact", "simulated", "0/8"):
        assert word in text


def test_status_in_a_file_is_one_table_however_narrow_the_terminal(cluster: Running) -> None:
    narrow = Running(cluster.port, {**cluster.environment, "COLUMNS": "40"})
    lines = narrow.run("status").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["node", "decode-1", "decode-2", "prefill-1"]
    assert "…" not in "".join(lines)


def test_a_gateway_that_is_not_there_is_one_line_and_exit_code_1(cluster: Running) -> None:
    nobody = Running(free_port(), cluster.environment)
    for words in (["status"], ["top"], ["drain", "x"], ["role", "x", "decode"]):
        done = nobody.run(*words)
        assert done.returncode == 1
        assert done.stderr.startswith("edge-llm: no answer from a gateway at http://127.0.0.1:")


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8080", "ftp://x", "http://", "http://[::1", "http://x:999999", "http://a b"]
)
def test_what_is_no_address_is_called_that(cluster: Running, url: str) -> None:
    done = cluster.run("status", "--url", url)
    assert done.returncode == 2
    assert f"{url!r} is no address of a server: write http://HOST:PORT" in done.stderr


def test_the_address_that_clients_are_told_will_do(cluster: Running) -> None:
    assert cluster.run("status", "--url", f"{cluster.url}/v1/").returncode == 0


def test_a_worker_that_nobody_knows_is_named_with_those_that_are_known(cluster: Running) -> None:
    done = cluster.run("drain", "decode-9")
    assert done.returncode == 1
    assert "knows no worker decode-9; it knows decode-1, decode-2, prefill-1" in done.stderr


def test_a_drained_worker_hands_its_stream_over_and_comes_back(cluster: Running) -> None:
    alone = cluster.answer(100)
    heard: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: heard.append(cluster.answer(100)))
    asking.start()
    busy = ""
    while not busy:
        names = [n for n in ("decode-1", "decode-2") if cluster.node(n)["load"]["sequences_running"]]
        busy = names[0] if names else ""
    done = cluster.run("drain", busy)
    assert done.returncode == 0, done.stderr
    assert f"{busy} is empty" in done.stdout
    asking.join(DEADLINE_S)
    own = heard[0]["timings"]["edge_llm"]
    assert own["token_ids"] == alone["timings"]["edge_llm"]["token_ids"]
    assert own["decode_node"] != busy
    assert f"{busy} " in (shown := cluster.run("status").stdout)
    assert "drained" in shown
    assert cluster.run("drain", "--undo", busy).returncode == 0
    assert cluster.node(busy)["is_ready"], "a command ends when the gateway sees what it did"


def test_the_last_one_that_decodes_is_not_drained_without_force(cluster: Running) -> None:
    """The prefill worker's spare slots count: it decodes when nobody else does."""
    assert cluster.run("drain", "decode-1").returncode == 0
    assert cluster.run("drain", "decode-2").returncode == 0
    assert cluster.answer(4)["timings"]["edge_llm"]["decode_node"] == "prefill-1"
    refused = cluster.run("drain", "prefill-1")
    assert refused.returncode == 1
    assert "without prefill-1 no ready worker decodes simulated" in refused.stderr
    forced = cluster.run("drain", "prefill-1", "--force", "--json")
    assert json.loads(forced.stdout)["is_draining"] is True
    nobody = cluster.run("status")
    assert nobody.returncode == 1
    assert "nobody serves" in nobody.stderr
    for name in ("prefill-1", "decode-1", "decode-2"):
        assert cluster.run("drain", "--undo", name).returncode == 0


def test_a_role_moves_at_once_and_what_is_missing_is_said(cluster: Running) -> None:
    done = cluster.run("role", "prefill-1", "decode")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("prefill-1: prefill -> decode")
    assert "loaded with 2 slots, others have 8" in done.stdout
    assert "no worker of simulated has role prefill or mixed now" in done.stdout
    done = cluster.run("role", "decode-1", "prefill", "--json")
    assert json.loads(done.stdout)["role"] == "prefill"
    body = cluster.answer(4)["timings"]["edge_llm"]
    assert body["decode_node"] in ("prefill-1", "decode-2")
    for name, role in (("prefill-1", "prefill"), ("decode-1", "decode")):
        assert cluster.run("role", name, role).returncode == 0


def test_a_role_that_a_worker_has_already_changes_nothing_and_says_so(cluster: Running) -> None:
    done = cluster.run("role", "prefill-1", "prefill")
    assert (done.returncode, done.stdout) == (0, "prefill-1 has role prefill already: nothing was changed\n")


def test_the_last_one_whose_role_is_to_decode_keeps_it_without_force(cluster: Running) -> None:
    assert cluster.run("role", "decode-1", "prefill").returncode == 0
    refused = cluster.run("role", "decode-2", "prefill")
    assert refused.returncode == 1
    assert "without decode-2 no ready worker of simulated has role decode or mixed" in refused.stderr
    assert "--force" in refused.stderr
    assert cluster.node("decode-2")["role"] == "decode"
    forced = cluster.run("role", "decode-2", "prefill", "--force")
    assert forced.returncode == 0, forced.stderr
    assert "no worker of simulated has role decode or mixed now" in forced.stdout
    for name in ("decode-1", "decode-2"):
        assert cluster.run("role", name, "decode").returncode == 0


def test_what_takes_an_order_back_can_be_pasted(cluster: Running) -> None:
    done = cluster.run("drain", "decode-1")
    (shown,) = re.findall(r"`edge-llm cluster (.+)` takes it back", done.stdout)
    again = cluster.run(*shlex.split(shown))
    assert (again.returncode, again.stdout) == (0, "decode-1 takes work again\n")


def test_top_once_has_paces_of_work_that_runs(cluster: Running) -> None:
    asking = threading.Thread(target=cluster.answer, args=(200,))
    asking.start()
    while not any(cluster.node(n)["load"]["sequences_running"] for n in ("decode-1", "decode-2")):
        time.sleep(0.02)
    found = json.loads(cluster.run("top", "--once", "--json").stdout)
    asking.join(DEADLINE_S)
    assert sum(node["generated_tokens_per_s"] for node in found["nodes"]) > 0
    assert {node["worker"] for node in found["nodes"]} == {"prefill-1", "decode-1", "decode-2"}


def test_top_that_is_no_terminal_writes_lines_until_it_is_interrupted(cluster: Running) -> None:
    command = cluster.command("top", "--json", "--interval-s", "0.2")
    with subprocess.Popen(command, env=cluster.environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        looks = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 130
    assert all(len(look["nodes"]) == 3 for look in looks)


def test_top_on_a_terminal_ends_with_q(cluster: Running) -> None:
    master, slave = pty.openpty()
    environment = {**cluster.environment, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    with subprocess.Popen(cluster.command("top"), env=environment, stdin=slave, stdout=slave) as process:
        os.close(slave)
        seen = read_until(master, b"decode-2")
        os.write(master, b"q")
        assert process.wait(DEADLINE_S) == 0
    os.close(master)
    assert b"tokens/s out" in seen


def on_terminal(command: list[str], environment: dict[str, str]) -> list[str]:
    """The lines that a command writes to a terminal."""
    master, slave = pty.openpty()
    with subprocess.Popen(command, env=environment, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        seen = b""
        while True:
            try:
                more = os.read(master, 1 << 16)
            except OSError:  # the other end is closed
                break
            seen += more
            if not more:
                break
        process.wait(DEADLINE_S)
    os.close(master)
    return seen.decode().splitlines()


def read_until(terminal: int, wanted: bytes) -> bytes:
    seen, deadline_s = b"", time.monotonic() + DEADLINE_S
    while wanted not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline_s - time.monotonic()))
        assert ready, seen
        seen += os.read(terminal, 1 << 16)
    return seen
