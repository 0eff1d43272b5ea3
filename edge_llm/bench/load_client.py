"""A client cheap enough to hold a thousand streams on part of one core: it counts events and hardly looks at them.

Owns raw HTTP/1.1 connections, one per stream. Of each piece it looks for the marks that it counts by; only the last
event is parsed. Refuses to know what is measured.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from edge_llm.bench.raw_http import DONE, EMPTY_TEXT, TAIL_BYTES, TEXT, generated_tokens, request_bytes


class LoadStream(asyncio.Protocol):
    """One streamed answer: how many pieces of text came, when the first did, and how it ended.

    `on_change` is called at the first text and at the end. A piece is one event with text, so one token unless its
    text was withheld.
    """

    def __init__(self, request: bytes, on_change: Callable[[LoadStream], None]) -> None:
        self._request, self._on_change = request, on_change
        self.pieces = 0
        self.sent_s = self.first_s = self.ended_s = 0.0
        self._tail = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by name
        self.sent_s = time.monotonic()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        found = data.count(TEXT) - data.count(EMPTY_TEXT)
        if found:
            self.pieces += found
            if not self.first_s:
                self.first_s = time.monotonic()
                self._on_change(self)
        self._tail = data if len(data) > TAIL_BYTES else (self._tail + data)[-TAIL_BYTES:]
        if DONE in data and not self.ended_s:
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended_s:
            self._end()

    def _end(self) -> None:
        self.ended_s = time.monotonic()
        self._on_change(self)
        self.hang_up()

    def hang_up(self) -> None:
        if self._transport is not None:
            self._transport.close()

    @property
    def tokens(self) -> int:
        return generated_tokens(self._tail)

    @property
    def complaint(self) -> str:
        """The end of what came, for people."""
        return self._tail[-200:].decode(errors="replace").strip()


class LoadClient:
    """Many streams against one server."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self.streams: list[LoadStream] = []
        self._changed = asyncio.Event()

    async def start(self, bodies: Sequence[Mapping[str, Any]], per_s: float) -> None:
        """Begin one stream per body, so many a second."""
        loop = asyncio.get_running_loop()
        began_s = time.monotonic()
        for number, body in enumerate(bodies):
            await asyncio.sleep(max(0.0, began_s + number / per_s - time.monotonic()))
            stream = LoadStream(request_bytes(self._host, self._port, body), lambda _stream: self._changed.set())
            self.streams.append(stream)
            await loop.create_connection(lambda stream=stream: stream, self._host, self._port)  # type: ignore[misc]

    async def until(self, condition: Callable[[LoadStream], bool], within_s: float) -> bool:
        """Wait until all streams fulfil `condition`; False: they did not in time."""
        try:
            async with asyncio.timeout(within_s):
                while not all(condition(stream) for stream in self.streams):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    @property
    def pieces(self) -> int:
        return sum(stream.pieces for stream in self.streams)

    def hang_up(self) -> None:
        for stream in self.streams:
            stream.hang_up()
