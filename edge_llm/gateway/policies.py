"""Ways to choose nodes that do not predict anything, to compare the scheduler with.

Pure but for what a policy remembers (whose turn it is, a seeded generator). Owns the orders; refuses to know plans.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from edge_llm.cluster.cost import Work
from edge_llm.cluster.view import Node
from edge_llm.config import PolicyName

Task = Literal["prompt", "token"]


@dataclass(frozen=True, slots=True)
class Standby:
    """A node that could take a task, and what it has to do."""

    node: Node
    work: Work


class Policy(Protocol):
    """Chooses one of several nodes, by name in ascending order, never none. `next` of the same nodes is the same until
    one `took` the task: a request that has to wait is asked for again and again, and uses up nobody's turn."""

    @property
    def name(self) -> PolicyName: ...

    def next(self, task: Task, standby: Sequence[Standby]) -> Node: ...

    def took(self, task: Task, node: Node) -> None: ...


@dataclass(slots=True)
class RoundRobin:
    """Each in turn, prompts and tokens counted apart; a node that is missing for a while is passed over."""

    last: dict[Task, str] = field(default_factory=dict)

    @property
    def name(self) -> PolicyName:
        return "round_robin"

    def next(self, task: Task, standby: Sequence[Standby]) -> Node:
        after = [entry for entry in standby if entry.node.worker > self.last.get(task, "")]
        return (after or standby)[0].node

    def took(self, task: Task, node: Node) -> None:
        self.last[task] = node.worker


@dataclass(slots=True)
class Random:
    """Any of them."""

    rng: random.Random
    drawn: dict[Task, float] = field(default_factory=dict)

    @property
    def name(self) -> PolicyName:
        return "random"

    def next(self, task: Task, standby: Sequence[Standby]) -> Node:
        if task not in self.drawn:
            self.drawn[task] = self.rng.random()
        return standby[int(self.drawn[task] * len(standby))].node

    def took(self, task: Task, node: Node) -> None:
        self.drawn.pop(task, None)


@dataclass(frozen=True, slots=True)
class LeastBusy:
    """Fewest prompts, fewest sequences: what a load balancer in front of llama-server can know."""

    @property
    def name(self) -> PolicyName:
        return "least_busy"

    def next(self, task: Task, standby: Sequence[Standby]) -> Node:
        def busy(entry: Standby) -> tuple[int, int, str]:
            prompts, sequences = len(entry.work.prompts), entry.work.sequences
            return (
                (prompts, sequences, entry.node.worker) if task == "prompt" else (sequences, prompts, entry.node.worker)
            )

        return min(standby, key=busy).node

    def took(self, task: Task, node: Node) -> None:
        """Its work tells."""


def policy_of(name: PolicyName, seed: int = 0) -> Policy | None:
    """None for `predicted`: that is the scheduler's own."""
    match name:
        case "predicted":
            return None
        case "round_robin":
            return RoundRobin()
        case "random":
            return Random(random.Random(seed))
        case "least_busy":
            return LeastBusy()
