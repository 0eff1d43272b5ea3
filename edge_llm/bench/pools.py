"""`edge-llm bench pools`: eight workers under a trace that turns from conversation to code and back.

Owns the trace, its windows and what is counted in them. Each policy gets a cluster of its own and the same requests at
the same times; what it did is seen from outside: times at the client, pool events from GET /cluster, the wait for a
worker from the answers' own timings. Lengths follow the Azure LLM inference traces 2023 (CC BY 4.0; Patel et al.,
"Splitwise", ISCA 2024) by their quantiles, up to the 99th percentile, scaled; times are Poisson at a rate per phase.
Refuses to know how clusters are started, and the gateway's code.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

import aiohttp

from edge_llm.bench.cpu_share import cpu_shares, read_cpu
from edge_llm.bench.layout import Launch, Layout, LocalProcess
from edge_llm.bench.run import Run
from edge_llm.bench.serve.answers import Answer, Call
from edge_llm.bench.serve.arrivals import poisson
from edge_llm.bench.simulated_load import LATE_SHARE, complaint, line_of, offer, queue_s, simulated_call, took_s
from edge_llm.bench.stats import percentile

Kind = Literal["conv", "code"]
# Quantiles 0, 5, 10, 20, 25, 30, 40, 50, 60, 70, 75, 80, 90, 95 and 99 % of all rows of the two files, computed from
# AzureLLMInferenceTrace_{conv,code}.csv (data/ of the repository AzurePublicDataset, commit b469a11).
_SHARES: Final = (0.0, 0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 0.99)
_PROMPTS: Final[Mapping[Kind, tuple[int, ...]]] = {
    "conv": (2, 181, 207, 387, 396, 403, 703, 1020, 1071, 1130, 1189, 1315, 2734, 4083, 4142),
    "code": (3, 75, 147, 386, 578, 770, 1075, 1469, 1909, 2433, 2745, 3192, 5186, 7302, 7436),
}
_ANSWERS: Final[Mapping[Kind, tuple[int, ...]]] = {
    "conv": (7, 41, 54, 77, 85, 91, 103, 129, 177, 384, 395, 400, 424, 451, 601),
    "code": (6, 6, 7, 8, 9, 9, 11, 13, 16, 20, 24, 29, 55, 90, 252),
}
# The scheduler; and the classical policy: join the shortest queue, by the number of requests.
OURS: Final = "predicted"
SHORTEST_QUEUE: Final = "least_busy"
_PERCENTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_LOOK_S: Final = 1.0
# The gateway's clock and ours are the machine's: events are asked for their time, and may be a little older than 0.
_EVENTS_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Phase:
    """Requests of one kind from the end of the phase before until `until_s`."""

    kind: Kind
    until_s: float
    per_s: float


# In tokens per second of prompt, with lengths halved: conversation is about half of what four prefill workers read,
# code a third more than that, which all eight could. Long enough for the pools to notice a turn (20 s means, sustained
# for 20 s) and to go back after it.
PHASES: Final = (Phase("conv", 25.0, 3.2), Phase("code", 85.0, 5.2), Phase("conv", 185.0, 3.2))


@dataclass(frozen=True, slots=True)
class Plan:
    """`scale` multiplies lengths; `turn_s` after a turn counts as during it. `wait_bound_s`: the gateway's."""

    policies: tuple[str, ...] = (OURS, SHORTEST_QUEUE, "random", "round_robin")
    phases: tuple[Phase, ...] = PHASES
    seed: int = 7
    scale: float = 0.5
    turn_s: float = 25.0
    wait_bound_s: float = 30.0
    prompt_tokens_per_s: float = 1000.0
    step_s: float = 0.015
    row_s: float = 0.005
    one_by_one: bool = False

    @property
    def turns_s(self) -> tuple[float, ...]:
        return tuple(phase.until_s for phase in self.phases[:-1])

    @property
    def config(self) -> dict[str, Any]:
        """For the record."""
        return {
            "lengths": "Azure LLM inference traces 2023 (CC BY 4.0), quantiles up to 0.99, times `scale`",
            "arrivals": "Poisson, a rate for each phase",
            "side_by_side": not self.one_by_one,
            **asdict(self),
        }

    def layout_of(self, policy: str) -> Layout:
        reading = ("--simulated-prompt-tokens-per-s", str(self.prompt_tokens_per_s))
        writing = ("--simulated-step-s", str(self.step_s), "--simulated-row-s", str(self.row_s))
        size = ("--n-ctx", "4096", "--slots", "8", "--chunk-tokens", "64")
        bounds = ("--queue-predicted-wait-s", str(self.wait_bound_s), "--queue-wait-s", str(self.wait_bound_s))
        chosen = ("--policy", policy, "--policy-seed", str(self.seed), "--log-level", "warning")
        return Layout(
            policy, prefill=4, decode=4, options=(*size, *reading, *writing), gateway_options=(*chosen, *bounds)
        )

    @property
    def windows(self) -> dict[str, float]:
        """Name of each window and where it ends: what came before a turn, during it, and after it."""
        ends: dict[str, float] = {}
        for number, phase in enumerate(self.phases):
            began_s = self.phases[number - 1].until_s if number else 0.0
            if number:
                ends[f"turn_{number}_to_{phase.kind}"] = min(began_s + self.turn_s, phase.until_s)
            ends[f"{phase.kind}_{number + 1}"] = phase.until_s
        return ends

    def window(self, due_s: float) -> str:
        return next((name for name, until_s in self.windows.items() if due_s < until_s), list(self.windows)[-1])


