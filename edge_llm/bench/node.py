"""`edge-llm bench node`: the phases of models on this board, in rows as llama-bench gives them, with what they cost.

Owns the order of measuring. A model and a policy have one process, which holds the weights for all their tests
(edge_llm/engine/measure_node.py); beside each row the board is sampled. With `--against-llama-bench` every repetition
has a process of its own on both sides, in turns: where its pages happen to lie makes a process some percent faster or
slower for as long as it lives. A point of the memory curve has a process of its own, too: nothing else is in it.
Refuses to know llama.cpp (child processes) and output formats (node_rows.py).

Invariants: whatever is finished was given to `emit` and kept as a case before the next thing starts; a test that fails
is a failure of its row only; Ctrl-C keeps the repetitions there are, as a row that says it was cut short.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from edge_llm.bench.engine import BenchModel
from edge_llm.bench.node_figures import (
    DEFINITIONS,
    Board,
    Loaded,
    Measured,
    Repetition,
    label_of,
    row_of,
)
from edge_llm.bench.node_reference import command_of, environment_of, speed_of, why_not
from edge_llm.bench.node_rows import NodeTest, complete
from edge_llm.bench.processes import MeasureFailed, Measurer, run_tool
from edge_llm.bench.reference_tools import ToolTree
from edge_llm.bench.run import Run
from edge_llm.catalogue.gguf import read_card
from edge_llm.errors import EdgeLLMError
from edge_llm.kv.snapshot import Policy

MEASURE: Final = "edge_llm.engine.measure_node"
BANDWIDTH: Final = "edge_llm.bench.bandwidth"
_ENGINE: Final = "engine"  # its name in the sampled series

Progress = Callable[[str, int, int], None]
Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How to measure. `tree`: measure llama-bench beside; `curve`: prompts that fill the contexts of the memory
    curve; `array_bytes`: of the bandwidth measurement, None: what lies outside the cache."""

    repetitions: int = 5
    cores: tuple[int, ...] = ()
    is_warm: bool = True
    delay_s: float = 0.0
    deadline_s: float = 3600.0
    tree: ToolTree | None = None
    curve: tuple[NodeTest, ...] = ()
    levels_dir: Path | None = None
    array_bytes: int | None = None
    pause: Callable[[float], None] = time.sleep


