"""The Edge paper's table: a row for each model, placement and board. Pure.

Owns what was measured of one model under one placement (`Trial`), the rows that come of it, and the shape of the
figures (msgspec structs: their JSON schema is published). Refuses to know how anything was measured (cluster_runs.py),
what columns mean in words and how tables are written (edge_table_text.py), and the paper's claim (edge_claim.py).

A phase's rate is its tokens over its own seconds, never over the whole time: between the two lies a factor of 30. What
could not be read is null, and no verdict is made of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from edge_llm.bench.accuracy.figures import SIGNIFICANT, binomial_p, perplexity, share
from edge_llm.bench.edge_board import GATEWAY, Board, WorkerUse
from edge_llm.bench.edge_claim import Claim, Load, claim_of
from edge_llm.bench.record import ModelFacts
from edge_llm.bench.serve.answers import Answer
from edge_llm.bench.stats import bootstrap, mean, median

NOT_WATCHED: Final = "not watched"


# -- what was measured


@dataclass(frozen=True, slots=True)
class Trial:
    """One model under one placement. `load_s`: of the slowest worker. `sampling`, `engine`: tokens per second by
    setting and by phase. `planned`: how many requests there were to be, where the run was interrupted."""

    model: ModelFacts
    placement: str
    answers: tuple[Answer, ...]
    boards: tuple[Board, ...] = ()
    load_s: float | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)
    engine: Mapping[str, float] = field(default_factory=dict)
    planned: int | None = None


# -- the figures


class Interval(msgspec.Struct, frozen=True):
    """95 %: bootstrap of the median of n requests; of accuracy Wilson's, n items."""

    low: float
    high: float
    n: int


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the table. Medians; null is what could not be read. `roles`: who this is in the placement.
    `cpu_samples`: readings that `cpu_share` is the mean of. `planned`: requests that there were to be, where the row
    was cut short. What has a default is not in older records."""

    model: str
    quantization: str
    file_bytes: int | None
    placement: str
    node: str
    roles: str
    prompt_tokens_per_s: float | None
    generation_tokens_per_s: float | None
    sampling_tokens_per_s: float | None
    sampling_full_tokens_per_s: float | None
    engine_prompt_tokens_per_s: float | None
    engine_generation_tokens_per_s: float | None
    load_s: float | None
    ttft_s: float | None
    tpot_ms: float | None
    total_s: float | None
    queue_ms: float | None
    prefill_ms: float | None
    transfer_ms: float | None
    decode_ms: float | None
    cpu_share: float | None
    above_idle_cpu_share: float | None
    cpu_samples: int | None = None
    ram_share: float | None
    above_idle_ram_share: float | None
    mapped_share: float | None = None
    above_idle_mapped_share: float | None = None
    peak_rss_bytes: int | None
    above_idle_peak_rss_bytes: int | None
    temperature_c: float | None
    throttled: list[str] | None
    power_w: float | None
    tokens_per_joule: float | None
    above_idle_tokens_per_joule: float | None
    accuracy: float | None
    chance: float | None
    chance_p_value: float | None
    differs_from_chance: bool | None
    perplexity: float | None
    perplexity_stderr: float | None
    requests: int
    planned: int | None = None
    completed: int
    failed: dict[str, int]
    modes: dict[str, int]
    intervals: dict[str, Interval]
    workers: dict[str, WorkerUse]
    claim: Claim
    board: str | None = None


class ClusterFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What `edge-llm bench cluster --json` prints, `figures` of its record. `models`: accuracy by model and task."""

    definitions: dict[str, str]
    rows: list[Row]
    models: dict[str, Any]
    sentences: list[str]
    record: str | None = None


def schema() -> dict[str, Any]:
    """JSON schema of what `edge-llm bench cluster --json` prints."""
    return msgspec.json.schema(ClusterFigures)


# -- rows


