"""The engine bench: what is printed and what misses its bar, from samples alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_llm.bench.engine import (
    RATIO_BAR,
    RATIOS,
    SAMPLER_BAR,
    BenchModel,
    Plan,
    figures,
    measure_models,
    missed,
)
from edge_llm.bench.record import ModelFacts
from edge_llm.bench.reference_tools import Manifest, ToolTree, Tree
from edge_llm.bench.run import Run

SIZES = ("prefill", "decode", "batch4", "batch8")


def a_run(*models: str, **changes: list[float]) -> Run:
    """Both sides equally fast; `changes` by the end of a sample's name, `__` for its separators."""
    run = Run("engine", ["test"], {})
    for model in models:
        for size in SIZES:
            run.samples[f"{model}: ours: {size}_tokens_per_s"] = [100.0, 100.0]
            run.samples[f"{model}: llama.cpp: {size}_tokens_per_s"] = [100.0, 100.0]
        run.samples[f"{model}: ours: batch8_hole_tokens_per_s"] = [87.5, 87.5]
        run.samples[f"{model}: sampler_share_greedy"] = [0.01]
        run.samples[f"{model}: sampler_share_full"] = [0.03]
    run.samples |= {name.replace("__", ": "): values for name, values in changes.items()}
    return run


def test_equal_sides_miss_no_bar() -> None:
    found = figures(a_run("a"), ["a"])
    assert {key: found[key] for key in RATIOS} == pytest.approx(dict.fromkeys(RATIOS, 1.0))
    assert found["sampler_share_full"] == 0.03
    assert missed(found) == []


def test_seven_sequences_owe_seven_eighths_of_the_tokens_of_eight() -> None:
    found = figures(a_run("a", a__ours__batch8_hole_tokens_per_s=[70.0]), ["a"])
    assert found["batch8_hole_ratio"] == pytest.approx(0.8)
    assert found["models"]["a"]["batch8_hole_of_batch8_ratio"] == pytest.approx(0.7)
    assert missed(found) == ["batch8_hole_ratio is 0.800, below 0.97"]


def test_a_ratio_is_the_median_of_pairs_not_the_ratio_of_medians() -> None:
    """The machine was slow in the second repetition: for both sides."""
    run = a_run("a", a__ours__decode_tokens_per_s=[90.0, 10.0, 99.0])
    run.samples["a: llama.cpp: decode_tokens_per_s"] = [100.0, 10.0, 100.0]
    found = figures(run, ["a"])
    assert found["decode_ratio"] == pytest.approx(0.99)
    assert found["models"]["a"]["decode_tokens_per_s"] == 90.0


def test_an_interrupted_run_compares_the_pairs_that_are_whole() -> None:
    run = a_run("a", a__ours__decode_tokens_per_s=[50.0, 100.0, 100.0])
    run.samples["a: llama.cpp: decode_tokens_per_s"] = [100.0]
    assert figures(run, ["a"])["decode_ratio"] == pytest.approx(0.5)


def test_the_worst_model_counts() -> None:
    run = a_run("a", "b", b__ours__batch4_tokens_per_s=[96.0], b__sampler_share_greedy=[0.04])
    found = figures(run, ["a", "b"])
    assert found["batch4_ratio"] == pytest.approx(0.96)
    assert found["models"]["a"]["batch4_ratio"] == pytest.approx(1.0)
    assert missed(found) == ["batch4_ratio is 0.960, below 0.97", "sampler_share_greedy is 0.0400, above 0.03"]


def test_what_llama_cpp_does_by_default_is_shown_and_has_no_bar() -> None:
    run = a_run("a", a__default__prefill_tokens_per_s=[1000.0])
    found = figures(run, ["a"])
    assert found["default_prefill_ratio"] == pytest.approx(0.1)
    assert missed(found) == []


def test_what_was_not_measured_is_missed() -> None:
    found = figures(Run("engine", ["test"], {}), ["a"])
    assert found == {"models": {"a": {}}}
    assert missed(found) == [
        *(f"{key} was not measured" for key in RATIOS),
        "sampler_share_greedy was not measured",
        "sampler_share_full was not measured",
    ]


