"""llama-bench beside us: asked for the same test, and refused when it ran another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_llm.bench.llama_tools import UnreadableOutput
from edge_llm.bench.node_reference import command_of, environment_of, speed_of, why_not
from edge_llm.bench.node_rows import NodeTest

TOOL, MODEL = Path("tools/llama-bench"), Path("m.gguf")


def options(command: list[str]) -> dict[str, str]:
    return {word: after for word, after in zip(command, [*command[1:], ""], strict=True) if word.startswith("-")}


def test_it_is_asked_for_the_same_sizes_threads_types_and_kernels() -> None:
    test = NodeTest(512, 0, 64, 1024, 128, "q8_0", "q8_0", "on", 1, 2)
    found = options(command_of(TOOL, MODEL, test, is_repacked=True, is_warm=True))
    wanted = {"-p": "512", "-n": "0", "-d": "64", "-b": "1024", "-ub": "128", "-t": "2", "-fa": "on", "-r": "1"}
    assert found == wanted | {"-m": "m.gguf", "-ctk": "q8_0", "-ctv": "q8_0", "--repack": "1", "-o": "json"}


def test_a_mixed_test_is_no_prompt_test_and_a_cold_one_is_cold_on_both_sides() -> None:
    found = options(command_of(TOOL, MODEL, NodeTest(512, 128), is_repacked=False, is_warm=False))
    assert (found["-p"], found["-n"], found["-pg"], found["--repack"]) == ("0", "0", "512,128", "0")
    assert "--no-warmup" in found
    assert found["-fa"] == "off"  # auto under policy exact


def test_tiled_kernels_are_those_of_the_policy() -> None:
    assert environment_of(NodeTest(8, 0)) == {"GGML_CPU_TILED_MM": "0"}
    assert environment_of(NodeTest(8, 0, policy="fast")) == {"GGML_CPU_TILED_MM": "1"}


@pytest.mark.parametrize(
    ("test", "word"),
    [
        (NodeTest(0, 8, n_parallel=2), "one sequence"),
        (NodeTest(8, 8, n_threads=1, n_threads_batch=2), "threads"),
        (NodeTest(8, 0, type_k="f32"), "f32"),
        (NodeTest(8, 0, type_v="f32"), "f32"),
    ],
)
def test_what_llama_bench_does_not_have_is_said(test: NodeTest, word: str) -> None:
    assert word in str(why_not(test))


def test_what_llama_bench_has_is_compared() -> None:
    for test in (NodeTest(8, 0), NodeTest(0, 8, 64, n_threads_batch=4), NodeTest(8, 8), NodeTest(0, 8, type_k="q8_0")):
        assert why_not(test) is None


def an_answer(**changes: Any) -> dict[str, Any]:
    ran: dict[str, Any] = {"n_prompt": 512, "n_gen": 0, "n_depth": 0, "n_batch": 2048, "n_ubatch": 512, "n_threads": 1}
    ran |= {"type_k": "f16", "type_v": "f16", "flash_attn": 0, "repack": False, "samples_ts": [50.5], "cpu_info": "a"}
    return ran | changes


def test_its_one_repetition_is_a_speed() -> None:
    assert speed_of(json.dumps([an_answer()]), NodeTest(512, 0), is_repacked=False) == 50.5


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("nonsense", "no JSON we know"),
        (json.dumps([{"n_prompt": 1}]), "no JSON we know"),
        ("[]", "ran 0 tests"),
        (json.dumps([an_answer(), an_answer()]), "ran 2 tests"),
        (json.dumps([an_answer(samples_ts=[1.0, 2.0])]), "asked for one repetition"),
        (json.dumps([an_answer(repack=True)]), "repack True for False"),
        (json.dumps([an_answer(flash_attn=1, n_threads=2)]), "n_threads 2 for 1, flash_attn 1 for 0"),
    ],
)
def test_another_test_than_asked_for_is_refused(output: str, words: str) -> None:
    with pytest.raises(UnreadableOutput, match=words):
        speed_of(output, NodeTest(512, 0), is_repacked=False)
