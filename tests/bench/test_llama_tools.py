"""llama.cpp's own tools: that they are asked for the same kernels as ours, and that what they say is what they ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_llm.bench.llama_tools import (
    Batched,
    Kernels,
    UnreadableOutput,
    batched_command,
    bench_command,
    parse_batched,
    parse_bench,
)

SAME, REPACKED, DEFAULT = Kernels(False, False), Kernels(False, True), Kernels(True, False)
TOOL, MODEL = Path("tools/llama-bench"), Path("m.gguf")


def options(command: list[str]) -> dict[str, str]:
    """Each option with the word that follows it."""
    return {word: after for word, after in zip(command, [*command[1:], ""], strict=True) if word.startswith("-")}


def test_a_fair_bench_is_one_thread_without_flash_attention_with_our_cache_types_and_repacking() -> None:
    command = bench_command(TOOL, MODEL, Kernels(False, True, "q8_0", "f32"), 512, 64)
    assert command[0] == str(TOOL)
    wanted = {"-m": str(MODEL), "-p": "512", "-n": "64", "-r": "3", "-t": "1", "-o": "json"}
    assert options(command) == wanted | {"-fa": "off", "--repack": "1", "-ctk": "q8_0", "-ctv": "f32"}
    assert options(bench_command(TOOL, MODEL, SAME, 512, 64))["--repack"] == "0"


def test_a_fair_batch_has_a_stream_and_as_many_cells_for_each_sequence() -> None:
    command = batched_command(TOOL, MODEL, SAME, [4, 8], 32, 64, 768)
    found = options(command)
    assert found["-c"] == str(8 * 768)
    assert (found["-npp"], found["-ntg"], found["-npl"]) == ("32", "64", "4,8")
    assert (found["-t"], found["-tb"], found["-fa"]) == ("1", "1", "off")
    assert {"--no-kv-unified", "--no-repack"} <= found.keys()
    assert "--repack" in batched_command(TOOL, MODEL, REPACKED, [4, 8], 32, 64, 768)


def test_the_default_names_nothing_but_sizes_and_threads() -> None:
    for command in (bench_command(TOOL, MODEL, DEFAULT, 8, 8), batched_command(TOOL, MODEL, DEFAULT, [4], 8, 8, 64)):
        assert not {"-fa", "--repack", "--no-repack", "-ctk", "-ctv", "--no-kv-unified"} & set(command)
        assert options(command)["-t"] == "1"
    assert DEFAULT.environment == {}
    assert SAME.environment == {"GGML_CPU_TILED_MM": "0"}


def a_test(kind: str = "prompt", speed: float = 100.0, **changes: Any) -> dict[str, Any]:
    """One test as llama-bench prints it, with a field that nobody reads."""
    sizes = {"n_prompt": 512, "n_gen": 0} if kind == "prompt" else {"n_prompt": 0, "n_gen": 64}
    about = {"n_threads": 1, "flash_attn": 0, "repack": False, "samples_ts": [speed], "cpu_info": "a cpu"}
    return sizes | about | changes


def test_prompt_and_decode_speeds_are_told_apart_whatever_their_order() -> None:
    both = [a_test("decode", 7.5), a_test("prompt", 80.0)]
    assert parse_bench(json.dumps(both), SAME) == (80.0, 7.5)


@pytest.mark.parametrize(
    ("tests", "words"),
    [
        ([a_test("prompt")], "1 prompt and 0 decode tests"),
        ([a_test("prompt"), a_test("prompt"), a_test("decode")], "2 prompt and 1 decode tests"),
        ([a_test("prompt"), a_test("decode", samples_ts=[])], "not one of each"),
        ([a_test("prompt", flash_attn=1), a_test("decode")], "flash attention or repacking"),
        ([a_test("prompt", flash_attn=-1), a_test("decode")], "flash attention or repacking"),
        ([a_test("prompt"), a_test("decode", repack=True)], "flash attention or repacking"),
        ([{"n_prompt": 1}], "no JSON we know"),
        ({}, "no JSON we know"),
    ],
)
def test_a_bench_that_ran_something_else_is_refused(tests: Any, words: str) -> None:
    with pytest.raises(UnreadableOutput, match=words):
        parse_bench(json.dumps(tests), SAME)


def test_by_default_any_kernels_will_do() -> None:
    both = [a_test("prompt", flash_attn=1, repack=True), a_test("decode", flash_attn=1, repack=True)]
    assert parse_bench(json.dumps(both), DEFAULT) == (100.0, 100.0)
    with pytest.raises(UnreadableOutput):
        parse_bench("error: no such model", DEFAULT)


def line_of(rows: int, **changes: Any) -> str:
    about = {"pp": 32, "tg": 64, "pl": rows, "flash_attn": 0, "speed_tg": 10.0 * rows, "speed_pp": 1.0}
    return json.dumps(about | changes)


def test_batches_are_lines_of_json_among_others() -> None:
    output = "\n".join(["main: n_kv_max = 6144", "", line_of(4), line_of(8), "llama_perf: done"])
    assert parse_batched(output, SAME, [4, 8]) == [Batched(4, 32, 64, 40.0), Batched(8, 32, 64, 80.0)]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (line_of(4), r"ran \[4\] rows, asked for \[4, 8\]"),
        (f"{line_of(8)}\n{line_of(4)}", r"ran \[8, 4\] rows"),
        (f"{line_of(4)}\n{line_of(8, flash_attn=1)}", "with flash attention"),
        (f"{line_of(4)}\n{{}}", "no JSON we know"),
        (f"{line_of(4)}\n{{broken", "no JSON we know"),
        ("", "asked for"),
    ],
)
def test_batches_that_are_not_those_asked_for_are_refused(output: str, words: str) -> None:
    with pytest.raises(UnreadableOutput, match=words):
        parse_batched(output, SAME, [4, 8])
