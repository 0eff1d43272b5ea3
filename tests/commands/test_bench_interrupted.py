"""Ctrl-C in the middle of a bench: a record that can be read, exit code 130, and JSON as the published schema has it.

Each command in its cheapest form, on simulated workers where it has them. Those that need a model are tested where
their rows are (node, accuracy); what a whole run prints is checked by the same types there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from edge_llm.bench.cases import SUFFIX
from edge_llm.bench.edge_table import ClusterFigures
from edge_llm.bench.record import SCHEMAS, Printed, load
from edge_llm.bench.schemas import PRINTED, GoodputFigures, NetFigures
from edge_llm.bench.serve.results import ServeFigures
from edge_llm.commands.bench import bench, schema
from edge_llm.commands.supervisor import free_port
from edge_llm.report.compare import Comparison

PROGRAM = (sys.executable, "-m", "edge_llm")
RECORDS = Path(__file__).parents[2] / "bench_results"
DEADLINE_S = 90.0
SPEED = ("--simulated-prompt-tokens-per-s", "20000", "--simulated-step-s", "0.002")


@dataclass(frozen=True, slots=True)
class Bench:
    """How it is called, and what it prints. `said`: words of its progress after which it is stopped; without, that is
    when the first line of a finished case is there. `{url}`: a simulated cluster, `{link}`: a board that listens."""

    command: str
    arguments: str
    printed: type[msgspec.Struct] = Printed
    said: str = ""

    @property
    def kind(self) -> str:
        return self.command


BENCHES = (
    Bench("serve", "--url {url} --warm-up 0 --requests 3000 --concurrency 2 --answer-tokens 8", ServeFigures),
    Bench(
        "cluster",
        "--url {url} --placement auto --requests 3000 --tasks none --prompt-tokens 16 --answer-tokens 4",
        ClusterFigures,
    ),
    Bench("net", "--to {link} --seconds 60 --quick", NetFigures),
    Bench("theorem", "--url {url} --prompts 2000", said="answers"),
    Bench("faults", "--kinds late_decode --per-kind 1000"),
    Bench("gateway", "--streams 8 --quick", said="streams run"),
    Bench("pools", "--quick --policies predicted"),
    Bench("overload", "--quick"),
    Bench("goodput", "--engine simulated --quick --no-llama-server", GoodputFigures),
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("home")
    names = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME")
    return {**os.environ, **{name: str(home / name) for name in names}}


@pytest.fixture(scope="module")
def url(environment: dict[str, str]) -> Iterator[str]:
    """Two simulated workers behind a gateway."""
    port = free_port()
    with subprocess.Popen(
        [*PROGRAM, "up", "--simulated", "2", "--port", str(port), "--", *SPEED],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as cluster:
        assert cluster.stdout is not None
        assert any("ready" in line for line in cluster.stdout)
        yield f"http://127.0.0.1:{port}"
        cluster.send_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def link(environment: dict[str, str]) -> Iterator[str]:
    with subprocess.Popen(
        [*PROGRAM, "bench", "net", "--listen", "127.0.0.1:0"], stderr=subprocess.PIPE, text=True, env=environment
    ) as listener:
        assert listener.stderr is not None
        port = listener.stderr.readline().partition(";")[0].rpartition(":")[2]
        yield f"127.0.0.1:{port}"
        listener.send_signal(signal.SIGINT)


def wait_until_it_works(child: subprocess.Popen[str], one: Bench, output: Path) -> None:
    """Until something is finished, or its progress says so."""
    assert child.stderr is not None
    if one.said:
        assert any(one.said in line for line in child.stderr)
        return
    until_s = time.monotonic() + DEADLINE_S
    while not any(path.stat().st_size for path in output.glob(f"*{SUFFIX}")):
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < until_s
        time.sleep(0.02)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("one", BENCHES, ids=lambda one: one.command)
def test_ctrl_c_leaves_a_record_of_what_was_measured(
    one: Bench, url: str, link: str, environment: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = one.arguments.format(url=url, link=link).split()
    with subprocess.Popen(
        [*PROGRAM, "bench", one.command, *arguments, "--json", "--output", str(output)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as child:
        wait_until_it_works(child, one, output)
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does: its children hear it, too
        printed, errors = child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 130, errors
    assert "Traceback" not in errors
    assert "keeping what was measured" in errors
    msgspec.json.decode(printed, type=one.printed)
    record = load(output / Path(json.loads(printed)["record"]).name)
    assert (record.kind, record.is_complete) == (one.kind, False)
    assert record.figures | {"record": None} == json.loads(printed) | {"record": None}
    if not one.said:
        assert record.cases is not None
        assert record.cases.lines > 0


@pytest.mark.parametrize("of", [*SCHEMAS, *PRINTED, "serve", "cluster", "compare", "claims", "report"])
def test_each_schema_is_published_with_its_definitions(of: str) -> None:
    done = CliRunner().invoke(schema, [of])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    name = found["$ref"].rpartition("/")[2]
    assert found["$defs"][name]["type"] == "object"


def test_a_comparison_is_printed_as_its_schema_has_it() -> None:
    path = str(next(path for path in sorted(RECORDS.glob("*.json"))))
    done = CliRunner().invoke(bench, ["compare", path, path, "--json"])
    assert done.exit_code == 0, done.output
    found: Any = msgspec.json.decode(done.output, type=Comparison)
    assert found.regressions == []
