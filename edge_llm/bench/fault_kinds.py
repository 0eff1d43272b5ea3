"""The kinds of fault, each as a moment in a stream's life, a blow from outside, and the proof that it met the stream.

Owns the list and how each is done: signals, the proxy's rules, a cgroup limit, another worker behind an address. There
is no switch for any of it in the workers. Refuses to know how many are struck and what the answers should be.

A kind's `strike` runs when its moment has come, returns what it did (`Blow`), and undoes it in `Blow.heal`.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Literal

from edge_llm.bench.followed import Followed
from edge_llm.bench.memory_limit import MemoryGroup
from edge_llm.bench.proxy import Exchange, FaultProxy, Rule
from edge_llm.errors import EdgeLLMError

Role = Literal["prefill", "decode"]
Moment = Literal["before", "prompt", "computing", "transfer", "middle", "last"]
# The goal is that a silent worker is out within 6 s: it wakes up after that.
ASLEEP_S: Final = 8.0
# A kill by the kernel comes with the next page that the worker touches.
KILLED_S: Final = 5.0
_SLOWER_S: Final = 1.5
_LATENCY_S: Final = 0.1
_LAST_TOKENS: Final = 3


class NotStruck(EdgeLLMError):
    """The blow did not fall: the stream was elsewhere, or over, or the kernel did not act. Tried again."""

    code = "not_struck"


@dataclass(slots=True)
class Scene:
    """What a blow may use. `pids` are those of the workers now, `stranger_ports` lead to workers of the same
    names that serve another model;
    `ended` are processes that were told to end."""

    proxy: FaultProxy
    target: Followed
    tokens: int
    kv_bytes: int
    pids: Mapping[str, int]
    ended: set[int]
    stranger_ports: Mapping[str, int]
    rng: random.Random
    until: Callable[[Callable[[], bool]], Awaitable[None]]
    all_ready: Callable[[], Awaitable[None]]

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


@dataclass(slots=True)
class Blow:
    """What was done: when (monotonic seconds), to whom, by which rule, and how it is undone."""

    victim: str
    struck_s: float
    rule: Rule | None = None
    heal: Callable[[], Awaitable[None]] | None = None
    after: list[asyncio.Task[None]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Kind:
    """`proof` says, after the streams ended, whether the blow met the target: empty means it did not."""

    name: str
    words: str
    moment: Moment
    strike: Callable[[Scene], Awaitable[Blow]]
    proof: Callable[[Scene, Blow], str]
    needs_strangers: bool = False
    needs_all: bool = False


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
            case "middle":
                return texts >= share * scene.tokens
            case "last":
                return texts >= scene.tokens - _LAST_TOKENS

    await scene.until(is_there)
    if target.is_over:
        raise NotStruck("the stream was over before its moment came")


# -- blows


def by_ending(role: Role, number: signal.Signals) -> Callable[[Scene], Awaitable[Blow]]:
    async def strike(scene: Scene) -> Blow:
        victim = scene.victim(role).worker
        scene.end(victim, number)
        return Blow(victim, time.monotonic())

    return strike


def asleep(role: Role) -> Callable[[Scene], Awaitable[Blow]]:
    """SIGSTOP; SIGCONT long after it was given up, while it still believes in its sequences."""

    async def strike(scene: Scene) -> Blow:
        victim = scene.victim(role).worker
        pid = scene.pids[victim]
        os.kill(pid, signal.SIGSTOP)
        struck_s = time.monotonic()

        async def wake() -> None:
            await asyncio.sleep(max(0.0, struck_s + ASLEEP_S - time.monotonic()))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        return Blow(victim, struck_s, heal=wake)

    return strike


async def asleep_unnoticed(scene: Scene) -> Blow:
    """SIGSTOP to all decode workers but one, a moment before the request comes: it is likely sent to one of them."""
    decoders = sorted(name for name in scene.pids if name.startswith("decode"))
    victims = scene.rng.sample(decoders, len(decoders) - 1)
    struck_s = time.monotonic()
    for victim in victims:
        os.kill(scene.pids[victim], signal.SIGSTOP)

    async def wake() -> None:
        await asyncio.sleep(max(0.0, struck_s + ASLEEP_S - time.monotonic()))
        for victim in victims:
            os.kill(scene.pids[victim], signal.SIGCONT)

    return Blow(", ".join(victims), struck_s, heal=wake)


async def out_of_memory(scene: Scene) -> Blow:
    victim = scene.victim("decode").worker
    group = MemoryGroup(f"edge-llm-fault-{os.getpid()}")
    with group:
        group.confine(scene.pids[victim], 0)
        struck_s = time.monotonic()
        for _ in range(int(KILLED_S / 0.01)):
            if group.kills:
                scene.ended.add(scene.pids[victim])
                return Blow(victim, struck_s)
            await asyncio.sleep(0.01)
    raise NotStruck("the kernel killed nothing: the worker needed no new memory")


def by_rule(rule_for: Callable[[Scene], Rule]) -> Callable[[Scene], Awaitable[Blow]]:
    async def strike(scene: Scene) -> Blow:
        rule = rule_for(scene)
        scene.proxy.rules.append(rule)

        async def lift() -> None:
            scene.proxy.lift(rule)

        return Blow(rule.worker or "prefill worker", time.monotonic(), rule, lift)

    return strike


async def stranger(scene: Scene) -> Blow:
    """The addresses of the prefill workers lead to one that serves another model: a roll-out gone wrong."""
    scene.proxy.divert("prefill", scene.stranger_ports)

    async def back() -> None:
        scene.proxy.divert("prefill", {})

    return Blow("prefill workers", time.monotonic(), heal=back)


async def rolling_restart(scene: Scene) -> Blow:
    """SIGTERM to one worker after another, the next when all are ready again; the one with the target is the first."""
    first = scene.victim("decode").worker
    struck_s = time.monotonic()
    scene.end(first, signal.SIGTERM)

    async def the_others() -> None:
        for name in scene.pids:
            if name != first:
                await scene.all_ready()
                scene.end(name, signal.SIGTERM)

    return Blow(first, struck_s, after=[asyncio.create_task(the_others(), name="rolling restart")])


def transfer(scene: Scene, action: Literal["reset", "close", "flip", "swallow"]) -> Rule:
    """A rule for the target's KV, from a random byte of it on."""
    at = int(scene.rng.uniform(0.1, 0.9) * scene.kv_bytes)
    return Rule(action, route="prefill", request=scene.target.request_id, after_bytes=at)


