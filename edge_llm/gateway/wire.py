"""HTTP/1.1 as strangers may send it: the head of a request is bounded in bytes and in time.

uvicorn takes a head of any size and waits for it for ever, and as many requests one behind the other as come; a few
thousand would take all memory and file descriptors. Owns that, and what still comes of a body that was answered
already: it is taken for a while, because a connection that is closed on a client that sends is reset, and the answer
that says why is lost with it. And the short way out for what is streamed. Bodies are read by edge.py. Refuses to know
routes.

Invariant: a connection on which nobody is answered has a timer that ends it.
"""

from __future__ import annotations

import asyncio
import re
import weakref
from socket import IPPROTO_TCP, SO_SNDBUF, SOL_SOCKET, TCP_USER_TIMEOUT, socket
from typing import Any, ClassVar, Final

import orjson
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from edge_llm.errors import BodyTooSlow, EdgeLLMError, HeadTooLarge, InvalidRequest
from edge_llm.gateway.edge import SECURITY
from edge_llm.gateway.shape import error_body

# The kernel lets a send buffer grow to megabytes; an answer of a few thousand tokens would vanish in it unread.
SEND_BUFFER_BYTES: Final = 64 << 10
# Of a body whose answer is sent: so much is still taken.
DISCARD_BYTES: Final = 256 << 20
DISCARD_S: Final = 30.0
# Requests that a client may send before the one before is answered.
MAX_PIPELINED: Final = 32
_OUTLET: Final = "outlet"
# httptools takes a request that offers another protocol for one without a body, and what follows it for no HTTP; Java's
# own client offers HTTP/2 with every first request. An offer may be passed over (RFC 9110, 7.8).
_OFFER: Final = re.compile(rb"(\A|\r\n)upgrade:", re.IGNORECASE)
_PASSED_OVER: Final = rb"\1x-offer:"


class Outlet:
    """The way of a part of a streamed body to its connection in the same turn of the loop. What goes through ASGI waits
    for its task's turn and then passes every layer around the app: more than half of what a token costs."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = weakref.ref(cycle)  # which holds the scope that holds this

    @property
    def is_free(self) -> bool:
        """Whether a body in chunks (RFC 9112, 7.1) has begun and goes on, and all of it so far is with the kernel."""
        cycle = self._cycle()
        return (
            cycle is not None
            and cycle.chunked_encoding is True
            and not cycle.response_complete
            and not cycle.disconnected
            and not cycle.transport.is_closing()
            and not cycle.transport.get_write_buffer_size()
        )

    def write(self, part: bytes) -> None:
        """The next part, which is not empty, while `is_free`."""
        if (cycle := self._cycle()) is not None:
            cycle.transport.write(b"%x\r\n%b\r\n" % (len(part), part))


def outlet_of(scope: Scope) -> Outlet | None:
    """The request's, if it came over such a connection."""
    outlet: Outlet | None = scope.get("state", {}).get(_OUTLET)
    return outlet


