"""Load on clusters of simulated workers: what a request to them is, and what its answer is as a line beside a record.

Owns requests for the simulated vocabulary (engine/simulated.py), how long their end is waited for, and the names of the
fields of a line. Refuses to know what is measured; when requests leave and how answers are read is bench/serve's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from edge_llm.bench.least_busy import LeastBusy
from edge_llm.bench.serve.answers import UNFINISHED, Answer, Call
from edge_llm.bench.serve.driver import circulate, replay, sending

# A request that has not ended after so long is hung up and counts as lost.
PATIENCE_S: Final = 120.0
# Requests that leave later than this share of what is judged (99 % of them) make it the generator's figure.
LATE_SHARE: Final = 0.1


def simulated_call(at_s: float, prompt_tokens: int, answer_tokens: int, number: int) -> Call:
    """A streamed request of so many tokens: a beginning, then one token a byte. No two numbers share a prefix, and
    nothing is kept of any."""
    text = f"{number} {'so it went on and on ' * (prompt_tokens // 20 + 1)}"[: max(1, prompt_tokens - 1)]
    body = {
        "prompt": text,
        "max_tokens": answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "cache_prompt": False,
    }
    return Call(at_s, body, answer_tokens, number=number, prompt_tokens=1 + len(text))


async def offer(
    url: str,
    calls: Sequence[Call],
    on_end: Callable[[Answer], None] = lambda _answer: None,
    began_s: float | None = None,
) -> list[Answer]:
    """Send each call when it is due, on a connection of its own, whatever became of those before; all answers.
    `on_end` hears of each that came to an end by itself. `began_s` (monotonic): when time 0 is."""

    def heard(answer: Answer) -> None:
        if answer.kind != UNFINISHED:
            on_end(answer)

    async with sending(is_kept=False) as session:
        return await replay(calls, session, LeastBusy([url]), None, on_end=heard, timeout_s=PATIENCE_S, began_s=began_s)


async def saturate(url: str, calls: Iterable[Call], clients: int, seconds: float) -> list[Answer]:
    """So many clients that ask again as soon as they have their answer (or soon after a refusal): a closed loop, which
    keeps a server full without drowning it."""
    async with sending(is_kept=False) as session:
        return await circulate(calls, clients, session, LeastBusy([url]), seconds, timeout_s=PATIENCE_S)


def took_s(answer: Answer) -> float:
    """Until it was over, one way or the other."""
    return 0.0 if answer.ended_s is None or answer.sent_s is None else answer.ended_s - answer.sent_s


def queue_s(answer: Answer) -> float | None:
    """What the server says of the time until the request was given to a worker."""
    waited_ms = answer.own.get("queue_ms")
    return None if waited_ms is None else float(waited_ms) / 1e3


def complaint(answer: Answer) -> str:
    """How it ended, for people."""
    return answer.error or f"it ended after {answer.tokens} of {answer.asked_tokens} tokens"


def line_of(answer: Answer) -> dict[str, Any]:
    """Times after the start of the load: `at_s` is when it was to leave. Refusals have a status and a code, failures
    what the server said last."""
    return {
        "at_s": round(answer.at_s, 6),
        "sent_s": _rounded(answer.sent_s),
        "first_s": _rounded(answer.first_s),
        "last_s": _rounded(answer.last_s),
        "ended_s": _rounded(answer.ended_s),
        "queue_s": queue_s(answer),
        "prompt_tokens_asked": answer.asked_prompt_tokens,
        "answer_tokens_asked": answer.asked_tokens,
        "answer_tokens": answer.tokens,
        "is_complete": answer.is_complete,
        "status": answer.status or 0,
        "code": answer.code,
        "error": "" if answer.is_complete else complaint(answer),
        "retry_after_s": answer.retry_after_s,
    }


def _rounded(at_s: float | None) -> float | None:
    return None if at_s is None else round(at_s, 6)