def events(scene: Scene, action: Literal["reset", "swallow"], direction: Literal["request", "reply"]) -> Rule:
    """A rule for the connections of the decode worker that has the target."""
    route = "events" if action == "reset" else None
    return Rule(action, direction, worker=scene.victim("decode").worker, route=route)


# -- proofs


def sent_again(scene: Scene, blow: Blow) -> str:
    """The gateway gave the target to a decode worker once more, after the blow."""
    again = scene.exchanges("decode", blow.struck_s)
    if not again or scene.target.ended_s < blow.struck_s:
        return ""
    return f"{blow.victim} had it, {again[-1].worker} got it {again[0].started_s - blow.struck_s:.2f} s later"


def taken_from_victim(scene: Scene, blow: Blow) -> str:
    """The target was sent to a victim after the blow, and to another worker after that."""
    workers = [exchange.worker for exchange in scene.exchanges("decode", blow.struck_s)]
    if len(workers) < 2 or workers[0] not in blow.victim.split(", "):
        return ""
    return f"sent to {', then to '.join(workers)}"


def prompt_changed(scene: Scene, blow: Blow) -> str:
    """The decode worker reports that the prompt's KV came otherwise than planned."""
    fallback = scene.target.own.get("fallback")
    return f"reported: {fallback}" if fallback else ""


def rule_touched(scene: Scene, blow: Blow) -> str:
    """The proxy broke bytes of the target."""
    assert blow.rule is not None
    met = any(name.startswith(scene.target.request_id) for name in blow.rule.touched)
    return f"{blow.rule.action}: {blow.rule.touched_bytes} bytes of its KV" if met else ""


def went_on(scene: Scene, blow: Blow) -> str:
    """The target was in the victim when it was struck, and got tokens afterwards."""
    later = [at for at in scene.target.arrivals_s if at > blow.struck_s]
    return f"{blow.victim} had it, {len(later)} pieces came afterwards" if later else ""


