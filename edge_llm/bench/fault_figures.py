"""What a campaign was asked for, what became of each blow, and the figures of all: counts, times, and which promises
were not kept.

Owns `Plan`, `Outcome`, `Tally` and the bounds. Refuses to know how blows are struck.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from edge_llm.bench.fault_kinds import DEAD_S, SILENT_S, Kind
from edge_llm.bench.followed import Verdict
from edge_llm.bench.run import Run

_DETECTION_GOALS_S: Final = {"dead": DEAD_S, "silent": SILENT_S}


@dataclass(frozen=True, slots=True)
class Plan:
    """Options of the workers, of the undisturbed one, and of those that serve another model.

    `long_answer_tokens`: of kinds whose answers must outlast what is done. `allowance_s`: what a stream may take to go
    on above the detection of its fault: its tokens are computed again, on a machine that may be shared.
    """

    kinds: tuple[Kind, ...]
    per_kind: int
    options: tuple[str, ...]
    reference_options: tuple[str, ...]
    stranger_options: tuple[str, ...]
    prompt_tokens: int
    answer_tokens: int
    long_answer_tokens: int
    allowance_s: float
    streams: int = 3
    attempts: int = 5
    seed: int = 0

    def answer_tokens_of(self, kind: Kind) -> int:
        return self.long_answer_tokens * kind.times_as_long if kind.is_long else self.answer_tokens

    def resumed_bound_s(self, kind: Kind) -> float:
        """The median over this kind's streams is to be within it: one hiccup of the machine is no broken promise."""
        return kind.detection_s + self.allowance_s


@dataclass(frozen=True, slots=True)
class Outcome:
    """One blow that met its target. `computed_again`: why KV that was to be moved was not, in the gateway's words.
    `stale_tokens`: what the gateway dropped meanwhile as of plans that were over.

    It is noted, not demanded: a cancellation that reaches a woken worker before it speaks leaves nothing to drop.
    """

    kind: str
    proof: str
    verdicts: tuple[Verdict, ...]
    resumed_s: float | None
    failures: tuple[str, ...]
    stale_tokens: int = 0
    computed_again: str = ""


@dataclass(slots=True)
class Tally:
    """What happened so far. `untested` says per kind why it could not be tried here."""

    outcomes: list[Outcome] = field(default_factory=list)
    attempts: dict[str, int] = field(default_factory=dict)
    untested: dict[str, str] = field(default_factory=dict)


def figures(tally: Tally, plan: Plan, run: Run) -> dict[str, Any]:
    """Counts over all kinds, and a line per kind."""
    verdicts = [verdict for outcome in tally.outcomes for verdict in outcome.verdicts]
    tested = [kind for kind in plan.kinds if kind.name not in tally.untested]
    return {
        "kinds": len(tested),
        "faults": len(tested) * plan.per_kind,
        "hit_in_flight": sum(bool(outcome.proof) for outcome in tally.outcomes),
        "streams": len(verdicts),
        "streams_lost": sum(verdict.is_lost for verdict in verdicts),
        "tokens_missing": sum(verdict.missing for verdict in verdicts),
        "tokens_repeated": sum(verdict.repeated for verdict in verdicts),
        "streams_different": sum(verdict.is_different for verdict in verdicts),
        "detection_goals_s": dict(_DETECTION_GOALS_S),
        "not_tested": dict(tally.untested),
        "per_kind": {kind.name: _line(tally, plan, kind, run) for kind in tested},
    }


def _line(tally: Tally, plan: Plan, kind: Kind, run: Run) -> dict[str, Any]:
    outcomes = [outcome for outcome in tally.outcomes if outcome.kind == kind.name]
    resumed = sorted(run.samples.get(f"{kind.name}: resumed_s", []))
    return {
        "what": kind.words,
        "hit": sum(bool(outcome.proof) for outcome in outcomes),
        "attempts": tally.attempts.get(kind.name, 0),
        "bad_streams": sum(not verdict.is_good for outcome in outcomes for verdict in outcome.verdicts),
        "resumed_s_p50": round(run.median(f"{kind.name}: resumed_s") or 0.0, 3) if resumed else None,
        "resumed_s_max": round(resumed[-1], 3) if resumed else None,
        "resumed_bound_s": plan.resumed_bound_s(kind),
        "stale_tokens": sum(outcome.stale_tokens for outcome in outcomes),
        "computed_again": sum(bool(outcome.computed_again) for outcome in outcomes),
    }


def broken(found: Mapping[str, Any]) -> list[str]:
    """Which promises were not kept, as lines for people."""
    lines = [
        f"{name} is {found[name]}, not 0"
        for name in ("streams_lost", "tokens_missing", "tokens_repeated", "streams_different")
        if found[name]
    ]
    if found["hit_in_flight"] < found["faults"]:
        lines.append(f"only {found['hit_in_flight']} of {found['faults']} faults are proven to have met a stream")
    lines += [
        f"{name}: KV that was to be moved was computed again in {line['computed_again']} of {line['hit']} trials"
        for name, line in found["per_kind"].items()
        if 2 * line["computed_again"] > line["hit"]
    ]
    return lines + [
        f"{name}: the disturbed stream went on after {line['resumed_s_p50']:.1f} s (median), "
        f"not within {line['resumed_bound_s']:.1f} s"
        for name, line in found["per_kind"].items()
        if (line["resumed_s_p50"] or 0.0) > line["resumed_bound_s"]
    ]
