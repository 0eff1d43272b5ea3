"""`bench accuracy` as a user runs it: processes, words, exit codes, and what is left when it is stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edge_llm.bench.accuracy import sources
from edge_llm.bench.accuracy.datasets import SOURCES
from edge_llm.bench.accuracy.similarity import MODEL, TOKENIZER
from edge_llm.bench.accuracy.tasks import TASKS
from edge_llm.bench.record import load
from edge_llm.bench.reference_tools import find
from edge_llm.bench.schemas import AccuracyFigures
from edge_llm.catalogue.fetch import sha256_of
from edge_llm.commands.accuracy import accuracy, cosines_of, show
from edge_llm.config import cache_dir
from edge_llm.engine.random_model import make_model
from edge_llm.errors import CatalogueError, ConfigError
from tests.published import reads_back

DEADLINE_S = 120.0
PROGRAM = "from edge_llm.commands.accuracy import accuracy; accuracy()"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models"))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server on a folder."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", folder
        server.shutdown()
        thread.join()


def start(arguments: list[str], tmp_path: Path) -> subprocess.Popen[str]:
    folders = {name: str(tmp_path / name) for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME")}
    command = [sys.executable, "-c", PROGRAM, "--output", str(tmp_path / "out"), "--threads", "1", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **folders}
    )


def run(arguments: list[str], tmp_path: Path) -> tuple[int, str, str]:
    with start(arguments, tmp_path) as process:
        out, err = process.communicate(timeout=DEADLINE_S)
        return process.returncode, out, err


def invoked(*arguments: str) -> Result:
    return CliRunner().invoke(accuracy, list(arguments))


def test_our_own_set_is_measured_without_any_data_and_a_later_run_takes_it_over(tiny: Path, tmp_path: Path) -> None:
    wanted = ["--model", str(tiny), "--tasks", "own_choice,own_prose,own_instructions", "--limit", "2", "--json"]
    status, out, err = run(wanted, tmp_path)
    assert status == 0, err
    found = json.loads(out)
    tasks = found["models"][tiny.stem]
    assert tasks["own_choice"]["n"] == tasks["own_instructions"]["n"] == 2
    assert tasks["own_prose"]["tokens"] > 0
    record = load(tmp_path / "out" / Path(found["record"]).name)
    assert record.is_complete
    assert record.cases is not None
    assert record.cases.file is not None
    modules = record.workload["prompts"]["own_choice"]["modules"]
    assert modules[0]["text"] == "Question: {question}\nAnswer:"
    assert record.workload["data"]["own_choice"]["sha256"]
    lines = tmp_path / "out" / record.cases.file
    assert record.cases.lines == len(lines.read_text().splitlines())
    status, out, err = run([*wanted, "--resume", str(lines)], tmp_path)
    assert status == 0, err
    again = json.loads(out)
    assert reads_back(again, AccuracyFigures)
    assert again["models"] == found["models"]


def test_a_model_is_compared_with_itself_in_another_format(tiny: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny), "--requantize", "Q8_0", "--tasks", "own_choice,own_prose", "--limit", "3"]
    status, out, err = run([*arguments, "--windows", "1", "--json"], tmp_path)
    assert status == 0, err
    found = json.loads(out)
    assert reads_back(found, AccuracyFigures)
    other = f"{tiny.stem}-as-q8_0"
    assert found["reference"] == tiny.stem
    assert found["models"][other]["own_prose"]["kl"] >= 0.0
    assert found["against_reference"][other]["own_choice"]["n"] == 3


@pytest.mark.skipif(find("ours") is None, reason="llama.cpp's own tools are not built here")
def test_perplexity_is_llama_perplexitys_of_the_same_build_on_the_same_windows(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "XDG_CACHE_HOME").mkdir()
    (tmp_path / "XDG_CACHE_HOME/edge-llm").mkdir()
    (tmp_path / "XDG_CACHE_HOME/edge-llm/reference").symlink_to(cache_dir() / "reference")
    arguments = ["--model", str(tiny), "--requantize", "Q8_0", "--tasks", "own_prose", "--windows", "2"]
    status, out, err = run([*arguments, "--against-llama-perplexity", "--check", "--json"], tmp_path)
    assert status == 0, err
    found = json.loads(out)
    beside = found["against_llama_perplexity"]["models"]
    assert list(beside) == [tiny.stem, f"{tiny.stem}-as-q8_0"]
    for tasks in beside.values():
        assert tasks["own_prose"]["windows"] == 2
        assert tasks["own_prose"]["perplexity"]["ratio"] == pytest.approx(1.0, abs=0.001)
    assert beside[f"{tiny.stem}-as-q8_0"]["own_prose"]["kl"]["llama_perplexity"] >= 0.0
    record = load(tmp_path / "out" / Path(found["record"]).name)
    assert "llama.cpp tools, tree ours" in [engine.name for engine in record.engines]
    assert "llama-perplexity" in [process.name for process in record.processes]


def test_without_llama_cpps_tools_it_is_said_how_to_build_them_before_anything_starts(
    tiny: Path, tmp_path: Path
) -> None:
    arguments = ["--model", str(tiny), "--tasks", "own_prose", "--against-llama-perplexity"]
    status, _, err = run(arguments, tmp_path)
    assert status == 1
    assert "reference-tools" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tasks", "own_prose", "--check"), "--against-llama-perplexity"),
        (("--tasks", "own_choice", "--against-llama-perplexity"), "own_prose"),
    ],
)
def test_nothing_to_compare_is_a_wrong_use(arguments: tuple[str, ...], words: str) -> None:
    done = invoked(*arguments)
    assert done.exit_code == 2
    assert words in done.output


def test_two_files_of_one_name_are_refused_and_the_same_file_twice_is_one_model(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / tiny.name
    copy.write_bytes(tiny.read_bytes() + b" ")
    arguments = ["--tasks", "own_choice", "--limit", "1", "--json"]
    status, _, err = run(["--model", str(tiny), "--model", str(copy), *arguments], tmp_path)
    assert status == 1
    assert "same name" in err
    status, out, err = run(["--model", str(tiny), "--model", str(tiny), *arguments], tmp_path)
    assert status == 0, err
    assert json.loads(out)["models"][tiny.stem]["own_choice"]["n"] == 1


def test_ctrl_c_leaves_a_record_that_can_be_read_and_lines_to_go_on_from(tiny: Path, tmp_path: Path) -> None:
    with start(
        ["--model", str(tiny), "--tasks", "own_instructions", "--limit", "0", "--slots", "1"], tmp_path
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "own_instructions: 2 of 10" in line:
                break
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 130
    (path,) = (tmp_path / "out").glob("*.json")
    record = load(path)
    assert not record.is_complete
    assert record.cases is not None
    assert record.cases.lines >= 2
    assert record.figures["models"][tiny.stem]["own_instructions"]["n"] == record.cases.lines


def test_items_that_do_not_fit_are_counted_and_the_exit_code_says_so(tiny: Path, tmp_path: Path) -> None:
    status, _, err = run(["--model", str(tiny), "--tasks", "own_choice", "--limit", "0", "--n-ctx", "80"], tmp_path)
    assert status == 1
    assert "items failed, the first" in err
    assert "Traceback" not in err
    (path,) = (tmp_path / "out").glob("*.json")
    figures = load(path).figures["models"][tiny.stem]["own_choice"]
    assert figures["failed"] > 0
    assert figures["n"] + figures["failed"] == 40


def test_a_module_is_swapped_by_a_file_and_stands_in_the_record(tiny: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("Q. {question}\nA.\n")
    arguments = ["--model", str(tiny), "--tasks", "own_choice", "--limit", "1", "--module"]
    status, _, err = run([*arguments, f"own_choice.format={mine}"], tmp_path)
    assert status == 0, err
    (path,) = (tmp_path / "out").glob("*.json")
    (module,) = load(path).workload["prompts"]["own_choice"]["modules"]
    assert (module["kind"], module["name"], module["text"]) == ("format", "mine", "Q. {question}\nA.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "arc_hard"], "arc_hard"),
        (["--tasks", ","], "--list"),
        (["--tasks", "piqa"], r"piqa\.jsonl"),
        (["--tasks", "own_choice", "--module", "own_choice.tune=x"], "TASK.KIND=FILE"),
        (["--tasks", "own_choice", "--module", "own_choice.task=absent.txt"], "cannot read"),
        (["--tasks", "own_choice", "--module", "piqa.task=absent.txt"], "piqa|cannot read"),
        (["--tasks", "own_instructions", "--shots", "2"], "--shots 0"),
        (["--tasks", "own_choice", "--resume", "absent.jsonl"], "cannot read"),
        (["--fetch", "arc_easy"], "boolq"),
    ],
)
def test_what_cannot_be_done_is_said_before_a_model_is_loaded(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = invoked(*arguments, "--data", str(tmp_path), "--output", str(tmp_path / "out"))
    assert isinstance(done.exception, ConfigError)
    assert re.search(words, done.exception.message)
    assert not (tmp_path / "out").exists()


def test_the_list_says_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / SOURCES["piqa"].file
    path.parent.mkdir()
    path.write_text("{}")
    rows = json.loads(invoked("--list", "--json", "--data", str(tmp_path)).output)
    states = {row["task"]: row["data"] for row in rows}
    assert (states["piqa"], states["own_choice"], states["boolq"], states["mmlu"]) == (
        "there",
        "ships",
        "fetchable",
        "missing",
    )
    assert all(row["licence"] for row in rows if row["data"] != "ships")
    assert all(row["origin"] for row in rows if row["data"] == "missing"), "who lacks a file is told where it is from"
    assert "piqa/piqa.jsonl" in invoked("--list", "--data", str(tmp_path)).output


def test_a_data_set_is_fetched_by_name_into_its_place_and_proved(
    served: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = served
    (folder / "p").write_text('{"query": "Question: x\\n", "choices": ["a", "b"], "gold": 0}\n')
    size, sha256 = (folder / "p").stat().st_size, sha256_of(folder / "p")
    monkeypatch.setattr(sources, "_RAW", url)
    monkeypatch.setitem(sources.PUBLISHED, "piqa", sources.Published("p", size, sha256, "CC0"))
    done = invoked("--fetch", "piqa", "--data", str(tmp_path / "data"))
    assert done.exit_code == 0, done.output
    assert sha256_of(tmp_path / "data" / SOURCES["piqa"].file) == sha256
    monkeypatch.setitem(sources.PUBLISHED, "piqa", sources.Published("p", size, "0" * 64, "CC0"))
    done = invoked("--fetch", "piqa", "--data", str(tmp_path / "other"))
    assert done.exception is not None
    assert not (tmp_path / "other" / SOURCES["piqa"].file).exists()


def test_the_table_has_every_kind_of_figure(capsys: pytest.CaptureFixture[str]) -> None:
    share = {"value": 0.5, "stderr": None, "low": 0.1, "high": 0.9, "n": 4}
    chance = {"chance": 0.25, "p_value": 0.04, "differs_from_chance": True, "majority": 0.5}
    text = {"n": 2, "failed": 1, "tokens": 5100, "perplexity": 26.7, "perplexity_stderr": 1.6}
    divergence = {"kl": 0.297, "kl_stderr": 0.005, "same_top": 0.69, "same_top_stderr": 0.009}
    against: dict[str, Any] = {"n": 4, "same_answer": 0.75, "gained": 0, "lost": 1, "p_value": 1.0, "same_text": 0.5}
    drift = {"similarity_mean": 0.9, "similarity_p5": 0.8, "share_near": 0.95, "n": 4}
    show(
        {
            "models": {"m": {"arc": {"n": 4, "failed": 0, "acc": share} | chance, "wiki": text | divergence}},
            "against_reference": {"m": {"gsm8k": against | {"drift": drift}}},
        }
    )
    out = capsys.readouterr().out
    for words in ("50.0 %", "10.0 to 90.0", "differs from 25.0 % (p 0.04)", "26.7000", "0.297000", "69.00 %"):
        assert words in out
    for words in ("failed", "75.0 %", "0 gained, 1 lost", "0.900", "drift, not truth"):
        assert words in out
    for word in ("acc: share of right items", "KL from reference: ", "similarity: mean cosine", "+-: standard error"):
        assert word in out
    assert "acc_norm: " not in out, "a measure that is not shown"
    assert "instructions_loose: " not in out


def test_a_line_for_each_task_says_how_it_was_asked_and_that_our_own_set_ranks_nothing(
    tiny: Path, tmp_path: Path
) -> None:
    status, out, err = run(["--model", str(tiny), "--tasks", "own_choice,own_prose", "--limit", "12"], tmp_path)
    assert status == 0, err
    module = TASKS["own_choice"].prompt.modules[0].sha256[:8]
    assert f"own_choice: 12 items, 0 examples before each, seed 0, prompt: format {module}; 40 questions" in out
    assert "windows of 256 tokens" in out
    assert "own set: ranks nothing" in out
    assert "own_choice, own_prose: small sets of our own" in out
    (path,) = (tmp_path / "out").glob("*.json")
    figures = load(path).figures
    assert reads_back(figures, AccuracyFigures)
    assert {"acc", "acc_norm", "perplexity", "against chance"} <= set(figures["definitions"])
    assert figures["tasks"]["own_choice"]["shots"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data", "/nosuch"), "--data /nosuch: there is no such folder; --fetch NAMES --data /nosuch makes it"),
        (("--drift",), "add --requantize FORMAT, or a second --model"),
        (("--drift", "--requantize", "Q8_0", "--tasks", "own_choice"), "own_arithmetic"),
        (("--requantize", "Q9"), "--requantize: unknown quantization 'Q9': known are"),
    ],
)
def test_a_wrong_use_is_said_before_a_model_is_looked_for(arguments: tuple[str, ...], words: str) -> None:
    done = invoked(*arguments, "--model", "no-such-model")
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_a_folder_without_data_is_no_reason_to_ask_something_else(tmp_path: Path) -> None:
    done = invoked("--data", str(tmp_path), "--model", "no-such-model")
    assert done.exit_code == 2
    assert "has the data of no task" in done.output


def test_what_meaning_is_compared_with_is_fetched_though_it_is_no_model_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, listed = tmp_path / "models", dict[str, Any]()
    models.mkdir()
    for name, file in ((MODEL, "m.onnx"), (TOKENIZER, "t.json")):
        made = tmp_path / file
        made.write_bytes(b"{}")
        listed[name] = {"file": file, "size": 2, "sha256": sha256_of(made), "sources": [{"file": str(made)}]}
    (tmp_path / "models.yaml").write_text(json.dumps({"models": listed}))
    monkeypatch.setenv("EDGE_LLM_CATALOGUE_MODELS_FILE", str(tmp_path / "models.yaml"))
    monkeypatch.setenv("EDGE_LLM_CATALOGUE_MODELS_DIR", str(models))
    with pytest.raises(CatalogueError, match=r"onnxruntime cannot load m\.onnx"):
        cosines_of(lambda _what, _done, _total: None)
    assert {path.name for path in models.iterdir()} >= {"m.onnx", "t.json"}
