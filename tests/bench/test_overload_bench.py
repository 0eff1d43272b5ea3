"""`edge-llm bench overload`: its figures, what it calls missed; and the command in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_llm.bench.overload import BARS, LOADS, Load, Plan, figures, missed
from edge_llm.bench.run import Run

PLAN = Plan(loads=(Load("answers", 60, 48),))


def run_of(**samples: list[float]) -> Run:
    run = Run("overload", [], {})
    good: dict[str, list[float]] = {
        "capacity_per_s": [10.0],
        "capacity.ttft_s": [0.5, 1.0],
        "overload.ttft_s": [0.5, 1.5],
        "overload.accepted_at_s": [1.0, 2.0],
        "overload.refused_at_s": [1.0],
        "overload.rejection_s": [0.004],
        "overload.code 503 overloaded": [1.0],
        "late_s": [0.001],
    }
    for name, values in (good | {key.replace("__", "."): value for key, value in samples.items()}).items():
        run.samples[f"answers.{name}"] = values
    return run


def found(**samples: list[float]) -> dict[str, Any]:
    return figures(PLAN, run_of(**samples))


def test_a_run_within_all_bars_misses_nothing() -> None:
    assert missed(found(), PLAN) == []
    answers = found()["answers"]
    assert (answers["offered_per_s"], answers["rejection_ms_p95"]) == (100.0, 4.0)
    assert answers["codes"] == {"503 overloaded": 1}
    assert answers["ttft_ratio_p95"] == pytest.approx(1.45 / 0.975, abs=1e-3)


@pytest.mark.parametrize(
    ("sample", "values", "bar"),
    [
        ("overload__rejection_s", [0.004] * 3 + [0.2] * 3, "rejection_ms_p95"),
        ("overload__ttft_s", [2.5], "ttft_ratio_p95"),
        ("overload__failed", [1.0], "failed"),
        ("capacity__lost", [1.0], "lost"),
        ("overload__unexplained", [1.0], "unexplained"),
        ("recovery__refused_at_s", [PLAN.overload_s + 1.5], "recovery_s"),
        ("late_s", [0.001, 0.02], "left late"),
    ],
)
def test_each_bar_can_be_missed(sample: str, values: list[float], bar: str) -> None:
    (line,) = missed(found(**{sample: values}), PLAN)
    assert bar in line


def test_nothing_measured_misses_every_bar() -> None:
    lines = missed(figures(PLAN, Run("overload", [], {})), PLAN)
    assert len(lines) == len(BARS)
    assert all("was not measured" in line for line in lines)


def test_one_loads_samples_are_not_anothers() -> None:
    both = figures(Plan(), run_of())
    assert both["answers"]["accepted"] == 2
    assert "accepted" not in both["prompts"]


@pytest.mark.timeout(200)
def test_the_command_refuses_most_in_small_and_loses_nobody(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edge_llm", "bench", "overload", "--quick", "--json", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=190, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)
    for load in LOADS:
        measured = results[load.name]
        assert (measured["failed"], measured["lost"], measured["unexplained"]) == (0, 0, 0)
        assert set(measured["codes"]) == {"503 overloaded"}
        assert measured["refused"] > 2 * measured["accepted"]
