"""Responses that stream: they end when their reader is gone or stuck, and close their source at once.

Owns one thing Starlette leaves to the garbage collector: the source of a response that was cut short is closed before
the response returns, so that "the receiver hung up" reaches the engine within one micro-batch. Refuses to know what
is streamed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

import structlog
from fastapi.responses import StreamingResponse
from starlette.types import Message, Send

# Longer than any pause of a healthy receiver (it reserves memory before it asks); shorter than TCP's own minutes.
SEND_STALL_S: Final = 30.0
log = structlog.get_logger()


class ClosingStream(StreamingResponse):
    """Streams an async generator; a reader that takes nothing for `stall_s` loses its connection. One part is held here
    and one connection's send buffer below: what the source may run ahead is the source's to bound."""

    def __init__(
        self, source: AsyncGenerator[bytes | memoryview, None], media_type: str, stall_s: float = SEND_STALL_S
    ) -> None:
        super().__init__(source, media_type=media_type)
        self._source, self._stall_s = source, stall_s

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._source):
            try:
                async with asyncio.timeout(None) as deadline:
                    watch = _Watch(deadline, self._stall_s)
                    try:
                        await super().stream_response(watch.watched(send))
                    finally:
                        watch.end()
            except TimeoutError:
                log.warning("reader stalled, connection dropped", after_s=self._stall_s)
                raise


class _Watch:
    """Ends a stream when one of its sends does not come back. One timer looks at all of them: one for each would cost
    more than the sends."""

    def __init__(self, deadline: asyncio.Timeout, stall_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._deadline, self._stall_s = deadline, stall_s
        self._sending_since_s: float | None = None
        self._timer = self._loop.call_later(stall_s, self._look)

    def watched(self, send: Send) -> Send:
        async def watched_send(message: Message) -> None:
            self._sending_since_s = self._loop.time()
            await send(message)
            self._sending_since_s = None

        return watched_send

    def end(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        now_s = self._loop.time()
        since_s = now_s if self._sending_since_s is None else self._sending_since_s
        left_s = since_s + self._stall_s - now_s
        if left_s <= 0:
            self._deadline.reschedule(now_s)
        else:
            self._timer = self._loop.call_later(left_s, self._look)
