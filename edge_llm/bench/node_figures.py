"""From repetitions to rows: what a test's samples come to under llama-bench's names and ours. Pure.

Owns the arithmetic and the definitions that are printed with the numbers. Refuses to know processes and formats.
Invariant: a figure that was not measured is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from edge_llm.bench.node_rows import NodeTest
from edge_llm.bench.roofline import read_weights_bytes, roofline_share, step_bytes
from edge_llm.bench.stats import deviation, mean, median
from edge_llm.catalogue.gguf import ModelCard

RATIO_BAR: Final = 0.03
_FLASH: Final = {"on": 1, "off": 0, "auto": -1}
DEFINITIONS: Final[Mapping[str, str]] = {
    "t/s": "tokens per second of a repetition, mean and standard deviation, as llama-bench counts: no text, no "
    "sampling, after a warm-up; of all sequences together in tests `x N`",
    "roofline": "bytes that a decode step must read (weights, and KV at the test's mean depth) x steps per second / "
    "measured memory bandwidth; above 100 %: the processor's cache served a part",
    "peak MiB": "highest resident memory of the measuring process while a repetition ran, mapped weights and Python "
    "included",
    "CPU": "CPU time of the measuring process / time of the repetitions / cores of the board",
    "power W": "mean of the board's own sensor while the test ran, warm-up included",
    "ratio": "median of ours / median of llama-bench's, a process each for every repetition, in turns, on the same "
    "cores",
    "level": "what `edge-llm verify` found on this node for these kernels and so many sequences",
}


@dataclass(frozen=True, slots=True)
class Repetition:
    """One of ours."""

    elapsed_ns: int
    cpu_s: float
    rss_peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Board:
    """Where it ran. `cores` of the board; `pinned` to these, empty: to none."""

    cpu: str
    cores: int
    pinned: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the measuring process said of the model it holds."""

    path: str
    card: ModelCard
    description: str
    build: Mapping[str, str]
    is_repacked: bool
    expert_share: float = 1.0


@dataclass(slots=True)
class Measured:
    """What is known of a test so far."""

    test: NodeTest
    at: datetime
    repetitions: list[Repetition] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    level: str | None = None
    bandwidth_bytes_per_s: float | None = None
    pss_bytes: int | None = None
    anonymous_bytes: int | None = None
    power_w: float | None = None

    @property
    def speeds(self) -> list[float]:
        return [1e9 * self.test.tokens / one.elapsed_ns for one in self.repetitions]


def row_of(found: Measured, loaded: Loaded, board: Board, is_complete: bool) -> dict[str, Any]:
    """Every column of node_rows.py and the samples. There must be a repetition."""
    return {
        **_as_llama_bench(found.test, loaded, board),
        **_times(found),
        **_ours(found, loaded, board),
        "is_complete": is_complete,
    }


def label_of(test: NodeTest) -> str:
    """A test by all that tells it from another one of the same sweep."""
    threads = f"{test.n_threads}/{test.n_threads_batch}" if test.phase == "both" else str(test.shown_threads)
    cache = f"K {test.type_k}, V {test.type_v}, fa {test.effective_flash_attention}"
    return f"{test.name}, policy {test.policy}, threads {threads}, b {test.n_batch}, ub {test.n_ubatch}, {cache}"


