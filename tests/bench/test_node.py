"""bench node with real processes on a model of random weights: rows, failures, interruption, turns with llama-bench."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_llm.bench.engine import BenchModel
from edge_llm.bench.node import NodeBench, Plan
from edge_llm.bench.node_rows import NodeTest, Sweep, Table
from edge_llm.bench.record import ModelFacts
from edge_llm.bench.reference_tools import Manifest, ToolTree
from edge_llm.bench.run import Run
from edge_llm.engine.random_model import make_model

PROMPT, DECODE = NodeTest(48, 0, n_ubatch=32), NodeTest(0, 4, n_ubatch=32)
# Says what it was asked for, as llama-bench does, always at the same speed.
FAKE = """#!{python}
import json, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
prompt, steps = int(words["-p"]), int(words["-n"])
if "-pg" in words:
    prompt, steps = map(int, words["-pg"].split(","))
print(json.dumps([dict(
    n_prompt=prompt, n_gen=steps, n_depth=int(words["-d"]), n_batch=int(words["-b"]), n_ubatch=int(words["-ub"]),
    n_threads=int(words["-t"]), type_k=words["-ctk"], type_v=words["-ctv"], samples_ts=[{speed}],
    flash_attn=dict(on=1, off=0, auto=-1)[words["-fa"]], repack=words["--repack"] == "1")]))