@dataclass(slots=True)
class Seen:
    """What GET /cluster said of the pools, without what it said twice: (at_s, kind, worker, born, to, why)."""

    events: dict[str, set[tuple[float, str, str, str, str, str]]] = field(default_factory=dict)

    def of(self, policy: str, kind: str) -> list[tuple[float, str, str, str, str, str]]:
        return sorted(event for event in self.events.get(policy, set()) if event[1] == kind)


def calls(plan: Plan) -> list[Call]:
    """The trace: the same for the same seed."""
    return list(_calls(plan, random.Random(plan.seed)))


def _calls(plan: Plan, rng: random.Random) -> Iterator[Call]:
    from_s, number = 0.0, 0
    for phase in plan.phases:
        for due_s in poisson(phase.per_s, from_s, phase.until_s, rng):
            number += 1
            prompt = max(8, round(plan.scale * drawn(_PROMPTS[phase.kind], rng)))
            answer = max(2, round(plan.scale * drawn(_ANSWERS[phase.kind], rng)))
            yield simulated_call(due_s, prompt, answer, number)
        from_s = phase.until_s


def drawn(quantiles: Sequence[int], rng: random.Random) -> float:
    """A length with these quantiles (at `_SHARES`), linear between them."""
    share = rng.uniform(_SHARES[0], _SHARES[-1])
    above = next(at for at, known in enumerate(_SHARES) if at and share <= known)
    low, high = quantiles[above - 1], quantiles[above]
    return low + (high - low) * (share - _SHARES[above - 1]) / (_SHARES[above] - _SHARES[above - 1])


async def measure(plan: Plan, launch: Launch, seen: Seen, run: Run, progress: Any) -> dict[str, Any]:
    """All policies, side by side or one after the other."""
    run.workload |= plan.config
    if plan.one_by_one:
        for policy in plan.policies:
            await _together(plan, [policy], launch, seen, run, progress)
    else:
        await _together(plan, plan.policies, launch, seen, run, progress)
    return figures(plan, seen, run)


async def _together(plan: Plan, policies: Sequence[str], launch: Launch, seen: Seen, run: Run, progress: Any) -> None:
    """One cluster for each of `policies`; the trace begins when all are ready."""
    go = _Start(len(policies))
    name = ", ".join(policies)
    tasks = [asyncio.create_task(_on_a_cluster(plan, policy, launch, go, seen, run)) for policy in policies]
    watching = asyncio.create_task(_watch(plan, name, go, run, progress))
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in (*tasks, watching):
            task.cancel()
        await asyncio.gather(*tasks, watching, return_exceptions=True)


@dataclass(slots=True)
class _Start:
    """Whoever is ready waits here for the others."""

    missing: int
    began_s: float = 0.0
    everybody: asyncio.Event = field(default_factory=asyncio.Event)
    processes: list[LocalProcess] = field(default_factory=list)

    async def ready(self, processes: Sequence[LocalProcess]) -> float:
        """When time 0 is."""
        self.processes.extend(processes)
        self.missing -= 1
        if not self.missing:
            self.began_s = time.monotonic() + 1.0
            self.everybody.set()
        await self.everybody.wait()
        return self.began_s