def missed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows that differ from llama-bench by more than the bar."""
    return [
        f"{row['model_filename']}: {row['test']} is {row['ratio']:.3f} of llama-bench's, more than {RATIO_BAR:.0%} off"
        for row in rows
        if row["ratio"] is not None and not abs(row["ratio"] - 1.0) <= RATIO_BAR
    ]


def _as_llama_bench(test: NodeTest, loaded: Loaded, board: Board) -> dict[str, Any]:
    """Its columns for a processor without any other device."""
    return {
        "build_commit": f"llama-cpp-python {loaded.build.get('llama_cpp_python', 'unknown')}",
        "build_number": 0,
        "cpu_info": board.cpu,
        "gpu_info": "",
        "backends": "CPU",
        "model_filename": loaded.path,
        "model_type": loaded.description,
        "model_size": loaded.card.weights_bytes,
        "model_n_params": loaded.card.n_params,
        "n_batch": test.n_batch,
        "n_ubatch": test.n_ubatch,
        "n_threads": test.shown_threads,
        "cpu_mask": hex(sum(1 << core for core in board.pinned)),
        "cpu_strict": False,
        "poll": 0,
        "type_k": test.type_k,
        "type_v": test.type_v,
        "n_gpu_layers": 0,
        "n_cpu_moe": 0,
        "split_mode": "none",
        "main_gpu": 0,
        "no_kv_offload": True,
        "flash_attn": _FLASH[test.effective_flash_attention],
        "devices": "none",
        "tensor_split": "0.00",
        "tensor_buft_overrides": "none",
        "load_mode": "auto",
        "lazy_mode": "auto",
        "embeddings": False,
        "no_op_offload": 1,
        "no_host": False,
        "repack": loaded.is_repacked,
        "fit_target": 0,
        "fit_min_ctx": 0,
        "n_prompt": test.n_prompt,
        "n_gen": test.n_gen,
        "n_depth": test.n_depth,
    }


def _times(found: Measured) -> dict[str, Any]:
    times_ns = [one.elapsed_ns for one in found.repetitions]
    speeds = found.speeds
    return {
        "test_time": found.at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": int(mean(times_ns)),
        "stddev_ns": int(deviation(times_ns)),
        "avg_ts": mean(speeds),
        "stddev_ts": deviation(speeds),
        "samples_ns": times_ns,
        "samples_ts": speeds,
    }


def _ours(found: Measured, loaded: Loaded, board: Board) -> dict[str, Any]:
    test, repetitions = found.test, found.repetitions
    wall_s = sum(one.elapsed_ns for one in repetitions) / 1e9
    cpu_s = sum(one.cpu_s for one in repetitions)
    row: dict[str, Any] = {
        "test": test.name,
        "policy": test.policy,
        "level": found.level,
        "n_parallel": test.n_parallel,
        "n_threads_batch": test.n_threads_batch,
        "rss_peak_bytes": max((one.rss_peak_bytes for one in repetitions if one.rss_peak_bytes), default=None),
        "pss_bytes": found.pss_bytes,
        "anonymous_bytes": found.anonymous_bytes,
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "cpu_share": cpu_s / wall_s / board.cores,
        "power_w": found.power_w,
        **_roofline(found, loaded),
    }
    if found.reference:
        row["llama_bench_ts"] = median(found.reference)
        row["ratio"] = median(found.speeds) / row["llama_bench_ts"]
        row["llama_bench_samples_ts"] = found.reference
    return {"llama_bench_ts": None, "ratio": None} | row


def _roofline(found: Measured, loaded: Loaded) -> dict[str, Any]:
    """Of decode tests: a prompt is bound by arithmetic, a mixed test by both."""
    test, card = found.test, loaded.card
    if test.phase != "decode":
        return {"step_bytes": None, "bandwidth_bytes_per_s": None, "roofline_share": None}
    weights = read_weights_bytes(card.tensors, test.n_parallel, loaded.expert_share)
    kv_bytes = card.kv_bytes_per_token(test.type_k, test.type_v) if card.memory in ("full", "sliding-window") else 0
    total = step_bytes(weights, kv_bytes, test.n_parallel, test.n_depth, test.n_gen).total_bytes
    bandwidth = found.bandwidth_bytes_per_s
    steps_per_s = median(found.speeds) / test.n_parallel
    return {
        "step_bytes": total,
        "bandwidth_bytes_per_s": bandwidth,
        "roofline_share": None if bandwidth is None else roofline_share(total, steps_per_s, bandwidth),
    }
