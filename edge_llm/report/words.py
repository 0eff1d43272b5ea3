"""What the name of a figure says: its unit, how it is written, which way is better, what the word means. Pure.

Owns these tables, for tables, plots and comparisons alike. A figure's name is a path of keys: its own name last, then a
statistic, perhaps ("ttft_s", "all", "p90"). Refuses to know records and how anything was measured.

Rule: names carry units (`ttft_s`, `kv_bytes`); what no table knows is a plain number, and neither way is better.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any, Final

Path = Sequence[str]
NOT_READ: Final = "-"
_WORDS_AT_MOST: Final = 6
_LONG_MS: Final = 10_000  # said in seconds

# Beside statistics, and about something else than they are; and how far something spreads: neither way is better.
_COUNT: Final = re.compile(r"n|count|requests|answers|samples|tokens|missing|bound|unknown|p_value")
_SPREAD: Final = re.compile(r"std|stddev|stderr|low|high|least|most|\w+_std(err)?")
_AT_THE_END: Final = re.compile(r"_(p\d+|min|max|mean|median|avg|total|peak)$")
# Of a sample: what follows the last colon or dot ("answers.capacity.ttft_s", "split, 1 streams: wait_ms").
_LAST_WORD: Final = re.compile(r"[A-Za-z][\w+-]*$")

_UNITS: Final = tuple(
    (re.compile(pattern), unit)
    for pattern, unit in (
        (r"tokens?_per_j(oule)?$", "tokens/J"),
        (r"tokens?_per_s$|(^|_)t/s$|(^|_)ts$|_tps$|^(output|total_token)_throughput$", "tokens/s"),
        (r"^request_(throughput|goodput)$", "/s"),
        (r"mb_per_s$", "MB/s"),
        (r"bytes_per_s$", "B/s"),
        (r"per_s$", "/s"),
        (r"us_per_token$", "us/token"),
        (r"_us$", "us"),
        (r"(^|_)ms$", "ms"),
        (r"_ns$", "ns"),
        (r"_s$", "s"),
        (r"^(copy|scale|read)$", "B/s"),
        (r"(^|_)bytes$", "B"),
        (r"_mb$", "MB"),
        (r"_mib$", "MiB"),
        (
            r"(share|attainment|accuracy|overlap)(_full|_greedy)?$|^missed_tt?p?[of]t$|^acc(_\w+)?$|^mc[12]$|"
            r"^same_(answer|text|top)$|^share_\w+$|^(chance|majority|instructions(_loose)?)$",
            "share",
        ),
        (r"(^|_)(percent|pct)$", "%"),
        (r"_c$", "C"),
        (r"_mhz$", "MHz"),
        (r"(^|_)w(atts)?$", "W"),
        (r"_ratio$|^ratio(_|$)|_over_", "x"),
    )
)
_SCALED: Final = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Better(Enum):
    """Which way is better. PROMISE: a count that is to be 0, or a claim that is to hold: one is too many.
    REFERENCE: somebody else's figure: when it changed, the machine did."""

    HIGHER = "higher"
    LOWER = "lower"
    PROMISE = "promise"
    REFERENCE = "reference"
    NEITHER = "neither"


