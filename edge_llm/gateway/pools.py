"""Which nodes stand by for prompts and which for tokens, and who helps out when one side is overloaded.

Pure: a state machine over counts; time is an argument. Owns the pools (Splitwise, papers.md 2.1) and the log of their
events. Refuses to know how a single request is planned (scheduler.py) and how seconds are predicted.

A node is born into a pool by its role: prefill -> prompt, decode -> token, mixed -> mixed, which counts in both.
First mechanism, at once: a single request spills to a node of the other pool (the scheduler does that; the node keeps
its identity). Second, slow: a pool that stays short while the other has room is lent a node (`repurpose`), until it can
do without or its own pool needs it (`return`). Which mixed nodes read prompts only is chosen by gathering.py and told
here.

Every model has pools of its own: its nodes can help nobody else, and what others have to do says nothing about it.

Invariants: a pool never lends its last node; a node that cannot do the other pool's work is never lent; one change of a
model at a time, none before the imbalance has lasted `SUSTAINED_S`, so that a single long prompt moves nobody; nothing
is remembered of a model without nodes, but events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, inf
from typing import Final, Literal

from edge_llm.worker.messages import Role

Pool = Literal["prompt", "token", "mixed"]
EventKind = Literal["spill", "repurpose", "return"]
_BORN: Final[Mapping[Role, Pool]] = {"prefill": "prompt", "decode": "token", "mixed": "mixed"}
_OTHER: Final[Mapping[Pool, Pool]] = {"prompt": "token", "token": "prompt"}
# Shares of a pool's room that is taken. Between the marks nothing changes: a lent node makes
# the pool it came to look idler and the one it left busier, and must not run to and fro for that.
SHORT: Final = 0.9
ROOM: Final = 0.5
SPARE: Final = 0.7
SUSTAINED_S: Final = 20.0
SMOOTHING_S: Final = 20.0
EVENTS_KEPT: Final = 200


@dataclass(frozen=True, slots=True)
class Standing:
    """One node as the pools see it: what it does of either kind and how much of it it could do. Prompts count 1 while
    one is computed or waits, tokens count in sequences; room 0 means that it cannot."""

    worker: str
    model: str
    role: Role
    prompt_work: float
    prompt_room: float
    token_work: float
    token_room: float


@dataclass(frozen=True, slots=True)
class PoolEvent:
    """Something to tell: `kind` happened to `worker`, which has `model`, of pool `born`, towards pool `to`, at
    `at_s`."""

    kind: EventKind
    worker: str
    model: str
    born: Pool
    to: Pool
    at_s: float
    why: str = ""


@dataclass(slots=True)
class Pools:
    """Who is lent where, of all models. Call `observe` every second or so with everybody's standing."""

    events: deque[PoolEvent] = field(default_factory=lambda: deque(maxlen=EVENTS_KEPT))
    _by_model: dict[str, _ModelPools] = field(default_factory=dict)

    @property
    def lent(self) -> dict[str, Pool]:
        """Who stands in another pool than its own."""
        return {worker: to for pools in self._by_model.values() for worker, to in pools.lent.items()}

    def of(self, worker: str, model: str, role: Role) -> Pool:
        """The pool that a node stands in now."""
        pools = self._by_model.get(model)
        return _BORN[role] if pools is None else pools.of(worker, role)

    def spilled(self, worker: str, model: str, role: Role, to: Pool, now_s: float) -> PoolEvent:
        """Note that one request went to a node of the other pool."""
        return self._noted(PoolEvent("spill", worker, model, _BORN[role], to, now_s))

    def moved(self, worker: str, model: str, kind: EventKind, why: str, now_s: float) -> PoolEvent:
        """Note that a mixed node reads prompts only, or does both again (gathering.py)."""
        to: Pool = "prompt" if kind == "repurpose" else "mixed"
        return self._noted(PoolEvent(kind, worker, model, "mixed", to, now_s, why))

    def _noted(self, event: PoolEvent) -> PoolEvent:
        self.events.append(event)
        return event

    def observe(self, nodes: Iterable[Standing], now_s: float) -> list[PoolEvent]:
        """Lend or give back at most one node of each model. Returns what happened."""
        by_model: dict[str, list[Standing]] = {}
        for node in nodes:
            by_model.setdefault(node.model, []).append(node)
        self._by_model = {model: self._by_model.get(model, _ModelPools(model)) for model in by_model}
        made = [pools.observe(by_model[model], now_s) for model, pools in self._by_model.items()]
        events = [event for event in made if event is not None]
        self.events.extend(events)
        return events


