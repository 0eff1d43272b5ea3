"""One request while this gateway runs it: what is to be generated, what became of it so far, what its client hears.

Owns the record that dispatch.py, listen.py and the HTTP side share. Refuses to know who decides and who sends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from edge_llm.cluster.slo import NO_LIMITS, Slo
from edge_llm.cluster.view import Node
from edge_llm.errors import EdgeLLMError
from edge_llm.gateway import queue
from edge_llm.gateway.scheduler import Plan
from edge_llm.gateway.session import Session
from edge_llm.gateway.situation import Mode
from edge_llm.kv.snapshot import Level
from edge_llm.request import FinishReason, SamplingParams
from edge_llm.worker.messages import PromptReport

_UPDATE_BYTES: Final = 128


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be generated, in token ids."""

    request_id: str
    model: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    mode: Mode
    cache_prompt: bool = True
    key: str = ""
    """Id of the API key; only for fairness and logs."""
    tenant: str = ""
    """Whose kept KV may be used."""
    deadline_s: float | None = None
    """On the gateway's clock: what is not done by then is dropped."""
    trace: str = ""
    """W3C traceparent of the request, or empty."""
    held_bytes: int = 0
    """Memory it takes while it waits."""
    slo: Slo = NO_LIMITS
    """Its limits of latency, for who plans."""


@dataclass(frozen=True, slots=True)
class Text:
    """Text that became certain; may be empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Progress:
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The last update of a request."""

    reason: FinishReason | None
    error: EdgeLLMError | None = None


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing happened for a while."""


Update = Text | Progress | Finish | Silence


@dataclass(slots=True)
class Running:
    """One request and its clock readings (monotonic seconds).

    `is_as_promised` ends for good when KV of another class came in, or the answer went on where it may come out
    otherwise. `holder` is a draining worker that holds the KV of all tokens so far for whoever goes on with them.
    `report` is what the present decode worker said of how it came by its KV, `reading` how the prompt came to be read:
    a decode worker that takes KV over from `holder` has not read anything. `made_by` is the worker that gave the latest
    token: a plan after it may have made none. `sending` is the call that hands it to its
    worker, while that is waited for: a timeout and not a task, which would wait for its turn. `checkpoint_tokens`: how
    long the answer was when its last checkpoint was begun. `at_once` passes text on in the turn of the loop in which it
    came, if it can; it is asked while its stream waits (`is_awaited`) with nothing before it, so that order is kept.
    """

    job: Job
    session: Session
    waits_since_s: float
    arrived_s: float
    updates: asyncio.Queue[Update] = field(default_factory=asyncio.Queue)
    unread_bytes: int = 0
    at_once: Callable[[str], bool] | None = None
    is_awaited: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    sending: asyncio.Timeout | None = None
    place: queue.Place | None = None
    plan: Plan | None = None
    holder: Node | None = None
    made_by: Node | None = None
    failures: int = 0
    sent_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    prompted_s: float = 0.0
    report: PromptReport | None = None
    reading: PromptReport | None = None
    notes: list[str] = field(default_factory=list)
    is_as_promised: bool = True
    checkpoint_tokens: int = 0

    def turn_ends(self) -> None:
        """Its worker has nothing more to do with it, whatever it still replies to being handed the request."""
        self.ended.set()
        if self.sending is not None:
            self.sending.reschedule(asyncio.get_running_loop().time())
            self.sending = None

    def tell(self, update: Update) -> None:
        """Something for the client to hear, when it has taken what came before."""
        self.unread_bytes += _size(update)
        self.updates.put_nowait(update)

    def say(self, text: str) -> None:
        """More of the answer, for its client: at once where that is possible."""
        if self.is_awaited and self.at_once is not None and self.updates.empty() and self.at_once(text):
            return
        self.tell(Text(text))

    async def heard(self) -> Update:
        """The next thing to hear."""
        self.is_awaited = True
        try:
            update = await self.updates.get()
        finally:
            self.is_awaited = False
        self.unread_bytes -= _size(update)
        return update

    def prompted(self, report: PromptReport) -> bool:
        """Its decode worker has all KV before the next token. Whether the prompt was read for that, not only moved."""
        is_moved = (
            self.holder is not None
            and self.reading is not None
            and (report.mode, report.prefill_worker) == ("split", self.holder.worker)
        )
        self.report, self.holder = report, None
        self.is_as_promised &= report.is_same_class
        if not is_moved:
            self.reading = report
        return not is_moved

    @property
    def level(self) -> Level:
        """What may be promised of the whole answer."""
        if self.plan is None:
            return "unverified"
        return self.plan.decode.status.level if self.is_as_promised else "none"


def _size(update: Update) -> int:
    """About what an update takes: an object, a place in the queue, and its text."""
    return _UPDATE_BYTES + (len(update.text) if isinstance(update, Text) else 0)
