"""Two nodes under recorded traffic and limits of latency, in simulated time: split, local, and auto that knows them.

The planner is the one that the gateway runs, traces, limits and goodput are those of `bench goodput`; workers do what
engine/pacing.py says (one step of all streams, then a piece of a prompt as long as those leave room for), at the rates
of a small model on one core. So a run is the same every time, and right and wrong decisions differ by what they cost.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

import pytest
from msgspec import structs

import edge_llm.bench
from edge_llm.bench.goodput import (
    GOALS,
    REGIMES,
    STRICT_TPOT,
    STRICT_TTFT,
    Goodput,
    Limits,
    Point,
    Timing,
    Unloaded,
    goodput,
)
from edge_llm.bench.traces import Row, Trace, parse, scaled, thinned
from edge_llm.cluster.cost import NodeCost
from edge_llm.cluster.slo import Slo
from edge_llm.cluster.view import ClusterView, Node
from edge_llm.engine.pacing import Pace, room_s, whole_rows
from edge_llm.errors import Overloaded
from edge_llm.gateway.planner import Planner
from edge_llm.gateway.running import Job, Running
from edge_llm.gateway.scheduler import Plan
from edge_llm.gateway.session import Event, Session
from edge_llm.gateway.situation import Mode
from edge_llm.request import SamplingParams
from edge_llm.worker.messages import Rates, Role
from tests.nodes import PACED, load_of, node_of

# of SmolLM2-135M in Q4_0 on one core of an x86-64 machine, as two workers published them beside each other
RATES: Final = structs.replace(PACED, run_s=0.0095, row_s=0.0072, cell_s=3e-6, call_s=0.007, token_s=0.0033)
# of workers that hear of no limits: what runs beside a prompt bears all of it
HARD: Final = structs.replace(RATES, of_limit=0.0, least_prompt_steps=0.0)
N_CTX, SECONDS = 2048, 300.0
# requests per second: two such nodes serve about 1.2 of the conversation, 0.6 of the code
RATES_PER_S: Final = {"conv": (0.15, 0.3, 0.45, 0.6, 0.75, 0.9), "code": (0.05, 0.1, 0.2, 0.3, 0.45, 0.6)}
ROLES: Final[dict[Mode, tuple[Role, Role]]] = {
    "split": ("prefill", "decode"),
    "local": ("mixed", "mixed"),
    "auto": ("mixed", "mixed"),
}


@cache
def trace_of(name: str) -> Trace:
    path = Path(edge_llm.bench.__file__).parent / "data" / f"azure_2023_{name}.csv"
    return scaled(parse(path.read_text(), name).beginning(600.0), 0.25, N_CTX)[0]


def limits_of(name: str, regime: str, rates: Rates = RATES) -> Limits:
    prompt = trace_of(name).prompt_percentile(0.9)
    cost = NodeCost.of(_node("m", "mixed", rates).status)
    alone = Unloaded(cost.prefill_s(prompt) + cost.step_s(1, prompt), cost.step_s(1, prompt))
    return next(one.limits(alone) for one in REGIMES if one.name == regime)


@dataclass(slots=True)
class Served:
    """One request and what became of it."""

    row: Row
    running: Running
    plan: Plan | None = None
    read: int = 0
    made: int = 0
    first_s: float | None = None
    last_s: float | None = None

    @property
    def timing(self) -> Timing:
        if self.first_s is None or self.last_s is None:
            return Timing(None, None, is_complete=False)
        gaps = max(1, self.row.answer_tokens - 1)
        return Timing(self.first_s - self.row.at_s, (self.last_s - self.first_s) / gaps, is_complete=True)


@dataclass(slots=True)
class Machine:
    """One worker. It is in the middle of a turn until `until_s`: `step` makes a token each, then a piece is read."""

    cost: NodeCost
    prompts: deque[Served] = field(default_factory=deque)
    streams: list[Served] = field(default_factory=list)
    until_s: float | None = None
    step: list[Served] = field(default_factory=list)
    step_s: float = 0.0
    piece: int = 0

    skipped: int = 0

    def begin(self, now_s: float) -> None:
        self.step = list(self.streams)
        cells = sum(one.row.prompt_tokens + one.made for one in self.step)
        step_s = self.cost.step_s(len(self.step), cells)
        self.step_s, self.piece = now_s + step_s, 0
        took_s = step_s
        if self.prompts:
            reading = self.prompts[0]
            self.piece = min(reading.row.prompt_tokens - 1 - reading.read, self._room(step_s))
            took_s += self.cost.prefill_s(self.piece, reading.read)
        self.until_s = now_s + took_s if self.step or self.prompts else None

    def _room(self, step_s: float) -> int:
        """Tokens of a prompt before the next step, as engine/sequencer.py asks for them."""
        if not self.step:
            return self.cost.chunk_tokens
        rates, paces = self.cost.rates, list[Pace]()
        for one in self.step:
            limit_s, age_s = one.running.job.slo.tpot_s, self.step_s - (one.first_s or self.step_s)
            left = one.row.answer_tokens - one.made - 1
            if left:
                paces.append(Pace(limit_s if rates.of_limit else None, one.made + 1, age_s, left))
        room = room_s(step_s, paces, self.skipped)
        self.skipped = 0 if room else self.skipped + 1
        return min(self.cost.chunk_tokens, whole_rows((room - rates.call_s) / rates.token_s)) if room else 0


class Simulation:
    """The beginning of a trace at one rate, on pairs of nodes."""

    def __init__(self, name: str, rate_per_s: float, mode: Mode, slo: Slo, rates: Rates, pairs: int = 1) -> None:
        self.now_s, self._mode, self._slo = 0.0, mode, slo
        self.planner = Planner(clock=lambda: self.now_s)
        nodes = [_node(f"n{number}", role, rates) for number, role in enumerate(ROLES[mode] * pairs)]
        self.view = ClusterView(tuple(nodes))
        self.machines = {node.worker: Machine(NodeCost.of(node.status)) for node in nodes}
        self.waiting: list[Served] = []
        self.all: list[Served] = []
        self._run(deque(thinned(trace_of(name), round(rate_per_s * SECONDS), SECONDS, seed=0)))

    def _run(self, coming: deque[Row]) -> None:
        next_look_s = 0.0
        while coming or self.waiting or any(machine.until_s is not None for machine in self.machines.values()):
            ends = [machine.until_s for machine in self.machines.values() if machine.until_s is not None]
            self.now_s = min([*ends, *([coming[0].at_s] if coming else []), *([next_look_s] if self.waiting else [])])
            is_moved = False
            if self.now_s >= next_look_s:
                self.planner.on_view(self.view)
                next_look_s, is_moved = self.now_s + 1.0, True
            while coming and coming[0].at_s <= self.now_s:
                self._arrive(coming.popleft())
                is_moved = True
            for machine in self.machines.values():
                if machine.until_s is not None and machine.until_s <= self.now_s:
                    is_moved |= self._end_turn(machine)
            if is_moved:
                self._plan_all()
            for machine in self.machines.values():
                if machine.until_s is None or machine.until_s <= self.now_s:
                    machine.begin(self.now_s)
            assert self.now_s < 10 * SECONDS, "the cluster never catches up"

    def _arrive(self, row: Row) -> None:
        name = f"r{len(self.all)}"
        job = Job(
            name, "m", (0,) * row.prompt_tokens, row.answer_tokens, SamplingParams(), (), (), self._mode,
            cache_prompt=False, slo=self._slo,
        )  # fmt: skip
        served = Served(row, Running(job, Session(name), self.now_s, self.now_s))
        self.all.append(served)
        self.waiting.append(served)

    def _plan_all(self) -> None:
        for served in list(self.waiting):
            try:
                served.plan = self.planner.plan(served.running, self.view, len(self.waiting) - 1)
            except Overloaded:
                continue
            self.waiting.remove(served)
            served.running.plan = served.plan
            served.running.session.on(Event.PLANNED)
            self.machines[served.plan.reader.worker].prompts.append(served)

    def _end_turn(self, machine: Machine) -> bool:
        """Whether something has become free."""
        is_moved = False
        for served in machine.step:
            served.made += 1
            served.running.session.delivered.append(0)
            if served.first_s is None:
                served.first_s = served.running.first_token_s = machine.step_s
            if served.made == served.row.answer_tokens:
                served.last_s = served.running.last_token_s = machine.step_s
                served.running.session.on(Event.FINISHED)
                served.running.session.finish_reason = "length"
                self.planner.over(served.running)
                machine.streams.remove(served)
                is_moved = True
        if machine.prompts:
            reading = machine.prompts[0]
            reading.read += machine.piece
            self.planner.progressed(reading.running, reading.read)
            if reading.read == reading.row.prompt_tokens - 1:
                machine.prompts.popleft()
                assert reading.plan is not None
                reading.running.session.on(Event.PROMPTED)
                self.planner.prompted(reading.running)
                self.machines[reading.plan.decode.worker].streams.append(reading)
                is_moved = True
        return is_moved

    # -- results

    def point(self, rate_per_s: float, limits: Limits) -> Point:
        return Point(rate_per_s, tuple(served.timing.meets(limits) for served in self.all))

    @property
    def split_share(self) -> float:
        return sum(served.plan is not None and served.plan.mode == "split" for served in self.all) / len(self.all)


def _node(worker: str, role: Role, rates: Rates = RATES) -> Node:
    return node_of(
        worker, role, n_ctx=N_CTX, chunk_tokens=128, slots=2 if role == "prefill" else 8, load=load_of(rates=rates)
    )


@cache
def ran(name: str, rate_per_s: float, mode: Mode, slo: Slo, rates: Rates = RATES, pairs: int = 1) -> Simulation:
    return Simulation(name, rate_per_s, mode, slo, rates, pairs)


def curve(name: str, mode: Mode, regime: str, *, is_told: bool) -> list[Point]:
    limits = limits_of(name, regime)
    slo = Slo(limits.ttft_s, limits.tpot_s) if is_told else Slo()
    return [ran(name, rate, mode, slo).point(rate, limits) for rate in RATES_PER_S[name]]


def goodput_of(name: str, mode: Mode, regime: str, *, is_told: bool) -> Goodput:
    return goodput(curve(name, mode, regime, is_told=is_told), GOALS[0])


@pytest.mark.parametrize("regime", [regime.name for regime in REGIMES])
@pytest.mark.parametrize("name", RATES_PER_S)
def test_auto_that_knows_the_limits_is_within_5_percent_of_the_better_of_split_and_local(
    name: str, regime: str
) -> None:
    split, local, auto = (goodput_of(name, mode, regime, is_told=mode == "auto") for mode in ROLES)
    assert {one.bound for one in (split, local, auto)} == {"between"}, "the rates decide nothing"
    assert curve(name, "split", regime, is_told=False) != curve(name, "local", regime, is_told=False)
    assert auto.rate_per_s >= 0.95 * max(split.rate_per_s, local.rate_per_s)


@pytest.mark.parametrize("regime", [regime.name for regime in REGIMES])
def test_it_matters_whether_code_is_split_or_local(regime: str) -> None:
    """Of the conversation both serve about as much, for other reasons."""
    split, local = (goodput_of("code", mode, regime, is_told=False) for mode in ("split", "local"))
    assert not 0.9 <= split.rate_per_s / local.rate_per_s <= 1 / 0.9


@pytest.mark.parametrize("name", RATES_PER_S)
def test_prompts_are_read_elsewhere_far_more_often_where_streams_cannot_bear_them(name: str) -> None:
    limits = limits_of(name, STRICT_TPOT.name)
    rate = RATES_PER_S[name][2]
    told = ran(name, rate, "auto", Slo(limits.ttft_s, limits.tpot_s), HARD)
    assert told.split_share > 2 * ran(name, rate, "auto", Slo(), HARD).split_share


@pytest.mark.parametrize("name", RATES_PER_S)
def test_where_workers_leave_room_for_limits_prompts_are_read_beside_streams_and_more_is_served(name: str) -> None:
    split, local, auto = (goodput_of(name, mode, STRICT_TPOT.name, is_told=mode == "auto") for mode in ROLES)
    assert auto.rate_per_s > 1.1 * max(split.rate_per_s, local.rate_per_s)
    limits, rate = limits_of(name, STRICT_TPOT.name), RATES_PER_S[name][2]
    slo = Slo(limits.ttft_s, limits.tpot_s)
    assert ran(name, rate, "auto", slo).split_share < ran(name, rate, "auto", slo, HARD).split_share


@pytest.mark.parametrize("name", RATES_PER_S)
def test_limits_that_leave_no_time_to_queue_but_bear_prompts_beside_streams_make_both_nodes_read(name: str) -> None:
    strict, loose = limits_of(name, STRICT_TTFT.name), limits_of(name, STRICT_TPOT.name)
    rate = RATES_PER_S[name][2]
    both = ran(name, rate, "auto", Slo(strict.ttft_s, strict.tpot_s), HARD)
    one = ran(name, rate, "auto", Slo(loose.ttft_s, loose.tpot_s), HARD)
    assert both.split_share < one.split_share
