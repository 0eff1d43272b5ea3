"""The worker's HTTP: routes, tickets, limits, errors. Mounts role prefill, role decode or both on one engine.

Owns the edge: who may call what, how large a body may be, how errors look. `gate` runs before every route and denies by
default: the ticket is verified before a byte of the body is read; only PUBLIC paths need none. Refuses to know how
prompts are computed (prefill.py), adopted (decode.py) and who the gateways are.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final, get_args

import structlog
from fastapi import Depends, FastAPI, Request, Response
from starlette.exceptions import HTTPException

import edge_llm
from edge_llm.config import WorkerConfig
from edge_llm.engine.engine import Engine, EngineFacts, Step, Vocabulary
from edge_llm.errors import (
    ContextTooLong,
    Draining,
    EdgeLLMError,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    Unauthorized,
    WorkerError,
)
from edge_llm.exposition import CONTENT_TYPE, Exposition
from edge_llm.worker.bodies import error_reply, proven_reply_of, read_body, reply_of
from edge_llm.worker.checkpoint import Keeper, RunningKV
from edge_llm.worker.decode import DecodeRole
from edge_llm.worker.holders import Holders
from edge_llm.worker.links import Links
from edge_llm.worker.loop import EngineLoop
from edge_llm.worker.messages import (
    MAX_TOKENS_IN_MESSAGE,
    CancelReply,
    CancelRequest,
    DecodeReply,
    DecodeRequest,
    DrainRequest,
    KeepRequest,
    Load,
    PrefillRequest,
    Role,
    RoleRequest,
    TokenizeReply,
    TokenizeRequest,
    WorkerStatus,
    decode,
)
from edge_llm.worker.metrics import Readings, WorkerMetrics
from edge_llm.worker.offload import modest_threads
from edge_llm.worker.outbox import Outboxes
from edge_llm.worker.prefill import PrefillRole
from edge_llm.worker.prefixes import Prefixes
from edge_llm.worker.pull import PATIENCE, Patience, Puller
from edge_llm.worker.readings import board, rates
from edge_llm.worker.standing import Standing
from edge_llm.worker.stream import ClosingStream
from edge_llm.worker.tickets import Claims, KeyRing, Operation, ReplayGuard, body_digest, ticket_of

PUBLIC: Final = frozenset({"/healthz", "/readyz", "/metrics"})
_OPERATIONS: Final[Mapping[str, Operation]] = {f"/{operation}": operation for operation in get_args(Operation)}
MAX_TOKENIZING: Final = 64
NO_ROUTE: Final = "no ticket allows this route"
_SWEEP_S: Final = 1.0
_DRAIN_POLL_S: Final = 0.05
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
        patience: Patience = PATIENCE,
    ) -> None:
        self.config, self.keys = config, keys
        self._engine, self._vocabulary = engine, vocabulary
        self._wall_clock, self._monotonic, self._patience = wall_clock, monotonic, patience
        self._started_at = wall_clock()
        self.links = Links()
        self._replays = ReplayGuard()
        self._tokenizer = ThreadPoolExecutor(1, "tokenize")
        self._tokenizing = 0
        self.prefixes = Prefixes(engine.facts, config.prefix_cache_bytes)
        self.prefill = PrefillRole(lambda: self.facts, self.prefixes, config.allowed_peers, monotonic)
        self.loop = EngineLoop(engine, self.prefill.watch)
        self.exposition = Exposition(config.metrics_alias)
        self.metrics = WorkerMetrics(self.exposition.registry, Readings(self._labels, self.status, self._computing))
        self.outboxes = Outboxes(monotonic, config.gateway_lease_s, self.metrics.prompted)
        self.decode: DecodeRole | None = None
        self.keeper: Keeper | None = None
        self.standing = Standing(config.name, config.role, lambda: self.facts)
        self.on_death: Callable[[], None] = lambda: None

    @property
    def facts(self) -> EngineFacts:
        return self._engine.facts

    @property
    def role(self) -> Role:
        return self.standing.role

    @property
    def is_draining(self) -> bool:
        return self.standing.is_draining

    @property
    def is_ready(self) -> bool:
        return self.loop.is_alive and not self.is_draining

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start the engine thread and the sweeper; stop both."""
        asyncio.get_running_loop().set_default_executor(modest_threads())
        async with Puller(self._monotonic, self._patience, self.links) as puller:
            holders = self.prefill.holders = Holders(puller, self.keys, lambda: self.facts, self.links)
            self.keeper = Keeper(holders.pieces, self.prefixes, lambda: self.facts, self.config.allowed_peers)
            if self.facts.slots:
                self.decode = DecodeRole(
                    self.loop,
                    lambda: self.facts,
                    puller,
                    self.keys,
                    self.outboxes,
                    self.prefixes,
                    self.config.allowed_peers,
                    self.config.name,
                    self._monotonic,
                )
                self.standing.sequences = self.decode
                self.prefill.on_given = self.decode.given
                running = RunningKV(self.loop, lambda: self.facts, self.decode.adopting, self.decode.slot_of)
                self.prefill.read_running = running.read
            self.loop.start(self._on_step, self._on_engine_death)
            sweeper = asyncio.create_task(self._sweep(), name="sweeper")
            try:
                yield
            finally:
                sweeper.cancel()
                with suppress(asyncio.CancelledError):
                    await sweeper
                await self._stop()

    async def _stop(self) -> None:
        self.outboxes.close()
        await self.standing.close()
        if self.decode is not None:
            await self.decode.close()
        is_idle = await self.loop.stop()
        await asyncio.to_thread(self._tokenizer.shutdown, cancel_futures=True)
        if is_idle:
            await asyncio.to_thread(self._engine.close)
        else:
            log.error("the engine is stuck in a call; the process ends without freeing it")

    async def drain(self) -> None:
        """The end of this worker. Running sequences leave: the gateway is told, other workers fetch their KV from here.
        Waits, bounded, until all that is done and said."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.config.drain_s):
                await self.standing.end()
                while self._is_busy:  # noqa: ASYNC110 - once per process: no need for an event in every role
                    await asyncio.sleep(_DRAIN_POLL_S)
        self.outboxes.close()

    @property
    def _is_busy(self) -> bool:
        is_decoding = self.decode is not None and self.decode.sequences_running
        return bool(self.prefill.admitted or self.prefill.stored_out or is_decoding)

    async def admit(self, request: Request, operation: Operation) -> Admitted:
        """What the caller may do, and the body that says so. Raises Unauthorized, PayloadTooLarge, Overloaded."""
        ticket = ticket_of(request.headers.get("authorization"))
        claims = self.keys.verify(ticket, self.config.name, operation, self._wall_clock())
        body = await read_body(request)
        # a prefill ticket is carried by a decode worker, whose body the gateway has not seen: the ids are bound
        # instead (PrefillRole.check)
        if operation != "prefill" and claims.body_sha256 != (body_digest(body) if body else ""):
            raise Unauthorized("the ticket is for another body")
        self._replays.use(claims, self._wall_clock())
        return Admitted(claims, ticket, body)

    async def tokenize(self, request: TokenizeRequest) -> TokenizeReply:
        if (request.messages is None) == (request.text is None):
            raise InvalidRequest("send either messages or text", param="messages")
        if self._tokenizing >= MAX_TOKENIZING:
            raise Overloaded(f"{MAX_TOKENIZING} texts wait to be tokenized on worker {self.config.name}")
        self._tokenizing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._tokenizer, self._tokenize, request)
        finally:
            self._tokenizing -= 1

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
        if len(ids) > MAX_TOKENS_IN_MESSAGE:
            raise ContextTooLong(
                f"the prompt has {len(ids)} tokens, this worker's context {self.facts.n_ctx}", param="messages"
            )
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
            serves_prompts=facts.serves_prompts,
            started_at=self._started_at,
            board=board(),
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
            wide_decode_calls=decode.wide_calls if decode else 0,
            prompts_met=prefill.prompts_met,
            prefix_bytes=self.prefixes.used_bytes,
            prefix_limit_bytes=self.prefixes.limit_bytes,
            prefix_query_tokens=self.prefixes.query_tokens,
            prefix_hit_tokens=self.prefixes.hit_tokens,
            generated_tokens=self.metrics.generated_tokens,
            computed_tokens=self.metrics.computed_tokens,
            rates=rates(self._engine),
            links=self.links.published,
        )

    def _labels(self) -> tuple[str, str, str]:
        return self.facts.model_name, self.role, self.config.name

    def _computing(self) -> int:
        """Sequences here, and the prompt that is computed for another worker."""
        return (self.decode.sequences_running if self.decode else 0) + self.prefill.admitted - self.prefill.waiting

    def _on_step(self, step: Step) -> None:
        self.metrics.step(step)
        self.prefill.on_step(step)
        if self.decode is not None:
            self.decode.on_step(step)

    def _on_engine_death(self, error: EngineFailed) -> None:
        self.prefill.on_death(error)
        if self.decode is not None:
            self.decode.on_death(error)
        self.outboxes.close()
        self.on_death()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            for gateway in self.outboxes.expired():
                if self.decode is not None:
                    self.decode.drop_gateway(gateway)


@dataclass(frozen=True, slots=True)
class Admitted:
    """A call that `gate` let in."""

    claims: Claims
    ticket: str
    body: bytes


async def gate(request: Request) -> None:
    """Runs before every route of a worker. The operation a ticket must name is the route's own path."""
    if request.url.path in PUBLIC:
        return
    worker: Worker = request.app.state.worker
    operation = _OPERATIONS.get(request.url.path)
    if operation is None:
        raise Unauthorized(NO_ROUTE)
    admitted = request.state.admitted = await worker.admit(request, operation)
    if admitted.claims.request_id:
        structlog.contextvars.bind_contextvars(request_id=admitted.claims.request_id)


