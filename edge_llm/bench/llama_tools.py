"""What to ask llama-bench and llama-batched-bench, and what their answers mean. Pure: command lines and parsing.

Owns the options that make a comparison fair: one thread, no flash attention, the same K and V types, repacking as our
policy has it, one KV stream per sequence (`--no-kv-unified`), as many cells each as ours has (llama-bench takes no
more than its test needs), the same depths. `default` settings name nothing: llama.cpp's own choice, but for the thread
count and the cells. Refuses to know processes and where tools lie.

llama-bench's prompts are one call of 512 rows (its default micro-batch); ours are pieces of a chunk. That is a price
of chunked hand-off, so it stays in the comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Final

import msgspec

from edge_llm.errors import EdgeLLMError

# 64 tokens of a small model take a second: one pass of them is mostly noise.
PASSES: Final = 3


class UnreadableOutput(EdgeLLMError):
    """A tool of llama.cpp printed something this version does not understand."""

    code = "unreadable_output"


@dataclass(frozen=True, slots=True)
class Kernels:
    """Same kernels as ours (`is_default` False), or llama.cpp's own choice."""

    is_default: bool
    is_repacked: bool
    k_type: str = "f16"
    v_type: str = "f16"

    @property
    def environment(self) -> dict[str, str]:
        """Tiled K-quant kernels are part of llama.cpp's default on x86 and no part of policy exact."""
        return {} if self.is_default else {"GGML_CPU_TILED_MM": "0"}


@dataclass(frozen=True, slots=True)
class Batched:
    """One line of llama-batched-bench."""

    rows: int
    prompt_tokens: int
    decode_tokens: int
    decode_tokens_per_s: float


class _BenchTest(msgspec.Struct, frozen=True):
    n_prompt: int
    n_gen: int
    n_threads: int
    flash_attn: int
    repack: bool
    samples_ts: list[float]


class _BatchedLine(msgspec.Struct, frozen=True):
    pp: int
    tg: int
    pl: int
    flash_attn: int
    speed_tg: float


def bench_command(tool: Path, model: Path, kernels: Kernels, prompt_tokens: int, decode_tokens: int) -> list[str]:
    """PASSES of a prompt test (none with 0 tokens) and of a decode test, each in a context of its own."""
    command = [str(tool), "-m", str(model), "-p", str(prompt_tokens), "-n", str(decode_tokens)]
    command += ["-r", str(PASSES), "-t", "1", "-o", "json"]
    if kernels.is_default:
        return command
    repack = str(int(kernels.is_repacked))
    return [*command, "-fa", "off", "--repack", repack, "-ctk", kernels.k_type, "-ctv", kernels.v_type]


def batched_command(
    tool: Path, model: Path, kernels: Kernels, rows: list[int], prompt_tokens: int, decode_tokens: int, n_ctx: int
) -> list[str]:
    """Decode with each number of rows, every sequence behind a prompt of its own, `n_ctx` cells each."""
    cells = max(rows) * n_ctx
    command = [str(tool), "-m", str(model), "-c", str(cells), "-npp", str(prompt_tokens), "-ntg", str(decode_tokens)]
    command += ["-npl", ",".join(map(str, rows)), "-t", "1", "-tb", "1", "--output-format", "jsonl"]
    if kernels.is_default:
        return command
    repack = "--repack" if kernels.is_repacked else "--no-repack"
    return [*command, "-fa", "off", "--no-kv-unified", repack, "-ctk", kernels.k_type, "-ctv", kernels.v_type]


def parse_bench(output: str, kernels: Kernels) -> tuple[float, float]:
    """Prompt and decode tokens per second, means over passes. Raises UnreadableOutput, also when other settings ran."""
    prompts, decodes = _tests(output, kernels)
    if len(prompts) != 1 or len(decodes) != 1:
        raise UnreadableOutput(
            f"llama-bench ran {len(prompts)} prompt and {len(decodes)} decode tests, not one of each"
        )
    return fmean(prompts[0].samples_ts), fmean(decodes[0].samples_ts)


def parse_decode(output: str, kernels: Kernels) -> float:
    """The same of a run without a prompt test."""
    prompts, decodes = _tests(output, kernels)
    if prompts or len(decodes) != 1:
        raise UnreadableOutput(f"llama-bench ran {len(prompts)} prompt and {len(decodes)} decode tests, not one decode")
    return fmean(decodes[0].samples_ts)


def _tests(output: str, kernels: Kernels) -> tuple[list[_BenchTest], list[_BenchTest]]:
    """Prompt tests and decode tests that ran with the settings asked for."""
    try:
        tests = msgspec.json.decode(output, type=list[_BenchTest])
    except msgspec.DecodeError as error:
        raise UnreadableOutput(f"llama-bench printed no JSON we know: {error}") from error
    for test in tests:
        if not kernels.is_default and (test.flash_attn != 0 or test.repack != kernels.is_repacked):
            raise UnreadableOutput("llama-bench ran with flash attention or repacking other than asked for")
    told = [test for test in tests if test.samples_ts]
    prompts = [test for test in told if test.n_prompt and not test.n_gen]
    return prompts, [test for test in told if test.n_gen and not test.n_prompt]


def parse_batched(output: str, kernels: Kernels, rows: list[int]) -> list[Batched]:
    """One figure per number of rows, in that order. Raises UnreadableOutput."""
    try:
        lines = [msgspec.json.decode(line, type=_BatchedLine) for line in output.splitlines() if line.startswith("{")]
    except msgspec.DecodeError as error:
        raise UnreadableOutput(f"llama-batched-bench printed no JSON we know: {error}") from error
    if [line.pl for line in lines] != rows:
        raise UnreadableOutput(f"llama-batched-bench ran {[line.pl for line in lines]} rows, asked for {rows}")
    if not kernels.is_default and any(line.flash_attn != 0 for line in lines):
        raise UnreadableOutput("llama-batched-bench ran with flash attention")
    return [Batched(line.pl, line.pp, line.tg, line.speed_tg) for line in lines]
