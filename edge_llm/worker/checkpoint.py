"""Checkpoints: KV of a sequence that generates elsewhere is kept here, so that its worker may die.

The gateway tells a worker to keep a sequence as far as it is (POST /keep); that worker fetches from where the sequence
runs what it does not have yet, and keeps it like any prompt (kv/store.py). When the running worker dies, the prompt of
the plan that follows begins with what is kept: what came after the last checkpoint is all that is computed again.

Owns both ends: what is fetched and kept here, and what is read out of a sequence that runs here. Refuses to know when
it is time for one and who should keep it (gateway/checkpoints.py).

Invariants: only KV of this worker's own exactness class is kept, under the tenant of the request that made it; at most
`MAX_KEEPING` checkpoints come in, for `KEEP_S` each, and one goes out at once; a sequence goes on whatever becomes of
its checkpoint. Reading out copies the whole sequence on the engine thread, between two steps: llama.cpp reads no part
of a decode context's sequence. That copy, and the part cut out of it, take memory that adoptions share, and only what
none of them waits for; the part alone is held on until it is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from itertools import pairwise
from typing import Final

from edge_llm.engine.engine import Engine, EngineFacts, KeptKV
from edge_llm.errors import InvalidRequest, LocalProtocolError, Overloaded, Unauthorized, WorkerError, WorkerSilent
from edge_llm.kv.codec import StateBlob
from edge_llm.kv.store import Chain, Match, Piece
from edge_llm.worker.adopt import ByteBudget
from edge_llm.worker.loop import EngineLoop
from edge_llm.worker.messages import KeepReply, KeepRequest, PrefillCandidate, PrefillRequest
from edge_llm.worker.offload import off_loop
from edge_llm.worker.prefixes import Prefixes
from edge_llm.worker.pull import check_address
from edge_llm.worker.tickets import Claims

MAX_KEEPING: Final = 4
# Less than a gateway waits for the reply (worker/client.py: CALL_S), so that it hears what came until then.
KEEP_S: Final = 20.0
Fetch = Callable[[PrefillCandidate, PrefillRequest], AsyncGenerator[Piece, None]]


class Keeper:
    """Checkpoints of other workers' sequences that come to this one. `fetch` is holders.py's `pieces`."""

    def __init__(
        self,
        fetch: Fetch,
        prefixes: Prefixes,
        facts: Callable[[], EngineFacts],
        allowed_peers: tuple[str, ...],
        patience_s: float = KEEP_S,
    ) -> None:
        self._fetch, self._prefixes, self._facts, self._allowed_peers = fetch, prefixes, facts, allowed_peers
        self._patience_s = patience_s
        self._keeping = 0

    async def keep(self, request: KeepRequest, claims: Claims) -> KeepReply:
        """Fetch and keep what is missing here. Raises what the gateway must be told; what came until then stays."""
        chain = self._checked(request, claims)
        self._keeping += 1
        try:
            start = await self._known(request, chain)
            fetched_bytes = await self._fetched(request, chain, start) if start < len(request.ids) - 1 else 0
            return KeepReply(kept_tokens=chain.finish(), fetched_bytes=fetched_bytes)
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

    async def _known(self, request: KeepRequest, chain: Chain) -> int:
        """Put what is kept here already into `chain`; how many positions that is. The pieces are not held on to: the
        store may need their room before the rest has come."""
        ids = request.ids[:-1]
        known = await self._prefixes.match(request.tenant, ids, counts=False)
        for piece in known.pieces:
            chain.add(ids[piece.p0 : piece.p1], piece)
        return known.n_tokens

    async def _fetched(self, request: KeepRequest, chain: Chain, start: int) -> int:
        """Add the rest to `chain`, as much as comes in time and has room; how many bytes came."""
        asked = PrefillRequest(
            request_id=request.request_id,
            ids=request.ids,
            start=start,
            compatibility=self._facts().identity.compatibility,
            tenant=request.tenant,
            only_stored=True,
            is_running=True,
        )
        fetched_bytes = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(self._patience_s), aclosing(self._fetch(request.source, asked)) as pieces:
                async for piece in pieces:
                    chain.add(request.ids[piece.p0 : piece.p1], piece)
                    fetched_bytes += len(piece.payload)
                    if not chain.is_open:
                        break  # what comes behind it would not be kept
        if not fetched_bytes:
            raise WorkerSilent(f"worker {request.source.worker} gave no KV within {self._patience_s:.0f} s")
        return fetched_bytes


class RunningKV:
    """What a checkpoint reads out of sequences that run here. `slot_of(request_id, tenant)` says where one runs."""

    def __init__(
        self,
        loop: EngineLoop,
        facts: Callable[[], EngineFacts],
        budget: ByteBudget,
        slot_of: Callable[[str, str], int | None],
    ) -> None:
        self._loop, self._facts, self._budget, self._slot_of = loop, facts, budget, slot_of

    async def read(self, request: PrefillRequest) -> Match:
        """KV of positions [request.start, len(ids) - 1), all that the asking worker needs; empty when no sequence of
        this request and these ids runs here (any more), or when it is not that far. Raises Overloaded rather than wait
        for memory: in that queue stand prompts that somebody waits for."""
        facts, total = self._facts(), len(request.ids) - 1
        slot = self._slot_of(request.request_id, request.tenant)
        if facts.layout is None or slot is None:
            return Match()
        needed = facts.layout.size(total) + (total - request.start) * facts.kv_bytes_per_token
        if not self._budget.has_room(needed):
            raise Overloaded("prompts that come in need the memory of a checkpoint", retry_after_s=1.0)
        async with self._budget.reserved(needed):
            # nothing was awaited since the slot was looked up, and mail is read in order: no other sequence is in it
            kept = await self._loop.call(lambda engine: _exported(engine, slot, request.request_id))
            if kept is None or kept.ids[:total] != tuple(request.ids[:-1]):
                return Match()
            return await off_loop(
                kept.state.nbytes, lambda: _part(kept.state, request.start, total, facts.chunk_tokens)
            )


def _exported(engine: Engine, slot: int, request_id: str) -> KeptKV | None:
    """Engine thread. The sequence may have ended since it was asked for."""
    try:
        kept = engine.export(slot)
    except LocalProtocolError:
        return None
    return kept if kept.request_id == request_id else None


def _part(state: StateBlob, start: int, total: int, chunk_tokens: int) -> Match:
    borders = [start, *range((start // chunk_tokens + 1) * chunk_tokens, total, chunk_tokens), total]
    return Match(tuple(Piece(p0, p1, state.payload(p0, p1)) for p0, p1 in pairwise(borders)))
