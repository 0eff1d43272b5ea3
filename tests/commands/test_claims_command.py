"""`edge-llm bench claims` as a user runs it: records judged, plans shown, a real run, words and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from click.testing import CliRunner, Result

from edge_llm.bench.claims import CLAIMS
from edge_llm.bench.claims_judged import MISSED, UNTESTED
from edge_llm.bench.claims_runs import ClaimsFigures
from edge_llm.bench.record import encode, load
from edge_llm.commands.claims import claims
from edge_llm.errors import InvalidRequest, WorkerUnreachable
from tests.report.conftest import MODEL, a_record

ROOT: Final = Path(__file__).parents[2]
DEADLINE_S: Final = 240.0
TURNS: Final = {"second_turn_ttft_share": 0.1, "ids_equal": True}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(claims, arguments)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Records of a Raspberry Pi: of `turns` one that holds; of `handoff` one that misses one bar."""
    folder = tmp_path / "bench_results"
    folder.mkdir()
    handoff = {"export_share": 0.5, "overlap_share": 0.99}
    for kind, figures in {"turns": TURNS, "handoff": handoff}.items():
        (folder / f"{kind}.json").write_bytes(encode(a_record(kind=kind, figures=figures, models=[MODEL])))
    return folder


def test_records_become_a_table_with_a_column_for_their_board(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(results.parent)  # links are relative to where the command runs
    done = run("--from", str(results))
    assert done.exit_code == 0, done.output
    head, _, *rows = done.stdout.splitlines()
    assert head == "| claim | bar | Raspberry Pi 5 |"
    assert len(rows) == len(CLAIMS)
    (row,) = (row for row in rows if "`exact.turns`" in row)
    assert "holds: tokens equal ([record](bench_results/turns.json))" in row
    (row,) = (row for row in rows if "`handoff.export`" in row)
    assert f"**{MISSED}**: **50 %** ([record](bench_results/handoff.json))" in row


def test_the_records_of_this_repository_fill_one_column_and_leave_that_of_the_pi_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    done = run("--from", "bench_results")
    assert done.exit_code == 0, done.output
    head, _, *rows = done.stdout.splitlines()
    assert head == "| claim | bar | x86-64, 2 cores | Raspberry Pi 5 |"
    assert all(row.endswith(" |  |") for row in rows)
    linked = {part.partition(")")[0] for row in rows for part in row.split("](")[1:]}
    assert linked
    assert all((ROOT / name).is_file() for name in linked)


def test_check_exits_with_three_for_what_does_not_hold_and_only_then(results: Path) -> None:
    done = run("--from", str(results), "--check")
    assert done.exit_code == 3
    assert "handoff.export: export_share is 50 %" in done.stderr
    assert run("--from", str(results), "--only", "exact", "--check").exit_code == 0


def test_json_has_a_board_with_its_verdicts(results: Path) -> None:
    (board,) = json.loads(run("--from", str(results), "--json", "--only", "turns").stdout)["boards"]
    assert board["board"] == "Raspberry Pi 5"
    assert board["counts"] == {"holds": 2, "does_not_hold": 0, "not_tested_here": 0}
    assert [claim["id"] for claim in board["claims"]] == ["exact.turns", "turns.ttft"]


def test_a_file_that_is_no_record_is_named_and_the_others_are_judged(results: Path) -> None:
    (results / "bad.json").write_text("{")
    done = run("--from", str(results), "--only", "exact.turns")
    assert done.exit_code == 1
    assert "bad.json" in done.stderr
    assert "holds" in done.stdout


def test_a_list_says_the_same_for_a_terminal(results: Path) -> None:
    lines = run("--from", str(results), "-o", "list").stdout.splitlines()
    assert lines[0] == "Raspberry Pi 5"
    assert any("DOES NOT HOLD" in line and "handoff.export" in line for line in lines)


def test_a_plan_says_what_would_run_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("--plan", "--budget-minutes", "3", "--only", "gateway,pools.wait", "--json")
    tree = json.loads(done.stdout)
    assert [row["step"] for row in tree["steps"]] == ["gateway", "pools"]
    assert tree["minutes"] <= 3
    assert "together about" in run("--plan").stdout
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_a_cluster_that_runs_says_what_is_of_it_and_what_of_this_machine() -> None:
    where = ("--plan", "--url", "http://127.0.0.1:1", "--only", "exact.theorem,faults,cluster")
    steps = json.loads(run(*where, "--json").stdout)["steps"]
    assert {row["step"]: row["measures"] for row in steps} == {
        **{"theorem": "http://127.0.0.1:1", "cluster": "http://127.0.0.1:1"},
        "faults": "",
    }
    lines = run(*where).stdout.splitlines()
    assert any("bench theorem" in line and "of http://127.0.0.1:1" in line for line in lines)
    assert any("bench faults" in line and "of this machine" in line for line in lines)
    assert "of this machine" not in run("--plan").stdout, "where no cluster is named everything is"


def test_a_gateway_that_does_not_answer_is_an_error_before_any_step(tmp_path: Path) -> None:
    where = ("--url", "http://127.0.0.1:1", "--quick", "--output", str(tmp_path / "out"))
    done = run(*where, "--only", "exact.theorem")
    assert isinstance(done.exception, WorkerUnreachable)
    assert "no answer from a gateway at http://127.0.0.1:1" in done.exception.message
    assert not (tmp_path / "out").exists()


def test_a_key_that_the_gateway_does_not_take_is_an_error_before_any_step(tmp_path: Path) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "no API key"}}')

        def log_message(self, format: str, *args: object) -> None:
            """Not into the output of tests."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        done = run("--url", url, "--only", "exact.theorem", "--quick", "--output", str(tmp_path / "out"))
        server.shutdown()
    assert isinstance(done.exception, InvalidRequest)
    assert "--api-key-file" in done.exception.message
    assert not (tmp_path / "out").exists()


def test_a_step_that_was_asked_for_and_cannot_run_here_is_exit_code_1_with_its_reason(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """Without llama.cpp's tools in this cache."""
    done = subprocess.run(
        command("--only", "engine", "--output", str(tmp_path / "out")),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 1, done.stdout
    assert "not measured: engine: llama.cpp's own tools are not built here" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--url", "nonsense"), "no address of a server"),
        (("--only", "exact.everything"), "exact.theorem"),
        (("--api-key-file", __file__), "--url"),
        (("--boards",), "--url"),
        (("--workers-file", __file__), "--key-file"),
        (("--key-file", __file__), "--workers-file"),
        (("--from", str(ROOT), "--quick", "--budget-minutes", "5"), "leave out --quick, --budget-minutes, or --from"),
        (("--from", str(ROOT), "--plan"), "leave out --plan"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(arguments: tuple[str, ...], words: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert words in done.stderr


# -- real runs


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from edge_llm.commands.claims import claims; claims()", *arguments]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    folders = ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME")
    return {**os.environ, **{name: str(tmp_path / name) for name in folders}}


def test_a_real_run_leaves_the_records_of_its_benches_and_one_of_its_own(
    environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        command("--only", "pools", "--quick", "--json", "--output", str(out)),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    tree: dict[str, Any] = json.loads(done.stdout)
    figures = msgspec.convert(tree, ClaimsFigures)
    assert {verdict.id for verdict in figures.claims} == {"pools.wait", "pools.policies", "pools.moves"}
    assert [step.exit_code for step in figures.steps] == [0]
    record = load(Path(tree["record"]))
    assert (record.kind, record.is_complete) == ("claims", True)
    (name,) = {name for verdict in figures.claims for name in verdict.records}
    assert load(out / name).kind == "pools"
    by_id = {verdict.id: verdict for verdict in figures.claims}
    assert by_id["pools.moves"].verdict == UNTESTED
    assert by_id["pools.wait"].is_quick


def test_ctrl_c_leaves_a_record_of_what_is_known_and_exits_with_130(
    environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    child = subprocess.Popen(
        command("--only", "pools,overload", "--json", "--output", str(out)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith("1/2 overload: ") and "about" not in line:  # the bench itself speaks
            break
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 130, errors
    tree = json.loads(output)
    assert all(claim["verdict"] == UNTESTED for claim in tree["claims"])
    assert not load(Path(tree["record"])).is_complete