"""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> BenchModel:
    path = make_model(tmp_path_factory.mktemp("node-models"), "dense", "Q4_0")
    return BenchModel(path, ModelFacts("random", path.name, "0" * 64, path.stat().st_size, "Q4_0"))


def a_bench(
    model: BenchModel,
    *tests: NodeTest,
    plan: Plan | None = None,
    emit: Callable[[dict[str, Any]], None] = lambda _row: None,
    progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
    folder: Path | None = None,
) -> NodeBench:
    core = min(os.sched_getaffinity(0))
    run = Run("node", ["test"], {}, folder=folder, idle_s=0.0)
    quick = replace(plan or Plan(repetitions=2, cores=(core,)), array_bytes=1 << 20)
    return NodeBench(quick, [model], tests, run, progress, emit)


def failures(bench: NodeBench) -> list[str]:
    return [f"{failure.what}: {failure.why}" for failure in bench.run.failures]


def test_every_test_is_a_row_that_is_out_and_kept_as_soon_as_it_is_finished(model: BenchModel) -> None:
    seen: list[tuple[str, int]] = []
    bench = a_bench(
        model,
        PROMPT,
        DECODE,
        replace(PROMPT, n_gen=4),
        replace(DECODE, n_depth=40, n_parallel=2),
        emit=lambda row: seen.append((row["test"], len(bench.run.cases))),
    )
    found = bench.measure()
    assert failures(bench) == []
    assert seen == [("pp48", 1), ("tg4", 2), ("pp48+tg4", 3), ("tg4 x 2 @ d40", 4)]
    for row in found["rows"]:
        assert len(row["samples_ns"]) == 2
        assert all(speed > 0 for speed in row["samples_ts"])
        assert row["is_complete"]
        assert row["level"] == "unverified"
        assert row["rss_peak_bytes"] > 1 << 20
        assert 0 < row["cpu_share"] <= 1
    assert found["rows"][1]["roofline_share"] > 0
    assert found["memory_bandwidth"]["1"]["bytes_per_s"] > 0
    assert {sample.rpartition(": ")[2] for sample in bench.run.samples} == {"tokens_per_s"}
    record = bench.run.record(found, is_complete=True)
    assert record.engines[0].facts["repacked_tensors"] != "0"
    assert [watched.part for watched in record.resources]


def test_a_test_that_cannot_run_costs_its_row_only(model: BenchModel) -> None:
    quantized = replace(PROMPT, type_v="q8_0")  # llama.cpp wants flash attention for it
    bench = a_bench(model, quantized, DECODE)
    found = bench.measure()
    assert [row["test"] for row in found["rows"]] == ["tg4"]
    assert len(failures(bench)) == 1
    assert "flash attention" in failures(bench)[0]
    assert "V q8_0" in failures(bench)[0]


def test_a_test_that_is_too_large_for_the_board_is_refused_with_the_sum(model: BenchModel) -> None:
    bench = a_bench(model, replace(DECODE, n_depth=500_000_000), DECODE)
    assert [row["test"] for row in bench.measure()["rows"]] == ["tg4"]
    assert "does not fit" in failures(bench)[0]


def test_an_engine_that_is_gone_is_started_again_for_the_next_test(model: BenchModel) -> None:
    patient = Plan(repetitions=1, deadline_s=60.0)
    bench = a_bench(model, PROMPT, DECODE, plan=patient)

    def kill_first(what: str, _done: int, _total: int) -> None:
        if what.startswith("pp48"):
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            os.kill(max(map(int, children)), 9)

    bench.progress = kill_first
    assert [row["test"] for row in bench.measure()["rows"]] == ["tg4"]
    assert failures(bench)[0].startswith("random: pp48")


def test_a_model_that_cannot_be_loaded_is_one_failure(model: BenchModel, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    bench = a_bench(replace(model, path=broken), PROMPT, replace(PROMPT, n_prompt=16))
    assert bench.measure()["rows"] == []
    assert len(failures(bench)) == 1
    assert "broken.gguf" in failures(bench)[0]


def test_what_was_repeated_before_an_interruption_is_a_row_that_says_so(model: BenchModel) -> None:
    bench = a_bench(model, PROMPT, replace(PROMPT, n_prompt=16))
    steps: list[str] = []

    def interrupt_the_fourth(what: str, _done: int, _total: int) -> None:
        steps.append(what)
        if len(steps) == 4:
            raise KeyboardInterrupt

    bench.progress = interrupt_the_fourth
    with pytest.raises(KeyboardInterrupt):
        bench.measure()
    rows = bench.figures()["rows"]
    assert [(row["test"], len(row["samples_ns"]), row["is_complete"]) for row in rows] == [
        ("pp48", 2, True),
        ("pp16", 1, False),
    ]
    assert "(cut short)" in Table("md").line(rows[1])


def test_lines_are_kept_in_a_file_without_this_machines_paths(model: BenchModel, tmp_path: Path) -> None:
    bench = a_bench(model, PROMPT, plan=Plan(repetitions=1), folder=tmp_path)
    bench.measure()
    (lines,) = list(tmp_path.glob("*.cases.jsonl"))
    assert "random: pp48" in lines.read_text()
    assert str(model.path.parent) not in lines.read_text()


def tree_of(folder: Path, script: str) -> ToolTree:
    (folder / "llama-bench").write_text(script)
    (folder / "llama-bench").chmod(0o755)
    return ToolTree(folder, Manifest("0.3", "ours", (), "cc", "a cpu"))


def test_llama_bench_takes_turns_with_us_and_gives_a_ratio(model: BenchModel, tmp_path: Path) -> None:
    tree = tree_of(tmp_path, FAKE.format(python=sys.executable, speed=123.5))
    both = replace(PROMPT, n_gen=4)
    bench = a_bench(model, PROMPT, both, replace(DECODE, n_parallel=2), plan=Plan(repetitions=2, tree=tree))
    rows = bench.measure()["rows"]
    assert failures(bench) == []
    assert [row["llama_bench_samples_ts"] for row in rows[:2]] == [[123.5, 123.5]] * 2
    for row in rows[:2]:
        assert row["ratio"] == pytest.approx(sorted(row["samples_ts"])[0] / 247 + sorted(row["samples_ts"])[1] / 247)
    assert rows[2]["ratio"] is None
    assert any("one sequence" in note for note in bench.run.notes)


def test_a_llama_bench_that_fails_costs_the_row_its_ratio_and_is_counted(model: BenchModel, tmp_path: Path) -> None:
    tree = tree_of(tmp_path, "#!/bin/sh\necho no such model >&2\nexit 1\n")
    bench = a_bench(model, PROMPT, plan=Plan(repetitions=2, tree=tree))
    (row,) = bench.measure()["rows"]
    assert (row["ratio"], row["is_complete"]) == (None, False)
    assert "no such model" in failures(bench)[0]


def test_the_memory_curve_has_a_point_with_and_without_flash_attention(model: BenchModel) -> None:
    bench = a_bench(model, PROMPT, plan=Plan(repetitions=1, curve=tuple(Sweep().curve([256, 1000]))))
    found = bench.measure()
    points = found["memory_curve"]
    assert [(point["n_ctx"], point["flash_attention"]) for point in points] == [
        (256, "off"),
        (256, "on"),
        (1024, "off"),
        (1024, "on"),
    ]
    assert all(point["prefill_peak_bytes"] > 1 << 20 and point["decode_peak_bytes"] > 1 << 20 for point in points)
    assert len(bench.run.cases) == 5


def test_a_board_cools_off_before_each_test(model: BenchModel) -> None:
    pauses: list[float] = []
    plan = Plan(repetitions=2, delay_s=7.0, pause=pauses.append)
    a_bench(model, PROMPT, DECODE, plan=plan).measure()
    assert pauses == [7.0, 7.0]
