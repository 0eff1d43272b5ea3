"""How a gateway talks to one worker: signed calls with deadlines, errors as our own classes.

Owns the HTTP of the gateway-worker contract (worker/messages.py). Refuses to know planning, sessions and KV.
Every await has a deadline, redirects are not followed; a broken or silent connection is WorkerUnreachable, a reply that
does not follow the protocol RemoteProtocolError, an error the worker names becomes the class of that code.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Final

import aiohttp

from edge_llm.errors import (
    ContextTooLong,
    DeadlinePassed,
    Draining,
    EdgeLLMError,
    EngineFailed,
    IncompatibleKV,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    PrefillFailed,
    RemoteProtocolError,
    WorkerError,
    WorkerUnreachable,
)
from edge_llm.worker.messages import (
    HEARTBEAT_S,
    CancelReply,
    CancelRequest,
    DecodeReply,
    DecodeRequest,
    DrainRequest,
    ErrorReply,
    EventBatch,
    KeepReply,
    KeepRequest,
    Message,
    MessageType,
    Role,
    RoleRequest,
    TokenizeReply,
    TokenizeRequest,
    WorkerStatus,
    decode,
    encode,
)
from edge_llm.worker.tickets import (
    LIFETIME_S,
    PROOF_HEADER,
    Claims,
    KeyRing,
    Operation,
    authorization,
    body_digest,
)

CONNECT_S: Final = 3.0
CALL_S: Final = 30.0
STATUS_S: Final = 1.5
SILENCE_S: Final = 3 * HEARTBEAT_S
MAX_REPLY_BYTES: Final = 64 << 20
_ERRORS: Final[Mapping[str, type[EdgeLLMError]]] = {
    kind.code: kind
    for kind in (
        InvalidRequest,
        ContextTooLong,
        PayloadTooLarge,
        Overloaded,
        DeadlinePassed,
        Draining,
        EngineFailed,
        PrefillFailed,
        IncompatibleKV,
        WorkerError,
    )
}


@dataclass(frozen=True, slots=True)
class Peer:
    """A worker and where it is."""

    worker: str
    address: str


class WorkerClient:
    """Calls of one gateway. Share one per gateway; close with the session it was given."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        keys: KeyRing,
        gateway: str,
        clock: Callable[[], float],
        nonce: Callable[[], str],
    ) -> None:
        self._session, self._keys, self._gateway = session, keys, gateway
        self._clock, self._nonce = clock, nonce

    async def tokenize(self, peer: Peer, request: TokenizeRequest, trace: str = "") -> TokenizeReply:
        """`trace`: W3C traceparent of the request that this call is for, or empty."""
        return await self._post(peer, "tokenize", request, TokenizeReply, trace=trace)

    async def decode(self, peer: Peer, request: DecodeRequest, trace: str = "") -> DecodeReply:
        peers = {candidate.worker: candidate.address for candidate in request.candidates}
        return await self._post(peer, "decode", request, DecodeReply, request.request_id, peers, trace)

    async def cancel(self, peer: Peer, request: CancelRequest) -> CancelReply:
        return await self._post(peer, "cancel", request, CancelReply, request.request_id)

    async def keep(self, peer: Peer, request: KeepRequest) -> KeepReply:
        """Let a worker fetch and keep KV of a sequence that runs elsewhere."""
        peers = {request.source.worker: request.source.address}
        return await self._post(peer, "keep", request, KeepReply, request.request_id, peers)

    async def drain(self, peer: Peer, is_draining: bool) -> WorkerStatus:
        """Take a worker out, or in again; returns how it is then."""
        return await self._post(peer, "drain", DrainRequest(is_draining=is_draining), WorkerStatus)

    async def role(self, peer: Peer, role: Role) -> WorkerStatus:
        """Let a worker stand for another role."""
        return await self._post(peer, "role", RoleRequest(role=role), WorkerStatus)

    async def status(self, peer: Peer) -> WorkerStatus:
        """How it is. Raises RemoteProtocolError where the answer is not proven to come from a worker of this cluster:
        what is believed to be one gets prompts."""
        ticket = self._ticket(peer, "status", "", b"")
        async with (
            self._called(peer, STATUS_S),
            self._session.get(
                f"http://{peer.address}/status",
                headers=authorization(ticket),
                timeout=_timeout(STATUS_S),
                allow_redirects=False,
            ) as reply,
        ):
            body = await _body(peer, reply)
            if not self._keys.is_proven(reply.headers.get(PROOF_HEADER, ""), ticket, body):
                raise RemoteProtocolError(
                    f"what answers at {peer.address} as worker {peer.worker} does not prove that it has the cluster "
                    "key: another program, a forged worker, or one of an older version"
                )
            return decode(WorkerStatus, body)

    def prefill_ticket(
        self,
        peer: Peer,
        request_id: str,
        ids_sha256: str,
        tenant: str = "",
        holder: Peer | None = None,
        lifetime_s: float = LIFETIME_S,
    ) -> str:
        """The right to get one prompt's KV from `peer`; another worker carries it there, within `lifetime_s`. `holder`
        is where `peer` may fetch the beginning from."""
        claims = Claims(
            peer.worker,
            "prefill",
            request_id,
            self._clock(),
            self._nonce(),
            ids_sha256=ids_sha256,
            tenant=tenant,
            peers={holder.worker: holder.address} if holder is not None else {},
            lifetime_s=lifetime_s,
        )
        return self._keys.sign(claims)

    async def events(self, peer: Peer, on_open: Callable[[], None] = lambda: None) -> AsyncIterator[EventBatch]:
        """Batches until the connection ends; raises WorkerUnreachable on silence or loss. `on_open`: from now on what
        the worker says goes to this connection and to no older one."""
        ticket = self._ticket(peer, "events", "", b"")
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        url = f"http://{peer.address}/events?gateway={self._gateway}"
        async with (
            self._called(peer, None),
            self._session.get(
                url, headers=authorization(ticket), timeout=timeout, read_bufsize=1 << 20, allow_redirects=False
            ) as reply,
        ):
            if reply.status != 200:
                await _body(peer, reply)
            on_open()
            async for line in _lines(reply.content):
                yield decode(EventBatch, line)
        raise WorkerUnreachable(f"worker {peer.worker} closed its event stream")

    async def _post(
        self,
        peer: Peer,
        operation: Operation,
        request: Message,
        kind: type[MessageType],
        request_id: str = "",
        peers: Mapping[str, str] | None = None,
        trace: str = "",
    ) -> MessageType:
        body = encode(request)
        ticket = self._ticket(peer, operation, request_id, body, peers)
        async with (
            self._called(peer, CALL_S),
            self._session.post(
                f"http://{peer.address}/{operation}",
                data=body,
                headers=authorization(ticket) | ({"traceparent": trace} if trace else {}),
                timeout=_timeout(CALL_S),
                allow_redirects=False,
            ) as reply,
        ):
            return decode(kind, await _body(peer, reply))

    def _ticket(
        self, peer: Peer, operation: Operation, request_id: str, body: bytes, peers: Mapping[str, str] | None = None
    ) -> str:
        digest = body_digest(body) if body else ""
        claims = Claims(
            peer.worker,
            operation,
            request_id,
            self._clock(),
            self._nonce(),
            body_sha256=digest,
            peers=dict(peers or {}),
        )
        return self._keys.sign(claims)

    def _called(self, peer: Peer, deadline_s: float | None) -> _Called:
        return _Called(peer, deadline_s)


