"""Fetching KV from a prefill worker: HTTP bytes in, checked frames out.

Owns the connection to the prefill worker, its deadlines, and the order of checks (kv-handoff rule: length, MAC,
layout, bounds, identity; only then does anything native happen, elsewhere). Refuses to know slots and engines.

A sender that is silent for `stall_s` is a failed one: prefill workers send something every two seconds. So is one that
talks but gets nowhere for `advance_s` (or the candidate's own `patience_s`, when that is longer), whatever it sends:
headers, an error, parts of a frame, frames. Redirects are not followed: the address came out of a signed ticket.
Memory: the socket's buffer (about 2 MiB) and one frame; what is not read stops the sender.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Final

import aiohttp

from edge_llm import trace
from edge_llm.errors import RemoteProtocolError, Unauthorized, WorkerSilent, WorkerUnreachable
from edge_llm.kv.frames import Chunk, Event, FrameDecoder, Header, NeedData, Progress
from edge_llm.kv.payload import check_finite
from edge_llm.kv.snapshot import Geometry
from edge_llm.worker.client import CONNECT_S, SILENCE_S, error_of
from edge_llm.worker.links import Links, Meter
from edge_llm.worker.messages import ADVANCE_S, ErrorReply, PrefillCandidate, PrefillRequest, decode, encode
from edge_llm.worker.offload import off_loop
from edge_llm.worker.tickets import authorization

MAX_ERROR_BYTES: Final = 64 << 10
_READ_BYTES: Final = 1 << 18
_CHUNKS_IN_ONE: Final = 4


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a sender may say nothing, and how long it may talk without getting further."""

    stall_s: float = SILENCE_S
    advance_s: float = ADVANCE_S


PATIENCE: Final = Patience()


@dataclass(frozen=True, slots=True)
class Expected:
    """What the receiver's own model and request say the frames must be. `chunk_tokens`: its own; senders may be set to
    a few times as much. `geometry`: to look into what comes; None where nobody keeps it."""

    kv_bytes_per_token: int
    chunk_tokens: int
    n_tokens: int
    start: int
    ids_sha256: str
    geometry: Geometry | None = None


def check_address(address: str, networks: tuple[str, ...]) -> None:
    """Raises Unauthorized unless `address` (ip:port) lies in one of `networks`."""
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        ip = ip_address(host)
    except ValueError as error:
        raise Unauthorized(f"peer address {address} is not an IP address and a port") from error
    if not any(ip in ip_network(network) for network in networks):
        raise Unauthorized(f"peer address {address} is outside the allowed networks (setting allowed_peers)")


class Puller:
    """Pulls KV over one set of connections; use it as an async context."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        patience: Patience = PATIENCE,
        links: Links | None = None,
    ) -> None:
        self._clock, self._patience, self._links = clock, patience, links or Links()

    async def __aenter__(self) -> Puller:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=self._patience.stall_s)
        # no decompression: a few bytes of a hostile sender must not become many
        self._session = aiohttp.ClientSession(timeout=timeout, auto_decompress=False, read_bufsize=_READ_BYTES)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def pull(
        self, candidate: PrefillCandidate, request: PrefillRequest, key: bytes, expected: Expected
    ) -> AsyncGenerator[Event, None]:
        """Events of one transfer, up to and including End or Error. Close it when you stop early.

        Raises WorkerSilent (stalled), WorkerUnreachable (no connection, broken), RemoteProtocolError, or the error P
        answered with.
        """
        longest = min(expected.n_tokens, _CHUNKS_IN_ONE * expected.chunk_tokens)
        decoder = FrameDecoder(key, expected.kv_bytes_per_token, expected.n_tokens, longest)
        where = f"prefill worker {candidate.worker} at {candidate.address}"
        headway = _Headway(self._clock, max(self._patience.advance_s, candidate.patience_s), where)
        meter = self._links.meter(candidate.worker, self._clock)
        try:
            async with headway.limit():
                reply = await self._session.post(
                    f"http://{candidate.address}/prefill",
                    data=encode(request),
                    headers=authorization(candidate.ticket) | trace.headers(),
                    allow_redirects=False,
                )
            meter.answered()
            async with reply:
                if reply.status != 200:
                    async with headway.limit():
                        body = await _short_body(reply)
                    raise error_of(decode(ErrorReply, body), candidate.worker)
                async for event in _events(reply.content, decoder, expected.geometry, headway, meter):
                    _check(event, expected)
                    headway.note(_position(event))
                    yield event
                    del event
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            kind = WorkerSilent if isinstance(error, TimeoutError) else WorkerUnreachable
            raise kind(f"{where}: {str(error) or type(error).__name__}") from error
        decoder.eof()


class _Headway:
    """How far a sender is, and how long it may take for the next step."""

    def __init__(self, clock: Callable[[], float], advance_s: float, where: str) -> None:
        self._clock, self._advance_s, self._where = clock, advance_s, where
        self._reached, self._since_s = -1, clock()

    def note(self, position: int) -> None:
        if position > self._reached:
            self._reached, self._since_s = position, self._clock()

    @asynccontextmanager
    async def limit(self) -> AsyncIterator[None]:
        """Bounds one wait by what is left. Raises WorkerSilent."""
        left_s = self._since_s + self._advance_s - self._clock()
        nowhere = WorkerSilent(f"{self._where} got nowhere for {self._advance_s:.0f} s")
        if left_s <= 0:
            raise nowhere
        deadline = asyncio.timeout(left_s)
        try:
            async with deadline:
                yield
        except TimeoutError as late:
            if not deadline.expired():
                raise  # the socket's own: silence
            raise nowhere from late


async def _events(
    content: aiohttp.StreamReader, decoder: FrameDecoder, geometry: Geometry | None, headway: _Headway, meter: Meter
) -> AsyncGenerator[Event, None]:
    def next_event() -> Event | NeedData:
        event = decoder.next_event()
        if isinstance(event, Chunk) and geometry is not None:
            check_finite(geometry, event.payload)
        return event

    while not decoder.is_done:
        async with headway.limit():
            data = await content.readany()
        meter.came(len(data))
        if not data:
            return
        decoder.feed(data)
        while True:
            event = await off_loop(decoder.ready_bytes, next_event)
            if isinstance(event, NeedData):
                break
            yield event
            del event  # a chunk that was put away must not stay beside the next one


async def _short_body(reply: aiohttp.ClientResponse) -> bytes:
    data = b""
    while len(data) < MAX_ERROR_BYTES and (part := await reply.content.read(MAX_ERROR_BYTES - len(data))):
        data += part
    return data


def _check(event: Event, expected: Expected) -> None:
    if isinstance(event, Header) and (event.n_tokens, event.start, event.ids_sha256) != (
        expected.n_tokens,
        expected.start,
        expected.ids_sha256,
    ):
        raise RemoteProtocolError("the KV offered belongs to another prompt or position")
    if isinstance(event, Progress) and event.total != expected.n_tokens:
        raise RemoteProtocolError(f"progress of {event.total} positions where {expected.n_tokens} were asked for")


def _position(event: Event) -> int:
    """How far the sender is, by what this event says; -1 says nothing about it."""
    match event:
        case Chunk():
            return event.p1
        case Progress():
            return event.done
        case _:
            return -1
