"""Arrival times and lengths of recorded traffic, cut down to what a small cluster can replay. Pure.

Owns the Azure format (`TIMESTAMP,ContextTokens,GeneratedTokens`, no text), its beginning, its scaling to shorter
prompts and answers, its clipping to a context, and thinning to a rate. Refuses to know requests and servers.

Rules: prompt and answer of a row stay together (drawing them apart would lose their correlation); one factor for both
keeps the balance between reading and writing; what was clipped is counted. Rows are left out at random, not every
n-th: that would make a Poisson process regular. A lower rate replays a part of the rows of a higher one.
"""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from edge_llm.bench.stats import mean, percentile
from edge_llm.errors import EdgeLLMError

COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
# Splitting needs a position to carry and one to evaluate; a time per output token needs two tokens.
MIN_TOKENS: Final = 2
# Of a context, answers may take so much: a request that is nothing but its answer is no longer the trace's.
_ANSWER_SHARE: Final = 0.5


class BadTrace(EdgeLLMError):
    """A file that was given as a trace is none."""

    code = "bad_trace"


@dataclass(frozen=True, slots=True)
class Row:
    """One request. `number`: its place in the trace; `at_s`: after the trace's beginning."""

    number: int
    at_s: float
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """Rows in order of arrival."""

    name: str
    rows: tuple[Row, ...]

    @property
    def span_s(self) -> float:
        """Until the last arrival."""
        return self.rows[-1].at_s

    def beginning(self, seconds: float) -> Trace:
        return Trace(self.name, tuple(row for row in self.rows if row.at_s < seconds))

    def prompt_percentile(self, share: float) -> int:
        return round(percentile([row.prompt_tokens for row in self.rows], share))

    @property
    def mean_answer_tokens(self) -> float:
        return mean([row.answer_tokens for row in self.rows])

    @property
    def mean_prompt_tokens(self) -> float:
        return mean([row.prompt_tokens for row in self.rows])


@dataclass(frozen=True, slots=True)
class Clipping:
    """What scaling and clipping did to the lengths of a trace. Counts of requests, but for the tokens."""

    requests: int
    prompts_cut: int = 0
    prompt_tokens_cut: int = 0
    answers_cut: int = 0
    answer_tokens_cut: int = 0
    lengths_raised: int = 0


def parse(text: str, name: str) -> Trace:
    """Raises BadTrace that names the line."""
    lines = csv.reader(text.splitlines())
    if tuple(next(lines, ())) != COLUMNS:
        raise BadTrace(f"{name} is not a trace: its first line is not {','.join(COLUMNS)}")
    found: list[tuple[datetime, int, int]] = []
    for number, line in enumerate(lines, 2):
        try:
            at, prompt, answer = line
            found.append((datetime.fromisoformat(at), int(prompt), int(answer)))
        except ValueError as error:
            raise BadTrace(f"{name}, line {number}: not a time and two numbers of tokens: {','.join(line)}") from error
    if not found:
        raise BadTrace(f"{name} has no requests")
    found.sort(key=lambda entry: entry[0])
    start = found[0][0]
    rows = tuple(
        Row(number, (at - start).total_seconds(), prompt, answer) for number, (at, prompt, answer) in enumerate(found)
    )
    return Trace(name, rows)


def scaled(trace: Trace, factor: float, n_ctx: int) -> tuple[Trace, Clipping]:
    """Lengths times `factor`, then clipped so that prompt and answer fit into `n_ctx`."""
    rows, counts = [], Clipping(len(trace.rows))
    for row in trace.rows:
        prompt, answer = round(row.prompt_tokens * factor), round(row.answer_tokens * factor)
        raised = int(min(prompt, answer) < MIN_TOKENS)
        prompt, answer = max(MIN_TOKENS, prompt), max(MIN_TOKENS, answer)
        fitting_answer = min(answer, int(n_ctx * _ANSWER_SHARE))
        fitting_prompt = min(prompt, n_ctx - fitting_answer)
        counts = Clipping(
            counts.requests,
            counts.prompts_cut + (fitting_prompt < prompt),
            counts.prompt_tokens_cut + prompt - fitting_prompt,
            counts.answers_cut + (fitting_answer < answer),
            counts.answer_tokens_cut + answer - fitting_answer,
            counts.lengths_raised + raised,
        )
        rows.append(replace(row, prompt_tokens=fitting_prompt, answer_tokens=fitting_answer))
    return replace(trace, rows=tuple(rows)), counts


def thinned(trace: Trace, count: int, over_s: float, seed: int) -> tuple[Row, ...]:
    """`count` rows of the trace, its whole span replayed in `over_s`. Raises ValueError when it has fewer."""
    if count > len(trace.rows):
        raise ValueError(f"{count} requests of a trace that has {len(trace.rows)}")
    order = random.Random(seed).sample(trace.rows, len(trace.rows))
    squeeze = over_s / trace.span_s if trace.span_s else 0.0
    kept = sorted(order[:count], key=lambda row: row.at_s)
    return tuple(replace(row, at_s=row.at_s * squeeze) for row in kept)
