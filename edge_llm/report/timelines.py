"""What happened when: the stages of requests, KV in memory, and what the boards read beside the run. Pure.

Owns these drawings. Refuses to know which bench measured them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Final

from edge_llm.bench.resources import Watched
from edge_llm.bench.stats import median
from edge_llm.report.axes import Axis
from edge_llm.report.distributions import placed
from edge_llm.report.document import Plot
from edge_llm.report.requests import STAGES, Request
from edge_llm.report.svg import COLOURS, Row, Series, Span, curves, stages
from edge_llm.report.words import of_sample

_FIRST_TOKEN, _NETWORK, _DECODE = "until the first token", "network", "decode"
# One colour for a stage wherever it is drawn; the last chunk is a hand-off without its adopting.
_COLOURS: Final[Mapping[str, int]] = {
    "queue": 0,
    "wait": 1,
    "prefill": 2,
    "last KV chunk": 3,
    "hand-off": 3,
    "adopt KV": 5,
    "first decode": 6,
    _FIRST_TOKEN: 0,
    _NETWORK: 4,
    _DECODE: 7,
}
_AFTER_PREFILL: Final = ("last_chunk_ms", "handoff_ms", "adopt_ms", "first_decode_ms")
_SHORT_MS: Final = 1000.0
_REQUESTS: Final = 30
_MOMENTS: Final = 240
_MARKERS_UP_TO: Final = 40
# Of a board, in one drawing each: title, axis, names of series (or their ends), whether shares.
_BOARD: Final = (
    ("CPU", "of all cores", ("cpu_share",), True),
    ("CPU of each process", "cores kept busy", ("/cpu_cores",), False),
    ("memory", "GB", ("ram_used_bytes",), False),
    ("memory of each process", "MB", ("/rss_bytes", "/pss_bytes"), False),
    ("KV cells in use", "of all cells", ("/kv_share",), True),
    ("KV handed over", "MB/s", ("/kv_in_bytes_per_s", "/kv_out_bytes_per_s"), False),
    ("network", "MB/s", ("net_in_bytes_per_s", "net_out_bytes_per_s", "loopback_bytes_per_s"), False),
    ("temperature", "degrees C", ("temperature_c", "/temperature_c"), False),
    ("power", "W", ("power_w", "/power_w"), False),
    ("clock", "GHz", ("frequency_hz", "/frequency_hz"), False),
)
_FACTORS: Final[Mapping[str, float]] = {"GB": 1e-9, "MB": 1e-6, "MB/s": 1e-6, "GHz": 1e-9}
# A network that carries less is silent, and no drawing.
_SILENT_MB_PER_S: Final = 0.01
_IDLE: Final = "idle"
_NOT_FROM_ZERO: Final = ("temperature", "clock")


def stage_plots(samples: Mapping[str, Sequence[float]], requests: Sequence[Request]) -> list[Plot]:
    """Medians of the samples that have stages, and the first requests of each case."""
    plots = []
    rows = _sample_rows(samples)
    if rows:
        title = "a request's stages until its first token, medians"
        is_long = any(span.end > _SHORT_MS for ms in rows.values() for span in _spans(ms, tuple(STAGES), 0.0, 1.0))
        factor, unit = (1e-3, "s") if is_long else (1.0, "ms")
        drawn = [Row(who, _spans(ms, tuple(STAGES), 0.0, factor)) for who, ms in rows.items()]
        plots.append(Plot(title, stages(title, drawn, Axis(unit, low=0.0), _COLOURS)))
        has_parts = any(sum(name in ms for name in _AFTER_PREFILL) > 1 for ms in rows.values())
        if has_parts and any(_is_mostly_prefill(ms) for ms in rows.values()):
            title = "the same, after the prompt was read"
            drawn = [Row(who, _spans(ms, _AFTER_PREFILL, 0.0, 1.0)) for who, ms in rows.items()]
            axis = Axis("ms since the last call of prefill ended", low=0.0)
            plots.append(Plot(title, stages(title, drawn, axis, _COLOURS)))
    return [*plots, *_request_plots(requests)]


def _is_mostly_prefill(ms: Mapping[str, float]) -> bool:
    return ms["prefill_ms"] > 10 * sum(ms.get(name, 0.0) for name in _AFTER_PREFILL)


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


def _spans(ms: Mapping[str, float], names: Sequence[str], start: float, factor: float) -> tuple[Span, ...]:
    """One stage after the other. A hand-off that is there in its parts is not drawn twice."""
    spans = []
    for name in names:
        if name not in ms or (name == "handoff_ms" and "last_chunk_ms" in ms):
            continue
        length = factor * (ms[name] - (ms.get("adopt_ms", 0.0) if name == "handoff_ms" else 0.0))
        spans.append(Span(STAGES[name], start, start + max(0.0, length)))
        start = spans[-1].end
    return tuple(spans)


# -- requests


def _request_plots(requests: Sequence[Request]) -> list[Plot]:
    """For each case, its first requests from when they were sent to their last token; the busiest cases first."""
    plots = []
    for case, known in busiest(requests):
        rows = [_request(request, request.first_s) for request in known if request.first_s is not None]
        if not rows:
            continue
        rows.sort(key=lambda row: row.spans[0].start)
        some = f", the first {_REQUESTS} of {len(rows)}" if len(rows) > _REQUESTS else ""
        title = f"{case}: stages of requests{some}"
        axis = Axis("seconds since the load began", low=0.0)
        plots.append(Plot(title, stages(title, rows[:_REQUESTS], axis, _COLOURS)))
    return plots


def busiest(requests: Sequence[Request]) -> list[tuple[str, list[Request]]]:
    """Cases with their requests: of everybody the case with most requests at once, then everybody's second one."""
    cases: dict[str, list[Request]] = {}
    for request in requests:
        cases.setdefault(request.case, []).append(request)
    ranked: list[tuple[int, float, str]] = []
    ranks: dict[str, int] = {}
    for case in sorted(cases, key=lambda case: -_at_once(cases[case])):
        _, who = placed(case)
        ranks[who] = ranks.get(who, 0) + 1
        ranked.append((ranks[who], -_at_once(cases[case]), case))
    return [(case, cases[case]) for _, _, case in sorted(ranked)]


