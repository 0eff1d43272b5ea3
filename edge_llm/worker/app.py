"""The worker's HTTP: routes, tickets, limits, errors. Mounts role prefill, role decode or both on one engine.

Owns the edge: who may call what, how large a body may be, how errors look. Every route needs a ticket unless it is in
PUBLIC. Refuses to know how prompts are computed (prefill.py), adopted (decode.py) and who the gateways are.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Final

import aiohttp
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

import edge_llm
from edge_llm.config import WorkerConfig
from edge_llm.engine.engine import Engine, EngineFacts, Step, Vocabulary
from edge_llm.errors import EdgeLLMError, EngineFailed, InvalidRequest, Overloaded, PayloadTooLarge, Unauthorized
from edge_llm.kv.frames import Buffer
from edge_llm.worker.decode import DecodeRole
from edge_llm.worker.loop import EngineLoop
from edge_llm.worker.messages import (
    CancelReply,
    CancelRequest,
    DecodeReply,
    DecodeRequest,
    ErrorReply,
    Load,
    Message,
    PrefillRequest,
    Role,
    TokenizeReply,
    TokenizeRequest,
    WorkerStatus,
    decode,
    encode,
)
from edge_llm.worker.outbox import Outboxes
from edge_llm.worker.prefill import PrefillRole
from edge_llm.worker.tickets import Claims, KeyRing, Operation, ReplayGuard, body_digest, ticket_of

PUBLIC: Final = frozenset({"/healthz", "/readyz"})
MAX_BODY_BYTES: Final = 16 << 20
_SWEEP_S: Final = 1.0
log = structlog.get_logger()


class Worker:
    """Everything a worker process has, from start to stop."""

    def __init__(
        self,
        config: WorkerConfig,
        engine: Engine,
        vocabulary: Vocabulary,
        keys: KeyRing,
        wall_clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config, self.keys = config, keys
        self._engine, self._vocabulary = engine, vocabulary
        self._wall_clock, self._monotonic = wall_clock, monotonic
        self._replays = ReplayGuard()
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")
        self.loop = EngineLoop(engine)
        self.outboxes = Outboxes(monotonic, config.gateway_lease_s)
        self.prefill = PrefillRole(self.loop, lambda: self.facts)
        self.decode: DecodeRole | None = None
        self.is_draining = False
        self.on_death: Callable[[], None] = lambda: None

    @property
    def facts(self) -> EngineFacts:
        return self._engine.facts

    @property
    def role(self) -> Role:
        """What this worker is, whatever its label said first."""
        if not self.facts.slots:
            return "prefill"
        return "mixed" if self.config.role == "mixed" else "decode"

    @property
    def is_ready(self) -> bool:
        return self.loop.is_alive and not self.is_draining

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start the engine thread and the sweeper; stop both."""
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session:
            if self.facts.slots:
                self.decode = DecodeRole(
                    self.loop,
                    lambda: self.facts,
                    session,
                    self.keys,
                    self.outboxes,
                    self.config.allowed_peers,
                    self.config.name,
                    self._monotonic,
                )
            self.loop.start(self._on_step, self._on_engine_death)
            sweeper = asyncio.create_task(self._sweep(), name="sweeper")
            try:
                yield
            finally:
                sweeper.cancel()
                with suppress(asyncio.CancelledError):
                    await sweeper
                await self.loop.stop()
                self._tokenizing.shutdown(wait=False, cancel_futures=True)
                await asyncio.to_thread(self._engine.close)

    async def drain(self) -> None:
        """Not ready from now on; wait, bounded, until running sequences are done."""
        self.is_draining = True
        deadline_s = self._monotonic() + self.config.drain_s
        while self.decode and self.decode.sequences_running and self._monotonic() < deadline_s:
            await asyncio.sleep(0.05)

    def authorize(self, request: Request, operation: Operation, body: bytes) -> Claims:
        """The claims of the caller's ticket, bound to this body. Raises Unauthorized."""
        now_s = self._wall_clock()
        ticket = ticket_of(request.headers.get("authorization"))
        claims = self.keys.verify(ticket, self.config.name, operation, now_s)
        if operation != "prefill" and claims.body_sha256 != (body_digest(body) if body else ""):
            raise Unauthorized("the ticket is for another body")
        self._replays.use(claims, now_s)
        return claims

    async def tokenize(self, request: TokenizeRequest) -> TokenizeReply:
        if (request.messages is None) == (request.text is None):
            raise InvalidRequest("send either messages or text", param="messages")
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, self._tokenize, request)

    def _tokenize(self, request: TokenizeRequest) -> TokenizeReply:
        vocabulary = self._vocabulary
        if request.messages is not None:
            if not request.messages:
                raise InvalidRequest("messages is empty: send at least one message", param="messages")
            text = vocabulary.render_chat([{"role": m.role, "content": m.content} for m in request.messages])
            # the template writes the special tokens itself
            ids = vocabulary.tokenize(text, add_special=False, parse_special=True)
        else:
            ids = vocabulary.tokenize(request.text or "", add_special=True, parse_special=True)
        return TokenizeReply(ids=ids, stop_ids=sorted(vocabulary.stop_ids))

    def status(self) -> WorkerStatus:
        facts, config = self.facts, self.config
        return WorkerStatus(
            worker=config.name,
            role=self.role,
            is_ready=self.is_ready,
            is_draining=self.is_draining,
            model=facts.model_name,
            model_sha256=facts.model_sha256,
            architecture=facts.architecture,
            quantization=facts.quantization,
            memory=facts.memory,
            n_ctx=facts.n_ctx,
            slots=facts.slots,
            chunk_tokens=facts.chunk_tokens,
            vocab_size=facts.vocab_size,
            kv_bytes_per_token=facts.kv_bytes_per_token,
            splits=facts.splits,
            split_reason=facts.split_reason,
            compatibility=facts.identity.compatibility,
            exactness_class=facts.identity.exactness_class,
            policy=facts.policy,
            level=facts.level,
            level_reason=facts.level_reason,
            version=edge_llm.__version__,
            pid=os.getpid(),
            build=facts.build,
            memory_bytes=facts.memory_bytes,
            load=self._load(),
        )

    def _load(self) -> Load:
        decode, prefill = self.decode, self.prefill
        slots_free = decode.slots_free if decode else 0
        token_s = decode.prompt_token_s if decode else prefill.prompt_token_s
        return Load(
            slots_free=slots_free,
            sequences_running=decode.sequences_running if decode else 0,
            sequences_waiting=prefill.waiting,
            pending_prompt_tokens=prefill.pending_tokens + (decode.pending_prompt_tokens if decode else 0),
            kv_cells_free=slots_free * self.facts.n_ctx,
            decode_step_s=decode.decode_step_s if decode else 0.0,
            prefill_tokens_per_s=1 / token_s if token_s else 0.0,
            widest_decode_rows=decode.widest_rows if decode else 0,
            prompts_met=prefill.prompts_met,
        )

    def _on_step(self, step: Step) -> None:
        self.prefill.on_step(step)
        if self.decode is not None:
            self.decode.on_step(step)

    def _on_engine_death(self, error: EngineFailed) -> None:
        self.prefill.on_death(error)
        if self.decode is not None:
            self.decode.on_death(error)
        self.on_death()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            for gateway in self.outboxes.expired():
                if self.decode is not None:
                    self.decode.drop_gateway(gateway)