def _admitted(request: Request) -> Admitted:
    admitted: Admitted = request.state.admitted
    return admitted


def create_app(worker: Worker) -> FastAPI:
    """Routes only: each parses, calls one function, answers."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with worker.running():
            yield

    app = FastAPI(
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        dependencies=[Depends(gate)],
    )
    app.state.worker = worker

    @app.exception_handler(EdgeLLMError)
    async def on_error(_request: Request, error: EdgeLLMError) -> Response:
        return error_reply(error)

    @app.exception_handler(HTTPException)
    async def on_no_route(_request: Request, _error: HTTPException) -> Response:
        # `gate` runs only where a route matches: a path or method that has none is denied here, in the same words
        return error_reply(Unauthorized(NO_ROUTE))

    @app.exception_handler(Exception)
    async def on_bug(_request: Request, error: Exception) -> Response:
        return error_reply(WorkerError(f"worker {worker.config.name} failed: {type(error).__name__}; see its log"))

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> Response:
        return Response("ready" if worker.is_ready else "not ready", 200 if worker.is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(worker.exposition.text(), media_type=CONTENT_TYPE)

    @app.get("/status")
    async def status(request: Request) -> Response:
        return proven_reply_of(worker.status(), worker.keys, _admitted(request).ticket)

    @app.get("/events")
    async def events(gateway: str = "") -> Response:
        if not 0 < len(gateway) <= 128:
            raise InvalidRequest("name the gateway: /events?gateway=NAME", param="gateway")
        worker.outboxes.open(gateway)
        return ClosingStream(worker.outboxes.stream(gateway), "application/x-ndjson")

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return reply_of(await worker.tokenize(decode(TokenizeRequest, _admitted(request).body)))

    @app.post("/decode")
    async def decode_route(request: Request) -> Response:
        admitted = _admitted(request)
        _refuse_unless_ready(worker)
        if worker.decode is None:
            raise InvalidRequest(f"worker {worker.config.name} has role prefill and decodes nothing")
        worker.decode.accept(decode(DecodeRequest, admitted.body), admitted.claims)
        return reply_of(DecodeReply(), 202)

    @app.post("/cancel")
    async def cancel(request: Request) -> Response:
        message = decode(CancelRequest, _admitted(request).body)
        found = worker.decode.cancel(message.request_id, message.epoch) if worker.decode else False
        return reply_of(CancelReply(found=found))

    @app.post("/keep")
    async def keep(request: Request) -> Response:
        admitted = _admitted(request)
        _refuse_unless_ready(worker)
        assert worker.keeper is not None  # the app serves only while the worker runs
        return reply_of(await worker.keeper.keep(decode(KeepRequest, admitted.body), admitted.claims))

    @app.post("/drain")
    async def drain(request: Request) -> Response:
        is_begin = decode(DrainRequest, _admitted(request).body).is_draining
        (worker.standing.drain if is_begin else worker.standing.resume)()
        return reply_of(worker.status())

    @app.post("/role")
    async def role(request: Request) -> Response:
        worker.standing.take_role(decode(RoleRequest, _admitted(request).body).role)
        return reply_of(worker.status())

    @app.post("/prefill")
    async def prefill(request: Request) -> Response:
        admitted = _admitted(request)
        message = decode(PrefillRequest, admitted.body)
        if not message.only_stored:  # what is kept needs no engine, and a draining worker gives it away
            _refuse_unless_ready(worker)
        transfer = await worker.prefill.accept(message, admitted.claims)
        key = worker.keys.transfer_key(admitted.ticket)
        parts = worker.metrics.sent(worker.prefill.stream(transfer, key, worker.loop))
        return ClosingStream(parts, "application/octet-stream")

    return app


def _refuse_unless_ready(worker: Worker) -> None:
    if worker.is_draining:
        raise Draining(f"worker {worker.config.name} is draining")
    if not worker.is_ready:
        raise EngineFailed(f"the engine of worker {worker.config.name} is gone")
