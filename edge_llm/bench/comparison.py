"""`edge-llm bench goodput`: requests of the same lengths at the same times to four ways of using two nodes.

Owns the experiment: what each arrangement is sent, how fast, in which order and for how long. The arrangements are
contestants.py's, the figures verdicts.py's. Refuses to know how a request is served.

Rules: a trace is cut to its beginning, scaled, and thinned to each rate (traces.py); prompts are random token ids, as
many for all arrangements and others for each, so nobody finds a prefix of an earlier one. Rates
are shares of what two unsplit nodes were seen to serve when flooded. Limits are multiples of what a request takes
alone on one node (goodput.py). Ours are told them and started anew for each regime; one replay of an arrangement that
knows no limits serves all regimes. Rates are visited in passes, each arrangement once in each pass and every other pass
backwards, so that a machine that drifts drifts for all. Local and auto, which are the same servers asked otherwise and
compared most closely, take turns at each rate.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

import aiohttp

from edge_llm.bench.contestants import (
    FLAGS_NOTE,
    NO_BOUND_NOTE,
    Arrangement,
    Send,
    Servers,
    arrangements,
    baseline,
    groups,
    plain,
    running,
)
from edge_llm.bench.goodput import Unloaded
from edge_llm.bench.layout import Launch
from edge_llm.bench.processes import MeasureFailed
from edge_llm.bench.replayed import Replayed, Tally, Workload, keep
from edge_llm.bench.run import Run
from edge_llm.bench.serve.answers import Answer, Call
from edge_llm.bench.serve.driver import served_per_s
from edge_llm.bench.stats import median
from edge_llm.bench.streams import prompt_ids
from edge_llm.bench.traces import Row, Trace, scaled, thinned
from edge_llm.errors import EdgeLLMError

# Of what two unsplit nodes serve when flooded: from where everybody is fast to where nobody can be. A flood finds them
# at their slowest, and within a minute a queue hardly grows too long: whoever knows the limits keeps them beyond 1.0.
RATE_SHARES: Final = (0.2, 0.4, 0.6, 0.8, 1.0, 1.3, 1.6)
PASSES: Final = 2
# When fewer requests than this keep the limits of any regime, higher rates of that arrangement are left out.
HOPELESS: Final = 0.5
FLOOD: Final = 16
WARM_UP: Final = 6
_ALONE: Final = 3
_ALONE_ANSWER: Final = 32
_LEAST_REQUESTS: Final = 4
_LEAST_SECONDS: Final = 5.0
# Shorter replays have too few requests: rather fewer rates.
_GOOD_SECONDS: Final = 25.0
_FEWER_RATES: Final = 4
_FEWEST_RATES: Final = 3
# For the plan of the budget: starting and warming servers, and what a replay takes beyond its last request.
_LAUNCH_S: Final = 20.0
_DRAIN_S: Final = 10.0
_BASELINE_S: Final = 100.0
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. `scale`: of prompts and answers alike; `trace_s`: how much of a trace is used."""

    seconds_per_point: float
    budget_s: float
    vocab_size: int
    n_ctx: int = 2048
    slots: int = 8
    scale: float = 0.25
    trace_s: float = 600.0
    seed: int = 0
    rate_shares: tuple[float, ...] = RATE_SHARES
    passes: int = PASSES

    @property
    def size(self) -> tuple[str, ...]:
        """Options of our workers."""
        return ("--slots", str(self.slots), "--n-ctx", str(self.n_ctx))


def workload(plan: Plan, trace: Trace) -> Workload:
    """One position of the context stays free: some servers end an answer when they have filled it."""
    return Workload(*scaled(trace.beginning(plan.trace_s), plan.scale, plan.n_ctx - 1))


@dataclass(frozen=True, slots=True)
class Fit:
    """What a budget leaves of a plan. `are_flags_tried`: of llama-server, for each trace."""

    plan: Plan
    seconds_per_point: float
    are_flags_tried: bool

    @property
    def note(self) -> str:
        flags = "tried for each trace" if self.are_flags_tried else "not tried, the last ones of the list are used"
        return (
            f"what fits into the budget: {len(self.plan.rate_shares)} rates, passes: {self.plan.passes}, replays of "
            f"{self.seconds_per_point:.0f} s, flags of llama-server {flags}"
        )