# Whose figure it is: others that are measured beside us, and policies that ours is held against.
_OTHERS: Final = re.compile(
    r"(^|: )llama\.cpp(:|\.|$)|: default(:|\.|$)|(^|\.)llama_server|two llama-server|"
    r"(^|\.)(least_busy|random|round_robin)\.|least_busy_over|llama[-_]bench|(^|\.)llama_perplexity$"
)
# Of the generator, of what was asked, and of how it is judged; whether somebody else's claim holds on a board is no
# promise of ours, and whether all limits of a load are kept depends on the load.
_ASIDE: Final = re.compile(
    r"(^|\.)(late_m?s|unloaded|alone|clipping|detection_goals_s|limits|claim)\.|cpu_share\.client|slowdown\.holds$"
)
# By the name of the figure itself; the first that fits counts.
_WAYS: Final = tuple(
    (re.compile(pattern), better)
    for pattern, better in (
        (
            r"^(streams_lost|tokens_missing|tokens_repeated|streams_different|bad_streams|unexplained|holds|"
            r"ids_equal|answers_of_other_length)$",
            Better.PROMISE,
        ),
        (
            r"(^|_)(at_s|retry_after_s|offered_per_s|rate_per_s|bound_s|seconds_per_point|late_(s|ms)|goals?_s|"
            r"until_s|turn_s|step_s|row_s|period_s|wall_s|size_bytes|std|stddev|frequency_mhz|handoff_bytes|"
            r"chunk_bytes|snapshot_bytes|kv_bytes_per_token|client_cpu_share|cpu_share_client|unloaded|"
            r"asked_tokens|split_share|load|chance|majority|p_value)$|late_|^limits?_|direct_",
            Better.NEITHER,
        ),
        (
            r"tokens?_per_|per_s$|throughput$|goodput$|^same_(answer|text|top)$|^instructions(_loose)?$|"
            r"^(goodput|attainment|acc|accuracy|exact_match|pass|f1|mc[12]|last_word)(_|$)|"
            r"overlap|^completed_share$|(prefill|decode|local|batch\d*|hole)_ratio$|hole_of_batch8_ratio$|roofline|similarity|"
            r"^(avg_ts|tps|t/s)$|top_token_agreement|accuracy$",
            Better.HIGHER,
        ),
        (
            r"(^|_)(s|ms|us|ns)$|us_per_token|bytes$|_mi?b$|stall_ratio|_over_|(^|_)(perplexity|ppl|kl|kld)(_|$)|"
            r"cpu_|ram_|sampler_share|export_share|ttft_share|^(failed|lost|refused\w*|missed\w*|not_answered|timeouts)$|"
            r"temperature|_c$|(^|_)w(atts)?$|throttl|^ttft_ratio|rejection",
            Better.LOWER,
        ),
    )
)

_DEFINITIONS: Final = tuple(
    (name, re.compile(pattern), text)
    for name, pattern, text in (
        (
            "TTFT",
            r"ttft",
            "time to first token: from when the client sends until its first token is there; waiting in the queue and "
            "the hand-off of KV are in it",
        ),
        ("ITL", r"(^|_)itl|gap_s", "inter-token latency: the gaps between neighbouring tokens of one stream; not TTFT"),
        (
            "TPOT",
            r"tpot",
            "time per output token: (E2E - TTFT) / (tokens - 1), one figure for each request; the first token is not "
            "in it, as vLLM and DistServe count",
        ),
        ("E2E", r"e2e", "end to end: from when the client sends until the last token is there"),
        (
            "attainment",
            r"attainment",
            "the share of requests that keep the limits of TTFT and of TPOT, both; what failed, was cut off or never "
            "came misses",
        ),
        (
            "goodput",
            r"goodput|attainment",
            "the highest rate of requests with an attainment of a goal (90 % or 99 %), on the line between two rates "
            "that were measured",
        ),
        (
            "stall ratio",
            r"stall_ratio",
            "the largest gap of a running stream while a long prompt is worked on and its answer begins, over that "
            "stream's mean gap before; prompt_stall_ratio, and decode_stall_ratio of a decode worker, leave out the "
            "steps that make the new answer's tokens (answer_stall_ratio has them)",
        ),
        ("export share", r"export_share", "seconds spent exporting KV over seconds of prefill of the same prompt"),
        (
            "overlap share",
            r"overlap",
            "bytes of KV that had arrived before the last call of prefill ended, over all bytes of KV",
        ),
        (
            "hand-off parts",
            r"first_decode_ms|adopt_ms",
            "in order: queue (gateway), wait (until the first KV frame, or the prompt's turn), prefill, last chunk (in "
            "flight after prefill ended), adopt (restoring KV), first decode",
        ),
        (
            "ratio to llama.cpp",
            r"(prefill|decode|batch\d+)_ratio",
            "our tokens/s over those of llama.cpp's own tool, median over interleaved repetitions on the same core; "
            "default_: over a build with llama.cpp's default kernels, what exactness costs",
        ),
        (
            "resumed",
            r"resumed_s",
            "from the moment a fault struck until the disturbed stream went on",
        ),
        (
            "tokens/s",
            r"tokens_per_s|avg_ts",
            "tokens of a phase over that phase's own seconds; never all tokens over all time",
        ),
        ("perplexity", r"perplexity|ppl", "exp of the mean negative log-likelihood per token; lower is better"),
        (
            "KL divergence",
            r"(^|_)kld?(_|$)",
            "mean over tokens of KL(reference || this), in nats; 0 for the same model",
        ),
        ("accuracy", r"accuracy|(^|_)acc(_|$)", "right items over all items; chance is what guessing would give"),
        ("memory", r"rss|pss|(^|_)memory", "RSS counts mapped model files, too: pages that others may share"),
        ("CPU share", r"cpu_share|cpu_percent", "of all cores that the run was allowed to use, unless said otherwise"),
    )
)