async def _watch(plan: Plan, name: str, go: _Start, run: Run, progress: Any) -> None:
    """Progress, and the share of the CPU that was used, until cancelled."""
    progress(f"starting clusters for {name}", 0, 0)
    await go.everybody.wait()
    before, whole_s = read_cpu(go.processes), plan.phases[-1].until_s
    while True:
        await asyncio.sleep(_EVENTS_S)
        progress(f"{name}: seconds of the trace", round(min(whole_s, time.monotonic() - go.began_s)), round(whole_s))
        now = read_cpu(go.processes)
        for group, share in cpu_shares(before, now).items():
            run.add(f"cpu_share_{group}", share)
        before = now


async def _on_a_cluster(plan: Plan, policy: str, launch: Launch, go: _Start, seen: Seen, run: Run) -> None:
    async with launch(plan.layout_of(policy)) as cluster:
        began_s = await go.ready(cluster.processes)
        watching = asyncio.create_task(_look(cluster.url, policy, began_s, seen))
        try:
            await offer(cluster.url, calls(plan), lambda answer: _count(plan, policy, answer, run), began_s)
            await asyncio.sleep(2 * _LOOK_S)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


async def _look(url: str, policy: str, began_s: float, seen: Seen) -> None:
    """Ask again and again what the pools did."""
    events = seen.events.setdefault(policy, set())
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=_EVENTS_S)) as session:
        while True:
            try:
                async with session.get("/cluster") as reply:
                    for event in (await reply.json())["pool_events"]:
                        told = (event[key] for key in ("kind", "worker", "born", "to", "why"))
                        events.add((round(event["at_s"] - began_s, 2), *told))
            except (aiohttp.ClientError, TimeoutError):
                pass  # the next answer has what this one would have had
            await asyncio.sleep(_LOOK_S)


def _count(plan: Plan, policy: str, answer: Answer, run: Run) -> None:
    """One answer is over. Its delay is all of the time to first token (of a refusal: until it came) that its prompt
    alone would not have taken: in the queue, at a worker behind other prompts, beside streams."""
    due_s, delay_s = answer.at_s, took_s(answer)
    window = plan.window(due_s)
    run.add("late_s", answer.late_s)
    run.case({"case": f"{policy}, {window}", **line_of(answer)})
    if answer.is_complete and answer.ttft_s is not None:
        alone_s = answer.asked_prompt_tokens / plan.prompt_tokens_per_s
        delay_s = max(0.0, answer.ttft_s - alone_s)
        run.add(f"{policy}.queue_s", queue_s(answer) or 0.0)
        for name in (window, "all"):
            run.add(f"{policy}.{name}.ttft_s", answer.ttft_s)
            if answer.tpot_s is not None:
                run.add(f"{policy}.{name}.tpot_s", answer.tpot_s)
    elif answer.is_refused:
        run.add(f"{policy}.refused_at_s", due_s)
    elif answer.code == "overloaded":  # let in, and sent away in its stream after all
        run.add(f"{policy}.refused_late_at_s", due_s)
    else:
        run.add(f"{policy}.failed_at_s", due_s)
        run.notes.append(f"{policy}: the request at {due_s:.1f} s failed: {complaint(answer)}")
    run.add(f"{policy}.delay_s", delay_s)


# -- results


def figures(plan: Plan, seen: Seen, run: Run) -> dict[str, Any]:
    """What is there so far."""
    found: dict[str, Any] = {
        "requests": len(calls(plan)),
        "turns_at_s": list(plan.turns_s),
        "wait_bound_s": plan.wait_bound_s,
        "policies": {policy: _of(policy, plan, seen, run) for policy in plan.policies},
    }
    for mine in (OURS, SHORTEST_QUEUE):
        for policy in plan.policies:
            if policy not in (OURS, mine) and (ratios := _ttft_ratios(run, mine, policy)):
                found[f"ttft_{mine}_over_{policy}"] = ratios
    for name in ("all", "gateway", "workers", "client"):
        if shares := run.samples.get(f"cpu_share_{name}"):
            found.setdefault("cpu_share", {})[name] = round(sum(shares) / len(shares), 3)
    if late := run.samples.get("late_s"):
        found["late_ms"] = {"p99": round(1e3 * percentile(late, 0.99), 2), "max": round(1e3 * max(late), 2)}
    return found