def test_a_figure_that_is_no_number_is_missed() -> None:
    good = {**dict.fromkeys(RATIOS, RATIO_BAR), "sampler_share_greedy": SAMPLER_BAR, "sampler_share_full": 0.0}
    assert missed(good) == []
    assert len(missed(good | {"decode_ratio": float("nan"), "sampler_share_full": float("nan")})) == 2


@pytest.mark.parametrize(("tool", "words"), [("echo nonsense", "no JSON we know"), (None, "No such file")])
def test_a_tool_that_says_nonsense_or_is_gone_is_a_failure_of_its_model_only(
    tool: str | None, words: str, tmp_path: Path, model_path: Path
) -> None:
    if tool is not None:
        (tmp_path / "llama-bench").write_text(f"#!/bin/sh\n{tool}\n")
        (tmp_path / "llama-bench").chmod(0o755)
    plan = Plan(core=min(os.sched_getaffinity(0)), repetitions=1, prompt_tokens=8, decode_tokens=2)
    models = [
        BenchModel(path, ModelFacts(name, path.name, "0" * 64, 0, "Q4_1"))
        for name, path in (("there", model_path), ("absent", tmp_path / "absent.gguf"))
    ]
    run = Run("engine", ["test"], {})
    tree = ToolTree(tmp_path, Manifest("0.3", "ours", (), "cc", "a cpu"))
    measure_models(plan, models, {"ours": tree}, run, lambda _what, _done, _total: None)
    assert [failure.what for failure in run.failures] == ["engine on there", "engine on absent"]
    assert words in run.failures[0].why


_PROMPT = '{"n_prompt": 8, "n_gen": 0, "n_threads": 1, "flash_attn": 0, "repack": false, "samples_ts": [100.0]}'
_DECODE = '{"n_prompt": 0, "n_gen": 2, "n_threads": 1, "flash_attn": 0, "repack": false, "samples_ts": [10.0]}'
_BENCH = f"""case "$*" in *"-p 0 "*) echo '[{_DECODE}]' ;; *) echo '[{_PROMPT}, {_DECODE}]' ;; esac"""
_BATCHED = """cat <<'END'
{"pp": 32, "tg": 2, "pl": 4, "flash_attn": 0, "speed_tg": 40.0}
{"pp": 32, "tg": 2, "pl": 8, "flash_attn": 0, "speed_tg": 80.0}
END"""


def a_tree(folder: Path, **tools: str) -> ToolTree:
    """Tools that print what they are told to."""
    folder.mkdir()
    for name, script in tools.items():
        tool = folder / name.replace("_", "-")
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    return ToolTree(folder, Manifest("0.3", folder.name, (), "cc", "a cpu"))


def test_a_crash_of_llama_cpp_as_it_ships_leaves_the_bars(tmp_path: Path, model_path: Path) -> None:
    """As with its AMX kernels when GCC 12 compiled them: SIGILL at the first prompt."""
    plan = Plan(core=min(os.sched_getaffinity(0)), repetitions=2, prompt_tokens=8, decode_tokens=2)
    model = BenchModel(model_path, ModelFacts("m", model_path.name, "0" * 64, 0, "Q4_1"))
    run = Run("engine", ["test"], {})
    trees: dict[Tree, ToolTree] = {
        "ours": a_tree(tmp_path / "ours", llama_bench=_BENCH, llama_batched_bench=_BATCHED),
        "default": a_tree(tmp_path / "default", llama_bench="kill -ILL $$", llama_batched_bench=_BATCHED),
    }
    found = measure_models(plan, [model], trees, run, lambda _what, _done, _total: None)
    assert found.keys() >= {*RATIOS, "default_batch4_ratio"}
    assert (
        len(run.samples["m: ours: decode_tokens_per_s"]) == len(run.samples["m: llama.cpp: decode_tokens_per_s"]) == 6
    )
    assert "default_prefill_ratio" not in found
    assert [(failure.what, "-4" in failure.why) for failure in run.failures] == [("llama-bench, default on m", True)]
