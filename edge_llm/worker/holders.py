"""Fetching KV from the decode worker that holds a conversation (the reverse hand-off), or generates it (a checkpoint).

Only a decode worker holds the KV of what it generated. When a long next turn is prefilled elsewhere, that KV is either
fetched from there or computed again, whichever is predicted sooner. Owns that choice and the fetch. Refuses to know
turns, engines and what is computed or kept afterwards. Whatever goes wrong here costs time and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final

import structlog

from edge_llm.engine.engine import EngineFacts
from edge_llm.errors import EdgeLLMError, IncompatibleKV
from edge_llm.kv.frames import Chunk, Error, Header
from edge_llm.kv.snapshot import Identity, ids_digest
from edge_llm.kv.store import Match, Piece
from edge_llm.worker.client import error_of
from edge_llm.worker.links import Links
from edge_llm.worker.messages import ErrorReply, PrefillCandidate, PrefillRequest
from edge_llm.worker.pull import Expected, Puller
from edge_llm.worker.tickets import KeyRing

# A gigabit link's payload: what an unmeasured way is taken for.
UNMEASURED_BYTES_PER_S: Final = 117e6
UNMEASURED_ROUND_TRIP_S: Final = 0.005
log = structlog.get_logger()


class Holders:
    """Other workers' KV, for one prefill worker."""

    def __init__(self, puller: Puller, keys: KeyRing, facts: Callable[[], EngineFacts], links: Links) -> None:
        self._puller, self._keys, self._facts, self._links = puller, keys, facts, links

    async def extend(self, request: PrefillRequest, known: Match, prompt_token_s: float) -> Match:
        """`known`, then what `request.holder` has up to `request.start`, where that is sooner than computing it."""
        holder, missing = request.holder, request.start - known.n_tokens
        if holder is None or missing <= 0 or not self._is_sooner(holder, missing, prompt_token_s):
            return known
        try:
            # longer than computing would take, it is given up
            async with asyncio.timeout(missing * prompt_token_s):
                asked = _stored_part(request, known.n_tokens)
                pieces = [piece async for piece in self.pieces(holder, asked)]
        except (EdgeLLMError, TimeoutError) as error:
            why = error.code if isinstance(error, EdgeLLMError) else "too slow"
            log.warning("holder failed", request_id=request.request_id, worker=holder.worker, code=why)
            return known
        log.info("fetched from holder", request_id=request.request_id, worker=holder.worker, tokens=missing)
        return Match((*known.pieces, *pieces))

    def _is_sooner(self, holder: PrefillCandidate, missing: int, prompt_token_s: float) -> bool:
        way = next((link for link in self._links.published if link.peer == holder.worker), None)
        rate = way.bytes_per_s if way is not None and way.bytes_per_s else UNMEASURED_BYTES_PER_S
        round_trip_s = way.round_trip_s if way is not None else UNMEASURED_ROUND_TRIP_S
        return round_trip_s + missing * self._facts().kv_bytes_per_token / rate < missing * prompt_token_s

    async def pieces(self, holder: PrefillCandidate, asked: PrefillRequest) -> AsyncGenerator[Piece, None]:
        """What `holder` ships of `asked`, in order. Raises what went wrong, IncompatibleKV for KV of another kind."""
        total = asked.end or len(asked.ids) - 1
        facts = self._facts()
        layout = facts.layout or facts.prompt_layout
        assert layout is not None  # nobody names a holder to a worker that ships no KV
        expected = Expected(
            facts.kv_bytes_per_token,
            facts.chunk_tokens,
            total,
            asked.start,
            ids_digest(asked.ids),
            layout.geometry,
        )
        key = self._keys.transfer_key(holder.ticket)
        async with aclosing(self._puller.pull(holder, asked, key, expected)) as events:
            async for event in events:
                match event:
                    case Header():
                        self._check(event)
                    case Chunk():
                        yield Piece(event.p0, event.p1, bytes(event.payload))
                    case Error():
                        raise error_of(ErrorReply(code=event.code, message=event.message), holder.worker)

    def _check(self, header: Header) -> None:
        """Bits of another class are not mixed into what is shipped as this worker's own."""
        facts = self._facts()
        theirs = (Identity(header.compatibility, header.exactness_class), header.v_layout)
        if theirs != (facts.identity, facts.v_layout):
            raise IncompatibleKV("the holder's KV is of another kind; computing it here")


def _stored_part(request: PrefillRequest, start: int) -> PrefillRequest:
    """The question for what a holder has of a prompt before the part that is to be shipped."""
    return PrefillRequest(
        request_id=request.request_id,
        ids=request.ids,
        start=start,
        end=request.start,
        compatibility=request.compatibility,
        tenant=request.tenant,
        only_stored=True,
    )