def _at_once(requests: Sequence[Request]) -> float:
    """How many requests were under way, on average."""
    known = [(request.sent_s, request.last_s) for request in requests if request.last_s is not None]
    if not known:
        return 0.0
    long_s = max(last for _, last in known) - min(sent for sent, _ in known)
    return sum(last - sent for sent, last in known) / long_s if long_s > 0 else 0.0


def _request(request: Request, first_s: float) -> Row:
    """A server that reports no stages has two: until the first token, and decode. What its own stages leave of the
    time until the client had the first token was the network's, and the client's."""
    if "prefill_ms" in request.stages_ms:
        spans = _spans(request.stages_ms, tuple(STAGES), request.sent_s, 1e-3)
        spans = (*spans, Span(_NETWORK, spans[-1].end, max(first_s, spans[-1].end)))
    else:
        spans = (Span(_FIRST_TOKEN, request.sent_s, first_s),)
    if request.last_s is not None and request.last_s > spans[-1].end:
        spans = (*spans, Span(_DECODE, spans[-1].end, request.last_s))
    return Row(f"{request.number}", spans)


# -- KV


def kv_plots(requests: Sequence[Request], kv_bytes_per_token: int) -> list[Plot]:
    """KV of the requests under way, from their lengths and times: what no worker needs to report to be known. One
    drawing for each load."""
    loads: dict[str, dict[str, list[Request]]] = {}
    for request in (request for _, known in busiest(requests) for request in known):
        is_known = request.prompt_tokens is not None and request.tokens is not None
        if is_known and request.first_s is not None and request.last_s is not None:
            where, who = placed(request.case)
            loads.setdefault(where, {}).setdefault(who, []).append(request)
    return [_kv_plot(where, known, kv_bytes_per_token) for where, known in loads.items()] if kv_bytes_per_token else []


