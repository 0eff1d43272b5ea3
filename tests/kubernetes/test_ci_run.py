"""`.ci/run` decides: what fails a change, what is only said, and that what it started is told to stop with it.

The real script in a folder of its own, with a `make` and a test cluster that do as they are told.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[2] / ".ci/run"
_MAKE = """#!/bin/bash
echo "$@" >> make.heard
[ "$1" = unit ] && exit "${AGAIN_STATUS:-0}"
mkdir -p .pytest_cache/v/cache
[ -n "${FAILED:-}" ] && echo "$FAILED" > .pytest_cache/v/cache/lastfailed
exit "${MAKE_STATUS:-0}"
"""
_PYTHON = """#!/bin/bash
echo "$@" >> cluster.heard
case "$*" in *--is-ready*) echo "test-cluster: ${WHY:-ready}"; exit "${READY_STATUS:-0}" ;; esac
if [ -n "${RUNS_ON:-}" ]; then
  trap 'sleep 0.3; echo clean > cluster.stopped; exit 130' INT
  touch cluster.runs
  while :; do sleep 0.05; done
fi
exit "${CLUSTER_STATUS:-0}"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {"bin/make": _MAKE, ".venv/bin/python": _PYTHON}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / ".ci").mkdir()
    shutil.copy(_SCRIPT, tmp_path / ".ci/run")
    return tmp_path


def _environment(folder: Path, **told: object) -> dict[str, str]:
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    ours = {name: value for name, value in os.environ.items() if name != "CI_LIMIT_S"}  # that of the run we are in
    return {**ours, "PATH": path, **{name: str(value) for name, value in told.items()}}


def _run(folder: Path, **told: object) -> subprocess.CompletedProcess[str]:
    script = folder / ".ci/run"
    return subprocess.run(
        [script], env=_environment(folder, **told), capture_output=True, text=True, timeout=60, check=False
    )


def _heard(folder: Path) -> list[str]:
    path = folder / "cluster.heard"
    return path.read_text().splitlines() if path.exists() else []


def test_a_change_whose_checks_fail_fails_and_no_cluster_is_asked_for(folder: Path) -> None:
    assert _run(folder, MAKE_STATUS=2).returncode == 2
    assert (folder / "make.heard").read_text() == "test\n"
    assert _heard(folder) == []


def _remembered(*tests: str) -> str:
    return json.dumps(dict.fromkeys(tests, True), indent=2)  # as pytest's cache writes it


@pytest.mark.parametrize("tests", [["tests/a.py::test_b"], ["tests/a.py::test_b[x-1]", "tests/c.py", 'd.py::e["f"]']])
def test_a_few_tests_that_fail_once_and_pass_alone_are_named_and_do_not_fail_the_change(
    folder: Path, tests: list[str]
) -> None:
    done = _run(folder, MAKE_STATUS=2, FAILED=_remembered(*tests))
    assert done.returncode == 0, done.stderr
    assert (folder / "make.heard").read_text() == "test\nunit ARGS=--last-failed\n"
    for name in tests:
        assert f"passed alone, look at it: {json.dumps(name)[1:-1]}" in done.stdout


def test_a_test_that_fails_twice_fails_the_change(folder: Path) -> None:
    done = _run(folder, MAKE_STATUS=2, FAILED=_remembered("tests/a.py::test_b"), AGAIN_STATUS=2)
    assert done.returncode == 2
    assert _heard(folder) == []


def test_many_failing_tests_are_not_the_machines(folder: Path) -> None:
    assert _run(folder, MAKE_STATUS=2, FAILED=_remembered(*(f"a.py::{n}" for n in range(4)))).returncode == 2
    assert (folder / "make.heard").read_text() == "test\n"


def test_what_an_earlier_run_remembered_is_not_this_runs(folder: Path) -> None:
    """Lint that fails ends `make test` before any test ran."""
    old = folder / ".pytest_cache/v/cache/lastfailed"
    old.parent.mkdir(parents=True)
    old.write_text(_remembered("a.py::b"))
    assert _run(folder, MAKE_STATUS=2).returncode == 2
    assert (folder / "make.heard").read_text() == "test\n"


def test_where_no_cluster_can_be_it_says_why_and_the_change_passes(folder: Path) -> None:
    done = _run(folder, READY_STATUS=2, WHY="not here: no package runc")
    assert done.returncode == 0
    assert "the test cluster was not run: not here: no package runc" in done.stdout
    assert len(_heard(folder)) == 1


def test_a_cluster_that_cannot_even_say_whether_it_would_run_fails_the_change(folder: Path) -> None:
    assert _run(folder, READY_STATUS=1).returncode == 1


def test_the_cluster_gets_the_time_that_is_left_and_an_image_of_this_checkout(folder: Path) -> None:
    done = _run(folder)
    assert done.returncode == 0, done.stderr
    words = _heard(folder)[-1].split()
    assert {"--build-image", "--again"} <= set(words)
    assert 2400 < int(words[words.index("--time-s") + 1]) <= 2520


@pytest.mark.parametrize(
    ("cluster_status", "status", "words"),
    [
        (0, 0, "the test cluster passed"),
        (1, 1, "the test cluster failed"),
        (2, 0, "did not run"),
        (3, 0, "not finished in time"),
        (124, 1, "the test cluster failed"),
        (137, 1, "the test cluster failed"),
    ],
)
def test_what_the_cluster_found_decides_and_time_that_was_up_does_not(
    folder: Path, cluster_status: int, status: int, words: str
) -> None:
    done = _run(folder, CLUSTER_STATUS=cluster_status)
    assert done.returncode == status
    assert words in done.stdout + done.stderr


def test_with_too_little_time_left_no_cluster_is_brought_up(folder: Path) -> None:
    done = _run(folder, CI_LIMIT_S=300)
    assert done.returncode == 0
    assert "of 5 minutes only" in done.stdout
    assert not any("--time-s" in line for line in _heard(folder))


@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_lets_the_cluster_clean_up_first(folder: Path, told: signal.Signals) -> None:
    script = subprocess.Popen([folder / ".ci/run"], env=_environment(folder, RUNS_ON=1), start_new_session=True)
    deadline_s = time.monotonic() + 30
    while not (folder / "cluster.runs").exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    script.send_signal(told)
    assert script.wait(30) == 130
    assert (folder / "cluster.stopped").read_text() == "clean\n"
