"""`edge-llm bench report`: Markdown on standard output, one page in a file, and exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edge_llm.bench.record import encode
from edge_llm.commands.report import report
from edge_llm.errors import EdgeLLMError
from edge_llm.report.document import schema
from tests.report.conftest import a_record


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "bench_results"
    folder.mkdir()
    (folder / "a.json").write_bytes(encode(a_record()))
    return folder


def run(*arguments: str) -> Result:
    return CliRunner().invoke(report, arguments)


def test_without_arguments_it_is_markdown_of_the_results_here(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(results.parent)
    done = run()
    assert done.exit_code == 0
    assert done.stdout.startswith("# Benchmarks")
    assert "[bench_results/a.json](bench_results/a.json)" in done.stdout


def test_a_page_is_written_and_standard_output_stays_empty(results: Path) -> None:
    page = results.parent / "report.html"
    done = run(str(results), "-o", str(page), "--title", "Mine & yours")
    assert done.exit_code == 0
    assert done.stdout == ""
    assert "<title>Mine &amp; yours</title>" in page.read_text()
    assert 'href="bench_results/a.json"' in page.read_text()


def test_both_at_once_and_one_file_only(results: Path) -> None:
    done = run(str(results / "a.json"), "-o", str(results / "r.html"), "--markdown")
    assert done.stdout.startswith("# Benchmarks")
    assert (results / "r.html").exists()


def test_json_has_the_tables(results: Path) -> None:
    tree = json.loads(run(str(results), "--json").stdout)
    (chapter,) = tree["chapters"]
    assert chapter["parts"][0]["tables"][0]["rows"] == [["decode ratio", "1.01"]]


def test_json_is_as_the_published_schema_has_it(results: Path) -> None:
    """By hand: of each object all that it requires, and nothing that it does not name."""
    found, tree = schema(), json.loads(run(str(results), "--json").stdout)

    def check(value: Any, shape: dict[str, Any]) -> None:
        shape = found["$defs"][shape["$ref"].rpartition("/")[2]] if "$ref" in shape else shape
        assert isinstance(value, {"object": dict, "array": list, "string": str}[shape["type"]])
        if isinstance(value, dict):
            assert set(shape["required"]) <= value.keys() <= shape["properties"].keys()
            for name, one in value.items():
                check(one, shape["properties"][name])
        if isinstance(value, list) and isinstance(shape["items"], dict):
            for one in value:
                check(one, shape["items"])

    check(tree, found)
    assert tree["chapters"]


def test_a_broken_file_is_named_on_both_outputs_and_by_the_exit_code(results: Path) -> None:
    (results / "b.json").write_text("{")
    done = run(str(results))
    assert done.exit_code == 1
    assert "b.json" in done.stdout
    assert "not read: b.json" in done.stderr


def test_a_folder_without_records_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    done = run(str(tmp_path))
    assert isinstance(done.exception, EdgeLLMError)
    assert "bench" in str(done.exception)


def test_what_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    assert run(str(tmp_path / "nothing")).exit_code == 2


def test_a_page_that_cannot_be_written_is_said(results: Path) -> None:
    done = run(str(results), "-o", str(results / "no" / "such" / "r.html"))
    assert done.exit_code == 2
    assert "cannot be written" in done.stderr
