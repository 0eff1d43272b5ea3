"""What a server bears: attainment and latency over the rate of requests. Pure.

Owns finding such curves in any record's figures (lists of points that have a rate) and drawing them. Refuses to know
how they were measured and who should win.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from edge_llm.report.axes import Axis, spans_decades
from edge_llm.report.document import Plot
from edge_llm.report.svg import Level, Series, curves

_X: Final[Mapping[str, str]] = {
    "rate_per_s": "requests per second, offered",
    "offered_per_s": "requests per second, offered",
    "slo_scale": "limits, as multiples of the ones given",
    "scale": "limits, as multiples of the ones given",
    "concurrency": "requests at once (clients)",
}
_GOALS: Final = (Level(0.9, "90 %"), Level(0.99, "99 %"))
_LATENCIES: Final[Mapping[str, str]] = {
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "itl_s": "ITL",
    "e2e_s": "E2E",
}
_RATES: Final[Mapping[str, str]] = {
    "tokens_per_s": "tokens per second, got",
    "output_tokens_per_s": "tokens per second, got",
    "served_per_s": "requests per second, answered",
    "requests_per_s": "requests per second, answered",
}
Points = Sequence[Mapping[str, Any]]


def rate_plots(figures: Mapping[str, Any]) -> list[Plot]:
    """Curves that lie beside each other in the tree go into one drawing."""
    plots: list[Plot] = []
    for where, key, known in found_curves(figures):
        heading = " / ".join(where)
        plots += _attainment(heading, key, known)
        for name, words in _LATENCIES.items():
            plots += _latency(heading, key, name, words, known)
        for name, words in _RATES.items():
            plots += _got(heading, key, name, words, known)
        plots += _against(heading, key, known)
    return plots


def found_curves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, dict[str, Points]]]:
    """Where, over what, and the curves by name: lists of points of one key, children or grandchildren of a node."""
    if not isinstance(tree, Mapping):
        return
    together: dict[str, dict[str, Points]] = {}
    for name, value in tree.items():
        if (key := _key(value)) is not None:
            together.setdefault(key, {})[name] = value
        elif isinstance(value, Mapping):
            inner = [(inside, k) for inside, one in value.items() if (k := _key(one)) is not None]
            for inside, k in inner:
                together.setdefault(k, {})[name if len(inner) == 1 else f"{name}, {inside}"] = value[inside]
            if not inner:
                yield from found_curves(value, (*path, name))
    for key, known in together.items():
        yield tuple(part for part in path if part not in ("traces", "regimes", "arrangements")), key, known


def _key(value: Any) -> str | None:
    """What the points of a curve are ordered by; None: it is none."""
    if not isinstance(value, list) or not value or not all(isinstance(point, Mapping) for point in value):
        return None
    return next((key for key in _X if all(_number(point.get(key)) is not None for point in value)), None)


def _attainment(heading: str, key: str, known: Mapping[str, Points]) -> list[Plot]:
    series = []
    for name, points in known.items():
        kept = sorted((p for p in points if _number(p.get("attainment")) is not None), key=lambda p: float(p[key]))
        if kept:
            band = tuple((float(p[key]), float(p["low"]), float(p["high"])) for p in kept if "low" in p and "high" in p)
            series.append(Series(name, tuple((float(p[key]), float(p["attainment"])) for p in kept), band))
    if not series:
        return []
    words = "requests within scaled limits" if "scale" in key else "requests within their limits"
    title = f"{heading}: {words}" if heading else words
    y = Axis("attainment, with its 95 % interval", low=0.0, high=1.0, is_share=True)
    return [Plot(title, curves(title, series, Axis(_X[key], low=0.0), y, _GOALS))]


def _latency(heading: str, key: str, name: str, words: str, known: Mapping[str, Points]) -> list[Plot]:
    """P90, else whatever percentile all have."""
    quantile = next((q for q in ("p90", "p95", "p50", "median") if _has(known, name, q)), None)
    if quantile is None:
        return []
    series = [
        Series(who, tuple((x, y) for x, y in _pairs(points, key, name, quantile)))
        for who, points in known.items()
        if list(_pairs(points, key, name, quantile))
    ]
    values = [y for one in series for _, y in one.points]
    in_ms = max(values) < 1.0
    if in_ms:
        series = [Series(one.label, tuple((x, 1e3 * y) for x, y in one.points)) for one in series]
    is_log = spans_decades(values)
    title = f"{heading}: {words} at each rate" if heading else f"{words} at each rate"
    y = Axis(
        f"{quantile.upper()} of {words}, {'ms' if in_ms else 's'}{', logarithmic' if is_log else ''}", is_log=is_log
    )
    return [Plot(title, curves(title, series, Axis(_X[key], low=0.0), y if is_log else _from_zero(y)))]


def _got(heading: str, key: str, name: str, words: str, known: Mapping[str, Points]) -> list[Plot]:
    series = [
        Series(who, tuple((float(p[key]), float(p[name])) for p in _ordered(points, key)))
        for who, points in known.items()
        if all(_number(p.get(name)) is not None for p in points)
    ]
    if not series:
        return []
    title = f"{heading}: throughput" if heading else "throughput"
    return [Plot(title, curves(title, series, Axis(_X[key], low=0.0), _from_zero(Axis(words))))]


def _against(heading: str, key: str, known: Mapping[str, Points]) -> list[Plot]:
    """Latency over throughput, a point for each rate: what a server pays in time for each token more."""
    series = []
    for who, points in known.items():
        got = [(_number(p.get("tokens_per_s")), list(_pairs([p], key, "ttft_s", "p90"))) for p in _ordered(points, key)]
        drawn = tuple((tokens, latency[0][1]) for tokens, latency in got if tokens is not None and latency)
        if len(drawn) > 1:
            series.append(Series(who, drawn))
    if not series:
        return []
    title = f"{heading}: latency against throughput" if heading else "latency against throughput"
    axes = Axis("tokens per second, got", low=0.0), Axis("P90 of TTFT, s", low=0.0)
    return [Plot(title, curves(title, series, *axes), "One point for each rate, the lowest first.")]


def _from_zero(axis: Axis) -> Axis:
    return Axis(axis.label, low=0.0)


def _has(known: Mapping[str, Points], name: str, quantile: str) -> bool:
    return any(list(_pairs(points, "", name, quantile)) for points in known.values())


def _pairs(points: Points, key: str, name: str, quantile: str) -> Iterator[tuple[float, float]]:
    """Points without this figure (nobody was answered) are left out."""
    for point in _ordered(points, key) if key else points:
        inner = point.get(name)
        value = _number(inner.get(quantile) if isinstance(inner, Mapping) else point.get(f"{name}_{quantile}"))
        if value is not None:
            yield (float(point[key]) if key else 0.0), value


def _ordered(points: Points, key: str) -> list[Mapping[str, Any]]:
    return sorted(points, key=lambda point: float(point[key]))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