def fitted(plan: Plan, workloads: int, contestants: int, flags: int) -> Fit:
    """The most of the plan that leaves each replay a good length: rather fewer rates (from the lowest to the highest
    all the same: else the edge may lie beyond) and one pass than replays of a few requests. Raises MeasureFailed when
    nothing fits."""
    fits: list[Fit] = []
    for rates, passes, are_flags_tried in (
        (len(plan.rate_shares), plan.passes, True),
        (_FEWER_RATES, 1, True),
        (_FEWEST_RATES, 1, True),
        (_FEWEST_RATES, 1, False),
    ):
        smaller = replace(plan, rate_shares=spread(plan.rate_shares, rates), passes=min(passes, plan.passes))
        trials = workloads * flags if are_flags_tried and flags > 1 else 0
        try:
            seconds = fitting_seconds(smaller, workloads, contestants, trials)
        except MeasureFailed:
            if rates == _FEWEST_RATES and not are_flags_tried and not fits:
                raise
            continue
        fits.append(Fit(smaller, seconds, are_flags_tried))
        if seconds >= min(_GOOD_SECONDS, plan.seconds_per_point):
            return fits[-1]
    return fits[-1]


def spread(shares: tuple[float, ...], count: int) -> tuple[float, ...]:
    """`count` (>= 2) of them, evenly chosen, first and last among them; all when there are no more."""
    if len(shares) <= count:
        return shares
    return tuple(shares[round(i * (len(shares) - 1) / (count - 1))] for i in range(count))


def fitting_seconds(plan: Plan, workloads: int, contestants: int, trials: int) -> float:
    """Seconds of each replay: what was asked, or what the budget leaves. Raises MeasureFailed when that is nothing."""
    replays = workloads * contestants * len(plan.rate_shares) + trials
    beside_s = workloads * (_BASELINE_S + contestants * plan.passes * _LAUNCH_S) + trials * _LAUNCH_S
    left_s = (plan.budget_s - beside_s) / replays - _DRAIN_S
    if left_s < _LEAST_SECONDS:
        least_min = (beside_s + replays * (_LEAST_SECONDS + _DRAIN_S)) / 60
        raise MeasureFailed(
            f"{replays} replays do not fit into {plan.budget_s / 60:.0f} minutes: give at least {least_min:.0f}, "
            "or fewer traces"
        )
    return min(plan.seconds_per_point, left_s)


def seconds_of_the_rest(plan: Plan, left_s: float, workloads: int, contestants: int) -> float:
    """Seconds of each replay when all preparations are over and so much of the budget is left: they take less or more
    than was planned for them."""
    series = workloads * contestants
    replay_s = (left_s - series * plan.passes * _LAUNCH_S) / (series * len(plan.rate_shares)) - _DRAIN_S
    return min(plan.seconds_per_point, max(_LEAST_SECONDS, replay_s))


