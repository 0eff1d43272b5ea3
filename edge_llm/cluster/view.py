"""What we believe about the cluster: which workers there are, what they said last, and when.

Pure and immutable: the prober makes a new view, the scheduler reads one. Refuses to know how workers are found.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edge_llm.worker.messages import WorkerStatus


@dataclass(frozen=True, slots=True)
class Place:
    """A worker as discovery names it, before it was asked anything."""

    worker: str
    address: str


@dataclass(frozen=True, slots=True)
class Node:
    """A worker that answered: its place and its last status, seen at `seen_s` (monotonic)."""

    place: Place
    status: WorkerStatus
    seen_s: float

    @property
    def worker(self) -> str:
        return self.status.worker

    @property
    def decodes(self) -> bool:
        """Whether it can: its role is an identity, not a capability."""
        return self.status.slots > 0

    @property
    def prefills(self) -> bool:
        """Whether it can compute prompts for others."""
        return self.status.serves_prompts and self.status.splits

    @property
    def life(self) -> tuple[str, int, float]:
        """Changes when the worker was started again: then it holds nothing of what it held."""
        return self.place.address, self.status.pid, self.status.started_at


@dataclass(frozen=True, slots=True)
class ClusterView:
    """All workers that answer now, by name."""

    nodes: tuple[Node, ...] = ()

    def ready(self, model: str | None = None) -> tuple[Node, ...]:
        """Workers that take requests, of one model if named."""
        return tuple(n for n in self.nodes if n.status.is_ready and (model is None or n.status.model == model))

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(sorted({node.status.model for node in self.nodes}))

    def node(self, worker: str) -> Node | None:
        return next((node for node in self.nodes if node.worker == worker), None)

    def with_node(self, node: Node) -> ClusterView:
        return ClusterView((*(n for n in self.nodes if n.worker != node.worker), node))

    def without(self, workers: Iterable[str]) -> ClusterView:
        gone = set(workers)
        return ClusterView(tuple(node for node in self.nodes if node.worker not in gone))
