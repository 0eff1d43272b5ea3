"""What llama-bench is asked for one of our tests, and what it says. Pure: command lines and parsing.

Owns the options that make the two one test: the same tokens, micro-batch, cache types, flash attention and threads;
repacking and tiled kernels as our policy has them; huge pages as our workers ask for. Refuses to know processes.
What it ran is read back from its own answer: a row that is not the one asked for is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from edge_llm.bench.llama_tools import UnreadableOutput
from edge_llm.bench.node_rows import NodeTest

_TYPES: Final = frozenset({"f16", "bf16", "q8_0", "q4_0"})
_FLASH: Final = {"on": 1, "off": 0, "auto": -1}


class _Answer(msgspec.Struct, frozen=True):
    n_prompt: int
    n_gen: int
    n_depth: int
    n_batch: int
    n_ubatch: int
    n_threads: int
    type_k: str
    type_v: str
    flash_attn: int
    repack: bool
    samples_ts: list[float]


def why_not(test: NodeTest) -> str | None:
    """Why llama-bench has no such test; None: it has."""
    if test.n_parallel > 1:
        return "llama-bench decodes one sequence (`bench engine` compares batches with llama-batched-bench)"
    if test.phase == "both" and test.n_threads != test.n_threads_batch:
        return "llama-bench has one number of threads for both phases"
    for kind in (test.type_k, test.type_v):
        if kind not in _TYPES:
            return f"llama-bench has no cache type {kind}"
    return None


def command_of(tool: Path, model: Path, test: NodeTest, is_repacked: bool, is_warm: bool) -> list[str]:
    """One repetition in a process of its own."""
    if test.phase == "both":
        sizes = ["-p", "0", "-n", "0", "-pg", f"{test.n_prompt},{test.n_gen}"]
    else:
        sizes = ["-p", str(test.n_prompt), "-n", str(test.n_gen)]
    command = [str(tool), "-m", str(model), *sizes, "-d", str(test.n_depth)]
    command += ["-b", str(test.n_batch), "-ub", str(test.n_ubatch), "-t", str(test.shown_threads)]
    command += ["-ctk", test.type_k, "-ctv", test.type_v, "-fa", test.effective_flash_attention]
    command += ["--repack", str(int(is_repacked)), "-r", "1", "-o", "json"]
    return command if is_warm else [*command, "--no-warmup"]


def environment_of(test: NodeTest) -> dict[str, str]:
    """Tiled K-quant kernels are llama.cpp's default on x86 and no part of policy exact."""
    return {"GGML_CPU_TILED_MM": str(int(test.policy == "fast"))}


def speed_of(output: str, test: NodeTest, is_repacked: bool) -> float:
    """Tokens per second of the one repetition. Raises UnreadableOutput, also when another test ran."""
    try:
        answers = msgspec.json.decode(output, type=list[_Answer])
    except msgspec.DecodeError as error:
        raise UnreadableOutput(f"llama-bench printed no JSON we know: {error}") from error
    if len(answers) != 1 or len(answers[0].samples_ts) != 1:
        raise UnreadableOutput(f"llama-bench ran {len(answers)} tests, asked for one repetition of {test.name}")
    ran, asked = _settings_of(answers[0]), _asked(test, is_repacked)
    if ran != asked:
        different = ", ".join(f"{key} {ran[key]} for {asked[key]}" for key in asked if ran[key] != asked[key])
        raise UnreadableOutput(f"llama-bench ran another test than {test.name}: {different}")
    return answers[0].samples_ts[0]


def _settings_of(answer: _Answer) -> dict[str, object]:
    return {name: value for name, value in msgspec.structs.asdict(answer).items() if name != "samples_ts"}


def _asked(test: NodeTest, is_repacked: bool) -> dict[str, object]:
    return {
        "n_prompt": test.n_prompt,
        "n_gen": test.n_gen,
        "n_depth": test.n_depth,
        "n_batch": test.n_batch,
        "n_ubatch": test.n_ubatch,
        "n_threads": test.shown_threads,
        "type_k": test.type_k,
        "type_v": test.type_v,
        "flash_attn": _FLASH[test.effective_flash_attention],
        "repack": is_repacked,
    }
