"""A TCP proxy that disturbs: it stands before every worker, passes bytes on, and breaks what a rule says.

Owns the connections that gateway and decode workers make to workers, and what was seen on them: of HTTP it reads the
first line of a request and the request's id in its body, so that a fault can be shown to have met a certain request.
Refuses to know what is tested and what an answer should be. Loopback only.

A worker that is gone looks half alive behind it: the port answers and resets. That is harsher than a refused port.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Literal, Self

LOOPBACK: Final = "127.0.0.1"
_READ_BYTES: Final = 16 << 10
_HEAD_BYTES: Final = 4 << 10
_PIECE_BYTES: Final = 1 << 10
_REQUEST_LINE: Final = re.compile(rb"(?:GET|POST) /(\w+)[ ?]")
_REQUEST_ID: Final = re.compile(rb'"request_id":"([^"]{1,128})"')
_END_OF_CHUNKED: Final = b"0\r\n\r\n"
_RESET: Final = struct.pack("ii", 1, 0)
Direction = Literal["request", "reply"]
Action = Literal["reset", "close", "flip", "swallow", "slow"]


@dataclass(slots=True)
class Exchange:
    """One HTTP request to a worker and its reply, as bytes that passed. Times are monotonic seconds."""

    worker: str
    route: str
    started_s: float
    head: bytes = b""
    request_bytes: int = 0
    reply_bytes: int = 0
    is_whole: bool = False

    @property
    def request_id(self) -> str:
        found = _REQUEST_ID.search(self.head)
        return found.group(1).decode() if found else ""


@dataclass(slots=True)
class Rule:
    """What happens to bytes in one direction, from byte `after_bytes` of an exchange on. None or empty: any.

    reset, close, flip: once. swallow and slow: until the rule is lifted; connections that lost bytes are reset then.
    `touched` are the ids of the requests it met, `touched_bytes` how much.
    """

    action: Action
    direction: Direction = "reply"
    worker: str | None = None
    route: str | None = None
    request: str = ""
    after_bytes: int = 0
    bytes_per_s: float = 0.0
    delay_s: float = 0.0
    touched: list[str] = field(default_factory=list)
    touched_bytes: int = 0
    first_touch_s: float | None = None

    def matches(self, exchange: Exchange, direction: Direction) -> bool:
        return (
            direction == self.direction
            and self.worker in (None, exchange.worker)
            and self.route in (None, exchange.route)
            and exchange.request_id.startswith(self.request)
            and not (self.touched and self.action in ("reset", "close", "flip"))
        )

    def touch(self, exchange: Exchange, size: int) -> None:
        if self.first_touch_s is None:
            self.first_touch_s = time.monotonic()
            self.worker = exchange.worker  # it breaks at one place, not at every worker that is asked next
        if exchange.request_id not in self.touched:
            self.touched.append(exchange.request_id)
        self.touched_bytes += size


class _Closed(Exception):
    """A rule ended the connection in good order."""


class _Broken(Exception):
    """A rule ended the connection by a reset."""


class FaultProxy:
    """Fronts of all workers of a cluster. Use as an async context; `rules` may change at any time.

    `on_pass` is called after every piece of data, so that others can look at `exchanges` again.
    """

    def __init__(self, seed: int, on_pass: Callable[[], None] = lambda: None) -> None:
        self._rng, self._on_pass = random.Random(seed), on_pass
        self.rules: list[Rule] = []
        self.exchanges: list[Exchange] = []
        self._targets: dict[str, int] = {}
        self._diverted: dict[tuple[str, str], int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._links: set[_Link] = set()
        self._starting: list[asyncio.Task[asyncio.Server]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        for starting in self._starting:
            (await starting).close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def front(self, worker: str, port: int) -> str:
        """The address that clients of `worker`, which listens on `port`, are to be told. Inside a running loop."""
        bound = socket.socket()
        bound.bind((LOOPBACK, 0))
        bound.listen()
        self._targets[worker] = port
        serving = asyncio.start_server(lambda reader, writer: self._accept(worker, reader, writer), sock=bound)
        self._starting.append(asyncio.create_task(serving, name=f"front of {worker}"))
        return f"{LOOPBACK}:{bound.getsockname()[1]}"

    def divert(self, route: str, ports: Mapping[str, int]) -> None:
        """Connections that begin with a request to `route` reach these ports, by worker; none: the workers again.

        Connections of that route that are there are ended in good order: clients keep them for their next request.
        """
        self._diverted = {(worker, route): port for worker, port in ports.items()}
        for link in self._links:
            if link.route == route:
                link.close()

    def lift(self, rule: Rule) -> None:
        """The rule no longer holds. Connections that lost bytes cannot go on: they are reset."""
        self.rules.remove(rule)
        for link in self._links:
            if link.deaf:
                link.reset()

    def of(self, request: str, route: str, since_s: float = 0.0) -> list[Exchange]:
        """Exchanges of requests whose id starts with `request`, oldest first."""
        return [
            exchange
            for exchange in self.exchanges
            if exchange.route == route and exchange.started_s >= since_s and exchange.request_id.startswith(request)
        ]

    def forget(self) -> None:
        """Drop what was seen."""
        self.exchanges.clear()

    # -- one connection

    async def _accept(self, worker: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # cancelled only when the proxy ends; asyncio's own callback would take that for an error
        with suppress(asyncio.CancelledError):
            await self._connect(worker, reader, writer)

    async def _connect(self, worker: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection to its end. What its first request is decides where it leads."""
        try:
            first = await reader.read(_READ_BYTES)
            port = self._diverted.get((worker, _route(first)), self._targets[worker])
            there, out = await asyncio.open_connection(LOOPBACK, port)
        except OSError:
            _reset(writer)
            return
        link = _Link(self, worker, writer, out)
        self._links.add(link)
        pumps = [
            asyncio.create_task(link.pump("request", reader, out, first)),
            asyncio.create_task(link.pump("reply", there, writer)),
        ]
        is_reset = True
        try:
            done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_EXCEPTION)
            errors = [error for task in done if (error := task.exception()) is not None]
            is_reset = any(not isinstance(error, _Closed) for error in errors)
        finally:
            self._links.discard(link)
            for pump in pumps:
                pump.cancel()
            for end in (writer, out):
                if is_reset:
                    _reset(end)
                else:
                    end.close()

    async def disturb(self, link: _Link, exchange: Exchange, direction: Direction, at: int, data: bytes) -> bytes:
        """What is left of `data`, which begins at byte `at` of the exchange's direction. Raises _Broken, _Closed."""
        for rule in [rule for rule in self.rules if rule.matches(exchange, direction)]:
            inside = max(0, rule.after_bytes - at)
            if inside >= len(data):
                continue
            rule.touch(exchange, len(data) - inside)
            if rule.action in ("reset", "close"):
                await link.cut(direction, data[:inside], is_reset=rule.action == "reset")
            elif rule.action == "flip":
                data = data[:inside] + bytes([data[inside] ^ 1 << self._rng.randrange(8)]) + data[inside + 1 :]
            elif rule.action == "swallow":
                link.deaf.add(direction)
                data = data[:inside]
            elif rule.delay_s:
                await asyncio.sleep(self._rng.uniform(0.5, 1.5) * rule.delay_s)
            else:
                await link.trickle(direction, data, rule)
                data = b""
        return data

    def seen(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)

    def passed(self) -> None:
        self._on_pass()


