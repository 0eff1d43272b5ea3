"""llama-perplexity of the same build on the same windows of the same texts, beside what we measured.

Owns running it, and what counts as the same: the bars are those of this project (issue 5). Refuses to know its options
and its words (llama_perplexity.py). The reference model goes first and lays down its probabilities, 16 bits each; the
others are compared with that file, as we compare ours.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from edge_llm.bench.accuracy.datasets import wiki_text
from edge_llm.bench.accuracy.llama_perplexity import (
    Asked,
    Said,
    divergence_command,
    divergence_said,
    perplexity_command,
    perplexity_said,
)
from edge_llm.bench.accuracy.measure import Facts, Measured, Plan, check_data
from edge_llm.bench.accuracy.tasks import Task
from edge_llm.bench.engine import BenchModel
from edge_llm.bench.llama_tools import Kernels
from edge_llm.bench.processes import MeasureFailed, run_tool
from edge_llm.bench.record import Process
from edge_llm.bench.reference_tools import ToolTree
from edge_llm.errors import EdgeLLMError

TOOL: Final = "llama-perplexity"
PERPLEXITY_BAR, KL_BAR = 0.005, 0.02
# Below this the 16 bits of its file and its six decimals are what a ratio would show.
KL_LEAST: Final = 0.001
# A board that scores less than one token a second is not waited for.
_S_PER_TOKEN: Final = 1.0
_LOADING_S: Final = 600.0
DEFINITIONS: Final = {
    "perplexity": f"ratio: ours / {TOOL}'s, of the same build on the same windows; within {100 * PERPLEXITY_BAR:g} %",
    "kl": f"mean divergence from the reference model in nats, likewise; within {100 * KL_BAR:g} %, "
    f"judged from {KL_LEAST} up",
    "same_top": "share of tokens whose likeliest next one is the reference's",
}

Progress = Callable[[str, int, int], None]
RunTool = Callable[[Sequence[str], Mapping[str, str], Sequence[int], float], tuple[str, Process]]


@dataclass(frozen=True, slots=True)
class _Text:
    """One text, and where the reference model's probabilities on it are kept meanwhile."""

    task: Task
    file: Path
    logits: Path


