"""Cumulative distributions of latencies: which samples of a record belong on one drawing, and the drawing. Pure.

Owns the words of latency (TTFT, TPOT, ITL, E2E) in names of samples, and who is drawn beside whom. Refuses to know
which bench measured them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from edge_llm.bench.stats import median, percentile
from edge_llm.report.axes import Axis, spans_decades
from edge_llm.report.document import Plot
from edge_llm.report.requests import Request
from edge_llm.report.svg import COLOURS, Level, Series, curves

METRICS: Final[Mapping[str, str]] = {
    "ttft_s": "time to first token (TTFT)",
    "tpot_s": "time per output token (TPOT)",
    "itl_s": "inter-token latency (ITL)",
    "e2e_s": "end to end (E2E)",
}
# Fewer samples make no curve: tables have their median.
_LEAST: Final = 8
# A curve of more samples is drawn through so many of its quantiles, and has a marker at these.
_POINTS: Final = 160
_MARKED: Final = (0.1, 0.5, 0.9)
_METRIC: Final = re.compile(r"(?P<metric>ttft|tpot|itl|e2el?)(?:_(?P<rest>\w+))?_s$")
# "auto, poisson, 0.5/s" of bench serve; "conv, auto (strict), 0.5/s" of bench goodput.
_LOAD: Final = re.compile(r"(?P<who>.+), (?P<where>(?:closed|poisson|constant|burst|trace), .+)")
_REPLAY: Final = re.compile(r"(?P<where>.+?), (?P<who>.+), (?P<rate>[\d.]+/s)")
Samples = Mapping[str, Sequence[float]]


def distributions(samples: Samples, requests: Sequence[Request]) -> list[Plot]:
    """One drawing for each metric of each part of the run. Of requests what no sample has."""
    drawn: dict[tuple[str, str], dict[str, Sequence[float]]] = {}
    known = {metric for name in samples if (found := _named(name)) for metric in found[:1]}
    for metric, where, who, values in [*_of_samples(samples), *_of_requests(requests, known)]:
        if len(values) >= _LEAST:
            drawn.setdefault((where, metric), {}).setdefault(who, values)
    plots = []
    for (where, metric), curves_of in drawn.items():
        for number in range(0, len(curves_of), COLOURS):
            some = dict(list(curves_of.items())[number : number + COLOURS])
            plots.append(distribution(f"{where}: {METRICS[metric]}" if where else METRICS[metric], some))
    return plots


def distribution(heading: str, known: Samples) -> Plot:
    """What share of the requests was at most so late."""
    most = [value for values in known.values() for value in (percentile(values, 0.01), percentile(values, 0.99))]
    is_log = spans_decades(most)
    factor, kind = (1e3, "ms") if max(most) < 1.0 else (1.0, "s")
    series = []
    for who, values in known.items():
        points = [(factor * at, share) for at, share in _steps(values) if not is_log or at > 0]
        marked = tuple((factor * percentile(values, share), share) for share in _MARKED)
        label = f"{who or 'all'} (n {len(values)}, median {factor * median(values):.3g} {kind})"
        series.append(Series(label, tuple(points), marked=marked, is_stepped=True))
    levels = [Level(0.5, "half"), Level(0.9, "90 %")]
    x = Axis(f"{kind}{', logarithmic' if is_log else ''}", is_log=is_log)
    y = Axis("share of requests", low=0.0, high=1.0, is_share=True)
    return Plot(heading, curves(heading, series, x, y, levels))


def _steps(values: Sequence[float]) -> list[tuple[float, float]]:
    ordered = sorted(values)
    n = len(ordered)
    numbers = range(n) if n <= _POINTS else sorted({round(i * (n - 1) / _POINTS) for i in range(_POINTS + 1)})
    return [(ordered[0], 0.0), *((ordered[number], (number + 1) / n) for number in numbers)]


def _of_samples(samples: Samples) -> Iterator[tuple[str, str, str, Sequence[float]]]:
    """Metric, part of the run, whose. Where a record has samples of everybody (`all`) beside parts of them, those."""
    named = {name: found for name in samples if (found := _named(name))}
    has_all = any(_is_of_all(who) for _, _, who in named.values())
    for name, (metric, where, who) in named.items():
        if not has_all or _is_of_all(who):
            yield metric, where, who.removesuffix(".all"), samples[name]


def _is_of_all(who: str) -> bool:
    return who.endswith(".all")


def _named(name: str) -> tuple[str, str, str] | None:
    """`conv, auto, 0.5/s: ttft_s` is ("ttft_s", "conv, 0.5/s", "auto"); `answers.capacity.ttft_s` is ("ttft_s",
    "answers", "capacity"); `ttft_direct_s` is ("ttft_s", "", "direct")."""
    found = _METRIC.search(name)
    if found is None:
        return None
    metric = f"{found['metric'].removesuffix('l') if found['metric'] == 'e2el' else found['metric']}_s"
    who = " ".join(part for part in (name[: found.start()].rstrip(" .:_"), found["rest"] or "") if part)
    return metric, *placed(who)


def placed(who: str) -> tuple[str, str]:
    """Part of the run, whose."""
    if found := _LOAD.fullmatch(who):
        return found["where"], found["who"]
    if found := _REPLAY.fullmatch(who):
        return f"{found['where']}, {found['rate']}", found["who"]
    where, dot, rest = who.partition(".")
    if dot and rest != "all" and " " not in where:
        return where, rest
    where, colon, rest = who.partition(": ")
    return (where, rest) if colon else ("", who)


def _of_requests(requests: Sequence[Request], known: set[str]) -> Iterator[tuple[str, str, str, list[float]]]:
    """By the name of the case."""
    found: dict[tuple[str, str], list[float]] = {}
    for request in requests:
        for metric, values in request.metrics().items():
            if metric not in known:
                found.setdefault((metric, request.case), []).extend(values)
    for (metric, case), values in found.items():
        yield metric, *placed(case), values
