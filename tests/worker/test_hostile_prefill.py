"""A prefill worker that lies, breaks off or stalls: the answer comes all the same, and the report says who and why.

The liar holds the cluster's key, so that its frames are authentic wherever that is not the point: what is tested is
what lies behind the MAC. It writes frames with code of its own, also such as `FrameEncoder` refuses to make.
All tests share one cluster: what one liar leaves behind would be seen by the next test.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import hmac
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import pytest
from aiohttp import web

from edge_llm.engine.simulated import SimulatedBackend
from edge_llm.errors import RemoteProtocolError
from edge_llm.kv.snapshot import CacheShape, Geometry, LayerShape, ids_digest
from edge_llm.worker.client import Peer
from edge_llm.worker.messages import ErrorReply, PrefillRequest, PromptReport, decode, encode
from edge_llm.worker.pull import Expected, Patience, Puller
from edge_llm.worker.tickets import ticket_of
from tests.loopback import (
    CHUNK,
    KEYS,
    Cluster,
    CountingBackend,
    Node,
    prompt_of,
    running_cluster,
    settings_of,
    undisturbed,
)

pytestmark = pytest.mark.anyio
HEADER, CHUNK_KIND, PROGRESS, END, ERROR = range(1, 6)
PREAMBLE: Final = struct.Struct("<4sHHQQ")
MAC: Final = 32
PROMPT: Final = prompt_of(3 * CHUNK + 5)
TOTAL: Final = len(PROMPT) - 1
STALL_S, ADVANCE_S = 0.3, 0.6
DRIP_S: Final = 0.03
IDENTITY: Final = SimulatedBackend(settings_of("prefill")).facts.identity
F16: Final = 1
PROTOCOL, UNREACHABLE = "protocol_error", "worker_unreachable"


class Writer:
    """Authentic frames of one transfer, right or wrong."""

    def __init__(self, request: PrefillRequest, key: bytes) -> None:
        self.request, self.key = request, key
        self._sequence = 0
        self._digest = hashlib.sha256()
        self._kv = SimulatedBackend(settings_of("prefill"))
        self._kv.serve_open()
        self._kv.serve_prompt(request.ids[:-1], 0)

    def frame(
        self, kind: int, body: bytes, *, size: int | None = None, version: int = 1, sequence: int | None = None
    ) -> bytes:
        announced = len(body) if size is None else size
        number = self._sequence if sequence is None else sequence
        head = PREAMBLE.pack(b"ELKV", version, kind, announced, number) + body
        mac = hmac.new(self.key, head, hashlib.sha256).digest()
        if kind == CHUNK_KIND:
            self._digest.update(mac)
        self._sequence += 1
        return head + mac

    def header(self, **changes: object) -> bytes:
        fields: dict[str, object] = {
            "compatibility": IDENTITY.compatibility,
            "exactness_class": IDENTITY.exactness_class,
            "v_layout": "rows",
            "chunk_tokens": CHUNK,
            "n_tokens": len(self.request.ids) - 1,
            "start": self.request.start,
            "ids_sha256": ids_digest(self.request.ids),
            "request_id": self.request.request_id,
            "stored": 0,
        }
        return self.frame(HEADER, json.dumps(fields | changes).encode())

    def payload(self, p0: int, p1: int) -> bytes:
        return self._kv.serve_export(p0, p1)

    def chunk(self, index: int, p0: int, p1: int, payload: bytes, zero: int = 0) -> bytes:
        return self.frame(CHUNK_KIND, struct.pack("<IIII", index, p0, p1, zero) + payload)

    def true_chunk(self, index: int) -> bytes:
        p0, p1 = index * CHUNK, min(TOTAL, (index + 1) * CHUNK)
        return self.chunk(index, p0, p1, self.payload(p0, p1))

    def progress(self, done: int, total: int = TOTAL) -> bytes:
        return self.frame(PROGRESS, struct.pack("<QQ", done, total))

    def end(self, n_tokens: int = TOTAL, digest: str | None = None) -> bytes:
        closing = {"n_tokens": n_tokens, "digest": self._digest.hexdigest() if digest is None else digest}
        return self.frame(END, json.dumps(closing).encode())

    def error(self, code: object, message: str = "no", is_retryable: object = True) -> bytes:
        said = {"code": code, "message": message, "is_retryable": is_retryable}
        return self.frame(ERROR, json.dumps(said).encode())

    def begun(self, chunks: int = 1) -> bytes:
        """Header and the first chunks, all of them right."""
        parts = [self.header()]
        for index in range(chunks):
            parts += [self.progress(min(TOTAL, (index + 1) * CHUNK)), self.true_chunk(index)]
        return b"".join(parts)

    def frames(self) -> list[bytes]:
        """What an honest worker sends, frame by frame."""
        frames = [self.header()]
        for index in range(-(-TOTAL // CHUNK)):
            frames += [self.progress(min(TOTAL, (index + 1) * CHUNK)), self.true_chunk(index)]
        return [*frames, self.end()]


Answering = Callable[[web.Request, Writer], Awaitable[web.StreamResponse]]
Said = Callable[[Writer], bytes]


@dataclass(slots=True)
class Liar:
    """An HTTP server that answers POST /prefill as the test says. `over` ends what would be endless."""

    peer: Peer
    answering: Answering | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    visits: list[str] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.visits.append(request.path)
        wanted = decode(PrefillRequest, await request.read())
        key = KEYS.transfer_key(ticket_of(request.headers.get("authorization")))
        assert self.answering is not None
        with suppress(ConnectionError):
            return await self.answering(request, Writer(wanted, key))
        return web.Response()


@asynccontextmanager
async def lying(name: str) -> AsyncIterator[Liar]:
    bound = socket.create_server(("127.0.0.1", 0))
    liar = Liar(Peer(name, "{}:{}".format(*bound.getsockname())))
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", liar.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    await web.SockSite(runner, bound).start()
    try:
        yield liar
    finally:
        liar.over.set()
        await runner.cleanup()


@dataclass(frozen=True, slots=True)
class Stage:
    """A liar, an honest prefill worker and an impatient decode worker."""

    cluster: Cluster
    liar: Liar
    honest: Node
    decode: Node
    engine: CountingBackend

    async def ask(self, *via: Peer) -> PromptReport:
        """One prompt; whatever happened to it, its answer is the one of an undisturbed engine."""
        answer = await (await self.cluster.gateway.ask(self.decode.peer, PROMPT, via)).over()
        assert answer.ids == undisturbed(PROMPT, 8)
        assert answer.report.restored_tokens + answer.report.computed_tokens == TOTAL
        per_token = self.decode.worker.facts.kv_bytes_per_token
        assert answer.report.handoff_bytes == per_token * answer.report.restored_tokens
        return answer.report

    async def survives(self, code: str, kept: int, liar: Peer | None = None) -> None:
        """The liar alone, the liar before an honest worker, the honest worker afterwards."""
        liar = liar or self.liar.peer
        why = f"{liar.worker}: {code} after {kept} of {TOTAL} tokens"
        self.engine.restored.clear()
        alone = await self.ask(liar)
        assert self.engine.restored == ([kept] if kept else []), "the engine was handed what was not proven"
        rest = f"; {TOTAL - kept} tokens were computed here" if kept < TOTAL else ""
        assert alone.fallback == why + rest
        assert alone.restored_tokens == kept
        assert (alone.mode, alone.prefill_worker) == (("split", liar.worker) if kept else ("local", "d1"))
        followed = await self.ask(liar, self.honest.peer)
        if 2 * kept > TOTAL:
            assert followed.fallback == why + rest, "more than half is here: nobody else is asked"
        else:
            assert (followed.fallback, followed.mode, followed.prefill_worker) == (why, "split", "p1")
            assert followed.restored_tokens == TOTAL
        await self.is_unharmed()

    async def is_unharmed(self) -> None:
        after = await self.ask(self.honest.peer)
        assert (after.mode, after.fallback, after.restored_tokens) == ("split", None, TOTAL)
        assert self.decode.slots_free == self.decode.worker.facts.slots
        role = self.decode.worker.decode
        assert role is not None
        assert role.adopting.used_bytes == 0


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One event loop for all tests here: they share one cluster."""
    return "asyncio"


