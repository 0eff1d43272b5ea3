"""Records of load over HTTP: bench serve, goodput, pools, overload. Pure.

Owns their tables and drawings. Refuses to know other kinds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edge_llm.bench.record import Record
from edge_llm.bench.stats import percentile
from edge_llm.report.axes import Axis, spans_decades
from edge_llm.report.document import Plot, Table
from edge_llm.report.rates import Points, rate_plots
from edge_llm.report.svg import Range, Series, curves, ranges
from edge_llm.report.tables import Row, figure_tables, flat, matrix
from edge_llm.report.words import short

_METRICS = {"ttft_ms": "ttft_s", "tpot_ms": "tpot_s", "itl_ms": "itl_s", "e2el_ms": "e2e_s"}


def inner(tree: Any, *path: str) -> Any:
    """What lies there, or None."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


# -- serve


def serve_main(record: Record) -> str:
    """For the overview: of each contender its goodput, else what it got through under its first load."""
    words = []
    for name, one in (inner(record.figures, "contenders") or {}).items():
        goodput = inner(one, "goodput", "goodput_90")
        first: Mapping[str, Any] = next(iter(one.get("loads") or []), {})
        rate = inner(first, "figures", "request_throughput")
        if goodput is not None:
            words.append(f"{name}: 90 % within limits up to {_between(goodput, 'per_s', '/s')}")
        elif rate is not None:
            words.append(f"{name}: {short(rate)} requests/s ({first.get('label')})")
    return "; ".join(words)


def serve_tables(record: Record) -> list[Table]:
    """The loads of each contender; then goodput, and the nine limits of Splitwise."""
    contenders = inner(record.figures, "contenders") or {}
    if not contenders:
        return figure_tables(record.figures)
    slowdowns: dict[str, Row] = {}
    goodputs: dict[str, Row] = {}
    loads: dict[str, dict[str, Row]] = {}
    for name, one in contenders.items():
        for load in one.get("loads", []):
            where = f"{load.get('label')}" + ("" if load.get("is_whole", True) else " (interrupted)")
            loads.setdefault(name, {})[where] = _load_row(load.get("figures") or {})
            if load.get("slowdown"):
                slowdowns[f"{name}, {where}"] = flat(_slowdown_row(load["slowdown"]))
        for goal, found in (one.get("goodput") or {}).items():
            goodputs[f"{name}, {goal.replace('goodput_', '')} %"] = {
                ("requests/s",): _between(found, "per_s", ""),
                ("per_node_per_s",): found.get("per_node_per_s"),
                ("bound",): found.get("bound"),
                ("requests per rate",): found.get("requests_per_rate"),
            }
    tables = _load_tables(loads)
    if goodputs:
        tables.append(matrix("Goodput: the highest rate with such an attainment", goodputs))
    ratios: dict[str, Row] = {
        f"{who}, {goal.replace('goodput_', '')} %": {
            ("ratio",): _between(one, "ratio", ""),
            ("certain from",): one.get("least"),
            ("to",): "open" if one.get("most") is None else one["most"],
        }
        for who, goals in (inner(record.figures, "ratios") or {}).items()
        for goal, one in goals.items()
    }
    if ratios:
        tables.append(matrix("Goodput of one over another's", ratios))
    if slowdowns:
        title = "Slowdown against the same request alone (Splitwise, Table VI: all nine limits must hold)"
        tables.append(matrix(title, slowdowns))
    return tables


def _load_tables(loads: Mapping[str, Mapping[str, Row]]) -> list[Table]:
    """One for each contender; of several under one load only, that one, so that they stand beside each other."""
    labels = {tuple(known) for known in loads.values()}
    if len(loads) > 1 and len(labels) == 1 and len(next(iter(labels))) == 1:
        (label,) = next(iter(labels))
        return [matrix(label, {name: known[label] for name, known in loads.items()})]
    return [matrix(name, known) for name, known in loads.items()]


