"""Eight workers under a trace that turns from conversation to code and back, in simulated time.

The planner is the one that the gateway runs; workers are the arithmetic of their rates, so that a run is the same every
time. Conversation: prompts of about 1,020 tokens and answers of 129; code: 1,469 and 13 (medians of the Azure traces,
papers.md 2.2).
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from functools import cache
from typing import Final

import pytest

from edge_llm.cluster.cost import NodeCost
from edge_llm.cluster.view import ClusterView, Node
from edge_llm.config import PolicyName
from edge_llm.errors import Overloaded
from edge_llm.gateway.planner import Planner
from edge_llm.gateway.policies import policy_of
from edge_llm.gateway.running import Job, Running
from edge_llm.gateway.scheduler import Plan
from edge_llm.gateway.session import Event, Session
from edge_llm.request import SamplingParams
from edge_llm.worker.messages import Rates
from tests.nodes import load_of, node_of

TICK_S: Final = 0.025
# 500 tokens/s of prompt; 8 streams get a token every 110 ms, and prompts 1.5 steps of time between two of them
RATES: Final = Rates(run_s=0.030, row_s=0.010, token_s=0.002, prompt_steps=1.5)
SHARE: Final = RATES.prompt_steps / (1 + RATES.prompt_steps)
# (until, requests per second, median prompt, median answer)
TRACE: Final = ((100.0, 1.1, 1020, 129), (280.0, 2.0, 1469, 13), (460.0, 1.1, 1020, 129))


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    prompt_tokens: int
    answer_tokens: int


def arrivals(seed: int = 7) -> list[Arrival]:
    rng, now_s, made = random.Random(seed), 0.0, list[Arrival]()
    for until_s, rate, prompt, answer in TRACE:
        while (now_s := now_s + rng.expovariate(rate)) < until_s:
            spread = rng.lognormvariate(0.0, 0.5)
            made.append(
                Arrival(now_s, min(3000, int(prompt * spread)), max(1, int(answer * rng.lognormvariate(0, 0.5))))
            )
        now_s = until_s
    return made


@dataclass(slots=True)
class Served:
    """One request and what became of it."""

    arrival: Arrival
    running: Running
    plan: Plan | None = None
    planned_s: float = 0.0
    first_s: float | None = None
    ended_s: float | None = None
    read_s: float = 0.0  # prompt work done
    progress: float = 0.0  # tokens made, with fractions


@dataclass(slots=True)
class Machine:
    """One worker: prompts one after the other, streams together, both when there are both."""

    node: Node
    prompts: deque[Served] = field(default_factory=deque)
    streams: list[Served] = field(default_factory=list)

    @property
    def cost(self) -> NodeCost:
        return NodeCost.of(self.node.status)


class Simulation:
    """The trace on one planner."""

    def __init__(self, policy: PolicyName, seed: int = 7) -> None:
        self.now_s = 0.0
        self.planner = Planner(policy_of(policy, seed), clock=lambda: self.now_s)
        nodes = [_node(f"p{at}", "prefill") for at in range(4)] + [_node(f"d{at}", "decode") for at in range(4)]
        self.machines = {node.worker: Machine(node) for node in nodes}
        self.view = ClusterView(tuple(nodes))
        self.waiting: deque[Served] = deque()
        self.all: list[Served] = []
        self.run(deque(arrivals(seed)))

    def run(self, coming: deque[Arrival]) -> None:
        next_look_s = 0.0
        while coming or self.waiting or any(m.prompts or m.streams for m in self.machines.values()):
            if self.now_s >= next_look_s:
                self.planner.on_view(self.view)
                next_look_s += 1.0
            while coming and coming[0].at_s <= self.now_s:
                self._arrive(coming.popleft())
            self._plan_all()
            for machine in self.machines.values():
                self._work(machine)
            self.now_s += TICK_S
            assert self.now_s < 900, "the cluster never catches up"

    def _arrive(self, arrival: Arrival) -> None:
        request_id = f"r{len(self.all)}"
        ids = tuple(len(self.all) * 4001 + at for at in range(arrival.prompt_tokens))
        job = Job(request_id, "m", ids, 256, SamplingParams(), (), (), "auto")
        served = Served(arrival, Running(job, Session(request_id), self.now_s, self.now_s))
        self.all.append(served)
        self.waiting.append(served)

    def _plan_all(self) -> None:
        for served in list(self.waiting):
            try:
                plan = self.planner.plan(served.running, self.view, len(self.waiting) - 1)
            except Overloaded:
                continue
            self.waiting.remove(served)
            served.plan = served.running.plan = plan
            served.planned_s = self.now_s
            served.running.session.on(Event.PLANNED)
            self.machines[plan.reader.worker].prompts.append(served)

    def _work(self, machine: Machine) -> None:
        prompt_share, stream_share = 1.0, 1.0
        if machine.prompts and machine.streams:
            prompt_share, stream_share = SHARE, 1 - SHARE
        left_s = TICK_S * prompt_share
        while machine.prompts and left_s > 0:
            served = machine.prompts[0]
            needed_s = RATES.token_s * (served.arrival.prompt_tokens - 1)
            done_s = min(left_s, needed_s - served.read_s)
            served.read_s, left_s = served.read_s + done_s, left_s - done_s
            self.planner.progressed(served.running, int(served.read_s / RATES.token_s))
            if served.read_s >= needed_s - 1e-9:
                machine.prompts.popleft()
                self._prompted(served)
        if machine.streams:
            step_s = machine.cost.step_s(len(machine.streams), 0)
            for served in list(machine.streams):
                self._stream(machine, served, TICK_S * stream_share / step_s)

    def _prompted(self, served: Served) -> None:
        assert served.plan is not None
        served.running.session.on(Event.PROMPTED)
        self.planner.prompted(served.running)
        self.machines[served.plan.decode.worker].streams.append(served)

    def _stream(self, machine: Machine, served: Served, tokens: float) -> None:
        served.progress += tokens
        running, count = served.running, min(int(served.progress), served.arrival.answer_tokens)
        running.session.delivered.extend([0] * (count - len(running.session.delivered)))
        if count and served.first_s is None:
            served.first_s = running.first_token_s = self.now_s
        if count == served.arrival.answer_tokens:
            machine.streams.remove(served)
            served.ended_s = running.last_token_s = self.now_s
            running.session.on(Event.FINISHED)
            self.planner.over(running)

    # -- results

    @property
    def ttfts_s(self) -> list[float]:
        return sorted(served.first_s - served.arrival.at_s for served in self.all if served.first_s is not None)

    def ttft_s(self, share: float) -> float:
        return self.ttfts_s[int(share * len(self.ttfts_s))]

    def events(self, kind: str) -> list[float]:
        return sorted(event.at_s for event in self.planner.pool_events if event.kind == kind)


def _node(worker: str, role: str) -> Node:
    return node_of(
        worker,
        role,  # type: ignore[arg-type]
        n_ctx=4096,
        chunk_tokens=128,
        slots=8 if role == "decode" else 2,
        serves_prompts=True,
        load=load_of(rates=RATES),
    )


@cache
def ran(policy: PolicyName) -> Simulation:
    return Simulation(policy)


def test_every_request_is_answered_and_none_waits_beyond_a_bound() -> None:
    simulation = ran("predicted")
    assert all(served.ended_s is not None for served in simulation.all)
    assert len(simulation.all) > 500
    longest_s = max(served.planned_s - served.arrival.at_s for served in simulation.all)
    assert longest_s < 15.0, "no request starves while others pass it"


def test_when_prompts_grow_single_requests_spill_and_then_a_node_changes_sides_and_comes_back() -> None:
    simulation = ran("predicted")
    turn_s, back_s = TRACE[0][0], TRACE[1][0]
    lent, returned = simulation.events("repurpose"), simulation.events("return")
    assert [at_s for at_s in simulation.events("spill") if turn_s < at_s < back_s], "at once"
    assert [at_s for at_s in lent if turn_s < at_s < back_s], "slower"
    assert [at_s for at_s in returned if at_s > lent[0]], "and it goes home"
    kinds = {event.worker: event.born for event in simulation.planner.pool_events if event.kind == "repurpose"}
    assert set(kinds.values()) == {"token"}, "prompts were short, so a decode node helps"


@pytest.mark.parametrize("policy", ["random", "round_robin"])
def test_the_shortest_queue_beats_chance_and_turns_on_p90_of_time_to_first_token(policy: PolicyName) -> None:
    assert ran("predicted").ttft_s(0.9) < 0.9 * ran(policy).ttft_s(0.9)


def test_predictions_are_near_what_happens() -> None:
    errors = sorted(
        decision["ttft_error_ratio"]
        for decision in ran("predicted").planner.decisions()
        if decision["ttft_error_ratio"] is not None
    )
    median = errors[len(errors) // 2]
    assert 0.7 < median < 1.4
