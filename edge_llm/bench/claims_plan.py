"""Which commands `edge-llm bench claims` runs, how long they take, and what is left out on a small board. Pure.

Owns the steps: a command, the kind of record that it leaves, a smaller run of it, minutes of both on the machine that
the project's own records are from, and what it needs of a machine. Refuses to know claims' bars and how a command runs.

Order is that of importance: exactness first. With a budget every step is planned small first, in that order while it
fits, and then made whole, in that order while that fits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from edge_llm.bench.record import Record

QUICK: Final = "--quick"


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides which steps can run. `has_tools`: llama.cpp's own are built."""

    cores: int
    has_tools: bool


@dataclass(frozen=True, slots=True)
class Step:
    """One command. `small`: what is added for a smaller run. `model`: its option for a model; empty: it has none.

    `config`: which records of this kind are its. `full`: a record is of a full run when its config has at least these.
    `parts`: the member of the figures whose own members may come of several runs. `without_tools`: what is added where
    llama.cpp's tools are not built; None: it cannot run without them. `is_of_model`: figures of a real model only.
    """

    name: str
    arguments: tuple[str, ...]
    minutes: float
    small: tuple[str, ...] = (QUICK,)
    small_minutes: float = 2.0
    kind: str = ""
    model: str = "--model"
    cores: int = 1
    config: Mapping[str, str] = field(default_factory=dict)
    full: Mapping[str, float] = field(default_factory=dict)
    parts: str = ""
    without_tools: tuple[str, ...] | None = ()
    is_of_model: bool = True

    @property
    def command_words(self) -> str:
        return " ".join(("edge-llm", *self.arguments))

    def left(self, record: Record) -> bool:
        """Whether a record is one that this step leaves."""
        if record.kind != (self.kind or self.name) or (self.is_of_model and not record.models):
            return False
        return all(str(record.config.get(name, wanted)) == wanted for name, wanted in self.config.items())

    def is_quick(self, record: Record) -> bool:
        config: Mapping[str, Any] = record.config
        return QUICK in record.command or any(config.get(name, least) < least for name, least in self.full.items())


STEPS: Final[Mapping[str, Step]] = {
    step.name: step
    for step in (
        Step("verify", ("verify",), 6, small_minutes=2),
        Step("theorem", ("bench", "theorem"), 28, ("--prompts", "24"), 4, full={"prompts": 200}),
        Step("turns", ("bench", "turns"), 3, small_minutes=1, cores=2),
        Step(
            "faults-model",
            ("bench", "faults", "--engine", "llama", "--per-kind", "1"),
            18,
            (
                *("--kinds", "kill_decode_middle", "--kinds", "kill_prefill_transfer"),
                *("--kinds", "flip_transfer", "--kinds", "drain_decode"),
            ),
            2,
            kind="faults",
            config={"engine": "llama"},
            parts="per_kind",
        ),
        Step("handoff", ("bench", "handoff"), 25, small_minutes=6, cores=2, without_tools=("--no-llama-server",)),
        Step(
            "faults",
            ("bench", "faults"),
            42,
            ("--per-kind", "1"),
            4,
            model="",
            config={"engine": "simulated"},
            full={"per_kind": 20},
            parts="per_kind",
            is_of_model=False,
        ),
        Step("gateway", ("bench", "gateway"), 2, small_minutes=1.5, model="", cores=2, is_of_model=False),
        Step("cluster", ("bench", "cluster"), 8, small_minutes=2, model="--models", cores=2),
        Step("overload", ("bench", "overload"), 4, small_minutes=1, model="", is_of_model=False),
        Step("pools", ("bench", "pools"), 4, small_minutes=0.5, model="", is_of_model=False),
        Step("engine", ("bench", "engine"), 17, small_minutes=7, model="--models", parts="models", without_tools=None),
        Step(
            "goodput",
            ("bench", "goodput"),
            80,
            ("--budget-minutes", "34"),
            34,
            cores=2,
            config={"engine": "llama"},
            parts="traces",
            without_tools=("--no-llama-server",),
        ),
        Step(
            "goodput-simulated",
            ("bench", "goodput", "--engine", "simulated", "--budget-minutes", "40"),
            40,
            ("--budget-minutes", "20"),
            20,
            kind="goodput",
            model="",
            cores=2,
            config={"engine": "simulated", "prompt_tokens_per_s": "250.0", "step_s": "0.03", "row_s": "0.003"},
            parts="traces",
            is_of_model=False,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Planned:
    """A step to run, or why not."""

    step: Step
    is_small: bool = False
    why_not: str = ""

    @property
    def minutes(self) -> float:
        return 0.0 if self.why_not else self.step.small_minutes if self.is_small else self.step.minutes

    def arguments(
        self, machine: Machine, model: str | None = None, more: Mapping[str, Sequence[str]] | None = None
    ) -> tuple[str, ...]:
        """Of `edge-llm`. `more`: by step, where it is to be run."""
        step = self.step
        return (
            *step.arguments,
            *(step.small if self.is_small else ()),
            *((step.model, model) if model and step.model else ()),
            *((step.without_tools or ()) if not machine.has_tools else ()),
            *(more or {}).get(step.name, ()),
        )


def planned(
    wanted: Collection[str], machine: Machine, budget_minutes: float | None = None, is_quick: bool = False
) -> list[Planned]:
    """The steps of these names, in order. `is_quick`: all of them small."""
    steps = [step for step in STEPS.values() if step.name in wanted]
    reasons = {step.name: cannot(step, machine) for step in steps}
    able = [step for step in steps if not reasons[step.name]]
    if budget_minutes is None:
        small, whole = {step.name for step in able}, set() if is_quick else {step.name for step in able}
    else:
        small, whole = _fitting(able, budget_minutes, is_quick)
    left_out = f"left out: more than the {budget_minutes or 0:g} minutes of --budget-minutes"
    return [
        Planned(step, step.name not in whole, reasons[step.name] or ("" if step.name in small else left_out))
        for step in steps
    ]


def fitted(one: Planned, later: Sequence[Planned], left_minutes: float, pace: float) -> Planned:
    """The step as it still fits before the end of the budget, which has so many minutes left: whole, small or not at
    all. `pace`: how many times longer than planned steps take here. Later ones keep the time for their small runs."""
    if one.why_not:
        return one
    kept_minutes = pace * sum(other.step.small_minutes for other in later if not other.why_not)
    if not one.is_small and pace * one.step.minutes + kept_minutes <= left_minutes:
        return one
    if pace * one.step.small_minutes <= left_minutes:
        return replace(one, is_small=True)
    return replace(one, why_not=f"left out: {max(0.0, left_minutes):.1f} minutes of the budget were left")


def cannot(step: Step, machine: Machine) -> str:
    """Why this machine cannot run it; empty: it can."""
    if machine.cores < step.cores:
        return f"it needs {step.cores} cores, and this process may use {machine.cores}"
    if step.without_tools is None and not machine.has_tools:
        return "llama.cpp's own tools are not built here: `edge-llm bench reference-tools`"
    return ""


def _fitting(steps: Sequence[Step], budget_minutes: float, is_quick: bool) -> tuple[set[str], set[str]]:
    """Names of those that run, and of those that run whole."""
    left = budget_minutes
    small, whole = set(), set()
    for step in steps:
        if step.small_minutes <= left:
            small.add(step.name)
            left -= step.small_minutes
    for step in steps if not is_quick else ():
        if step.name in small and step.minutes - step.small_minutes <= left:
            whole.add(step.name)
            left -= step.minutes - step.small_minutes
    return small, whole
