"""Requests as lines of finished cases tell them: when each was sent, read, answered and over. Pure.

Owns the names that benches give to these times (`sent_s`, `first_s`, `last_s`, or durations from the sending) and what
follows from them. Refuses to know drawings. A line that is no request, or one whose times make no sense, is None: a
record may come from anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

# In order of time; `handoff_ms` is the last chunk and adopting in one.
STAGES: Final[Mapping[str, str]] = {
    "queue_ms": "queue",
    "wait_ms": "wait",
    "prefill_ms": "prefill",
    "last_chunk_ms": "last KV chunk",
    "handoff_ms": "hand-off",
    "adopt_ms": "adopt KV",
    "first_decode_ms": "first decode",
}
Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """Times in seconds after the start of its load. `stages_ms`: as our gateway reported them, empty of others."""

    case: str
    number: int
    sent_s: float
    first_s: float | None
    last_s: float | None
    ended_s: float | None
    prompt_tokens: float | None
    tokens: float | None
    arrivals_s: tuple[float, ...] = ()
    stages_ms: Mapping[str, float] = field(default_factory=dict)
    is_complete: bool = True

    def metrics(self) -> dict[str, list[float]]:
        """What a whole answer adds to each distribution of latency."""
        if not self.is_complete or self.first_s is None:
            return {}
        found = {"ttft_s": [self.first_s - self.sent_s]}
        if self.last_s is not None:
            found["e2e_s"] = [self.last_s - self.sent_s]
            if self.tokens is not None and self.tokens > 1:
                found["tpot_s"] = [(self.last_s - self.first_s) / (self.tokens - 1)]
        if len(self.arrivals_s) > 1:
            found["itl_s"] = [later - earlier for earlier, later in pairwise(self.arrivals_s)]
        return found


def requests_of(lines: Sequence[Line]) -> list[Request]:
    return [found for number, line in enumerate(lines, 1) if (found := request_of(line, number)) is not None]


def request_of(line: Line, number: int) -> Request | None:
    sent = _first(line, "sent_s", "at_s")
    if sent is None:
        return None
    own = line["own"] if isinstance(line.get("own"), Mapping) else line
    complete = line.get("is_complete")
    request = Request(
        case=re.sub(r", pass \d+$", "", str(line.get("case", ""))),
        number=number if (own_number := _first(line, "number")) is None else int(own_number),
        sent_s=sent,
        first_s=_first(line, "first_s") if "first_s" in line else _after(sent, line, "ttft_s"),
        last_s=_first(line, "last_s") if "last_s" in line else _after(sent, line, "e2e_s"),
        ended_s=_first(line, "ended_s"),
        prompt_tokens=_first(line, "prompt_tokens", "prompt_tokens_asked"),
        tokens=_first(line, "answer_tokens", "tokens"),
        arrivals_s=_all(line.get("arrivals_s")),
        stages_ms={name: value for name in STAGES if (value := _first(own, name)) is not None},
        is_complete=complete if isinstance(complete, bool) else True,
    )
    times = [at for at in (request.sent_s, request.first_s, request.last_s, request.ended_s) if at is not None]
    return request if all(earlier <= later for earlier, later in pairwise(times)) else None


def _after(sent: float, line: Line, name: str) -> float | None:
    length = _first(line, name)
    return None if length is None else sent + length


def _first(line: Line, *names: str) -> float | None:
    return next((number for name in names if (number := _number(line.get(name))) is not None), None)


def _all(values: Any) -> tuple[float, ...]:
    """Empty when one of them is no number."""
    numbers = [_number(value) for value in values] if isinstance(values, list) else []
    return tuple(number for number in numbers if number is not None) if None not in numbers else ()


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
