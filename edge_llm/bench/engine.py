"""`edge-llm bench engine`: our engine beside llama.cpp's own tools of the same source, on one core, in one run.

Owns what is compared and in which order. Each repetition measures both sides one after the other, in alternating
order, and gives one ratio; a figure is the median of the ratios, so what slows the machine for a minute slows both.
Every measurement has a process of its own on both sides: where its pages happen to lie makes a process faster or slower
than the next one for as long as it lives, on some machines by a quarter. Decode feels it most, so it is compared in
`AGAIN` more pairs of processes each time.
Ours is measured through the real sequencer with sampling and text (edge_llm/engine/measure.py). Theirs is
llama-bench and llama-batched-bench twice: with the same kernel settings (the bar), and as llama.cpp ships (the price
of exactness, `default_*`). Refuses to know llama.cpp: everything runs in child processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final, Literal

from edge_llm.bench.llama_tools import (
    PASSES,
    Kernels,
    batched_command,
    bench_command,
    parse_batched,
    parse_bench,
    parse_decode,
)
from edge_llm.bench.processes import MeasureFailed, Measurer, run_tool
from edge_llm.bench.record import ModelFacts
from edge_llm.bench.reference_tools import ToolTree, Tree
from edge_llm.bench.run import Run
from edge_llm.bench.stats import median, ratios
from edge_llm.errors import EdgeLLMError

MEASURE: Final = "edge_llm.engine.measure"
RATIO_BAR: Final = 0.97
SAMPLER_BAR: Final = 0.03
# The vocabulary that a sampler's share is asked for: Qwen's, the largest among the families in models.yaml.
WIDE_VOCABULARY: Final = 151_936
_HOLE: Final = 4
_DRAWS: Final = 50
_WARM_TOKENS: Final = 16
AGAIN: Final = 2
_AS_SHIPPED: Final = ("llama-bench, default", "llama-batched-bench, default")
_SIZES: Final = ("prefill", "decode", "batch4", "batch8")
_SHARES: Final = ("sampler_share_greedy", "sampler_share_full")
RATIOS: Final = (*(f"{size}_ratio" for size in _SIZES), "batch8_hole_ratio")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. Depths and sizes are llama-bench's usual ones. Every context has as few cells as its test needs:
    llama-bench takes no more, and V is read in strides of them, so that more cells slow down both sides."""

    core: int
    repetitions: int
    prompt_tokens: int = 512
    decode_tokens: int = 64
    batch_prompt_tokens: int = 32
    deadline_s: float = 900.0
    slots: int = 8

    @property
    def prefill_cells(self) -> int:
        return _cells(self.prompt_tokens + 1)

    @property
    def decode_cells(self) -> int:
        """Per sequence, alone and in batches."""
        return _cells(self.batch_prompt_tokens + self.decode_tokens + 2)


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A model file and what the record says about it."""

    path: Path
    facts: ModelFacts


def measure_models(
    plan: Plan, models: Sequence[BenchModel], trees: Mapping[Tree, ToolTree], run: Run, progress: Progress
) -> dict[str, Any]:
    """Figures of all models: the worst of each key, and per model. Fills `run` as it goes."""
    for tree, built in trees.items():
        run.engine(f"llama.cpp tools, tree {tree}", built.facts)
    run.workload |= asdict(plan)
    for number, model in enumerate(models):
        run.models.append(model.facts)
        try:
            _measure_model(plan, model, trees, run, _within(progress, number, len(models)))
        except (EdgeLLMError, OSError) as error:
            run.fail(f"engine on {model.facts.name}", str(error))
    return figures(run, [model.facts.name for model in models])


def figures(run: Run, names: Sequence[str]) -> dict[str, Any]:
    """Ratios of a run, from its samples alone. The top level is the worst model's."""
    per_model = {name: _model_figures(run, name) for name in names}
    keys = sorted({key for values in per_model.values() for key in values if key.endswith("_ratio")})
    worst = {key: min(values[key] for values in per_model.values() if key in values) for key in keys}
    shares = {
        key: max(values[key] for values in per_model.values() if key in values)
        for key in sorted({key for values in per_model.values() for key in values if key.startswith("sampler_")})
    }
    return {**worst, **shares, "models": per_model}


def missed(found: Mapping[str, Any]) -> list[str]:
    """Which bars were not met, as lines for people."""
    lines = [
        f"{key} is {found[key]:.3f}, below {RATIO_BAR}" if key in found else f"{key} was not measured"
        for key in RATIOS
        if not found.get(key, 0.0) >= RATIO_BAR
    ]
    lines += [
        f"{key} is {found[key]:.4f}, above {SAMPLER_BAR}" if key in found else f"{key} was not measured"
        for key in _SHARES
        if not found.get(key, 1.0) <= SAMPLER_BAR
    ]
    return lines


