"""The one queue: who may wait for a plan, how long, and in which order plans are made.

Owns bounds, order and the words for waiting too long. Refuses to know how a plan is made and what becomes of it.

A place is taken before anything is done for a request (`enter`: a refusal must be cheap), tried for when its prompt is
known (`ready`), and given up when it is planned, refused, or its time is over. New requests are refused where too many
or too large ones wait, and where the predicted wait (service.py) exceeds the bound or the caller's own time.

Order: requests that were under way before come first. New ones follow in deficit round robin between API keys
(fairness.py), model by model. Who cannot be planned now holds up nobody: everybody is tried, except who needs at least
as much as one who was refused in the same pass. Who was overtaken so for `PATIENCE_S` is tried before the others, in
the same order among them.

Invariants: nobody waits beyond `wait_s` or its deadline; a key never holds all places (while others keep out, it gets
8/9 of them: the dynamic threshold of Choudhury and Hahne, 1998, with factor 8).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Final

import structlog

from edge_llm.errors import DeadlinePassed, EdgeLLMError, Overloaded, WorkerError, WorthAWait
from edge_llm.gateway.fairness import DeficitRoundRobin
from edge_llm.gateway.scheduler import Plan
from edge_llm.gateway.service import Service, tokens_ahead

PATIENCE_S: Final = 5.0
SHARE: Final = 8
# So many that are told to wait for something better are asked one by one, each time: a plan takes its time.
ASKED_TO_WAIT: Final = 16
Lane = Hashable
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Bounds:
    """`length` and `held_bytes` of new requests that wait; `predicted_wait_s` refuses at once, `wait_s` in the end."""

    length: int = 256
    held_bytes: int = 64 << 20
    predicted_wait_s: float = 30.0
    wait_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request wants of the cluster, and of the queue's memory. `deadline_s` on the queue's clock. Its answer is
    expected to have `answer_tokens` (None: as many as it may have). Some worker holds `held_tokens` of its prompt.
    `promised_tokens_per_s`: what the workers' rates promise to do of such requests, for as long as no service was
    measured (None: nothing is known of that either)."""

    request_id: str
    key: str
    model: str
    prompt_tokens: int
    max_tokens: int
    mode: str = "auto"
    held_bytes: int = 0
    deadline_s: float | None = None
    answer_tokens: float | None = None
    held_tokens: int = 0
    promised_tokens_per_s: float | None = None

    @property
    def tokens(self) -> int:
        """What it may take: room, and turns between keys."""
        return self.prompt_tokens + self.max_tokens

    @property
    def expected_tokens(self) -> int:
        """What it will take: time."""
        answer = self.max_tokens if self.answer_tokens is None else min(self.max_tokens, self.answer_tokens)
        return self.prompt_tokens + math.ceil(answer)

    def needs_as_much_as(self, other: Demand) -> bool:
        """Of everything: context, room, and work on the prompt."""
        computed, others = self.prompt_tokens - self.held_tokens, other.prompt_tokens - other.held_tokens
        return self.prompt_tokens >= other.prompt_tokens and self.tokens >= other.tokens and computed >= others


