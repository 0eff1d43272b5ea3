"""Children that measure: real processes, which say what the benches say; what is kept when they fail or are cut."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from edge_llm.bench.claims import CLAIMS
from edge_llm.bench.claims_judged import HOLDS, MISSED, UNTESTED
from edge_llm.bench.claims_plan import Machine, Planned, Step, planned
from edge_llm.bench.claims_runs import ClaimsFigures, Found, Settings, finished, measure, schema
from edge_llm.bench.record import load, write
from edge_llm.bench.run import Run
from edge_llm.errors import ConfigError

BOARD: Final = Machine(cores=2, has_tools=True)
# A stand-in for `edge-llm`: what it does is in a file by step; its record is a real one.
STAND_IN: Final = """
    import signal
    told = []
    signal.signal(signal.SIGINT, lambda *_: told.append(True))

    import json, sys, time
    from pathlib import Path
    from edge_llm.bench.run import Run
    from edge_llm.bench.record import ModelFacts, write

    here = Path(sys.argv[1])
    arguments = sys.argv[2:]
    kind = arguments[0] if arguments[0] == "verify" else arguments[1]
    script = json.loads((here / "script.json").read_text())[kind]
    with (here / "asked.jsonl").open("a") as file:
        file.write(json.dumps(arguments) + "\\n")
    if "output" in script:
        print(script["output"])
        print(script.get("error", ""), file=sys.stderr)
        sys.exit(script.get("exit", 0))
    run = Run(kind, ["edge-llm", *arguments], script.get("config", {}), idle_s=0.0)
    if script.get("models", True):
        run.models.append(ModelFacts("tiny", "tiny.gguf", "0" * 64, 1, "Q4_0"))
    for what in script.get("failures", []):
        run.fail(what, "because")
    print("working: 1 of 2", file=sys.stderr, flush=True)
    while script.get("hangs") and not told:
        time.sleep(0.02)
    path = write(run.record(script["figures"], not told), Path(arguments[arguments.index("--output") + 1]))
    print(json.dumps({**script["figures"], "record": str(path)}))
    sys.exit(130 if told else script.get("exit", 0))
"""
GATEWAY: Final = {"ttft_added_ms_p50": 1.0, "cpu_us_per_token": 50.0, "rss_mb": 100.0, "failed": 0, "tokens_per_s": 8}
TURNS: Final = {"second_turn_ttft_share": 0.3, "ids_equal": True}
VERIFY: Final = {"model": "tiny", "policy": "exact", "level": "exact", "rows": [{"name": "batch", "compared": 64}]}


class Stage:
    """A folder with a stand-in, and runs of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results = folder / "results"
        self.program = folder / "stand_in.py"
        self.program.write_text(textwrap.dedent(STAND_IN))
        self.said: list[tuple[str, int, int]] = []

    def script(self, **steps: Any) -> None:
        (self.folder / "script.json").write_text(json.dumps(steps))

    def run(
        self, *names: str, resume: Path | None = None, plan: Sequence[Planned] | None = None, **settings: Any
    ) -> Found:
        run = Run("claims", ["edge-llm", "bench", "claims"], {}, folder=self.results, idle_s=0.0)
        self.found = found = Found([claim for claim in CLAIMS if claim.step in names], run)
        known = finished(resume, run, self.results) if resume else {}
        asked = Settings(
            folder=self.results,
            machine=BOARD,
            program=(sys.executable, str(self.program), str(self.folder)),
            **settings,
        )
        steps = planned(set(names), BOARD, settings.get("budget_minutes")) if plan is None else plan
        measure(steps, asked, known, found, lambda what, done, of: self.said.append((what, done, of)))
        return found

    def asked(self) -> list[list[str]]:
        path = self.folder / "asked.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def lines(self) -> Path:
        (path,) = self.results.glob("*claims*.cases.jsonl")
        return path


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def words(found: Found) -> dict[str, str]:
    return {verdict.id: verdict.verdict for verdict in found.figures().claims}