def _within(progress: Progress, number: int, count: int) -> Progress:
    """Progress of one model as a part of the whole."""
    return lambda what, done, total: progress(what, number * total + done, count * total)


def _measure_model(plan: Plan, model: BenchModel, trees: Mapping[Tree, ToolTree], run: Run, progress: Progress) -> None:
    name = model.facts.name
    progress(f"{name}: loading", 0, 1)
    with _ours(plan, model, "decode", run) as decode:
        is_repacked = decode.facts["build"]["repacked_tensors"] != "0"
        run.engine(f"edge_llm on {name}", decode.facts["build"])
    turns, broken = _turns(plan, model, trees, run, is_repacked), set[str]()
    total = plan.repetitions * len(turns)
    for repetition in range(plan.repetitions):
        # forth and back: neither side is always the one that comes second
        for number, (what, turn) in enumerate(turns if repetition % 2 == 0 else turns[::-1]):
            progress(f"{name}: {what}", repetition * len(turns) + number, total)
            if what in broken:
                continue
            try:
                with run.one_case(what, model=name, repetition=repetition):
                    turn()
            except MeasureFailed as error:
                if what not in _AS_SHIPPED:
                    raise
                broken.add(what)  # the price of exactness is then not known; the bars are
                run.fail(f"{what} on {name}", str(error))


@contextmanager
def _ours(plan: Plan, model: BenchModel, phase: Literal["prefill", "decode"], run: Run) -> Iterator[Measurer]:
    """Our engine in a process of its own, with the cells of one phase's tests."""
    cells, slots = (plan.prefill_cells, 1) if phase == "prefill" else (plan.decode_cells, plan.slots)
    arguments = ["--model", str(model.path), "--n-ctx", str(cells), "--slots", str(slots)]
    with Measurer(f"engine {model.facts.name}, {phase}", MEASURE, arguments, [plan.core]) as ours:
        yield ours
        run.used(ours.usage())


def _turns(
    plan: Plan, model: BenchModel, trees: Mapping[Tree, ToolTree], run: Run, is_repacked: bool
) -> list[tuple[str, Callable[[], None]]]:
    """One repetition: each of ours between the tools it is compared with."""
    same, default = Kernels(False, is_repacked), Kernels(True, is_repacked)
    rows: list[tuple[str, Callable[[], None]]] = [
        ("llama-bench, same kernels, decode again", lambda: _llama_decode(plan, model, trees["ours"], same, run)),
        ("ours, one row again", lambda: _ours_decode(plan, model, run)),
    ]
    batches: list[tuple[str, Callable[[], None]]] = [
        ("llama-batched-bench, same kernels", lambda: _llama_batched(plan, model, trees["ours"], same, run)),
        ("ours, batches", lambda: _ours_batched(plan, model, run)),
    ]
    turns: list[tuple[str, Callable[[], None]]] = [
        ("llama-bench, same kernels", lambda: _llama_bench(plan, model, trees["ours"], same, run)),
        ("ours, one sequence", lambda: _ours_alone(plan, model, run)),
        *rows * AGAIN,
        *batches * 2,
    ]
    if "default" in trees:
        tree = trees["default"]
        turns.insert(2, (_AS_SHIPPED[0], lambda: _llama_bench(plan, model, tree, default, run)))
        turns.append((_AS_SHIPPED[1], lambda: _llama_batched(plan, model, tree, default, run)))
    return turns


