"""What every scenario gets: the cluster, edge-llm on it, the client outside, and where measured figures go.

Owns the state between scenarios: each one begins with all workloads as the overlay wants them. Refuses to know what
scenarios do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from tests.kubernetes import net
from tests.kubernetes.cluster import Cluster
from tests.kubernetes.deploy import DECODE, GATEWAY, PREFILL, Deployed
from tests.kubernetes.ledger import Ledger
from tests.kubernetes.outside import Outside, completion

ROLES: Final = {"node-a": "prefill", "node-b": "decode", "node-c": "decode"}


class NotHere(Exception):
    """A scenario cannot be tried on this machine or with what is there; the reason."""


@dataclass(slots=True)
class Stage:
    """`vocab_size`: of the model that the overlay serves. `image`: what the pods run."""

    cluster: Cluster
    edge: Deployed
    outside: Outside
    ledger: Ledger
    image: str
    vocab_size: int = 0
    measured: dict[str, Any] = field(default_factory=dict)

    def say(self, line: str) -> None:
        self.ledger.say(f"       {line}")

    async def do(self, *words: str, deadline_s: float = 60.0) -> str:
        """kubectl in our namespace, beside what runs."""
        return await asyncio.to_thread(self.edge.k, *words, deadline_s=deadline_s)

    async def rolled_out(self, *workloads: str) -> None:
        await asyncio.to_thread(self.edge.rolled_out, *workloads)

    async def settle(self) -> None:
        """One worker of each role, no link cut, nothing left over of the scenario before."""
        for node in self.cluster.site.nodes:
            net.mend(node)
            await asyncio.to_thread(self.edge.label_node, node.name, ROLES[node.name])
        await asyncio.to_thread(self.edge.apply)
        await self.rolled_out(PREFILL, DECODE, GATEWAY)
        names = {"edge-llm-prefill-0", "edge-llm-decode-0"}
        await self.outside.until("one prefill and one decode worker", lambda ready: set(ready) == names)

    def body(
        self, seed: int, prompt: int = 200, answer: int = 48, mode: str = "split", **more: object
    ) -> dict[str, Any]:
        return completion(seed, prompt, answer, self.vocab_size, mode, **more)


@dataclass(frozen=True, slots=True)
class Scenario:
    """`play` returns what it saw, for people. It raises EdgeLLMError when something is not as promised, NotHere when it
    cannot be tried. `settles`: begins with the overlay's workers, one of each role."""

    name: str
    play: Callable[[Stage], Awaitable[str]]
    settles: bool = True
