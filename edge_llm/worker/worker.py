"""A worker process from start to stop: the engine, the roles on it, what it says of itself, and its end.

Owns how the parts are put together, who is let in (`admit`) and the order of starting, draining and stopping. Refuses
to know routes (app.py), how prompts are computed (prefill.py) or adopted (decode.py) and who the gateways are.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

import structlog
from starlette.requests import Request

import edge_llm
from edge_llm.config import WorkerConfig
from edge_llm.engine.engine import Engine, EngineFacts, Step, Vocabulary
from edge_llm.errors import Draining, EngineFailed, Unauthorized
from edge_llm.exposition import Exposition
from edge_llm.worker.bodies import read_body
from edge_llm.worker.checkpoint import Keeper, RunningKV
from edge_llm.worker.decode import DecodeRole
from edge_llm.worker.holders import Holders
from edge_llm.worker.links import Links
from edge_llm.worker.loop import EngineLoop
from edge_llm.worker.messages import Load, Role, WorkerStatus
from edge_llm.worker.metrics import Readings, WorkerMetrics
from edge_llm.worker.offload import modest_threads
from edge_llm.worker.outbox import Outboxes
from edge_llm.worker.prefill import PrefillRole
from edge_llm.worker.prefixes import Prefixes
from edge_llm.worker.pull import PATIENCE, Patience, Puller
from edge_llm.worker.readings import board, rates
from edge_llm.worker.standing import Standing
from edge_llm.worker.tickets import Claims, KeyRing, Operation, ReplayGuard, body_digest, ticket_of
from edge_llm.worker.tokenizing import Tokenizer

_SWEEP_S: Final = 1.0
_DRAIN_POLL_S: Final = 0.05
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Admitted:
    """A call that was let in."""

    claims: Claims
    ticket: str
    body: bytes


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
        self._engine = engine
        self._wall_clock, self._monotonic, self._patience = wall_clock, monotonic, patience
        self._started_at = wall_clock()
        self.links = Links()
        self._replays = ReplayGuard()
        self.tokenizer = Tokenizer(vocabulary, config.name, lambda: self.facts.n_ctx)
        self.prefixes = Prefixes(engine.facts, config.prefix_cache_bytes)
        is_serialized = config.handoff == "serialized"
        self.prefill = PrefillRole(lambda: self.facts, self.prefixes, config.allowed_peers, monotonic, is_serialized)
        self.loop = EngineLoop(engine, self.prefill.watch, monotonic)
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

    def refuse_unless_ready(self) -> None:
        """Raises Draining or EngineFailed where new work cannot be taken."""
        if self.is_draining:
            raise Draining(f"worker {self.config.name} is draining")
        if not self.is_ready:
            raise EngineFailed(f"the engine of worker {self.config.name} is gone")

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
                    self.links,
                    self._monotonic,
                )
                self.standing.sequences = self.decode
                self.prefill.on_given = self.decode.given
                running = RunningKV(self.loop, lambda: self.facts, self.decode.adopting, self.decode.slot_of)
                self.prefill.read_running = running.read
            await self.tokenizer.warm()
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
        await self.tokenizer.close()
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
        """What the caller may do, and the body that says so: the ticket is verified before a byte of the body is read.
        Raises Unauthorized, PayloadTooLarge, Overloaded."""
        ticket = ticket_of(request.headers.get("authorization"))
        claims = self.keys.verify(ticket, self.config.name, operation, self._wall_clock())
        body = await read_body(request)
        # a prefill ticket is carried by a decode worker, whose body the gateway has not seen: the ids are bound
        # instead (PrefillRole.check)
        if operation != "prefill" and claims.body_sha256 != (body_digest(body) if body else ""):
            raise Unauthorized("the ticket is for another body")
        self._replays.use(claims, self._wall_clock())
        return Admitted(claims, ticket, body)

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
            if self.loop.is_stuck:
                log.error("the engine is stuck in a call: its sequences go on elsewhere, and this process ends")
                self.loop.abandon()
            for gateway in self.outboxes.expired():
                if self.decode is not None:
                    self.decode.drop_gateway(gateway)