def base(name: str) -> str:
    """A name without its statistic: `resumed_s_max` is about `resumed_s`."""
    return _AT_THE_END.sub("", name)


def of_sample(name: str) -> tuple[str, str]:
    """A sample's name as whose it is and what it is: ("split, 1 streams", "wait_ms")."""
    found = _LAST_WORD.search(name)
    word = found.group() if found else name
    return name[: len(name) - len(word)].rstrip(" .:"), word


def subject(path: Path) -> str:
    """The part of a path that says what is counted: the last one that has a unit (`ttft_s`, not the window or the
    percentile after it), but for counts."""
    if not path:
        return ""
    own = base(path[-1])
    if _COUNT.fullmatch(path[-1]) or _unit(own):
        return own
    return next((base(part) for part in reversed(path[:-1]) if _unit(base(part))), own)


def unit(path: Path) -> str:
    """ "s", "ms", "B", "share" (0..1), "x" (a ratio), ... or "" for a plain number."""
    return _unit(subject(path))


def _unit(name: str) -> str:
    return next((unit for pattern, unit in _UNITS if pattern.search(name)), "")


def better(path: Path) -> Better:
    """Which way a figure is better."""
    place = ".".join(path)
    if _OTHERS.search(place):
        return Better.REFERENCE
    if _SPREAD.fullmatch(path[-1]) or _ASIDE.search(place):
        return Better.NEITHER
    name = subject(path)
    return next((way for pattern, way in _WAYS if pattern.search(name)), Better.NEITHER)


def shown(path: Path, value: Any) -> str:
    """A value as people read it, with its unit."""
    if value is None:
        return NOT_READ
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _number(float(value), unit(path))
    if isinstance(value, dict):
        inner = "; ".join(f"{name} {shown((*path, name), one)}" for name, one in value.items())
        return inner or NOT_READ
    if isinstance(value, list | tuple):
        some = ", ".join(shown(path, one) for one in value[:_WORDS_AT_MOST])
        rest = f", ... ({len(value)})" if len(value) > _WORDS_AT_MOST else ""
        return f"{some}{rest}" if value else "none"
    return str(value)


def _number(value: float, kind: str) -> str:
    if kind == "share":
        return f"{short(100 * value)} %"
    if kind in ("B", "B/s"):
        size, letter = next(((size, letter) for size, letter in _SCALED if abs(value) >= size), (1.0, ""))
        return f"{short(value / size)} {letter}{kind}"
    if kind == "ms" and abs(value) >= _LONG_MS:
        return f"{short(value / 1e3)} s"
    return f"{short(value)} {kind}" if kind and kind != "x" else short(value)


def short(value: float) -> str:
    """Three digits, the last ones too when they are 0; whole numbers whole; no exponent where people read numbers."""
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".") if abs(value) >= 1e-4 else f"{value:.2g}"


def title(name: str) -> str:
    """A key as a column's heading: `ttft_closed_loop_s_p95` is `ttft closed loop p95`; the cells have the unit."""
    words = re.sub(r"(?<!per)_(s|ms|us|bytes|mb)(?=_p\d|_max|_min|_mean|_median|$)", "", name)
    return words.replace("_per_s", "/s").replace("_", " ") or name


def definitions(names: Iterable[str]) -> list[tuple[str, str]]:
    """Of the words in these names of figures and samples, in a fixed order."""
    known = set(names)
    return [(name, text) for name, pattern, text in _DEFINITIONS if any(pattern.search(one) for one in known)]
