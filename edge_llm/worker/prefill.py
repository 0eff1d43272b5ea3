"""Role prefill: compute a prompt for another worker and stream its KV while computing.

Life of a request in this role:
1. POST /prefill with a ticket whose digest binds the token ids; ids, compatibility and length are checked.
2. Header at once, then what is kept here of its beginning (worker/prefixes.py). A prompt that is kept whole ends here,
   and so does one that asked for nothing else (`only_stored`: with an Error when something is missing; `is_running`:
   out of a sequence that goes on here, worker/checkpoint.py).
3. The rest is computed, one prompt at a time; one more may wait here (frames keep it alive), a third is refused (503),
   so that the decode worker tries its next candidate. After each chunk Progress, then Chunk; Progress reaches its total
   before the last Chunk leaves, so the receiver knows when computing ended. Every HEARTBEAT_S something is sent. End
   closes the stream. What was computed is kept, also of a prompt that is given up.
4. A receiver that is slow fills the outbox: with MAX_CHUNKS_OUT chunks not yet sent the engine thread holds the
   prompt before its next step; running streams are not held. A worker set to `serialized` computes on and sends
   everything at the end, to show what overlapping saves: its memory is the prompt's KV.
5. It dies by: the receiver hanging up (aborted within one micro-batch), the receiver reading nothing for long
   (worker/stream.py), its deadline or an engine error (Error frame), shutdown.

A long next turn begins with what only its decode worker holds: that is fetched first (worker/holders.py), where it is
sooner than computing it again.

Owns the outbox and the turn-taking. Memory of one transfer is O(chunk), and a copy of the kept beginning while the
engine takes it. What runs on the engine thread says so.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from itertools import count
from typing import Final

import structlog

from edge_llm.engine.batch import smoothed
from edge_llm.engine.engine import Engine, EngineFacts, KVChunk, PromptProgress, ServedPrompt, Step
from edge_llm.errors import (
    ContextTooLong,
    DeadlinePassed,
    EdgeLLMError,
    IncompatibleKV,
    InvalidRequest,
    Overloaded,
    PrefillFailed,
    RestoreRefused,
    Unauthorized,
    WorkerError,
)
from edge_llm.kv.codec import StateBlob
from edge_llm.kv.frames import Buffer, Chunk, Error, FrameEncoder, Header, Progress
from edge_llm.kv.snapshot import ids_digest
from edge_llm.kv.store import Match, Piece
from edge_llm.worker.holders import Holders
from edge_llm.worker.loop import EngineLoop
from edge_llm.worker.messages import HEARTBEAT_S, PrefillRequest
from edge_llm.worker.offload import off_loop
from edge_llm.worker.prefixes import Prefixes, state_of
from edge_llm.worker.pull import check_address
from edge_llm.worker.tickets import Claims
from edge_llm.worker.transfer import Item, Transfer

MAX_CHUNKS_OUT: Final = 2
SENT_AT_ONCE: Final = 1 << 20
MAX_ADMITTED: Final = 2  # one computes, one waits
MAX_STORED: Final = 16  # transfers at once of what is kept: they hold references, no engine
MAX_RUNNING: Final = 1  # of them, those of a running sequence: they hold a copy

log = structlog.get_logger()


class PrefillRole:
    """All prompts served by this worker. `on_step` must be called with every step of the engine, `watch` as well."""

    def __init__(
        self,
        facts: Callable[[], EngineFacts],
        prefixes: Prefixes,
        allowed_peers: tuple[str, ...],
        clock: Callable[[], float],
        is_serialized: bool = False,
    ) -> None:
        self._facts_of, self._prefixes, self._allowed_peers, self._clock = facts, prefixes, allowed_peers, clock
        self._is_serialized = is_serialized
        self.holders: Holders | None = None
        self.read_running: Callable[[PrefillRequest], Awaitable[Match]] | None = None
        self.on_given: Callable[[str], None] = lambda request_id: None
        self._turn = asyncio.Lock()
        self._numbers = count()
        self._current: Transfer | None = None
        self._serving: Transfer | None = None  # the engine thread's view of it
        self.admitted = 0
        self.stored_out = self.running_out = 0
        self.prompts_met = 0
        self.pending_tokens = 0
        self.prompt_token_s = 0.0

    @property
    def waiting(self) -> int:
        """Prompts that wait for their turn."""
        return max(0, self.admitted - 1)

    async def accept(self, request: PrefillRequest, claims: Claims) -> Transfer:
        """Everything that can be refused before the first byte; `stream` the transfer next."""
        self._check(request, claims)
        known = await self._match(request)
        deadline_s = self._clock() + request.time_left_s if request.time_left_s else math.inf
        transfer = Transfer(request, f"{request.request_id}#{next(self._numbers)}", known, deadline_s)
        self._check_room(transfer)
        transfer.sent = request.start
        transfer.kept = self._prefixes.chain(request.tenant) if request.cache_prompt else None
        return transfer

    async def _match(self, request: PrefillRequest) -> Match:
        if not (request.cache_prompt or request.only_stored):
            return Match()
        end = request.end or len(request.ids) - 1
        is_moving, counts = request.only_stored, not request.is_running
        return await self._prefixes.match(request.tenant, request.ids[:end], is_moving=is_moving, counts=counts)

    def _check(self, request: PrefillRequest, claims: Claims) -> None:
        facts = self._facts_of()
        if len(request.ids) - 1 > facts.n_ctx:
            raise ContextTooLong(f"the prompt has {len(request.ids)} tokens, this worker's context {facts.n_ctx}")
        bound = (claims.ids_sha256, claims.request_id, claims.tenant)
        if bound != (ids_digest(request.ids), request.request_id, request.tenant):
            raise Unauthorized("the ticket is for another prompt")
        if not facts.splits or not (facts.serves_prompts or request.only_stored):
            raise WorkerError(f"this worker ships no KV: {facts.split_reason or 'its role is decode'}")
        if request.compatibility != facts.identity.compatibility:
            raise IncompatibleKV("this worker runs another model, cache type or geometry")
        if request.start >= len(request.ids) or request.end >= len(request.ids):
            raise InvalidRequest(
                f"positions {request.start} to {request.end} are behind the prompt of {len(request.ids)} tokens"
            )
        if request.is_running and (not request.only_stored or request.end):
            raise InvalidRequest("of a running sequence all is given that is stored, and nothing is computed")
        if request.end and not (request.only_stored and request.start < request.end):
            raise InvalidRequest(f"positions {request.start} to {request.end} are no part of what may be kept here")
        self._check_holder(request, claims)
        if max(request.ids) >= facts.vocab_size:
            raise InvalidRequest(f"token id {max(request.ids)} is outside the vocabulary of {facts.vocab_size}")

    async def stream(
        self, transfer: Transfer, key: bytes, loop: EngineLoop
    ) -> AsyncGenerator[bytes | memoryview, None]:
        """The response body of an accepted transfer; what fails from here on travels as an Error frame."""
        encoder, request = FrameEncoder(key), transfer.request
        try:
            for part in _wire(encoder.send(self._header(transfer))):
                yield part
            async with aclosing(self._parts(transfer, encoder, loop)) as parts:
                async for part in parts:
                    yield part
        except EdgeLLMError as error:
            log.warning("prefill failed", request_id=request.request_id, code=error.code, message=error.message)
            for part in _wire(encoder.send(Error(error.code, error.message, error.is_retryable))):
                yield part

    def on_step(self, step: Step) -> None:
        """Put what a step made for the current prompt into its outbox."""
        if step.prompt_tokens:
            self.prompt_token_s = smoothed(self.prompt_token_s, step.prompt_s / step.prompt_tokens)
        transfer = self._current
        if transfer is None:
            return
        # progress first: it tells the receiver that computing ended while the last chunk is on its way
        items: list[PromptProgress | KVChunk] = [*step.progress, *step.chunks]
        for item in items:
            if item.request_id == transfer.served_id:
                transfer.outbox.put_nowait(item)
        for failure in step.failures:
            if failure.request_id == transfer.served_id:
                transfer.outbox.put_nowait(failure.error)

    def watch(self, engine: Engine, step: Step) -> None:
        """Engine thread, after each step: back-pressure takes effect before the next piece is computed."""
        transfer = self._serving
        if transfer is None or not step.chunks:
            return
        transfer.chunks_out += sum(chunk.request_id == transfer.served_id for chunk in step.chunks)
        if transfer.chunks_out >= MAX_CHUNKS_OUT:
            engine.hold_served(True)

    def on_death(self, error: EdgeLLMError) -> None:
        if self._current is not None:
            self._current.outbox.put_nowait(error)

    # -- coming and going

    def _check_holder(self, request: PrefillRequest, claims: Claims) -> None:
        """Addresses come out of signed tickets, and lie where peers may be."""
        holder = request.holder
        if holder is None:
            return
        if claims.peers.get(holder.worker) != holder.address:
            raise Unauthorized(f"the ticket does not name holder {holder.worker} at that address")
        check_address(holder.address, self._allowed_peers)

    def _check_room(self, transfer: Transfer) -> None:
        if transfer.needs_no_engine:
            if self.stored_out >= MAX_STORED:
                raise Overloaded(f"{MAX_STORED} stored prompts are on their way already", retry_after_s=1.0)
            if transfer.request.is_running and self.running_out >= MAX_RUNNING:
                raise Overloaded("another checkpoint is on its way already", retry_after_s=1.0)
        elif self.admitted >= MAX_ADMITTED:
            raise Overloaded("one prompt is being computed here and another waits", retry_after_s=1.0)

    async def _parts(
        self, transfer: Transfer, encoder: FrameEncoder, loop: EngineLoop
    ) -> AsyncGenerator[bytes | memoryview, None]:
        """What is kept, then what must be computed."""
        # again, because several may have been accepted before the first of them got here
        self._check_room(transfer)
        if transfer.needs_no_engine:
            async with aclosing(self._send_stored(transfer, encoder)) as parts:
                async for part in parts:
                    yield part
            return
        self._admit(transfer)
        try:
            while not await self._take_turn(transfer):
                for part in _wire(encoder.send(Progress(0, transfer.total))):
                    yield part
            async with aclosing(self._serve(transfer, encoder, loop)) as parts:
                async for part in parts:
                    yield part
        finally:
            # also reached when the receiver hung up: then the engine is in the middle of the prompt
            self._leave(transfer, loop)

    async def _send_stored(self, transfer: Transfer, encoder: FrameEncoder) -> AsyncGenerator[bytes | memoryview, None]:
        """Nothing is computed: all there is, and an Error when that is not all."""
        is_running = transfer.request.is_running
        self.stored_out, self.running_out = self.stored_out + 1, self.running_out + is_running
        try:
            if is_running and not transfer.is_known_whole and self.read_running is not None:
                reading = asyncio.ensure_future(self.read_running(transfer.request))
                async with aclosing(self._alive(reading, transfer, encoder)) as parts:
                    async for part in parts:
                        yield part
                transfer.known = reading.result()
            transfer.done = transfer.known.n_tokens
            for part in _wire(encoder.send(Progress(transfer.done, transfer.total))):
                yield part
            for piece in transfer.known.pieces:
                for part in await self._send_piece(transfer, encoder, piece):
                    yield part
            if not transfer.is_known_whole:
                raise PrefillFailed(f"{transfer.done} of {transfer.total} positions are kept here, the rest is gone")
            for part in _wire(encoder.end(transfer.total)):
                yield part
            if not is_running:
                self.on_given(transfer.request.request_id)
        finally:
            self.stored_out, self.running_out = self.stored_out - 1, self.running_out - is_running

    async def _alive(
        self, work: asyncio.Future[Match] | asyncio.Task[None], transfer: Transfer, encoder: FrameEncoder
    ) -> AsyncGenerator[bytes | memoryview, None]:
        """Frames that keep a transfer alive until `work` is done. Closing this ends it."""
        try:
            while not (await asyncio.wait({work}, timeout=HEARTBEAT_S))[0]:
                self._check_deadline(transfer)
                for part in _wire(encoder.send(Progress(0, transfer.total))):
                    yield part
            await work
        finally:
            work.cancel()

    def _admit(self, transfer: Transfer) -> None:
        self.prompts_met += self.admitted > 0
        self.admitted += 1
        transfer.admitted_tokens = transfer.missing
        self.pending_tokens += transfer.admitted_tokens

    def _leave(self, transfer: Transfer, loop: EngineLoop) -> None:
        self.admitted -= 1
        self.pending_tokens -= transfer.admitted_tokens
        if not transfer.has_turn:
            return
        self._current = None
        self._turn.release()
        if transfer.done < transfer.total:
            # the next prompt's letter is posted after this one, so the engine is free when it reads it
            loop.interrupt_with(lambda engine: engine.end_served(transfer.served_id))
        loop.post(lambda engine: self._forget(transfer))
        log.info(
            "prompt served" if transfer.done == transfer.total else "prompt given up",
            request_id=transfer.request.request_id,
            tokens=transfer.done,
            of=transfer.total,
        )

    async def _take_turn(self, transfer: Transfer) -> bool:
        self._check_deadline(transfer)
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                await self._turn.acquire()
        except TimeoutError:
            return False
        transfer.has_turn = True
        self._current = transfer
        return True

    def _check_deadline(self, transfer: Transfer) -> None:
        if self._clock() > transfer.deadline_s:
            raise DeadlinePassed("nobody waits for this prompt any more: its deadline has passed")

    def _header(self, transfer: Transfer) -> Header:
        facts, request = self._facts_of(), transfer.request
        return Header(
            compatibility=facts.identity.compatibility,
            exactness_class=facts.identity.exactness_class,
            v_layout=facts.v_layout,
            chunk_tokens=facts.chunk_tokens,
            n_tokens=transfer.total,
            start=request.start,
            ids_sha256=ids_digest(request.ids),
            request_id=request.request_id,
            stored=transfer.known.n_tokens,
        )

    # -- one prompt

    async def _serve(
        self, transfer: Transfer, encoder: FrameEncoder, loop: EngineLoop
    ) -> AsyncGenerator[bytes | memoryview, None]:
        starting = asyncio.create_task(self._start(transfer, loop), name=f"start {transfer.served_id}")
        async with aclosing(self._alive(starting, transfer, encoder)) as parts:
            async for part in parts:
                yield part
        for piece in transfer.known.pieces:
            transfer.keep(piece)
            for part in await self._send_piece(transfer, encoder, piece):
                yield part
        waiting: list[Piece] = []
        while transfer.sent < transfer.total or transfer.done < transfer.total:
            self._check_deadline(transfer)
            item = await self._next(transfer)
            if isinstance(item, EdgeLLMError):
                raise item
            if isinstance(item, PromptProgress):
                transfer.done = item.done
                for part in _wire(encoder.send(Progress(item.done, transfer.total))):
                    yield part
                continue
            waiting.append(Piece(item.p0, item.p1, item.payload))
            transfer.keep(waiting[-1])
            if transfer.done == transfer.total or not self._is_serialized:
                for piece in waiting:
                    for part in await self._send_piece(transfer, encoder, piece):
                        yield part
                waiting.clear()
            loop.post(lambda engine: self._chunk_left(engine, transfer))
        for part in _wire(encoder.end(transfer.total)):
            yield part
        if transfer.kept is not None:
            transfer.kept.finish()

    async def _send_piece(self, transfer: Transfer, encoder: FrameEncoder, piece: Piece) -> list[bytes | memoryview]:
        """The frame of a piece, or of the part of it that the receiver does not have."""
        p0 = max(piece.p0, transfer.sent)
        if p0 >= piece.p1:
            return []
        missing = await self._prefixes.tail_of(piece, p0)
        chunk = Chunk(transfer.chunks_sent, p0, piece.p1, missing.payload)
        transfer.chunks_sent, transfer.sent = transfer.chunks_sent + 1, piece.p1
        return _wire(await off_loop(len(missing.payload), lambda: encoder.send(chunk)))

    async def _next(self, transfer: Transfer) -> Item:
        """The next item, or a repeated progress when nothing happened for a while."""
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                return await transfer.outbox.get()
        except TimeoutError:
            return PromptProgress(transfer.served_id, transfer.done, transfer.total)

    async def _start(self, transfer: Transfer, loop: EngineLoop) -> None:
        """Hand the prompt to the engine, behind what is kept of it; all of it when the engine does not take that."""
        layout = self._facts_of().prompt_layout
        if transfer.request.cache_prompt:
            transfer.known = await self._match(transfer.request)  # the one before may have left more of it
        if transfer.is_known_whole:
            transfer.known = Match(transfer.known.pieces[:-1])  # the engine's part ends a transfer: leave it some
        if self.holders is not None:
            transfer.known = await self.holders.extend(transfer.request, transfer.known, self.prompt_token_s)
        state = await state_of(transfer.known, layout) if layout is not None else None
        try:
            await loop.call(lambda engine: self._serve_on(engine, transfer, state))
        except RestoreRefused as error:
            log.warning("restore refused", request_id=transfer.request.request_id, message=error.message)
            transfer.known = Match()
            await loop.call(lambda engine: self._serve_on(engine, transfer, None))

    def _serve_on(self, engine: Engine, transfer: Transfer, state: StateBlob | None) -> None:
        """Engine thread. Everything that is computed comes out, also what the receiver has: it is kept here."""
        prompt = ServedPrompt(transfer.served_id, tuple(transfer.request.ids), transfer.known.n_tokens)
        engine.serve(prompt, state)
        self._serving = transfer

    def _forget(self, transfer: Transfer) -> None:
        """Engine thread: hold nothing of a transfer that is over."""
        if self._serving is transfer:
            self._serving = None

    def _chunk_left(self, engine: Engine, transfer: Transfer) -> None:
        """Engine thread."""
        transfer.chunks_out -= 1
        if transfer is self._serving and transfer.chunks_out < MAX_CHUNKS_OUT:
            engine.hold_served(False)


def _wire(parts: Iterable[Buffer]) -> list[bytes | memoryview]:
    """In pieces that a slow way takes within the time that a send may take (stream.py): it counts anew for each."""
    views = [memoryview(bytes(part) if isinstance(part, bytearray) else part).cast("B") for part in parts]
    return [view[at : at + SENT_AT_ONCE] for view in views for at in range(0, view.nbytes, SENT_AT_ONCE)]