class _Link:
    """A pair of connections: of whoever called, and to the worker."""

    def __init__(
        self, proxy: FaultProxy, worker: str, caller: asyncio.StreamWriter, callee: asyncio.StreamWriter
    ) -> None:
        self._proxy, self._worker = proxy, worker
        self._writers: dict[Direction, asyncio.StreamWriter] = {"request": callee, "reply": caller}
        self._exchange = Exchange(worker, "", time.monotonic())
        self.deaf: set[Direction] = set()
        self._over = asyncio.Event()

    @property
    def route(self) -> str:
        return self._exchange.route

    async def pump(
        self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes = b""
    ) -> None:
        """Pass `first`, then what comes, until the end of one direction."""
        while data := first or await reader.read(_READ_BYTES):
            first = b""
            exchange, at = self._note(direction, data)
            if direction not in self.deaf:
                data = await self._proxy.disturb(self, exchange, direction, at, data)
                if data and not writer.is_closing():
                    writer.write(data)
                    await writer.drain()
            self._proxy.passed()
        if direction in self.deaf:
            await self._over.wait()  # an end does not pass where bytes do not
            return
        with suppress(OSError):
            writer.write_eof()

    def _note(self, direction: Direction, data: bytes) -> tuple[Exchange, int]:
        """The exchange that `data` belongs to, and where in it."""
        if direction == "request":
            if route := _route(data):
                self._exchange = Exchange(self._worker, route, time.monotonic())
                self._proxy.seen(self._exchange)
            exchange, at = self._exchange, self._exchange.request_bytes
            exchange.head += data[: max(0, _HEAD_BYTES - len(exchange.head))]
            exchange.request_bytes += len(data)
        else:
            exchange, at = self._exchange, self._exchange.reply_bytes
            exchange.reply_bytes += len(data)
            exchange.is_whole = data.endswith(_END_OF_CHUNKED)
        return exchange, at

    async def cut(self, direction: Direction, last: bytes, *, is_reset: bool) -> None:
        """End the connection in the middle, by a reset or in good order."""
        writer = self._writers[direction]
        writer.write(last)
        with suppress(OSError):
            await writer.drain()
        raise _Broken if is_reset else _Closed

    def close(self) -> None:
        """End both connections in good order."""
        for writer in self._writers.values():
            writer.close()

    def reset(self) -> None:
        """End both connections now."""
        self._over.set()
        for writer in self._writers.values():
            _reset(writer)

    async def trickle(self, direction: Direction, data: bytes, rule: Rule) -> None:
        """Pass `data` on at the rule's rate, as long as the rule is there."""
        writer = self._writers[direction]
        for at in range(0, len(data), _PIECE_BYTES):
            piece = data[at : at + _PIECE_BYTES]
            writer.write(piece)
            await writer.drain()
            if rule in self._proxy.rules:
                await asyncio.sleep(len(piece) / rule.bytes_per_s)


def _route(data: bytes) -> str:
    """Where a request goes that begins with these bytes; empty: it does not begin here."""
    line = _REQUEST_LINE.match(data)
    return line.group(1).decode() if line else ""


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close so that the other end gets a TCP reset."""
    plain = writer.get_extra_info("socket")
    with suppress(OSError):
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
