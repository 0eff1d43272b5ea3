"""A stream followed token by token, and what a disturbance did to it: lost, missing, repeated, different.

Owns one streamed answer as its client sees it (times of arrival, text, token ids of the last chunk) and the verdict
against the answer of an undisturbed run. Refuses to know faults and clusters.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any, Final

import aiohttp

_DATA: Final = b"data: "
_DONE: Final = b"[DONE]"


@dataclass(slots=True)
class Followed:
    """One streamed answer. `arrivals_s` are the times of pieces with text, monotonic seconds."""

    request_id: str
    sent_s: float = 0.0
    ended_s: float = 0.0
    arrivals_s: list[float] = field(default_factory=list)
    text: str = ""
    ids: tuple[int, ...] = ()
    own: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""

    @property
    def is_over(self) -> bool:
        return self.ended_s > 0

    def resumed_after_s(self, struck_s: float) -> float | None:
        """Seconds from `struck_s` to the end of the longest silence that ends after it; None: nothing came any more."""
        times = [self.sent_s, *self.arrivals_s]
        gaps = [(later - max(earlier, struck_s), later) for earlier, later in pairwise(times) if later > struck_s]
        return max(gaps)[1] - struck_s if gaps else None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one stream. `missing` and `repeated` count tokens against the reference."""

    is_lost: bool
    missing: int = 0
    repeated: int = 0
    is_different: bool = False

    @property
    def is_good(self) -> bool:
        return not (self.is_lost or self.missing or self.repeated or self.is_different)


def judge(followed: Followed, reference_ids: Sequence[int], reference_text: str) -> Verdict:
    """Token by token against the undisturbed run; text too, because it is what was really delivered on the way."""
    if followed.failure or not followed.is_over:
        return Verdict(is_lost=True)
    missing = repeated = 0
    for what, i, j, k, m in SequenceMatcher(None, reference_ids, followed.ids, autojunk=False).get_opcodes():
        if what in ("delete", "replace"):
            missing += j - i
        if what in ("insert", "replace"):
            repeated += m - k
    if len(reference_ids) == len(followed.ids):  # every index is there once: whatever differs is another token
        missing = repeated = 0
    is_different = tuple(reference_ids) != followed.ids or followed.text != reference_text
    return Verdict(is_lost=False, missing=missing, repeated=repeated, is_different=is_different)


async def follow(
    session: aiohttp.ClientSession, body: Mapping[str, Any], followed: Followed, on_text: Callable[[], None]
) -> None:
    """Send `body` as a streaming completion and read to the end. What goes wrong becomes `followed.failure`."""
    followed.sent_s = time.monotonic()
    is_done = False
    try:
        headers = {"x-request-id": followed.request_id}
        async with session.post("/v1/completions", json={**body, "stream": True}, headers=headers) as reply:
            if reply.status != 200:
                followed.failure = f"HTTP {reply.status}: {(await reply.text())[:200]}"
            async for line in reply.content:
                is_done = is_done or line.startswith(_DATA + _DONE)
                if line.startswith(_DATA) and not is_done:
                    _read(followed, json.loads(line.removeprefix(_DATA)))
                    on_text()
        if not is_done:
            followed.failure = followed.failure or "the stream ended without [DONE]"
    except (aiohttp.ClientError, TimeoutError, OSError, json.JSONDecodeError) as error:
        followed.failure = followed.failure or repr(error)
    except asyncio.CancelledError:
        followed.failure = followed.failure or "it did not end in time"
        raise
    finally:
        followed.ended_s = time.monotonic()
        on_text()


def _read(followed: Followed, data: Mapping[str, Any]) -> None:
    if "error" in data:
        followed.failure = f"error in the stream: {data['error'].get('message')}"
    text = "".join(choice.get("text", "") for choice in data.get("choices", []))
    if text:
        followed.arrivals_s.append(time.monotonic())
        followed.text += text
    if "timings" in data:
        followed.own = data["timings"]["edge_llm"]
        followed.ids = tuple(followed.own["token_ids"])
