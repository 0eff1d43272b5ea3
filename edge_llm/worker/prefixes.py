"""KV this worker has kept, and what of it a request may use.

Owns the store, the rule of each exactness level, and the way from kept pieces to a state that an engine takes. Refuses
to know HTTP, slots and turns. Everything here runs on the event loop, large copies in a thread (worker/offload.py).

Rules (blueprint section 4). Level exact: any common beginning, computed or generated, has the same bits however it came
to be. Otherwise only whole chunks of prompts, at same-plan computed in the same pieces. A sequence that moves to
another worker is no reuse but the same run going on: all of it travels, at every level; below exact it is kept apart,
for nobody else's prompt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from edge_llm.engine.engine import EngineFacts, KeptKV
from edge_llm.kv.codec import BlobLayout, StateBlob
from edge_llm.kv.payload import slice_payload
from edge_llm.kv.store import Chain, Match, Piece, PrefixStore
from edge_llm.worker.offload import off_loop

# Behind a tenant's name, in which it cannot stand (worker/messages.py, Tenant).
_MOVING: Final = "\0moving"


class Prefixes:
    """Kept KV of one worker, for all its roles. `limit_bytes` 0 keeps nothing."""

    def __init__(self, facts: EngineFacts, limit_bytes: int) -> None:
        self._facts = facts
        layout = facts.prompt_layout or facts.layout
        self._geometry = layout.geometry if layout is not None else None
        self._store = PrefixStore(facts.chunk_tokens, limit_bytes) if layout is not None else None
        self._idle = asyncio.Event()  # not set while an answer is being copied
        self._idle.set()
        self.query_tokens = self.hit_tokens = 0

    @property
    def used_bytes(self) -> int:
        return self._store.used_bytes if self._store is not None else 0

    @property
    def limit_bytes(self) -> int:
        return self._store.limit_bytes if self._store is not None else 0

    @property
    def _is_exact(self) -> bool:
        return self._facts.level == "exact"

    async def match(self, tenant: str, ids: Sequence[int], *, is_moving: bool = False, counts: bool = True) -> Match:
        """What is kept of the beginning of `ids`, all of which need KV. `is_moving`: a running sequence goes on.
        `counts` False: no prompt is asked for, and the share of prompts that was kept does not change."""
        if self._store is None:
            return Match()
        await self._idle.wait()  # a next turn may come while its conversation is still being copied
        found = self._store.match(tenant, ids, only_chunks=not self._is_exact)
        if is_moving and not self._is_exact:
            found = max(self._store.match(tenant + _MOVING, ids), found, key=lambda match: match.n_tokens)
        if counts:
            self.query_tokens += len(ids)
            self.hit_tokens += found.n_tokens
        if found.pieces and found.pieces[-1].rows:
            return Match((*found.pieces[:-1], await self._cut_off(found.pieces[-1], found.pieces[-1].p0)))
        return found

    async def _cut_off(self, piece: Piece, p0: int) -> Piece:
        """[p0, piece.p1) of a piece, with a payload of its own."""
        geometry, v_layout = self._geometry, self._facts.v_layout
        assert geometry is not None
        rows = piece.rows or piece.p1 - piece.p0

        def cut() -> bytes:
            return slice_payload(geometry, v_layout, piece.payload, rows, p0 - piece.p0, piece.p1 - piece.p0)

        return Piece(p0, piece.p1, await off_loop(len(piece.payload), cut))

    def holds_answer(self, cells: int) -> bool:
        """Whether KV of so many positions could be kept: no engine is asked to read out what cannot."""
        return self._store is not None and 0 < cells * self._facts.kv_bytes_per_token <= self._store.limit_bytes

    def has_time(self) -> bool:
        """Whether an answer could be kept now: one is copied at a time. Any thread."""
        return self._idle.is_set()

    async def tail_of(self, piece: Piece, p0: int) -> Piece:
        """[p0, piece.p1): what a receiver that has the beginning of a piece still needs."""
        return piece if p0 <= piece.p0 else await self._cut_off(piece, p0)

    def chain(self, tenant: str) -> Chain | None:
        """Begin to keep a prompt while it is computed here; None where nothing is kept."""
        return self._store.chain(tenant) if self._store is not None and self._store.limit_bytes else None

    async def keep_answer(self, tenant: str, prompt_tokens: int, kept: KeptKV, *, is_moving: bool = False) -> None:
        """A sequence that ended, or leaves in the middle: prompt and answer, as far as the level allows."""
        if self._store is None or not (self._idle.is_set() or is_moving):
            return  # one copy at a time: answers that end together would need memory that nobody counted
        total = len(kept.ids)
        if not (self._is_exact or is_moving):
            # the last token of a prompt is evaluated by a decode step, which is no part of a chunk's plan
            total = min(total, prompt_tokens - 1) // self._facts.chunk_tokens * self._facts.chunk_tokens
        self._idle.clear()
        chain = self._store.chain(tenant + _MOVING if is_moving and not self._is_exact else tenant)
        try:
            # one by one: room is made for each before the next is copied out of the state
            for p0, p1 in pairwise([*range(0, total, self._facts.chunk_tokens), total]):
                if chain.is_open:
                    chain.add(kept.ids[p0:p1], await _copied(kept.state, p0, p1))
            chain.finish()
        finally:
            self._idle.set()


async def state_of(match: Match, layout: BlobLayout) -> StateBlob | None:
    """The pieces found as a native state; None when there are none."""
    if not match.n_tokens:
        return None
    state = await off_loop(layout.size(match.n_tokens), lambda: StateBlob(layout, match.n_tokens, 0))
    await place(match, state)
    return state


async def place(match: Match, state: StateBlob) -> None:
    """Put the pieces found at the beginning of an empty state; their V lies as all states of this worker have it."""
    await off_loop(state.nbytes, lambda: _place(match, state))


def _place(match: Match, state: StateBlob) -> None:
    for piece in match.pieces:
        state.place(piece.p0, piece.p1, piece.payload, state.layout.v_layout)


async def _copied(state: StateBlob, p0: int, p1: int) -> Piece:
    size = state.nbytes * (p1 - p0) // state.n_tokens
    return Piece(p0, p1, await off_loop(size, lambda: state.payload(p0, p1)))
