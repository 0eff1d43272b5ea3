"""The hand-off bench: its figures and bars from samples, and what is left when parts of it fail."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from edge_llm.bench.engine import BenchModel
from edge_llm.bench.handoff import (
    BARS,
    MEMORY,
    MIXED,
    ONE_PIECE,
    SERVER,
    SPLIT,
    Plan,
    figures,
    layouts,
    measure,
    missed,
)
from edge_llm.bench.layout import Layout, Started
from edge_llm.bench.record import ModelFacts
from edge_llm.bench.run import Run
from edge_llm.commands.serve import worker
from edge_llm.errors import WorkerError

PLAN = Plan(core=0, repetitions=1, vocab_size=1000, chunk_tokens=128, prompt_tokens=1001)
KV_BYTES = 100
FACTS = ModelFacts("tiny", "tiny.gguf", "0" * 64, 0, "Q4_0", "llama", KV_BYTES)
CHUNK, SNAPSHOT = 128 * KV_BYTES, 1000 * KV_BYTES


def a_run(**samples: list[float]) -> Run:
    """A run that meets every bar by a hair, with `samples` instead of its own; a name may be short."""
    good = {
        "export_share": [0.01],
        f"{SPLIT}, 0 streams: overlap_share": [0.90],
        f"{SPLIT}, 1 streams: prompt_stall_ratio": [1.0],
        f"{SPLIT}, 4 streams: prompt_stall_ratio": [2.0],
        f"{SPLIT}, 1 streams: stall_ratio": [2.0],
        f"{SPLIT}, 4 streams: stall_ratio": [2.5],
        f"{MIXED}, 1 streams: stall_ratio": [4.0],
        f"{MIXED}, 4 streams: stall_ratio": [3.0],
        "sender_growth_bytes": [3.0 * CHUNK],
        "receiver_growth_bytes": [SNAPSHOT + 3.0 * CHUNK],
    }
    run = Run("handoff", ["test"], {})
    run.models.append(FACTS)
    for name, values in (good | samples).items():
        for value in values:
            run.add(name, value)
    return run


def test_a_run_that_meets_every_bar_misses_none() -> None:
    assert missed(figures(a_run(), PLAN)) == []


@pytest.mark.parametrize(
    ("name", "values", "line"),
    [
        ("export_share", [0.0101], "export_share is 0.0101, not at most 0.01"),
        (f"{SPLIT}, 0 streams: overlap_share", [0.899], "overlap_share is 0.899, not at least 0.9"),
        (f"{SPLIT}, 1 streams: prompt_stall_ratio", [2.1], "decode_stall_ratio is 2.1, not at most 2.0"),
        (f"{MIXED}, 4 streams: stall_ratio", [4.5], "mixed_stall_ratio is 4.5, not at most 4.0"),
        ("sender_growth_bytes", [3.0 * CHUNK + 1], "the sender's memory rose by 38401 bytes, above 3 chunks"),
        (
            "receiver_growth_bytes",
            [SNAPSHOT + 3.0 * CHUNK + 1],
            "the receiver's memory rose by 138401 bytes, above one snapshot and 3 chunks",
        ),
    ],
)
def test_each_bar_is_missed_alone(name: str, values: list[float], line: str) -> None:
    assert missed(figures(a_run(**{name: values}), PLAN)) == [line]


def test_what_was_not_measured_is_missed() -> None:
    lines = missed(figures(Run("handoff", ["test"], {}), PLAN))
    assert lines == [*(f"{name} was not measured" for name in BARS), "peak_handoff_bytes was not measured"]


def test_a_figure_is_the_median_of_repetitions_and_the_worst_number_of_streams() -> None:
    samples = {f"{SPLIT}, 1 streams: prompt_stall_ratio": [9.0, 1.5, 1.6]}
    samples |= {f"{SERVER}, 1 streams: stall_ratio": [6.0], f"{SERVER}, 4 streams: stall_ratio": [7.0]}
    found = figures(a_run(**samples), PLAN)
    assert found["decode_stall_ratio"] == 2.0
    assert found["answer_stall_ratio"] == 2.5, "the first steps of the answer are told apart, not left out"
    assert found["llama_server_stall_ratio"] == 7.0
    assert found["peak_handoff_bytes"] == SNAPSHOT + 3 * CHUNK
    assert found["memory"]["snapshot_bytes"] == SNAPSHOT
    assert found["arrivals"][f"{SPLIT}, 1 streams"] == {"stall_ratio": 2.0, "prompt_stall_ratio": 1.6}


@pytest.mark.parametrize("count", PLAN.stall_streams)
def test_a_number_of_streams_that_was_not_measured_could_be_the_worst(count: int) -> None:
    run = a_run()
    del run.samples[f"{SPLIT}, {count} streams: prompt_stall_ratio"]
    assert missed(figures(run, PLAN)) == ["decode_stall_ratio was not measured"]


@pytest.mark.parametrize(("sender", "receiver", "misses"), [(3, 3, 0), (4, 3, 1), (3, 4, 1), (4, 4, 2)])
def test_memory_of_the_sender_and_of_the_receiver_are_judged_one_by_one(
    sender: int, receiver: int, misses: int
) -> None:
    grown = {
        "sender_growth_bytes": [1.0 * sender * CHUNK],
        "receiver_growth_bytes": [SNAPSHOT + 1.0 * receiver * CHUNK],
    }
    assert len(missed(figures(a_run(**grown), PLAN))) == misses


@pytest.mark.anyio
async def test_a_part_that_cannot_be_measured_leaves_the_others_and_is_said(tmp_path: Path) -> None:
    errors: dict[str, Exception] = {
        SPLIT: WorkerError("decode-1 could not start"),
        ONE_PIECE: aiohttp.ServerDisconnectedError(),
        MEMORY: aiohttp.ClientPayloadError(),
        MIXED: TimeoutError(),
        SERVER: OSError("no such program"),
    }

    def launch(layout: Layout) -> AbstractAsyncContextManager[Started]:
        raise errors[layout.name]

    run = Run("handoff", ["test"], {})
    model = BenchModel(tmp_path / "absent.gguf", FACTS)
    found: dict[str, Any] = await measure(PLAN, model, launch, launch, run, lambda _what, _done, _total: None)
    assert found == {"arrivals": {}}
    assert [failure.what for failure in run.failures] == [
        "KV export",
        "split",
        "one piece after prefill",
        "memory",
        "mixed",
        "llama-server",
    ]
    assert all(failure.why for failure in run.failures)


def test_split_workers_have_a_slot_for_every_stream_and_the_new_prompt() -> None:
    options = layouts(PLAN)[SPLIT].options
    assert int(options[options.index("--slots") + 1]) > max(PLAN.ttft_streams)


@pytest.mark.parametrize("name", layouts(PLAN))
def test_workers_know_the_options_that_they_are_started_with(name: str) -> None:
    with worker.make_context("worker", list(layouts(PLAN)[name].options)) as context:
        assert context.params["level_cap"] in (None, "same-plan")


def test_what_is_compared_with_overlapping_computes_the_same_chunks() -> None:
    whole, overlapped = layouts(PLAN)[ONE_PIECE].options, layouts(PLAN)[SPLIT].options
    assert whole == (*overlapped, "--handoff", "serialized")