def _cells(tokens: int) -> int:
    """llama.cpp rounds the cells of a sequence up to multiples of 256 (llama_context's constructor)."""
    return -(-tokens // 256) * 256


def _side(kernels: Kernels) -> str:
    return "default" if kernels.is_default else "llama.cpp"


def _llama_bench(plan: Plan, model: BenchModel, tree: ToolTree, kernels: Kernels, run: Run) -> None:
    command = bench_command(tree.tool("llama-bench"), model.path, kernels, plan.prompt_tokens, plan.decode_tokens)
    output, used = run_tool(command, kernels.environment, [plan.core], plan.deadline_s)
    run.used(used)
    prefill, decode = parse_bench(output, kernels)
    run.add(f"{model.facts.name}: {_side(kernels)}: prefill_tokens_per_s", prefill)
    run.add(f"{model.facts.name}: {_side(kernels)}: decode_tokens_per_s", decode)


def _llama_decode(plan: Plan, model: BenchModel, tree: ToolTree, kernels: Kernels, run: Run) -> None:
    command = bench_command(tree.tool("llama-bench"), model.path, kernels, 0, plan.decode_tokens)
    output, used = run_tool(command, kernels.environment, [plan.core], plan.deadline_s)
    run.used(used)
    run.add(f"{model.facts.name}: {_side(kernels)}: decode_tokens_per_s", parse_decode(output, kernels))


def _llama_batched(plan: Plan, model: BenchModel, tree: ToolTree, kernels: Kernels, run: Run) -> None:
    rows = [4, 8]
    tool = tree.tool("llama-batched-bench")
    command = batched_command(
        tool, model.path, kernels, rows, plan.batch_prompt_tokens, plan.decode_tokens, plan.decode_cells
    )
    output, used = run_tool(command, kernels.environment, [plan.core], plan.deadline_s)
    run.used(used)
    for line in parse_batched(output, kernels, rows):
        run.add(f"{model.facts.name}: {_side(kernels)}: batch{line.rows}_tokens_per_s", line.decode_tokens_per_s)


def _ours_alone(plan: Plan, model: BenchModel, run: Run) -> None:
    name = model.facts.name
    with _ours(plan, model, "prefill", run) as ours:
        for size, is_served in (("prefill", True), ("prefill_local", False)):
            answer = ours.ask("prefill", plan.deadline_s, tokens=plan.prompt_tokens, is_served=is_served)
            run.add(f"{name}: ours: {size}_tokens_per_s", answer["tokens_per_s"])
    with _ours(plan, model, "decode", run) as ours:
        step_s = _decode_alone(plan, name, ours, run)
        # over this model's own step: a model with so wide a vocabulary has a longer one, so the share is an upper bound
        drawn = ours.ask("sampler", plan.deadline_s, vocab_size=WIDE_VOCABULARY, repeats=_DRAWS)
        for share in _SHARES:
            run.add(f"{name}: {share}", drawn[f"{share.removeprefix('sampler_share_')}_s"] / step_s)


def _ours_decode(plan: Plan, model: BenchModel, run: Run) -> None:
    with _ours(plan, model, "decode", run) as ours:
        _decode_alone(plan, model.facts.name, ours, run)


def _decode_alone(plan: Plan, name: str, ours: Measurer, run: Run) -> float:
    """One row, as llama-bench does: a first pass that does not count, and a token before it looks at the clock. Gives
    the seconds of a step."""
    ours.ask("decode", plan.deadline_s, rows=1, prompt_tokens=0, tokens=_WARM_TOKENS)
    passes = [
        ours.ask("decode", plan.deadline_s, rows=1, prompt_tokens=0, tokens=plan.decode_tokens, warm_steps=1)
        for _ in range(PASSES)
    ]
    run.add(f"{name}: ours: decode_tokens_per_s", fmean(answer["tokens_per_s"] for answer in passes))
    return float(passes[-1]["step_s"])


def _ours_batched(plan: Plan, model: BenchModel, run: Run) -> None:
    with _ours(plan, model, "decode", run) as ours:
        for size, rows, holes in (("batch4", 4, []), ("batch8", 8, []), ("batch8_hole", 8, [_HOLE])):
            answer = ours.ask(
                "decode",
                plan.deadline_s,
                rows=rows,
                prompt_tokens=plan.batch_prompt_tokens,
                tokens=plan.decode_tokens,
                holes=holes,
            )
            run.add(f"{model.facts.name}: ours: {size}_tokens_per_s", answer["tokens_per_s"])


def _model_figures(run: Run, name: str) -> dict[str, float]:
    """Medians of paired ratios, and of tokens per second. A side that was not measured makes no figure."""

    def samples(side: str, size: str) -> list[float]:
        return run.samples.get(f"{name}: {side}: {size}_tokens_per_s", [])

    def compared(key: str, ours: list[float], theirs: list[float], factor: float = 1.0) -> None:
        pairs = min(len(ours), len(theirs))  # an interrupted run may lack the last of one side
        if pairs:
            found[f"{key}_ratio"] = factor * median(ratios(ours[:pairs], theirs[:pairs]))

    found: dict[str, float] = {}
    for size in _SIZES:
        compared(size, samples("ours", size), samples("llama.cpp", size))
        if samples("ours", size):
            found[f"{size}_tokens_per_s"] = median(samples("ours", size))
            if samples("default", size):  # measured less often: no pairs
                found[f"default_{size}_ratio"] = found[f"{size}_tokens_per_s"] / median(samples("default", size))
    compared("prefill_local", samples("ours", "prefill_local"), samples("llama.cpp", "prefill"))
    # seven sequences: seven eighths of the tokens of eight are no loss
    compared("batch8_hole", samples("ours", "batch8_hole"), samples("llama.cpp", "batch8"), 8 / 7)
    compared("batch8_hole_of_batch8", samples("ours", "batch8_hole"), samples("ours", "batch8"))
    for key in _SHARES:
        if f"{name}: {key}" in run.samples:
            found[key] = median(run.samples[f"{name}: {key}"])
    return found