def test_each_step_leaves_its_record_and_the_verdicts_name_it(stage: Stage) -> None:
    stage.script(gateway={"figures": GATEWAY}, turns={"figures": TURNS, "exit": 3})
    found = stage.run("gateway", "turns")
    assert words(found) == {
        **{"exact.turns": HOLDS, "turns.ttft": MISSED},
        **{"gateway.cpu": HOLDS, "gateway.memory": HOLDS, "gateway.ttft": HOLDS},
    }
    figures = found.figures()
    assert figures.counts == {"holds": 4, "does_not_hold": 1, "not_tested_here": 0}
    for verdict in figures.claims:
        (name,) = verdict.records
        assert load(stage.results / name).kind == verdict.id.partition(".")[0].replace("exact", "turns")
    assert [step.exit_code for step in figures.steps] == [3, 0]
    assert not found.run.failures
    assert ("1/2 turns: working", 1, 2) in stage.said
    assert all(arguments[-3:] == ["--json", "--output", str(stage.results)] for arguments in stage.asked())


def test_verify_leaves_no_record_of_its_own_so_one_is_made_of_what_it_says(stage: Stage) -> None:
    stage.script(verify={"output": json.dumps(VERIFY)})
    found = stage.run("verify")
    assert words(found) == {"exact.verify": UNTESTED}  # it names no model file: nobody knows of what it speaks
    assert "--output" not in stage.asked()[0]
    (name,) = (step.record for step in found.steps)
    assert name is not None
    record = load(stage.results / name)
    assert (record.kind, record.figures["level"], record.is_complete) == ("verify", "exact", True)


def test_verify_of_a_known_model_decides(stage: Stage) -> None:
    from edge_llm.bench.record import ModelFacts

    facts = ModelFacts("tiny", "tiny.gguf", "0" * 64, 1, "Q4_0")
    stage.script(verify={"output": json.dumps({**VERIFY, "level": "same-plan"}), "exit": 0})
    assert words(stage.run("verify", model_facts=facts)) == {"exact.verify": MISSED}
    stage.script(verify={"output": json.dumps(VERIFY)})
    again = stage.run("verify", model_facts=facts)
    assert words(again) == {"exact.verify": HOLDS}
    assert again.run.models == [facts]


def test_a_step_that_cannot_run_is_a_failure_with_its_own_words_and_the_others_go_on(stage: Stage) -> None:
    stage.script(
        turns={"output": "", "error": "edge-llm: the model needs 9.1 GB, this board has 4 GB", "exit": 1},
        gateway={"figures": GATEWAY},
    )
    found = stage.run("turns", "gateway")
    assert words(found)["turns.ttft"] == UNTESTED
    assert words(found)["gateway.cpu"] == HOLDS
    reason = next(verdict.reason for verdict in found.figures().claims if verdict.id == "turns.ttft")
    assert reason == "`edge-llm bench turns` failed: the model needs 9.1 GB, this board has 4 GB"
    assert [(failure.what, failure.why) for failure in found.run.failures] == [
        ("turns", "the model needs 9.1 GB, this board has 4 GB")
    ]


def test_a_step_that_could_not_measure_all_confirms_nothing_and_says_why(stage: Stage) -> None:
    stage.script(gateway={"figures": GATEWAY, "failures": ["the third probe"], "exit": 1})
    found = stage.run("gateway")
    (verdict, *_) = found.figures().claims
    assert verdict.verdict == UNTESTED
    assert verdict.reason == "`edge-llm bench gateway` failed: the third probe: because"
    assert [(failure.what, failure.why) for failure in found.run.failures] == [("gateway", "the third probe: because")]


