"""Where a record goes is tried before anything is measured, by every bench, and what was measured is never lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from edge_llm.bench.record import load
from edge_llm.bench.run import Run
from edge_llm.commands.bench import bench
from edge_llm.commands.measuring import finish, output_option
from edge_llm.errors import ConfigError

RECORDING = [name for name, one in bench.commands.items() if any(param.name == "output" for param in one.params)]
# A page of records; and what a Job runs, which hands its folder on to a bench.
NOT_RECORDING = ("report", "job")


@pytest.mark.parametrize("command", [name for name in RECORDING if name not in NOT_RECORDING])
@pytest.mark.parametrize("where", ["a file/x", "a file"])
def test_no_bench_measures_for_a_folder_that_takes_no_record(command: str, where: str, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    done = CliRunner().invoke(bench, [command, "--output", str(tmp_path / where)])
    assert done.exit_code == 2, done.output
    assert "--output" in done.output
    assert "a file" in done.output


def test_the_usual_folder_is_tried_when_the_run_begins(tmp_path: Path) -> None:
    (tmp_path / "bench_results").touch()
    with pytest.raises(ConfigError, match="--output"):
        Run("turns", [], {}, folder=tmp_path / "bench_results")


def test_what_leaves_no_record_needs_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench_results").symlink_to(tmp_path / "unplugged" / "disk")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(bench, ["accuracy", "--list"])
    assert done.exit_code == 0, done.output


def test_a_folder_that_nothing_was_written_to_is_not_left_behind(tmp_path: Path) -> None:
    @click.command()
    @output_option
    def idle(output: Path) -> None:
        assert output.is_dir()

    done = CliRunner().invoke(idle, ["--output", str(tmp_path / "new" / "deep")])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    CliRunner().invoke(idle, ["--output", str(tmp_path / "old")])
    assert (tmp_path / "old").is_dir()


@pytest.mark.parametrize("as_json", [True, False])
def test_a_record_that_cannot_be_written_at_the_end_is_kept_elsewhere_and_it_is_said(
    as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spare").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spare"))

    @click.command()
    @output_option
    def measuring(output: Path) -> None:
        output.rmdir()
        output.touch()  # as good as a disk that is full
        finish(Run("turns", [], {}), {"speed": 1.0}, True, output, as_json, [])

    done = CliRunner().invoke(measuring, ["--output", str(tmp_path / "out")])
    assert done.exit_code == 1, done.output
    assert "Traceback" not in done.output
    (path,) = (tmp_path / "spare").rglob("*.json")
    (line,) = [line for line in done.stderr.splitlines() if "cannot be written" in line]
    assert str(path) in line
    assert load(path).figures == {"speed": 1.0}
    if as_json:
        found: Any = json.loads(done.stdout)
        assert found == {"speed": 1.0, "record": str(path)}
