"""The process that measures phases: what a repetition does to a context, and what it says when it cannot."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_llm.engine.level import LevelRecord, write_level
from edge_llm.engine.load import LlamaSettings, identity_of
from edge_llm.engine.measure_node import NodeBench, main
from edge_llm.engine.native import NativeContext, NativeModel
from edge_llm.engine.random_model import make_model
from edge_llm.errors import ConfigError, EngineFailed


def a_test(**changes: Any) -> dict[str, Any]:
    test = {"n_prompt": 0, "n_gen": 0, "n_depth": 0, "cells": 256, "micro_batch": 32, "type_k": "f16", "type_v": "f16"}
    return test | {"flash_attention": "off", "n_threads": 1, "n_threads_batch": 1, "n_parallel": 1} | changes


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models"), "dense", "Q4_0")


@pytest.fixture
def bench(path: Path) -> Iterator[NodeBench]:
    bench = NodeBench(LlamaSettings(path, "random", "0" * 64, serves_prompts=False))
    yield bench
    bench.close()


def context_of(bench: NodeBench) -> NativeContext:
    assert bench._open is not None
    return bench._open._context


@pytest.mark.parametrize(
    ("sizes", "positions"),
    [
        ({"n_prompt": 40}, 40),
        ({"n_gen": 3}, 3),
        ({"n_prompt": 40, "n_gen": 3}, 43),
        ({"n_gen": 3, "n_depth": 50}, 53),
        ({"n_prompt": 40, "n_gen": 3, "n_depth": 50}, 93),
    ],
)
def test_each_repetition_computes_its_tokens_behind_its_depth(
    bench: NodeBench, sizes: dict[str, int], positions: int
) -> None:
    bench.open(a_test(**sizes))
    for seed in range(3):
        found = bench.run(seed)
        assert context_of(bench).last_position(0) == positions - 1
        assert 0 <= found["prompt_ns"] <= found["elapsed_ns"]
        assert found["cpu_s"] >= 0
        assert found["rss_peak_bytes"] > 0


def test_all_sequences_lie_at_the_same_depth(bench: NodeBench) -> None:
    bench.open(a_test(n_gen=2, n_depth=20, n_parallel=3))
    for seed in range(2):
        bench.run(seed)
        assert [context_of(bench).last_position(one) for one in range(3)] == [21, 21, 21]


def test_a_recurrent_model_which_cannot_go_back_computes_its_depth_again(tmp_path: Path) -> None:
    path = make_model(tmp_path, "recurrent", "F16")
    bench = NodeBench(LlamaSettings(path, "random", "0" * 64, serves_prompts=False))
    try:
        bench.open(a_test(n_gen=2, n_depth=20))
        for seed in range(2):
            bench.run(seed)
            assert context_of(bench).last_position(0) == 21
    finally:
        bench.close()


def test_logits_of_the_last_prompt_token_are_those_of_a_decode_step(path: Path) -> None:
    """What `wants_last` adds is one row of the output, not another result."""
    model = NativeModel(path)
    settings = LlamaSettings(path, "random", "", n_ctx=256, chunk_tokens=32)
    context = NativeContext(model, settings.context(n_seq=1, is_unified=False, outputs=1))
    try:
        context.prompt([5, 6, 7], 0, 0, wants_last=True)
        by_prompt = context._logits(1).copy()
        context.clear()
        context.prompt([5, 6], 0, 0)
        by_step = context.decode([7], [2], [0])
        assert by_prompt.argmax() == by_step.argmax()
        assert abs(by_prompt - by_step).max() < 1e-2
    finally:
        context.close()
        model.close()


def test_the_level_is_what_verify_recorded_for_these_kernels(path: Path, tmp_path: Path) -> None:
    settings = LlamaSettings(path, "random", "1" * 64, serves_prompts=False, levels_dir=tmp_path)
    bench = NodeBench(settings)
    try:
        assert bench.open(a_test(n_gen=1))["level"] == "unverified"
        identity = identity_of(bench._model, bench._card, settings, bench._build)
        write_level(tmp_path, identity, LevelRecord("same-plan", "as measured", 4))
    finally:
        bench.close()
    again = NodeBench(settings)
    try:
        found = again.open(a_test(n_gen=1))
        assert (found["level"], found["level_rows"]) == ("same-plan", 4)
        assert again.open(a_test(n_gen=1, flash_attention="on"))["level"] == "unverified"
    finally:
        again.close()


def test_what_cannot_be_opened_leaves_nothing_open(bench: NodeBench) -> None:
    bench.open(a_test(n_gen=1))
    with pytest.raises(EngineFailed, match="flash attention"):
        bench.answer({"op": "open", "test": a_test(n_gen=1, type_v="q8_0")})
    with pytest.raises(EngineFailed, match="no test is open"):
        bench.run()
    bench.open(a_test(n_gen=1))
    assert bench.run()["elapsed_ns"] > 0


def test_a_context_beyond_the_memory_is_refused_before_it_is_made(path: Path) -> None:
    settings = LlamaSettings(path, "random", "", serves_prompts=False, available_bytes=400 << 20)
    bench = NodeBench(settings)
    try:
        with pytest.raises(ConfigError, match="random with 1 x 1048576 cells does not fit"):
            bench.open(a_test(n_gen=1, cells=1 << 20))
    finally:
        bench.close()


def test_a_point_of_the_curve_fills_its_context_and_decodes_at_the_end(bench: NodeBench) -> None:
    found = bench.curve(a_test(cells=256))
    assert found["tokens"] == 252
    assert found["prefill_peak_bytes"] > 0
    assert found["decode_peak_bytes"] > 0
    with pytest.raises(EngineFailed):
        bench.run()


def test_the_process_says_what_it_holds_answers_line_by_line_and_errors_do_not_end_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = [{"op": "run"}, {"op": "open", "test": a_test(n_gen=2)}, {"op": "run", "seed": 1}, {"op": "shut"}]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(json.dumps(request) + "\n" for request in requests)))
    assert main(["--model", str(path), "--policy", "exact"]) == 0
    ready, refused, opened, ran, shut = map(json.loads, capsys.readouterr().out.splitlines())
    assert (ready["event"], ready["pid"], ready["expert_share"]) == ("ready", os.getpid(), 1.0)
    assert "llama" in ready["description"]
    assert (refused["event"], refused["message"]) == ("error", "no test is open")
    assert (opened["level"], shut) == ("unverified", {"event": "result"})
    assert ran["elapsed_ns"] > 0


def test_a_model_that_cannot_be_loaded_is_said_and_ends_the_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    assert main(["--model", str(tmp_path / "broken.gguf")]) == 1
    assert json.loads(capsys.readouterr().out)["event"] == "error"


def test_a_mixture_says_which_share_of_its_experts_serves_a_token(tmp_path: Path) -> None:
    bench = NodeBench(LlamaSettings(make_model(tmp_path, "moe", "F16"), "random", "", serves_prompts=False))
    try:
        assert 0 < bench.ready()["expert_share"] < 1
    finally:
        bench.close()
