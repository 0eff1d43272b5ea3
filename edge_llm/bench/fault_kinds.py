"""The kinds of fault, each as a moment in a stream's life, a blow from outside, and the proof that it met the stream.

Owns the list and how each is done: signals, the proxy's rules, a cgroup limit, another worker behind an address. There
is no switch for any of it in the workers. Refuses to know how many are struck and what the answers should be.

A kind's `strike` runs when its moment has come and returns what it did, and what is still to fall (fault_scene.py).
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal

from edge_llm.bench.fault_scene import Blow, Hit, Moment, NotStruck, Role, Scene
from edge_llm.bench.memory_limit import MemoryGroup
from edge_llm.bench.proxy import Rule

# Within these a worker is to be out of use, by how its end shows: it says so itself, its connections break, it is mute.
TOLD_S: Final = 0.0
DEAD_S: Final = 1.0
SILENT_S: Final = 6.0
# Who slept wakes up when so many tokens came from elsewhere: somewhere in the time in which the gateway finds it again.
AWAKE_TOKENS: Final = (8, 60)
# What it then has to say for a plan that is over takes a probe to arrive: so long the stream must still live.
AWAKE_S: Final = 1.0
# A kill by the kernel comes with the next page that the worker touches.
KILLED_S: Final = 5.0
# Within it some stream comes to every worker, while streams follow one another.
IN_FLIGHT_S: Final = 20.0
_LOOK_S: Final = 0.02
_JOIN_TURNS: Final = 25
_SLOWER_S: Final = 1.5
_LATENCY_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Kind:
    """`proof` says, after the streams ended, whether the blow met the target: empty means it did not. `detection_s`:
    within it the fault is to be found, or passes by itself. `is_long`: its answers, `times_as_long` as other long ones,
    must outlast what is done. `keeps_streams`: one stream follows another as long as the blow's second half falls.
    `moves_kv`: the victim lives long enough to give its KV away, so nothing need be computed again."""

    name: str
    words: str
    moment: Moment
    strike: Callable[[Scene], Awaitable[Blow]]
    proof: Callable[[Scene, Blow], str]
    detection_s: float = DEAD_S
    needs_strangers: bool = False
    needs_all: bool = False
    is_long: bool = False
    times_as_long: int = 1
    keeps_streams: bool = False
    moves_kv: bool = False


# -- blows


def by_ending(role: Role, number: signal.Signals) -> Callable[[Scene], Awaitable[Blow]]:
    async def strike(scene: Scene) -> Blow:
        victim = scene.victim(role).worker
        scene.end(victim, number)
        return Blow(victim, time.monotonic())

    return strike


def asleep(role: Role) -> Callable[[Scene], Awaitable[Blow]]:
    """SIGSTOP; SIGCONT when the target goes on elsewhere, while the worker still believes in its sequences."""

    async def strike(scene: Scene) -> Blow:
        return _stopped(scene, [scene.victim(role).worker])

    return strike


async def asleep_untold(scene: Scene) -> Blow:
    """SIGSTOP, and the cancellation is lost on its way: it would wait for the worker and stop it before it speaks."""
    victim = scene.victim("decode").worker
    blow = _stopped(scene, [victim])
    lost = Rule("swallow", "request", worker=victim, route="cancel")
    scene.proxy.rules.append(lost)

    async def heal() -> None:
        scene.proxy.lift(lost)
        _send(scene, [victim], signal.SIGCONT)

    blow.heal = heal
    return blow


async def asleep_unnoticed(scene: Scene) -> Blow:
    """SIGSTOP to all decode workers but one, a moment before the request comes: it is likely sent to one of them."""
    decoders = sorted(name for name in scene.pids if name.startswith("decode"))
    return _stopped(scene, scene.rng.sample(decoders, len(decoders) - 1))


def _stopped(scene: Scene, victims: Sequence[str]) -> Blow:
    """All of them at once, and they wake at once."""
    blow = Blow(", ".join(victims), time.monotonic())
    _send(scene, victims, signal.SIGSTOP)
    tokens = scene.rng.randint(*AWAKE_TOKENS)

    def goes_on() -> bool:
        return scene.target.is_over or sum(at > blow.struck_s for at in scene.target.arrivals_s) >= tokens

    async def wake() -> None:
        with suppress(TimeoutError):  # a stream that does not go on is lost; it is judged, and nobody stays asleep
            await scene.until(goes_on)
        blow.woken_s = time.monotonic()
        _send(scene, victims, signal.SIGCONT)

    async def heal() -> None:
        _send(scene, victims, signal.SIGCONT)

    blow.second_half, blow.heal = asyncio.create_task(wake(), name="wake"), heal
    return blow


def _send(scene: Scene, workers: Sequence[str], number: signal.Signals) -> None:
    for worker in workers:
        with suppress(ProcessLookupError):  # who is gone had no stream: the proof fails
            os.kill(scene.pids[worker], number)


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

        return Blow(rule.worker or "prefill worker", time.monotonic(), rule, heal=lift)

    return strike


async def stranger(scene: Scene) -> Blow:
    """The addresses of the prefill workers lead to one that serves another model: a roll-out gone wrong."""
    scene.proxy.divert("prefill", scene.stranger_ports)

    async def back() -> None:
        scene.proxy.divert("prefill", {})

    return Blow("prefill workers", time.monotonic(), heal=back)


async def rolling_restart(scene: Scene) -> Blow:
    """SIGTERM to one worker after another, each with a stream in it, the next when all are ready again."""
    first = scene.victim("decode").worker
    blow = Blow(first, time.monotonic())
    _terminate(scene, blow, first)

    async def the_others() -> None:
        for name in scene.pids:
            if name != first:
                await scene.all_ready()
                await _until_it_has_a_stream(scene, name)
                _terminate(scene, blow, name)
        await scene.all_ready()
        if idle := [hit.worker for hit in blow.hits if not hit.streams]:
            raise NotStruck(f"no stream was in {', '.join(idle)} when it got its signal")

    blow.second_half = asyncio.create_task(the_others(), name="rolling restart")
    return blow


async def _until_it_has_a_stream(scene: Scene, worker: str) -> None:
    """Or until it seems to get none: the restart goes on, and its end says so.

    Whom the gateway chooses is its own affair, and it may like another worker better: streams join until that one has
    no room. Two at a time, so that one prefill worker cannot have both prompts.
    """
    for turn in range(round(IN_FLIGHT_S / _LOOK_S)):
        if scene.streams_in(worker):
            return
        if turn % _JOIN_TURNS == _JOIN_TURNS - 1:
            scene.join()
            scene.join()
        await asyncio.sleep(_LOOK_S)


def _terminate(scene: Scene, blow: Blow, worker: str) -> None:
    hit = Hit(worker, time.monotonic(), tuple(scene.streams_in(worker)))
    scene.end(worker, signal.SIGTERM)
    blow.hits.append(hit)


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


def woke_late(proof: Callable[[Scene, Blow], str]) -> Callable[[Scene, Blow], str]:
    """`proof`, and who slept woke up while the target lived on elsewhere, long enough for late tokens to come."""

    def whole(scene: Scene, blow: Blow) -> str:
        said = proof(scene, blow)
        left_s = scene.target.ended_s - blow.woken_s if blow.woken_s is not None else 0.0
        if not said or left_s < AWAKE_S or blow.woken_s is None:
            return ""
        return f"{said}; woke {blow.woken_s - blow.struck_s:.2f} s later, {left_s:.2f} s before the stream's end"

    return whole


def spoke_late(scene: Scene, blow: Blow) -> str:
    """Who slept woke up late, and the gateway dropped what it said."""
    said = woke_late(sent_again)(scene, blow)
    return f"{said}; {blow.stale_tokens} late tokens dropped" if said and blow.stale_tokens else ""


def every_worker_had_one(scene: Scene, blow: Blow) -> str:
    """Each worker had a stream in flight when it got its signal."""
    if {hit.worker for hit in blow.hits if hit.streams} != set(scene.pids):
        return ""
    return "streams in flight: " + ", ".join(f"{len(hit.streams)} in {hit.worker}" for hit in blow.hits)


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


def outlasted(scene: Scene, blow: Blow) -> str:
    """The same for longer than a gateway believes in a worker that does not answer it."""
    said, lasted_s = touched_and_went_on(scene, blow), max(scene.target.arrivals_s, default=0.0) - blow.struck_s
    return f"{said} for {lasted_s:.1f} s" if said and lasted_s >= SILENT_S else ""


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
    Kind(
        "stop_decode",
        "SIGSTOP, SIGCONT while the stream goes on elsewhere",
        "early",
        asleep("decode"),
        woke_late(sent_again),
        SILENT_S,
        is_long=True,
    ),
    Kind(
        "stop_decode_untold",
        "the same, and the cancellation is lost: it goes on speaking",
        "early",
        asleep_untold,
        spoke_late,
        SILENT_S,
        is_long=True,
    ),
    Kind(
        "stop_decode_unnoticed",
        "SIGSTOP to all but one, then the request; SIGCONT while it goes on elsewhere",
        "before",
        asleep_unnoticed,
        woke_late(taken_from_victim),
        SILENT_S,
        needs_all=True,
        is_long=True,
    ),
    Kind(
        "stop_prefill",
        "SIGSTOP, SIGCONT while the stream goes on without it",
        "transfer",
        asleep("prefill"),
        woke_late(prompt_changed),
        SILENT_S,
        is_long=True,
    ),
    Kind("reset_transfer", "TCP reset in the KV", "before", by_rule(lambda s: transfer(s, "reset")), rule_touched),
    Kind(
        "close_transfer", "closed after k bytes of KV", "before", by_rule(lambda s: transfer(s, "close")), rule_touched
    ),
    Kind(
        "flip_transfer",
        "one bit of the KV flipped",
        "before",
        by_rule(lambda s: transfer(s, "flip")),
        rule_touched,
        TOLD_S,
    ),
    Kind(
        "hole_transfer",
        "KV swallowed, one way",
        "before",
        by_rule(lambda s: transfer(s, "swallow")),
        rule_touched,
        SILENT_S,
    ),
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
        SILENT_S,
    ),
    Kind(
        "hole_to_decode",
        "what D is told is swallowed, for longer than it is believed in",
        "early",
        by_rule(lambda s: events(s, "swallow", "request")),
        outlasted,
        SILENT_S,
        is_long=True,
        times_as_long=2,
    ),
    Kind("slow_transfer", "bandwidth cut: KV takes 1.5 s more", "before", by_rule(_slow), rule_touched, _SLOWER_S),
    Kind("late_decode", "50-150 ms for everything D says", "middle", by_rule(_late), touched_and_went_on),
    Kind(
        "restore_refused",
        "P is of another model",
        "before",
        stranger,
        prompt_changed,
        TOLD_S,
        needs_strangers=True,
    ),
    Kind("oom_decode", "killed for its memory (cgroup)", "middle", out_of_memory, sent_again),
    Kind("drain_decode", "SIGTERM", "middle", by_ending("decode", signal.SIGTERM), went_on, TOLD_S, moves_kv=True),
    Kind(
        "drain_prefill", "SIGTERM while sending KV", "transfer", by_ending("prefill", signal.SIGTERM), went_on, TOLD_S
    ),
    Kind(
        "rolling_restart",
        "SIGTERM to every worker in turn, each with a stream in it",
        "early",
        rolling_restart,
        every_worker_had_one,
        TOLD_S,
        needs_all=True,
        is_long=True,
        keeps_streams=True,
    ),
)
KINDS: Final[Mapping[str, Kind]] = {kind.name: kind for kind in _ALL}
