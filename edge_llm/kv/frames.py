"""KV on the wire, without sockets: events to bytes and bytes to events, every frame authenticated.

Pure (h11's shape): `FrameEncoder` turns events into buffers, `FrameDecoder.feed` takes bytes as the network cuts
them and `next_event` gives events or NEED_DATA. Owns framing, order, limits and authenticity. Refuses to know
sockets, llama.cpp's bytes and what to do about an error.

A frame is: preamble (magic, wire version, kind, body length, sequence number), body, HMAC-SHA256 of preamble and
body under the transfer's own key. The sequence number is inside the MAC, so frames cannot be dropped, repeated or
reordered; the key belongs to one transfer, so they cannot be spliced in from another one.

Order of checks for received bytes: length cap, MAC, fixed-layout parse, bounds, state table. After any error the
decoder is dead. Nothing of a body is interpreted before its MAC is right.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum, IntEnum
from typing import Any, Final, get_args

import numpy as np

from edge_llm.errors import LocalProtocolError, RemoteProtocolError
from edge_llm.kv.snapshot import VLayout

WIRE_VERSION: Final = 1
MAGIC: Final = b"ELKV"
MAC_BYTES: Final = 32
MAX_SMALL_BODY: Final = 64 << 10
MAX_TOKENS: Final = 1 << 24
_PREAMBLE: Final = struct.Struct("<4sHHQQ")  # magic, version, kind, body bytes, sequence number
_CHUNK: Final = struct.Struct("<IIII")  # index, p0, p1, zero
_PAIR: Final = struct.Struct("<QQ")

Buffer = bytes | bytearray | memoryview


class Kind(IntEnum):
    HEADER = 1
    CHUNK = 2
    PROGRESS = 3
    END = 4
    ERROR = 5


@dataclass(frozen=True, slots=True)
class Header:
    """What follows: KV of positions [start, n_tokens) of the ids with this digest. Digests are sha256 hex.
    `stored` positions of them were kept from earlier prompts and need no computing."""

    compatibility: str
    exactness_class: str
    v_layout: VLayout
    chunk_tokens: int
    n_tokens: int
    start: int
    ids_sha256: str
    request_id: str
    stored: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Canonical payload of positions [p0, p1); `index` counts from 0."""

    index: int
    p0: int
    p1: int
    payload: Buffer


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` positions are computed."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class End:
    """All positions up to `n_tokens` were sent; `digest` is the sha256 over the MACs of all chunk frames."""

    n_tokens: int
    digest: str


@dataclass(frozen=True, slots=True)
class Error:
    """The sender gives up; chunks sent so far stay valid."""

    code: str
    message: str
    is_retryable: bool


class NeedData(Enum):
    NEED_DATA = 0


NEED_DATA: Final = NeedData.NEED_DATA
Event = Header | Chunk | Progress | End | Error


class _State(Enum):
    HEADER = 0
    CHUNKS = 1
    DONE = 2
    DEAD = 3


_ALLOWED: Final = {
    _State.HEADER: frozenset({Kind.HEADER, Kind.ERROR}),
    _State.CHUNKS: frozenset({Kind.CHUNK, Kind.PROGRESS, Kind.END, Kind.ERROR}),
    _State.DONE: frozenset[Kind](),
    _State.DEAD: frozenset[Kind](),
}
_NEXT: Final = {Kind.HEADER: _State.CHUNKS, Kind.END: _State.DONE, Kind.ERROR: _State.DONE}


class FrameEncoder:
    """The sending side. Each method returns buffers to be sent in order; payloads are not copied."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._sequence = 0
        self._state = _State.HEADER
        self._chunks = 0
        self._digest = hashlib.sha256()

    def send(self, event: Event) -> list[Buffer]:
        """Buffers of one event. Raises LocalProtocolError when the event is not allowed now."""
        kind, body = _encode(event)
        if kind not in _ALLOWED[self._state]:
            raise LocalProtocolError(f"{kind.name} is not allowed in state {self._state.name}")
        if isinstance(event, Chunk):
            if event.index != self._chunks:
                raise LocalProtocolError(f"chunk {event.index} after {self._chunks} chunks")
            self._chunks += 1
        size = sum(len(part) for part in body)
        preamble = _PREAMBLE.pack(MAGIC, WIRE_VERSION, kind, size, self._sequence)
        mac = _mac(self._key, preamble, *body)
        if kind is Kind.CHUNK:
            self._digest.update(mac)
        self._sequence += 1
        self._state = _NEXT.get(kind, self._state)
        return [preamble, *body, mac]

    def end(self, n_tokens: int) -> list[Buffer]:
        """The End frame."""
        return self.send(End(n_tokens, self._digest.hexdigest()))


class FrameDecoder:
    """The receiving side. `kv_bytes_per_token`, `max_tokens` and the most positions of one chunk come from the
    receiver's own model and settings: a frame that is larger is refused by its first bytes, before it is buffered."""

    def __init__(self, key: bytes, kv_bytes_per_token: int, max_tokens: int, max_chunk_tokens: int) -> None:
        self._key = key
        self._bytes_per_token = kv_bytes_per_token
        self._max_body = _CHUNK.size + kv_bytes_per_token * min(max_tokens, max_chunk_tokens, MAX_TOKENS)
        self._max_tokens = max_tokens
        self._parts: deque[memoryview] = deque()  # as they came
        self._buffered = 0
        # the frame in the making, first its preamble alone; of what was promised, memory comes with what is written
        self._frame, self._filled = memoryview(bytearray(_PREAMBLE.size)), 0
        self._kind: Kind | None = None
        self._sequence = 0
        self._state = _State.HEADER
        self._chunks = 0
        self._filled_to = 0
        self._n_tokens = self._longest = 0
        self._digest = hashlib.sha256()

    @property
    def is_done(self) -> bool:
        return self._state is _State.DONE

    @property
    def ready_bytes(self) -> int:
        """Bytes that the next `next_event` will check: 0 while its frame is incomplete."""
        is_ready = self._kind is not None and self._filled + self._buffered >= len(self._frame)
        return len(self._frame) if is_ready else 0

    def feed(self, data: Buffer) -> None:
        """Bytes as they came. The buffer must not change afterwards."""
        if len(data):
            self._parts.append(memoryview(data).cast("B"))
            self._buffered += len(data)

    def next_event(self) -> Event | NeedData:
        """The next whole event, or NEED_DATA. Raises RemoteProtocolError; any other exception is a bug of ours."""
        if self._state is _State.DEAD:
            raise RemoteProtocolError("the KV stream was already refused")
        try:
            return self._next()
        except RemoteProtocolError:
            self._die()
            raise

    def eof(self) -> None:
        """The connection ended. Raises RemoteProtocolError unless the stream was complete."""
        if self._state is not _State.DONE or self._filled or self._buffered:
            self._die()
            raise RemoteProtocolError(
                f"the KV stream ended early, after {self._filled_to} of {self._n_tokens} positions"
            )

    def _next(self) -> Event | NeedData:
        if not self._is_whole():
            return NEED_DATA
        if self._kind is None:
            preamble = bytes(self._frame)
            self._kind, size = self._parse_preamble(preamble)
            self._frame = np.empty(size, np.uint8).data
            self._frame[: len(preamble)] = preamble
            if not self._is_whole():
                return NEED_DATA
        kind, frame = self._kind, self._frame
        self._start_over()
        signed, mac = frame[:-MAC_BYTES], bytes(frame[-MAC_BYTES:])
        if not hmac.compare_digest(mac, _mac(self._key, signed)):
            raise RemoteProtocolError("a KV frame is not authentic")
        if kind is Kind.CHUNK:
            self._digest.update(mac)
        event = self._parse(kind, signed[_PREAMBLE.size :])
        self._sequence += 1
        self._state = _NEXT.get(kind, self._state)
        return event

    def _is_whole(self) -> bool:
        """Move what came into the frame; whether nothing of it is missing."""
        while self._parts and (missing := len(self._frame) - self._filled):
            part = self._parts.popleft()
            taken = part[:missing]
            self._frame[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            self._buffered -= len(taken)
            if len(part) > missing:
                self._parts.appendleft(part[missing:])
        return self._filled == len(self._frame)

    def _start_over(self) -> None:
        self._kind, self._frame, self._filled = None, memoryview(bytearray(_PREAMBLE.size)), 0

    def _die(self) -> None:
        self._state = _State.DEAD
        self._start_over()
        self._parts.clear()

    def _parse_preamble(self, preamble: bytes) -> tuple[Kind, int]:
        """Kind, and the length of the whole frame."""
        magic, version, number, size, sequence = _PREAMBLE.unpack(preamble)
        if magic != MAGIC or version != WIRE_VERSION:
            raise RemoteProtocolError("these bytes are no KV frame of a version this worker speaks")
        if number not in Kind._value2member_map_:
            raise RemoteProtocolError(f"unknown KV frame kind {number}")
        kind = Kind(number)
        if size > (self._max_body if kind is Kind.CHUNK else MAX_SMALL_BODY):
            raise RemoteProtocolError(f"a {kind.name} frame of {size} bytes is larger than this worker takes")
        if sequence != self._sequence:
            raise RemoteProtocolError(f"KV frame {sequence} where {self._sequence} was due")
        if kind not in _ALLOWED[self._state]:
            raise RemoteProtocolError(f"a {kind.name} frame is not allowed in state {self._state.name}")
        return kind, _PREAMBLE.size + size + MAC_BYTES

    def _parse(self, kind: Kind, body: memoryview) -> Event:
        match kind:
            case Kind.HEADER:
                return self._header(body)
            case Kind.CHUNK:
                return self._chunk(body)
            case Kind.PROGRESS:
                return Progress(*_pair(body))
            case Kind.END:
                return self._end(body)
            case Kind.ERROR:
                values = _fields_of(body, {"code": str, "message": str, "is_retryable": bool})
                return Error(values["code"], values["message"], values["is_retryable"])

    def _header(self, body: memoryview) -> Header:
        kinds = {field.name: int if field.type == "int" else str for field in fields(Header)}
        header = Header(**_fields_of(body, kinds))
        if header.v_layout not in get_args(VLayout) or not 0 <= header.start <= header.n_tokens <= self._max_tokens:
            raise RemoteProtocolError("the KV header's positions or V layout are out of bounds")
        self._longest = header.chunk_tokens
        if header.chunk_tokens < 1 or not 0 <= header.stored <= header.n_tokens:
            raise RemoteProtocolError("the KV header's chunk size or stored positions are out of bounds")
        self._filled_to, self._n_tokens = header.start, header.n_tokens
        return header

    def _chunk(self, body: memoryview) -> Chunk:
        if len(body) < _CHUNK.size:
            raise RemoteProtocolError("a KV chunk is shorter than its own head")
        index, p0, p1, zero = _CHUNK.unpack_from(body)
        payload = body[_CHUNK.size :]
        longest = min(self._n_tokens, p0 + self._longest)
        if index != self._chunks or p0 != self._filled_to or not p0 < p1 <= longest or zero:
            raise RemoteProtocolError(f"KV chunk {index} of positions {p0} to {p1} does not follow {self._filled_to}")
        if len(payload) != (p1 - p0) * self._bytes_per_token:
            raise RemoteProtocolError(f"a KV chunk of {p1 - p0} positions has {len(payload)} bytes")
        self._chunks += 1
        self._filled_to = p1
        return Chunk(index, p0, p1, payload)

    def _end(self, body: memoryview) -> End:
        values = _fields_of(body, {"n_tokens": int, "digest": str})
        if values["n_tokens"] != self._n_tokens or self._filled_to != self._n_tokens:
            raise RemoteProtocolError(f"the KV stream ends at {self._filled_to} of {self._n_tokens} positions")
        if values["digest"] != self._digest.hexdigest():
            raise RemoteProtocolError("the KV stream's closing digest is wrong")
        return End(values["n_tokens"], values["digest"])


def _encode(event: Event) -> tuple[Kind, list[Buffer]]:
    match event:
        case Header():
            return Kind.HEADER, [_json(event)]
        case Chunk():
            return Kind.CHUNK, [_CHUNK.pack(event.index, event.p0, event.p1, 0), event.payload]
        case Progress():
            return Kind.PROGRESS, [_PAIR.pack(event.done, event.total)]
        case End():
            return Kind.END, [_json(event)]
        case Error():
            return Kind.ERROR, [_json(event)]


def _json(event: Header | End | Error) -> bytes:
    return json.dumps(asdict(event), separators=(",", ":")).encode()


def _pair(body: memoryview) -> tuple[int, int]:
    if len(body) != _PAIR.size:
        raise RemoteProtocolError("a KV progress frame has a wrong size")
    done, total = _PAIR.unpack(body)
    if not done <= total <= MAX_TOKENS:
        raise RemoteProtocolError("a KV progress frame is out of bounds")
    return done, total


def _fields_of(body: memoryview, kinds: Mapping[str, type]) -> dict[str, Any]:
    """A flat JSON object with exactly these keys and types."""
    try:
        values = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError("a KV frame's body is not JSON") from error
    if not isinstance(values, dict) or values.keys() != kinds.keys():
        raise RemoteProtocolError("a KV frame's body has other fields than it must")
    if any(type(values[name]) is not kind for name, kind in kinds.items()):
        raise RemoteProtocolError("a KV frame's body has a field of a wrong type")
    return values


def _mac(key: bytes, *parts: Buffer) -> bytes:
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        mac.update(part)
    return mac.digest()
