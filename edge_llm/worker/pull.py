"""Fetching KV from a prefill worker: HTTP bytes in, checked frames out.

Owns the connection to the prefill worker, its deadlines, and the order of checks (kv-handoff rule: length, MAC,
layout, bounds, identity; only then does anything native happen, elsewhere). Refuses to know slots and engines.
A stalled sender is a failed one: prefill workers send something every two seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Final

import aiohttp

from edge_llm.errors import RemoteProtocolError, Unauthorized, WorkerUnreachable
from edge_llm.kv.frames import NEED_DATA, Event, FrameDecoder, Header
from edge_llm.worker.client import CONNECT_S, error_of
from edge_llm.worker.messages import ErrorReply, PrefillCandidate, PrefillRequest, decode, encode
from edge_llm.worker.tickets import authorization

STALL_S: Final = 10.0
MAX_ERROR_BYTES: Final = 64 << 10
# Checking a MAC over this many bytes takes about a millisecond: more is done off the event loop.
_BIG_BUFFER: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Expected:
    """What the receiver's own model and request say the frames must be."""

    kv_bytes_per_token: int
    n_tokens: int
    start: int
    ids_sha256: str


def check_address(address: str, networks: tuple[str, ...]) -> None:
    """Raises Unauthorized unless `address` (ip:port) lies in one of `networks`."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        ip = ip_address(host)
    except ValueError as error:
        raise Unauthorized(f"peer address {address} is not an IP address") from error
    if not any(ip in ip_network(network) for network in networks):
        raise Unauthorized(f"peer address {address} is outside the allowed networks")


async def pull(
    session: aiohttp.ClientSession, candidate: PrefillCandidate, request: PrefillRequest, key: bytes, expected: Expected
) -> AsyncIterator[Event]:
    """Events of one transfer, up to and including End or Error.

    Raises WorkerUnreachable (no connection, stalled, broken) or RemoteProtocolError; never anything else.
    """
    decoder = FrameDecoder(key, expected.kv_bytes_per_token, expected.n_tokens)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=STALL_S)
    where = f"prefill worker {candidate.worker} at {candidate.address}"
    try:
        async with session.post(
            f"http://{candidate.address}/prefill",
            data=encode(request),
            headers=authorization(candidate.ticket),
            timeout=timeout,
            read_bufsize=1 << 20,
        ) as reply:
            if reply.status != 200:
                raise error_of(decode(ErrorReply, await reply.content.read(MAX_ERROR_BYTES)), candidate.worker)
            async for event in _events(reply.content, decoder):
                _check(event, expected)
                yield event
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise WorkerUnreachable(f"{where}: {error or type(error).__name__}") from error
    decoder.eof()


async def _events(content: aiohttp.StreamReader, decoder: FrameDecoder) -> AsyncIterator[Event]:
    async for data in content.iter_any():
        decoder.feed(data)
        while True:
            is_big = decoder.ready_bytes > _BIG_BUFFER
            event = await asyncio.to_thread(decoder.next_event) if is_big else decoder.next_event()
            if event is NEED_DATA:
                break
            yield event
        if decoder.is_done:
            return


def _check(event: Event, expected: Expected) -> None:
    if isinstance(event, Header) and (event.n_tokens, event.start, event.ids_sha256) != (
        expected.n_tokens,
        expected.start,
        expected.ids_sha256,
    ):
        raise RemoteProtocolError("the KV offered belongs to another prompt or position")