@dataclass(eq=False, slots=True)
class Place:
    """One request's place. `plan` is called when its turn comes; Overloaded means not yet."""

    demand: Demand
    since_s: float
    until_s: float
    plan: Callable[[], Plan] | None = None
    lane: Lane = None
    is_returning: bool = False
    is_held: bool = True
    overtaken_s: float | None = None
    reason: str = "the queue did not move"
    planned: asyncio.Future[Plan] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class PlanQueue:
    """Places of requests that have no worker."""

    def __init__(
        self, bounds: Bounds, service: Service | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._bounds, self._clock = bounds, clock
        self.service = service or Service()
        self._arriving: set[Place] = set()
        self._returning: list[Place] = []
        self._new: dict[str, DeficitRoundRobin[Place]] = {}
        self._waiting: set[Place] = set()
        self._passed: list[Place] = []

    def __len__(self) -> int:
        return len(self._arriving) + len(self._waiting) + len(self._returning)

    def waiting(self, model: str) -> int:
        """How many of a model's requests have no plan."""
        return self._others(model) + sum(place.demand.model == model for place in self._returning)

    def passed(self, model: str) -> int:
        """Of a model, how many that might split could not be planned before the one for which a plan is being made."""
        return sum(place.demand.model == model and place.demand.mode != "local" for place in self._passed)

    # -- places

    def enter(self, demand: Demand, free_slots: int) -> Place:
        """Take a place on an estimate of the prompt, before work is done for it. Raises Overloaded."""
        others = self._others(demand.model)
        if others >= free_slots:
            self._check(demand, others, self._ahead(demand), free_slots=max(0, free_slots))
        self._check_bytes(demand)
        place = self._place(demand)
        self._arriving.add(place)
        return place

    def ready(self, place: Place, demand: Demand, plan: Callable[[], Plan], lane: Lane, free_slots: int = 0) -> None:
        """The prompt is known: wait for a plan. Raises what `plan` raises at once, or Overloaded. With slots free it is
        a prefill worker that is waited for, and who waits for that is not behind the work of whole answers."""
        self._arriving.discard(place)
        place.demand, place.plan, place.lane = demand, plan, lane
        others = sum(other.demand.model == demand.model for other in self._waiting)
        ahead = self._ahead(demand)
        self._waiting.add(place)
        self._new.setdefault(demand.model, DeficitRoundRobin()).add(demand.key, place, demand.tokens)
        self.move()
        if place.planned.done():
            place.planned.result()
            return
        try:
            self._check(demand, others, ahead, place, free_slots)
        except Overloaded:
            self.leave(place)
            raise

    def rejoin(self, demand: Demand, plan: Callable[[], Plan], lane: Lane) -> Place:
        """A place for a request that lost its worker: no bound but time keeps it out."""
        place = self._place(demand)
        place.plan, place.lane, place.is_returning = plan, lane, True
        self._returning.append(place)
        self.move()
        if place.planned.done():
            place.planned.result()
        return place

    async def turn(self, place: Place) -> Plan:
        """The plan, when there is one. Raises Overloaded or DeadlinePassed when the wait was too long. Cancelled: the
        place is free."""
        try:
            async with asyncio.timeout(max(0.0, place.until_s - self._clock())):
                return await place.planned
        except TimeoutError as late:
            raise self._too_late(place) from late
        finally:
            self.leave(place)

    def leave(self, place: Place) -> None:
        """Give the place up, if it is still held; somebody else may be next."""
        if place.is_held:
            self._remove(place)
            self.move()

    # -- plans

    def move(self) -> None:
        """Plan for everybody whose turn it is. To be called whenever a plan may have become possible."""
        refused = _Refused()
        while self._pass(refused):
            pass

    def _pass(self, refused: _Refused) -> bool:
        """Try everybody in order until one leaves. Where there was no room there is none yet: nothing has become free
        since. Who was told to wait says less of those behind it, who would wait longer: they are asked, up to a bound.
        """
        now_s = self._clock()
        passed, told_to_wait = list[Place](), 0
        self._passed = passed
        for place in self._order(now_s):
            # done while it is held: whoever waited was cancelled and has not run since
            if place.planned.done() or place.until_s <= now_s or place.plan is None:
                continue
            if refused.covers(place):
                passed.append(place)
                continue
            try:
                plan = place.plan()
            except Overloaded as error:
                place.reason = error.message
                told_to_wait += isinstance(error, WorthAWait)
                if not isinstance(error, WorthAWait) or told_to_wait >= ASKED_TO_WAIT:
                    refused.add(place)
                passed.append(place)
                continue
            except EdgeLLMError as error:
                self._refuse(place, error)
                return True
            except Exception as error:  # a bug of ours on one request: everybody else's turn is moved on in here, too
                log.error("planning failed", request_id=place.demand.request_id, error=repr(error), exc_info=True)
                self._refuse(place, WorkerError("the gateway failed on this request; see its log"))
                return True
            self._go(place, plan, passed, now_s)
            return True
        return False

    def _refuse(self, place: Place, error: EdgeLLMError) -> None:
        self._remove(place)
        place.planned.set_exception(error)

    def _go(self, place: Place, plan: Plan, passed: list[Place], now_s: float) -> None:
        demand = place.demand
        for other in passed:
            if other.demand.model == demand.model and other.overtaken_s is None:
                other.overtaken_s = now_s
        if not place.is_returning:
            self._new[demand.model].serve(demand.key, place)
        self._forget(place)
        self.service.began(demand.model, demand.request_id, now_s)
        place.planned.set_result(plan)

    def _order(self, now_s: float) -> Iterator[Place]:
        yield from self._returning.copy()
        impatient = {p for p in self._waiting if p.overtaken_s is not None and now_s - p.overtaken_s >= PATIENCE_S}
        orders = [robin.order() for robin in self._new.values()]
        yield from (place for order in orders for place in order if place in impatient)
        yield from (place for order in orders for place in order if place not in impatient)

    def _remove(self, place: Place) -> None:
        """Out, without a plan."""
        if place in self._waiting:
            self._new[place.demand.model].remove(place.demand.key, place)
        self._forget(place)

    def _forget(self, place: Place) -> None:
        place.is_held, place.plan = False, None  # which holds its request, and that its place
        self._arriving.discard(place)
        self._waiting.discard(place)
        if place.is_returning and place in self._returning:
            self._returning.remove(place)

    # -- bounds

    def _place(self, demand: Demand) -> Place:
        now_s = self._clock()
        until_s = now_s + self._bounds.wait_s
        return Place(demand, now_s, until_s if demand.deadline_s is None else min(until_s, demand.deadline_s))

    def _check(self, demand: Demand, others: int, ahead: int, itself: Place | None = None, free_slots: int = 0) -> None:
        """Whether one more may wait behind `others` of its model with `ahead` tokens of work, and all that wait. Raises
        Overloaded."""
        bounds, model = self._bounds, demand.model
        if others:  # the first of them take the free slots: only the work of the rest waits
            ahead = ahead * (others - free_slots) // others
        others = len(self._arriving) + len(self._waiting) - (itself is not None) - free_slots
        wait_s = self.service.wait_s(model, ahead, free_slots)
        if wait_s is None and (promised_per_s := self._promised_per_s(demand)):
            wait_s = ahead / promised_per_s
        if others >= bounds.length:
            retry_s = self.service.retry_after_s(model, None, 0.0)
            raise Overloaded(f"{others} requests wait for a slot already", retry_after_s=retry_s)
        own = sum(place.demand.key == demand.key and place is not itself for place in self._held_new())
        if own - free_slots >= SHARE * (bounds.length - others):
            retry_s = self.service.retry_after_s(model, None, 0.0)
            raise Overloaded(
                f"{own - free_slots} requests of key {demand.key} wait for a slot already", retry_after_s=retry_s
            )
        bound_s = bounds.predicted_wait_s
        if demand.deadline_s is not None:
            bound_s = min(bound_s, demand.deadline_s - self._clock())
        if wait_s is not None and wait_s > bound_s:
            raise Overloaded(
                f"{ahead} tokens of work wait before this request, about {wait_s:.0f} s: more than {bound_s:.0f} s",
                retry_after_s=self.service.retry_after_s(model, wait_s, bound_s),
            )

    def _promised_per_s(self, demand: Demand) -> float | None:
        """Tokens a second of what is held here and of this one together: it is others' work that is waited for, and a
        prompt's tokens are done several times as fast as an answer's."""
        held = (place.demand for place in self._held_new() if place.demand is not demand)
        known = [one for one in (*held, demand) if one.model == demand.model and one.promised_tokens_per_s]
        seconds = sum(one.expected_tokens / (one.promised_tokens_per_s or math.inf) for one in known)
        return sum(one.expected_tokens for one in known) / seconds if seconds else None

    def _check_bytes(self, demand: Demand) -> None:
        held = sum(place.demand.held_bytes for place in self._held_new())
        if held + demand.held_bytes > self._bounds.held_bytes:
            raise Overloaded(
                f"the requests that wait hold {held} of {self._bounds.held_bytes} bytes already",
                retry_after_s=self.service.retry_after_s(demand.model, None, 0.0),
            )

    def _others(self, model: str) -> int:
        return sum(place.demand.model == model for place in self._held_new())

    def _held_new(self) -> Iterator[Place]:
        yield from self._arriving
        yield from self._waiting

    def _ahead(self, demand: Demand) -> int:
        """Tokens of work before a new request, as long as answers are expected to be."""
        costs, work = Counter[str](), Counter[str]()
        for waiting in (place.demand for place in self._held_new()):
            if waiting.model == demand.model:
                costs[waiting.key] += waiting.tokens
                work[waiting.key] += waiting.expected_tokens
        returning = sum(p.demand.expected_tokens for p in self._returning if p.demand.model == demand.model)
        return returning + tokens_ahead(costs, work, demand.key, demand.tokens)

    def _too_late(self, place: Place) -> EdgeLLMError:
        waited_s = self._clock() - place.since_s
        deadline_s = place.demand.deadline_s
        if deadline_s is not None and deadline_s <= place.until_s:
            return DeadlinePassed(f"the request's time was over after {waited_s:.1f} s of waiting ({place.reason})")
        return Overloaded(
            f"no slot became free within {self._bounds.wait_s:.0f} s ({place.reason})",
            retry_after_s=self.service.retry_after_s(place.demand.model, None, 0.0),
        )


class _Refused:
    """What could not be planned in one pass: by lane and mode, the least that was too much."""

    def __init__(self) -> None:
        self._least: dict[tuple[Lane, str], list[Demand]] = {}

    def add(self, place: Place) -> None:
        self._least.setdefault((place.lane, place.demand.mode), []).append(place.demand)

    def covers(self, place: Place) -> bool:
        """Whether it needs at least as much of everything as one that was refused."""
        demand = place.demand
        return any(demand.needs_as_much_as(least) for least in self._least.get((place.lane, demand.mode), ()))