@dataclass(slots=True)
class NodeBench:
    """One run. `rows` and `curve` are what is finished."""

    plan: Plan
    models: Sequence[BenchModel]
    tests: Sequence[NodeTest]
    run: Run
    progress: Progress
    emit: Emit
    rows: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    bandwidths: dict[int, dict[str, Any]] = field(default_factory=dict)
    _done: int = 0

    def measure(self) -> dict[str, Any]:
        """All models, then the memory curve. Fills `run` as it goes."""
        if self.plan.tree is not None:
            self.run.engine("llama.cpp tools, tree ours", self.plan.tree.facts)
        self.run.models += [model.facts for model in self.models]
        for model in self.models:
            for policy, tests in groupby(self.tests, lambda test: test.policy):
                if self.plan.tree is None:
                    self._in_one_process(model, policy, list(tests))
                else:
                    self._in_turns(model, policy, list(tests), self.plan.tree)
            self._memory_curve(model)
        return self.figures()

    def figures(self) -> dict[str, Any]:
        """What is printed, of all that is finished."""
        return {
            "rows": [complete(row) for row in self.rows],
            "memory_bandwidth": {str(threads): found for threads, found in self.bandwidths.items()},
            "memory_curve": self.curve,
            "definitions": dict(DEFINITIONS),
        }

    # -- rows of one process

    def _in_one_process(self, model: BenchModel, policy: Policy, tests: Sequence[NodeTest]) -> None:
        """One process, or another one when a test has ended it (the kernel does, where memory is short)."""
        left = [(test, self._bandwidth(test)) for test in tests]  # before weights fill the memory
        try:
            while left:
                with self._engine(model, policy) as (engine, loaded):
                    while left and _answers(engine):
                        test, bandwidth = left.pop(0)
                        found = Measured(test, datetime.now(UTC), bandwidth_bytes_per_s=bandwidth)
                        with self._row(model, found, loaded):
                            self._watched_row(engine, found)
        except (EdgeLLMError, OSError) as error:
            self.run.fail(f"{model.facts.name}, policy {policy}", str(error))

    def _watched_row(self, engine: Measurer, found: Measured) -> None:
        """All repetitions in one context, the board sampled meanwhile."""
        self._cool_off()
        label = label_of(found.test)
        try:
            with self.run.watching({_ENGINE: engine.pid}, part=label):
                found.level = self._opened(engine, found.test)
                for number in range(self.plan.repetitions):
                    self._step(label)
                    found.repetitions.append(self._repetition(engine, number))
        finally:
            _take_samples(found, self.run)

    def _opened(self, engine: Measurer, test: NodeTest) -> str:
        """The level of this test's kernels; wider batches than `verify` compared have none."""
        answer = engine.ask("open", self.plan.deadline_s, test=_wire(test), is_warm=self.plan.is_warm)
        is_covered = test.n_parallel == 1 or test.n_parallel <= answer["level_rows"]
        return str(answer["level"]) if is_covered else "unverified"

    def _repetition(self, engine: Measurer, number: int) -> Repetition:
        answer = engine.ask("run", self.plan.deadline_s, seed=number)
        return Repetition(int(answer["elapsed_ns"]), float(answer["cpu_s"]), answer["rss_peak_bytes"])

    # -- rows beside llama-bench

    def _in_turns(self, model: BenchModel, policy: Policy, tests: Sequence[NodeTest], tree: ToolTree) -> None:
        bandwidths = [self._bandwidth(test) for test in tests]
        try:
            with self._engine(model, policy) as (_, loaded):
                pass  # what it says of itself: repacked tensors decide what llama-bench is asked for
        except (EdgeLLMError, OSError) as error:
            self.run.fail(f"{model.facts.name}, policy {policy}", str(error))
            return
        for test, bandwidth in zip(tests, bandwidths, strict=True):
            found = Measured(test, datetime.now(UTC), bandwidth_bytes_per_s=bandwidth)
            reason = why_not(test)
            if reason is not None:
                self._note(f"{test.name} has no ratio: {reason}")
            with self._row(model, found, loaded):
                self._both_sides(model, found, loaded, None if reason else tree)

    def _both_sides(self, model: BenchModel, found: Measured, loaded: Loaded, tree: ToolTree | None) -> None:
        turns: list[Callable[[], None]] = [lambda: self._our_turn(model, found)]
        if tree is not None:
            turns.append(lambda: self._their_turn(model, found, loaded, tree))
        for number in range(self.plan.repetitions):
            self._step(label_of(found.test))
            # forth and back: neither side is always the one that comes second
            for turn in turns if number % 2 == 0 else turns[::-1]:
                self._cool_off()
                turn()

    def _our_turn(self, model: BenchModel, found: Measured) -> None:
        with self._engine(model, found.test.policy) as (engine, _):
            found.level = self._opened(engine, found.test)
            found.repetitions.append(self._repetition(engine, len(found.repetitions)))

    def _their_turn(self, model: BenchModel, found: Measured, loaded: Loaded, tree: ToolTree) -> None:
        test, plan = found.test, self.plan
        command = command_of(tree.tool("llama-bench"), model.path, test, loaded.is_repacked, plan.is_warm)
        environment = environment_of(test)
        output, used = run_tool(command, environment, plan.cores, plan.deadline_s)
        self.run.used(used)
        speed = speed_of(output, test, loaded.is_repacked)
        found.reference.append(speed)
        self.run.add(f"{model.facts.name}: llama-bench: {label_of(test)}: tokens_per_s", speed)

    # -- the memory curve

    def _memory_curve(self, model: BenchModel) -> None:
        """Peak memory against context."""
        for number, test in enumerate(self.plan.curve):
            name = f"{model.facts.name}: memory of {test.cells} tokens, fa {test.flash_attention}"
            self.progress(name, number, len(self.plan.curve))
            try:
                with self._engine(model, test.policy) as (engine, _):
                    answer = engine.ask("curve", self.plan.deadline_s, test=_wire(test))
            except (EdgeLLMError, OSError) as error:
                self.run.fail(name, str(error))
                continue
            point = _point_of(model.facts.name, test, answer)
            self.curve.append(point)
            self.run.case({"case": name, **point})

    # -- what all share

    @contextmanager
    def _engine(self, model: BenchModel, policy: Policy) -> Iterator[tuple[Measurer, Loaded]]:
        """A process with the model in it."""
        arguments = ["--model", str(model.path), "--name", model.facts.name, "--sha256", model.facts.sha256]
        arguments += ["--policy", policy]
        if self.plan.levels_dir is not None:
            arguments += ["--levels-dir", str(self.plan.levels_dir)]
        name = f"engine {model.facts.name}, policy {policy}"
        with Measurer(name, MEASURE, arguments, self.plan.cores, ordinary_pages=True) as engine:
            said = engine.facts
            self.run.engine(f"edge_llm on {model.facts.name}, policy {policy}", said["build"])
            card = read_card(model.path)
            yield (
                engine,
                Loaded(
                    path=str(model.path),
                    card=card,
                    description=said["description"],
                    build=said["build"],
                    is_repacked=said["is_repacked"],
                    expert_share=said["expert_share"],
                ),
            )
            self.run.used(engine.usage())

    @contextmanager
    def _row(self, model: BenchModel, found: Measured, loaded: Loaded) -> Iterator[None]:
        """Inside a test is measured; afterwards its row is out, of whatever repetitions there are."""
        is_complete = False
        try:
            yield
            is_complete = True
        except (EdgeLLMError, OSError) as error:
            self.run.fail(f"{model.facts.name}: {label_of(found.test)}", str(error))
        finally:
            if found.repetitions:
                self._finish(model, found, row_of(found, loaded, self._board, is_complete))

    def _finish(self, model: BenchModel, found: Measured, row: dict[str, Any]) -> None:
        label = label_of(found.test)
        for speed in found.speeds:
            self.run.add(f"{model.facts.name}: {label}: tokens_per_s", speed)
        self.rows.append(row)
        self.run.case({"case": f"{model.facts.name}: {label}", **complete(row)})
        self.emit(row)

    @property
    def _board(self) -> Board:
        return Board(self.run.before.cpu, self.run.before.cores, self.plan.cores)

    def _bandwidth(self, test: NodeTest) -> float | None:
        """Measured once for each number of threads that decodes; None where that fails."""
        if test.phase != "decode":
            return None
        threads = test.n_threads
        if threads not in self.bandwidths:
            self.progress(f"memory bandwidth, threads {threads}", 0, 0)
            arguments = [] if self.plan.array_bytes is None else [str(self.plan.array_bytes)]
            try:
                with Measurer("memory bandwidth", BANDWIDTH, arguments, self.plan.cores) as measurer:
                    answer = measurer.ask("bandwidth", self.plan.deadline_s, threads=threads)
            except (EdgeLLMError, OSError) as error:
                self.run.fail(f"memory bandwidth, threads {threads}", str(error))
                answer = {}
            self.bandwidths[threads] = {key: value for key, value in answer.items() if key != "event"}
        return self.bandwidths[threads].get("bytes_per_s")

    def _step(self, label: str) -> None:
        total = len(self.models) * len(self.tests) * self.plan.repetitions
        self.progress(label, min(self._done, total), total)
        self._done += 1

    def _cool_off(self) -> None:
        if self.plan.delay_s:
            self.plan.pause(self.plan.delay_s)

    def _note(self, text: str) -> None:
        if text not in self.run.notes:
            self.run.notes.append(text)


