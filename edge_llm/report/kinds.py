"""What is special to each kind of record: its title, its main figures, its tables and drawings. Pure.

Owns one entry for each `edge-llm bench` command. Drawings that any record may have (distributions, curves over rates,
stages, boards) are added to each; all figures are shown whatever is here, so a kind without tables of its own has all.
Refuses to know files, pages and other records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from edge_llm.bench.record import Record
from edge_llm.bench.stats import median, percentile
from edge_llm.report.axes import Axis, spans_decades
from edge_llm.report.distributions import distributions
from edge_llm.report.document import Plot, Table
from edge_llm.report.evidence import Evidence
from edge_llm.report.rates import rate_plots
from edge_llm.report.svg import Range, Series, curves, ranges
from edge_llm.report.tables import Row, matrix
from edge_llm.report.timelines import kv_plot, resource_plots, stage_plots
from edge_llm.report.words import of_sample

_SECONDS_EACH: Final = 1.0
Drawn = Callable[[Record], list[Plot]]


def _nothing(_record: Record) -> list[Any]:
    return []


@dataclass(frozen=True, slots=True)
class Kind:
    """`headline`: paths of figures for the overview. Without `tables` all figures are shown as tables."""

    title: str
    what: str
    headline: tuple[tuple[str, ...], ...] = ()
    sentences: Callable[[Record], list[str]] = _nothing
    tables: Callable[[Record], list[Table]] | None = None
    drawn: Drawn = _nothing

    def plots(self, one: Evidence) -> list[Plot]:
        """Its own first."""
        record = one.record
        kv_bytes = record.models[0].kv_bytes_per_token if record.models else 0
        return [
            *self.drawn(record),
            *rate_plots(record.figures),
            *stage_plots(record.samples, one.lines),
            *distributions(record.samples, one.lines),
            *kv_plot(one.lines, kv_bytes),
            *resource_plots(record.resources),
        ]


# -- engine, node


def _speeds(record: Record) -> list[Plot]:
    """Medians of tokens/s with the fastest and slowest repetition, by what was measured."""
    by_word: dict[str, list[Range]] = {}
    for name, values in record.samples.items():
        whose, word = of_sample(name)
        if word.endswith("tokens_per_s") and values:
            model, colon, who = whose.rpartition(": ")
            row = Range(whose, min(values), median(values), max(values), who if colon else model)
            by_word.setdefault(word, []).append(row)
    return [
        Plot(
            title := f"{word.removesuffix('_tokens_per_s').replace('_', ' ')}: tokens per second",
            ranges(title, rows, Axis("tokens/s; the marker is the median, the line from least to most", low=0.0)),
        )
        for word, rows in by_word.items()
    ]


# -- handoff, turns


def _stalls(record: Record) -> list[Plot]:
    rows = [
        Range(whose, min(values), median(values), max(values), whose.partition(",")[0])
        for whose, values in _of_word(record, "stall_ratio")
    ]
    if not rows:
        return []
    title = "largest gap of a running stream while a long prompt arrives"
    label = "times its mean gap before"
    return [Plot(title, ranges(title, rows, _spread_axis(label, rows)))]


def _turns(record: Record) -> list[Plot]:
    names = {"first_ttft_s": "first turn", "second_ttft_s": "second turn", "cold_second_ttft_s": "second turn, cold"}
    known = {words: record.samples[name] for name, words in names.items() if record.samples.get(name)}
    if not known:
        return []
    title = "time to first token of a turn"
    rows = [Range(words, min(values), median(values), max(values)) for words, values in known.items()]
    return [Plot(title, ranges(title, rows, Axis("s; the marker is the median, the line from least to most", low=0.0)))]


# -- faults


def _resumed(record: Record) -> list[Plot]:
    what = record.figures.get("per_kind", {})
    rows = [
        Range(
            str(what.get(kind, {}).get("what", kind)) if isinstance(what, dict) else kind,
            min(values),
            median(values),
            max(values),
        )
        for kind, values in _of_word(record, "resumed_s")
    ]
    if not rows:
        return []
    title = "from a fault until its stream went on"
    return [Plot(title, ranges(title, rows, _spread_axis("s; the marker is the median", rows)))]


# -- overload, pools


def _admission(record: Record) -> list[Plot]:
    """Who was let in and who was refused, second by second."""
    plots = []
    loads = dict.fromkeys(name.partition(".")[0] for name in record.samples if name.endswith(".accepted_at_s"))
    for load in loads:
        series = []
        for what, words in (("accepted_at_s", "let in"), ("refused_at_s", "refused")):
            for phase in ("capacity", "overload", "recovery"):
                times = record.samples.get(f"{load}.{phase}.{what}", [])
                if times:
                    series.append(
                        Series(f"{phase}: {words}", tuple(_counts(times)), has_markers=False, is_stepped=True)
                    )
        title = f"{load}: requests in each second"
        axes = Axis("seconds since that phase began", low=0.0), Axis("requests", low=0.0)
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


def _pool_tables(record: Record) -> list[Table]:
    """Policies beside each other: what became of requests, then each window."""
    policies = record.figures.get("policies", {})
    rows: dict[str, Row] = {}
    for policy, found in policies.items():
        events = found.get("events", {})
        rows[policy] = {
            **{(name,): found.get(name) for name in ("answered", "refused", "failed", "longest_wait_s")},
            **{("ttft_s", q): found.get("ttft_s", {}).get("all", {}).get(q) for q in ("p50", "p90", "p99")},
            **{("tpot_s", q): found.get("tpot_s", {}).get("all", {}).get(q) for q in ("p50", "p90", "p99")},
            ("spills",): events.get("spills"),
            ("moves",): len(events.get("moves", [])),
        }
    windows = dict.fromkeys(window for found in policies.values() for window in found.get("ttft_s", {}))
    by_window: dict[str, Row] = {
        window: {
            (policy, "ttft_s", "p90"): _inner(found, "ttft_s", window, "p90") for policy, found in policies.items()
        }
        for window in windows
    }
    return [matrix("All requests, by policy", rows), matrix("P90 of TTFT in each window", by_window)] if rows else []


def _pool_windows(record: Record) -> list[Plot]:
    rows = []
    for name, values in record.samples.items():
        policy, _, window = name.removesuffix(".ttft_s").partition(".")
        if name.endswith(".ttft_s") and window != "all" and values:
            rows.append(
                Range(
                    f"{window}, {policy}",
                    percentile(values, 0.5),
                    percentile(values, 0.9),
                    percentile(values, 0.99),
                    policy,
                )
            )
    order = [window for window in dict.fromkeys(row.label.partition(",")[0] for row in rows)]
    rows.sort(key=lambda row: (order.index(row.label.partition(",")[0]), row.group))
    if not rows:
        return []
    title = "TTFT in each window of the traffic"
    return [Plot(title, ranges(title, rows, _spread_axis("s; P50 to P99, the marker is P90", rows)))]


# -- goodput, theorem


def _verdicts(record: Record) -> list[str]:
    return [str(line) for line in record.figures.get("verdicts", [])]


def _goodput_tables(record: Record) -> list[Table]:
    tables = []
    for trace, found in record.figures.get("traces", {}).items():
        for regime, result in found.get("regimes", {}).items():
            limits = result.get("limits", {})
            limit = f"TTFT <= {limits.get('ttft_s', 0):.2f} s, TPOT <= {1e3 * limits.get('tpot_s', 0):.0f} ms"
            rows: dict[str, Row] = {
                name: {
                    ("goodput 90 %", "per_s"): _inner(row, "goodput_90", "per_s"),
                    ("low", "per_s"): _inner(row, "goodput_90", "low"),
                    ("high", "per_s"): _inner(row, "goodput_90", "high"),
                    ("a node", "per_s"): _inner(row, "goodput_90", "per_node_per_s"),
                    ("bound",): _inner(row, "goodput_90", "bound"),
                    ("goodput 99 %", "per_s"): _inner(row, "goodput_99", "per_s"),
                }
                for name, row in result.get("arrangements", {}).items()
            }
            tables.append(matrix(f"{trace}, {regime}: {limit}", rows))
    return tables


def _theorem(record: Record) -> list[str]:
    found = record.figures
    if "holds" not in found:
        return []
    verdict = "every token id is the same" if found["holds"] else "NOT every token id is the same"
    return [f"{verdict}: {found.get('comparisons', 0)} comparisons, {found.get('tokens_compared', 0)} tokens"]


# -- pieces


def _of_word(record: Record, word: str) -> Iterator[tuple[str, Sequence[float]]]:
    for name, values in record.samples.items():
        whose, last = of_sample(name)
        if last == word and values:
            yield whose, values


def _spread_axis(label: str, rows: Sequence[Range]) -> Axis:
    if spans_decades(value for row in rows for value in (row.low, row.high)):
        return Axis(f"{label} (logarithmic)", is_log=True)
    return Axis(label, low=0.0)


def _inner(tree: Mapping[str, Any], *path: str) -> Any:
    found: Any = tree
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


UNKNOWN: Final = Kind("", "A kind of record that this version has no words for: all its figures.")
# In the order of the report: what a board does, what serving does, what it must never do.
KINDS: Final[Mapping[str, Kind]] = {
    "cluster": Kind(
        "Models and nodes", "Throughput, latency, CPU, memory, heat and accuracy of each model on each node."
    ),
    "node": Kind("One node", "Prompt and decode speed of one node, as llama-bench measures it.", drawn=_speeds),
    "accuracy": Kind("Accuracy", "How right a model is, and how far a quantization is from its reference."),
    "engine": Kind(
        "The engine beside llama.cpp",
        "Prompt and decode speed as ratios to llama.cpp's own tools on the same core, repetitions interleaved.",
        (("prefill_ratio",), ("decode_ratio",), ("batch8_ratio",)),
        drawn=_speeds,
    ),
    "serve": Kind("Serving", "Requests over HTTP: how long they take, how many keep their limits, at which rate."),
    "goodput": Kind(
        "Goodput: split, local, auto, llama-server",
        "The same requests at the same times to four ways of using two nodes; limits are multiples of a request alone.",
        (("seconds_per_point",),),
        _verdicts,
        _goodput_tables,
    ),
    "handoff": Kind(
        "The hand-off of KV",
        "A long prompt arrives while other streams run: what splitting costs it, and what it does to them.",
        (("export_share",), ("overlap_share",), ("decode_stall_ratio",)),
        drawn=_stalls,
    ),
    "turns": Kind(
        "Turns of a conversation",
        "What the second turn costs when the first one's KV was kept, beside the same turn cold.",
        (("second_turn_ttft_share",), ("ids_equal",)),
        drawn=_turns,
    ),
    "gateway": Kind(
        "The gateway",
        "What one gateway adds to the first token, and its CPU and memory under many streams; workers are simulated.",
        (("ttft_added_ms_p50",), ("cpu_us_per_token",), ("rss_mb",)),
    ),
    "pools": Kind(
        "Traffic that turns",
        "Conversation, then code, then conversation, to eight simulated workers, under several policies.",
        (("policies", "predicted", "ttft_s", "all", "p90"), ("policies", "least_busy", "ttft_s", "all", "p90")),
        tables=_pool_tables,
        drawn=_pool_windows,
    ),
    "overload": Kind(
        "Overload",
        "A simulated cluster offered many times its capacity: who is refused and how fast, how the others are served.",
        (("answers", "ttft_ratio_p95"), ("prompts", "ttft_ratio_p95"), ("answers", "rejection_ms_p95")),
        drawn=_admission,
    ),
    "faults": Kind(
        "Faults",
        "Workers killed, stopped, cut off and lied to while they answer; every token compared with an undisturbed run.",
        (("hit_in_flight",), ("streams",), ("streams_lost",), ("streams_different",)),
        drawn=_resumed,
    ),
    "theorem": Kind(
        "Split equals whole",
        "The same prompts answered whole, split, and among others: token ids compared one by one.",
        (("holds",), ("comparisons",), ("tokens_compared",)),
        _theorem,
    ),
    "net": Kind("The network", "Round trip, bandwidth and rate of hand-off between each pair of nodes."),
}
