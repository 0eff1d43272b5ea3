"""Fetching KV from a prefill worker: HTTP bytes in, checked frames out.

Owns the connection to the prefill worker, its deadlines, and the order of checks (kv-handoff rule: length, MAC,
layout, bounds, identity; only then does anything native happen, elsewhere). Refuses to know slots and engines.

A sender that is silent for STALL_S is a failed one: prefill workers send something every two seconds. So is one that
talks but gets nowhere for ADVANCE_S. Redirects are not followed: the address came out of a signed ticket.
Memory: the socket's buffer (about 2 MiB) and one frame; what is not read stops the sender.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Final

import aiohttp

from edge_llm.errors import RemoteProtocolError, Unauthorized, WorkerUnreachable
from edge_llm.kv.frames import NEED_DATA, Chunk, Event, FrameDecoder, Header, Progress
from edge_llm.worker.client import CONNECT_S, error_of
from edge_llm.worker.messages import ErrorReply, PrefillCandidate, PrefillRequest, decode, encode
from edge_llm.worker.tickets import authorization

STALL_S: Final = 10.0
# A prompt may stand behind another one on a slow board: 4,096 tokens at 40 tokens/s are 102 s.
ADVANCE_S: Final = 120.0
MAX_ERROR_BYTES: Final = 64 << 10
_READ_BYTES: Final = 1 << 20
# Checking a MAC over this many bytes takes about a millisecond: more is done off the event loop.
BIG_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Expected:
    """What the receiver's own model and request say the frames must be."""

    kv_bytes_per_token: int
    n_tokens: int
    start: int
    ids_sha256: str


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

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    async def __aenter__(self) -> Puller:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=STALL_S)
        # no decompression: a few bytes of a hostile sender must not become many
        self._session = aiohttp.ClientSession(timeout=timeout, auto_decompress=False, read_bufsize=_READ_BYTES)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def pull(
        self, candidate: PrefillCandidate, request: PrefillRequest, key: bytes, expected: Expected
    ) -> AsyncGenerator[Event, None]:
        """Events of one transfer, up to and including End or Error. Close it when you stop early.

        Raises WorkerUnreachable (no connection, stalled, broken), RemoteProtocolError, or the error P answered with.
        """
        decoder = FrameDecoder(key, expected.kv_bytes_per_token, expected.n_tokens)
        where = f"prefill worker {candidate.worker} at {candidate.address}"
        try:
            async with self._session.post(
                f"http://{candidate.address}/prefill",
                data=encode(request),
                headers=authorization(candidate.ticket),
                allow_redirects=False,
            ) as reply:
                if reply.status != 200:
                    raise error_of(decode(ErrorReply, await _short_body(reply)), candidate.worker)
                reached, advanced_s = -1, self._clock()
                async for event in _events(reply.content, decoder):
                    _check(event, expected)
                    position = _position(event)
                    if position > reached:
                        reached, advanced_s = position, self._clock()
                    elif self._clock() - advanced_s > ADVANCE_S:
                        raise WorkerUnreachable(f"{where} got nowhere for {ADVANCE_S:.0f} s")
                    yield event
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise WorkerUnreachable(f"{where}: {error or type(error).__name__}") from error
        decoder.eof()


async def _events(content: aiohttp.StreamReader, decoder: FrameDecoder) -> AsyncGenerator[Event, None]:
    async for data in content.iter_any():
        decoder.feed(data)
        while True:
            is_big = decoder.ready_bytes > BIG_BYTES
            event = await asyncio.to_thread(decoder.next_event) if is_big else decoder.next_event()
            if event is NEED_DATA:
                break
            yield event
        if decoder.is_done:
            return


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


def _position(event: Event) -> int:
    """How far the sender is, by what this event says; -1 says nothing about it."""
    match event:
        case Chunk():
            return event.p1
        case Progress():
            return event.done
        case _:
            return -1
