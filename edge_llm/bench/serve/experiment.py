"""`edge-llm bench serve`: loads on one server or on several, the same requests for all, interleaved.

Owns the order of things: first looks, warm-up, requests alone, then loads in passes, or rates as a search asks for
them; what goes into every body, what is kept of every request. Refuses to know how one is sent (driver.py), what the
figures mean (results.py), and files.

Rules: each pass visits all contenders, every other pass backwards, so that a machine that drifts drifts for all.
Prompts depend on seed, load and pass only. Where two contenders ask the same server, nothing kept of earlier prompts is
used.
A rate that is searched is hung up when no request can keep its limits any more; otherwise requests have `timeout_s`.
A server that fails is measured: that it does is the finding, and others beside it keep theirs. Only when what was asked
for cannot work at any of them (address, key, model) is nothing measured.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Final

import aiohttp

from edge_llm.bench.goodput import GOALS, Limits
from edge_llm.bench.least_busy import LeastBusy
from edge_llm.bench.run import Run
from edge_llm.bench.serve.answers import TIMEOUT, UNFINISHED, Answer, Call
from edge_llm.bench.serve.driver import circulate, replay, sending
from edge_llm.bench.serve.prompts import Options, body, combined
from edge_llm.bench.serve.results import Replayed, Tally, scaled
from edge_llm.bench.serve.schedule import Load, Source, endless, facts_of, scheduled
from edge_llm.bench.serve.search import Search
from edge_llm.bench.serve.slowdown import chosen
from edge_llm.bench.serve.target import NoLook, PromptKind, Target, look
from edge_llm.bench.serve.workloads import BadWorkload, Request, mean_tokens
from edge_llm.bench.stats import mean
from edge_llm.errors import EdgeLLMError

DEFAULT_CONTEXT: Final = 4096
_ALONE_FOR_SEARCH: Final = 3
# A rate of a search has at least so many requests, however low it is.
_LEAST_REQUESTS: Final = 8
# Of a rate that is searched: it was too high. Other failures say that the server is broken.
_TOO_MUCH: Final = frozenset({UNFINISHED, TIMEOUT, "http_429", "http_503"})
_WARM_CLIENTS: Final = 4
# Requests that are looked at where only time ends a load.
_WITHOUT_NUMBER: Final = 64
_SETTLE_S: Final = 0.5
_ROUND: Final = 6
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Contender:
    """A server, or several that are asked in turn, what goes into the bodies of its requests and, for nobody else, into
    their headers."""

    name: str
    urls: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. `loads`: one after another; with `is_search` the first one's rate is where the search begins
    (None: what one request alone suggests). `alone`: so many requests are sent alone too. `tells_limits`: our gateway
    plans by limits that requests name; each scale is then a replay of its own."""

    loads: tuple[Load, ...]
    options: Options = field(default_factory=Options)
    prompts: PromptKind = "auto"
    vocab_size: int | None = None
    passes: int = 1
    seed: int = 0
    warm_up: int = 4
    timeout_s: float = 600.0
    limits: Limits | None = None
    tells_limits: bool = False
    scales: tuple[float, ...] = ()
    alone: int = 0
    is_search: bool = False
    closeness: float = 1.15
    most_rates: int = 12


