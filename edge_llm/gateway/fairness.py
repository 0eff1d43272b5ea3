"""Deficit round robin by tokens: in which order waiting requests of several API keys are offered a plan.

Pure. Owns the order, never who can be served: whoever asks tries requests in `order()` and reports the one that went
with `serve`. A request that could not go costs its key nothing and holds up nobody.

After Shreedhar and Varghese, "Efficient fair queuing using deficit round-robin" (SIGCOMM 1995): each key in its turn
gains `QUANTUM_TOKENS` and spends what its requests cost (prompt + max_tokens). Rounds are counted instead of walked:
a key whose request needs three more rounds comes after one that needs none, and serving it gives all keys three.

Invariants: requests of one key keep their order; a key never has more to spend than its dearest waiting request and one
quantum, which nobody who can go ever reaches: being unable to go saves up nothing beyond the right to go first; a key
that nobody waits for has nothing.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

# About one short chat turn: smaller than most requests, so that turns alternate request by request.
QUANTUM_TOKENS: Final = 128

Item = TypeVar("Item", bound=Hashable)


@dataclass(slots=True)
class _Flow(Generic[Item]):
    """What waits under one key: item -> cost in tokens, in order of arrival."""

    deficit: int = 0
    costs: dict[Item, int] = field(default_factory=dict)


class DeficitRoundRobin(Generic[Item]):
    """Waiting items of several keys."""

    def __init__(self, quantum: int = QUANTUM_TOKENS) -> None:
        self._quantum = quantum
        self._flows: dict[str, _Flow[Item]] = {}  # its order is the order of turns

    def add(self, key: str, item: Item, cost: int) -> None:
        """`item` waits last in its key; a new key takes its turn after all others."""
        self._flows.setdefault(key, _Flow()).costs[item] = cost

    def remove(self, key: str, item: Item) -> None:
        """`item` waits no longer and was not served."""
        flow = self._flows[key]
        del flow.costs[item]
        if not flow.costs:
            del self._flows[key]

    def order(self) -> list[Item]:
        """All items in the order in which they are to be tried."""
        ranked: list[tuple[int, int, int, Item]] = []
        for turn, flow in enumerate(self._flows.values()):
            rounds = 0
            for place, (item, cost) in enumerate(flow.costs.items()):
                rounds = max(rounds, self._rounds(flow, cost))
                ranked.append((rounds, turn, place, item))
        ranked.sort(key=lambda rank: rank[:3])
        return [rank[3] for rank in ranked]

    def serve(self, key: str, item: Item) -> None:
        """`item` goes: its key pays, all keys gain the rounds that had to pass for it."""
        flow = self._flows[key]
        cost = flow.costs[item]
        gain = self._quantum * self._rounds(flow, cost)
        for other in self._flows.values():
            other.deficit = min(other.deficit + gain, max(other.costs.values()) + self._quantum)
        flow.deficit -= cost
        self.remove(key, item)
        if key in self._flows and self._rounds(flow, next(iter(flow.costs.values()))):
            self._flows[key] = self._flows.pop(key)  # its turn is over

    def backlog(self) -> dict[str, int]:
        """Tokens that wait, by key."""
        return {key: sum(flow.costs.values()) for key, flow in self._flows.items()}

    def _rounds(self, flow: _Flow[Item], cost: int) -> int:
        """Rounds that have to pass before `flow` can pay `cost`."""
        return max(0, -(-(cost - flow.deficit) // self._quantum))
