"""One request's life in the gateway, as a state table, and the truth about what was delivered.

Pure: no I/O, no clock. Owns the states, the rule which token may be delivered next, and the epoch. Refuses to know
HTTP and workers' addresses.

Invariants: delivered tokens have indices 0, 1, 2, ... without gap or repetition; a token of an older epoch is dropped;
`REPLANNING` raises the epoch, so whatever the lost worker still says is old.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

from edge_llm.errors import LocalProtocolError, RemoteProtocolError
from edge_llm.request import FinishReason


class State(StrEnum):
    # strings hash in C, other members in Python, and every token looks its state up
    QUEUED = "queued"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    REPLANNING = "replanning"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Event(StrEnum):
    PLANNED = "planned"
    PROMPTED = "prompted"
    TOKEN = "token"
    FINISHED = "finished"
    WORKER_LOST = "worker_lost"
    GAVE_UP = "gave_up"
    CLIENT_GONE = "client_gone"


TRANSITIONS: Final[dict[State, dict[Event, State]]] = {
    State.QUEUED: {
        Event.PLANNED: State.PREFILLING,
        Event.GAVE_UP: State.FAILED,
        Event.CLIENT_GONE: State.CANCELLED,
    },
    State.PREFILLING: {
        Event.PROMPTED: State.DECODING,
        Event.WORKER_LOST: State.REPLANNING,
        Event.GAVE_UP: State.FAILED,
        Event.CLIENT_GONE: State.CANCELLED,
    },
    State.DECODING: {
        Event.TOKEN: State.DECODING,
        Event.FINISHED: State.DONE,
        Event.WORKER_LOST: State.REPLANNING,
        Event.GAVE_UP: State.FAILED,
        Event.CLIENT_GONE: State.CANCELLED,
    },
    State.REPLANNING: {
        Event.PLANNED: State.PREFILLING,
        Event.GAVE_UP: State.FAILED,
        Event.CLIENT_GONE: State.CANCELLED,
    },
    State.DONE: {},
    State.FAILED: {},
    State.CANCELLED: {},
}
# A worker has the request, and a slot for it.
HELD: Final = frozenset({State.PREFILLING, State.DECODING})
FINAL: Final = frozenset(state for state, edges in TRANSITIONS.items() if not edges)


class MadeToken(Protocol):
    """A token as its worker tells it."""

    @property
    def epoch(self) -> int: ...

    @property
    def index(self) -> int: ...

    @property
    def token_id(self) -> int: ...

    @property
    def finish_reason(self) -> FinishReason | None: ...


def _nobody(_change: int) -> None:
    """Nobody wants to know."""


@dataclass(slots=True)
class Session:
    """State and delivered tokens of one request. `on_held` hears 1 when a worker has it from now on, else -1."""

    request_id: str
    state: State = State.QUEUED
    epoch: int = 0
    delivered: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    lost: list[str] = field(default_factory=list)
    on_held: Callable[[int], None] = _nobody

    @property
    def is_over(self) -> bool:
        return self.state in FINAL

    @property
    def is_with_worker(self) -> bool:
        return self.state in HELD

    def on(self, event: Event) -> None:
        """Take an edge of the table. Raises LocalProtocolError when there is none: a bug of ours."""
        target = TRANSITIONS[self.state].get(event)
        if target is None:
            raise LocalProtocolError(f"request {self.request_id}: {event.value} in state {self.state.value}")
        if target is State.REPLANNING:
            self.epoch += 1
        if target is self.state:
            return
        was_held, self.state = self.is_with_worker, target
        if self.is_with_worker != was_held:
            self.on_held(-1 if was_held else 1)

    def is_current(self, epoch: int) -> bool:
        """Whether what a worker says in `epoch` counts: some worker has this request now, in that epoch."""
        return epoch == self.epoch and self.is_with_worker

    def deliver(self, token: MadeToken) -> bool:
        """Accept the next token; False for one of an old epoch or after the end.

        Raises RemoteProtocolError when the worker skipped or repeated an index, or did not report the prompt first;
        then nothing was delivered.
        """
        if not self.is_current(token.epoch):
            return False
        if self.state is not State.DECODING:
            raise RemoteProtocolError(f"request {self.request_id}: token {token.index} before its prompt was done")
        if token.index != len(self.delivered):
            raise RemoteProtocolError(
                f"request {self.request_id}: token {token.index} after {len(self.delivered)} tokens"
            )
        self.delivered.append(token.token_id)
        if token.finish_reason is None:
            self.on(Event.TOKEN)
        else:
            self.finish_reason = token.finish_reason
            self.on(Event.FINISHED)
        return True