def create_app(worker: Worker) -> FastAPI:
    """Routes only: each parses, calls one function, answers."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with worker.running():
            yield

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(EdgeLLMError)
    async def on_error(_request: Request, error: EdgeLLMError) -> Response:
        return error_reply(error)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> Response:
        return Response("ready" if worker.is_ready else "not ready", 200 if worker.is_ready else 503)

    @app.get("/status")
    async def status(request: Request) -> Response:
        worker.authorize(request, "status", b"")
        return _reply(worker.status())

    @app.get("/events")
    async def events(request: Request, gateway: str = "") -> Response:
        worker.authorize(request, "events", b"")
        if not 0 < len(gateway) <= 128:
            raise InvalidRequest("name the gateway: /events?gateway=NAME", param="gateway")
        return StreamingResponse(worker.outboxes.stream(gateway), media_type="application/x-ndjson")

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await read_body(request)
        worker.authorize(request, "tokenize", body)
        return _reply(await worker.tokenize(decode(TokenizeRequest, body)))

    @app.post("/decode")
    async def decode_route(request: Request) -> Response:
        body = await read_body(request)
        claims = worker.authorize(request, "decode", body)
        _refuse_when_draining(worker)
        if worker.decode is None:
            raise InvalidRequest(f"worker {worker.config.name} has role prefill and decodes nothing")
        worker.decode.accept(decode(DecodeRequest, body), claims)
        return _reply(DecodeReply(), 202)

    @app.post("/cancel")
    async def cancel(request: Request) -> Response:
        body = await read_body(request)
        worker.authorize(request, "cancel", body)
        message = decode(CancelRequest, body)
        found = worker.decode.cancel(message.request_id, message.epoch) if worker.decode else False
        return _reply(CancelReply(found=found))

    @app.post("/prefill")
    async def prefill(request: Request) -> Response:
        body = await read_body(request)
        claims = worker.authorize(request, "prefill", body)
        _refuse_when_draining(worker)
        message = decode(PrefillRequest, body)
        worker.prefill.check(message, claims)
        key = worker.keys.transfer_key(ticket_of(request.headers.get("authorization")))
        return StreamingResponse(_as_bytes(worker.prefill.stream(message, key)), media_type="application/octet-stream")

    return app


async def _as_bytes(parts: AsyncIterator[Buffer]) -> AsyncIterator[bytes | memoryview]:
    async for part in parts:
        yield bytes(part) if isinstance(part, bytearray) else part


def _refuse_when_draining(worker: Worker) -> None:
    if not worker.is_ready:
        raise Overloaded(f"worker {worker.config.name} is draining or its engine is gone", retry_after_s=2.0)


async def read_body(request: Request, limit: int = MAX_BODY_BYTES) -> bytes:
    """The whole body, refused as soon as it is too large."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > limit:
            raise PayloadTooLarge(f"the body is larger than {limit} bytes")
    return bytes(data)


def _reply(message: Message, status: int = 200) -> Response:
    return Response(encode(message), status, media_type="application/json")


def error_reply(error: EdgeLLMError) -> Response:
    """An error of our tree as the wire has it."""
    retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else None
    body = ErrorReply(code=error.code, message=error.message, param=error.param, retry_after_s=retry_after_s)
    return _reply(body, error.status)
