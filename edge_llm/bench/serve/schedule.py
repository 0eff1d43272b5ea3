"""How much load there is, and which request is sent when under it. Pure.

Owns the words of a load (process, rate, clients, how long) and putting requests on times. Refuses to know servers.

Rules: a pass has requests and arrivals of its own, the same for all that are compared; another rate is the same
process, faster or slower. Recorded traffic keeps its own times.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from edge_llm.bench.serve.arrivals import OPEN, OpenProcess, times
from edge_llm.bench.serve.workloads import (
    BadWorkload,
    Request,
    Workload,
    mean_tokens,
    of_trace,
    shuffled,
    squeezed,
)
from edge_llm.bench.traces import Trace

Profile = Literal["closed", "poisson", "constant", "burst", "trace"]
PROFILES: Final[tuple[Profile, ...]] = ("closed", *OPEN, "trace")


@dataclass(frozen=True, slots=True)
class Load:
    """`clients`: of a closed loop. `rate_per_s`: of an open one; None: recorded times as they are. Ends after
    `requests`, or when `seconds` are over, whatever is first. `burst`: how many come at once."""

    profile: Profile
    rate_per_s: float | None = None
    clients: int | None = None
    requests: int | None = None
    seconds: float | None = None
    burst: int = 1

    @property
    def label(self) -> str:
        if self.profile == "closed":
            return f"closed, {self.clients} at once"
        return f"{self.profile}, {'as recorded' if self.rate_per_s is None else f'{self.rate_per_s:.4g}/s'}"

    @property
    def is_open(self) -> bool:
        return self.profile != "closed"


@dataclass(frozen=True, slots=True)
class Timed:
    at_s: float
    request: Request


@dataclass(frozen=True, slots=True)
class Source:
    """Where requests come from: a workload, or (`trace`) recorded traffic of which a part is taken for each load."""

    workload: Workload
    trace: Trace | None = None
    scale: float = 1.0
    n_ctx: int = 4096

    def untimed(self, seed: int) -> Workload:
        """For arrivals that are not recorded."""
        return shuffled(self.workload, seed) if self.workload.is_timed else self.workload


def scheduled(source: Source, load: Load, seed: int, number: int = 0) -> list[Timed]:
    """The requests of pass `number` of an open load, in order of time. Raises BadWorkload."""
    if load.profile == "trace":
        return [Timed(request.at_s or 0.0, request) for request in _recorded(source, load, seed).requests]
    assert load.profile != "closed", "a closed loop has no times"
    process: OpenProcess = load.profile
    if load.rate_per_s is None:
        raise BadWorkload(f"a rate is missing for arrivals that are {process}")
    at_s = times(process, load.rate_per_s, _of_pass(seed, number), load.requests, load.seconds, load.burst)
    if not at_s:
        raise BadWorkload(f"no request comes within {load.seconds:g} s at {load.rate_per_s:g}/s: measure for longer")
    taken = source.untimed(seed).stream(number * len(at_s))
    return [Timed(at, request) for at, request in zip(at_s, taken, strict=False)]


def endless(source: Source, load: Load, seed: int, number: int = 0) -> Iterator[Request]:
    """The requests of pass `number` of a closed loop, in order; without an end where only time ends it."""
    skip = number * (load.requests or 0)
    return itertools.islice(source.untimed(seed).stream(skip), load.requests)


def facts_of(source: Source, load: Load, seed: int, passes: int) -> dict[str, Any]:
    """Of one load, for the record: its words with all defaults, and what is sent under it in `passes`."""
    facts = {
        "profile": load.profile,
        "rate_per_s": load.rate_per_s,
        "clients": load.clients,
        "requests": load.requests,
        "seconds": load.seconds,
        "burst": load.burst if load.profile == "burst" else None,
    }
    said: dict[str, Any] = {name: value for name, value in facts.items() if value is not None}
    sent = _sent(source, load, seed, passes)
    if not sent:
        return said
    prompt_tokens, answer_tokens = mean_tokens(sent)
    return said | {
        "sent": len(sent),
        "mean_prompt_tokens": round(prompt_tokens, 1),
        "mean_answer_tokens": round(answer_tokens, 1),
        "clipped": sum(request.is_clipped for request in sent),
    }


def _sent(source: Source, load: Load, seed: int, passes: int) -> list[Request]:
    """Empty where only the answers, or a search, say how many; and where there is no such load."""
    try:
        if load.is_open:
            found = [one.request for number in range(passes) for one in scheduled(source, load, seed, number)]
        elif load.requests is not None and load.seconds is None:
            found = [one for number in range(passes) for one in endless(source, load, seed, number)]
        else:
            found = []
    except BadWorkload:  # of this load, which its turn will say
        return []
    return found


def _recorded(source: Source, load: Load, seed: int) -> Workload:
    if source.trace is not None:
        return of_trace(source.trace, source.scale, source.n_ctx, seed, load.requests, load.seconds, load.rate_per_s)
    if not source.workload.is_timed:
        raise BadWorkload("recorded times are asked for, and this workload has none: choose another profile")
    workload = source.workload if load.rate_per_s is None else squeezed(source.workload, load.rate_per_s)
    kept = [r for r in workload.requests if load.seconds is None or (r.at_s or 0.0) < load.seconds][: load.requests]
    return Workload(workload.name, tuple(kept), workload.facts)


def _of_pass(seed: int, number: int) -> int:
    """Another seed for each pass; the first one's is the seed itself."""
    return seed + 1_000_003 * number
