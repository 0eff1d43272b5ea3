"""The Edge paper's table in words: definitions, sentences, Markdown, CSV. Pure.

Owns what each column means (printed with the table), how values are written, and what must not be overlooked. Refuses
to know how rows come to be (edge_table.py).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from edge_llm.bench.edge_claim import CLAIMED_BOARD, CLAIMED_TOKENS_PER_S, LEAST_SAMPLES
from edge_llm.bench.edge_table import NOT_WATCHED, Interval, Row
from edge_llm.bench.resources import LOCAL

_MIB: Final = 1 << 20
_NONE: Final = "-"
_BUSY: Final = 0.1

DEFINITIONS: Final[Mapping[str, str]] = {
    "row": "a model file, a placement and a board; throughput, latency and accuracy are those of the placement, CPU, "
    "RAM, heat and power those of the board (`local`: this one, with all workers of the placement, gateway and client)",
    "placement": "mixed: one worker does both phases; split: one reads prompts, another one answers; local: two "
    "workers, each does whole requests; auto: the same two, and the gateway may let one read for the other; a worker's "
    "name: this one alone does whole requests. Workers started here share the cores of this board out",
    "requests": "one after another, none beside another, no prompt begins as an earlier one did; medians over complete "
    "ones; random prompts, answers of forced length, greedy",
    "prompt t/s": "prompt tokens that were computed, over the seconds from when the worker that answers took the "
    "request until the prompt's KV was computed",
    "generation t/s": "(tokens - 1) over the seconds from the first event with text to the last one, at the client",
    "sampling t/s": "one over the seconds of one greedy draw from logits of the model's vocabulary, in a process of "
    "its own on this board; `sampling_full`: with every sampler on",
    "engine t/s": "the same two rates by the workers' own counters: tokens over seconds spent in prompt calls and in "
    "decode steps; HTTP, streams and hand-over are not in them",
    "load": "from starting a worker's process until it is ready, of the slowest worker; the file was read shortly "
    "before, for its hash, so it comes from the page cache where it fits",
    "TTFT": "from sending the request to the first event with text, at the client",
    "TPOT": "(total - TTFT) / (tokens - 1)",
    "total": "from sending the request to the last event with text",
    "parts": "of the total, by our gateway's report: in its queue / prefill (until the prompt's KV was computed, "
    "waiting for the worker too) / transfer (what handing the KV over adds after that) / decode (from then to the end)",
    "CPU": "of all cores of the board, mean over the requests, sampled once a second, n times; above idle: less the "
    "mean before. What the sampling itself takes is in it, and in the record (`resources`, `sampler`)",
    "RAM": "of the board's memory, what is not available, the highest sample; above idle: less the mean before. Before "
    "is, for clusters started here, the board without any; for one that runs already, that cluster at rest. Pages of "
    "mapped files are available to the kernel, so a mapped model is not in it",
    "mapped": "of the board's memory, what its workers have of mapped files, at the most: a mapped model is here. PSS "
    "less anonymous memory, else that of the largest worker's RSS: workers of a board map the same file",
    "peak RSS": "of each worker at its most (here since it started, elsewhere the highest sample), added up; above "
    "idle: less what it was when it was ready. A mapped model file counts in it, in each of several workers",
    "heat": "the highest temperature of the board, and what held it back during the requests, sampled or newly "
    "remembered by the board itself",
    "accuracy": "right items over all items with choices, of all tasks together (`models` has each task), with a 95 % "
    "interval (Wilson); chance: the mean of 1 / choices; p: exact binomial test, below 0.05 is different from chance. "
    "It is the file's, measured once: under policy exact a split answers token for token as a whole does",
    "perplexity": "of the first text among the tasks, as llama-perplexity counts",
    "tokens/J": "answer tokens over the energy of all watched boards during the requests (mean power times seconds); "
    "above idle: less the power before. What is measured differs by board, and it is less than at the plug",
    "claim": "holds: at least 5 generated tokens per second (more than 12 is more than claimed), and less than 50 % of "
    "CPU and of RAM with what is mapped, raw; `holds_above_idle`: with both above idle. No verdict where the board was "
    "held back, where less than half was read and what is mapped was not, or where CPU was read fewer than "
    f"{LEAST_SAMPLES} times and nothing else refuses it: ask more --requests or longer --answer-tokens then",
}


# -- sentences


def sentences(rows: Sequence[Row], board: str | None) -> list[str]:
    """What the table says, and what must not be overlooked. `board`: what this one is called."""
    found = [f"{row.model}, {_where(row)}: the paper's claim {row.claim.words}" for row in rows]
    found += list(dict.fromkeys(chance_words(row) for row in rows if row.accuracy is not None))
    for row in {(row.model, row.placement): row for row in rows}.values():
        if row.planned is not None:
            found.append(f"{row.model}, {row.placement}: cut short after {row.requests} of {row.planned} requests")
        if row.failed:
            kinds = ", ".join(f"{count} {kind}" for kind, count in row.failed.items())
            count = f"{row.requests - row.completed} of {row.requests}"
            found.append(f"{row.model}, {row.placement}: {count} requests failed: {kinds}")
    found += [
        f"{row.model}, {_where(row)}: the board was held back during the requests ({', '.join(row.throttled)}): its "
        "speed is not the board's at its best, and there is no verdict"
        for row in rows
        if row.throttled
    ]
    found += [
        f"{node} was {idle:.0%} busy before the first request: its loads and speeds are not those of the cluster alone"
        for node, idle in _idle(rows).items()
        if idle > _BUSY
    ]
    elsewhere = {row.node: row.board for row in rows if row.node != LOCAL}
    if unknown := [node for node, kind in elsewhere.items() if kind is None]:
        found.append(
            f"the paper measured on {CLAIMED_BOARD}; {', '.join(unknown)}: board unknown here, so a verdict is about "
            "the board of its row, whatever that is"
        )
    if others := [f"{node} is {kind}" for node, kind in elsewhere.items() if kind and CLAIMED_BOARD not in kind]:
        found.append(
            f"the paper measured on {CLAIMED_BOARD}, and {', '.join(others)}: a verdict is about the board of its row, "
            "it neither confirms nor refutes the paper"
        )
    if any(row.node == LOCAL for row in rows) and CLAIMED_BOARD not in (board or ""):
        found.append(
            f"the paper measured on {CLAIMED_BOARD}, and this is {board or 'another board'}: a verdict is about the "
            "board of its row, it neither confirms nor refutes the paper"
        )
    return found


def _idle(rows: Sequence[Row]) -> dict[str, float]:
    """CPU of each board before."""
    known = ((row.node, row.cpu_share, row.above_idle_cpu_share) for row in rows)
    return {node: raw - above for node, raw, above in known if raw is not None and above is not None}


def chance_words(row: Row) -> str:
    """Whether a model knows anything of what it was asked."""
    assert row.accuracy is not None
    words, interval = f"{row.model}: {row.accuracy:.1%} right", row.intervals.get("accuracy")
    if interval is not None:
        words += f" of {interval.n} items (95 %: {interval.low:.1%} to {interval.high:.1%})"
    if row.chance is None or row.chance_p_value is None:
        return f"{words}; these tasks have no chance level"
    level = f"{row.chance:.1%} (p {row.chance_p_value:.2g})"
    if not row.differs_from_chance:
        return f"{words}; that does not differ from chance, {level}"
    return f"{words}; that differs from chance, it is {'above' if row.accuracy > row.chance else 'below'} {level}"


def _where(row: Row) -> str:
    return row.placement if row.node in (row.placement, LOCAL, NOT_WATCHED) else f"{row.placement} on {row.node}"


# -- Markdown

_Cell = Callable[[Row], str]
# Heading, whether it is text (numbers are set right), cell.
_COLUMNS: Final[Sequence[tuple[str, bool, _Cell]]] = (
    ("model", True, lambda row: row.model),
    ("quantization", True, lambda row: row.quantization or _NONE),
    ("file MiB", False, lambda row: _mib(row.file_bytes)),
    ("placement", True, lambda row: row.placement),
    ("node", True, lambda row: f"{row.node} ({row.roles})" if row.roles else row.node),
    ("n", False, lambda row: _count(row)),
    ("prompt t/s", False, lambda row: _number(row.prompt_tokens_per_s)),
    ("generation t/s", False, lambda row: _number(row.generation_tokens_per_s)),
    ("sampling t/s", False, lambda row: _number(row.sampling_tokens_per_s)),
    ("load s", False, lambda row: _number(row.load_s)),
    ("TTFT s", False, lambda row: _number(row.ttft_s)),
    ("TPOT ms", False, lambda row: _number(row.tpot_ms)),
    ("total s", False, lambda row: _number(row.total_s)),
    ("queue / prefill / transfer / decode ms", False, lambda row: _parts(row)),
    ("CPU % (above idle)", False, lambda row: _cpu(row)),
    ("RAM % (above idle)", False, lambda row: _percents(row.ram_share, row.above_idle_ram_share)),
    ("mapped %", False, lambda row: _percents(row.mapped_share, None)),
    ("peak RSS MiB (above idle)", False, lambda row: _rss(row)),
    ("C", False, lambda row: _number(row.temperature_c)),
    ("throttled", True, lambda row: _NONE if row.throttled is None else ", ".join(row.throttled) or "no"),
    ("tokens/J", False, lambda row: _number(row.tokens_per_joule)),
    ("accuracy % (95 %, n)", False, lambda row: _accuracy(row)),
    ("differs from chance", True, lambda row: _chance(row)),
    ("perplexity", False, lambda row: _number(row.perplexity)),
    (
        "{:g}-{:g} t/s, < 50 % CPU, RAM".format(*CLAIMED_TOKENS_PER_S),
        True,
        lambda row: {True: "holds", False: "does not", None: _NONE}[row.claim.holds],
    ),
)


def columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The cells of each column, by its heading."""
    return {head: [cell(row) for row in rows] for head, _, cell in _COLUMNS}