class _Lingering:
    """A transport as an answer sees it that may be over before its request is: closing it waits for the rest."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        self._protocol = protocol

    def close(self) -> None:
        self._protocol.close_after_body()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._protocol.transport, name)


class BoundedProtocol(HttpToolsProtocol):
    """One connection. `_awaits_head` while the next request's head is not whole, `_is_in_head` from its first byte on,
    `_is_in_body` while the latest one's body is not; `_discards_to` is where what comes of it after its answer ends, in
    bytes of this connection, and `_closes_then` whether the connection ends with it. `_parsed_bytes` of the latest head
    have been read, and `_held_bytes` came since the parser gave something out: it holds a line until it is whole.
    `_answered` is the request that is being answered, or was last."""

    max_head_bytes: ClassVar[int]
    head_s: ClassVar[float]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._awaits_head, self._held_bytes, self._parsed_bytes = True, 0, 0
        self._is_in_head = self._is_in_body = self._closes_then = False
        self._answered: RequestResponseCycle | None = None
        self._received = self._discards_to = 0
        self._error: EdgeLLMError = InvalidRequest("what came is not HTTP/1.1")
        self._timer: asyncio.TimerHandle | None = self.loop.call_later(self.head_s, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)
        if self._answered is not None and not self._answered.response_complete:  # uvicorn tells the latest one alone
            self._answered.disconnected = True
            self._answered.message_event.set()

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        if self._awaits_head and self._timer is None:
            self._timer = self.loop.call_later(self.head_s, self._too_slow)
        if not self._is_in_body:
            data = _without_offers(data)
        self._held_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._is_in_head and not self._held_bytes:
            self._held_bytes = len(data) - data.rfind(b"\n") - 1  # of a line that is not whole
        if self._discards_to and self._received > self._discards_to:
            self.transport.close()
        elif self._held_bytes > self.max_head_bytes:
            self._refuse(self._too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head, self._parsed_bytes, self._held_bytes = True, 0, 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._awaits_head, self._is_in_head, self._is_in_body, self._held_bytes = False, False, True, 0
        self._stop_timer()
        self._unset_keepalive_if_required()  # of an answer before it in the same read
        if self.transport.is_closing():  # nobody would get its answer
            raise self._error
        if self.parser.should_upgrade():
            self._error = InvalidRequest("only HTTP/1.1 is spoken here: send the request without CONNECT or Upgrade")
            raise self._error
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            raise self._error
        if self.cycle is not None and self.cycle.scope is self.scope:  # it begins in the loop's next turn
            self.scope["state"][_OUTLET] = Outlet(self.cycle)
            self.cycle.transport = _Lingering(self)  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        self._held_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_body, self._held_bytes = False, 0
        if self.cycle is not None:
            self.cycle.transport = self.transport
        if self._discards_to:
            self._discards_to = 0
            self._stop_timer()
            self._awaits_head = True
            if self._closes_then:
                self.transport.close()
                return
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if not self._is_in_body:
            self._awaits_head = not self.pipeline
        elif self.cycle.response_complete and not self.transport.is_closing():  # else it is the next request's body
            self._discard()
        super().on_response_complete()
        if self.pipeline and not self.transport.is_closing():  # who sent ahead waits for these
            self.flow.pause_reading()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def close_after_body(self) -> None:
        """The latest answer is the last one of this connection: to be closed when its client has sent the rest, unless
        the answer broke off."""
        if self._is_in_body and self.cycle.response_complete:
            self._closes_then = True
            self._discard()
        else:
            self.transport.close()

    def _discard(self) -> None:
        if not self._discards_to:
            self._discards_to = self._received + DISCARD_BYTES
            self._stop_timer()
            self._timer = self.loop.call_later(DISCARD_S, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        """What the parser, or we in its callbacks, did not accept."""
        self._refuse(self._error)

    def _count(self, size: int) -> None:
        self._parsed_bytes, self._held_bytes = self._parsed_bytes + size, 0
        if self._parsed_bytes > self.max_head_bytes:
            self._error = self._too_large()
            raise self._error

    def _too_large(self) -> HeadTooLarge:
        return HeadTooLarge(f"request line and headers are larger than {self.max_head_bytes} bytes")

    def _too_slow(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self._held_bytes or self._parsed_bytes:
            self._refuse(BodyTooSlow(f"the request's head did not come within {self.head_s:.0f} s"))
        else:
            self.transport.close()

    def _refuse(self, error: EdgeLLMError) -> None:
        """Say what is wrong and close: only close, where that would stand in the middle of an answer or behind one that
        its client has."""
        if self.transport.is_closing():
            return
        if self._discards_to or self.pipeline or (self.cycle is not None and _is_under_way(self.cycle)):
            self.transport.close()
            return
        body = orjson.dumps(error_body(error))
        headers = {**SECURITY, "content-type": "application/json", "content-length": str(len(body))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(STATUS_LINE[error.status] + lines.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _is_under_way(cycle: RequestResponseCycle) -> bool:
    return cycle.response_started and not cycle.response_complete


def _without_offers(data: bytes) -> bytes:
    """Bytes that begin in a head, with offers of another protocol in that head renamed; as many bytes as before."""
    head, end, rest = data.partition(b"\r\n\r\n")
    return _OFFER.sub(_PASSED_OVER, head) + end + rest if b"pgrade" in head.lower() else data


def bounded(max_head_bytes: int, head_s: float) -> type[BoundedProtocol]:
    """The protocol with these bounds, as uvicorn wants it: a class."""
    return type("Bounded", (BoundedProtocol,), {"max_head_bytes": max_head_bytes, "head_s": head_s})


def bound_connections(listening: socket, stall_s: float) -> None:
    """What connections accepted here inherit: a small send buffer, and an end when the peer takes nothing of it."""
    listening.setsockopt(SOL_SOCKET, SO_SNDBUF, SEND_BUFFER_BYTES)
    listening.setsockopt(IPPROTO_TCP, TCP_USER_TIMEOUT, round(1e3 * stall_s))
