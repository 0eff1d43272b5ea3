"""`edge-llm bench node` as a user runs it: rows on standard output, the rest on standard error, exit codes."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from edge_llm.bench.record import load
from edge_llm.bench.schemas import NodeFigures
from edge_llm.commands.node import _varying
from edge_llm.engine.random_model import make_model
from edge_llm.power import PowerMeter
from tests.programs import DEADLINE_S, at_home_in, bench, bench_command
from tests.published import reads_back

SMALL = ("-p", "32", "-t", "1", "-r", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("models"), "dense", "Q4_0"))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return at_home_in(tmp_path)


def command(*arguments: str) -> list[str]:
    return bench_command("node", *arguments)


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return bench(environment, "node", *arguments)


def test_rows_for_programs_are_alone_on_standard_output_and_the_record_is_named_beside(
    model: str, environment: dict[str, str], tmp_path: Path
) -> None:
    done = run(environment, "-m", model, *SMALL, "-n", "4", "-o", "csv", "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert [row["test"] for row in csv.DictReader(io.StringIO(done.stdout))] == ["pp32", "tg4"]
    assert "record: " in done.stderr
    (path,) = (tmp_path / "out").glob("*.json")
    record = load(path)
    assert (record.kind, record.is_complete, len(record.figures["rows"])) == ("node", True, 2)
    assert record.cases is not None
    assert record.cases.lines == 2
    assert str(Path(model).parent) not in path.read_text()


@pytest.mark.parametrize("has_counter", [True, False])
def test_watts_have_a_column_where_a_board_counts_energy_though_no_watts_are_known_yet(
    has_counter: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_counter:
        zone = tmp_path / "sys/class/powercap/intel-rapl:0"
        zone.mkdir(parents=True)
        (zone / "energy_uj").write_text("5\n")
        (zone / "max_energy_range_uj").write_text("9\n")
    monkeypatch.setattr("edge_llm.power.PowerMeter", lambda: PowerMeter(tmp_path, lambda: None))
    assert _varying([], SimpleNamespace(tree=None)) == ({"power_w"} if has_counter else set())


def test_markdown_is_for_people_with_definitions_and_the_memory_curve(
    model: str, environment: dict[str, str], tmp_path: Path
) -> None:
    done = run(
        environment, "-m", model, *SMALL, "-n", "0", "--memory-curve", "256", "--output", str(tmp_path), "-oe", "jsonl"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| model")
    assert ("power W: " in done.stdout) is ("power W |" in done.stdout), "defined where there is such a column"
    for words in ("pp32", "t/s: tokens per second", "build: llama-cpp-python", "prefill peak MiB", "record: "):
        assert words in done.stdout
    assert json.loads(done.stderr.splitlines()[0])["test"] == "pp32"


def test_json_is_the_whole_run(model: str, environment: dict[str, str], tmp_path: Path) -> None:
    done = run(environment, "-m", model, *SMALL, "-n", "0", "--json", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert reads_back(found, NodeFigures)
    assert {"rows", "memory_bandwidth", "memory_curve", "definitions", "record"} == set(found)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["-p", "1-"], 2, "-p: cannot read '1-'"),
        (["-ctk", "q3"], 2, "'q3' is none of"),
        (["-p", "0"], 2, "nothing to measure"),
        (["--json", "-o", "csv"], 2, "--json"),
        (["-o", "xml"], 2, "xml"),
        (["-t", "0"], 2, "-t: 0 is below 1"),
        (["--threads-prefill", "0"], 2, "--threads-prefill: 0 is below 1"),
        (["-p", "8", "-d", "100000000"], 1, "Ask for fewer tokens (-d, -p, -n"),
        (["-p", "8", "--check"], 2, "--against-llama-bench"),
        (["-p", "8", "--core", "4095"], 1, "no core [4095]"),
        (["-p", "8", "-m", "no-such-model"], 1, "no-such-model"),
    ],
)
def test_what_cannot_be_done_is_said_in_words_without_a_traceback(
    arguments: list[str], status: int, words: str, model: str, environment: dict[str, str], tmp_path: Path
) -> None:
    done = run(environment, "-m", model, "-n", "0", "-r", "1", "--output", str(tmp_path), *arguments)
    assert done.returncode == status
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_keeps_what_was_measured(model: str, environment: dict[str, str], tmp_path: Path) -> None:
    arguments = ["-m", model, "-p", "16,4000", "-n", "0", "-t", "1", "-r", "200", "-o", "jsonl"]
    child = subprocess.Popen(
        command(*arguments, "--output", str(tmp_path)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    first = json.loads(child.stdout.readline())
    os.killpg(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=DEADLINE_S)
    assert (first["test"], len(first["samples_ns"])) == ("pp16", 200)
    assert child.returncode == 130, errors
    assert "keeping what was measured" in errors
    assert "Traceback" not in errors
    (path,) = tmp_path.glob("*.json")
    record = load(path)
    assert not record.is_complete
    assert record.figures["rows"][0]["test"] == "pp16"
