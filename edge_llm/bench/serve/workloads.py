"""What is asked: how long prompts and answers are, and what they say where that is given. Pure.

Owns the named workloads, requests out of recorded traces and out of a file of one's own (JSON lines), and clipping to
a context, counted. Refuses to know servers, times of sending (but for recorded ones), and how lengths become prompts.

The named ones are shapes of ours for small boards, not anybody's standard: a short and a long side each way. Of a
trace, prompt and answer of a row stay together. Requests without text get random ones (prompts.py).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import msgspec

from edge_llm.bench.serve.lengths import LEAST, Lengths
from edge_llm.bench.traces import Row, Trace, scaled, thinned
from edge_llm.errors import EdgeLLMError

NAMED: Final[Mapping[str, tuple[Lengths, Lengths]]] = {
    "chat": (Lengths("lognormal", 160, 0.7), Lengths("lognormal", 120, 0.5)),
    "code": (Lengths("lognormal", 480, 0.6), Lengths("lognormal", 24, 0.6)),
    "summarization": (Lengths("lognormal", 1000, 0.3), Lengths("lognormal", 64, 0.3)),
    "generation": (Lengths("lognormal", 32, 0.4), Lengths("lognormal", 256, 0.3)),
}
# One position stays free: some servers end an answer when they have filled their context.
SPARE: Final = 1
# Lengths that are drawn before they come again.
_DRAWN: Final = 4096
# A context into which everything fits.
_NO_END: Final = 1 << 40


class BadWorkload(EdgeLLMError):
    """What was given as a workload is none."""

    code = "bad_workload"


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to ask. `at_s`: when it came in recorded traffic. What the prompt says is one of `text`, `ids` and
    `messages` (`prompt_tokens` is 0 then), or none of them: random ones, so many. `is_clipped`: it was longer."""

    number: int
    prompt_tokens: int
    answer_tokens: int
    at_s: float | None = None
    text: str | None = None
    ids: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    is_clipped: bool = False

    @property
    def is_random(self) -> bool:
        return self.text is None and self.ids is None and self.messages is None


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order. `facts` go into the record."""

    name: str
    requests: tuple[Request, ...]
    facts: Mapping[str, Any]

    @property
    def is_timed(self) -> bool:
        """Whether all have times of their own."""
        return self.requests[0].at_s is not None

    def stream(self, skip: int = 0) -> Iterator[Request]:
        """Without an end: after the last one their lengths (and what they say, if they do) come again, under numbers
        that go on. `skip`: how many were taken already."""
        for number in itertools.count(skip):
            yield replace(self.requests[number % len(self.requests)], number=number)


def drawn(name: str, prompt: Lengths, answer: Lengths, n_ctx: int, seed: int) -> Workload:
    """Of random lengths."""
    rng = random.Random(f"{seed}/lengths")
    pairs = [(prompt.draw(rng), answer.draw(rng)) for _ in range(_DRAWN)]
    fitted = [_fitted(*pair, n_ctx) for pair in pairs]
    requests = tuple(
        Request(number, *pair, is_clipped=pair != whole)
        for number, (pair, whole) in enumerate(zip(fitted, pairs, strict=True))
    )
    clipped = sum(request.is_clipped for request in requests)
    facts = {"prompt_tokens": str(prompt), "answer_tokens": str(answer), "n_ctx": n_ctx, "clipped": clipped}
    return Workload(name, requests, facts)


def _fitted(prompt: int, answer: int, n_ctx: int) -> tuple[int, int]:
    """Into a context, the answer at most half of it."""
    room = n_ctx - SPARE
    fitting = min(answer, max(LEAST, room // 2))
    return min(prompt, max(LEAST, room - fitting)), fitting


def of_trace(
    trace: Trace,
    scale: float,
    n_ctx: int,
    seed: int,
    count: int | None,
    seconds: float | None,
    rate_per_s: float | None,
) -> Workload:
    """Rows of recorded traffic with their times. Without a rate as they came, until `count` or `seconds` are over; with
    one, rows are left out at random and the trace's whole span is squeezed, so that its ups and downs stay."""
    rows, clipping = scaled(trace, scale, n_ctx - SPARE)
    facts: dict[str, Any] = {"trace": trace.name, "scale": scale, "n_ctx": n_ctx, "rows": len(rows.rows)}
    facts["clipping"] = {field: getattr(clipping, field) for field in clipping.__dataclass_fields__}
    if rate_per_s is None:
        kept = rows.rows if seconds is None else tuple(row for row in rows.rows if row.at_s < seconds)
        chosen = kept[:count]
        facts["times"] = "as recorded"
    else:
        wanted = count if count is not None else round(rate_per_s * (seconds or 0.0))
        wanted = min(wanted, round(rate_per_s * seconds)) if seconds is not None else wanted
        if not 0 < wanted <= len(rows.rows):
            raise BadWorkload(
                f"{rate_per_s:g} requests/s are {wanted} requests, and the trace {trace.name} has {len(rows.rows)}: "
                "choose another rate, duration or number"
            )
        chosen = thinned(rows, wanted, wanted / rate_per_s, seed)
        facts["times"] = f"thinned to {wanted} rows, the whole span in {wanted / rate_per_s:.1f} s"
    if not chosen:
        raise BadWorkload(f"no request of the trace {trace.name} falls into {seconds:g} s")
    whole = {row.number: row for row in scaled(trace, scale, _NO_END)[0].rows}
    requests = tuple(
        Request(
            row.number,
            row.prompt_tokens,
            row.answer_tokens,
            row.at_s,
            is_clipped=_lengths(row) != _lengths(whole[row.number]),
        )
        for row in chosen
    )
    return Workload(f"trace:{trace.name}", requests, facts)


