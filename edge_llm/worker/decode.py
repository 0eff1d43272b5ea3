"""Role decode: adopt a prompt's KV, or compute it here, then generate in the running batch.

Life of a request in this role:
1. POST /decode with a ticket over the body: the slot and its cells are claimed before anything is fetched (202), or
   the request is refused (no slot: 503, does not fit: 400).
2. With prefill candidates: bytes for the snapshot are reserved, then it is pulled chunk by chunk into place. A
   candidate that fails is followed by the next, from the first missing position on.
3. No candidate is left: the chunks that arrived stay, the rest of the prompt is computed here. KV of another model
   or a refused restore: all of it is computed here.
4. The engine decodes; every step's tokens leave in one line per gateway. `prompted` precedes the first token.
5. It ends with a finish reason, /cancel, a newer epoch of the same request, an engine error (`failed`), or because
   its gateway was gone for `gateway_lease_s`.

Owns slots, sequences and the fallback order. Slots are given lowest first (llama.cpp splits batches with holes).
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import aiohttp
import structlog

from edge_llm.engine.engine import EngineFacts, Step
from edge_llm.errors import (
    ContextTooLong,
    EdgeLLMError,
    InvalidRequest,
    Overloaded,
    ProtocolError,
    RestoreRefused,
    Unauthorized,
    WorkerError,
)
from edge_llm.kv.codec import StateBlob
from edge_llm.kv.frames import Chunk, End, Error, Header, Progress
from edge_llm.kv.snapshot import Identity, check_compatible, ids_digest
from edge_llm.request import Generation, SamplingParams
from edge_llm.worker import messages
from edge_llm.worker.loop import EngineLoop
from edge_llm.worker.messages import DecodeRequest, PrefillCandidate, PrefillRequest, PromptReport
from edge_llm.worker.outbox import Outboxes
from edge_llm.worker.pull import Expected, check_address, pull
from edge_llm.worker.tickets import Claims, KeyRing

log = structlog.get_logger()
_SMOOTHING: Final = 0.1


@dataclass(slots=True)
class _Prompt:
    """How the prompt of one sequence comes to be; becomes a PromptReport."""

    accepted_s: float
    mode: messages.Mode = "local"
    prefill_worker: str = ""
    first_frame_s: float = 0.0
    computed_s: float = 0.0
    arrived_s: float = 0.0
    adopt_s: float = 0.0
    handoff_bytes: int = 0
    overlapped_bytes: int = 0
    restored_tokens: int = 0
    is_same_class: bool = True
    fallback: str | None = None


@dataclass(slots=True)
class _Running:
    """A sequence that holds a slot, from claim to release."""

    request: DecodeRequest
    generation: Generation
    slot: int
    prompt: _Prompt
    is_in_engine: bool = False
    is_prompted: bool = False
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def request_id(self) -> str:
        return self.generation.request_id


class DecodeRole:
    """All sequences of this worker. `on_step` must be called with every step of the engine."""

    def __init__(
        self,
        loop: EngineLoop,
        facts: Callable[[], EngineFacts],
        session: aiohttp.ClientSession,
        keys: KeyRing,
        outboxes: Outboxes,
        allowed_peers: tuple[str, ...],
        name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop, self._facts, self._session, self._keys = loop, facts, session, keys
        self._outboxes, self._allowed_peers, self._name, self._clock = outboxes, allowed_peers, name, clock
        self._free = list(range(facts().slots))
        self._running: dict[str, _Running] = {}
        self._adopting = _ByteBudget(max(1, facts().n_ctx * facts().kv_bytes_per_token))
        self.decode_step_s = 0.0
        self.prompt_token_s = 0.0
        self.widest_rows = 0

    @property
    def slots_free(self) -> int:
        return len(self._free)

    @property
    def sequences_running(self) -> int:
        return len(self._running)

    @property
    def pending_prompt_tokens(self) -> int:
        """Tokens of local prompts that are not computed yet."""
        waiting = (running for running in self._running.values() if not running.is_prompted)
        return sum(len(running.generation.context_ids) for running in waiting if not running.request.candidates)

    def accept(self, request: DecodeRequest, claims: Claims) -> None:
        """Claim a slot and start; raises what the caller must be told instead of 202."""
        generation = _generation(request)
        facts = self._facts()
        if generation.cells > facts.n_ctx:
            raise ContextTooLong(
                f"the prompt has {len(generation.prompt_ids)} tokens and max_tokens is {generation.max_tokens}: "
                f"together more than this worker's context of {facts.n_ctx}",
                param="max_tokens",
            )
        for candidate in request.candidates:
            if claims.peers.get(candidate.worker) != candidate.address:
                raise Unauthorized(f"the ticket does not name prefill worker {candidate.worker} at that address")
            check_address(candidate.address, self._allowed_peers)
        self._replace_older(request)
        if not self._free:
            raise Overloaded(f"all {facts.slots} slots of worker {self._name} are taken")
        running = _Running(request, generation, heapq.heappop(self._free), _Prompt(self._clock()))
        self._running[request.request_id] = running
        running.task = asyncio.create_task(self._run(running), name=f"decode {request.request_id}")

    def cancel(self, request_id: str, epoch: int) -> bool:
        """Free what a request holds, within one micro-batch. False: nothing of that epoch or older runs here."""
        running = self._running.get(request_id)
        if running is None or running.request.epoch > epoch:
            return False
        self._drop(running)
        return True

    def drop_gateway(self, gateway: str) -> None:
        """Free everything of a gateway that is gone."""
        for running in [running for running in self._running.values() if running.request.gateway == gateway]:
            log.info("gateway gone, sequence dropped", request_id=running.request_id, gateway=gateway)
            self._drop(running)

    def on_step(self, step: Step) -> None:
        """Deliver one step: prompts that became whole, tokens, failures."""
        if step.decoded_rows:
            self.widest_rows = max(self.widest_rows, step.decoded_rows)
            self.decode_step_s += (
                _SMOOTHING * (step.decode_s - self.decode_step_s) if self.decode_step_s else step.decode_s
            )
        if step.prompt_tokens:
            token_s = step.prompt_s / step.prompt_tokens
            self.prompt_token_s += _SMOOTHING * (token_s - self.prompt_token_s) if self.prompt_token_s else token_s
        for progress in step.progress:
            self._on_progress(progress.request_id, progress.done, progress.total, step.prompt_s)
        for event in step.events:
            running = self._running.get(event.request_id)
            if running is None or running.request.epoch != event.epoch:
                continue
            if not running.is_prompted:
                self._report(running)
            self._outboxes.add_token(running.request.gateway, event)
            if event.finish_reason is not None:
                self._release(running)
        for failure in step.failures:
            if (running := self._running.get(failure.request_id)) is not None:
                self._fail(running, failure.error)
        self._outboxes.flush()

    def on_death(self, error: EdgeLLMError) -> None:
        for running in list(self._running.values()):
            self._fail(running, error)
        self._outboxes.flush()

    # -- one sequence

    async def _run(self, running: _Running) -> None:
        """Top of a sequence's task: obtain the prompt, hand the sequence to the engine."""
        try:
            async with self._adopting.reserved(self._snapshot_bytes(running)):
                snapshot = await self._pull_prompt(running)
                await self._begin(running, snapshot)
        except EdgeLLMError as error:
            self._fail(running, error)
        except Exception as error:  # top of the task
            log.error("sequence failed", request_id=running.request_id, error=repr(error), exc_info=True)
            self._fail(running, WorkerError(f"worker {self._name} failed: {error!r}"))
        self._outboxes.flush()

    def _snapshot_bytes(self, running: _Running) -> int:
        tokens = len(running.generation.context_ids) - 1
        return tokens * self._facts().kv_bytes_per_token if running.request.candidates else 0

    async def _pull_prompt(self, running: _Running) -> StateBlob | None:
        """The snapshot, as far as it arrived; None when nothing usable did."""
        facts, tokens = self._facts(), len(running.generation.context_ids) - 1
        if not running.request.candidates or tokens < 1:
            return None
        if facts.layout is None:
            running.prompt.fallback = f"computed unsplit: {facts.split_reason}"
            return None
        snapshot = StateBlob(facts.layout, tokens, running.slot)
        reasons: list[str] = []
        for candidate in running.request.candidates:
            try:
                await self._pull_from(candidate, running, snapshot)
                break
            except (WorkerError, ProtocolError, Overloaded, Unauthorized) as error:
                log.warning(
                    "prefill candidate failed", request_id=running.request_id, worker=candidate.worker, code=error.code
                )
                reasons.append(f"{candidate.worker}: {error.code} after {snapshot.filled_to} of {tokens} tokens")
        if not snapshot.is_complete:
            reasons.append("the rest was computed here")
        if reasons:
            running.prompt.fallback = "; ".join(reasons)
        return snapshot if snapshot.filled_to else None

    async def _pull_from(self, candidate: PrefillCandidate, running: _Running, snapshot: StateBlob) -> None:
        facts, ids, prompt = self._facts(), running.generation.context_ids, running.prompt
        start = snapshot.filled_to
        request = PrefillRequest(
            request_id=running.request_id, ids=list(ids), start=start, compatibility=facts.identity.compatibility
        )
        expected = Expected(facts.kv_bytes_per_token, snapshot.n_tokens, start, ids_digest(ids))
        key = self._keys.transfer_key(candidate.ticket)
        v_layout = facts.v_layout
        async for event in pull(self._session, candidate, request, key, expected):
            match event:
                case Header():
                    prompt.is_same_class &= self._check_identity(event)
                    v_layout = event.v_layout
                    prompt.first_frame_s = prompt.first_frame_s or self._clock()
                case Chunk():
                    snapshot.place(event.p0, event.p1, event.payload, v_layout)
                    prompt.mode, prompt.prefill_worker = "split", candidate.worker
                    prompt.handoff_bytes += len(event.payload)
                    prompt.arrived_s = self._clock()
                case Progress():
                    if event.done == event.total:
                        prompt.computed_s, prompt.overlapped_bytes = self._clock(), prompt.handoff_bytes
                    self._outboxes.add_progress(running.request.gateway, running.generation, event.done, event.total)
                case Error():
                    raise WorkerError(f"prefill worker {candidate.worker}: {event.message}")
                case End():
                    return

    def _check_identity(self, header: Header) -> bool:
        ours = self._facts().identity
        return check_compatible(ours, Identity(header.compatibility, header.exactness_class))

    async def _begin(self, running: _Running, snapshot: StateBlob | None) -> None:
        """Hand over to the engine; a refused restore is computed here instead."""
        prompt, started_s = running.prompt, self._clock()
        try:
            restored = await self._enter(running, snapshot)
        except RestoreRefused as error:
            log.warning("restore refused", request_id=running.request_id, message=error.message)
            prompt.fallback, prompt.mode = f"{error.code}: computed here", "local"
            restored = await self._enter(running, None)
        prompt.adopt_s = self._clock() - started_s
        prompt.restored_tokens = restored
        if restored == len(running.generation.context_ids) - 1:
            self._report(running)

    async def _enter(self, running: _Running, snapshot: StateBlob | None) -> int:
        # set before the call: a cancellation that comes while the letter waits must still empty the slot
        running.is_in_engine = True
        return await self._loop.call(lambda engine: engine.begin(running.slot, running.generation, snapshot))

    # -- what leaves

    def _on_progress(self, request_id: str, done: int, total: int, call_s: float) -> None:
        """A local prompt advanced by a call of `call_s`."""
        running = self._running.get(request_id)
        if running is None or not running.is_in_engine:
            return
        self._outboxes.add_progress(running.request.gateway, running.generation, done, total)
        prompt = running.prompt
        prompt.first_frame_s = prompt.first_frame_s or max(prompt.accepted_s, self._clock() - call_s)
        if done == total:
            prompt.computed_s = self._clock()

    def _report(self, running: _Running) -> None:
        if running.is_prompted:
            return
        running.is_prompted = True
        p, now_s = running.prompt, self._clock()
        total = len(running.generation.context_ids) - 1
        first_s = p.first_frame_s or now_s
        computed_s = max(p.computed_s or now_s, first_s)
        is_split = p.mode == "split"
        report = PromptReport(
            mode=p.mode,
            prefill_worker=p.prefill_worker if is_split else self._name,
            wait_ms=1e3 * (first_s - p.accepted_s),
            prefill_ms=1e3 * (computed_s - first_s),
            handoff_ms=1e3 * (max(0.0, p.arrived_s - computed_s) + p.adopt_s) if is_split else 0.0,
            adopt_ms=1e3 * p.adopt_s,
            handoff_bytes=p.handoff_bytes,
            overlapped_bytes=p.overlapped_bytes,
            restored_tokens=p.restored_tokens,
            computed_tokens=total - p.restored_tokens,
            is_same_class=p.is_same_class,
            fallback=p.fallback,
        )
        self._outboxes.add_prompted(running.request.gateway, running.generation, report)

    def _fail(self, running: _Running, error: EdgeLLMError) -> None:
        if self._running.get(running.request_id) is running:
            self._outboxes.add_failed(running.request.gateway, running.generation, error)
            self._drop(running)

    def _replace_older(self, request: DecodeRequest) -> None:
        """A newer epoch of a request takes the place of an older one; the same or an older epoch is refused."""
        running = self._running.get(request.request_id)
        if running is None:
            return
        if running.request.epoch >= request.epoch:
            raise InvalidRequest(f"request {request.request_id} already runs here in epoch {running.request.epoch}")
        self._drop(running)

    def _drop(self, running: _Running) -> None:
        """Forget a sequence now; its slot comes back when the engine has emptied it."""
        if self._running.get(running.request_id) is not running:
            return
        del self._running[running.request_id]
        if running.task is not None and running.task is not asyncio.current_task():
            running.task.cancel()
        if not running.is_in_engine:
            heapq.heappush(self._free, running.slot)
            return
        emptied = self._loop.interrupt_with(lambda engine: engine.end(running.slot))
        asyncio.wrap_future(emptied).add_done_callback(lambda future: self._free_slot(future, running.slot))

    def _free_slot(self, future: asyncio.Future[None], slot: int) -> None:
        if not future.cancelled() and future.exception() is None:
            heapq.heappush(self._free, slot)

    def _release(self, running: _Running) -> None:
        """The engine has already freed the slot of a finished answer."""
        if self._running.pop(running.request_id, None) is not None:
            heapq.heappush(self._free, running.slot)