@pytest.fixture(scope="module")
async def shared_stage() -> AsyncIterator[Stage]:
    async with running_cluster() as cluster, lying("liar") as liar:
        honest = await cluster.start("prefill", "p1")
        engine = CountingBackend(settings_of("decode"))
        patience = Patience(STALL_S, ADVANCE_S)
        decode_node = await cluster.start("decode", "d1", backend=engine, patience=patience)
        yield Stage(cluster, liar, honest, decode_node, engine)


@pytest.fixture
def stage(shared_stage: Stage) -> Iterator[Stage]:
    yield shared_stage
    shared_stage.liar.over.set()
    shared_stage.liar.over = asyncio.Event()
    shared_stage.liar.visits.clear()


def saying(said: Said) -> Answering:
    """A 200 with these bytes and a proper end of the HTTP body."""

    async def answering(_request: web.Request, writer: Writer) -> web.StreamResponse:
        return web.Response(body=said(writer))

    return answering


async def test_the_liars_own_frames_are_right_when_it_does_not_lie(stage: Stage) -> None:
    """Otherwise every test below would pass for the wrong reason."""
    stage.liar.answering = saying(lambda writer: b"".join(writer.frames()))
    report = await stage.ask(stage.liar.peer)
    assert (report.fallback, report.restored_tokens, report.is_same_class) == (None, TOTAL, True)
    assert report.prefill_worker == "liar"


