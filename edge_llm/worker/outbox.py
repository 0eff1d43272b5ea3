"""What a worker has to say to its gateways: one line per gateway and step, over one connection each.

Owns batching, the bounded queues and the leases. Refuses to know sequences and engines.

A gateway that is not connected, or does not read, finds its lines waiting for `lease_s`; after that it is gone and
`expired` names it. A newer connection of the same gateway takes over, the older one ends. Lines already given to a
connection that then breaks are lost: tokens carry their index, so the gateway sees the gap and replans.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Final

from edge_llm.errors import EdgeLLMError, Overloaded
from edge_llm.request import Generation, TokenEvent
from edge_llm.worker.messages import (
    HEARTBEAT_S,
    EventBatch,
    Failed,
    Progress,
    Prompted,
    PromptReport,
    Token,
    encode,
)

MAX_GATEWAYS: Final = 64
# A gateway that leaves this much unread will not catch up: at 64 streams it is about a minute of tokens.
MAX_QUEUED_BYTES: Final = 8 << 20
_WRITE_BYTES: Final = 64 << 10
_HEARTBEAT: Final = encode(EventBatch()) + b"\n"


@dataclass(slots=True)
class _Outbox:
    seen_s: float
    connection: int = 0
    queued_bytes: int = 0
    lines: deque[bytes] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    tokens: list[Token] = field(default_factory=list)
    prompted: list[Prompted] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)

    def flush(self) -> None:
        if self.tokens or self.prompted or self.progress or self.failed:
            batch = EventBatch(tokens=self.tokens, prompted=self.prompted, progress=self.progress, failed=self.failed)
            self.tokens, self.prompted, self.progress, self.failed = [], [], [], []
            line = encode(batch) + b"\n"
            self.lines.append(line)
            self.queued_bytes += len(line)
            self.changed.set()

    def take(self) -> bytes:
        """Waiting lines for one write, oldest first; empty when there are none."""
        taken: list[bytes] = []
        size = 0
        while self.lines and size < _WRITE_BYTES:
            taken.append(self.lines.popleft())
            size += len(taken[-1])
        self.queued_bytes -= size
        return b"".join(taken)


class Outboxes:
    """One outbox per gateway that this worker has met. `on_prompted` hears of every prompt that became whole."""

    def __init__(
        self, clock: Callable[[], float], lease_s: float, on_prompted: Callable[[PromptReport], None] = lambda _: None
    ) -> None:
        self._clock, self._lease_s, self._on_prompted = clock, lease_s, on_prompted
        self._boxes: dict[str, _Outbox] = {}
        self._is_closed = False

    def open(self, gateway: str) -> None:
        """Begin (or keep) a gateway's lease. Raises Overloaded when too many gateways talk to this worker."""
        if gateway not in self._boxes and len(self._boxes) >= MAX_GATEWAYS:
            raise Overloaded(f"{MAX_GATEWAYS} gateways talk to this worker already", retry_after_s=self._lease_s)
        self._box(gateway)

    def add_token(self, gateway: str, event: TokenEvent) -> None:
        self._box(gateway).tokens.append(
            Token(
                request_id=event.request_id,
                epoch=event.epoch,
                index=event.index,
                token_id=event.token_id,
                text=event.text,
                finish_reason=event.finish_reason,
            )
        )

    def add_progress(self, gateway: str, generation: Generation, done: int, total: int) -> None:
        message = Progress(request_id=generation.request_id, epoch=generation.epoch, done=done, total=total)
        self._box(gateway).progress.append(message)

    def add_prompted(self, gateway: str, generation: Generation, report: PromptReport) -> None:
        message = Prompted(request_id=generation.request_id, epoch=generation.epoch, report=report)
        self._box(gateway).prompted.append(message)
        self._on_prompted(report)

    def add_failed(self, gateway: str, generation: Generation, error: EdgeLLMError) -> None:
        self._box(gateway).failed.append(
            Failed(
                request_id=generation.request_id,
                epoch=generation.epoch,
                code=error.code,
                message=error.message,
                status=error.status,
                is_retryable=error.is_retryable,
            )
        )

    def flush(self) -> None:
        """One line per gateway with everything added since the last flush."""
        for box in self._boxes.values():
            box.flush()

    async def stream(self, gateway: str) -> AsyncGenerator[bytes | memoryview, None]:
        """Lines for one connection of `gateway`, with heartbeats. Call `open` first."""
        box = self._box(gateway)
        box.connection += 1
        mine = box.connection
        box.changed.set()  # an older connection wakes, sees that it is not the newest, and ends
        while box.connection == mine:
            # reached again only when the last write left this process: a gateway that does not read gets old
            box.seen_s = self._clock()
            if lines := box.take():
                yield lines
                continue
            if self._is_closed:
                return
            box.changed.clear()
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await box.changed.wait()
            except TimeoutError:
                yield _HEARTBEAT

    def expired(self) -> list[str]:
        """Gateways that are gone: neither connected nor reading for a lease, or too far behind. They are forgotten."""
        now_s = self._clock()
        gone = [
            gateway
            for gateway, box in self._boxes.items()
            if now_s - box.seen_s > self._lease_s or box.queued_bytes > MAX_QUEUED_BYTES
        ]
        for gateway in gone:
            self._end(self._boxes.pop(gateway))
        return gone

    def close(self) -> None:
        """Every connection gets what is queued and ends."""
        self._is_closed = True
        self.flush()
        for box in self._boxes.values():
            box.changed.set()

    def _end(self, box: _Outbox) -> None:
        box.connection = 0
        box.changed.set()

    def _box(self, gateway: str) -> _Outbox:
        box = self._boxes.get(gateway)
        if box is None:
            box = self._boxes[gateway] = _Outbox(self._clock())
        return box
