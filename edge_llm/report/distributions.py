"""Cumulative distributions of latencies: which samples of a record belong on one drawing, and the drawing. Pure.

Owns the words of latency (TTFT, TPOT, ITL, E2E) in names of samples and of case lines, and who is drawn beside whom.
Refuses to know which bench measured them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from edge_llm.bench.stats import median, percentile
from edge_llm.report.axes import Axis, spans_decades
from edge_llm.report.document import Plot
from edge_llm.report.svg import COLOURS, Level, Series, curves

METRICS: Final[Mapping[str, str]] = {
    "ttft_s": "time to first token (TTFT)",
    "tpot_s": "time per output token (TPOT)",
    "itl_s": "inter-token latency (ITL)",
    "e2e_s": "end to end (E2E)",
}
# Fewer samples make no curve: tables have their median.
_LEAST: Final = 8
# A curve of more samples is drawn through so many of its quantiles.
_POINTS: Final = 160
_ARRIVAL: Final = re.compile(r"(?P<where>.+?), (?P<who>.+), (?P<rate>[\d.]+/s)")
Samples = Mapping[str, Sequence[float]]


def distributions(samples: Samples, lines: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """One drawing for each metric of each part of the run."""
    drawn: dict[tuple[str, str], dict[str, Sequence[float]]] = {}
    for metric, where, who, values in [*_of_samples(samples), *_of_lines(lines)]:
        if len(values) >= _LEAST:
            drawn.setdefault((where, metric), {}).setdefault(who, values)
    plots = []
    for (where, metric), known in drawn.items():
        for number in range(0, len(known), COLOURS):
            some = dict(list(known.items())[number : number + COLOURS])
            plots.append(distribution(f"{where}: {METRICS[metric]}" if where else METRICS[metric], some))
    return plots


def distribution(heading: str, known: Samples) -> Plot:
    """What share of the requests was at most so late; markers at 50, 90 and 99 %."""
    most = [value for values in known.values() for value in (percentile(values, 0.01), percentile(values, 0.99))]
    is_log = spans_decades(most)
    in_ms = max(most) < 1.0
    factor, kind = (1e3, "ms") if in_ms else (1.0, "s")
    series = [
        Series(
            f"{who or 'all'} (n {len(values)}, median {factor * median(values):.3g} {kind})",
            tuple((factor * at, share) for at, share in _steps(values) if not is_log or at > 0),
            has_markers=False,
            is_stepped=True,
        )
        for who, values in known.items()
    ]
    levels = [Level(0.5, "half"), Level(0.9, "90 %"), Level(0.99, "")]
    x = Axis(f"{kind}{', logarithmic' if is_log else ''}", is_log=is_log)
    return Plot(
        heading, curves(heading, series, x, Axis("share of requests", low=0.0, high=1.0, is_share=True), levels)
    )


def _steps(values: Sequence[float]) -> list[tuple[float, float]]:
    ordered = sorted(values)
    count = len(ordered)
    numbers = (
        range(count) if count <= _POINTS else sorted({round(i * (count - 1) / _POINTS) for i in range(_POINTS + 1)})
    )
    return [(ordered[0], 0.0), *((ordered[number], (number + 1) / count) for number in numbers)]


def _of_samples(samples: Samples) -> Iterator[tuple[str, str, str, Sequence[float]]]:
    """Metric, part of the run, whose. Where a record has samples of everybody (`all`) beside parts of them, those."""
    named = {name: found for name in samples if (found := _named(name))}
    has_all = any(".all" in who or who == "all" for _, _, who in named.values())
    for name, (metric, where, who) in named.items():
        if not has_all or ".all" in who:
            yield metric, where, who.removesuffix(".all"), samples[name]


def _named(name: str) -> tuple[str, str, str] | None:
    """`conv, auto, 0.5/s: ttft_s` is ("ttft_s", "conv, 0.5/s", "auto"); `answers.capacity.ttft_s` is ("ttft_s",
    "answers", "capacity"); `ttft_direct_s` is ("ttft_s", "", "direct")."""
    metric = next((known for known in METRICS if re.search(rf"{known[:-2]}(_\w+)?_s$", name)), None)
    if metric is None:
        return None
    who = re.sub(rf"{metric[:-2]}_((?P<rest>\w+)_)?s$", lambda found: found["rest"] or "", name).rstrip(" .:_")
    if found := _ARRIVAL.fullmatch(who):
        return metric, f"{found['where']}, {found['rate']}", found["who"]
    where, dot, rest = who.partition(".")
    if dot and rest != "all":
        return metric, where, rest
    where, colon, rest = who.partition(": ")
    return (metric, where, rest) if colon else (metric, "", who)


def _of_lines(lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str, list[float]]]:
    """By the name of the case; `itl_s` may be a list in every line."""
    for case in dict.fromkeys(str(line.get("case", "")) for line in lines):
        of_case = [line for line in lines if str(line.get("case", "")) == case]
        for metric in METRICS:
            values = list(_numbers(line.get(metric) for line in of_case))
            if values:
                yield metric, "", case, values


def _numbers(values: Iterable[Any]) -> Iterator[float]:
    for value in values:
        if isinstance(value, list):
            yield from _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield float(value)
