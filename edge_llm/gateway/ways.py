"""Which workers cannot hear each other, though this gateway hears both.

Pure: time is an argument. Owns what is believed of ways between workers, from what decode workers report. Refuses to
know how fast they are (cluster/cost.py) and what is planned instead.

Why: a prefill worker that its decode worker does not reach looks idle and so the best of all, and every prompt planned
there costs the time until that is found, and is then read beside streams where nobody predicted it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from edge_llm.worker.messages import PromptReport

# For how long nothing is planned over a way on which nothing came, or nothing that its receiver could use.
APART_S: Final = 30.0
Way = tuple[str, str]
"""Prefill worker and decode worker."""


class Ways:
    """All ways of a gateway's workers."""

    def __init__(self) -> None:
        self._apart: dict[Way, float] = {}

    def reported(self, decode: str, report: PromptReport, now_s: float) -> None:
        """How a prompt came to `decode`. A prefill worker that refused at once does not count: why, its next status
        says."""
        for prefill in report.troubled:
            self._apart[prefill, decode] = now_s + APART_S

    def apart(self, now_s: float) -> Collection[Way]:
        """Those over which nothing came moments ago."""
        if self._apart:
            self._apart = {way: until_s for way, until_s in self._apart.items() if until_s > now_s}
        return self._apart.keys()
