"""Role decode: adopt a prompt's KV, or compute it here, then generate in the running batch.

Life of a request in this role:
1. POST /decode with a ticket over the body: the slot and its cells are claimed before anything is fetched (202), or
   the request is refused (no slot: 503, does not fit: 400).
2. What is kept here of its beginning is taken (worker/prefixes.py). With prefill candidates: bytes for the snapshot are
   reserved, then the rest is pulled chunk by chunk into place (worker/adopt.py, with all that can go wrong there).
3. What did not arrive is computed here. A refused restore: all of it is computed here.
4. The engine decodes; every step's tokens leave in one line per gateway. `prompted` precedes the first token.
5. It ends with a finish reason (its KV is kept for a next turn), /cancel, its deadline, a newer epoch of the same
   request, an engine error (`failed`), or because its gateway was gone for `gateway_lease_s`.
6. A draining worker stops it at some token, keeps its KV and says `failed` with code `draining`: the gateway plans it
   elsewhere, and that worker fetches the KV from here (worker/handover.py; kv-handoff: moving a running sequence).

Owns slots and sequences. Slots are given lowest first (llama.cpp splits batches with holes). A slot is free as soon as
its `end` is posted: mail is read in order, so the next `begin` finds it empty.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import structlog

from edge_llm import trace
from edge_llm.engine.batch import smoothed
from edge_llm.engine.engine import Engine, EngineFacts, Failure, KeptKV, PromptProgress, Step
from edge_llm.errors import (
    ContextTooLong,
    DeadlinePassed,
    Draining,
    EdgeLLMError,
    InvalidRequest,
    Overloaded,
    RestoreRefused,
    Unauthorized,
    WorkerError,
)
from edge_llm.kv.codec import StateBlob
from edge_llm.kv.store import Match
from edge_llm.request import Generation, TokenEvent
from edge_llm.words import counted
from edge_llm.worker.adopt import Adopter, ByteBudget, PromptRecord, Wanted
from edge_llm.worker.generation import generation_of
from edge_llm.worker.handover import Leases
from edge_llm.worker.links import Links
from edge_llm.worker.loop import EngineLoop
from edge_llm.worker.messages import WIDE_ROWS, DecodeRequest
from edge_llm.worker.outbox import Outboxes
from edge_llm.worker.prefixes import Prefixes
from edge_llm.worker.pull import Puller, check_address
from edge_llm.worker.tickets import Claims, KeyRing

# So long a prompt waits for memory to take its KV in, which one that hangs elsewhere may hold; then it is read here.
ADOPTION_WAIT_S: Final = 60.0
log = structlog.get_logger()


@dataclass(slots=True)
class _Running:
    """A sequence that holds a slot, from claim to release. `is_begun` is set on the engine thread."""

    request: DecodeRequest
    generation: Generation
    slot: int
    prompt: PromptRecord
    is_posted: bool = False
    is_begun: bool = False
    is_prompted: bool = False
    traced: Mapping[str, str] = field(default_factory=trace.headers)
    task: asyncio.Task[None] | None = field(default=None, repr=False)
    alarm: asyncio.TimerHandle | None = field(default=None, repr=False)

    @property
    def request_id(self) -> str:
        return self.generation.request_id

    @property
    def prompt_tokens(self) -> int:
        """Positions that need KV before decoding."""
        return len(self.generation.prompt_ids) + len(self.generation.delivered_ids) - 1


class DecodeRole:
    """All sequences of this worker. `on_step` must be called with every step of the engine."""

    def __init__(
        self,
        loop: EngineLoop,
        facts: Callable[[], EngineFacts],
        puller: Puller,
        keys: KeyRing,
        outboxes: Outboxes,
        prefixes: Prefixes,
        allowed_peers: tuple[str, ...],
        name: str,
        links: Links,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop, self._facts, self._outboxes, self._prefixes = loop, facts, outboxes, prefixes
        self._allowed_peers, self._name, self._clock = allowed_peers, name, clock
        self._adopter = Adopter(puller, keys, facts, clock)
        self._free = list(range(facts().slots))
        self._running: dict[str, _Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._leases = Leases(links, clock)
        self.adopting = ByteBudget(max(1, facts().n_ctx * facts().kv_bytes_per_token))
        self.decode_step_s = 0.0
        self.prompt_token_s = 0.0
        self.widest_rows = self.wide_calls = 0

    def slot_of(self, request_id: str, tenant: str) -> int | None:
        """Of a tenant's running sequence with KV of this worker's class that others may keep, if there is one yet."""
        running = self._running.get(request_id)
        if running is None or not (running.is_begun and running.prompt.is_same_class):
            return None
        return running.slot if running.request.cache_prompt and running.request.tenant == tenant else None

    @property
    def slots_free(self) -> int:
        return len(self._free)

    @property
    def sequences_running(self) -> int:
        return len(self._running)

    @property
    def pending_prompt_tokens(self) -> int:
        """Tokens of prompts that are to be computed here and are not."""
        waiting = (running for running in self._running.values() if not running.is_prompted)
        return sum(r.prompt_tokens for r in waiting if r.is_begun or not r.request.candidates)

    def accept(self, request: DecodeRequest, claims: Claims) -> None:
        """Claim a slot and start; raises what the caller must be told instead of 202."""
        generation = generation_of(request)
        self._check(request, generation, claims)
        self._outboxes.open(request.gateway)
        self._replace_older(request)
        if not self._free:
            raise Overloaded(f"worker {self._name} has {counted(self._facts().slots, 'slot')}, and none is free")
        running = _Running(request, generation, heapq.heappop(self._free), PromptRecord(self._clock()))
        self._running[request.request_id] = running
        running.task = asyncio.create_task(self._run(running), name=f"decode {request.request_id}")
        self._tasks.add(running.task)
        running.task.add_done_callback(self._tasks.discard)
        if request.time_left_s:
            running.alarm = asyncio.get_running_loop().call_later(request.time_left_s, self._on_deadline, running)
        log.info(
            "accepted",
            request_id=request.request_id,
            epoch=request.epoch,
            slot=running.slot,
            prompt_tokens=len(generation.context_ids),
            candidates=[candidate.worker for candidate in request.candidates],
        )

    def cancel(self, request_id: str, epoch: int) -> bool:
        """Free what a request holds, within one micro-batch. False: nothing of that epoch or older runs here."""
        running = self._running.get(request_id)
        if running is None or running.request.epoch > epoch:
            return False
        log.info("cancelled", request_id=request_id, epoch=epoch, **running.traced)
        self._drop(running)
        return True

    def drop_gateway(self, gateway: str) -> None:
        """Free everything of a gateway that is gone."""
        for running in [running for running in self._running.values() if running.request.gateway == gateway]:
            log.warning("gateway gone, sequence dropped", request_id=running.request_id, gateway=gateway)
            self._drop(running)

    def on_step(self, step: Step) -> None:
        """Deliver one step: prompts that became whole, tokens, failures."""
        self._measure(step)
        for kept in step.kept:
            self._keep(kept)
        for progress in step.progress:
            self._on_progress(progress, step.prompt_s)
        for event in step.events:
            running = self._of(event)
            if running is None:
                continue
            self._report(running)
            self._outboxes.add_token(running.request.gateway, event)
            if event.finish_reason is not None:
                ending = {"tokens": event.index + 1, "finish_reason": event.finish_reason}
                log.info("finished", request_id=event.request_id, **ending, **running.traced)
                self._release(running)
        for failure in step.failures:
            running = self._of(failure)
            if running is not None and running.is_begun:
                self._fail(running, failure.error)
        self._outboxes.flush()

    def _of(self, made: TokenEvent | PromptProgress | Failure | KeptKV) -> _Running | None:
        """The sequence that something was made for. A step may be heard of after a newer epoch took its place."""
        running = self._running.get(made.request_id)
        return running if running is not None and running.request.epoch == made.epoch else None

    def on_death(self, error: EdgeLLMError) -> None:
        for running in list(self._running.values()):
            self._fail(running, error)
        self._outboxes.flush()

    async def hand_over(self, goes_on: Callable[[], bool] = lambda: True) -> None:
        """Stop all sequences, while it `goes_on`, and let the gateway plan them elsewhere. Their KV stays here until
        another worker has it, or its lease is over. One after the other: each needs a copy in host memory."""
        self._leases.begin()
        while self._running and goes_on():
            running = next(iter(self._running.values()))
            if self._leaves_kv(running):
                await self._leases.wait(self._prefixes.limit_bytes - self._kv_bytes(running), goes_on)
            if goes_on() and self._running.get(running.request_id) is running:
                await self._move_away(running)
        await self._leases.wait(0, goes_on)

    def given(self, request_id: str) -> None:
        """Another worker has fetched what was kept of this request."""
        self._leases.given(request_id)

    async def _move_away(self, running: _Running) -> None:
        if running.is_begun:
            try:
                kept = await self._loop.call(lambda engine: _take(engine, running.slot))
                if self._leaves_kv(running):
                    prompt_tokens = len(running.generation.prompt_ids)
                    await self._prefixes.keep_answer(running.request.tenant, prompt_tokens, kept, is_moving=True)
                    if self._running.get(running.request_id) is running:  # else nobody is told, and nobody comes for it
                        self._leases.hold(running.request_id, len(kept.ids) * self._facts().kv_bytes_per_token)
            except Exception as error:  # no memory for a copy, perhaps: the request goes on elsewhere all the same
                log.warning("KV stays here", request_id=running.request_id, error=repr(error), exc_info=True)
        self._fail(running, Draining(f"worker {self._name} is draining"))
        self._outboxes.flush()

    def _leaves_kv(self, running: _Running) -> bool:
        return running.is_begun and running.prompt.is_same_class and self._prefixes.limit_bytes > 0

    def _kv_bytes(self, running: _Running) -> int:
        return running.generation.cells * self._facts().kv_bytes_per_token

    async def close(self) -> None:
        """Drop everything and wait until no task of this role is left."""
        for running in list(self._running.values()):
            self._fail(running, WorkerError(f"worker {self._name} is stopping"))
        self._outboxes.flush()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- one sequence

    async def _run(self, running: _Running) -> None:
        """Top of a sequence's task: obtain the prompt, hand the sequence to the engine."""
        try:
            known = await self._known(running)
            size = self._snapshot_bytes(running, known)
            if is_waiting := not self.adopting.has_room(size):
                known = Match()  # held while it waits, what is evicted meanwhile would stay in memory
            async with self.adopting.reserved(size, ADOPTION_WAIT_S) as has_room:
                snapshot = None
                if has_room:
                    known = await self._known(running, counts=False) if is_waiting else known
                    snapshot = await self._adopter.fetch(self._wanted(running, known), running.prompt)
                else:
                    running.prompt.refused(f"computed here: there was no memory for its KV for {ADOPTION_WAIT_S:.0f} s")
                await self._begin(running, snapshot)
                if snapshot is not None:
                    self._adopter.spare.give(snapshot.memory)
        except EdgeLLMError as error:
            self._fail(running, error)
        except Exception as error:  # top of the task
            log.error("sequence failed", request_id=running.request_id, error=repr(error), exc_info=True)
            self._fail(running, WorkerError(f"worker {self._name} failed: {error!r}"))
        self._outboxes.flush()

    async def _known(self, running: _Running, *, counts: bool = True) -> Match:
        if not running.request.cache_prompt:
            return Match()
        ids = running.generation.context_ids[:-1]
        return await self._prefixes.match(running.request.tenant, ids, counts=counts)

    def _snapshot_bytes(self, running: _Running, known: Match) -> int:
        layout = self._facts().layout
        positions = running.prompt_tokens if running.request.candidates else known.n_tokens
        return layout.size(positions) if layout is not None and positions else 0

    def _wanted(self, running: _Running, known: Match) -> Wanted:
        def on_progress(done: int, total: int) -> None:
            self._outboxes.add_progress(running.request.gateway, running.generation, done, total)
            self._outboxes.flush()

        generation, request, alarm = running.generation, running.request, running.alarm
        clock = asyncio.get_running_loop().time
        return Wanted(
            generation.request_id,
            generation.context_ids,
            tuple(request.candidates),
            on_progress,
            known,
            request.tenant,
            request.cache_prompt,
            request.holder,
            request.must_split,
            lambda: max(0.001, alarm.when() - clock()) if alarm is not None else 0.0,
        )

    async def _begin(self, running: _Running, snapshot: StateBlob | None) -> None:
        """Hand over to the engine; a refused restore is computed here instead."""
        try:
            await self._enter(running, snapshot)
        except RestoreRefused as error:
            log.warning("restore refused", request_id=running.request_id, message=error.message)
            running.prompt.refused(f"{error.code}: computed here")
            await self._enter(running, None)
        if running.prompt.restored_tokens == running.prompt_tokens:
            self._report(running)

    async def _enter(self, running: _Running, snapshot: StateBlob | None) -> None:
        posted_s = self._clock()
        # set before the call: a cancellation that comes while the letter waits must still empty the slot
        running.is_posted = True
        is_kept = running.request.cache_prompt and running.prompt.is_same_class
        is_kept = is_kept and self._prefixes.holds_answer(running.generation.cells)
        keeps_kv = self._prefixes.has_time if is_kept else None

        def begin(engine: Engine) -> None:
            # noted here, because the first token may be delivered before the caller's task runs again
            running.prompt.restored_tokens = engine.begin(running.slot, running.generation, snapshot, keeps_kv=keeps_kv)
            running.prompt.adopt_s = self._clock() - posted_s if snapshot is not None else 0.0
            running.is_begun = True

        await self._loop.call(begin)

    # -- what leaves

    def _measure(self, step: Step) -> None:
        if step.decoded_rows:
            self.widest_rows = max(self.widest_rows, step.widest_call)
            self.wide_calls += step.widest_call >= WIDE_ROWS
            self.decode_step_s = smoothed(self.decode_step_s, step.decode_s)
        if step.prompt_tokens:
            self.prompt_token_s = smoothed(self.prompt_token_s, step.prompt_s / step.prompt_tokens)

    def _on_progress(self, progress: PromptProgress, prompt_s: float) -> None:
        running = self._of(progress)
        if running is None or not running.is_begun:
            return
        self._outboxes.add_progress(running.request.gateway, running.generation, progress.done, progress.total)
        running.prompt.on_local_progress(progress.done, progress.total, prompt_s, self._clock())
        if progress.done == progress.total:
            self._report(running)

    def _report(self, running: _Running) -> None:
        if running.is_prompted or self._running.get(running.request_id) is not running:
            return
        running.is_prompted = True
        report = running.prompt.report(running.prompt_tokens, self._name, self._clock())
        self._outboxes.add_prompted(running.request.gateway, running.generation, report)

    def _keep(self, kept: KeptKV) -> None:
        """For a next turn. The copy is made beside the event loop, and tokens do not wait for it."""
        running = self._of(kept)
        if running is None:
            return
        prompt_tokens = len(running.generation.prompt_ids)
        task = asyncio.create_task(
            self._prefixes.keep_answer(running.request.tenant, prompt_tokens, kept), name=f"keep {kept.request_id}"
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_deadline(self, running: _Running) -> None:
        self._fail(running, DeadlinePassed("the deadline of this request has passed"))
        self._outboxes.flush()

    def _fail(self, running: _Running, error: EdgeLLMError) -> None:
        if self._running.get(running.request_id) is running:
            said = {"code": error.code, "message": error.message}
            log.warning("failed", request_id=running.request_id, **said, **running.traced)
            self._outboxes.add_failed(running.request.gateway, running.generation, error)
            self._drop(running)

    # -- slots

    def _check(self, request: DecodeRequest, generation: Generation, claims: Claims) -> None:
        facts = self._facts()
        if generation.cells > facts.n_ctx:
            raise ContextTooLong(
                f"the prompt has {len(generation.prompt_ids)} tokens and max_tokens is {generation.max_tokens}: "
                f"together more than this worker's context of {facts.n_ctx}",
                param="max_tokens",
            )
        worst = max(generation.context_ids)
        if worst >= facts.vocab_size:
            raise InvalidRequest(f"token id {worst} is outside the vocabulary of {facts.vocab_size}", param="prompt")
        for candidate in request.candidates:
            if claims.peers.get(candidate.worker) != candidate.address:
                raise Unauthorized(f"the ticket does not name prefill worker {candidate.worker} at that address")
            check_address(candidate.address, self._allowed_peers)

    def _replace_older(self, request: DecodeRequest) -> None:
        """A newer epoch of a request takes the place of an older one; the same or an older epoch is refused."""
        running = self._running.get(request.request_id)
        if running is None:
            return
        if running.request.epoch >= request.epoch:
            raise InvalidRequest(f"request {request.request_id} already runs here in epoch {running.request.epoch}")
        self._drop(running)

    def _drop(self, running: _Running) -> None:
        """Forget a sequence now and end it in the engine."""
        if self._running.get(running.request_id) is not running:
            return
        if running.task is not None and running.task is not asyncio.current_task():
            running.task.cancel()
        if running.is_posted:
            self._loop.interrupt_with(lambda engine: engine.end(running.slot))
        self._release(running)

    def _release(self, running: _Running) -> None:
        if running.alarm is not None:
            running.alarm.cancel()
        del self._running[running.request_id]
        heapq.heappush(self._free, running.slot)


def _take(engine: Engine, slot: int) -> KeptKV:
    """Engine thread: stop a running sequence here; its KV, and the ids that it belongs to."""
    try:
        return engine.export(slot)
    finally:
        engine.end(slot)