def places(frames: list[bytes]) -> list[tuple[int, int]]:
    """(offset in the stream, chunk positions complete before it) at every border within every frame."""
    found: list[tuple[int, int]] = []
    at, kept = 0, 0
    for frame in frames:
        body_end = len(frame) - MAC
        inside = {0, 1, 4, 6, 8, 15, 16, PREAMBLE.size - 1, PREAMBLE.size, PREAMBLE.size + 1}
        inside |= {(PREAMBLE.size + body_end) // 2, body_end - 1, body_end, body_end + MAC // 2, len(frame) - 1}
        found += [(at + offset, kept) for offset in sorted(inside)]
        at += len(frame)
        if frame[6] == CHUNK_KIND:
            kept = min(TOTAL, kept + CHUNK)
    return found


def sample_stream() -> list[bytes]:
    """An honest stream, for its lengths (those of all transfers here are the same, whatever the key)."""
    request = PrefillRequest(request_id="r10000", ids=PROMPT, compatibility=IDENTITY.compatibility)
    return Writer(request, b"k" * 32).frames()


async def test_a_stream_cut_anywhere_keeps_the_chunks_before_the_cut(stage: Stage) -> None:
    for number, (at, kept) in enumerate(places(sample_stream())):
        stage.liar.answering = saying(partial(lambda at, writer: b"".join(writer.frames())[:at], at))
        answer = await stage.cluster.gateway.ask(
            stage.decode.peer, PROMPT, [stage.liar.peer], request_id=f"r{10000 + number}"
        )
        report = (await answer.over()).report
        assert answer.ids == undisturbed(PROMPT, 8)
        assert report.restored_tokens == kept, f"cut at byte {at}"
        assert (report.fallback or "").startswith(f"liar: {PROTOCOL} after {kept} of {TOTAL} tokens")
    await stage.is_unharmed()


async def test_a_flipped_bit_anywhere_keeps_the_chunks_before_it_and_nothing_else(stage: Stage) -> None:
    def flipped(at: int, writer: Writer) -> bytes:
        data = bytearray(b"".join(writer.frames()))
        data[at] ^= 0x10
        return bytes(data)

    for number, (at, kept) in enumerate(places(sample_stream())):
        stage.liar.answering = saying(partial(flipped, at))
        answer = await stage.cluster.gateway.ask(
            stage.decode.peer, PROMPT, [stage.liar.peer], request_id=f"r{20000 + number}"
        )
        report = (await answer.over()).report
        assert answer.ids == undisturbed(PROMPT, 8)
        assert report.restored_tokens == kept, f"bit flipped in byte {at}"
        assert (report.fallback or "").startswith(f"liar: {PROTOCOL} after {kept} of {TOTAL} tokens")
    await stage.is_unharmed()


def after(chunks: int, lie: Said) -> Said:
    """A right beginning, then the lie."""
    return lambda writer: writer.begun(chunks) + lie(writer)


def reordered(writer: Writer) -> bytes:
    frames = writer.frames()
    frames[2], frames[4] = frames[4], frames[2]
    return b"".join(frames)


def of_another_transfer(writer: Writer) -> bytes:
    """The same prompt, the right cluster key, but the frames were made for another ticket."""
    return b"".join(Writer(writer.request, hashlib.sha256(writer.key).digest()).frames())


LIES: Final[dict[str, tuple[Said, str, int]]] = {
    "reordered chunks": (reordered, PROTOCOL, 0),
    "chunks in the wrong order, numbered and signed": (
        lambda w: w.header() + w.chunk(0, CHUNK, 2 * CHUNK, w.payload(CHUNK, 2 * CHUNK)),
        PROTOCOL,
        0,
    ),
    "a repeated frame": (
        lambda w: (begun := w.begun(1)) + begun[-(PREAMBLE.size + 16 + 64 * CHUNK + MAC) :],
        PROTOCOL,
        8,
    ),
    "frames of another transfer": (of_another_transfer, PROTOCOL, 0),
    "a header of 64 KiB and one byte": (lambda w: w.frame(HEADER, b" " * ((64 << 10) + 1)), PROTOCOL, 0),
    "length one too large": (after(1, lambda w: w.frame(PROGRESS, bytes(16), size=17) + w.progress(16)), PROTOCOL, 8),
    "p0 leaves a gap": (after(1, lambda w: w.chunk(1, CHUNK + 1, 2 * CHUNK, w.payload(9, 16))), PROTOCOL, 8),
    "p0 overlaps": (after(1, lambda w: w.chunk(1, CHUNK - 1, 2 * CHUNK, w.payload(7, 16))), PROTOCOL, 8),
    "p1 behind the prompt": (
        after(3, lambda w: w.chunk(3, 3 * CHUNK, TOTAL + 1, bytes(64 * (TOTAL + 1 - 3 * CHUNK)))),
        PROTOCOL,
        24,
    ),
    "p1 equals p0": (after(1, lambda w: w.chunk(1, CHUNK, CHUNK, b"")), PROTOCOL, 8),
    "p1 before p0": (after(1, lambda w: w.chunk(1, CHUNK, CHUNK - 1, b"")), PROTOCOL, 8),
    "p1 of 2**32 - 1": (after(1, lambda w: w.chunk(1, CHUNK, (1 << 32) - 1, w.payload(8, 16))), PROTOCOL, 8),
    "a payload one byte short": (after(1, lambda w: w.chunk(1, CHUNK, 2 * CHUNK, w.payload(8, 16)[:-1])), PROTOCOL, 8),
    "a payload one byte long": (after(1, lambda w: w.chunk(1, CHUNK, 2 * CHUNK, w.payload(8, 16) + b"x")), PROTOCOL, 8),
    "a chunk without a head": (after(1, lambda w: w.frame(CHUNK_KIND, bytes(15))), PROTOCOL, 8),
    "a chunk with a wrong index": (after(1, lambda w: w.chunk(7, CHUNK, 2 * CHUNK, w.payload(8, 16))), PROTOCOL, 8),
    "a reserved field in use": (
        after(1, lambda w: w.chunk(1, CHUNK, 2 * CHUNK, w.payload(8, 16), zero=1)),
        PROTOCOL,
        8,
    ),
    "a chunk before the header": (lambda w: w.true_chunk(0), PROTOCOL, 0),
    "a second header": (after(1, lambda w: w.header()), PROTOCOL, 8),
    "an end before the last chunk": (after(2, lambda w: w.end()), PROTOCOL, 16),
    "an end of fewer positions": (after(2, lambda w: w.end(2 * CHUNK)), PROTOCOL, 16),
    "a wrong closing digest": (after(4, lambda w: w.end(digest="0" * 64)), PROTOCOL, TOTAL),
    "an unknown kind": (after(1, lambda w: w.frame(99, b"")), PROTOCOL, 8),
    "another wire version": (lambda w: w.frame(HEADER, b"{}", version=2), PROTOCOL, 0),
    "a number out of turn": (after(1, lambda w: w.frame(PROGRESS, bytes(16), sequence=9)), PROTOCOL, 8),
    "another model": (lambda w: w.header(compatibility="0" * 64) + w.true_chunk(0), "incompatible_kv", 0),
    "another prompt": (lambda w: w.header(ids_sha256="0" * 64) + w.true_chunk(0), PROTOCOL, 0),
    "another length": (lambda w: w.header(n_tokens=TOTAL - 1) + w.true_chunk(0), PROTOCOL, 0),
    "a length behind the context": (lambda w: w.header(n_tokens=1 << 60) + w.true_chunk(0), PROTOCOL, 0),
    "another start": (lambda w: w.header(start=CHUNK) + w.true_chunk(1), PROTOCOL, 0),
    "a negative start": (lambda w: w.header(start=-CHUNK) + w.true_chunk(0), PROTOCOL, 0),
    "a start that is a truth value": (lambda w: w.header(start=False) + w.true_chunk(0), PROTOCOL, 0),
    "an unknown V layout": (lambda w: w.header(v_layout="diagonal") + w.true_chunk(0), PROTOCOL, 0),
    "an unknown header field": (lambda w: w.header(hurry=True) + w.true_chunk(0), PROTOCOL, 0),
    "a header that is no JSON": (lambda w: w.frame(HEADER, b"\xff\xfe{"), PROTOCOL, 0),
    "a header nested beyond reason": (lambda w: w.frame(HEADER, b"[" * (60 << 10)), PROTOCOL, 0),
    "a header with a number of 50,000 digits": (lambda w: w.frame(HEADER, b'{"start":' + b"9" * 50_000), PROTOCOL, 0),
    "progress of another prompt": (after(1, lambda w: w.progress(9, TOTAL + 1)), PROTOCOL, 8),
    "progress beyond its own total": (after(1, lambda w: w.progress(TOTAL + 1)), PROTOCOL, 8),
    "progress of 2**64 - 1": (after(1, lambda w: w.progress((1 << 64) - 1, (1 << 64) - 1)), PROTOCOL, 8),
    "an error at once": (lambda w: w.error("engine_failed"), "engine_failed", 0),
    "an error midway": (after(1, lambda w: w.error("engine_failed")), "engine_failed", 8),
    "an error of an unknown kind": (
        after(1, lambda w: w.error("../../etc", "\ud800\x1b[2J" * 999)),
        "worker_failed",
        8,
    ),
    "an error of a wrong form": (after(1, lambda w: w.error(["overloaded"])), PROTOCOL, 8),
    "a web page": (lambda w: b"<html>" + b"x" * 9999, PROTOCOL, 0),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_costs_a_fallback_and_no_token(stage: Stage, lie: str) -> None:
    """The sender then stays connected and silent: who believed it would wait, and call it a stall."""
    said, code, kept = LIES[lie]

    async def answering(request: web.Request, writer: Writer) -> web.StreamResponse:
        response = await _begin(request, said(writer))
        await stage.liar.over.wait()
        return response

    stage.liar.answering = answering
    await stage.survives(code, kept)


async def test_a_stream_recorded_from_an_earlier_transfer_is_worth_nothing(stage: Stage) -> None:
    recorded: list[bytes] = []

    def replayed(writer: Writer) -> bytes:
        recorded.append(b"".join(writer.frames()))
        return recorded[0]

    stage.liar.answering = saying(replayed)
    assert (await stage.ask(stage.liar.peer)).fallback is None
    await stage.survives(PROTOCOL, 0)


async def test_bytes_behind_the_end_change_nothing(stage: Stage) -> None:
    stage.liar.answering = saying(lambda writer: b"".join(writer.frames()) + writer.true_chunk(0) * 50)
    report = await stage.ask(stage.liar.peer)
    assert (report.fallback, report.restored_tokens) == (None, TOTAL)
    await stage.is_unharmed()


async def test_kv_of_another_exactness_class_is_used_and_said(stage: Stage) -> None:
    """One foreign chunk is enough: the promise of the whole answer is gone."""

    def foreign(chunks: int, writer: Writer) -> bytes:
        frames = writer.frames()[1 : 1 + 2 * chunks]
        again = Writer(writer.request, writer.key)
        parts = [again.header(exactness_class="f" * 64)]
        # the bodies again under numbers of their own
        parts += [again.frame(frame[6], frame[PREAMBLE.size : -MAC]) for frame in frames]
        return b"".join([*parts, again.end()] if chunks == 4 else parts)

    stage.liar.answering = saying(partial(foreign, 4))
    whole = await stage.ask(stage.liar.peer)
    assert (whole.is_same_class, whole.mode, whole.restored_tokens, whole.fallback) == (False, "split", TOTAL, None)
    stage.liar.answering = saying(partial(foreign, 1))
    mixed = await stage.ask(stage.liar.peer, stage.honest.peer)
    assert (mixed.is_same_class, mixed.prefill_worker, mixed.restored_tokens) == (False, "p1", TOTAL)
    stage.liar.answering = saying(partial(foreign, 0))
    unused = await stage.ask(stage.liar.peer, stage.honest.peer)
    assert unused.is_same_class, "a foreign header alone brought no KV"
    await stage.is_unharmed()


REPLIES: Final[dict[str, tuple[Callable[[], web.Response], str]]] = {
    "500 and a web page": (lambda: web.Response(status=500, text="<html>oops"), PROTOCOL),
    "500 and a megabyte": (lambda: web.Response(status=500, body=b"\0" * (1 << 20)), PROTOCOL),
    "500 and unknown fields": (lambda: web.json_response({"code": "x", "message": "y", "z": 1}, status=500), PROTOCOL),
    "404 and nothing": (lambda: web.Response(status=404), PROTOCOL),
    "204": (lambda: web.Response(status=204), PROTOCOL),
    "206": (lambda: web.Response(status=206, body=b"ELKV"), PROTOCOL),
    "503 of our own": (lambda: _error_reply(503, "overloaded"), "overloaded"),
    "401 of our own": (lambda: _error_reply(401, "unauthorized"), "worker_failed"),
    "a code nobody knows": (lambda: _error_reply(500, "__class__"), "worker_failed"),
}


def _error_reply(status: int, code: str) -> web.Response:
    return web.Response(status=status, body=encode(ErrorReply(code=code, message="no", retry_after_s=9e9)))


@pytest.mark.parametrize("reply", REPLIES)
async def test_an_http_error_with_whatever_body_is_a_fallback(stage: Stage, reply: str) -> None:
    made, code = REPLIES[reply]

    async def answering(_request: web.Request, _writer: Writer) -> web.StreamResponse:
        return made()

    stage.liar.answering = answering
    await stage.survives(code, 0)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(stage: Stage, status: int) -> None:
    async def answering(_request: web.Request, _writer: Writer) -> web.StreamResponse:
        return web.Response(status=status, headers={"location": f"http://{stage.liar.peer.address}/elsewhere"})

    stage.liar.answering = answering
    await stage.survives(PROTOCOL, 0)
    assert set(stage.liar.visits) == {"/prefill"}


@pytest.mark.parametrize("is_bomb", [False, True], ids=["frames", "bomb"])
@pytest.mark.parametrize("status", [200, 500])
async def test_compressed_bodies_are_not_decompressed(stage: Stage, is_bomb: bool, status: int) -> None:
    async def answering(_request: web.Request, writer: Writer) -> web.StreamResponse:
        body = b"ELKV" * (4 << 20) if is_bomb else b"".join(writer.frames())
        packed = gzip.compress(body, compresslevel=1)
        return web.Response(status=status, body=packed, headers={"content-encoding": "gzip"})

    stage.liar.answering = answering
    await stage.survives(PROTOCOL, 0)


async def _begin(request: web.Request, *parts: bytes, status: int = 200) -> web.StreamResponse:
    response = web.StreamResponse(status=status)
    await response.prepare(request)
    for part in parts:
        await response.write(part)
    return response


@pytest.mark.parametrize("size", [(64 << 10) + 1, 1 << 40, (1 << 64) - 1])
@pytest.mark.parametrize("kind", [CHUNK_KIND, PROGRESS, END, ERROR])
async def test_a_length_beyond_reason_is_refused_before_its_body_comes(stage: Stage, kind: int, size: int) -> None:
    """The sender stays connected and silent: one that waited for the body would call it a stall."""

    async def answering(request: web.Request, writer: Writer) -> web.StreamResponse:
        response = await _begin(request, writer.begun(1), writer.frame(kind, b"", size=size)[: PREAMBLE.size])
        await stage.liar.over.wait()
        return response

    stage.liar.answering = answering
    await stage.survives(PROTOCOL, CHUNK)


async def test_a_connection_that_breaks_in_the_middle_is_a_fallback(stage: Stage) -> None:
    async def answering(request: web.Request, writer: Writer) -> web.StreamResponse:
        response = await _begin(request, writer.begun(2))
        assert request.transport is not None
        request.transport.abort()
        return response

    stage.liar.answering = answering
    report = await stage.ask(stage.liar.peer)
    # what a broken socket still gives is the network's business; whole chunks or none are ours
    assert report.restored_tokens in {0, CHUNK, 2 * CHUNK}
    assert (report.fallback or "").startswith(f"liar: {UNREACHABLE} after {report.restored_tokens} of {TOTAL}")
    await stage.is_unharmed()


async def _silent_before_the_reply(stage: Stage, request: web.Request, _writer: Writer) -> web.StreamResponse:
    await stage.liar.over.wait()
    return web.Response()


async def _silent_after(chunks: int | None, stage: Stage, request: web.Request, writer: Writer) -> web.StreamResponse:
    response = await _begin(request, b"" if chunks is None else writer.begun(chunks))
    await stage.liar.over.wait()
    return response


async def _silent_in_a_frame(stage: Stage, request: web.Request, writer: Writer) -> web.StreamResponse:
    response = await _begin(request, writer.begun(1), writer.true_chunk(1)[:-1])
    await stage.liar.over.wait()
    return response


async def _drip(stage: Stage, response: web.StreamResponse, parts: Callable[[], bytes]) -> web.StreamResponse:
    """Never silent, never further."""
    while not stage.liar.over.is_set():
        await response.write(parts())
        await asyncio.sleep(DRIP_S)
    return response


async def _progress_of(done: int, stage: Stage, request: web.Request, writer: Writer) -> web.StreamResponse:
    response = await _begin(request, writer.begun(1))
    return await _drip(stage, response, lambda: writer.progress(done))


async def _frame_byte_by_byte(stage: Stage, request: web.Request, writer: Writer) -> web.StreamResponse:
    response = await _begin(request, writer.begun(1))
    left = iter(writer.true_chunk(1))
    return await _drip(stage, response, lambda: bytes([next(left)]))


async def _error_byte_by_byte(stage: Stage, request: web.Request, _writer: Writer) -> web.StreamResponse:
    return await _drip(stage, await _begin(request, status=500), lambda: b" ")


STALLS: Final[dict[str, tuple[Callable[[Stage, web.Request, Writer], Awaitable[web.StreamResponse]], int]]] = {
    "silence instead of a reply": (_silent_before_the_reply, 0),
    "silence after the status line": (partial(_silent_after, None), 0),
    "silence after the header": (partial(_silent_after, 0), 0),
    "silence after a chunk": (partial(_silent_after, 1), 8),
    "silence before the end": (partial(_silent_after, 4), TOTAL),
    "silence in the middle of a frame": (_silent_in_a_frame, 8),
    "progress that stands still": (partial(_progress_of, CHUNK), 8),
    "progress that goes back": (partial(_progress_of, 0), 8),
    "a frame byte by byte": (_frame_byte_by_byte, 8),
    "an error byte by byte": (_error_byte_by_byte, 0),
}


@pytest.mark.parametrize("stall", STALLS)
async def test_a_sender_that_stalls_is_given_up(stage: Stage, stall: str) -> None:
    answering, kept = STALLS[stall]
    stage.liar.answering = partial(answering, stage)
    why = f"liar: {UNREACHABLE} after {kept} of {TOTAL} tokens"
    report = await stage.ask(stage.liar.peer)
    assert (report.fallback or "").startswith(why)
    assert report.restored_tokens == kept
    await stage.is_unharmed()


async def _closed_at_once(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def _no_http(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"ELKV\x01\x00" * 100 + b"\r\n\r\n")
    writer.close()


async def _endless_headers(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while not writer.is_closing():
            writer.write(b"a: b\r\n")
            await writer.drain()
            await asyncio.sleep(DRIP_S)
    writer.close()


@pytest.mark.parametrize("server", [_closed_at_once, _no_http, _endless_headers])
async def test_a_server_that_speaks_no_http_is_a_fallback(
    stage: Stage, server: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> None:
    raw = await asyncio.start_server(server, "127.0.0.1", 0)
    async with raw:
        address = "{}:{}".format(*raw.sockets[0].getsockname())
        await stage.survives(UNREACHABLE, 0, Peer("raw", address))


async def test_nobody_there_is_a_fallback(stage: Stage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        address = "{}:{}".format(*bound.getsockname())
    await stage.survives(UNREACHABLE, 0, Peer("gone", address))


async def test_kv_that_is_no_finite_number_is_refused_before_anybody_has_it(stage: Stage) -> None:
    """The simulated KV are hashes: read as halves some of them are NaN."""
    halves = Geometry((CacheShape((LayerShape(F16, 16, F16, 16, 2),) * 2),))
    stage.liar.answering = saying(lambda writer: b"".join(writer.frames()))
    candidate = stage.cluster.gateway.candidate(stage.liar.peer, "r1", PROMPT)
    request = PrefillRequest(request_id="r1", ids=PROMPT, compatibility=IDENTITY.compatibility)
    key = KEYS.transfer_key(candidate.ticket)
    seen: list[str] = []

    async def pull(geometry: Geometry) -> None:
        expected = Expected(geometry.kv_bytes_per_token, CHUNK, TOTAL, 0, ids_digest(PROMPT), geometry)
        async with Puller() as puller, aclosing(puller.pull(candidate, request, key, expected)) as events:
            async for event in events:
                seen.append(type(event).__name__)

    layout = stage.decode.worker.facts.layout
    assert layout is not None
    await pull(layout.geometry)
    assert seen.count("Chunk") == -(-TOTAL // CHUNK)
    seen.clear()
    with pytest.raises(RemoteProtocolError, match="infinite or undefined"):
        await pull(halves)
    assert "Chunk" not in seen