class _ByteBudget:
    """At most `limit` bytes of snapshots at once; a single larger one may pass alone. First come, first served."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._changed = asyncio.Condition()

    def reserved(self, size: int) -> _Reservation:
        return _Reservation(self, size)

    async def take(self, size: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._used or self._used + size <= self._limit)
            self._used += size

    async def give(self, size: int) -> None:
        async with self._changed:
            self._used -= size
            self._changed.notify_all()


@dataclass(slots=True)
class _Reservation:
    budget: _ByteBudget
    size: int

    async def __aenter__(self) -> None:
        await self.budget.take(self.size)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.shield(self.budget.give(self.size))


def _generation(request: DecodeRequest) -> Generation:
    """The engine's words for a message; bounds that the message type cannot say are checked by those classes."""
    s = request.sampling
    try:
        bias = {int(token): value for token, value in s.logit_bias.items()}
    except ValueError as error:
        raise InvalidRequest("logit_bias keys are token ids", param="logit_bias") from error
    sampling = SamplingParams(
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        repeat_penalty=s.repeat_penalty,
        frequency_penalty=s.frequency_penalty,
        presence_penalty=s.presence_penalty,
        penalty_last_n=s.penalty_last_n,
        seed=int(s.seed),
        logit_bias=bias,
    )
    return Generation(
        request_id=request.request_id,
        epoch=request.epoch,
        prompt_ids=tuple(request.prompt_ids),
        max_tokens=request.max_tokens,
        sampling=sampling,
        stop=tuple(request.stop),
        stop_ids=frozenset(request.stop_ids),
        delivered_ids=tuple(request.delivered_ids),
    )
