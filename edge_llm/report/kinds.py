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
from edge_llm.bench.stats import median
from edge_llm.report.axes import Axis
from edge_llm.report.distributions import distributions
from edge_llm.report.document import Plot, Table
from edge_llm.report.edge import edge_main, edge_plots, edge_tables
from edge_llm.report.evidence import Evidence
from edge_llm.report.rates import rate_plots
from edge_llm.report.requests import requests_of
from edge_llm.report.scores import accuracy_main, accuracy_plots, accuracy_tables
from edge_llm.report.serving import (
    goodput_main,
    goodput_tables,
    inner,
    overload_plots,
    pool_plots,
    pool_tables,
    serve_main,
    serve_plots,
    serve_tables,
    spread_axis,
    verdicts,
)
from edge_llm.report.speeds import engine_plots, node_main, node_plots, node_tables
from edge_llm.report.svg import Range, ranges
from edge_llm.report.timelines import kv_plots, resource_plots, stage_plots
from edge_llm.report.words import of_sample

_MEDIAN: Final = "s: median, from least to most"


def _nothing(_record: Record) -> list[Any]:
    return []


def _no_words(_record: Record) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Kind:
    """For the overview: `headline`, paths of figures; `main`, words where figures lie in rows. Without `tables` all
    figures are shown as tables."""

    title: str
    what: str
    headline: tuple[tuple[str, ...], ...] = ()
    sentences: Callable[[Record], list[str]] = verdicts
    tables: Callable[[Record], list[Table]] | None = None
    drawn: Callable[[Record], list[Plot]] = _nothing
    main: Callable[[Record], str] = _no_words

    def plots(self, one: Evidence) -> tuple[list[Plot], list[Plot]]:
        """Those to show and those to unfold: of each sort the first ones are shown. Its own come first."""
        record, requests = one.record, requests_of(one.lines)
        kv_bytes = record.models[0].kv_bytes_per_token if record.models else 0
        sorts = (
            (self.drawn(record), 10),
            (rate_plots(record.figures), 10),
            (distributions(record.samples, requests), 8),
            (stage_plots(record.samples, requests), 4),
            (kv_plots(requests, kv_bytes), 2),
            (resource_plots(record.resources), 12),
        )
        shown = [plot for plots, most in sorts for plot in plots[:most]]
        return shown, [plot for plots, most in sorts for plot in plots[most:]]


# -- handoff, turns, faults, theorem


def _stalls(record: Record) -> list[Plot]:
    rows = [
        Range(whose, min(values), median(values), max(values), whose.partition(",")[0])
        for whose, values in _of_word(record, "stall_ratio")
    ]
    if not rows:
        return []
    title = "largest gap of a running stream while a long prompt arrives"
    return [Plot(title, ranges(title, rows, spread_axis("times its mean gap before", rows)))]


def _turns(record: Record) -> list[Plot]:
    names = {"first_ttft_s": "first turn", "second_ttft_s": "second turn", "cold_second_ttft_s": "second turn, cold"}
    known = {words: record.samples[name] for name, words in names.items() if record.samples.get(name)}
    if not known:
        return []
    title = "time to first token of a turn"
    rows = [Range(words, min(values), median(values), max(values)) for words, values in known.items()]
    return [Plot(title, ranges(title, rows, Axis(_MEDIAN, low=0.0)))]


def _resumed(record: Record) -> list[Plot]:
    rows = [
        Range(str(inner(record.figures, "per_kind", kind, "what") or kind), min(values), median(values), max(values))
        for kind, values in _of_word(record, "resumed_s")
    ]
    if not rows:
        return []
    title = "from a fault until its stream went on"
    return [Plot(title, ranges(title, rows, spread_axis(_MEDIAN, rows)))]


def _theorem(record: Record) -> list[str]:
    found = record.figures
    if "holds" not in found:
        return []
    verdict = "every token id is the same" if found["holds"] else "NOT every token id is the same"
    return [f"{verdict}: {found.get('comparisons', 0)} comparisons, {found.get('tokens_compared', 0)} tokens"]


def _of_word(record: Record, word: str) -> Iterator[tuple[str, Sequence[float]]]:
    for name, values in record.samples.items():
        whose, last = of_sample(name)
        if last == word and values:
            yield whose, values


UNKNOWN: Final = Kind("", "A kind of record that this version has no words for: all its figures.")
# In the order of the report: what a board does, what serving does, what it must never do.
KINDS: Final[Mapping[str, Kind]] = {
    "cluster": Kind(
        "Models and nodes",
        "Speed, CPU, memory, heat and accuracy of each model under each placement, one request at a time.",
        tables=edge_tables,
        drawn=edge_plots,
        main=edge_main,
    ),
    "node": Kind(
        "One node",
        "Prompt and decode speed of one node in rows as llama-bench gives them, with memory, CPU and the roofline.",
        tables=node_tables,
        drawn=node_plots,
        main=node_main,
    ),
    "accuracy": Kind(
        "Accuracy",
        "How right a model is, and how far a quantization is from its reference.",
        tables=accuracy_tables,
        drawn=accuracy_plots,
        main=accuracy_main,
    ),
    "engine": Kind(
        "The engine beside llama.cpp",
        "Prompt and decode speed as ratios to llama.cpp's own tools on the same core, repetitions interleaved.",
        (("prefill_ratio",), ("decode_ratio",), ("batch8_ratio",)),
        drawn=engine_plots,
    ),
    "serve": Kind(
        "Serving",
        "Requests over HTTP: how long they take, how many keep their limits, at which rate.",
        tables=serve_tables,
        drawn=serve_plots,
        main=serve_main,
    ),
    "goodput": Kind(
        "Goodput: split, local, auto, llama-server",
        "Requests of the same lengths at the same times to four ways of using two nodes; limits are multiples of a "
        "request alone.",
        tables=goodput_tables,
        main=goodput_main,
    ),
    "handoff": Kind(
        "The hand-off of KV",
        "A long prompt arrives while other streams run: what splitting costs it, and what it does to them.",
        (("export_share",), ("overlap_share",), ("decode_stall_ratio",), ("answer_stall_ratio",)),
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
        tables=pool_tables,
        drawn=pool_plots,
    ),
    "overload": Kind(
        "Overload",
        "A simulated cluster offered many times its capacity: who is refused and how fast, how the others are served.",
        (("answers", "ttft_ratio_p95"), ("prompts", "ttft_ratio_p95"), ("answers", "rejection_ms_p95")),
        drawn=overload_plots,
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
    "verify": Kind(
        "Exact here",
        "What edge-llm verify found on this machine: do results depend on the batch, on pieces, on place or threads?",
        (("level",), ("reason",)),
    ),
    "claims": Kind(
        "What this project claims",
        "Each claim, tried on a machine: what holds, what is missed, and what could not be tried there.",
        (("counts", "holds"), ("counts", "does_not_hold"), ("counts", "not_tested_here")),
    ),
    "net": Kind(
        "The network",
        "Round trip, bandwidth and rate of hand-off between each pair of nodes.",
        (("round_trip_ms", "p50"), ("to_peer_mb_per_s",), ("from_peer_mb_per_s",)),
    ),
}
