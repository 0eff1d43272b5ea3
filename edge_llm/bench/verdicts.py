"""What the replays of a comparison mean: goodput of each arrangement, who won under which limits, where it was lost.

Pure. Owns the figures of `edge-llm bench goodput`, its bars, and the sentences about them. Refuses to know how anything
was measured. What was not measured is missing, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from edge_llm.bench.contestants import AUTO, LOCAL, NODES, SERVER, SPLIT
from edge_llm.bench.goodput import (
    GOALS,
    REGIMES,
    STRICT_TTFT,
    Limits,
    Point,
    Regime,
    certain_ratio,
    goodput,
    interval,
    ratio_to_best,
)
from edge_llm.bench.replayed import Replayed, Tally, Workload
from edge_llm.bench.serve.answers import Answer
from edge_llm.bench.serve.driver import lateness
from edge_llm.bench.stats import percentile, wilson

ORDER: Final = (SPLIT, LOCAL, AUTO, SERVER)
GOAL: Final = GOALS[0]
# `auto` may be so much worse than the better of always and never splitting.
AUTO_BAR: Final = 0.95
# Where split wins, auto shall split most requests.
MOSTLY: Final = 0.5
# A generator that is later than this share of the strictest limit of TTFT measures itself.
LATE_SHARE: Final = 0.1


def figures(tally: Tally) -> dict[str, Any]:
    """Of everything measured so far."""
    traces = {one.name: _of_trace(tally, one) for one in tally.workloads if one.name in tally.unloaded}
    found: dict[str, Any] = {"traces": traces, "seconds_per_point": tally.seconds_per_point}
    if tally.server_flags:
        found["llama_server_flags"] = tally.server_flags
    answers = [answer for done in tally.replays for answer in done.answers]
    if answers:
        found["generator"] = _generator(tally, answers)
        found["answers_of_other_length"] = sum(
            answer.is_cut_short or (answer.is_complete and answer.tokens != answer.asked_tokens) for answer in answers
        )
    found["verdicts"] = [line for name, trace in traces.items() for line in _sentences(name, trace)]
    return found


def _of_trace(tally: Tally, one: Workload) -> dict[str, Any]:
    limits = tally.limits(one.name)
    replays = [done for done in tally.replays if done.workload == one.name]
    return {
        "requests": len(one.trace.rows),
        "mean_prompt_tokens": round(one.trace.mean_prompt_tokens, 1),
        "mean_answer_tokens": round(one.trace.mean_answer_tokens, 1),
        "clipping": asdict(one.clipping),
        "unloaded": asdict(tally.unloaded[one.name]),
        "capacity_per_s": tally.capacity_per_s.get(one.name),
        "regimes": {
            regime.name: _of_regime(
                [done for done in replays if done.counts_for(regime.name)], regime, limits[regime.name]
            )
            for regime in REGIMES
        },
    }


def _split_share(replays: Iterable[Replayed]) -> dict[str, Any]:
    """How many of auto's answers that came to their end were split: their last event says it. Of the others, `unknown`,
    nobody told the client."""
    modes = [answer.own.get("mode") for done in replays if done.arrangement == AUTO for answer in done.answers]
    known = [mode for mode in modes if mode is not None]
    split = known.count("split")
    low, high = wilson(split, len(known))
    share = split / len(known) if known else None
    return {"share": share, "low": low, "high": high, "answers": len(known), "unknown": len(modes) - len(known)}


def _share_where_split_wins(replays: Sequence[Replayed], curves: Mapping[str, Sequence[Point]]) -> dict[str, Any]:
    """The same at those rates alone at which always splitting kept more requests within limits than never splitting.
    At lower ones either way keeps them all, at higher ones splitting may have lost, too: there is nothing to choose."""
    local = {point.rate_per_s: point.attainment for point in curves.get(LOCAL, ())}
    won = [
        point.rate_per_s for point in curves.get(SPLIT, ()) if point.attainment > local.get(point.rate_per_s, math.inf)
    ]
    return {**_split_share(done for done in replays if done.rate_per_s in won), "rates_per_s": won}


def _of_regime(replays: Sequence[Replayed], regime: Regime, limits: Limits) -> dict[str, Any]:
    curves = {name: _curve(replays, name, limits) for name in ORDER}
    curves = {name: curve for name, curve in curves.items() if curve}
    cut_short = _cut_short(curves)
    rows = {
        name: {
            **{f"goodput_{100 * goal:.0f}": _goodput(curve, goal) for goal in GOALS},
            "is_cut_short": name in cut_short,
            "curve": [_point(done, limits) for done in _of(replays, name)],
        }
        for name, curve in curves.items()
    }
    found: dict[str, Any] = {
        "limits": asdict(limits),
        "why": regime.why,
        "arrangements": rows,
        "auto_split_share": _split_share(replays),
        "auto_split_share_where_split_wins": _share_where_split_wins(replays, curves),
    }
    if {SPLIT, LOCAL, AUTO} <= curves.keys() - cut_short:
        found["auto_to_better"] = _ratio(curves, AUTO, [SPLIT, LOCAL], [AUTO_BAR])
        found["split_to_local"] = _ratio(curves, SPLIT, [LOCAL], [AUTO_BAR, 1 / AUTO_BAR])
    return found


def _ratio(curves: Mapping[str, Sequence[Point]], mine: str, others: Sequence[str], bars: Sequence[float]) -> Any:
    """`least`, `most`: where it lies for certain (None: no bound), when a goodput is beyond the rates measured. It is
    decided when all of that is on the same side of each bar."""
    own, rest = curves[mine], [curves[other] for other in others]
    ratio, low, high = ratio_to_best(own, rest, GOAL)
    least, most = certain_ratio(own, rest, GOAL)
    return {
        "ratio": ratio,
        "low": low,
        "high": high,
        "least": least,
        "most": None if math.isinf(most) else most,
        "bounds": {name: goodput(curves[name], GOAL).bound for name in (mine, *others)},
        "is_decided": all((least < bar) == (most < bar) for bar in bars),
    }


def _cut_short(curves: Mapping[str, Sequence[Point]]) -> set[str]:
    """Who still attained the goal where its curve ends, though others were asked for more: an interrupted run."""
    ends = {name: max(point.rate_per_s for point in curve) for name, curve in curves.items()}
    return {
        name
        for name, curve in curves.items()
        if ends[name] < max(ends.values()) and goodput(curve, GOAL).bound == "at_least"
    }


def _of(replays: Sequence[Replayed], name: str) -> list[Replayed]:
    return sorted((done for done in replays if done.arrangement == name), key=lambda done: done.rate_per_s)


def _curve(replays: Sequence[Replayed], name: str, limits: Limits) -> list[Point]:
    return [
        Point(done.rate_per_s, tuple(answer.timing.meets(limits) for answer in done.answers))
        for done in _of(replays, name)
    ]


def _goodput(curve: Sequence[Point], goal: float) -> dict[str, Any]:
    found = goodput(curve, goal)
    low, high = interval(curve, goal)
    return {
        "per_s": found.rate_per_s,
        "low": low,
        "high": high,
        "per_node_per_s": found.rate_per_s / NODES,
        "bound": found.bound,
    }


def _point(done: Replayed, limits: Limits) -> dict[str, Any]:
    """One rate: attainment of both limits with its interval, and who missed which."""
    timings, count = [answer.timing for answer in done.answers], len(done.answers)
    met = sum(timing.meets(limits) for timing in timings)
    low, high = wilson(met, count)
    complete = [timing for timing in timings if timing.is_complete]
    return {
        "rate_per_s": done.rate_per_s,
        "requests": count,
        "attainment": met / count,
        "low": low,
        "high": high,
        "failed": (count - len(complete)) / count,
        "missed_ttft": sum(not timing.meets_ttft(limits) for timing in complete) / count,
        "missed_tpot": sum(not timing.meets_tpot(limits) for timing in complete) / count,
        "ttft_s": _quantiles([timing.ttft_s for timing in timings]),
        "tpot_s": _quantiles([timing.tpot_s for timing in complete]),
    }


def _quantiles(values: Sequence[float | None]) -> dict[str, float]:
    known = [value for value in values if value is not None]
    return {f"p{share:.0f}": percentile(known, share / 100) for share in (50, 90, 99)} if known else {}


def _generator(tally: Tally, answers: Sequence[Answer]) -> dict[str, Any]:
    """Whether the load was sent on time."""
    late = lateness(answers)
    strictest_s = min(STRICT_TTFT.limits(unloaded).ttft_s for unloaded in tally.unloaded.values())
    return {
        "late_p50_ms": 1e3 * late.p50_s,
        "late_p99_ms": 1e3 * late.p99_s,
        "late_max_ms": 1e3 * late.max_s,
        "is_saturated": late.p99_s > LATE_SHARE * strictest_s,
    }


# -- sentences


def _sentences(name: str, trace: Mapping[str, Any]) -> Iterator[str]:
    for regime in REGIMES:
        yield from _of_a_regime(f"{name}, {regime.name}", regime, trace["regimes"][regime.name])


def _of_a_regime(where: str, regime: Regime, found: Mapping[str, Any]) -> Iterator[str]:
    rows = found["arrangements"]
    for words, share in (
        ("", found["auto_split_share"]),
        (", where always splitting beats never splitting", found["auto_split_share_where_split_wins"]),
    ):
        if share["share"] is not None:
            yield (
                f"{where}{words}: auto split {share['share']:.0%} of {share['answers']} answers that came to their end "
                f"({share['low']:.0%} to {share['high']:.0%}); unknown of {share['unknown']}"
            )
    rates = {name: row[_key(GOAL)]["per_s"] for name, row in rows.items()}
    if len(rates) > 1 and not any(row["is_cut_short"] for row in rows.values()):
        first = max(rates, key=lambda name: rates[name])
        yield f"{where}: most requests in limits with {first}: " + ", ".join(
            f"{name} {_bounded(rows[name][_key(GOAL)])}" for name in rates
        )
    if "split_to_local" in found:
        to_local, to_better = found["split_to_local"], found["auto_to_better"]
        expected = _expectation(to_local["ratio"], regime) if to_local["is_decided"] else _undecided(to_local)
        loser = SPLIT if to_local["ratio"] < 1 else LOCAL
        why = _why_lost(loser, rows[loser]["curve"])
        yield f"{where}: split over local {_with_interval(to_local)}, {expected}; {why}"
        verdict = _against_bar(to_better) if to_better["is_decided"] else _undecided(to_better)
        yield f"{where}: auto over the better of split and local {_with_interval(to_better)}: {verdict}"


def _against_bar(found: Mapping[str, Any]) -> str:
    """What may be said of auto over the better: that it is near is said only where all of the interval is."""
    if found["ratio"] < AUTO_BAR:
        return "worse by more than 5 %"
    return "within 5 %" if found["low"] >= AUTO_BAR else "so few requests do not tell whether that is within 5 %"


def _undecided(found: Mapping[str, Any]) -> str:
    """A ratio of which the rates measured say too little."""
    words = {"between": "between two of them", "at_most": "below the lowest", "at_least": "above the highest"}
    sides = ", ".join(f"{name} is {words[bound]}" for name, bound in found["bounds"].items())
    return f"not decided by the rates measured ({sides})"


def _expectation(split_to_local: float, regime: Regime) -> str:
    if AUTO_BAR <= split_to_local <= 1 / AUTO_BAR:
        return "no more than 5 % apart"
    return "as expected" if (split_to_local > 1) == regime.should_split_win else "against expectation"


def _why_lost(name: str, curve: Sequence[Mapping[str, Any]]) -> str:
    """At the first rate at which it misses the goal."""
    for point in curve:
        if point["attainment"] < GOAL:
            return (
                f"at {point['rate_per_s']:.2f}/s {point['missed_ttft']:.0%} of the requests to {name} miss TTFT, "
                f"{point['missed_tpot']:.0%} TPOT, {point['failed']:.0%} fail"
            )
    return f"{name} keeps the limits at all rates measured"


def _key(goal: float) -> str:
    return f"goodput_{100 * goal:.0f}"


def _bounded(found: Mapping[str, Any]) -> str:
    sign = {"between": "", "at_most": "about, below the rates measured, ", "at_least": "at least "}[found["bound"]]
    return f"{sign}{found['per_s']:.3f}/s ({found['low']:.3f} to {found['high']:.3f})"


def _with_interval(found: Mapping[str, Any]) -> str:
    return f"{found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


# -- bars


def missed(found: Mapping[str, Any]) -> list[str]:
    """Which bars were not met, as lines for people."""
    lines = [] if found["traces"] else ["nothing was measured"]
    if found.get("generator", {}).get("is_saturated"):
        lines.append("the generator was late: the figures are its own")
    for name, trace in found["traces"].items():
        for regime, result in trace["regimes"].items():
            where, share = f"{name}, {regime}", result["auto_split_share_where_split_wins"]
            if "auto_to_better" not in result:
                lines.append(f"{where} was not measured for split, local and auto")
                continue
            to_better, to_local = result["auto_to_better"], result["split_to_local"]
            if not to_better["is_decided"]:
                lines.append(f"{where}: auto over the better of split and local: {_undecided(to_better)}")
            elif to_better["ratio"] < AUTO_BAR:
                lines.append(
                    f"{where}: auto has {to_better['ratio']:.2f} of the goodput of the better of split and local, not "
                    f"at least {AUTO_BAR}"
                )
            elif to_better["low"] < AUTO_BAR:
                lines.append(f"{where}: auto over the better of split and local: {_against_bar(to_better)}")
            if not to_local["is_decided"]:
                lines.append(f"{where}: split over local: {_undecided(to_local)}")
            elif to_local["ratio"] > 1 and (share["share"] or 0.0) < MOSTLY:
                some = f"{share['share'] or 0.0:.0%} of {share['answers']} answers"
                lines.append(f"{where}: split wins over local, and at the rates where it does auto split {some} only")
    return lines