@dataclass(slots=True)
class Beside:
    """`found`: by model and text, of what is finished."""

    tree: ToolTree
    plan: Plan
    run_tool: RunTool = run_tool
    found: dict[str, dict[str, Facts]] = field(default_factory=dict)

    @property
    def texts(self) -> list[Task]:
        return [task for task in self.plan.tasks if task.kind == "text"]

    def measure(
        self,
        models: Sequence[BenchModel],
        reference: BenchModel | None,
        ours: Measured,
        figures: Mapping[str, Any],
        progress: Progress,
        scratch: Path,
    ) -> None:
        """All texts of all models, the reference first. What cannot be compared is a failure of the run."""
        ours.run.engine("llama.cpp tools, tree ours", self.tree.facts)
        order = sorted(models, key=lambda model: model is not reference)
        files = check_data(self.plan)
        for task in self.texts:
            path, text = files[task.name], _Text(task, scratch / "text", scratch / "base")
            # it takes one newline from the end of a file
            text.file.write_text(wiki_text(path.parent, path.name) + "\n", encoding="utf-8", newline="")
            try:
                for number, model in enumerate(order):
                    name = model.facts.name
                    progress(f"{name}: {TOOL}, {task.name}", number, len(order))
                    own = figures["models"].get(name, {}).get(task.name, {})
                    try:
                        self._one(model, reference, text, own, ours)
                    except (EdgeLLMError, OSError) as error:
                        ours.run.fail(f"{TOOL} on {name}, {task.name}", str(error))
            finally:
                text.logits.unlink(missing_ok=True)

    def figures(self) -> Facts:
        return {"against_llama_perplexity": {"models": self.found, "definitions": dict(DEFINITIONS)}}

    def _one(
        self, model: BenchModel, reference: BenchModel | None, text: _Text, own: Mapping[str, Any], ours: Measured
    ) -> None:
        name, task = model.facts.name, text.task.name
        asked = self._asked(text.task, own, ours.facts.get(name, {}))
        if reference is None or model is reference:
            output, said = self._perplexity(model, reference, text, asked, ours)
        else:
            output, said = self._divergence(model, text, asked, ours)
        found = {"windows": asked.count, "window_tokens": asked.tokens, **compared(own, said)}
        self.found.setdefault(name, {})[task] = found
        head = {"case": f"{name}/{task}/{TOOL}", "model": name, "model_sha256": model.facts.sha256, "task": task}
        ours.run.case({**head, "said": output, **found})

    def _perplexity(
        self, model: BenchModel, reference: BenchModel | None, text: _Text, asked: Asked, ours: Measured
    ) -> tuple[str, Said]:
        """Of a model alone, or of the reference: its probabilities are kept."""
        if reference is not None:
            _check_disk(text.logits.parent, asked.logits_bytes(ours.facts[model.facts.name]["vocab_size"]))
        kept = text.logits if reference is not None else None
        command = perplexity_command(self.tree.tool(TOOL), model.path, asked, text.file, kept)
        output = self._run(command, asked, ours)
        return output, perplexity_said(output, asked)

    def _divergence(self, model: BenchModel, text: _Text, asked: Asked, ours: Measured) -> tuple[str, Said]:
        if not text.logits.is_file():
            raise MeasureFailed(f"{TOOL} has no probabilities of the reference model to compare with")
        output = self._run(divergence_command(self.tree.tool(TOOL), model.path, asked, text.logits), asked, ours)
        return output, divergence_said(output, asked)

    def _asked(self, task: Task, own: Mapping[str, Any], facts: Mapping[str, Any]) -> Asked:
        """The windows that we measured, with the kernels that we had. Raises MeasureFailed where there are none."""
        if not own.get("tokens") or own.get("failed"):
            raise MeasureFailed("not all windows of ours were measured, so there is nothing to compare")
        plan, tokens = self.plan, self.plan.window_of(task)
        is_repacked = facts["build"].get("repacked_tensors", "0") != "0"
        return Asked(tokens, own["n"], plan.threads, Kernels(plan.policy == "fast", is_repacked, plan.k_type))

    def _run(self, command: Sequence[str], asked: Asked, ours: Measured) -> str:
        environment = asked.kernels.environment
        deadline_s = _LOADING_S + _S_PER_TOKEN * asked.tokens * asked.count
        output, used = self.run_tool(command, environment, self.plan.cores, deadline_s)
        ours.run.used(used)
        return output


def compared(own: Mapping[str, Any], said: Said) -> Facts:
    """Ours beside theirs, and the ratio."""
    theirs = {"perplexity": said.perplexity, "kl": said.kl, "same_top": said.same_top}
    return {
        name: {"ours": own[name], "llama_perplexity": value, "ratio": own[name] / value if value else None}
        for name, value in theirs.items()
        if value is not None and own.get(name) is not None
    }


def missed(found: Mapping[str, Any]) -> list[str]:
    """What is farther from llama-perplexity than the bars allow, as lines for people."""
    lines = []
    for model, tasks in found["against_llama_perplexity"]["models"].items():
        for task, figures in tasks.items():
            for name, bar in (("perplexity", PERPLEXITY_BAR), ("kl", KL_BAR)):
                pair = figures.get(name)
                if pair is None or (name == "kl" and pair["llama_perplexity"] < KL_LEAST):
                    continue
                if pair["ratio"] is None or not abs(pair["ratio"] - 1) <= bar:
                    words = f"{pair['ours']:.6g} for {pair['llama_perplexity']:.6g}"
                    lines.append(f"{name} of {model} on {task} is not within {100 * bar:g} % of {TOOL}'s: {words}")
    return lines


def _check_disk(folder: Path, wanted_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted_bytes:
        raise MeasureFailed(
            f"{TOOL} keeps the reference model's probabilities in a file of {wanted_bytes >> 20} MiB, "
            f"and {free >> 20} are free in the cache folder: fewer --windows make it smaller"
        )