def rows_of(trial: Trial, cases: Sequence[Mapping[str, Any]] = ()) -> list[Row]:
    """One for each board, or one for a cluster that nobody watched. `cases`: of accuracy, of this model."""
    done = [answer for answer in trial.answers if answer.is_complete]
    samples = samples_of(done)
    medians = {name: median(values) if values else None for name, values in samples.items()}
    intervals = {name: _interval(samples[name]) for name in _WITH_INTERVAL if len(samples[name]) > 1}
    joules = _joules(trial, done)
    scores = scores_of(cases)
    if scores.interval is not None:
        intervals["accuracy"] = scores.interval
    return [
        Row(
            model=trial.model.name,
            quantization=trial.model.quantization,
            file_bytes=trial.model.size_bytes or None,
            placement=trial.placement,
            node=board.node,
            roles=_roles(board, done),
            **medians,
            sampling_tokens_per_s=trial.sampling.get("greedy"),
            sampling_full_tokens_per_s=trial.sampling.get("full"),
            engine_prompt_tokens_per_s=trial.engine.get("prompt"),
            engine_generation_tokens_per_s=trial.engine.get("generation"),
            load_s=trial.load_s,
            cpu_share=board.cpu_share,
            above_idle_cpu_share=board.above_idle_cpu_share,
            cpu_samples=board.cpu_samples,
            ram_share=board.ram_share,
            above_idle_ram_share=board.above_idle_ram_share,
            mapped_share=board.mapped_share,
            above_idle_mapped_share=board.above_idle_mapped_share,
            peak_rss_bytes=_rss(board)[0],
            above_idle_peak_rss_bytes=_rss(board)[1],
            temperature_c=board.temperature_c,
            throttled=None if board.throttled is None else list(board.throttled),
            power_w=board.power_w,
            tokens_per_joule=joules[0],
            above_idle_tokens_per_joule=joules[1],
            accuracy=scores.accuracy,
            chance=scores.chance,
            chance_p_value=scores.p_value,
            differs_from_chance=None if scores.p_value is None else scores.p_value < SIGNIFICANT,
            perplexity=scores.perplexity,
            perplexity_stderr=scores.perplexity_stderr,
            requests=len(trial.answers),
            planned=trial.planned,
            completed=len(done),
            failed=_failed(trial.answers),
            modes=dict(Counter(str(answer.own["mode"]) for answer in done if answer.own.get("mode"))),
            intervals=intervals,
            workers=dict(board.workers),
            claim=claim_of(
                medians["generation_tokens_per_s"],
                Load(board.cpu_share, board.above_idle_cpu_share, samples=board.cpu_samples),
                _memory(board),
                board.throttled or (),
            ),
            board=board.kind,
        )
        for board in trial.boards or (Board(NOT_WATCHED),)
    ]


def _memory(board: Board) -> Load:
    """With what is mapped. Where workers run and nobody knows how much they map, it is more than was read."""
    ram = Load(board.ram_share, board.above_idle_ram_share, is_least=bool(board.workers))
    if board.mapped_share is None or ram.raw is None:
        return ram
    above = (board.above_idle_ram_share, board.above_idle_mapped_share)
    known = [one for one in above if one is not None]
    return Load(ram.raw + board.mapped_share, sum(known) if len(known) == len(above) else None)


def samples_of(done: Sequence[Answer]) -> dict[str, list[float]]:
    """Of complete answers, by name of the column. Parts and the prompt's rate are only of gateways that tell them."""
    found: dict[str, list[float]] = {name: [] for name in _REQUEST_COLUMNS}
    for answer in done:
        for name, value in _figures(answer).items():
            if value is not None:
                found[name].append(value)
    return found


_REQUEST_COLUMNS: Final = (
    *("prompt_tokens_per_s", "generation_tokens_per_s", "ttft_s", "tpot_ms", "total_s"),
    *("queue_ms", "prefill_ms", "transfer_ms", "decode_ms"),
)
# The record's statistics have them of all.
_WITH_INTERVAL: Final = ("prompt_tokens_per_s", "generation_tokens_per_s", "ttft_s", "tpot_ms")


def _interval(samples: Sequence[float]) -> Interval:
    return Interval(*bootstrap(samples), len(samples))


def _figures(answer: Answer) -> dict[str, float | None]:
    """Of one answer."""
    prefill_ms, first_ms = _said_ms(answer, "wait_ms", "prefill_ms"), _said_ms(answer, "first_decode_ms")
    asked = answer.asked_prompt_tokens if answer.prompt_tokens is None else answer.prompt_tokens
    computed = asked - (answer.cached_tokens or 0)
    streamed_s = answer.last_s - answer.first_s if answer.last_s is not None and answer.first_s is not None else None
    return {
        "prompt_tokens_per_s": 1e3 * computed / prefill_ms if prefill_ms and computed > 0 else None,
        "generation_tokens_per_s": 1 / answer.tpot_s if answer.tpot_s else None,
        "ttft_s": answer.ttft_s,
        "tpot_ms": None if answer.tpot_s is None else 1e3 * answer.tpot_s,
        "total_s": answer.e2e_s,
        "queue_ms": _said_ms(answer, "queue_ms"),
        "prefill_ms": prefill_ms,
        "transfer_ms": _said_ms(answer, "handoff_ms"),
        "decode_ms": None if first_ms is None or streamed_s is None else first_ms + 1e3 * streamed_s,
    }


