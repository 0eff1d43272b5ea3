"""What this project claims: each sentence, its bar, and which figure of which run decides. Pure data.

Owns the list and its words; a claim names a step (claims_plan.py), which is a command and the kind of record that it
leaves. Refuses to know how records are judged (claims_judged.py), how runs are made and what they found.

Rules: the bars are those of the benches' own `--check` (a test compares them); a bar that is missed stays where it is;
a figure that a record may lack for a good reason is behind a `need`, whose words say that reason.

A path goes through objects by name (`*` and other wildcards of the shell: all that fit), through lists by number or
`*`; `#` is how many there are. Every figure that it leads to has to keep the bar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from edge_llm.catalogue.memory import CHUNKS_ON_THEIR_WAY

Direction = Literal["at most", "at least", "below", "is"]
Limit = bool | float | str


@dataclass(frozen=True, slots=True)
class Bar:
    """`words`: what the figure is, when a claim has several bars. `unit`: `%` shows a share; otherwise it follows.
    `less`: the name of a figure beside it that is taken off. `has_interval`: `low` and `high` stand beside it, and
    while one of these misses the limit a figure that keeps it confirms nothing."""

    path: str
    direction: Direction
    limit: Limit
    words: str = ""
    unit: str = ""
    less: str = ""
    has_interval: bool = False


@dataclass(frozen=True, slots=True)
class Need:
    """What a record must say to decide a claim at all; `otherwise`: the reason why it does not."""

    bar: Bar
    otherwise: str


@dataclass(frozen=True, slots=True)
class Claim:
    """`source`: where we say it, in README. `counted`: figures to show beside the verdict, of what it was taken.

    `one_refutes`: a counterexample to the first bar decides, in a run that was cut short, too. `needs_full`: a quick
    run cannot tell. `is_of_what_there_is`: something that could not be measured leaves the rest valid.
    """

    id: str
    sentence: str
    step: str
    bars: tuple[Bar, ...]
    source: str
    needs: tuple[Need, ...] = ()
    counted: tuple[Bar, ...] = ()
    one_refutes: bool = False
    needs_full: bool = False
    is_of_what_there_is: bool = False

    @property
    def topic(self) -> str:
        return self.id.partition(".")[0]


def _count(path: str, words: str, unit: str = "") -> Bar:
    return Bar(path, "at least", 0, words, unit)


_MEASURED: Final = "What is claimed, and what came of it"
_ENGINE: Final = 0.97
_STRICT_TPOT: Final = "traces/*/regimes/strict_tpot_long_prompts"
_STRICT_TTFT: Final = "traces/*/regimes/strict_ttft_loose_tpot"
_UNDECIDED: Final = "the rates measured do not decide it"
_LATE: Final = "the load generator was late: the figures are its own"


def _decided(regime: str, ratio: str = "auto_to_better") -> tuple[Need, ...]:
    late = Need(Bar("generator/is_saturated", "is", False), _LATE)
    return (late, Need(Bar(f"{regime}/{ratio}/is_decided", "is", True), _UNDECIDED))


def _near_the_better(name: str, sentence: str, step: str, regime: str) -> Claim:
    bar = Bar(f"{regime}/auto_to_better/ratio", "at least", 0.95, has_interval=True)
    return Claim(f"goodput.{name}", sentence, step, (bar,), _MEASURED, needs=_decided(regime))


EXACTNESS: Final = (
    Claim(
        "exact.verify",
        "bit for bit on logits: decode does not depend on the batch, prefill not on its chunks, both not on place and "
        "threads; split equals whole, resumed equals undisturbed",
        "verify",
        (Bar("level", "is", "exact", "level"),),
        "Is it exact here?",
        counted=(_count("rows/*/compared", "logit vectors"),),
    ),
    Claim(
        "exact.theorem",
        "over HTTP, split equals whole and together equals alone, token id by token id, greedy and sampled",
        "theorem",
        (Bar("differences/#", "at most", 0, "different"), Bar("holds", "is", True, "proven")),
        _MEASURED,
        counted=(_count("comparisons", "comparisons"), _count("tokens_compared", "tokens")),
        one_refutes=True,
    ),
    Claim(
        "exact.turns",
        "a second turn on kept KV gives the tokens of a cold run",
        "turns",
        (Bar("ids_equal", "is", True, "tokens equal"),),
        _MEASURED,
        one_refutes=True,
    ),
)

HANDOFF: Final = (
    Claim(
        "handoff.export",
        "copying KV out of the engine takes a small share of the prefill",
        "handoff",
        (Bar("export_share", "at most", 0.01, unit="%"),),
        _MEASURED,
    ),
    Claim(
        "handoff.overlap",
        "KV travels while it is computed: this share of its bytes has arrived before the last prefill call ended",
        "handoff",
        (Bar("overlap_share", "at least", 0.90, unit="%"),),
        _MEASURED,
    ),
    Claim(
        "handoff.memory",
        "a hand-off takes a few chunks of memory where KV is sent, one snapshot and a few chunks where it arrives",
        "handoff",
        (
            Bar("memory/sender_chunks", "at most", CHUNKS_ON_THEIR_WAY, "chunks of the sender"),
            Bar("memory/receiver_chunks", "at most", CHUNKS_ON_THEIR_WAY, "beside the receiver's snapshot"),
        ),
        _MEASURED,
    ),
    Claim(
        "stall.prompt",
        "split, a long prompt hardly slows running streams while it arrives: largest gap over their mean gap before",
        "handoff",
        (Bar("arrivals/split, * streams/prompt_stall_ratio", "at most", 2.0),),
        _MEASURED,
    ),
    Claim(
        "stall.answer",
        "split, the first steps of its answer beside the streams counted too: largest gap over their mean gap before",
        "handoff",
        (Bar("arrivals/split, * streams/stall_ratio", "at most", 2.0),),
        _MEASURED,
    ),
    Claim(
        "stall.mixed",
        "on one mixed worker, which reads a long prompt between its steps: largest gap of running streams over their "
        "mean gap before",
        "handoff",
        (Bar("arrivals/mixed, * streams/stall_ratio", "at most", 4.0),),
        _MEASURED,
    ),
    Claim(
        "turns.ttft",
        "time to first token of a second turn, over that of the first",
        "turns",
        (Bar("second_turn_ttft_share", "at most", 0.15, unit="%"),),
        _MEASURED,
    ),
)


def _failover(name: str, sentence: str, step: str) -> Claim:
    return Claim(
        f"failover.{name}",
        sentence,
        step,
        (
            Bar("per_kind/*/bad_streams", "at most", 0, "bad streams"),
            Bar("per_kind/*/hit", "at least", 1, "hits of each kind"),
        ),
        _MEASURED,
        counted=(_count("per_kind/#", "kinds"), _count("per_kind/*/hit", "faults")),
        one_refutes=True,
    )


RELIABILITY: Final = (
    _failover(
        "model",
        "no fault struck from outside loses a stream of the real model, or a token of it, repeats or changes one",
        "faults-model",
    ),
    _failover("simulated", "the same of simulated workers: every kind of fault, many times", "faults"),
    Claim(
        "gateway.cpu",
        "one gateway with many streams: its CPU per token",
        "gateway",
        (Bar("cpu_us_per_token", "at most", 60.0, unit="us"),),
        _MEASURED,
        counted=(_count("tokens_per_s", "tokens/s"),),
    ),
    Claim(
        "gateway.memory",
        "one gateway with many streams: its memory",
        "gateway",
        (Bar("rss_mb", "at most", 150.0, unit="MB"),),
        _MEASURED,
    ),
    Claim(
        "gateway.ttft",
        "one gateway with many streams: what it adds to the median time to first token, and no request fails",
        "gateway",
        (
            Bar("ttft_added_ms_p50", "at most", 4.0, "added", unit="ms"),
            Bar("failed", "at most", 0, "failed"),
        ),
        _MEASURED,
    ),
    Claim(
        "overload.accepted",
        "at ten times capacity, no wait predicted beyond 1 s, who is let in waits (p95) hardly longer than at "
        "capacity, and nobody is lost",
        "overload",
        (
            Bar("*/ttft_ratio_p95", "at most", 2.0, "times as long"),
            Bar("*/failed", "at most", 0, "failed"),
            Bar("*/lost", "at most", 0, "lost"),
            Bar("*/unexplained", "at most", 0, "refused without words"),
            Bar("*/recovery_s", "at most", 1.0, "until nobody is refused any more", unit="s"),
        ),
        _MEASURED,
        needs=(Need(Bar("*/late_ms/p99", "at most", 10.0), _LATE),),
    ),
    Claim(
        "overload.refusal",
        "at ten times capacity a refusal is quick (p95)",
        "overload",
        (Bar("*/rejection_ms_p95", "at most", 100.0, unit="ms"),),
        _MEASURED,
        needs=(Need(Bar("*/late_ms/p99", "at most", 10.0), _LATE),),
    ),
)

SCHEDULING: Final = (
    Claim(
        "pools.wait",
        "traffic that turns: nobody is refused, fails, or waits beyond the bound",
        "pools",
        (
            Bar("policies/predicted/longest_wait_s", "at most", 30.0, "longest wait", unit="s"),
            Bar("policies/predicted/refused*", "at most", 0, "refused"),
            Bar("policies/predicted/failed", "at most", 0, "failed"),
        ),
        _MEASURED,
    ),
    Claim(
        "pools.policies",
        "the scheduler's P90 of time to first token over that of shortest queue, chance and turns",
        "pools",
        (Bar("ttft_predicted_over_*/p90", "below", 1.0),),
        _MEASURED,
    ),
    Claim(
        "pools.moves",
        "nodes help the other pool out, change over, and come back",
        "pools",
        (
            Bar("policies/predicted/events/spills", "at least", 1, "spills"),
            Bar("policies/predicted/events/repurposed_at_s/#", "at least", 1, "changed over"),
            Bar("policies/predicted/events/returned_at_s/#", "at least", 1, "came back"),
        ),
        "Measuring",
        needs_full=True,
    ),
    _near_the_better(
        "strict_tpot",
        "recorded traffic, strict time per token: requests/s within limits of auto, over the better of split and local",
        "goodput",
        _STRICT_TPOT,
    ),
    _near_the_better(
        "strict_ttft",
        "recorded traffic, strict time to first token: requests/s within limits of auto, over the better of split and "
        "local",
        "goodput",
        _STRICT_TTFT,
    ),
    _near_the_better(
        "memory",
        "recorded traffic, strict time per token, to two simulated nodes whose steps are bound by memory: requests/s "
        "within limits of auto, over the better of split and local",
        "goodput-simulated",
        _STRICT_TPOT,
    ),
    Claim(
        "goodput.splits",
        "to two such nodes, at the rates at which always splitting beats never splitting, auto splits most answers",
        "goodput-simulated",
        (Bar(f"{_STRICT_TPOT}/auto_split_share_where_split_wins/share", "at least", 0.5, unit="%"),),
        "Measuring",
        needs=(
            *_decided(_STRICT_TPOT, "split_to_local"),
            Need(
                Bar(f"{_STRICT_TPOT}/split_to_local/ratio", "at least", 1.0),
                "always splitting did not beat never splitting there",
            ),
        ),
    ),
)


def _engine(name: str, sentence: str, *figures: str) -> Claim:
    return Claim(
        f"engine.{name}",
        sentence,
        "engine",
        tuple(Bar(f"models/*/{figure}", "at least", _ENGINE) for figure in figures),
        _MEASURED,
    )


ENGINE: Final = (
    _engine("prefill", "prompt speed on one core over llama-bench's, same kernels", "prefill_ratio"),
    _engine("decode", "decode speed of one row on one core over llama-bench's, same kernels", "decode_ratio"),
    _engine(
        "batch", "decode speed of 4 and 8 rows over llama-batched-bench's, same kernels", "batch4_ratio", "batch8_ratio"
    ),
    _engine(
        "hole",
        "decode speed of 8 rows of which one has ended over llama-batched-bench's, same kernels",
        "batch8_hole_ratio",
    ),
    Claim(
        "engine.sampler",
        "sampling at 151,936 tokens, share of a decode step: greedy, and all stages",
        "engine",
        (
            Bar("models/*/sampler_share_greedy", "at most", 0.03, unit="%"),
            Bar("models/*/sampler_share_full", "at most", 0.03, unit="%"),
        ),
        _MEASURED,
    ),
)

EDGE_PAPER: Final = (
    Claim(
        "edge.paper",
        "the Edge paper's: a small model writes 5 tokens/s or more with less than half of CPU and RAM (claimed for "
        "Raspberry Pi 5)",
        "cluster",
        (
            Bar("rows/*/generation_tokens_per_s", "at least", 5.0, "tokens/s"),
            Bar("rows/*/cpu_share", "below", 0.5, "CPU", unit="%"),
            Bar("rows/*/ram_share", "below", 0.5, "RAM", unit="%"),
        ),
        "Measuring: bench cluster",
        needs=(
            Need(
                Bar("rows/*/cpu_share", "at most", 0.1, unit="%", less="above_idle_cpu_share"),
                "a board was busy before the first request, or not watched: its loads are not those of the cluster",
            ),
        ),
        is_of_what_there_is=True,
    ),
)

CLAIMS: Final[Sequence[Claim]] = (*EXACTNESS, *HANDOFF, *RELIABILITY, *SCHEDULING, *ENGINE, *EDGE_PAPER)
TOPICS: Final[Mapping[str, str]] = {
    "exact": "exactness",
    "handoff": "what the split costs",
    "stall": "what running streams feel of it",
    "turns": "conversations",
    "failover": "failover",
    "gateway": "the gateway",
    "overload": "overload",
    "pools": "pools",
    "goodput": "requests within limits of latency",
    "engine": "speed beside llama.cpp's own tools",
    "edge": "the Edge paper's table",
}
