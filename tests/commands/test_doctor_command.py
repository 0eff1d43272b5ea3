"""`edge-llm doctor` as a user runs it: a process, its words, its JSON and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edge_llm.doctor.finding import Report
from tests.catalogue.conftest import Maker
from tests.catalogue.conftest import make_gguf as make_gguf
from tests.doctor.boards import CPUFREQ, changed, fitting_pi5, unfit_pi5, write

_RUN = "from edge_llm.commands.doctor import doctor; doctor(prog_name='edge-llm doctor')"
FOLDERS = ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME")


@pytest.fixture
def environment(tmp_path: Path, make_gguf: Maker) -> dict[str, str]:
    """Folders of this test alone, and settings that name a model which is there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_LLM_")}
    folders = {name: str(tmp_path / name) for name in FOLDERS}
    return {**kept, **folders, "EDGE_LLM_WORKER_MODEL": str(make_gguf())}


def doctor(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_a_fitting_board_exits_with_0_a_warned_one_with_1_and_a_failed_one_with_2(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    slow = changed(fitting_pi5(), {f"{CPUFREQ}/scaling_governor": "ondemand\n"})
    boards = {"fit": fitting_pi5(), "slow": slow, "unfit": unfit_pi5()}
    codes = {name: doctor(environment, "--root", str(write(tmp_path / name, tree))) for name, tree in boards.items()}
    assert {name: done.returncode for name, done in codes.items()} == {"fit": 0, "slow": 1, "unfit": 2}


def test_people_get_lines_to_type(tmp_path: Path, environment: dict[str, str]) -> None:
    done = doctor(environment, "--root", str(write(tmp_path / "pi", unfit_pi5())), "--problems")
    lines = done.stdout.splitlines()
    assert not [line for line in lines if line.startswith(("ok ", "unknown "))]
    place = next(number for number, line in enumerate(lines) if line.startswith("FAILED") and "memory_cgroup" in line)
    block = lines[place : place + 8]
    assert [line for line in block if line.strip().startswith("why:")]
    assert [line for line in block if line.strip().startswith("$ sudo sed -i ':a;N;$!ba;s/\\n\\+/ /g'")]
    assert "failures" in lines[-1]


def test_programs_get_json_that_holds_to_the_schema_and_nothing_else(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    done = doctor(environment, "--root", str(write(tmp_path / "pi", unfit_pi5())), "--json", "--ignore", "k3s")
    report = msgspec.json.decode(done.stdout, type=Report, strict=True)
    assert (report.schema_version, report.status, report.ignored) == (1, "fail", ("k3s",))
    assert sum(report.counts.values()) == len(report.findings)
    assert not [finding for finding in report.findings if finding.area == "k3s"]
    schema = json.loads(doctor(environment, "--schema").stdout)
    properties = schema["$defs"]["Report"]["properties"].keys()
    assert properties == json.loads(done.stdout).keys()


def test_an_unknown_check_is_a_usage_error_that_names_the_areas(environment: dict[str, str]) -> None:
    done = doctor(environment, "--ignore", "bord.governor")
    assert done.returncode == 2
    assert "board, kernel, limits" in done.stderr


def test_this_machine_is_examined_without_root_rights_and_without_llama_cpp_in_the_process(
    environment: dict[str, str],
) -> None:
    done = doctor(environment, "--json")
    report = msgspec.json.decode(done.stdout, type=Report)
    found = {finding.check: finding for finding in report.findings}
    assert found["build.llama_cpp"].status in ("ok", "warn")
    assert found["model.file"].status == "ok"
    assert found["settings.folders"].status == "ok"
    assert not [check for check in found if check.endswith(".examination")]
    looks = "import sys; sys.argv = ['doctor', '--json']; import edge_llm.commands.doctor as d\n"
    looks += "try: d.doctor()\nexcept SystemExit: pass\nsys.exit('llama_cpp' in sys.modules)"
    looked = subprocess.run(
        [sys.executable, "-c", looks], env=environment, stdout=subprocess.DEVNULL, check=False, timeout=120
    )
    assert looked.returncode == 0


def test_ctrl_c_shows_what_was_found_until_then(tmp_path: Path, environment: dict[str, str]) -> None:
    """A compiler that interrupts whoever asks for its version: that is in the middle, whatever the machine has."""
    for name in ("c++", "cc"):
        (tmp_path / name).write_text("#!/bin/sh\nkill -INT $PPID\nsleep 5\n")
        (tmp_path / name).chmod(0o755)
    unset = {name: value for name, value in environment.items() if name not in ("CC", "CXX")}
    done = doctor({**unset, "PATH": f"{tmp_path}:{unset['PATH']}"}, "--json")
    assert done.returncode == 130
    areas = {finding.area for finding in msgspec.json.decode(done.stdout, type=Report).findings}
    assert {"board", "kernel", "storage"} <= areas
    assert not {"build", "model"} & areas


def test_wrong_settings_are_a_finding_and_no_end(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "mine.yaml").write_text("worker: {slots: 0}\ncatalogue: {nonsense: 1}\n")
    root = write(tmp_path / "pi", fitting_pi5())
    done = doctor(environment, "--root", str(root), "--config", str(tmp_path / "mine.yaml"), "--json")
    assert done.returncode == 2
    found = {finding.check: finding for finding in msgspec.json.decode(done.stdout, type=Report).findings}
    assert found["settings.file"].status == "fail"
    assert "slots" in found["settings.file"].found
    assert "nonsense" in found["settings.file"].found
    assert not [check for check in found if check.endswith(".examination")]