def _load_row(found: Mapping[str, Any]) -> Row:
    row: dict[tuple[str, ...], Any] = {(name,): found.get(name) for name in ("requests", "completed", "cut_short")}
    row["failed",] = sum((found.get("failed") or {}).values())
    row["offered_per_s",] = found.get("offered_per_s")
    for name in ("request_throughput", "output_throughput", "total_token_throughput"):
        row[name,] = found.get(name)
    for metric in _METRICS:
        for share in ("p50", "p90", "p99"):
            row[metric, share] = inner(found, metric, share)
    if attained := found.get("attained"):
        percent = {name: 100 * attained[name] for name in ("attainment", "low", "high")}
        row["attainment",] = _between(percent, "attainment", " %")
        row["request_goodput",] = attained.get("request_goodput")
    if found.get("saturation"):
        row["over-saturated",] = inner(found, "saturation", "is_saturated")
    return row


def _between(found: Mapping[str, Any], name: str, unit: str) -> str:
    """A figure with its 95 % interval."""
    return f"{short(found[name])}{unit} ({short(found['low'])} to {short(found['high'])})"


def _slowdown_row(found: Mapping[str, Any]) -> dict[str, Any]:
    cells = {
        f"{metric} {share}": f"{cell['slowdown']:.2f} of {cell['limit']:g}{'' if cell['is_kept'] else ', too slow'}"
        for metric, shares in found.get("table", {}).items()
        for share, cell in shares.items()
    }
    return {**cells, "all nine hold": found.get("holds"), "requests": f"{found.get('requests')} of {found.get('of')}"}


def serve_plots(record: Record) -> list[Plot]:
    """Attainment, latency and throughput over the rate (open loops) or the number of clients (closed ones), and
    attainment over the scale of limits, each load for itself."""
    over: dict[str, dict[str, Points]] = {}
    scales: dict[str, dict[str, Points]] = {}
    for name, one in (inner(record.figures, "contenders") or {}).items():
        for load in one.get("loads", []):
            key = "concurrency" if load.get("clients") else "rate_per_s"
            rate = load.get("clients") or load.get("rate_per_s") or inner(load, "figures", "offered_per_s")
            label, _, scaled = str(load.get("label")).partition(", limits times ")
            if rate is not None:
                known = over.setdefault(key, {})
                who = f"{name}, limits times {scaled}" if scaled else name
                known[who] = [*known.get(who, []), {key: rate, **_point(load.get("figures") or {})}]
            attained = inner(load, "slo_scales", "attainment") or {}
            points = [{"scale": float(scale), "attainment": share} for scale, share in attained.items()]
            if len(points) > 1:
                scales.setdefault(label, {})[name] = points
    plots = [plot for known in over.values() for plot in rate_plots(_curves(known))]
    return [*plots, *(plot for load, known in scales.items() for plot in rate_plots({load: _curves(known)}))]


def _curves(known: Mapping[str, Points]) -> dict[str, Any]:
    return {who: {"curve": points} for who, points in known.items() if len(points) > 1}


def _point(found: Mapping[str, Any]) -> dict[str, Any]:
    point: dict[str, Any] = {}
    for metric, name in _METRICS.items():
        if found.get(metric):
            point[name] = {share: found[metric][share] / 1e3 for share in ("p50", "p90", "p99")}
    point["tokens_per_s"] = found.get("output_throughput")
    attained = found.get("attained")
    return {**point, **{name: attained[name] for name in ("attainment", "low", "high")}} if attained else point


# -- goodput


def verdicts(record: Record) -> list[str]:
    return [str(line) for name in ("sentences", "verdicts", "notes") for line in record.figures.get(name) or []]


def goodput_main(record: Record) -> str:
    """For the overview: what auto bears, of each trace and regime."""
    words = []
    for trace, found in (record.figures.get("traces") or {}).items():
        for regime, result in found.get("regimes", {}).items():
            per_s = inner(result, "arrangements", "auto", "goodput_90", "per_s")
            if per_s is not None:
                words.append(f"{trace}, {regime.replace('_', ' ')}: auto {short(per_s)}/s")
    return "; ".join(words)


