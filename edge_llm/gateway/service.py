"""How fast this cluster serves, learnt from the requests it has served; and what that means for who comes now.

Pure: time is an argument. Owns one estimate per model and the arithmetic of predicted waiting. Refuses to know nodes:
what a request took (prompt, hand-off, decode, somebody else's prompt in between) is in its duration.

A request's size is what it takes: its prompt and the answer as long as it becomes (of one that waits: as it is expected
to become), however long it might have been. Requests that end give tokens per second of one that runs; as many run at
once, as many times that is the speed at which a full cluster takes new work from the queue (Little's law). Both sums
forget: the last few dozen requests count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

# Weight of the past when a request ends: 1/32 is forgotten, so about the last 32 requests make the estimate.
_KEEP: Final = 31 / 32
# Below this many requests an estimate would be that of one unusual request.
_ENOUGH: Final = 4
# A client is never told to stay away for longer: estimates of a fuller past grow old.
MAX_RETRY_S: Final = 120.0
UNKNOWN_RETRY_S: Final = 5.0


@dataclass(slots=True)
class _Pace:
    """Decayed sums over requests that ended, and since when those run that do."""

    tokens: float = 0.0
    seconds: float = 0.0
    ended: int = 0
    running: dict[str, float] = field(default_factory=dict)


class Service:
    """What each model's workers were measured to do."""

    def __init__(self) -> None:
        self._paces: dict[str, _Pace] = {}

    def began(self, model: str, request_id: str, now_s: float) -> None:
        """A request was given to a worker. A request that was taken from a lost worker keeps its beginning."""
        self._paces.setdefault(model, _Pace()).running.setdefault(request_id, now_s)

    def ended(self, model: str, request_id: str, now_s: float, tokens: int | None) -> None:
        """It needs no worker any more, and was worth so many tokens of prompt and answer. None: nothing is learnt of
        it, as of a failure, which may be over at once."""
        pace = self._paces.get(model)
        since_s = pace.running.pop(request_id, None) if pace else None
        if pace is None or since_s is None or tokens is None:
            return
        pace.tokens = _KEEP * pace.tokens + tokens
        pace.seconds = _KEEP * pace.seconds + max(0.0, now_s - since_s)
        pace.ended += 1

    def running(self, model: str) -> int:
        pace = self._paces.get(model)
        return len(pace.running) if pace else 0

    def tokens_per_s(self, model: str, free_slots: int = 0) -> float | None:
        """Tokens a second that leave the queue while it is not empty and `free_slots` are taken, too; None before
        enough was measured."""
        pace = self._paces.get(model)
        if pace is None or pace.ended < _ENOUGH or pace.seconds <= 0:
            return None
        return max(1, len(pace.running) + free_slots) * pace.tokens / pace.seconds

    def wait_s(self, model: str, tokens_ahead: int, free_slots: int = 0) -> float | None:
        """Predicted time until `tokens_ahead` have left the queue; None when nothing is known yet."""
        rate = self.tokens_per_s(model, free_slots)
        return None if rate is None else tokens_ahead / rate

    def retry_after_s(self, model: str, wait_s: float | None, bound_s: float) -> float:
        """When to come back: once as much has drained as is too much now, at least until the next request ends."""
        pace, rate = self._paces.get(model), self.tokens_per_s(model)
        if pace is None or rate is None:
            return max(UNKNOWN_RETRY_S, min(MAX_RETRY_S, math.ceil((wait_s or 0.0) - bound_s)))
        # both sums are decayed alike: their mean request is that of as many as the weights add up to
        requests = (1 - _KEEP**pace.ended) / (1 - _KEEP)
        next_end_s = pace.tokens / requests / rate
        return min(MAX_RETRY_S, max(1.0, math.ceil(max((wait_s or 0.0) - bound_s, next_end_s))))


def tokens_ahead(costs: Mapping[str, int], work: Mapping[str, int], key: str, cost: int) -> int:
    """The work that goes before a new request of `key` in a deficit round robin: its key's own, and of every other key
    the share that costs no more than that with the request itself. By key, what waits has `costs` in turns and is
    `work` that is expected."""
    turns = costs.get(key, 0) + cost
    others = (min(1.0, turns / costs[name]) * tokens for name, tokens in work.items() if name != key)
    return work.get(key, 0) + round(sum(others))
