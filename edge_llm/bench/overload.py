"""`edge-llm bench overload`: ten times as many requests as a cluster can answer.

Owns the experiment, once for work that waits for slots (short prompts, long answers) and once for work that waits for
prompts to be read (the reverse). Capacity is what a closed loop of clients gets through when the cluster is never idle.
Then an open loop offers just that (Poisson), which gives the time to first token at capacity; then ten times that, and
without a pause half of it again. The bound on the predicted wait is the gateway's setting, the same all along.
Refuses to know how clusters are started, and the gateway's code: everything is seen by clients over HTTP.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from edge_llm.bench.cpu_share import cpu_shares, read_cpu
from edge_llm.bench.layout import Launch, Layout, Started
from edge_llm.bench.processes import MeasureFailed
from edge_llm.bench.run import Run
from edge_llm.bench.serve.answers import Answer, Call
from edge_llm.bench.serve.arrivals import poisson
from edge_llm.bench.simulated_load import (
    LATE_SHARE,
    complaint,
    line_of,
    offer,
    queue_s,
    saturate,
    simulated_call,
    took_s,
)
from edge_llm.bench.stats import percentile

# Half and one and a half times the middle length: waiting is harder to predict when sizes differ.
_SPREAD: Final = (0.5, 1.5)
_PERCENTILES: Final = {"p50": 0.5, "p95": 0.95, "max": 1.0}
BARS: Final[Mapping[str, float]] = {
    "rejection_ms_p95": 100.0,
    "ttft_ratio_p95": 2.0,
    "failed": 0,
    "lost": 0,
    "unexplained": 0,
    "recovery_s": 1.0,
}


@dataclass(frozen=True, slots=True)
class Load:
    """Requests around these sizes, in tokens."""

    name: str
    prompt_tokens: int
    answer_tokens: int


LOADS: Final = (Load("answers", 60, 48), Load("prompts", 400, 6))


@dataclass(frozen=True, slots=True)
class Plan:
    """Seconds of each part; of `capacity_s` and `overload_s` the first `settle_s` say nothing about the time to first
    token. `capacity_s` is the longest: at full load waiting comes and goes slowly (in runs of 20 s its p95 was between
    1.1 and 2.3 s). `clients`: of the closed loop, more than there are slots."""

    loads: tuple[Load, ...] = LOADS
    factor: float = 10.0
    wait_bound_s: float = 1.0
    clients: int = 16
    saturate_s: float = 12.0
    capacity_s: float = 60.0
    overload_s: float = 20.0
    recovery_s: float = 6.0
    settle_s: float = 3.0
    seed: int = 1
    prompt_tokens_per_s: float = 1000.0
    step_s: float = 0.010
    row_s: float = 0.002

    @property
    def config(self) -> dict[str, Any]:
        """For the record."""
        return {"arrivals": "closed loop, then Poisson", **asdict(self)}

    @property
    def layout(self) -> Layout:
        reading = ("--simulated-prompt-tokens-per-s", str(self.prompt_tokens_per_s))
        writing = ("--simulated-step-s", str(self.step_s), "--simulated-row-s", str(self.row_s))
        size = ("--n-ctx", "2048", "--slots", "4", "--chunk-tokens", "64")
        bounds = ("--queue-predicted-wait-s", str(self.wait_bound_s), "--log-level", "warning")
        return Layout("overload", prefill=1, decode=2, options=(*size, *reading, *writing), gateway_options=bounds)


async def measure(plan: Plan, launch: Launch, run: Run, progress: Any) -> dict[str, Any]:
    """Each load on a cluster of its own."""
    run.workload |= plan.config
    for load in plan.loads:
        progress(f"starting a cluster for {load.name}", 0, 0)
        async with launch(plan.layout) as cluster:
            await _Part(plan, load, cluster, run, progress).measure()
    return figures(plan, run)


class _Part:
    """One load on one cluster."""

    def __init__(self, plan: Plan, load: Load, cluster: Started, run: Run, progress: Any) -> None:
        self._plan, self._load, self._cluster, self._run = plan, load, cluster, run
        self._say: Callable[[str], None] = lambda what: progress(f"{load.name}: {what}", 0, 0)
        self._rng = random.Random(plan.seed)
        self._number = 0

    async def measure(self) -> None:
        plan = self._plan
        per_s = await self._capacity()
        self._say(f"offering its capacity, {per_s:.2f} requests/s")
        answers = await offer(self._cluster.url, list(self._calls(per_s, 0.0, plan.capacity_s)))
        self._note("capacity", answers)
        self._say(f"offering {plan.factor:g} times that")
        over_s = plan.overload_s
        calls = [
            *self._calls(plan.factor * per_s, 0.0, over_s),
            *self._calls(0.5 * per_s, over_s, over_s + plan.recovery_s),
        ]
        before = read_cpu(self._cluster.processes)
        answers = await offer(self._cluster.url, calls)
        for group, share in cpu_shares(before, read_cpu(self._cluster.processes)).items():
            self._add(f"cpu_share_{group}", share)
        self._note("overload", [answer for answer in answers if answer.at_s < over_s])
        self._note("recovery", [answer for answer in answers if answer.at_s >= over_s])

    async def _capacity(self) -> float:
        """Answers a second while the cluster is kept full."""
        plan = self._plan
        self._say("finding its capacity")
        endless = (self._call(0.0) for _ in itertools.count())
        answers = await saturate(self._cluster.url, endless, plan.clients, plan.saturate_s)
        from_s, until_s = plan.settle_s, plan.saturate_s
        ended = [one for one in answers if one.is_complete and from_s <= (one.ended_s or 0.0) < until_s]
        if not ended:
            raise MeasureFailed(f"no request was answered: {complaint(answers[-1]) if answers else 'nothing came'}")
        for answer in ended:
            self._add("closed_loop.ttft_s", answer.ttft_s or took_s(answer))
        per_s = len(ended) / (until_s - from_s)
        self._add("capacity_per_s", per_s)
        return per_s

    def _calls(self, per_s: float, from_s: float, until_s: float) -> Iterator[Call]:
        return (self._call(due_s) for due_s in poisson(per_s, from_s, until_s, self._rng))

    def _call(self, due_s: float) -> Call:
        self._number += 1
        prompt, answer = (
            max(2, round(tokens * self._rng.uniform(*_SPREAD)))
            for tokens in (self._load.prompt_tokens, self._load.answer_tokens)
        )
        return simulated_call(due_s, prompt, answer, self._number)

    def _note(self, kind: str, answers: Sequence[Answer]) -> None:
        """Samples of one part."""
        codes = Counter[str]()
        for answer in answers:
            self._add("late_s", answer.late_s)
            self._run.case({"case": f"{self._load.name}, {kind}", **line_of(answer)})
            due_s = answer.at_s
            if answer.is_complete:
                self._add(f"{kind}.accepted_at_s", due_s)
                if kind == "recovery" or due_s >= self._plan.settle_s:
                    self._add(f"{kind}.ttft_s", answer.ttft_s or took_s(answer))
                    self._add(f"{kind}.wait_s", queue_s(answer) or 0.0)
            elif answer.is_refused:
                codes[f"{answer.status} {answer.code}"] += 1
                self._add(f"{kind}.refused_at_s", due_s)
                self._add(f"{kind}.rejection_s", took_s(answer))
                if answer.retry_after_s is None:
                    self._add(f"{kind}.unexplained", 1)
                else:
                    self._add(f"{kind}.retry_after_s", answer.retry_after_s)
            else:
                self._add(f"{kind}.{'failed' if answer.status == 200 else 'lost'}", 1)
                self._run.notes.append(f"{self._load.name}, {kind}, at {due_s:.1f} s: {complaint(answer)}")
        for code, count in codes.items():
            self._add(f"{kind}.code {code}", count)

    def _add(self, name: str, value: float) -> None:
        self._run.add(f"{self._load.name}.{name}", value)


# -- results


def figures(plan: Plan, run: Run) -> dict[str, Any]:
    """What is there so far."""
    found: dict[str, Any] = {"factor": plan.factor, "wait_bound_s": plan.wait_bound_s}
    return found | {load.name: _of(load.name, plan, run) for load in plan.loads}


def _of(load: str, plan: Plan, run: Run) -> dict[str, Any]:
    samples = {name.removeprefix(f"{load}."): values for name, values in run.samples.items() if name.startswith(load)}
    found: dict[str, Any] = {}
    if rates := samples.get("capacity_per_s"):
        found |= {"capacity_per_s": round(rates[0], 3), "offered_per_s": round(plan.factor * rates[0], 2)}
    for kind in ("closed_loop", "capacity", "overload", "recovery"):
        found |= _spread(f"ttft_{kind}_s", samples.get(f"{kind}.ttft_s"))
        found |= _spread(f"wait_{kind}_s", samples.get(f"{kind}.wait_s"))
    for kind in ("closed_loop", "capacity"):
        name = "ttft_ratio_p95" if kind == "capacity" else f"ttft_ratio_p95_to_{kind}"
        if (before := samples.get(f"{kind}.ttft_s")) and (during := samples.get("overload.ttft_s")):
            found[name] = round(percentile(during, 0.95) / percentile(before, 0.95), 3)
    if accepted := samples.get("overload.accepted_at_s"):
        found["accepted"], found["refused"] = len(accepted), len(samples.get("overload.refused_at_s", []))
        found |= _spread("rejection_ms", [1e3 * took_s for took_s in samples.get("overload.rejection_s", [])])
        found["codes"] = {
            name.removeprefix("overload.code "): int(sum(values))
            for name, values in samples.items()
            if name.startswith("overload.code ")
        }
        found |= _spread("retry_after_s", samples.get("overload.retry_after_s"))
        for name in ("failed", "lost", "unexplained"):
            found[name] = sum(len(samples.get(f"{kind}.{name}", [])) for kind in ("capacity", "overload", "recovery"))
        refused_s = samples.get("recovery.refused_at_s", [])
        found["recovery_s"] = round(max(refused_s) - plan.overload_s, 3) if refused_s else 0.0
        found["refused_at_capacity"] = len(samples.get("capacity.refused_at_s", []))
    for group in ("all", "gateway", "workers", "client"):
        if shares := samples.get(f"cpu_share_{group}"):
            found.setdefault("cpu_share", {})[group] = shares[0]
    if late := samples.get("late_s"):
        found["late_ms"] = {"p99": round(1e3 * percentile(late, 0.99), 2), "max": round(1e3 * max(late), 2)}
    return found


def _spread(name: str, samples: Sequence[float] | None) -> dict[str, float]:
    if not samples:
        return {}
    return {f"{name}_{key}": round(percentile(samples, share), 4) for key, share in _PERCENTILES.items()}


def missed(found: Mapping[str, Any], plan: Plan) -> list[str]:
    """Which bars were not met, as lines for people."""
    return [line for load in plan.loads for line in _missed_by(load.name, found.get(load.name, {}))]


def _missed_by(load: str, found: Mapping[str, Any]) -> Iterator[str]:
    for name, bar in BARS.items():
        if name not in found:
            yield f"{load}: {name} was not measured"
        elif found[name] > bar:
            yield f"{load}: {name} is {found[name]:.4g}, not at most {bar:g}"
    late_ms, most_ms = found.get("late_ms", {}).get("p99", 0.0), LATE_SHARE * BARS["rejection_ms_p95"]
    if late_ms > most_ms:
        yield f"{load}: requests left late, {late_ms:.4g} ms at p99, not at most {most_ms:g}: the generator's figures"
