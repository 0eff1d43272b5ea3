"""Where a blow falls: the streams that run, the workers they are in, and the moment in a stream's life.

Owns what blows may see and use (`Scene`), and what they report (`Blow`). Refuses to know which blows there are.

A blow may have a second half, which falls while the streams go on (`Blow.second_half`). Putting the cluster right is
another thing (`Blow.heal`): it comes after the last stream ended, so it tests nothing.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from edge_llm.bench.followed import Followed
from edge_llm.bench.proxy import Exchange, FaultProxy, Rule
from edge_llm.errors import EdgeLLMError

Role = Literal["prefill", "decode"]
Moment = Literal["before", "prompt", "computing", "transfer", "early", "middle", "last"]
_LAST_TOKENS: Final = 3
# "early" leaves most of the answer for what comes after the blow.
_EARLY: Final = 0.2


class NotStruck(EdgeLLMError):
    """The blow did not fall: the stream was elsewhere, or over, or the kernel did not act. Tried again."""

    code = "not_struck"


@dataclass(slots=True)
class Scene:
    """What a blow may use. `streams` grows where streams follow one another; the first is the target. `pids` are those
    of the workers now, `stranger_ports` lead to workers of the same names that serve another model; `ended` are
    processes that were told to end. `join`: one more stream at a time."""

    proxy: FaultProxy
    streams: list[Followed]
    tokens: int
    kv_bytes: int
    pids: Mapping[str, int]
    ended: set[int]
    stranger_ports: Mapping[str, int]
    rng: random.Random
    until: Callable[[Callable[[], bool]], Awaitable[None]]
    all_ready: Callable[[], Awaitable[None]]
    join: Callable[[], None]

    @property
    def target(self) -> Followed:
        return self.streams[0]

    def end(self, worker: str, number: signal.Signals) -> None:
        """Send a signal that ends a worker. Raises NotStruck when it is gone already."""
        self.ended.add(self.pids[worker])
        try:
            os.kill(self.pids[worker], number)
        except ProcessLookupError:
            raise NotStruck(f"{worker} is gone already") from None

    def exchanges(self, role: Role, since_s: float = 0.0) -> list[Exchange]:
        return self.proxy.of(self.target.request_id, role, since_s)

    def victim(self, role: Role) -> Exchange:
        """The worker that has the target now. Raises NotStruck."""
        found = self.exchanges(role)
        if self.target.is_over or not found or (role == "prefill" and found[-1].is_whole):
            raise NotStruck(f"the target is in no {role} worker")
        return found[-1]

    def streams_in(self, worker: str) -> list[Followed]:
        """Streams that this worker has now: it decodes them, or computes or sends the KV of their prompt."""
        role: Role = "prefill" if worker.startswith("prefill") else "decode"
        exchanges = [(exchange.request_id, exchange) for exchange in self.proxy.exchanges if exchange.route == role]
        found = []
        for stream in self.streams:
            own = [] if stream.is_over else [one for name, one in exchanges if name.startswith(stream.request_id)]
            # what a decode worker does itself after a failed prefill leaves an exchange that never becomes whole
            is_done = role == "prefill" and bool(own) and (own[-1].is_whole or bool(stream.arrivals_s))
            if own and own[-1].worker == worker and not is_done:
                found.append(stream)
        return found


@dataclass(frozen=True, slots=True)
class Hit:
    """A signal to one of several workers, and the streams that it had then."""

    worker: str
    struck_s: float
    streams: tuple[Followed, ...]


@dataclass(slots=True)
class Blow:
    """What was done: when (monotonic seconds), to whom, by which rule.

    `second_half` falls while the streams go on; it may raise NotStruck. `heal` puts the cluster right after they ended.
    `woken_s`: when who slept went on, None as long as it sleeps. `hits`: of a blow to several workers in turn.
    `stale_tokens`: what the gateway dropped since then as of plans that were over, once the streams ended.
    """

    victim: str
    struck_s: float
    rule: Rule | None = None
    second_half: asyncio.Task[None] | None = None
    heal: Callable[[], Awaitable[None]] | None = None
    woken_s: float | None = None
    hits: list[Hit] = field(default_factory=list)
    stale_tokens: int = 0

    def resumed_s(self, target: Followed) -> float | None:
        """Seconds until the disturbed stream went on; of several, the one that waited longest. None: nothing came."""
        if self.hits:
            ends_s = [*(hit.struck_s for hit in self.hits[1:]), math.inf]
            waits = [_resumed_s(hit, end_s) for hit, end_s in zip(self.hits, ends_s, strict=True)]
            return max((wait_s for wait_s in waits if wait_s is not None), default=None)
        struck_s = self.rule.first_touch_s if self.rule is not None else self.struck_s
        return None if struck_s is None else target.resumed_after_s(struck_s)


def _resumed_s(hit: Hit, end_s: float) -> float | None:
    """Of its streams the one that waited longest, before the next hit disturbs them anew."""
    seen = [replace(one, arrivals_s=[at for at in one.arrivals_s if at < end_s]) for one in hit.streams]
    waits = [one.resumed_after_s(hit.struck_s) for one in seen]
    return max((wait_s for wait_s in waits if wait_s is not None), default=None)


async def wait_for_moment(scene: Scene, moment: Moment) -> None:
    """Until the target is where the blow shall meet it. Raises NotStruck when it ended before."""
    target, rng = scene.target, scene.rng
    share = rng.uniform(0.15, 0.8)

    def is_there() -> bool:
        if target.is_over:
            return True
        transfers, texts = scene.exchanges("prefill"), len(target.arrivals_s)
        match moment:
            case "before":
                return True
            case "prompt":
                return bool(scene.exchanges("decode"))
            case "computing":
                return bool(transfers)
            case "transfer":
                return bool(transfers) and transfers[-1].reply_bytes >= share * scene.kv_bytes
            case "early":
                return texts >= share * _EARLY * scene.tokens
            case "middle":
                return texts >= share * scene.tokens
            case "last":
                return texts >= scene.tokens - _LAST_TOKENS

    await scene.until(is_there)
    if target.is_over:
        raise NotStruck("the stream was over before its moment came")
