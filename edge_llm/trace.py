"""The trace that a task works for: W3C Trace Context, `traceparent` of version 00 (www.w3.org/TR/trace-context).

Owns which headers are believed, and that whatever a task logs, and whomever it calls, is told the same trace: it is
kept in the context of the task's log lines, which tasks that it begins inherit. Refuses to know HTTP and what is done.
"""

from __future__ import annotations

import re
from typing import Final

import structlog

HEADER: Final = "traceparent"
# ids of zeros mean none
_WELL_FORMED: Final = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def believed(header: str) -> str:
    """The header as it came, or nothing if it is not well formed."""
    return header if _WELL_FORMED.fullmatch(header) else ""


def follow(header: str) -> None:
    """This task, and those that it begins, work for this trace, if it is one, and for no earlier one."""
    if trace := believed(header):
        structlog.contextvars.bind_contextvars(**{HEADER: trace})
    else:
        structlog.contextvars.unbind_contextvars(HEADER)


def headers() -> dict[str, str]:
    """What a call of this task carries."""
    trace = structlog.contextvars.get_contextvars().get(HEADER)
    return {HEADER: trace} if trace else {}