def goodput_tables(record: Record) -> list[Table]:
    tables = []
    for trace, found in (record.figures.get("traces") or {}).items():
        for regime, result in found.get("regimes", {}).items():
            limits = result.get("limits", {})
            limit = f"TTFT <= {limits.get('ttft_s', 0):.2f} s, TPOT <= {1e3 * limits.get('tpot_s', 0):.0f} ms"
            rows: dict[str, Row] = {
                name: {
                    ("requests/s at 90 %",): _between(row["goodput_90"], "per_s", ""),
                    ("per_node_per_s",): inner(row, "goodput_90", "per_node_per_s"),
                    ("bound",): inner(row, "goodput_90", "bound"),
                    ("requests/s at 99 %",): _between(row["goodput_99"], "per_s", ""),
                    ("is_cut_short",): row.get("is_cut_short"),
                }
                for name, row in result.get("arrangements", {}).items()
            }
            tables.append(matrix(f"{trace}, {regime}: {limit}", rows))
    return tables


# -- overload


def overload_plots(record: Record) -> list[Plot]:
    """Who was let in and who was refused, second by second; each for itself: many times more are refused."""
    plots = []
    loads = dict.fromkeys(name.partition(".")[0] for name in record.samples if name.endswith(".accepted_at_s"))
    for load in loads:
        for what, words in (("accepted_at_s", "let in"), ("refused_at_s", "refused")):
            series = [
                Series(phase, tuple(_counts(times)), marked=(), is_stepped=True)
                for phase in ("capacity", "overload", "recovery")
                if (times := record.samples.get(f"{load}.{phase}.{what}"))
            ]
            if series:
                title = f"{load}: requests {words} in each second"
                axes = Axis("seconds since that load began", low=0.0), Axis("requests", low=0.0)
                plots.append(Plot(title, curves(title, series, *axes)))
    return plots


def _counts(times: Sequence[float]) -> Iterator[tuple[float, float]]:
    """In each second from the first to the last one of `times`."""
    first, last = int(min(times)), int(max(times))
    counts = dict.fromkeys(range(first, last + 1), 0)
    for at in times:
        counts[int(at)] += 1
    yield from ((float(second), float(count)) for second, count in counts.items())
    yield float(last + 1), float(counts[last])


# -- pools


def pool_tables(record: Record) -> list[Table]:
    """Policies beside each other: what became of requests, then each window."""
    policies = record.figures.get("policies") or {}
    rows: dict[str, Row] = {}
    for policy, found in policies.items():
        rows[policy] = {
            **{(name,): found.get(name) for name in ("answered", "refused", "failed", "longest_wait_s")},
            **{("ttft_s", share): inner(found, "ttft_s", "all", share) for share in ("p50", "p90", "p99")},
            **{("tpot_s", share): inner(found, "tpot_s", "all", share) for share in ("p50", "p90", "p99")},
            ("spills",): inner(found, "events", "spills"),
            ("moves",): len(inner(found, "events", "moves") or []),
        }
    windows = dict.fromkeys(window for found in policies.values() for window in found.get("ttft_s", {}))
    by_window: dict[str, Row] = {
        window: {(policy, "ttft_s"): inner(found, "ttft_s", window, "p90") for policy, found in policies.items()}
        for window in windows
    }
    return [matrix("All requests, by policy", rows), matrix("P90 of TTFT in each window", by_window)] if rows else []


def pool_plots(record: Record) -> list[Plot]:
    """Policies in the order (and the colours) of the distributions."""
    by_window: dict[str, dict[str, Sequence[float]]] = {}
    policies: list[str] = []
    for name, values in record.samples.items():
        policy, dot, window = name.removesuffix(".ttft_s").partition(".")
        if not name.endswith(".ttft_s") or not dot or not values:
            continue
        if window == "all":
            policies.append(policy)
        else:
            by_window.setdefault(window, {})[policy] = values
    rows = [
        Range(f"{window}, {policy}", *_quantiles(known[policy]), policy)
        for window, known in by_window.items()
        for policy in policies
        if policy in known
    ]
    if not rows:
        return []
    title = "TTFT in each window of the traffic"
    return [Plot(title, ranges(title, rows, spread_axis("s: P90, from P50 to P99", rows)))]


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    return percentile(values, 0.5), percentile(values, 0.9), percentile(values, 0.99)


def spread_axis(label: str, rows: Sequence[Range]) -> Axis:
    """Logarithmic where that is needed."""
    if spans_decades(value for row in rows for value in (row.low, row.high)):
        return Axis(f"{label}; logarithmic", is_log=True)
    return Axis(label, low=0.0)