async def measure(
    plan: Plan,
    contenders: Sequence[Contender],
    source_of: Callable[[int], Source],
    run: Run,
    tally: Tally,
    progress: Progress,
    watching: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Fills `tally` and `run` as it goes. `source_of` makes the workload for a context of so many tokens. `watching` is
    around all loads. Raises NoLook and BadWorkload when nothing can be measured at all."""
    async with AsyncExitStack() as stack:
        measuring = _Measuring(plan, run, tally, progress)
        for number, one in enumerate(_undisturbed(contenders, tally)):
            progress(f"a first look at {one.name}", number, len(contenders))
            await measuring.look(one, await stack.enter_async_context(sending(one.headers)))
        measuring.settle()
        context = min((t.n_ctx for t in measuring.targets if t.n_ctx), default=DEFAULT_CONTEXT)
        source = source_of(context)
        tally.workload |= _described(source, plan)
        run.workload |= tally.workload
        measuring.source = source
        with watching():
            await measuring.warm_up()
            if plan.alone or (plan.is_search and plan.loads[0].rate_per_s is None):
                await measuring.send_alone(plan.alone or _ALONE_FOR_SEARCH)
            await (measuring.search() if plan.is_search else measuring.passes())
        measuring.check_modes()


def _described(source: Source, plan: Plan) -> dict[str, Any]:
    """What is drawn from, and what is sent of it: that may be a small part, with other lengths. Rates that a search
    tries are its findings, so no part of what was asked: the figures have them."""
    prompt_tokens, answer_tokens = mean_tokens(source.workload.requests)
    means = {"mean_prompt_tokens": round(prompt_tokens, 1), "mean_answer_tokens": round(answer_tokens, 1)}
    known_passes = 0 if plan.is_search else plan.passes
    return {
        "name": source.workload.name,
        "drawn_from": {**source.workload.facts, **means},
        "seed": plan.seed,
        "passes": plan.passes,
        "loads": {load.label: facts_of(source, load, plan.seed, known_passes) for load in plan.loads},
    }


def _undisturbed(contenders: Sequence[Contender], tally: Tally) -> list[Contender]:
    """The second of two contenders at one server would find the first one's prompts there."""
    urls = [url for one in contenders for url in set(one.urls)]
    if len(set(urls)) == len(urls):
        return list(contenders)
    tally.notes.append("contenders share a server and ask the same: cache_prompt is false in all requests")
    return [replace(one, extra=combined({"cache_prompt": False}, one.extra)) for one in contenders]


class _Measuring:
    """What all parts of one run share."""

    def __init__(self, plan: Plan, run: Run, tally: Tally, progress: Progress) -> None:
        self._plan, self._run, self._tally, self._progress = plan, run, tally, progress
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._troubles: dict[str, NoLook] = {}
        self.targets: list[Target] = []
        self.source: Source

    async def look(self, one: Contender, session: aiohttp.ClientSession) -> None:
        plan = self._plan
        options = replace(plan.options, extra=combined(plan.options.extra, one.extra))
        target, trouble = await look(
            session, one.name, one.urls, options, plan.prompts, plan.vocab_size, plan.timeout_s
        )
        if trouble is not None:
            self._troubles[one.name] = trouble
        self.targets.append(target)
        self._sessions[one.name] = session
        self._tally.servers[one.name] = {**target.facts, "extra": options.extra}
        self._tally.notes += target.notes

    def settle(self) -> None:
        """Who is measured. Raises NoLook where nothing can come of it at any contender."""
        troubles = self._troubles
        if len(troubles) == len(self.targets) and all(trouble.is_ours for trouble in troubles.values()):
            raise next(iter(troubles.values()))
        for name, trouble in troubles.items():
            if trouble.is_silent:
                self._give_up(name, trouble.message)
        models = [target.model for target in self.targets if target.name not in troubles]
        self._run.models += dict.fromkeys(models or [target.model for target in self.targets])

    def _give_up(self, name: str, why: str) -> None:
        """On a server that does not answer in time: each further request would take as long."""
        self._run.fail(name, why)
        self.targets = [target for target in self.targets if target.name != name]

    async def warm_up(self) -> None:
        for target in list(self.targets):
            requests = self._requests(self._plan.loads[0])[: self._plan.warm_up]
            self._progress(f"{target.name}: warming up", 0, len(requests))
            calls = [self._call(target, request, "warm-up") for request in requests]
            clients = min(_WARM_CLIENTS, self._plan.loads[0].clients or _WARM_CLIENTS)
            answers = await circulate(
                calls,
                clients,
                self._sessions[target.name],
                LeastBusy(target.urls),
                path=target.options.path,
                timeout_s=self._plan.timeout_s,
            )
            if answers and not any(answer.is_complete for answer in answers):
                why = answers[0].error or "its answers end before they have all tokens (see --no-ignore-eos)"
                if any(answer.kind == TIMEOUT for answer in answers):
                    self._give_up(target.name, f"no request of the warm-up was answered: {why}")
                else:
                    self._tally.notes.append(f"{target.name}: no request of the warm-up was answered: {why}")

    def check_modes(self) -> None:
        """Of contenders that are modes of our gateway: whether what answered knows modes."""
        for name, why in self._tally.without_modes().items():
            self._run.fail(f"{name}: --mode", why)

    async def send_alone(self, count: int) -> None:
        """The same requests of the first load, one after another, on each contender."""
        requests = self._requests(self._plan.loads[0])
        picked = chosen(requests, lambda request: request.prompt_tokens + request.answer_tokens, count)
        for target in self.targets:
            answers = self._tally.alone.setdefault(target.name, [])
            what = f"{target.name}: one request at a time"
            self._progress(what, 0, len(picked))
            await circulate(
                [self._call(target, request, "alone") for request in picked],
                1,
                self._sessions[target.name],
                LeastBusy(target.urls),
                path=target.options.path,
                on_end=self._keeper(f"{target.name}, alone", answers),
                timeout_s=self._plan.timeout_s,
            )
            if not any(answer.is_complete for answer in answers):
                self._run.fail(what, answers[0].error or "no answer had all its tokens")

    # -- loads

    async def passes(self) -> None:
        """All loads, from the first to the last; each pass anew."""
        plan = self._plan
        scales: tuple[float | None, ...] = plan.scales if plan.tells_limits and plan.scales else (None,)
        for number in range(plan.passes):
            for load in plan.loads:
                for target in self._in_turn(number):
                    for scale in scales:
                        await self._tried(target, load, scale, number)

    async def search(self) -> None:
        """Rounds: each contender that still looks for a rate measures its next one."""
        searches = {target.name: self._search(target.name) for target in self.targets}
        number = 0
        while searches:
            for target in self._in_turn(number):
                search = searches.get(target.name)
                if search is None:
                    continue
                rate = search.next_rate(self._tally.points(target.name))
                if rate is None or not await self._tried(target, _sized(self._plan.loads[0], rate), None, 0):
                    del searches[target.name]
            number += 1

    def _search(self, name: str) -> Search:
        first = self._plan.loads[0].rate_per_s
        if first is None:
            took_s = [a.e2e_s for a in self._tally.alone.get(name, []) if a.is_complete and a.e2e_s]
            first = 1 / mean(took_s) if took_s else 1.0
        return Search(GOALS, first, self._plan.closeness, self._plan.most_rates)

    def _in_turn(self, number: int) -> Sequence[Target]:
        return self.targets if number % 2 == 0 else self.targets[::-1]

    async def _tried(self, target: Target, load: Load, scale: float | None, number: int) -> bool:
        what = f"{target.name}, {load.label}"
        try:
            replayed = await self._replayed(target, load, scale, number)
        except EdgeLLMError as error:
            if isinstance(error, BadWorkload) and self._plan.is_search and self._tally.points(target.name):
                self._tally.notes.append(f"{what}: the search ended there: {error.message}")
            else:
                self._run.fail(what, error.message)
            return False
        is_overload = self._plan.is_search and all(answer.kind in _TOO_MUCH for answer in replayed.answers)
        if not is_overload and not any(answer.is_complete for answer in replayed.answers):
            first = next((answer.error for answer in replayed.answers if answer.error), "answers had too few tokens")
            self._run.fail(what, f"none of {len(replayed.answers)} requests was answered: {first}")
            return False
        await asyncio.sleep(_SETTLE_S)
        return True

    async def _replayed(self, target: Target, load: Load, scale: float | None, number: int) -> Replayed:
        """One pass of one load."""
        at_scale = f", limits times {scale:g}" if scale else ""
        what, label = f"{target.name}, {load.label}{at_scale}", f"{load.label}{at_scale}, pass {number + 1}"
        calls = self._calls(target, load, label, self._told(scale), number)
        done = self._tally.begin(target.name, load, scale, number)
        servers, path, timeout_s = LeastBusy(target.urls), target.options.path, self._plan.timeout_s
        session, total = self._sessions[target.name], len(calls) if isinstance(calls, list) else 0

        def on_sent(sent: int) -> None:
            self._progress(what, sent, total)

        keep = self._keeper(f"{what}, pass {number + 1}", done.answers)
        began_s, cpu_s = time.monotonic(), time.process_time()
        if isinstance(calls, list) and load.is_open:
            cut_s = self._cut_after_s(calls)
            done.answers = await replay(calls, session, servers, cut_s, on_sent, path, on_end=keep, timeout_s=timeout_s)
        else:
            clients = load.clients or 1
            done.answers = await circulate(
                calls, clients, session, servers, load.seconds, on_sent, path, on_end=keep, timeout_s=timeout_s
            )
        done.is_done = True
        self._run.add("generator_cpu_share", (time.process_time() - cpu_s) / max(1e-9, time.monotonic() - began_s))
        self._note(done)
        return done

    def _calls(
        self, target: Target, load: Load, label: str, extra: Mapping[str, Any], number: int
    ) -> list[Call] | Iterator[Call]:
        """Made before the first one is sent: making prompts meanwhile would make streams wait. Without an end only
        where nothing but time ends a closed loop."""
        seed = self._plan.seed
        if load.is_open:
            timed = scheduled(self.source, load, seed, number)
            return [replace(self._call(target, one.request, label, extra), at_s=one.at_s) for one in timed]
        calls = (self._call(target, one, label, extra) for one in endless(self.source, load, seed, number))
        return calls if load.requests is None else list(calls)

    def _cut_after_s(self, calls: Sequence[Call]) -> float | None:
        """A request that has not ended so long after the last one was sent has missed whatever limit."""
        limits = self._plan.limits
        if limits is None or not self._plan.is_search:
            return None
        longest_s = limits.ttft_s + max(call.tokens for call in calls) * limits.tpot_s
        return min(longest_s, self._plan.timeout_s)

    def _told(self, scale: float | None) -> Mapping[str, Any]:
        if not self._plan.tells_limits or self._plan.limits is None:
            return {}
        limits = scaled(self._plan.limits, scale or 1.0)
        told = {"ttft_s": limits.ttft_s, "tpot_s": limits.tpot_s}
        return {"edge_llm": {"slo": {name: limit for name, limit in told.items() if limit < float("inf")}}}

    # -- requests

    def _requests(self, load: Load) -> Sequence[Request]:
        """Those of the first pass."""
        if load.is_open and (load.rate_per_s is not None or load.profile == "trace"):
            return [one.request for one in scheduled(self.source, load, self._plan.seed)]
        wanted = load.requests or _WITHOUT_NUMBER
        return list(endless(self.source, replace(load, requests=wanted), self._plan.seed))

    def _call(self, target: Target, request: Request, label: str, extra: Mapping[str, Any] | None = None) -> Call:
        options = target.options
        if extra:
            options = replace(options, extra=combined(options.extra, extra))
        return Call(
            0.0,
            body(request, target.style, options, f"{self._plan.seed}/{label}"),
            request.answer_tokens,
            may_stop=not options.ignores_eos,
            number=request.number,
            prompt_tokens=request.prompt_tokens,
        )

    def _keeper(self, case: str, into: list[Answer]) -> Callable[[Answer], None]:
        """Keeps each answer when it is over: in the tally, and as a line."""
        began_at = time.time()

        def keep(answer: Answer) -> None:
            into.append(answer)
            self._run.case({"case": case, "began_at_s": round(began_at, _ROUND), **case_of(answer)})

        return keep

    def _note(self, done: Replayed) -> None:
        """Times of whole answers, for the record's own statistics. All the rest is in the lines."""
        name = f"{done.contender}, {done.load.label}" + (f", limits times {done.scale:g}" if done.scale else "")
        for answer in done.counted:
            if answer.is_complete:
                times = {"ttft_s": answer.ttft_s, "tpot_s": answer.tpot_s, "e2el_s": answer.e2e_s}
                for key, value in times.items():
                    if value is not None:
                        self._run.add(f"{name}: {key}", round(value, _ROUND))


def _sized(load: Load, rate_per_s: float) -> Load:
    """A rate of a search, with requests enough to say something."""
    if load.requests is not None:
        return replace(load, rate_per_s=rate_per_s)
    wanted = max(_LEAST_REQUESTS, round(rate_per_s * (load.seconds or 0.0)))
    return replace(load, rate_per_s=rate_per_s, requests=wanted, seconds=None)


def case_of(answer: Answer) -> dict[str, Any]:
    """One request as a line: raw times in seconds after the beginning of its pass, counts, how it ended."""

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, _ROUND)

    return {
        "number": answer.number,
        "url": answer.url,
        "at_s": rounded(answer.at_s),
        "sent_s": rounded(answer.sent_s),
        "headers_s": rounded(answer.headers_s),
        "first_s": rounded(answer.first_s),
        "last_s": rounded(answer.last_s),
        "ended_s": rounded(answer.ended_s),
        "arrivals_s": [round(at_s, _ROUND) for at_s in answer.arrivals_s],
        "prompt_tokens_asked": answer.asked_prompt_tokens,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "answer_tokens_asked": answer.asked_tokens,
        "answer_tokens": answer.tokens,
        "counted_by": answer.counted_by,
        "is_complete": answer.is_complete,
        "status": answer.status,
        "kind": answer.kind,
        "error": answer.error,
        "code": answer.code,
        "retry_after_s": answer.retry_after_s,
        "finish_reason": answer.finish_reason,
        "own": dict(answer.own),
    }