def _ttft_ratios(run: Run, mine: str, other: str) -> dict[str, float]:
    """By percentile; empty when one of them has no answer."""
    ours, theirs = (run.samples.get(f"{policy}.all.ttft_s") for policy in (mine, other))
    if not ours or not theirs:
        return {}
    return {name: round(percentile(ours, share) / percentile(theirs, share), 3) for name, share in _PERCENTILES.items()}


def _of(policy: str, plan: Plan, seen: Seen, run: Run) -> dict[str, Any]:
    delays, queued = run.samples.get(f"{policy}.delay_s"), run.samples.get(f"{policy}.queue_s")
    return {
        "answered": len(run.samples.get(f"{policy}.all.ttft_s", [])),
        "refused": len(run.samples.get(f"{policy}.refused_at_s", [])),
        "refused_late": len(run.samples.get(f"{policy}.refused_late_at_s", [])),
        "failed": len(run.samples.get(f"{policy}.failed_at_s", [])),
        "longest_wait_s": round(max(delays), 3) if delays else None,
        "longest_in_queue_s": round(max(queued), 3) if queued else None,
        "events": _events(policy, plan, seen),
        "ttft_s": {name: _spread(run, f"{policy}.{name}.ttft_s") for name in (*plan.windows, "all")},
        "tpot_s": {name: _spread(run, f"{policy}.{name}.tpot_s") for name in (*plan.windows, "all")},
    }


def _events(policy: str, plan: Plan, seen: Seen) -> dict[str, Any]:
    spills = [event[0] for event in seen.of(policy, "spill")]
    windows = [plan.window(at_s) for at_s in spills]
    moves = seen.of(policy, "repurpose") + seen.of(policy, "return")
    return {
        "spills": len(spills),
        "spills_by_window": {name: windows.count(name) for name in plan.windows if name in windows},
        "moves": [f"{at_s:.1f} s: {kind} {worker} to {to}, {why}" for at_s, kind, worker, _, to, why in sorted(moves)],
        "repurposed_at_s": [event[0] for event in seen.of(policy, "repurpose")],
        "returned_at_s": [event[0] for event in seen.of(policy, "return")],
    }


def _spread(run: Run, name: str) -> dict[str, float] | None:
    samples = run.samples.get(name)
    if not samples:
        return None
    return {"n": len(samples), **{key: round(percentile(samples, share), 4) for key, share in _PERCENTILES.items()}}


def missed(found: Mapping[str, Any]) -> list[str]:
    """What the scheduler promises of itself, and did not do, as lines for people."""
    ours = found["policies"].get(OURS)
    if ours is None or not ours["answered"]:
        return [f"{OURS} was not measured"]
    kinds = [name for name in ("refused", "refused_late", "failed") if ours[name]]
    lines = [f"{ours[name]} requests were {name.replace('_', ' ')}, not 0" for name in kinds]
    if ours["longest_wait_s"] > found["wait_bound_s"]:
        lines.append(f"a request waited {ours['longest_wait_s']:.1f} s, more than its bound {found['wait_bound_s']} s")
    late_ms, most_ms = found.get("late_ms", {}).get("p99", 0.0), 1e3 * LATE_SHARE * ours["ttft_s"]["all"]["p90"]
    if late_ms > most_ms:
        lines.append(f"requests left {late_ms:.4g} ms late at p99, not at most {most_ms:.4g}: figures of the generator")
    lines += _missing_moves(ours["events"], found["turns_at_s"])
    for name, ratios in found.items():
        if name.startswith(f"ttft_{OURS}_over_") and ratios["p90"] >= 1.0:
            lines.append(f"{name} is {ratios['p90']:.3g} at p90, not below 1")
    return lines


def _missing_moves(events: Mapping[str, Any], turns_s: Sequence[float]) -> Iterator[str]:
    lent = [at_s for at_s in events["repurposed_at_s"] if turns_s[0] < at_s]
    if not any("to_code" in window or window.startswith("code") for window in events["spills_by_window"]):
        yield "no request spilled after the turn to code"
    if not lent:
        yield "no node changed sides after the turn to code"
    elif not any(at_s > lent[0] for at_s in events["returned_at_s"]):
        yield "the node that changed sides did not come back"
