"""What the replays of one comparison have given so far, and how it goes into the record.

Owns the words that measuring (comparison.py) and judging (verdicts.py) share. Refuses to know how it was measured and
what it means.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from edge_llm.bench.goodput import REGIMES, Limits, Unloaded
from edge_llm.bench.run import Run
from edge_llm.bench.serve.answers import Answer
from edge_llm.bench.traces import Clipping, Trace


@dataclass(frozen=True, slots=True)
class Workload:
    """A trace as it is replayed."""

    trace: Trace
    clipping: Clipping

    @property
    def name(self) -> str:
        return self.trace.name


@dataclass(frozen=True, slots=True)
class Replayed:
    """One rate of one arrangement. Answers are in order of arrival, the same requests for all arrangements. `regime`:
    whose limits the arrangement was told; None: it counts for all."""

    workload: str
    arrangement: str
    rate_per_s: float
    answers: tuple[Answer, ...]
    regime: str | None = None

    @property
    def where(self) -> str:
        told = f" ({self.regime})" if self.regime else ""
        return f"{self.workload}, {self.arrangement}{told}, {self.rate_per_s:.3f}/s"

    def counts_for(self, regime: str) -> bool:
        return self.regime in (None, regime)


@dataclass(slots=True)
class Tally:
    """What is known so far. `server_flags`: of llama-server, by workload."""

    workloads: list[Workload] = field(default_factory=list)
    unloaded: dict[str, Unloaded] = field(default_factory=dict)
    capacity_per_s: dict[str, float] = field(default_factory=dict)
    replays: list[Replayed] = field(default_factory=list)
    seconds_per_point: float = 0.0
    server_flags: dict[str, str] = field(default_factory=dict)

    def limits(self, workload: str) -> dict[str, Limits]:
        """By regime."""
        return {regime.name: regime.limits(self.unloaded[workload]) for regime in REGIMES}


def keep(run: Run, done: Replayed) -> None:
    """Raw times of every request. Lists of what not all have (`ttft_s`) follow `is_answered` and `is_complete`."""
    for answer in done.answers:
        run.case({"case": done.where, "rate_per_s": done.rate_per_s, **_line_of(answer)})
        values = {
            "at_s": answer.at_s,
            "late_s": answer.late_s,
            "asked_tokens": answer.asked_tokens,
            "tokens": answer.tokens,
            "is_answered": answer.ttft_s is not None,
            "is_complete": answer.is_complete,
            "ttft_s": answer.ttft_s,
            "tpot_s": answer.tpot_s if answer.is_complete else None,
            "e2e_s": answer.e2e_s if answer.is_complete else None,
            "is_split": answer.own.get("mode") == "split" if answer.own.get("mode") else None,
            "queue_ms": answer.own.get("queue_ms"),
            "prefill_ms": answer.own.get("prefill_ms"),
        }
        for name, value in values.items():
            if value is not None:
                run.add(f"{done.where}: {name}", round(float(value), 6))
    if short := sum(answer.is_cut_short for answer in done.answers):
        run.notes.append(f"{done.where}: {short} of {len(done.answers)} answers ended before they had all tokens")
    for error, count in Counter(answer.error for answer in done.answers if answer.error).items():
        run.notes.append(f"{done.where}: {count} of {len(done.answers)} requests failed: {error}")


def _line_of(answer: Answer) -> dict[str, Any]:
    """Times after the start of the replay, under the names of every line of a request."""
    times = {"at_s": answer.at_s, "sent_s": answer.sent_s, "first_s": answer.first_s, "last_s": answer.last_s}
    return {
        **{name: None if value is None else round(value, 6) for name, value in times.items()},
        "ended_s": None if answer.ended_s is None else round(answer.ended_s, 6),
        "answer_tokens_asked": answer.asked_tokens,
        "answer_tokens": answer.tokens,
        "is_complete": answer.is_complete,
        "error": answer.error,
        "own": dict(answer.own),
    }
