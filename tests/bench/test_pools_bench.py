"""`edge-llm bench pools`: its trace, what it counts, what it calls missed; and the command in small."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from edge_llm.bench.pools import _ANSWERS, _PROMPTS, PHASES, Kind, Plan, Seen, calls, drawn, figures, missed
from edge_llm.bench.run import Run

PLAN = Plan()


@pytest.mark.parametrize(
    ("kind", "prompt_median", "prompt_mean", "answer_median", "answer_mean"),
    [("conv", 1020, 1155, 129, 211), ("code", 1469, 2048, 13, 28)],
)
def test_lengths_have_medians_and_means_of_the_traces(
    kind: Kind, prompt_median: int, prompt_mean: int, answer_median: int, answer_mean: int
) -> None:
    rng = random.Random(5)
    for quantiles, median, average in (
        (_PROMPTS[kind], prompt_median, prompt_mean),
        (_ANSWERS[kind], answer_median, answer_mean),
    ):
        lengths = sorted(drawn(quantiles, rng) for _ in range(20_000))
        assert lengths[10_000] == pytest.approx(median, rel=0.05)
        # what lies beyond the 99th percentile is cut
        assert 0.75 * average < mean(lengths) < 1.05 * average


def test_the_trace_is_the_same_for_everybody_and_another_one_for_another_seed() -> None:
    assert calls(PLAN) == calls(Plan(policies=("random",)))
    assert calls(PLAN) != calls(Plan(seed=8))


def test_in_the_middle_prompts_are_long_and_answers_short() -> None:
    def middle(take: Callable[[Any], float], windows: set[str]) -> float:
        return mean(take(call.body) for call in calls(PLAN) if PLAN.window(call.at_s) in windows)

    code, conv = {"turn_1_to_code", "code_2"}, {"conv_1", "turn_2_to_conv", "conv_3"}
    assert middle(lambda body: len(body["prompt"]), code) > 1.4 * middle(lambda body: len(body["prompt"]), conv)
    assert middle(lambda body: body["max_tokens"], code) < 0.3 * middle(lambda body: body["max_tokens"], conv)


def test_windows_follow_each_other_and_name_what_came_before_during_and_after_a_turn() -> None:
    assert list(PLAN.windows) == ["conv_1", "turn_1_to_code", "code_2", "turn_2_to_conv", "conv_3"]
    first_s, second_s = PLAN.turns_s
    assert PLAN.window(first_s - 0.1) == "conv_1"
    assert PLAN.window(first_s) == "turn_1_to_code"
    assert PLAN.window(first_s + PLAN.turn_s) == "code_2"
    assert PLAN.window(second_s) == "turn_2_to_conv"
    assert PLAN.window(PHASES[-1].until_s + 9.0) == "conv_3"


def seen(*events: tuple[float, str]) -> Seen:
    return Seen({"predicted": {(at_s, kind, "d1", "token", "prompt", "because") for at_s, kind in events}})


def measured(
    at_s: tuple[tuple[float, str], ...], ours_s: float = 0.5, wait_s: float = 1.0, late_s: float = 0.001
) -> dict[str, Any]:
    run = Run("pools", [], {})
    run.add("late_s", late_s)
    for policy, ttft_s in (("predicted", ours_s), ("least_busy", 0.8), ("random", 1.0), ("round_robin", 1.0)):
        run.add(f"{policy}.all.ttft_s", ttft_s)
        run.add(f"{policy}.delay_s", wait_s)
    return figures(PLAN, seen(*at_s), run)


GOOD = ((30.0, "spill"), (55.0, "repurpose"), (120.0, "return"))


def test_a_trace_that_goes_as_promised_misses_nothing() -> None:
    assert missed(measured(GOOD)) == []


@pytest.mark.parametrize(
    ("events", "complaint"),
    [
        (GOOD[1:], "no request spilled"),
        (((10.0, "spill"), *GOOD[1:]), "no request spilled"),
        ((GOOD[0], (10.0, "repurpose"), GOOD[2]), "no node changed sides"),
        ((*GOOD[:2], (40.0, "return")), "did not come back"),
    ],
)
def test_what_the_pools_did_not_do_is_named(events: tuple[tuple[float, str], ...], complaint: str) -> None:
    (line,) = missed(measured(events))
    assert complaint in line


def test_a_wait_beyond_the_bound_and_a_policy_that_is_better_are_named() -> None:
    assert [line for line in missed(measured(GOOD, wait_s=PLAN.wait_bound_s + 1)) if "more than its bound" in line]
    assert len(missed(measured(GOOD, ours_s=1.5))) == 3
    assert len(missed(measured(GOOD, ours_s=0.9))) == 1, "of the shortest queue alone"


def test_the_shortest_queue_is_measured_by_default_and_compared_with_chance_and_turns_too() -> None:
    assert PLAN.policies == ("predicted", "least_busy", "random", "round_robin")
    found = measured(GOOD)
    ratios = {name: found[name]["p90"] for name in found if name.startswith("ttft_")}
    assert ratios == {
        "ttft_predicted_over_least_busy": 0.625,
        "ttft_predicted_over_random": 0.5,
        "ttft_predicted_over_round_robin": 0.5,
        "ttft_least_busy_over_random": 0.8,
        "ttft_least_busy_over_round_robin": 0.8,
    }


def test_a_generator_that_was_late_itself_is_named() -> None:
    assert missed(measured(GOOD, late_s=0.049)) == []
    (line,) = missed(measured(GOOD, late_s=0.051))
    assert "51 ms late" in line, "more than a tenth of the 0.5 s that nine in ten waited for their first token"


@pytest.mark.parametrize("what", ["refused", "refused_late", "failed"])
def test_a_request_that_was_not_answered_is_named(what: str) -> None:
    found = measured(GOOD)
    found["policies"]["predicted"][what] = 2
    (line,) = missed(found)
    assert line.startswith("2 requests were")


def test_nothing_measured_is_not_a_success() -> None:
    assert missed(figures(PLAN, Seen(), Run("pools", [], {}))) == ["predicted was not measured"]


@pytest.mark.timeout(200)
def test_the_command_runs_the_trace_in_small_without_a_failure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edge_llm", "bench", "pools", "--quick", "--json", "--policies", "predicted"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=190, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    ours = found["policies"]["predicted"]
    assert (ours["answered"], ours["refused"], ours["failed"]) == (found["requests"], 0, 0)
    assert 0 <= ours["longest_wait_s"] < found["wait_bound_s"]
    assert ours["ttft_s"]["all"]["n"] == found["requests"]