def test_a_step_that_measured_nothing_and_knows_no_model_says_why_and_not_that_no_record_is_there(stage: Stage) -> None:
    stage.script(theorem={"figures": {"holds": False}, "failures": ["theorem"], "models": False, "exit": 1})
    found = stage.run("theorem")
    (verdict,) = found.figures().claims
    assert (verdict.verdict, verdict.reason) == (UNTESTED, "`edge-llm bench theorem` failed: theorem: because")
    assert found.run.failures, "so that the run ends with exit code 1"


def test_steps_that_are_told_a_cluster_say_so_and_the_others_do_not(stage: Stage) -> None:
    stage.script(theorem={"figures": {}}, gateway={"figures": GATEWAY})
    found = stage.run("theorem", "gateway", where={"theorem": ("--url", "http://pi-a:8080")}, there="http://pi-a:8080")
    assert [(step.step, step.measures) for step in found.steps] == [("theorem", "http://pi-a:8080"), ("gateway", "")]
    heads = [what for what, _, _ in stage.said if "about" in what]
    assert [head.partition(",")[0] for head in heads] == ["1/2 theorem of http://pi-a:8080", "2/2 gateway"]


def test_what_says_nothing_that_can_be_read_is_a_failure(stage: Stage) -> None:
    stage.script(gateway={"output": "Segmentation fault", "exit": 139})
    found = stage.run("gateway")
    assert words(found)["gateway.cpu"] == UNTESTED
    assert found.run.failures


def test_a_record_of_the_whole_reads_back_and_fits_its_schema(stage: Stage) -> None:
    stage.script(gateway={"figures": GATEWAY})
    found = stage.run("gateway")
    tree = msgspec.to_builtins(found.figures())
    path = write(found.run.record(tree, is_complete=True), stage.results)
    assert msgspec.convert(load(path).figures, ClaimsFigures) == found.figures()
    assert set(tree) <= set(schema()["$defs"]["ClaimsFigures"]["properties"])
    assert path.stem + ".cases.jsonl" == stage.lines().name


def test_the_end_of_the_budget_ends_a_step_which_keeps_what_it_has(stage: Stage) -> None:
    stage.script(gateway={"figures": GATEWAY, "hangs": True})
    short = Planned(Step("gateway", ("bench", "gateway"), minutes=0.001, small_minutes=0.001))
    found = stage.run("gateway", plan=[short], budget_minutes=0.05)
    (verdict, *_) = found.figures().claims
    assert verdict.verdict == UNTESTED
    assert "cut off: the time of --budget-minutes" in verdict.reason
    assert found.steps[0].error.startswith("cut off")
    assert found.steps[0].record is not None
    assert not load(stage.results / found.steps[0].record).is_complete
    assert not found.run.failures


def test_a_step_that_takes_far_too_long_leaves_the_others_their_time(stage: Stage) -> None:
    stage.script(gateway={"figures": GATEWAY, "hangs": True}, turns={"figures": TURNS})
    slow = Planned(Step("gateway", ("bench", "gateway"), minutes=0.001, small_minutes=0.001))
    kept = Planned(Step("turns", ("bench", "turns"), minutes=9.96, small_minutes=9.95))
    stage.run("gateway", "turns", plan=[slow, kept], budget_minutes=10.0)
    assert stage.found.steps[0].error.startswith("cut off")
    assert stage.found.steps[0].took_s < 60


class Clock:
    """Says these times, and then the real ones after the last."""

    def __init__(self, minutes: Sequence[float]) -> None:
        self._first = [60 * one for one in minutes]
        self._began_s = time.monotonic()

    def __call__(self) -> float:
        if len(self._first) > 1:
            return self._first.pop(0)
        return self._first[0] + time.monotonic() - self._began_s