def markdown(rows: Sequence[Row]) -> str:
    """One table, aligned as text too."""
    cells = [[head for head, _, _ in _COLUMNS], *([cell(row) for _, _, cell in _COLUMNS] for row in rows)]
    widths = [max(3, *(len(line[at]) for line in cells)) for at in range(len(_COLUMNS))]
    texts = [is_text for _, is_text, _ in _COLUMNS]

    def line(words: Sequence[str]) -> str:
        padded = (
            word.ljust(width) if is_text else word.rjust(width)
            for word, width, is_text in zip(words, widths, texts, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rules = ("-" * width if is_text else f"{'-' * (width - 1)}:" for width, is_text in zip(widths, texts, strict=True))
    return "\n".join([line(cells[0]), f"| {' | '.join(rules)} |", *map(line, cells[1:])])


def _count(row: Row) -> str:
    """Complete ones, of how many where that is not all of them."""
    count = f"{row.completed}/{row.requests}" if row.failed else f"{row.completed}"
    return count if row.planned is None else f"{count} of {row.planned}, cut short"


def _cpu(row: Row) -> str:
    """A mean of few readings must not look like one of many."""
    count = f", n {row.cpu_samples}" if row.cpu_samples is not None and row.cpu_share is not None else ""
    return _percents(row.cpu_share, row.above_idle_cpu_share) + count


def _parts(row: Row) -> str:
    parts = (row.queue_ms, row.prefill_ms, row.transfer_ms, row.decode_ms)
    return _NONE if all(part is None for part in parts) else " / ".join(map(_number, parts))


def _percents(raw: float | None, above: float | None) -> str:
    if raw is None:
        return _NONE
    return f"{100 * raw:.1f}" + (f" ({round(100 * above, 1) + 0.0:+.1f})" if above is not None else "")


def _rss(row: Row) -> str:
    above = row.above_idle_peak_rss_bytes
    return _mib(row.peak_rss_bytes) + (f" ({above / _MIB:+.0f})" if above is not None else "")


def _accuracy(row: Row) -> str:
    if row.accuracy is None:
        return _NONE
    at = row.intervals.get("accuracy")
    return f"{100 * row.accuracy:.1f}" + (f" ({100 * at.low:.0f} to {100 * at.high:.0f}, {at.n})" if at else "")


def _chance(row: Row) -> str:
    if row.chance is None or row.accuracy is None:
        return _NONE
    side = "yes" if row.accuracy > row.chance else "yes, below"
    return f"{side if row.differs_from_chance else 'no'} ({100 * row.chance:.0f} %)"


def _mib(size: int | None) -> str:
    return _NONE if size is None else f"{size / _MIB:.0f}"


def _number(value: float | None) -> str:
    """Three digits, more where the number has more before the point."""
    if value is None:
        return _NONE
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


# -- CSV

_NESTED: Final = ("intervals", "workers", "claim")


def csv_text(rows: Sequence[Row]) -> str:
    """All figures of each row, one column each; those of single workers are in the JSON only. Empty: not read."""
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    plain = {name: value for name, value in msgspec.to_builtins(row).items() if name not in _NESTED}
    flat = {name: _word(value) for name, value in plain.items()}
    for name, interval in row.intervals.items():
        flat |= {f"{name}_{key}": value for key, value in _bounds(interval).items()}
    claim: Mapping[str, Any] = msgspec.to_builtins(row.claim)
    return flat | {f"claim_{key}": _word(value) for key, value in claim.items()}


def _bounds(interval: Interval) -> dict[str, float]:
    return {"low": interval.low, "high": interval.high, "n": interval.n}


def _word(value: Any) -> Any:
    """What has parts as `a: 1; b: 2`, or `a; b`."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {one}" for name, one in value.items())
    return ("; ".join(map(str, value)) or "no") if isinstance(value, list) else value