def _answers(engine: Measurer) -> bool:
    """Whether it is there, with no test open."""
    try:
        engine.ask("shut")
    except MeasureFailed:
        return False
    return True


def _take_samples(found: Measured, run: Run) -> None:
    """What was sampled beside the row that has just ended."""
    if not run.resources:
        return
    summaries: Mapping[str, Any] = run.resources[-1].summaries

    def highest(name: str) -> int | None:
        summary = summaries.get(f"{_ENGINE}/{name}")
        return None if summary is None or summary.maximum is None else int(summary.maximum)

    found.pss_bytes, found.anonymous_bytes = highest("pss_bytes"), highest("anonymous_bytes")
    power = summaries.get("power_w")
    found.power_w = None if power is None else power.mean


def _point_of(model: str, test: NodeTest, answer: Mapping[str, Any]) -> dict[str, Any]:
    """A point of the memory curve."""
    return {
        "model": model,
        "policy": test.policy,
        "n_ctx": test.cells,
        "n_ubatch": test.micro_batch,
        "type_k": test.type_k,
        "type_v": test.type_v,
        "flash_attention": test.flash_attention,
        "tokens": answer["tokens"],
        "prefill_peak_bytes": answer["prefill_peak_bytes"],
        "decode_peak_bytes": answer["decode_peak_bytes"],
    }


def _wire(test: NodeTest) -> dict[str, Any]:
    """A test as the measuring process takes it."""
    return {
        "n_prompt": test.n_prompt,
        "n_gen": test.n_gen,
        "n_depth": test.n_depth,
        "cells": test.cells,
        "micro_batch": test.micro_batch,
        "type_k": test.type_k,
        "type_v": test.type_v,
        "flash_attention": test.effective_flash_attention,
        "n_threads": test.n_threads,
        "n_threads_batch": test.n_threads_batch,
        "n_parallel": test.n_parallel,
    }