class _Called:
    """Deadline and error translation around one call."""

    def __init__(self, peer: Peer, deadline_s: float | None) -> None:
        self._peer = peer
        self._timeout = asyncio.timeout(deadline_s)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            await self._timeout.__aexit__(kind, error, None)
        except TimeoutError as late:
            raise WorkerUnreachable(
                f"worker {self._peer.worker} at {self._peer.address} did not answer in time"
            ) from late
        if isinstance(error, aiohttp.ClientError | TimeoutError | OSError):
            raise WorkerUnreachable(
                f"worker {self._peer.worker} at {self._peer.address}: {str(error) or type(error).__name__}"
            ) from error


def _timeout(total_s: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=total_s, sock_connect=CONNECT_S)


async def _body(peer: Peer, reply: aiohttp.ClientResponse) -> bytes:
    """The body of a good reply; an error reply is raised as the class it names."""
    data = await reply.content.read(MAX_REPLY_BYTES)
    while chunk := await reply.content.read(MAX_REPLY_BYTES - len(data)):
        data += chunk
        if len(data) >= MAX_REPLY_BYTES:
            raise RemoteProtocolError(f"worker {peer.worker} sent a reply of more than {MAX_REPLY_BYTES} bytes")
    if reply.status < 300:
        return data
    try:
        said = decode(ErrorReply, data)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(
            f"what answers at {peer.address} as worker {peer.worker}, with HTTP status {reply.status}, is no worker: "
            f"{error.message}"
        ) from error
    raise error_of(said, peer.worker)


def error_of(reply: ErrorReply, worker: str) -> EdgeLLMError:
    """Our own class for an error that a worker reported; unknown codes are worker failures."""
    kind = _ERRORS.get(reply.code, WorkerError)
    message = f"worker {worker}: {reply.message}" if issubclass(kind, WorkerError) else reply.message
    if kind is Overloaded:
        return Overloaded(message, retry_after_s=reply.retry_after_s or 1.0)
    return kind(message, param=reply.param)


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Whole lines of any length up to MAX_REPLY_BYTES, however they were cut."""
    pending = bytearray()
    async for data in content.iter_any():
        pending += data
        if len(pending) > MAX_REPLY_BYTES:
            raise RemoteProtocolError("an event line is too long")
        *whole, rest = bytes(pending).split(b"\n")
        pending = bytearray(rest)
        for line in whole:
            yield line