def _said_ms(answer: Answer, *names: str) -> float | None:
    """The sum of what our gateway reports under these names; None of other servers."""
    said = [answer.own.get(name) for name in names]
    numbers = [float(one) for one in said if isinstance(one, int | float) and not isinstance(one, bool)]
    return sum(numbers) if len(numbers) == len(names) else None


def _failed(answers: Sequence[Answer]) -> dict[str, int]:
    kinds = ("cut_short" if answer.is_cut_short else answer.kind for answer in answers if not answer.is_complete)
    return dict(sorted(Counter(kind or "unfinished" for kind in kinds).items()))


def _roles(board: Board, done: Sequence[Answer]) -> str:
    """On a board with several workers who they are; else what the one there did."""
    workers = [name for name in board.workers if name != GATEWAY]
    if workers != [board.node]:
        return ", ".join(workers)
    did = {"prefill": "prefill_node", "decode": "decode_node"}
    return ", ".join(role for role, key in did.items() if any(answer.own.get(key) == board.node for answer in done))


def _rss(board: Board) -> tuple[int | None, int | None]:
    """Of the workers together, at their most, and above what they were when ready."""
    workers = [one for name, one in board.workers.items() if name != GATEWAY]
    peaks = [one.peak_rss_bytes for one in workers if one.peak_rss_bytes is not None]
    idle = [one.idle_rss_bytes for one in workers if one.idle_rss_bytes is not None]
    if not peaks or len(peaks) < len(workers):
        return None, None
    return sum(peaks), sum(peaks) - sum(idle) if len(idle) == len(workers) else None


def _joules(trial: Trial, done: Sequence[Answer]) -> tuple[float | None, float | None]:
    """Answer tokens per joule, raw and above idle; null where one of the boards has no meter."""
    sent = [answer.sent_s for answer in trial.answers if answer.sent_s is not None]
    ended = [answer.ended_s for answer in trial.answers if answer.ended_s is not None]
    seconds = max(ended) - min(sent) if sent and ended else 0.0
    tokens = sum(answer.tokens for answer in done)

    def per_joule(watts: Sequence[float | None]) -> float | None:
        known = [one for one in watts if one is not None]
        energy_j = sum(known) * seconds
        return tokens / energy_j if known and len(known) == len(watts) and energy_j > 0 else None

    return per_joule([one.power_w for one in trial.boards]), per_joule([one.above_idle_power_w for one in trial.boards])


# -- accuracy


@dataclass(frozen=True, slots=True)
class Scores:
    accuracy: float | None = None
    interval: Interval | None = None
    chance: float | None = None
    p_value: float | None = None
    perplexity: float | None = None
    perplexity_stderr: float | None = None


def scores_of(cases: Sequence[Mapping[str, Any]]) -> Scores:
    """Of one model. Items with choices count, all together; where there are none, items with any right answer, for
    which there is no chance level."""
    good = [case for case in cases if "failed" not in case]
    choices = [case for case in good if "n_choices" in case and case.get("acc") is not None]
    right = [case["acc"] for case in choices or good if case.get("acc") is not None]
    texts = [case for case in good if "nll" in case]
    text = perplexity([case for case in texts if case["task"] == texts[0]["task"]]) if texts else {}
    if not right:
        return Scores(perplexity=text.get("perplexity"), perplexity_stderr=text.get("perplexity_stderr"))
    found = share(right)
    chance = mean([1 / case["n_choices"] for case in choices]) if choices else None
    return Scores(
        accuracy=found["value"],
        interval=Interval(found["low"], found["high"], found["n"]),
        chance=chance,
        p_value=None if chance is None else binomial_p(int(sum(right)), len(right), chance),
        perplexity=text.get("perplexity"),
        perplexity_stderr=text.get("perplexity_stderr"),
    )