def touched_and_went_on(scene: Scene, blow: Blow) -> str:
    """The proxy disturbed the victim's connections while the target was in it."""
    assert blow.rule is not None
    said = went_on(scene, blow)
    return f"{blow.rule.action}: {blow.rule.touched_bytes} bytes; {said}" if blow.rule.touched_bytes and said else ""


def _slow(scene: Scene) -> Rule:
    return Rule(
        "slow", route="prefill", request=scene.target.request_id, bytes_per_s=max(1.0, scene.kv_bytes / _SLOWER_S)
    )


def _late(scene: Scene) -> Rule:
    return Rule("slow", worker=scene.victim("decode").worker, delay_s=_LATENCY_S)


_ALL: Final = (
    Kind(
        "kill_decode_first",
        "kill -9, before the first token",
        "prompt",
        by_ending("decode", signal.SIGKILL),
        sent_again,
    ),
    Kind("kill_decode_middle", "kill -9, in the middle", "middle", by_ending("decode", signal.SIGKILL), sent_again),
    Kind("kill_decode_last", "kill -9, near the last token", "last", by_ending("decode", signal.SIGKILL), sent_again),
    Kind(
        "kill_prefill_computing",
        "kill -9, computing",
        "computing",
        by_ending("prefill", signal.SIGKILL),
        prompt_changed,
    ),
    Kind(
        "kill_prefill_transfer", "kill -9, sending KV", "transfer", by_ending("prefill", signal.SIGKILL), prompt_changed
    ),
    Kind("stop_decode", "SIGSTOP, SIGCONT 8 s later", "middle", asleep("decode"), sent_again),
    Kind(
        "stop_decode_unnoticed",
        "SIGSTOP to all but one, then the request",
        "before",
        asleep_unnoticed,
        taken_from_victim,
        needs_all=True,
    ),
    Kind("stop_prefill", "SIGSTOP, SIGCONT 8 s later", "transfer", asleep("prefill"), prompt_changed),
    Kind("reset_transfer", "TCP reset in the KV", "before", by_rule(lambda s: transfer(s, "reset")), rule_touched),
    Kind(
        "close_transfer", "closed after k bytes of KV", "before", by_rule(lambda s: transfer(s, "close")), rule_touched
    ),
    Kind("flip_transfer", "one bit of the KV flipped", "before", by_rule(lambda s: transfer(s, "flip")), rule_touched),
    Kind("hole_transfer", "KV swallowed, one way", "before", by_rule(lambda s: transfer(s, "swallow")), rule_touched),
    Kind(
        "reset_events",
        "TCP reset of the token stream",
        "middle",
        by_rule(lambda s: events(s, "reset", "reply")),
        sent_again,
    ),
    Kind(
        "hole_from_decode",
        "what D says is swallowed",
        "middle",
        by_rule(lambda s: events(s, "swallow", "reply")),
        sent_again,
    ),
    Kind(
        "hole_to_decode",
        "what D is told is swallowed",
        "middle",
        by_rule(lambda s: events(s, "swallow", "request")),
        touched_and_went_on,
    ),
    Kind("slow_transfer", "bandwidth cut: KV takes 1.5 s more", "before", by_rule(_slow), rule_touched),
    Kind("late_decode", "50-150 ms for everything D says", "middle", by_rule(_late), touched_and_went_on),
    Kind(
        "restore_refused",
        "P is of another model",
        "before",
        stranger,
        prompt_changed,
        needs_strangers=True,
    ),
    Kind("oom_decode", "killed for its memory (cgroup)", "middle", out_of_memory, sent_again),
    Kind("drain_decode", "SIGTERM", "middle", by_ending("decode", signal.SIGTERM), went_on),
    Kind("drain_prefill", "SIGTERM while sending KV", "transfer", by_ending("prefill", signal.SIGTERM), went_on),
    Kind("rolling_restart", "SIGTERM to every worker in turn", "middle", rolling_restart, went_on, needs_all=True),
)
KINDS: Final[Mapping[str, Kind]] = {kind.name: kind for kind in _ALL}
