"""What every scenario gets: the cluster, edge-llm on it, the client outside, and where measured figures go.

Owns the state between scenarios: each one begins with all workloads as the overlay wants them. Refuses to know what
scenarios do.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from tests.kubernetes import net
from tests.kubernetes.cluster import Cluster
from tests.kubernetes.deploy import DECODE, GATEWAY, PREFILL, Deployed
from tests.kubernetes.ledger import Ledger
from tests.kubernetes.outside import Outside, completion
from tests.kubernetes.shell import run

ROLES: Final = {"node-a": "prefill", "node-b": "decode", "node-c": "decode"}


class NotHere(Exception):
    """A scenario cannot be tried on this machine or with what is there; the reason."""


@dataclass(slots=True)
class Stage:
    """`vocab_size`: of the model that the overlay serves."""

    cluster: Cluster
    edge: Deployed
    outside: Outside
    ledger: Ledger
    vocab_size: int = 0

    @property
    def measured(self) -> dict[str, Any]:
        return self.ledger.measured

    def say(self, line: str) -> None:
        self.ledger.say(f"       {line}")

    async def do(self, *words: str, deadline_s: float = 60.0) -> str:
        """kubectl in our namespace, beside what runs."""
        return await asyncio.to_thread(self.edge.k, *words, deadline_s=deadline_s)

    async def rolled_out(self, *workloads: str) -> None:
        await asyncio.to_thread(self.edge.rolled_out, *workloads)

    async def edge_llm(self, *words: str, with_gateway: bool = True, deadline_s: float = 240.0) -> str:
        """A command of ours, from the client's place outside, with our kubectl."""
        gateway = ("--url", self.outside.url, "--api-key-file", str(self.edge.keys.api_key)) if with_gateway else ()
        command = (sys.executable, "-m", "edge_llm", *words, *gateway)
        return await asyncio.to_thread(run, *command, deadline_s=deadline_s, environment=self._environment)

    @property
    def _environment(self) -> dict[str, str]:
        return {"PATH": f"{self.cluster.site.binaries}:/usr/sbin:/usr/bin:/sbin:/bin"}

    async def doctor(self) -> dict[str, dict[str, Any]]:
        """What `edge-llm doctor --cluster` finds, by check. Its exit code is its verdict, not its failure."""
        kubeconfig = str(self.cluster.site.admin)
        command = (sys.executable, "-m", "edge_llm", "doctor", "--cluster", "--kubeconfig", kubeconfig, "--json")
        said = await asyncio.to_thread(run, *command, may_fail=True, environment=self._environment)
        return {one["check"]: one for one in json.loads(said)["findings"]}

    async def settle(self) -> None:
        """One worker of each role, no link cut, nothing left over of the scenario before."""
        for node in self.cluster.site.nodes:
            net.mend(node)
            await asyncio.to_thread(self.edge.label_node, node.name, ROLES[node.name])
        await asyncio.to_thread(self.edge.apply)
        await self.rolled_out(PREFILL, DECODE, GATEWAY)
        names = {"edge-llm-prefill-0", "edge-llm-decode-0"}
        await self.outside.until("one prefill and one decode worker", lambda ready: set(ready) == names)
        await asyncio.to_thread(self.cluster.until, "what was scaled down gone", lambda: not self._surplus(names), 180)

    def _surplus(self, names: set[str]) -> set[str]:
        """Workers' pods and claims beyond these. Scaled up before a claim is gone, a StatefulSet makes no pod until
        something else happens: it waits for the claim's end, and is not told of it."""
        pods = self.edge.items("pods", "-l", "app.kubernetes.io/component=worker")
        claims = self.edge.items("persistentvolumeclaims", "-l", "app.kubernetes.io/component=worker")
        found = {item["metadata"]["name"].removeprefix("data-") for item in (*pods, *claims)}
        return found - names

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