def test_steps_for_which_no_time_is_left_are_left_out(stage: Stage) -> None:
    stage.script(turns={"figures": TURNS}, gateway={"figures": GATEWAY})
    clock = Clock(minutes=(0.0, 0.0, 0.0, 0.0, 0.0, 9.9))
    found = stage.run("turns", "gateway", budget_minutes=10.0, clock=clock)
    assert words(found)["exact.turns"] == HOLDS
    gateway = next(verdict for verdict in found.figures().claims if verdict.id == "gateway.cpu")
    assert gateway.verdict == UNTESTED
    assert "left out" in gateway.reason
    assert len(stage.asked()) == 1


def test_a_cut_run_goes_on_where_it_was_and_measures_again_what_was_not_whole(stage: Stage) -> None:
    stage.script(turns={"figures": TURNS}, gateway={"figures": GATEWAY, "failures": ["all"], "exit": 1})
    stage.run("turns", "gateway")
    first = stage.lines()
    stage.script(turns={"output": "", "exit": 1}, gateway={"figures": GATEWAY}, overload={"output": "", "exit": 1})
    found = stage.run("turns", "gateway", resume=first)
    assert [(step.step, step.is_reused) for step in found.steps] == [("turns", True), ("gateway", False)]
    assert words(found)["exact.turns"] == words(found)["gateway.cpu"] == HOLDS
    assert [arguments[1] for arguments in stage.asked()] == ["turns", "gateway", "gateway"]


def test_what_was_asked_otherwise_is_measured_again(stage: Stage) -> None:
    stage.script(turns={"figures": TURNS})
    stage.run("turns")
    found = stage.run("turns", resume=stage.lines(), model="other.gguf")
    assert [step.is_reused for step in found.steps] == [False]


def test_lines_of_another_folder_or_machine_or_of_something_else_are_refused(stage: Stage, tmp_path: Path) -> None:
    stage.script(turns={"figures": TURNS})
    stage.run("turns")
    lines = stage.lines()
    elsewhere = tmp_path / "elsewhere.cases.jsonl"
    elsewhere.write_bytes(lines.read_bytes())
    with pytest.raises(ConfigError, match="--output"):
        stage.run("turns", resume=elsewhere)
    (record,) = stage.results.glob("*turns*.json")
    tree = json.loads(record.read_text())
    tree["nodes"][0]["cpu"] = "another"
    record.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="another machine"):
        stage.run("turns", resume=lines)
    other = stage.results / "other.cases.jsonl"
    other.write_text('{"case": "x", "at": "2026-01-01T00:00:00Z"}\n')
    with pytest.raises(ConfigError, match="no finished step"):
        stage.run("turns", resume=other)
    other.write_text('{"case": "turns", "arguments": "all", "record": "x.json", "exit_code": 0}\n')
    with pytest.raises(ConfigError, match=r"other\.cases\.jsonl was not written by `bench claims`"):
        stage.run("turns", resume=other)


def test_ctrl_c_reaches_the_child_keeps_its_record_and_stops_the_rest(stage: Stage) -> None:
    stage.script(turns={"figures": TURNS}, gateway={"figures": GATEWAY, "hangs": True})
    driver = stage.folder / "driver.py"
    driver.write_text(
        textwrap.dedent(
            f"""
            import json, sys
            from pathlib import Path
            sys.path.insert(0, {str(Path(__file__).parents[2])!r})
            from tests.bench.test_claims_runs import Stage
            stage = Stage(Path({str(stage.folder)!r}))
            try:
                stage.run("turns", "gateway", "overload")
            except KeyboardInterrupt:
                kept = [(step.step, step.record is not None, step.error) for step in stage.found.steps]
                print(json.dumps(kept))
                sys.exit(130)
            """
        )
    )
    child = subprocess.Popen(
        [sys.executable, str(driver)], stdout=subprocess.PIPE, text=True, env=os.environ, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(stage.asked()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 130
    assert json.loads(output) == [["turns", True, ""], ["gateway", True, "interrupted"]]
    (record,) = stage.results.glob("*gateway*.json")
    assert not load(record).is_complete
    assert [arguments[1] for arguments in stage.asked()] == ["turns", "gateway"]
