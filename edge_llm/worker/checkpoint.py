"""Checkpoints: KV of a sequence that generates elsewhere is kept here, so that its worker may die.

The gateway tells a worker to keep a sequence as far as it is (POST /keep); that worker fetches from where the sequence
runs what it does not have yet, and keeps it like any prompt (kv/store.py). When the running worker dies, the prompt of
the plan that follows begins with what is kept: what came after the last checkpoint is all that is computed again.

Owns both ends: what is fetched and kept here, and what is read out of a sequence that runs here. Refuses to know when
it is time for one and who should keep it (gateway/checkpoints.py).

Invariants: only KV of this worker's own exactness class is kept; at most `MAX_KEEPING` checkpoints come in and one goes
out at once; a sequence goes on whatever becomes of its checkpoint. Reading out copies the whole sequence on the engine
thread, between two steps: llama.cpp reads no part of a decode context's sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from itertools import pairwise
from typing import Final

from edge_llm.engine.engine import Engine, EngineFacts, KeptKV
from edge_llm.errors import InvalidRequest, LocalProtocolError, Overloaded, Unauthorized, WorkerError
from edge_llm.kv.codec import StateBlob
from edge_llm.kv.store import Chain, Match, Piece
from edge_llm.worker.adopt import ByteBudget
from edge_llm.worker.holders import Holders
from edge_llm.worker.loop import EngineLoop
from edge_llm.worker.messages import KeepReply, KeepRequest, PrefillRequest
from edge_llm.worker.offload import off_loop
from edge_llm.worker.prefixes import Prefixes
from edge_llm.worker.pull import check_address
from edge_llm.worker.tickets import Claims

MAX_KEEPING: Final = 4


class Keeper:
    """Checkpoints of other workers' sequences that come to this one."""

    def __init__(
        self,
        holders: Holders,
        prefixes: Prefixes,
        facts: Callable[[], EngineFacts],
        allowed_peers: tuple[str, ...],
    ) -> None:
        self._holders, self._prefixes, self._facts, self._allowed_peers = holders, prefixes, facts, allowed_peers
        self._keeping = 0

    async def keep(self, request: KeepRequest, claims: Claims) -> KeepReply:
        """Fetch and keep what is missing here. Raises what the gateway must be told; what came until then stays."""
        chain = self._checked(request, claims)
        self._keeping += 1
        try:
            return await self._fetch(request, chain)
        finally:
            self._keeping -= 1

    def _checked(self, request: KeepRequest, claims: Claims) -> Chain:
        facts, source = self._facts(), request.source
        if claims.peers.get(source.worker) != source.address:
            raise Unauthorized(f"the ticket does not name worker {source.worker} at that address")
        check_address(source.address, self._allowed_peers)
        if max(request.ids) >= facts.vocab_size:
            raise InvalidRequest(f"token id {max(request.ids)} is outside the vocabulary of {facts.vocab_size}")
        chain = self._prefixes.chain(request.tenant)
        if chain is None or facts.level != "exact":
            raise WorkerError(f"this worker keeps no checkpoints: {'no room' if chain is None else facts.level_reason}")
        if self._keeping >= MAX_KEEPING:
            raise Overloaded(f"{MAX_KEEPING} checkpoints come in here already", retry_after_s=1.0)
        return chain

    async def _fetch(self, request: KeepRequest, chain: Chain) -> KeepReply:
        ids = request.ids[:-1]
        known, fetched_bytes = await self._prefixes.match(request.tenant, ids), 0
        for piece in known.pieces:
            chain.add(ids[piece.p0 : piece.p1], piece)
        if known.n_tokens < len(ids):
            asked = PrefillRequest(
                request_id=request.request_id,
                ids=request.ids,
                start=known.n_tokens,
                compatibility=self._facts().identity.compatibility,
                tenant=request.tenant,
                only_stored=True,
                is_running=True,
            )
            async with aclosing(self._holders.pieces(request.source, asked)) as pieces:
                async for piece in pieces:
                    chain.add(ids[piece.p0 : piece.p1], piece)
                    fetched_bytes += len(piece.payload)
        return KeepReply(kept_tokens=chain.finish(), fetched_bytes=fetched_bytes)


class RunningKV:
    """What a checkpoint reads out of sequences that run here. `slot_of` says where a request's sequence runs."""

    def __init__(
        self,
        loop: EngineLoop,
        facts: Callable[[], EngineFacts],
        budget: ByteBudget,
        slot_of: Callable[[str], int | None],
    ) -> None:
        self._loop, self._facts, self._budget, self._slot_of = loop, facts, budget, slot_of

    async def read(self, request: PrefillRequest) -> Match:
        """KV of positions [request.start, len(ids) - 1), all that the asking worker needs; empty when no sequence of
        this request and these ids runs here (any more), or when it is not that far."""
        layout, total = self._facts().layout, len(request.ids) - 1
        if layout is None or self._slot_of(request.request_id) is None:
            return Match()
        async with self._budget.reserved(layout.size(total)):
            slot = self._slot_of(request.request_id)  # waiting for room may have taken long
            if slot is None:
                return Match()
            kept = await self._loop.call(lambda engine: _exported(engine, slot, request.request_id))
            if kept is None or kept.ids[:total] != tuple(request.ids[:-1]):
                return Match()
            size, chunk_tokens = kept.state.nbytes, self._facts().chunk_tokens
            return await off_loop(size, lambda: _part(kept.state, request.start, total, chunk_tokens))


def _exported(engine: Engine, slot: int, request_id: str) -> KeptKV | None:
    """Engine thread. The sequence may have ended, and the slot have another one, since it was asked for."""
    try:
        kept = engine.export(slot)
    except LocalProtocolError:
        return None
    return kept if kept.request_id == request_id else None


def _part(state: StateBlob, start: int, total: int, chunk_tokens: int) -> Match:
    borders = [start, *range((start // chunk_tokens + 1) * chunk_tokens, total, chunk_tokens), total]
    return Match(tuple(Piece(p0, p1, state.payload(p0, p1)) for p0, p1 in pairwise(borders)))
