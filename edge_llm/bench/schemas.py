"""The shapes of what `bench node|net|accuracy|goodput` print with --json, which are the `figures` of their records.

Owns the published types of these four; `serve`, `cluster`, `compare` and `claims` have theirs beside the code that
fills them. Refuses to know how a figure is measured. Invariant: nothing is printed that is not named here, and a figure
that was not measured is null or left out (tests read the records in bench_results back through these types).
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from edge_llm.bench.goodput import Limits, Unloaded
from edge_llm.bench.node_rows import LLAMA_BENCH_COLUMNS, OUR_COLUMNS


class _Figures(msgspec.Struct, frozen=True, kw_only=True):
    """record: where the file is; left out in the file itself."""

    record: str | UnsetType = UNSET


# -- bench node


class Bandwidth(msgspec.Struct, frozen=True, kw_only=True):
    """Measured memory bandwidth: the best of `kinds`, with so many threads over arrays of that size."""

    bytes_per_s: float
    kinds: dict[str, float]
    threads: int
    array_bytes: int
    how: str


class MemoryPoint(msgspec.Struct, frozen=True, kw_only=True):
    """Highest resident memory of a model at a context size, by phase."""

    model: str
    policy: str
    n_ctx: int
    n_ubatch: int
    type_k: str
    type_v: str
    flash_attention: str
    tokens: int
    prefill_peak_bytes: int | None
    decode_peak_bytes: int | None


class NodeFigures(_Figures, frozen=True, kw_only=True):
    """rows: llama-bench's columns under its names (`test::get_fields`), then ours, and the samples: see `row` in this
    schema. memory_bandwidth: by number of threads."""

    rows: list[dict[str, Any]]
    memory_bandwidth: dict[str, Bandwidth]
    memory_curve: list[MemoryPoint]
    definitions: dict[str, str]


# -- bench net


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A worker, and how long a connection to it takes from here."""

    address: str
    role: str
    model: str
    kv_bytes_per_token: int
    connect_ms: float


class Pair(msgspec.Struct, frozen=True, kw_only=True, rename={"source": "from", "target": "to"}):
    """From a worker that computes prompts to one that decodes. round_trip_ms, bandwidth_mb_per_s and transfers are what
    the receiver measured of all that came from there; the others are medians over hand-offs made for this."""

    source: str
    target: str
    round_trip_ms: float | None
    bandwidth_mb_per_s: float | None
    transfers: int | None
    handoff_rate_mb_per_s: float | None
    handoff_tokens_per_s: float | None
    handoff_ms: float | None
    adopt_ms: float | None
    overlapped_share: float | None
    handoff_bytes: float | None


class Burst(msgspec.Struct, frozen=True, kw_only=True):
    """So many bytes at once, as a hand-off sends them."""

    bytes: int
    ms: float
    mb_per_s: float
    tokens_per_s: float | None


class NetFigures(_Figures, frozen=True, kw_only=True):
    """Of workers: `nodes`, by name, `pairs` and `notes`. Of a plain link (`--to`): the others, without what an
    interrupted run did not come to. round_trip_ms: min, p50, p95, p99."""

    definitions: dict[str, str]
    nodes: dict[str, NodeFacts] | UnsetType = UNSET
    pairs: list[Pair] | UnsetType = UNSET
    notes: list[str] | UnsetType = UNSET
    round_trip_ms: dict[str, float] | UnsetType = UNSET
    to_peer_mb_per_s: float | UnsetType = UNSET
    from_peer_mb_per_s: float | UnsetType = UNSET
    handoff: Burst | UnsetType = UNSET


# -- bench accuracy


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """A share of items (Wilson's interval) or a mean over them (normal interval), 95 %."""

    value: float
    stderr: float | None
    low: float
    high: float
    n: int


class TaskFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one model and one task; what the task has no figure for is left out. n: items without failures. acc_norm: by
    log-likelihood per character; acc_flexible, acc_loose: with looser extraction of the answer; mc2: TruthfulQA's mass
    on true answers. kl and its kin: from the reference model, llama-perplexity's definitions."""

    n: int
    failed: int
    acc: Share | UnsetType = UNSET
    acc_norm: Share | UnsetType = UNSET
    acc_flexible: Share | UnsetType = UNSET
    acc_loose: Share | UnsetType = UNSET
    mc2: Share | UnsetType = UNSET
    chance: float | UnsetType = UNSET
    p_value: float | UnsetType = UNSET
    differs_from_chance: bool | UnsetType = UNSET
    majority: float | UnsetType = UNSET
    word_perplexity: float | UnsetType = UNSET
    instructions: Share | UnsetType = UNSET
    instructions_loose: Share | UnsetType = UNSET
    instructions_unchecked: int | UnsetType = UNSET
    tokens: int | UnsetType = UNSET
    perplexity: float | UnsetType = UNSET
    perplexity_stderr: float | UnsetType = UNSET
    kl: float | UnsetType = UNSET
    kl_stderr: float | UnsetType = UNSET
    kl_median: float | UnsetType = UNSET
    kl_p99: float | UnsetType = UNSET
    kl_max: float | UnsetType = UNSET
    same_top: float | UnsetType = UNSET
    same_top_stderr: float | UnsetType = UNSET
    shift_rms: float | UnsetType = UNSET
    reference_perplexity: float | UnsetType = UNSET
    ln_ratio: float | UnsetType = UNSET
    ln_ratio_stderr: float | UnsetType = UNSET


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """How far answers are from the reference's by meaning, a sentence embedding's cosine: drift, not truth."""

    similarity_mean: float
    similarity_p5: float
    share_near: float
    n: int