def _lengths(row: Row) -> tuple[int, int]:
    return row.prompt_tokens, row.answer_tokens


def shuffled(workload: Workload, seed: int) -> Workload:
    """Without its times, in an order of chance: rows of a trace under other arrivals."""
    order = random.Random(f"{seed}/order").sample(workload.requests, len(workload.requests))
    return replace(workload, requests=tuple(replace(request, at_s=None) for request in order))


def squeezed(workload: Workload, rate_per_s: float) -> Workload:
    """Times of its own, all divided so that they come at this rate."""
    last_s = workload.requests[-1].at_s or 0.0
    factor = (len(workload.requests) - 1) / rate_per_s / last_s if last_s else 0.0
    requests = tuple(replace(request, at_s=factor * (request.at_s or 0.0)) for request in workload.requests)
    return replace(workload, requests=requests, facts={**workload.facts, "times": f"stretched by {factor:.4g}"})


# -- files


class _Message(msgspec.Struct, frozen=True):
    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: str


class _Line(msgspec.Struct, frozen=True):
    """A line of a file: `prompt` (text or token ids), or `messages`, or only `prompt_tokens`; how long the answer is
    (either name); `at_s`: when it came."""

    prompt: str | list[int] | None = None
    messages: list[_Message] | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    max_tokens: int | None = None
    at_s: float | None = None


def parse_file(text: str, name: str, answer: Lengths, n_ctx: int, seed: int) -> Workload:
    """One request a line. `answer`: of lines that do not say. Raises BadWorkload that names the line."""
    rng = random.Random(f"{seed}/lengths")
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    requests = [_request(line, f"{name}, line {number}", at, answer, rng) for at, (number, line) in enumerate(lines)]
    if not requests:
        raise BadWorkload(f"{name} has no requests")
    timed = [request.at_s for request in requests if request.at_s is not None]
    if timed and (len(timed) < len(requests) or timed != sorted(timed)):
        raise BadWorkload(f"{name}: either all lines have at_s, in order, or none")
    fitted = [_clipped(request, n_ctx) if request.is_random else request for request in requests]
    clipped = sum(one is not other for one, other in zip(fitted, requests, strict=True))
    return Workload(name, tuple(fitted), {"file": name, "requests": len(requests), "n_ctx": n_ctx, "clipped": clipped})


def _request(line: str, where: str, number: int, answer: Lengths, rng: random.Random) -> Request:
    try:
        found = msgspec.json.decode(line, type=_Line)
    except msgspec.MsgspecError as error:
        raise BadWorkload(f"{where}: {error}") from error
    given = [name for name in ("prompt", "messages", "prompt_tokens") if getattr(found, name) is not None]
    if len(given) != 1:
        raise BadWorkload(
            f"{where}: give one of prompt, messages and prompt_tokens, not {' and '.join(given) or 'none'}"
        )
    asked = found.answer_tokens or found.max_tokens or answer.draw(rng)
    if asked < 1 or (found.prompt_tokens is not None and found.prompt_tokens < 1):
        raise BadWorkload(f"{where}: numbers of tokens are 1 or more")
    return Request(
        number,
        found.prompt_tokens or 0,
        asked,
        found.at_s,
        text=found.prompt if isinstance(found.prompt, str) else None,
        ids=tuple(found.prompt) if isinstance(found.prompt, list) else None,
        messages=None
        if found.messages is None
        else tuple({"role": m.role, "content": m.content} for m in found.messages),
    )


def _clipped(request: Request, n_ctx: int) -> Request:
    prompt, answer = _fitted(request.prompt_tokens, request.answer_tokens, n_ctx)
    if (prompt, answer) == (request.prompt_tokens, request.answer_tokens):
        return request
    return replace(request, prompt_tokens=prompt, answer_tokens=answer, is_clipped=True)


def mean_tokens(requests: Sequence[Request]) -> tuple[float, float]:
    """Of prompts (those without content of their own) and of answers."""
    prompts = [request.prompt_tokens for request in requests if request.is_random]
    answers = [request.answer_tokens for request in requests]
    return sum(prompts) / max(1, len(prompts)), sum(answers) / max(1, len(answers))