@dataclass(slots=True)
class _ModelPools:
    """The pools of one model."""

    model: str
    lent: dict[str, Pool] = field(default_factory=dict)
    _seen_s: float | None = None
    _smooth: dict[str, Standing] = field(default_factory=dict)
    _since_s: dict[tuple[EventKind, Pool], float] = field(default_factory=dict)

    def of(self, worker: str, role: Role) -> Pool:
        return self.lent.get(worker, _BORN[role])

    def observe(self, nodes: Iterable[Standing], now_s: float) -> PoolEvent | None:
        """Lend or give back at most one node. Returns what happened."""
        self._average(nodes, now_s)
        for gone in self.lent.keys() - self._smooth.keys():
            del self.lent[gone]
        for node in self._smooth.values():
            if node.worker in self.lent and _BORN[node.role] != _OTHER[self.lent[node.worker]]:
                del self.lent[node.worker]  # an operator has given it another role since
        for pool in _OTHER:
            made = self._give_back(pool, now_s) or self._lend(pool, now_s)
            if made is not None:
                # the loads that led here belong to the old arrangement
                self._since_s.clear()
                return made
        return None

    def busy(self, pool: Pool) -> float:
        """Work of this kind, wherever it is done, over the room of the pool; may exceed 1 when it spills. A pool
        without members is short."""
        work = sum(_work(node, pool) for node in self._smooth.values())
        room = sum(_room(node, pool) for node in self._members(pool))
        return work / room if room else 1.0

    def _average(self, nodes: Iterable[Standing], now_s: float) -> None:
        """Work comes and goes within a second; what counts is its mean over the last `SMOOTHING_S`."""
        share = 1.0 if self._seen_s is None else 1 - exp(-(now_s - self._seen_s) / SMOOTHING_S)
        self._seen_s = now_s
        averaged: dict[str, Standing] = {}
        for node in nodes:
            before = self._smooth.get(node.worker, node)
            averaged[node.worker] = replace(
                node,
                prompt_work=before.prompt_work + share * (node.prompt_work - before.prompt_work),
                token_work=before.token_work + share * (node.token_work - before.token_work),
            )
        self._smooth = averaged

    def _give_back(self, pool: Pool, now_s: float) -> PoolEvent | None:
        """A node lent to `pool` goes home when the pool can do without it, or its own pool is short."""
        home = _OTHER[pool]
        guests = [self._smooth[worker] for worker, to in self.lent.items() if to == pool]
        home_is_short = self.busy(home) >= SHORT
        is_due = bool(guests) and (home_is_short or self._busy_without(pool, guests) <= SPARE)
        if not self._has_lasted("return", pool, is_due, now_s):
            return None
        guest = min(guests, key=lambda node: (_work(node, pool), node.worker))
        del self.lent[guest.worker]
        why = f"the {home} pool is short" if home_is_short else f"the {pool} pool can do without"
        return PoolEvent("return", guest.worker, self.model, _BORN[guest.role], _BORN[guest.role], now_s, why)

    def _lend(self, pool: Pool, now_s: float) -> PoolEvent | None:
        """A node of the other pool comes to `pool`, which is short while the other has room."""
        other = _OTHER[pool]
        own = [node for node in self._smooth.values() if self.of(node.worker, node.role) == other]
        able = [node for node in own if node.worker not in self.lent and _room(node, pool)]
        mine, theirs = self.busy(pool), self.busy(other)
        is_due = bool(able) and len(own) > 1 and mine >= SHORT and self._busy_without(other, able) <= ROOM
        if not self._has_lasted("repurpose", pool, is_due, now_s):
            return None
        node = min(able, key=lambda node: (_work(node, other), node.worker))
        self.lent[node.worker] = pool
        why = f"{pool} busy {mine:.2f}, {other} busy {theirs:.2f}"
        return PoolEvent("repurpose", node.worker, self.model, _BORN[node.role], pool, now_s, why)

    def _busy_without(self, pool: Pool, leaving: Sequence[Standing]) -> float:
        """How busy the pool is when the roomiest of `leaving` leaves and the others carry its work."""
        members = self._members(pool)
        room = sum(_room(node, pool) for node in members)
        left = room - max(_room(node, pool) for node in leaving)
        return self.busy(pool) * room / left if left > 0 else inf

    def _has_lasted(self, kind: EventKind, pool: Pool, is_due: bool, now_s: float) -> bool:
        if not is_due:
            self._since_s.pop((kind, pool), None)
            return False
        return now_s - self._since_s.setdefault((kind, pool), now_s) >= SUSTAINED_S

    def _members(self, pool: Pool) -> list[Standing]:
        """Who does this pool's work: its own, those lent to it, and the mixed ones."""
        return [node for node in self._smooth.values() if self.of(node.worker, node.role) in (pool, "mixed")]


def _work(node: Standing, pool: Pool) -> float:
    return node.prompt_work if pool == "prompt" else node.token_work


def _room(node: Standing, pool: Pool) -> float:
    return node.prompt_room if pool == "prompt" else node.token_room
