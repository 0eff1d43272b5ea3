"""`edge-llm up --simulated N`: who becomes what, and that a stranger's client and `bench net` get answers from it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from edge_llm.commands.supervisor import free_port
from edge_llm.config import UpConfig


@pytest.mark.parametrize(
    ("settings", "roles"),
    [
        ({}, ["prefill", "decode"]),
        ({"simulated": 1}, ["mixed"]),
        ({"simulated": 5}, ["prefill"] * 2 + ["decode"] * 3),
        ({"simulated": 8, "prefill": 2}, ["prefill"] * 2 + ["decode"] * 6),
        ({"simulated": 8, "decode": 6}, ["prefill"] * 2 + ["decode"] * 6),
        ({"simulated": 4, "prefill": 1, "decode": 1}, ["prefill", "decode", "mixed", "mixed"]),
        ({"simulated": 3, "mixed": 3}, ["mixed"] * 3),
    ],
)
def test_simulated_workers_without_a_role_become_what_was_not_given(settings: dict[str, int], roles: list[str]) -> None:
    assert list(UpConfig.model_validate(settings).roles) == roles


@pytest.mark.parametrize(
    "settings",
    [
        {"simulated": 3, "prefill": 3},
        {"simulated": 3, "prefill": 1, "decode": 1, "mixed": 0},
        {"simulated": 2, "prefill": 2, "decode": 1},
    ],
)
def test_roles_that_do_not_add_up_or_decode_nothing_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=r"decodes|have roles"):
        UpConfig.model_validate(settings)


def test_a_simulated_cluster_comes_up_without_a_model_and_answers(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "edge_llm", "up", "--simulated", "3", "--port", str(port), "--"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    with subprocess.Popen(
        [*command, "--simulated-prompt-tokens-per-s", "20000", "--simulated-step-s", "0.001"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as cluster:
        try:
            assert cluster.stdout is not None
            said = next((line for line in cluster.stdout if "ready" in line), "nothing")
            assert f"simulated at http://127.0.0.1:{port}/v1" in said
            answer = ask(port)
            net = subprocess.run(
                [*command[:3], "bench", "net", "--quick", "-o", "jsonl", "--output", str(tmp_path / "out")],
                capture_output=True,
                text=True,
                env=environment,
                timeout=60,
            )
        finally:
            cluster.send_signal(signal.SIGTERM)
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["timings"]["edge_llm"]["mode"] == "split"
    assert net.returncode == 0, net.stderr
    pairs = [json.loads(line) for line in net.stdout.splitlines()]
    assert {("prefill-1", "decode-1"), ("prefill-1", "decode-2")} <= {(pair["from"], pair["to"]) for pair in pairs}
    assert not list(tmp_path.rglob("*.key")), "gone with the cluster"


def ask(port: int) -> Any:
    body = {"prompt": "What is a prefill?", "max_tokens": 12, "ignore_eos": True, "edge_llm": {"mode": "split"}}
    url, headers = f"http://127.0.0.1:{port}/v1/completions", {"content-type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)
