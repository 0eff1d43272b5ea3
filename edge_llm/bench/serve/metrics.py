"""What the answers of a replay come to: latencies, throughput, failures by kind, attainment of limits. Pure.

Owns the figures of `edge-llm bench serve` and their definitions, which are printed with them. Refuses to know how
requests were sent. The names are those that `vllm bench serve` uses, times in milliseconds.

Rules: latencies are of complete answers only, and whatever is not complete is counted, by kind, and misses every limit.
Throughput is over the time for which requests came: a server that is gone early, or hangs, does not stop the clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from edge_llm.bench.goodput import Limits
from edge_llm.bench.serve.answers import Answer
from edge_llm.bench.serve.arrivals import mean_rate_per_s
from edge_llm.bench.serve.driver import lateness
from edge_llm.bench.serve.saturation import Saturation, saturation
from edge_llm.bench.stats import bootstrap, deviation, mean, percentile, wilson

DEFINITIONS: Final[Mapping[str, str]] = {
    "ttft": "from sending the request (with a connection, where none is open) to the first event with text: queue, "
    "hand-off of KV and network are in it",
    "itl": "from one event with text to the next, so without the first; an event may carry several tokens",
    "e2el": "from sending the request to the last event with text (of an answer in one piece: until it was there)",
    "tpot": "(e2el - ttft) / (tokens - 1), one figure for each answer of two tokens or more",
    "tokens": "of answers as the server counts them in `usage`, else in `timings`, else the events with text; "
    "`counted_by` says which",
    "throughput": "of complete answers, over the time from the beginning to the last token of one; not less than until "
    "the last request was due (open loops), or until the last one that failed had ended (closed loops)",
    "attainment": "share of all requests that are complete and keep the limits of ttft and of tpot, both",
    "goodput": "request_goodput: complete answers within the limits per second; goodput_90, goodput_99: the highest "
    "rate with such an attainment, interpolated between rates that were measured (DistServe)",
    "ratios": "goodput of the first contender over another one's, with a 95 % interval: requests of a rate are drawn "
    "again together, number i of a rate being the same request everywhere; `least` to `most` is what the rates "
    "measured leave open where a goodput lies below the lowest or above the highest of them",
    "slowdown": "ttft, tpot (Splitwise calls it TBT) and e2el of each request over those of the same request alone. Of "
    "lengths that were not sent alone: ttft and tpot lie on the line between those of the next shorter and the next "
    "longer prompt that were, e2el is ttft + (tokens - 1) * tpot of these",
    "slo_scales": "both limits times one factor; tightest_90, tightest_99: the smallest factor tried that such a share "
    "keeps",
    "stages": "of our gateway's own report: `queue` at the gateway, `wait` until the prompt's turn came at the worker, "
    "`prefill` computing it, `handoff` after that, `first_decode` the first step; their sum is about the TTFT",
    "failed": "requests without a complete answer, by kind; `cut_short`: it ended in order before it had all tokens "
    "that were forced; they are in no latency",
    "reconnected": "requests sent again on a new connection, because the server had closed the one that was open; "
    "timed from then",
}
LATE_SHARE: Final = 0.1
# What our gateway says of each answer, in ms (README).
_STAGES: Final = ("queue", "wait", "prefill", "handoff", "first_decode")
# More samples than this have no bootstrap interval: it would take longer than it tells.
_MOST_RESAMPLED: Final = 2000


class Spread(msgspec.Struct, frozen=True):
    """Of n samples. `low` and `high`: 95 % bootstrap interval of the median; None: too few or too many samples."""

    n: int
    mean: float
    median: float
    std: float
    min: float
    max: float
    p50: float
    p90: float
    p95: float
    p99: float
    low: float | None = None
    high: float | None = None


class Attained(msgspec.Struct, frozen=True):
    """Under limits (None: no limit). `low`, `high`: 95 % interval of the share (Wilson)."""

    ttft_s: float | None
    tpot_s: float | None
    attainment: float
    low: float
    high: float
    ttft_attainment: float
    tpot_attainment: float
    request_goodput: float


class Generator(msgspec.Struct, frozen=True):
    """Of this side: how late requests left (open loops), in ms. `is_fault`: so late that it is in the figures."""

    late_ms_p50: float
    late_ms_p99: float
    late_ms_max: float
    is_fault: bool


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one load, all passes together. `events`: with text, of complete answers that were streamed."""

    requests: int
    completed: int
    cut_short: int
    failed: dict[str, int]
    duration_s: float
    offered_per_s: float | None
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    ttft_ms: Spread | None
    itl_ms: Spread | None
    tpot_ms: Spread | None
    e2el_ms: Spread | None
    answer_tokens: int
    events: int = 0
    prompt_tokens: int
    prompt_tokens_asked: int
    cached_tokens: int | None
    counted_by: dict[str, int]
    modes: dict[str, int] = {}
    stages_ms: dict[str, Spread] = {}
    attained: Attained | None = None
    saturation: Saturation | None = None
    generator: Generator | None = None
    reconnected: int = 0


