"""What happened when: the stages of requests, KV in memory, and what the boards read beside the run. Pure.

Owns these drawings and where their figures come from: case lines (one per request), stages among the samples, the
series of `resources`. Refuses to know which bench measured them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from edge_llm.bench.resources import Watched
from edge_llm.bench.stats import median
from edge_llm.report.axes import Axis
from edge_llm.report.document import Plot
from edge_llm.report.svg import COLOURS, Row, Series, Span, curves, stages
from edge_llm.report.words import of_sample

# In order of time; `handoff_ms` is the last chunk and adopting in one.
STAGES: Final[Mapping[str, str]] = {
    "queue_ms": "queue",
    "wait_ms": "wait",
    "prefill_ms": "prefill",
    "last_chunk_ms": "last KV chunk",
    "handoff_ms": "hand-off",
    "adopt_ms": "adopt KV",
    "first_decode_ms": "first decode",
}
_AFTER_PREFILL: Final = ("last_chunk_ms", "handoff_ms", "adopt_ms", "first_decode_ms")
_REQUESTS: Final = 30
_MOMENTS: Final = 240
# Of a board, in one drawing each: title, axis, names of series (or their ends), whether shares.
_BOARD: Final = (
    ("CPU", "of all cores", ("cpu_share",), True),
    ("CPU of each process", "cores kept busy", ("/cpu_cores",), False),
    ("memory", "GB", ("ram_used_bytes", "/rss_bytes", "/pss_bytes"), False),
    ("KV in memory", "MB", ("kv_bytes", "/kv_bytes", "kv_used_bytes", "/kv_used_bytes"), False),
    ("temperature", "degrees C", ("temperature_c", "/temperature_c"), False),
    ("power", "W", ("power_w", "/power_w"), False),
    ("clock", "GHz", ("frequency_hz",), False),
)
_FACTORS: Final[Mapping[str, float]] = {"GB": 1e-9, "MB": 1e-6, "GHz": 1e-9}
Lines = Sequence[Mapping[str, Any]]


def stage_plots(samples: Mapping[str, Sequence[float]], lines: Lines) -> list[Plot]:
    """Medians of the samples that have stages, and the first requests of the lines that have them."""
    plots = []
    rows = _sample_rows(samples)
    if rows:
        title = "a request's stages until its first token, medians"
        plots.append(Plot(title, stages(title, [_row(who, ms, list(STAGES)) for who, ms in rows.items()], Axis("ms"))))
        tails = {who: ms for who, ms in rows.items() if ms["prefill_ms"] > 10 * _sum(ms, _AFTER_PREFILL) > 0}
        if tails:
            title = "the same, after its prompt was read"
            drawn = [_row(who, ms, list(_AFTER_PREFILL)) for who, ms in tails.items()]
            plots.append(Plot(title, stages(title, drawn, Axis("ms since the last call of prefill ended", low=0.0))))
    return [*plots, *_request_plots(lines)]


def _sample_rows(samples: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """By whose they are; those without any prefill are left out."""
    rows: dict[str, dict[str, float]] = {}
    for name, values in samples.items():
        who, word = of_sample(name)
        stage = next((stage for stage in STAGES if word == stage or word.endswith(f"_{stage}")), None)
        if stage is not None and values:
            prefix = word.removesuffix(stage).rstrip("_")
            rows.setdefault(who or prefix or "all", {})[stage] = median(values)
    return {who: ms for who, ms in rows.items() if "prefill_ms" in ms and len(ms) > 2}


def _row(who: str, ms: Mapping[str, float], names: Sequence[str], start: float = 0.0, factor: float = 1.0) -> Row:
    """One stage after the other. A hand-off that is there in its parts is not drawn twice."""
    spans = []
    for name in names:
        if name not in ms or (name == "handoff_ms" and "last_chunk_ms" in ms):
            continue
        length = factor * (ms[name] - (ms.get("adopt_ms", 0.0) if name == "handoff_ms" else 0.0))
        spans.append(Span(STAGES[name], start, start + max(0.0, length)))
        start = spans[-1].end
    return Row(who, tuple(spans))


def _sum(ms: Mapping[str, float], names: Sequence[str]) -> float:
    return sum(ms.get(name, 0.0) for name in names)


# -- requests


def _request_plots(lines: Lines) -> list[Plot]:
    """For each case, its first requests from when they were sent to their last token."""
    plots = []
    for case in dict.fromkeys(str(line.get("case", "")) for line in lines):
        rows = [row for line in lines if str(line.get("case", "")) == case and (row := _request(line)) is not None]
        if not rows:
            continue
        title = f"{case}: stages of requests" + (
            f", the first {_REQUESTS} of {len(rows)}" if len(rows) > _REQUESTS else ""
        )
        rows.sort(key=lambda row: row.spans[0].start)
        plots.append(Plot(title, stages(title, rows[:_REQUESTS], Axis("seconds since the start", low=0.0))))
    return plots


def _request(line: Mapping[str, Any]) -> Row | None:
    """A server that reports no stages has two: until the first token, and decode."""
    start, ttft, e2e = _sent(line), _number(line.get("ttft_s")), _number(line.get("e2e_s"))
    if start is None or ttft is None:
        return None
    own = line["own"] if isinstance(line.get("own"), Mapping) else line
    ms = {name: value for name in STAGES if (value := _number(own.get(name))) is not None}
    label = f"request {line.get('number', '')}".strip()
    first = start + ttft
    if "prefill_ms" in ms:
        spans = _row(label, ms, list(STAGES), start, 1e-3).spans
        rest = Span("network", spans[-1].end, max(first, spans[-1].end))
        spans = (*spans, rest)
    else:
        spans = (Span("until the first token", start, first),)
    if e2e is not None and start + e2e > first:
        spans = (*spans, Span("decode", spans[-1].end, max(start + e2e, spans[-1].end)))
    return Row(label, spans)


def _sent(line: Mapping[str, Any]) -> float | None:
    return next((at for name in ("sent_s", "at_s") if (at := _number(line.get(name))) is not None), None)


# -- KV


def kv_plot(lines: Lines, kv_bytes_per_token: int) -> list[Plot]:
    """KV of the requests under way, from their lengths and times: what no worker needs to report to be known."""
    known = [one for line in lines if (one := _held(line)) is not None]
    if not known or not kv_bytes_per_token:
        return []
    end = max(over for _, _, over, _, _ in known)
    series = []
    for case in list(dict.fromkeys(str(line.get("case", "")) for line in lines))[:COLOURS]:
        of_case = [one for line in lines if str(line.get("case", "")) == case and (one := _held(line)) is not None]
        points = []
        for moment in range(_MOMENTS + 1):
            at = end * moment / _MOMENTS
            points.append((at, 1e-6 * kv_bytes_per_token * sum(_tokens_at(one, at) for one in of_case)))
        if of_case:
            series.append(Series(case, tuple(points), has_markers=False))
    title = "KV of the requests under way"
    svg = curves(title, series, Axis("seconds since the start"), Axis("MB, tokens held times bytes per token", low=0.0))
    return [Plot(title, svg, "Reckoned: a prompt's KV counts from its first token on, not while it is read.")]


def _held(line: Mapping[str, Any]) -> tuple[float, float, float, float, float] | None:
    """First token, last token, over; tokens of the prompt and of the answer."""
    start, ttft, e2e = _sent(line), _number(line.get("ttft_s")), _number(line.get("e2e_s"))
    prompt = next((n for key in ("prompt_tokens", "asked_prompt_tokens") if (n := _number(line.get(key)))), None)
    tokens = _number(line.get("tokens"))
    if start is None or ttft is None or e2e is None or prompt is None or tokens is None:
        return None
    return start + ttft, start + e2e, start + e2e, prompt, tokens


def _tokens_at(held: tuple[float, float, float, float, float], at: float) -> float:
    first, last, over, prompt, tokens = held
    if not first <= at < over:
        return 0.0
    return prompt + tokens * min(1.0, (at - first) / (last - first))


# -- boards


def resource_plots(resources: Sequence[Watched]) -> list[Plot]:
    """Of every node in every part of the run, what it could read. Idle time before the load is left of 0."""
    plots = []
    for watched in resources:
        where = watched.node if watched.part == "run" else f"{watched.node}, {watched.part}"
        for heading, label, ends, is_share in _BOARD:
            series = _series(watched, ends, _FACTORS.get(label, 1.0))
            if not series:
                continue
            title = f"{where}: {heading}"
            y = Axis(label, low=None if heading in ("temperature", "clock") else 0.0, is_share=is_share)
            plots.append(Plot(title, curves(title, series[:COLOURS], Axis("seconds since the load began"), y)))
    return plots


def _series(watched: Watched, ends: Sequence[str], factor: float) -> list[Series]:
    """Series with at least two readings; a reading that there was not is a hole in the line."""
    found = []
    for name, values in watched.series.items():
        if not any(name == end or (end.startswith("/") and name.endswith(end)) for end in ends):
            continue
        pairs = zip(watched.at_s, values, strict=False)
        points = tuple((at, math.nan if value is None else factor * value) for at, value in pairs)
        if sum(not math.isnan(value) for _, value in points) > 1:
            found.append(Series(_whose(name), points, has_markers=len(points) < 40))
    return found


def _whose(name: str) -> str:
    process, slash, what = name.partition("/")
    return (
        f"{process}, {what.split('_')[0]}"
        if slash
        else name.replace("_share", "").replace("_bytes", "").replace("_", " ")
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
