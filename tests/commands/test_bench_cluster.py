"""`edge-llm bench cluster` as a user runs it: processes, the table, words, exit codes, what Ctrl-C leaves."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from edge_llm.bench.record import load
from edge_llm.commands.bench_cluster import cluster, show
from edge_llm.commands.cluster_places import gateway_for
from edge_llm.commands.supervisor import free_port, new_key
from edge_llm.engine.random_model import make_model
from tests.programs import DEADLINE_S, at_home_in, bench, bench_command

SERVE = (sys.executable, "-m", "edge_llm", "serve", "worker", "--simulate", "--simulated-step-s", "0.005")
FEW = ("--requests", "2", "--answer-tokens", "4", "--prompt-tokens", "24")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models"))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return at_home_in(tmp_path)


def command(*arguments: str) -> list[str]:
    return bench_command("cluster", *arguments)


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return bench(environment, "cluster", *arguments)


def test_a_model_of_ones_own_gets_speed_cost_accuracy_and_verdicts_and_a_broken_one_is_a_failure(
    tiny: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(tiny.read_bytes()[:4000])
    models, out = f"{bad},{tiny},no-such-model", str(tmp_path / "out")
    done = run(environment, "--models", models, "--placement", "mixed", *FEW, "--quick", "--json", "--output", out)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout)
    (row,) = found["rows"]
    assert (row["model"], row["placement"], row["node"], row["completed"]) == (tiny.stem, "mixed", "local", 2)
    rates = ("prompt_tokens_per_s", "generation_tokens_per_s", "sampling_tokens_per_s", "engine_prompt_tokens_per_s")
    for name in (*rates, "load_s", "ttft_s", "tpot_ms", "ram_share", "peak_rss_bytes", "perplexity", "accuracy"):
        assert row[name] is not None, name
        assert row[name] >= 0, name
    assert row["intervals"]["accuracy"]["n"] == found["models"][tiny.stem]["own_choice"]["n"] == 10
    assert row["differs_from_chance"] is not None
    assert any("the paper's claim" in line for line in found["sentences"])
    assert any(f"{tiny.stem}: " in line and "chance" in line for line in found["sentences"])
    (path,) = (tmp_path / "out").glob("*.json")
    record = load(path)
    assert {failure.what for failure in record.failures} == {"no-such-model", str(bad.name)}
    assert record.figures["rows"] == found["rows"]
    assert record.workload["placements"] == ["mixed"]
    assert record.workload["data"]["own_choice"]["sha256"]
    assert str(tmp_path) not in path.read_text()


def test_placements_of_a_simulated_cluster_are_rows_of_one_table_and_programs_get_it_alone(
    environment: dict[str, str], tmp_path: Path
) -> None:
    arguments = ("--models", "simulated", "--placement", "split,auto", *FEW, "--output", str(tmp_path / "out"))
    done = run(environment, *arguments, "-o", "csv")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["placement"] for row in rows] == ["split", "auto"]
    assert rows[0]["modes"] == "split: 2"
    assert rows[0]["roles"] == "prefill-1, decode-1"
    assert float(rows[0]["transfer_ms"]) > 0
    assert "record: " in done.stderr


def test_people_get_the_table_the_sentences_and_the_definitions(environment: dict[str, str], tmp_path: Path) -> None:
    arguments = ("--models", "simulated", "--placement", "mixed", *FEW, "--tasks", "none")
    done = run(environment, *arguments, "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| model")
    for words in ("generation t/s", "the paper's claim", "TTFT: from sending", "record: "):
        assert words in done.stdout


def test_ctrl_c_keeps_the_rows_that_are_finished(environment: dict[str, str], tmp_path: Path) -> None:
    arguments = ("--models", "simulated", "--placement", "mixed,split", *FEW[2:], "--requests", "4", "--tasks", "none")
    child = subprocess.Popen(
        command(*arguments, "--output", str(tmp_path / "out")),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stderr is not None
    for line in child.stderr:
        if "simulated, split: 1 of 4" in line or "simulated, split: 0 of 4" in line:
            break
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 130, errors
    assert "Traceback" not in errors
    (path,) = (tmp_path / "out").glob("*.json")
    record = load(path)
    assert not record.is_complete
    whole, *parts = record.figures["rows"]
    assert (whole["placement"], whole["planned"]) == ("mixed", None)
    assert all((part["placement"], part["planned"]) == ("split", 4) for part in parts)


def test_rows_can_be_had_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    show({"rows": [{"model": "a"}, {"model": "b"}]}, "jsonl")
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [{"model": "a"}, {"model": "b"}]


@pytest.fixture
def workers(environment: dict[str, str], tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A prefill and a decode worker that somebody else runs: their file, and their key's."""
    key, file = tmp_path / "cluster.key", tmp_path / "workers.yaml"
    key.write_bytes(new_key())
    key.chmod(0o600)
    ports = {role: free_port() for role in ("prefill", "decode")}
    file.write_text(yaml.safe_dump([{"name": f"pi-{r}", "address": f"127.0.0.1:{p}"} for r, p in ports.items()]))
    started = [
        subprocess.Popen(
            [*SERVE, "--role", role, "--name", f"pi-{role}", "--port", str(port), "--key-file", str(key)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for role, port in ports.items()
    ]
    try:
        yield file, key
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(timeout=30)


def test_workers_that_run_already_are_measured_alone_and_together_and_their_boards_watched(
    workers: tuple[Path, Path], environment: dict[str, str], tmp_path: Path
) -> None:
    file, key = map(str, workers)
    out = str(tmp_path / "out")
    done = run(
        environment,
        "--workers-file",
        file,
        "--key-file",
        key,
        *FEW,
        "--placement",
        "node,split",
        "--json",
        "--output",
        out,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    places = [(row["placement"], row["node"], row["roles"]) for row in rows]
    assert ("split", "pi-prefill", "prefill") in places
    assert ("split", "pi-decode", "decode") in places
    assert ("pi-decode", "pi-decode", "prefill, decode") in places
    for row in rows:
        assert row["ram_share"] is not None
        assert row["peak_rss_bytes"] is not None
        assert row["engine_generation_tokens_per_s"] is not None
        assert (row["load_s"], row["accuracy"]) == (None, None)


def test_the_boards_of_a_gateway_are_watched_where_it_says_they_are(
    workers: tuple[Path, Path], environment: dict[str, str], tmp_path: Path
) -> None:
    file, key = workers

    async def measured() -> subprocess.CompletedProcess[str]:
        places = {one["name"]: one["address"] for one in yaml.safe_load(file.read_text())}
        async with gateway_for(places, key.read_bytes()) as started:
            arguments = ("--url", started.url, "--boards", "--placement", "split,local", *FEW, "--json")
            return await asyncio.to_thread(run, environment, *arguments, "--output", str(tmp_path / "out"))

    done = asyncio.run(measured())
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert sorted((row["placement"], row["node"]) for row in rows) == [
        *(("local", "pi-decode"), ("local", "pi-prefill")),
        *(("split", "pi-decode"), ("split", "pi-prefill")),
    ]
    assert all(row["cpu_share"] is not None and row["ram_share"] is not None for row in rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--placement", "mixed,twice"], "twice"),
        (["--url", "http://127.0.0.1:1", "--placement", "mixed"], "mixed"),
        (["--url", "127.0.0.1:8080"], "http://HOST:PORT"),
        (["--workers-file", "w.yaml"], "--key-file"),
        (["--key-file", "k"], "--workers-file"),
        (["--boards"], "--url"),
        (["--url", "http://127.0.0.1:1", "--models", "a,b"], "has one model"),
        (["--json", "-o", "csv"], "--json"),
        (["-o", "xml"], "xml"),
        (["--answer-tokens", "many"], "--answer-tokens"),
        (["--requests", "0"], "--requests"),
        (["--requantize", "Q4_0,Q9"], "unknown quantization 'Q9'"),
        (["--data", "/nosuch"], "does not exist"),
    ],
)
def test_what_cannot_be_done_is_a_usage_error_before_anything_starts(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    done = CliRunner().invoke(cluster, [*arguments, "--output", str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    assert words in done.output
    assert not (tmp_path / "out").exists()


def test_a_gateway_that_is_not_there_is_a_failure_in_words(environment: dict[str, str], tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = run(environment, "--url", url, "--tasks", "none", "--output", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "nothing that speaks HTTP answers" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_task_without_data_is_said_before_anything_starts(environment: dict[str, str], tmp_path: Path) -> None:
    done = run(environment, "--tasks", "piqa", "--data", str(tmp_path), "--output", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "piqa needs" in done.stderr
    assert not (tmp_path / "out").exists()
