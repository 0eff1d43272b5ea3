"""What a worker has to say to its gateways: one line per gateway and step, over one connection each.

Owns batching, the connections' bounded buffers and the leases. Refuses to know sequences and engines. A gateway that
is not connected loses nothing for `lease_s`: its lines wait. After that it is gone, and `expired` names it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final

from edge_llm.errors import EdgeLLMError, Overloaded
from edge_llm.request import Generation, TokenEvent
from edge_llm.worker.messages import EventBatch, Failed, Progress, Prompted, PromptReport, Token, encode

HEARTBEAT_S: Final = 2.0
MAX_LINES: Final = 10_000


@dataclass(slots=True)
class _Outbox:
    lines: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    tokens: list[Token] = field(default_factory=list)
    prompted: list[Prompted] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    connections: int = 0
    seen_s: float = 0.0

    def flush(self) -> None:
        if self.tokens or self.prompted or self.progress or self.failed:
            batch = EventBatch(tokens=self.tokens, prompted=self.prompted, progress=self.progress, failed=self.failed)
            self.lines.put_nowait(encode(batch) + b"\n")
            self.tokens, self.prompted, self.progress, self.failed = [], [], [], []


class Outboxes:
    """One outbox per gateway that this worker has met."""

    def __init__(self, clock: Callable[[], float], lease_s: float) -> None:
        self._clock, self._lease_s = clock, lease_s
        self._boxes: dict[str, _Outbox] = {}

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

    async def stream(self, gateway: str) -> AsyncIterator[bytes]:
        """Lines for one connection of `gateway`, with heartbeats; a newer connection takes over the rest."""
        box = self._box(gateway)
        box.connections += 1
        mine = box.connections
        try:
            while box.connections == mine:
                box.seen_s = self._clock()
                box.flush()
                yield await self._line(box)
        finally:
            box.seen_s = self._clock()
            if box.connections == mine:
                box.connections = 0

    async def _line(self, box: _Outbox) -> bytes:
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                line = await box.lines.get()
        except TimeoutError:
            return encode(EventBatch()) + b"\n"
        while not box.lines.empty() and len(line) < 1 << 16:
            line += box.lines.get_nowait()
        return line

    def expired(self) -> list[str]:
        """Gateways that are gone: not connected for a lease, or not reading. They are forgotten."""
        now_s = self._clock()
        gone = [
            gateway
            for gateway, box in self._boxes.items()
            if (not box.connections and now_s - box.seen_s > self._lease_s) or box.lines.qsize() > MAX_LINES
        ]
        for gateway in gone:
            del self._boxes[gateway]
        return gone

    def _box(self, gateway: str) -> _Outbox:
        if gateway not in self._boxes:
            if len(self._boxes) >= 64:
                raise Overloaded("too many gateways talk to this worker")
            self._boxes[gateway] = _Outbox(seen_s=self._clock())
        return self._boxes[gateway]