class Against(msgspec.Struct, frozen=True, kw_only=True):
    """A model against the reference on the items that both have. p_value: McNemar's exact test on `gained`, `lost`."""

    n: int
    gained: int
    lost: int
    p_value: float
    same_answer: float | UnsetType = UNSET
    same_text: float | UnsetType = UNSET
    drift: Drift | UnsetType = UNSET


class Beside(msgspec.Struct, frozen=True, kw_only=True):
    """Ours and llama-perplexity's of the same build, by model and task: windows, and of each figure both and the
    ratio."""

    models: dict[str, dict[str, dict[str, Any]]]
    definitions: dict[str, str]


class AskedTask(msgspec.Struct, frozen=True, kw_only=True):
    """How a task was asked. is_own_set: a small set of ours, which ranks nothing. window: tokens of a text's windows.
    shots: examples before each item. seed: of drawing items and examples. prompt: by kind of module the beginning of
    the sha256 of its text, which `workload` of the record has whole."""

    kind: str
    is_own_set: bool
    note: str
    window: int | UnsetType = UNSET
    shots: int | UnsetType = UNSET
    seed: int | UnsetType = UNSET
    prompt: dict[str, str] | UnsetType = UNSET


class AccuracyFigures(_Figures, frozen=True, kw_only=True):
    """models: by name and task. reference: the model that others are compared with. definitions: of the measures in
    the printed table. sentences: what must not be overlooked. What older records do not have is left out there."""

    models: dict[str, dict[str, TaskFigures]]
    definitions: dict[str, str] | UnsetType = UNSET
    tasks: dict[str, AskedTask] | UnsetType = UNSET
    sentences: list[str] | UnsetType = UNSET
    reference: str | UnsetType = UNSET
    against_reference: dict[str, dict[str, Against]] | UnsetType = UNSET
    against_llama_perplexity: Beside | UnsetType = UNSET


# -- bench goodput


class GoodputAt(msgspec.Struct, frozen=True, kw_only=True):
    """Requests per second with that share in limits, on the line between two measured rates. bound: between; at_most
    or at_least, where all rates were too high or none was."""

    per_s: float
    low: float
    high: float
    per_node_per_s: float
    bound: str


class RatePoint(msgspec.Struct, frozen=True, kw_only=True):
    """One rate; shares are of all `requests`. ttft_s, tpot_s: p50, p90, p99."""

    rate_per_s: float
    requests: int
    attainment: float
    low: float
    high: float
    failed: float
    missed_ttft: float
    missed_tpot: float
    ttft_s: dict[str, float]
    tpot_s: dict[str, float]


class ArrangementFigures(msgspec.Struct, frozen=True, kw_only=True):
    """is_cut_short: interrupted while it still kept the limits."""

    goodput_90: GoodputAt
    goodput_99: GoodputAt
    is_cut_short: bool
    curve: list[RatePoint]


class SplitShare(msgspec.Struct, frozen=True, kw_only=True):
    """Of auto's answers that came to their end; `unknown`: the others. rates_per_s: of these rates alone."""

    share: float | None
    low: float
    high: float
    answers: int
    unknown: int
    rates_per_s: list[float] | UnsetType = UNSET


class GoodputRatio(msgspec.Struct, frozen=True, kw_only=True):
    """With a bootstrap interval. least, most: what is certain of it (null: no bound). bounds: of each curve."""

    ratio: float | None
    low: float | None
    high: float | None
    least: float | None
    most: float | None
    bounds: dict[str, str]
    is_decided: bool


class RegimeFigures(msgspec.Struct, frozen=True, kw_only=True):
    """arrangements: split, local, auto, llama_server, as far as they were replayed."""

    limits: Limits
    why: str
    arrangements: dict[str, ArrangementFigures]
    auto_split_share: SplitShare
    auto_split_share_where_split_wins: SplitShare
    auto_to_better: GoodputRatio | UnsetType = UNSET
    split_to_local: GoodputRatio | UnsetType = UNSET


class TraceFigures(msgspec.Struct, frozen=True, kw_only=True):
    """clipping: what was cut off and left out. unloaded: a request alone. capacity_per_s: served of a flood."""

    requests: int
    mean_prompt_tokens: float
    mean_answer_tokens: float
    clipping: dict[str, int]
    unloaded: Unloaded
    capacity_per_s: float | None
    regimes: dict[str, RegimeFigures]


class LoadGenerator(msgspec.Struct, frozen=True, kw_only=True):
    """How late requests were sent."""

    late_p50_ms: float
    late_p99_ms: float
    late_max_ms: float
    is_saturated: bool


class GoodputFigures(_Figures, frozen=True, kw_only=True):
    """llama_server_flags: those chosen, by trace."""

    traces: dict[str, TraceFigures]
    seconds_per_point: float
    verdicts: list[str]
    llama_server_flags: dict[str, str] | UnsetType = UNSET
    generator: LoadGenerator | UnsetType = UNSET
    answers_of_other_length: int | UnsetType = UNSET


PRINTED: Final[dict[str, type[_Figures]]] = {
    "node": NodeFigures,
    "net": NetFigures,
    "accuracy": AccuracyFigures,
    "goodput": GoodputFigures,
}


def schema(of: str) -> dict[str, Any]:
    """JSON schema of what `edge-llm bench OF --json` prints. `row`, of node: the columns of a row by name."""
    found = msgspec.json.schema(PRINTED[of])
    if of == "node":
        found["$defs"]["row"] = {"type": "object", "required": [*LLAMA_BENCH_COLUMNS, *OUR_COLUMNS]}
        found["$defs"]["NodeFigures"]["properties"]["rows"]["items"] = {"$ref": "#/$defs/row"}
    return found