async def measure(
    plan: Plan,
    workloads: Sequence[Workload],
    launch: Launch,
    servers: Servers | None,
    run: Run,
    tally: Tally,
    progress: Progress,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Fills `tally` and `run` as it goes; a part that fails is noted there and leaves the others."""
    tally.workloads.extend(workloads)
    run.workload |= {one.name: {"scale": plan.scale, "seed": plan.seed, **asdict(one.clipping)} for one in workloads}
    ours = arrangements(launch, plan.size)
    fit = fitted(plan, len(workloads), len(ours) + (servers is not None), len(servers.trials) if servers else 0)
    tally.seconds_per_point = fit.seconds_per_point
    run.notes += [fit.note, NO_BOUND_NOTE, *([FLAGS_NOTE] if servers is not None else [])]
    contest = _Contest(fit.plan, run, tally, progress, clock)
    if not await contest.tried(
        "one request alone, and a flood", contest.baseline(baseline(launch, plan.size), workloads)
    ):
        return
    contestants = {one.name: list(ours) for one in workloads}
    if servers is not None:
        for one in workloads:
            contestants[one.name].append(await contest.tuned(servers, one, are_tried=fit.are_flags_tried))
    rest_s = seconds_of_the_rest(fit.plan, contest.left_s, len(workloads), len(ours) + (servers is not None))
    tally.seconds_per_point = rest_s
    run.notes.append(f"when limits and flags were known, the budget left replays of {rest_s:.0f} s")
    for one in workloads:
        for number in range(fit.plan.passes):
            series = groups(contestants[one.name])
            for sharing in series if number % 2 == 0 else series[::-1]:
                labels = " and ".join(arrangement.label for arrangement in sharing)
                what = f"{one.name}, {labels}, pass {number + 1}"
                await contest.tried(what, contest.one_pass(one, sharing, number))


class _Contest:
    """What all parts of one measurement share."""

    def __init__(self, plan: Plan, run: Run, tally: Tally, progress: Progress, clock: Callable[[], float]) -> None:
        self._plan, self._run, self._tally, self._progress, self._clock = plan, run, tally, progress, clock
        self._until_s = clock() + plan.budget_s

    @property
    def left_s(self) -> float:
        """Of the budget."""
        return self._until_s - self._clock()

    async def tried(self, what: str, step: Awaitable[None]) -> bool:
        try:
            await step
        except (EdgeLLMError, aiohttp.ClientError, OSError) as error:
            self._run.fail(what, str(error) or type(error).__name__)
            return False
        return True

    # -- parts

    async def baseline(self, unsplit: Arrangement, workloads: Sequence[Workload]) -> None:
        """On two unsplit nodes: a request alone, with a prompt that 90 % of the trace's do not exceed, then more at
        once than they can work on."""
        async with running(self._run, unsplit) as send:
            for one in workloads:
                self._progress(f"{one.name}: warming up", 0, 0)
                await send(self._calls(one, one.trace.rows[:WARM_UP], "baseline warm-up", unsplit, at_once=True))
                alone = Row(0, 0.0, one.trace.prompt_percentile(0.9), self._alone_answer(one))
                for number in range(_ALONE):
                    self._progress(f"{one.name}: one request alone", number, _ALONE)
                    (answer,) = await send(self._calls(one, [alone], f"alone {number}", unsplit))
                    if answer.ttft_s is None or answer.tpot_s is None or not answer.is_complete:
                        raise MeasureFailed(f"a request alone was not answered: {answer.error or 'too few tokens'}")
                    self._run.add(f"{one.name}, alone: ttft_s", answer.ttft_s)
                    self._run.add(f"{one.name}, alone: tpot_s", answer.tpot_s)
                self._progress(f"{one.name}: a flood", 0, 0)
                rows = thinned(one.trace, min(FLOOD, len(one.trace.rows)), 0.0, self._plan.seed)
                served = served_per_s(await send(self._calls(one, rows, "flood", unsplit)))
                if not served:
                    raise MeasureFailed("a flood of requests got no answer")
                self._run.add(f"{one.name}, flood: served_per_s", served)
                self._tally.capacity_per_s[one.name] = served
                self._tally.unloaded[one.name] = Unloaded(
                    median(self._run.samples[f"{one.name}, alone: ttft_s"]),
                    median(self._run.samples[f"{one.name}, alone: tpot_s"]),
                )

    def _alone_answer(self, one: Workload) -> int:
        """Long enough for a mean, within the context."""
        room = self._plan.n_ctx - 1 - one.trace.prompt_percentile(0.9)
        return min(room, max(_ALONE_ANSWER, round(one.trace.mean_answer_tokens)))

    async def tuned(self, servers: Servers, one: Workload, *, are_tried: bool) -> Arrangement:
        """The servers with those flags, of the ones to be tried, that keep the limits of most requests at a middle
        rate, all regimes together. Of equals the first; without a trial the last."""
        rates, flags_of = self.rates(one), list(servers.trials)
        best, found = -1.0, flags_of[0] if are_tried else flags_of[-1]
        for flags in flags_of if are_tried and len(flags_of) > 1 else ():
            arrangement = plain(servers.trials[flags])
            rate = rates[len(rates) // 2]
            what = f"{one.name}, llama-server with {flags}"
            self._progress(what, 0, 0)
            score = [0.0]
            if await self.tried(what, self._trial(one, arrangement, rate, score)):
                self._run.add(f"{what}: attainment", score[0])
                best, found = max((best, found), (score[0], flags), key=lambda pair: pair[0])
        self._tally.server_flags[one.name] = found
        return plain(servers.trials[found])

    async def _trial(self, one: Workload, arrangement: Arrangement, rate: float, score: list[float]) -> None:
        async with running(self._run, arrangement) as send:
            await self._warm(send, one, arrangement, 0)
            answers = await self._at_rate(send, one, arrangement, rate, "trial")
        limits = self._tally.limits(one.name).values()
        met = [answer.timing.meets(limit) for answer in answers for limit in limits]
        score[0] = sum(met) / len(met)

    async def one_pass(self, one: Workload, sharing: Sequence[Arrangement], number: int) -> None:
        """Of arrangements that share servers: each rate in turn, who is first alternates."""
        rates = self.rates(one)[number :: self._plan.passes]
        if not any(self._is_worth(one, arrangement, rate) for arrangement in sharing for rate in rates):
            return
        async with running(self._run, *sharing) as send:
            for arrangement in sharing:
                await self._warm(send, one, arrangement, number)
            for turn, rate in enumerate(rates, number):
                worth = [arrangement for arrangement in sharing if self._is_worth(one, arrangement, rate)]
                if worth and self.left_s < 0:
                    raise MeasureFailed("the budget of time was over: give more with --budget-minutes")
                for arrangement in worth if turn % 2 == 0 else worth[::-1]:
                    await self._replay(send, one, arrangement, rate)

    async def _replay(self, send: Send, one: Workload, arrangement: Arrangement, rate: float) -> None:
        answers = await self._at_rate(send, one, arrangement, rate, f"{rate:.6f}")
        told = arrangement.regime.name if arrangement.regime else None
        done = Replayed(one.name, arrangement.name, rate, tuple(answers), told)
        self._tally.replays.append(done)
        keep(self._run, done)

    # -- what is sent

    def rates(self, one: Workload) -> list[float]:
        """So that each is a whole number of requests, ascending."""
        seconds, capacity = self._tally.seconds_per_point, self._tally.capacity_per_s[one.name]
        most = len(one.trace.rows)
        counts = {
            min(most, max(_LEAST_REQUESTS, round(share * capacity * seconds))) for share in self._plan.rate_shares
        }
        return [count / seconds for count in sorted(counts)]

    def _is_worth(self, one: Workload, arrangement: Arrangement, rate: float) -> bool:
        """Whether nothing lower was hopeless already."""
        known, told = self._tally.limits(one.name), arrangement.regime.name if arrangement.regime else None
        limits = [known[regime.name] for regime in arrangement.regimes]
        return not any(
            done.rate_per_s < rate
            and all(sum(a.timing.meets(limit) for a in done.answers) < HOPELESS * len(done.answers) for limit in limits)
            for done in self._tally.replays
            if (done.workload, done.arrangement, done.regime) == (one.name, arrangement.name, told)
        )

    async def _warm(self, send: Send, one: Workload, arrangement: Arrangement, number: int) -> None:
        """Pages, connections and code touched for the first time are no part of a replay; rates are learned."""
        self._progress(f"{one.name}, {arrangement.label}: warming up", 0, 0)
        rows = one.trace.rows[:WARM_UP]
        await send(self._calls(one, rows, f"warm-up {number}", arrangement, at_once=True))

    async def _at_rate(
        self, send: Send, one: Workload, arrangement: Arrangement, rate: float, label: str
    ) -> list[Answer]:
        seconds = self._tally.seconds_per_point
        rows = thinned(one.trace, round(rate * seconds), seconds, self._plan.seed)
        longest = max(row.answer_tokens for row in rows)
        limits = self._tally.limits(one.name).values()
        # who is not over by then has missed whatever limit
        cut_after_s = max(limit.ttft_s + longest * limit.tpot_s for limit in limits)
        what = f"{one.name}, {arrangement.label}, {rate:.2f} requests/s"
        began_s, cpu_s = time.monotonic(), time.process_time()
        answers = await send(
            self._calls(one, rows, label, arrangement),
            cut_after_s,
            lambda sent: self._progress(what, sent, len(rows)),
        )
        share = (time.process_time() - cpu_s) / (time.monotonic() - began_s)
        self._run.add("generator_cpu_share", share)
        return answers

    def _calls(
        self, one: Workload, rows: Sequence[Row], label: str, arrangement: Arrangement, *, at_once: bool = False
    ) -> list[Call]:
        """Prompts of the same lengths for the same trace, label and row, whatever the arrangement. Not the same tokens:
        workers that two arrangements share would keep them."""
        own = arrangement.body(self._tally.limits(one.name) if arrangement.regime else {})
        return [
            Call(
                0.0 if at_once else row.at_s,
                {
                    "prompt": prompt_ids(
                        row.prompt_tokens,
                        self._plan.vocab_size,
                        zlib.crc32(f"{self._plan.seed}/{one.name}/{arrangement.name}/{label}/{row.number}".encode()),
                    ),
                    "max_tokens": row.answer_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                    **own,
                },
                row.answer_tokens,
            )
            for row in rows
        ]