def _kv_plot(where: str, known: Mapping[str, Sequence[Request]], kv_bytes_per_token: int) -> Plot:
    end = max(request.last_s or 0.0 for some in known.values() for request in some)
    moments = [end * moment / _MOMENTS for moment in range(_MOMENTS + 1)]
    series = []
    for who, some in list(known.items())[:COLOURS]:
        held = [(at, 1e-6 * kv_bytes_per_token * sum(_tokens_at(one, at) for one in some)) for at in moments]
        series.append(Series(who or "all", tuple(held), marked=()))
    title = f"{where}: KV of the requests under way" if where else "KV of the requests under way"
    axes = Axis("seconds since the load began"), Axis("MB: tokens held, times bytes per token", low=0.0)
    note = "Reckoned: a prompt's KV counts from its first token on, not while it is read."
    return Plot(title, curves(title, series, *axes), note)


def _tokens_at(request: Request, at: float) -> float:
    """Of the prompt, and of the answer as far as it is."""
    first, last = request.first_s or 0.0, request.last_s or 0.0
    if not first <= at < last:
        return 0.0
    return (request.prompt_tokens or 0.0) + (request.tokens or 0.0) * (at - first) / (last - first)


# -- boards


def resource_plots(resources: Sequence[Watched]) -> list[Plot]:
    """Of every node in every part of the run, what it could read; what was watched idle comes last. Idle time before
    the load is left of 0."""
    plots = []
    names = _where(resources)
    for watched in sorted(resources, key=lambda one: one.part == _IDLE):
        where = names[watched.node, watched.part]
        for heading, label, ends, is_share in _BOARD:
            series = _series(watched, ends, _FACTORS.get(label, 1.0))
            if not series or (label == "MB/s" and _highest(series) < _SILENT_MB_PER_S):
                continue
            title = f"{where}: {heading}"
            y = Axis(label, low=None if heading in _NOT_FROM_ZERO else 0.0, is_share=is_share)
            plots.append(Plot(title, curves(title, series[:COLOURS], Axis("seconds since the load began"), y)))
    return plots


def _where(resources: Sequence[Watched]) -> dict[tuple[str, str], str]:
    """What each watched part is called: its node, where there are several, and what tells the part from others."""
    parts = list(dict.fromkeys(one.part for one in resources if one.part != _IDLE))
    shared = set.intersection(*(set(part.split(", ")) for part in parts)) if len(parts) > 1 else set()
    has_nodes = len({one.node for one in resources}) > 1

    def name(one: Watched) -> str:
        told = ", ".join(piece for piece in one.part.split(", ") if piece not in shared and piece != "run")
        return ", ".join([one.node, told] if told and (has_nodes or one.part == _IDLE) else [told or one.node])

    return {(one.node, one.part): name(one) for one in resources}


def _highest(series: Sequence[Series]) -> float:
    return max(value for one in series for _, value in one.points if not math.isnan(value))


def _series(watched: Watched, ends: Sequence[str], factor: float) -> list[Series]:
    """Series with at least two readings; a reading that there was not is a hole in the line."""
    found = []
    for name, values in watched.series.items():
        if not any(name == end or (end.startswith("/") and name.endswith(end)) for end in ends):
            continue
        pairs = zip(watched.at_s, values, strict=False)
        points = tuple((at, math.nan if value is None else factor * value) for at, value in pairs)
        if sum(not math.isnan(value) for _, value in points) > 1:
            found.append(Series(_whose(name), points, marked=None if len(points) <= _MARKERS_UP_TO else ()))
    return found


def _whose(name: str) -> str:
    """`worker-1/rss_bytes` is "worker-1, rss"; `ram_used_bytes` is "ram used"."""
    process, slash, what = name.partition("/")
    word = re.sub(r"_(bytes(_per_s)?|share|cores|hz|w|c)$", "", what if slash else name).replace("_", " ")
    return f"{process}, {word}" if slash else word