def figures(passes: Sequence[Sequence[Answer]], is_open: bool, limits: Limits | None = None) -> Figures:
    """Of passes that were replayed one after another; each begins at its own time 0."""
    answers = [answer for one in passes for answer in one]
    done = [answer for answer in answers if answer.is_complete]
    duration_s = sum(_duration_s(one, is_open) for one in passes)
    answer_tokens = sum(answer.tokens for answer in done)
    prompt_tokens = sum(_prompt_tokens(answer) for answer in done)
    cached = [answer.cached_tokens for answer in done if answer.cached_tokens is not None]
    ttft_ms = spread([1e3 * answer.ttft_s for answer in done if answer.ttft_s is not None])
    return Figures(
        requests=len(answers),
        completed=len(done),
        cut_short=sum(answer.is_cut_short for answer in answers),
        failed=dict(sorted(Counter(answer.kind for answer in answers if answer.kind).items())),
        duration_s=round(duration_s, 6),
        offered_per_s=_offered(passes) if is_open else None,
        request_throughput=_per(len(done), duration_s),
        output_throughput=_per(answer_tokens, duration_s),
        total_token_throughput=_per(answer_tokens + prompt_tokens, duration_s),
        ttft_ms=ttft_ms,
        itl_ms=spread([1e3 * gap_s for answer in done for gap_s in answer.itl_s]),
        tpot_ms=spread([1e3 * answer.tpot_s for answer in done if answer.tpot_s is not None]),
        e2el_ms=spread([1e3 * answer.e2e_s for answer in done if answer.e2e_s is not None]),
        answer_tokens=answer_tokens,
        events=sum(len(answer.arrivals_s) for answer in done),
        prompt_tokens=prompt_tokens,
        prompt_tokens_asked=sum(answer.asked_prompt_tokens for answer in done),
        cached_tokens=sum(cached) if cached else None,
        counted_by=dict(Counter(answer.counted_by for answer in done)),
        modes=dict(Counter(str(answer.own["mode"]) for answer in done if answer.own.get("mode"))),
        stages_ms=_stages(done),
        attained=attained(answers, limits, duration_s) if limits is not None else None,
        saturation=saturation(passes) if is_open else None,
        generator=_generator(answers, ttft_ms) if is_open and answers else None,
        reconnected=sum(answer.reconnects > 0 for answer in answers),
    )


def attained(answers: Sequence[Answer], limits: Limits, duration_s: float) -> Attained | None:
    """None without answers."""
    judged = [answer.timing for answer in answers]
    if not judged:
        return None
    met = sum(timing.meets(limits) for timing in judged)
    low, high = wilson(met, len(judged))
    return Attained(
        ttft_s=_finite(limits.ttft_s),
        tpot_s=_finite(limits.tpot_s),
        attainment=met / len(judged),
        low=low,
        high=high,
        ttft_attainment=sum(timing.is_complete and timing.meets_ttft(limits) for timing in judged) / len(judged),
        tpot_attainment=sum(timing.meets_tpot(limits) for timing in judged) / len(judged),
        request_goodput=_per(met, duration_s),
    )


def spread(samples: Sequence[float]) -> Spread | None:
    """None without samples."""
    if not samples:
        return None
    low, high = bootstrap(samples) if 1 < len(samples) <= _MOST_RESAMPLED else (None, None)
    middle = percentile(samples, 0.5)
    return Spread(
        n=len(samples),
        mean=mean(samples),
        median=middle,
        std=deviation(samples),
        min=min(samples),
        max=max(samples),
        p50=middle,
        p90=percentile(samples, 0.9),
        p95=percentile(samples, 0.95),
        p99=percentile(samples, 0.99),
        low=low,
        high=high,
    )


def _stages(answers: Sequence[Answer]) -> dict[str, Spread]:
    """Of servers that tell where the time went: ours."""
    found = {}
    for name in _STAGES:
        said = [answer.own.get(f"{name}_ms") for answer in answers]
        if one := spread([float(ms) for ms in said if isinstance(ms, int | float) and not isinstance(ms, bool)]):
            found[name] = one
    return found


def _prompt_tokens(answer: Answer) -> int:
    """As the server counts, else as many as were sent."""
    return answer.asked_prompt_tokens if answer.prompt_tokens is None else answer.prompt_tokens


def _duration_s(answers: Sequence[Answer], is_open: bool) -> float:
    """Until the last token of a complete answer (without any: the last end), and whatever else took the load's time. A
    failure after the last arrival of an open loop takes none: how long is waited for it is this side's choice."""
    tokens_s = [answer.last_s for answer in answers if answer.is_complete and answer.last_s is not None]
    ends_s = [answer.ended_s for answer in answers if answer.ended_s is not None and not answer.is_complete]
    if is_open:
        return max([*(tokens_s or ends_s), *(answer.at_s for answer in answers)], default=0.0)
    return max([*tokens_s, *ends_s], default=0.0)


def _offered(passes: Sequence[Sequence[Answer]]) -> float | None:
    """Mean rate over the passes, weighted by their requests."""
    rates = [(mean_rate_per_s([answer.at_s for answer in one]), len(one)) for one in passes]
    known = [(rate, count) for rate, count in rates if rate is not None]
    total = sum(count for _, count in known)
    return total / sum(count / rate for rate, count in known) if total else None


def _per(count: float, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0


def _finite(limit_s: float) -> float | None:
    return limit_s if limit_s < float("inf") else None


def _generator(answers: Sequence[Answer], ttft_ms: Spread | None) -> Generator:
    late = lateness(answers)
    is_fault = ttft_ms is not None and 1e3 * late.p99_s > LATE_SHARE * ttft_ms.median
    return Generator(1e3 * late.p50_s, 1e3 * late.p99_s, 1e3 * late.max_s, is_fault)
