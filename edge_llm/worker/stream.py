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
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._stall_s):
                await send(message)

        async with aclosing(self._source):
            try:
                await super().stream_response(send_in_time)
            except TimeoutError:
                log.warning("reader stalled, connection dropped", after_s=self._stall_s)
                raise
