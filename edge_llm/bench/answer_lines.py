"""An answer of the open loop as the fields of a line beside a record (cases.py).

Owns their names: those of every bench that offers requests at their times. Refuses to know what they are for.
"""

from __future__ import annotations

from typing import Any

from edge_llm.bench.open_loop import Answer


def line_of(answer: Answer) -> dict[str, Any]:
    """Times after the start of the load: `at_s` is when it was to leave. Refusals have a status and a code, failures
    what the server said last."""
    sent_s = answer.call.due_s + answer.late_s
    first_s = None if answer.ttft_s is None else sent_s + answer.ttft_s
    return {
        "at_s": round(answer.call.due_s, 6),
        "sent_s": round(sent_s, 6),
        "first_s": None if first_s is None else round(first_s, 6),
        "ended_s": round(sent_s + answer.took_s, 6),
        "queue_s": answer.queue_s,
        "prompt_tokens_asked": len(answer.call.body["prompt"]),
        "answer_tokens_asked": answer.call.body["max_tokens"],
        "answer_tokens": answer.tokens,
        "is_complete": answer.is_whole,
        "status": answer.status,
        "code": answer.code,
        "error": "" if answer.is_whole else answer.complaint,
        "retry_after_s": answer.retry_after_s,
    }
