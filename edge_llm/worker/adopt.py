"""Obtaining a prompt's KV from prefill workers: candidates in order, chunks into place, what is missing computed here.

Owns the order of fallbacks, the bytes reserved for snapshots and the report of how a prompt came to be. Refuses to know
slots, gateways and the engine thread.

Order: a candidate that fails is followed by the next one, which ships only what is missing but must compute from the
start; when more than half is already here, or nobody is left, the rest is computed here. Chunks that arrived stay:
they were authenticated one by one. KV of another model is never placed, so it leaves nothing to undo.

Invariants: bytes of a snapshot are reserved before its first chunk; a snapshot holds positions [0, filled_to) of
exactly the ids of its request; all times are readings of one monotonic clock.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import structlog

from edge_llm.engine.engine import EngineFacts
from edge_llm.errors import EdgeLLMError, IncompatibleKV, WorkerSilent
from edge_llm.kv.codec import Bytes, StateBlob
from edge_llm.kv.frames import Chunk, End, Error, Header, Progress
from edge_llm.kv.snapshot import Identity, VLayout, check_compatible, ids_digest
from edge_llm.kv.store import Match
from edge_llm.worker.client import error_of
from edge_llm.worker.messages import ErrorReply, Mode, PrefillCandidate, PrefillRequest, PromptReport, Trouble
from edge_llm.worker.offload import off_loop
from edge_llm.worker.prefixes import place, state_of
from edge_llm.worker.pull import Expected, Puller
from edge_llm.worker.tickets import KeyRing

log = structlog.get_logger()


@dataclass(slots=True)
class PromptRecord:
    """How the prompt of one sequence comes to be, while it does. `_s` fields are clock readings, 0: not yet."""

    accepted_s: float
    mode: Mode = "local"
    prefill_worker: str = ""
    first_frame_s: float = 0.0
    computed_s: float = 0.0
    arrived_s: float = 0.0
    adopt_s: float = 0.0
    handoff_bytes: int = 0
    overlapped_bytes: int = 0
    restored_tokens: int = 0
    cached_tokens: int = 0
    prefill_cached_tokens: int = 0
    is_same_class: bool = True
    fallback: str | None = None
    trouble: Trouble = ""
    troubled: list[str] = field(default_factory=list)

    def failed(self, worker: str, error: EdgeLLMError) -> None:
        """A prefill worker did not give it."""
        if isinstance(error, IncompatibleKV):
            self.trouble = "mismatch"
        elif isinstance(error, WorkerSilent):
            self.trouble = "timeout"
        else:
            return
        self.troubled.append(worker)

    def refused(self, reason: str) -> None:
        """The engine did not take the snapshot: everything is computed here after all."""
        self.mode, self.fallback, self.is_same_class, self.cached_tokens = "local", reason, True, 0

    def on_local_progress(self, done: int, total: int, step_s: float, now_s: float) -> None:
        """A step with `step_s` of prompt work has ended: its turn came that long before the end of the first."""
        self.first_frame_s = self.first_frame_s or max(self.accepted_s, now_s - step_s)
        if done == total:
            self.computed_s = now_s

    def report(self, total: int, own_name: str, now_s: float) -> PromptReport:
        """The message; its docstring says what each figure means."""
        first_s = self.first_frame_s or now_s
        computed_s = max(self.computed_s or now_s, first_s)
        is_split = self.mode == "split"
        return PromptReport(
            mode=self.mode,
            prefill_worker=self.prefill_worker if is_split else own_name,
            wait_ms=1e3 * (first_s - self.accepted_s),
            prefill_ms=1e3 * (computed_s - first_s),
            handoff_ms=1e3 * (max(0.0, self.arrived_s - computed_s) + self.adopt_s) if is_split else 0.0,
            adopt_ms=1e3 * self.adopt_s,
            handoff_bytes=self.handoff_bytes,
            overlapped_bytes=self.overlapped_bytes,
            restored_tokens=self.restored_tokens,
            computed_tokens=total - self.restored_tokens,
            is_same_class=self.is_same_class,
            cached_tokens=self.cached_tokens,
            prefill_cached_tokens=self.prefill_cached_tokens if is_split else 0,
            fallback=self.fallback,
            trouble=self.trouble,
            troubled=self.troubled,
        )


@dataclass(frozen=True, slots=True)
class Wanted:
    """A prompt to be fetched: KV of ids[:-1], the beginning `known` here, the rest from one of the candidates.
    `on_progress(done, total)` hears of it; `time_left_s` says how long anybody waits for it (0: no deadline)."""

    request_id: str
    ids: tuple[int, ...]
    candidates: tuple[PrefillCandidate, ...]
    on_progress: Callable[[int, int], None] = field(repr=False)
    known: Match = field(default_factory=Match)
    tenant: str = ""
    cache_prompt: bool = True
    holder: PrefillCandidate | None = None
    must_split: bool = False
    time_left_s: Callable[[], float] = field(default=lambda: 0.0, repr=False)

    @property
    def total(self) -> int:
        return len(self.ids) - 1


class ByteBudget:
    """At most `limit` bytes of snapshots at once; a single larger one may pass alone. First come, first served."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def used_bytes(self) -> int:
        return self._used

    def has_room(self, size: int) -> bool:
        """Whether `reserved` would not wait now."""
        return not self._waiting and self._fits(size)

    @asynccontextmanager
    async def reserved(self, size: int, patience_s: float | None = None) -> AsyncIterator[bool]:
        """Wait for room, at most `patience_s`, and hold it for the block. Gives whether there is some. Nothing to
        reserve never waits."""
        if size:
            try:
                async with asyncio.timeout(patience_s):
                    await self._take(size)
            except TimeoutError:
                yield False
                return
        try:
            yield True
        finally:
            self._used -= size
            self._wake()

    async def _take(self, size: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = (size, turn)
        self._waiting.append(place)
        self._wake()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._used -= size  # granted in the moment of cancellation
            elif place in self._waiting:
                self._waiting.remove(place)
            self._wake()
            raise

    def _wake(self) -> None:
        while self._waiting and (self._waiting[0][1].done() or self._fits(self._waiting[0][0])):
            size, turn = self._waiting.popleft()
            if not turn.done():  # else who waited was cancelled, and has not run since
                self._used += size
                turn.set_result(None)

    def _fits(self, size: int) -> bool:
        return not self._used or self._used + size <= self._limit


class Spare:
    """The memory of one snapshot, kept for the next one: to get as much anew takes the kernel longer than to fill it,
    and running streams wait meanwhile. A single one, so that it is within what the memory sum counts for adoption."""

    def __init__(self) -> None:
        self._memory: Bytes | None = None

    def take(self) -> Bytes | None:
        """It belongs to the caller then; what is too small is not kept beside something larger."""
        memory, self._memory = self._memory, None
        return memory

    def give(self, memory: Bytes) -> None:
        """Nobody may look at it any more."""
        if self._memory is None or len(memory) > len(self._memory):
            self._memory = memory


class Adopter:
    """Fetches prompts for one decode worker. `spare`: where snapshots go when the engine has them."""

    def __init__(
        self,
        puller: Puller,
        keys: KeyRing,
        facts: Callable[[], EngineFacts],
        clock: Callable[[], float],
    ) -> None:
        self._puller, self._keys, self._facts, self._clock = puller, keys, facts, clock
        self.spare = Spare()

    async def fetch(self, wanted: Wanted, record: PromptRecord) -> StateBlob | None:
        """The snapshot: what is known here and what arrived; None when that is nothing."""
        if wanted.total < 1:
            return None
        layout = self._facts().layout
        if layout is None:
            if wanted.candidates:
                record.fallback = f"computed unsplit: {self._facts().split_reason}"
            return None
        if wanted.must_split and wanted.candidates and wanted.known.n_tokens == wanted.total:
            wanted = replace(wanted, known=Match(wanted.known.pieces[:-1]))  # something has to be asked for
        record.cached_tokens = wanted.known.n_tokens
        if not wanted.candidates or self._is_soon_done(wanted):
            return await state_of(wanted.known, layout)
        size, memory = layout.size(wanted.total), self.spare.take()
        snapshot = await off_loop(size, partial(StateBlob, layout, wanted.total, 0, memory))
        del memory  # it is the snapshot's, or was too small
        await place(wanted.known, snapshot)
        reasons = await self._ask_in_turn(wanted, record, snapshot)
        if not snapshot.is_complete:
            reasons.append(f"{wanted.total - snapshot.filled_to} tokens were computed here")
        if reasons:
            record.fallback = "; ".join(reasons)
        if snapshot.is_complete or not snapshot.filled_to:
            return snapshot if snapshot.filled_to else None
        # here, not on the engine thread, where it would make running streams wait
        await off_loop(size, snapshot.cut_short)
        return snapshot

    def _is_soon_done(self, wanted: Wanted) -> bool:
        """A next turn: only this worker holds what it generated, and what is new is no more than a chunk. A prefill
        worker would compute the answer again before it came to that."""
        is_short = 0 < wanted.known.n_tokens >= wanted.total - self._facts().chunk_tokens
        return is_short and not wanted.must_split

    async def _ask_in_turn(self, wanted: Wanted, record: PromptRecord, snapshot: StateBlob) -> list[str]:
        """Ask candidates until the snapshot is complete or nobody is worth asking; say what went wrong."""
        reasons: list[str] = []
        for candidate in wanted.candidates:
            if reasons and snapshot.filled_to * 2 > wanted.total:
                break  # another one would compute from the start what is mostly here
            try:
                await self._ask(candidate, wanted, record, snapshot)
                break
            except EdgeLLMError as error:  # whatever a candidate says is no reason to fail the request
                log.warning(
                    "prefill candidate failed",
                    request_id=wanted.request_id,
                    worker=candidate.worker,
                    code=error.code,
                    message=error.message,
                    tokens=snapshot.filled_to,
                )
                record.failed(candidate.worker, error)
                reasons.append(f"{candidate.worker}: {error.code} after {snapshot.filled_to} of {wanted.total} tokens")
        return reasons

    def _may_begin_here(self, candidate: PrefillCandidate, wanted: Wanted) -> bool:
        """Whether the candidate may fetch from this worker what is kept here of the beginning, and read the rest. One
        that only gives what it has stored fetches nothing, and its ticket names no holder."""
        return bool(wanted.known.n_tokens) and self._facts().level == "exact" and not candidate.only_stored

    async def _ask(
        self, candidate: PrefillCandidate, wanted: Wanted, record: PromptRecord, snapshot: StateBlob
    ) -> None:
        facts = self._facts()
        request = PrefillRequest(
            request_id=wanted.request_id,
            ids=list(wanted.ids),
            start=snapshot.filled_to,
            compatibility=facts.identity.compatibility,
            tenant=wanted.tenant,
            cache_prompt=wanted.cache_prompt,
            only_stored=candidate.only_stored,
            holder=wanted.holder if self._may_begin_here(candidate, wanted) else None,
            time_left_s=wanted.time_left_s(),
        )
        expected = Expected(
            facts.kv_bytes_per_token,
            facts.chunk_tokens,
            wanted.total,
            request.start,
            ids_digest(wanted.ids),
            snapshot.layout.geometry,
        )
        key = self._keys.transfer_key(candidate.ticket)
        is_same_class, v_layout = True, facts.v_layout
        async with aclosing(self._puller.pull(candidate, request, key, expected)) as events:
            async for event in events:
                match event:
                    case Header():
                        is_same_class = self._check_identity(event)
                        v_layout = event.v_layout
                        record.prefill_cached_tokens = event.stored
                        record.first_frame_s = record.first_frame_s or self._clock()
                    case Chunk():
                        await self._place(event, v_layout, snapshot)
                        record.mode, record.prefill_worker = "split", candidate.worker
                        record.is_same_class &= is_same_class
                        record.handoff_bytes += len(event.payload)
                        record.arrived_s = self._clock()
                    case Progress():
                        if event.done == event.total:
                            record.computed_s, record.overlapped_bytes = self._clock(), record.handoff_bytes
                        wanted.on_progress(event.done, wanted.total)
                    case Error():
                        raise error_of(ErrorReply(code=event.code, message=event.message), candidate.worker)
                    case End():
                        return
                del event  # a chunk that was put away must not stay beside the next one

    async def _place(self, chunk: Chunk, v_layout: VLayout, snapshot: StateBlob) -> None:
        await off_loop(len(chunk.payload), lambda: snapshot.place(chunk.p0, chunk.p1, chunk.payload, v_layout))

    def _check_identity(self, header: Header) -> bool:
        ours = self._facts().identity
        return check_compatible(ours, Identity(header.compatibility, header.exactness_class))
