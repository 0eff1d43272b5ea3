"""Role prefill: compute a prompt for another worker and stream its KV while computing.

Life of a request in this role:
1. POST /prefill with a ticket whose digest binds the token ids; ids, compatibility and length are checked.
2. One prompt is computed at a time; one more may wait here (frames keep it alive), a third is refused (503), so that
   the decode worker tries its next candidate.
3. Header at once; after each chunk Progress, then Chunk; Progress reaches its total before the last Chunk leaves, so
   the receiver knows when computing ended. Every KEEP_ALIVE_S something is sent. End closes the stream.
4. A receiver that is slow fills the outbox (MAX_CHUNKS_OUT): the prompt is held, running streams are not.
5. It dies by: the receiver hanging up (aborted within one micro-batch), an engine error (Error frame), shutdown.

Owns the outbox and the turn-taking. Memory of one transfer is O(chunk).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final

import structlog

from edge_llm.engine.engine import EngineFacts, Failure, KVChunk, PromptProgress, ServedPrompt, Step
from edge_llm.errors import EdgeLLMError, IncompatibleKV, InvalidRequest, Overloaded, Unauthorized, WorkerError
from edge_llm.kv.frames import Buffer, Chunk, Error, FrameEncoder, Header, Progress
from edge_llm.kv.snapshot import ids_digest
from edge_llm.worker.loop import EngineLoop
from edge_llm.worker.messages import PrefillRequest
from edge_llm.worker.tickets import Claims

MAX_CHUNKS_OUT: Final = 2
MAX_WAITING: Final = 1
KEEP_ALIVE_S: Final = 2.0
# A MAC over this many bytes takes about a millisecond: longer ones leave the event loop.
_BIG_PAYLOAD: Final = 1 << 20
_SMOOTHING: Final = 0.1

log = structlog.get_logger()
_Item = KVChunk | PromptProgress | EdgeLLMError


@dataclass(slots=True)
class _Transfer:
    request_id: str
    outbox: asyncio.Queue[_Item] = field(default_factory=asyncio.Queue)
    chunks_out: int = 0
    done: int = 0


class PrefillRole:
    """All prompts served by this worker. `on_step` must be called with every step of the engine."""

    def __init__(self, loop: EngineLoop, facts: Callable[[], EngineFacts]) -> None:
        self._loop = loop
        self._facts_of = facts
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._current: _Transfer | None = None
        self.prompts_met = 0
        self.pending_tokens = 0
        self.prompt_token_s = 0.0

    @property
    def waiting(self) -> int:
        """Prompts that wait for their turn."""
        return self._waiting

    def check(self, request: PrefillRequest, claims: Claims) -> None:
        """Everything that can be refused before the first byte."""
        facts = self._facts_of()
        if claims.ids_sha256 != ids_digest(request.ids) or claims.request_id != request.request_id:
            raise Unauthorized("the ticket is for another prompt")
        if not facts.splits or not facts.serves_prompts:
            raise WorkerError(f"this worker ships no KV: {facts.split_reason or 'its role is decode'}")
        if request.compatibility != facts.identity.compatibility:
            raise IncompatibleKV("this worker runs another model, cache type or geometry")
        if request.start >= len(request.ids):
            raise InvalidRequest(f"start {request.start} is behind the prompt of {len(request.ids)} tokens")
        if self._turn.locked():
            if self._waiting >= MAX_WAITING:
                raise Overloaded("one prompt is being computed here and another waits", retry_after_s=1.0)
            self.prompts_met += 1

    async def stream(self, request: PrefillRequest, key: bytes) -> AsyncIterator[Buffer]:
        """The response body. Call `check` first; what fails from here on travels as an Error frame."""
        encoder, transfer = FrameEncoder(key), _Transfer(request.request_id)
        total = len(request.ids) - 1
        self.pending_tokens += total
        self._waiting += 1
        has_turn = False
        try:
            for part in encoder.send(self._header(request)):
                yield part
            while not (has_turn := await self._take_turn(transfer)):
                for part in encoder.send(Progress(0, total)):
                    yield part
            async for part in self._serve(request, transfer, encoder):
                yield part
        except EdgeLLMError as error:
            log.warning("prefill failed", request_id=request.request_id, code=error.code)
            for part in encoder.send(Error(error.code, error.message, error.is_retryable)):
                yield part
        finally:
            # also reached when the receiver hung up: then the engine is in the middle of the prompt
            self.pending_tokens -= total
            if has_turn:
                self._give_turn(transfer, is_complete=transfer.done == total)
            else:
                self._waiting -= 1

    def on_step(self, step: Step) -> None:
        """Put what a step made for the current prompt into its outbox; hold the prompt when that is full."""
        if step.prompt_tokens:
            token_s = step.prompt_s / step.prompt_tokens
            self.prompt_token_s += _SMOOTHING * (token_s - self.prompt_token_s) if self.prompt_token_s else token_s
        transfer = self._current
        if transfer is None:
            return
        # progress first: it tells the receiver that computing ended while the last chunk is on its way
        for progress in step.progress:
            if progress.request_id == transfer.request_id:
                transfer.outbox.put_nowait(progress)
        for chunk in step.chunks:
            if chunk.request_id == transfer.request_id:
                transfer.outbox.put_nowait(chunk)
                transfer.chunks_out += 1
        for failure in step.failures:
            self._fail(transfer, failure)
        if transfer.chunks_out >= MAX_CHUNKS_OUT:
            self._loop.post(lambda engine: engine.hold_served(True))

    def on_death(self, error: EdgeLLMError) -> None:
        if self._current is not None:
            self._current.outbox.put_nowait(error)

    def _fail(self, transfer: _Transfer, failure: Failure) -> None:
        if failure.request_id == transfer.request_id:
            transfer.outbox.put_nowait(failure.error)

    def _header(self, request: PrefillRequest) -> Header:
        facts = self._facts_of()
        return Header(
            compatibility=facts.identity.compatibility,
            exactness_class=facts.identity.exactness_class,
            v_layout=facts.v_layout,
            chunk_tokens=facts.chunk_tokens,
            n_tokens=len(request.ids) - 1,
            start=request.start,
            ids_sha256=ids_digest(request.ids),
            request_id=request.request_id,
        )

    async def _take_turn(self, transfer: _Transfer) -> bool:
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):
                await self._turn.acquire()
        except TimeoutError:
            return False
        self._waiting -= 1
        self._current = transfer
        return True

    def _give_turn(self, transfer: _Transfer, *, is_complete: bool) -> None:
        self._current = None
        self._turn.release()
        if not is_complete:
            self._loop.interrupt_with(lambda engine: engine.end_served(transfer.request_id))

    async def _serve(
        self, request: PrefillRequest, transfer: _Transfer, encoder: FrameEncoder
    ) -> AsyncIterator[Buffer]:
        prompt = ServedPrompt(request.request_id, tuple(request.ids), request.start)
        await self._loop.call(lambda engine: engine.serve(prompt))
        total, index = len(request.ids) - 1, 0
        shipped = request.start
        while shipped < total or transfer.done < total:
            item = await self._next(transfer, total)
            if isinstance(item, EdgeLLMError):
                raise item
            if isinstance(item, PromptProgress):
                transfer.done = item.done
                parts = encoder.send(Progress(item.done, total))
            else:
                chunk = Chunk(index, item.p0, item.p1, item.payload)
                is_big = len(item.payload) > _BIG_PAYLOAD
                parts = await asyncio.to_thread(encoder.send, chunk) if is_big else encoder.send(chunk)
                index, shipped = index + 1, item.p1
            for part in parts:
                yield part
            if isinstance(item, KVChunk):
                self._chunk_left(transfer)
        for part in encoder.end(total):
            yield part

    async def _next(self, transfer: _Transfer, total: int) -> _Item:
        """The next item, or a repeated progress when nothing happened for a while."""
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):
                return await transfer.outbox.get()
        except TimeoutError:
            return PromptProgress(transfer.request_id, transfer.done, total)

    def _chunk_left(self, transfer: _Transfer) -> None:
        transfer.chunks_out -= 1
        if transfer.chunks_out == MAX_CHUNKS_OUT - 1:
            self._loop.post(lambda engine: engine.hold_served(False))
