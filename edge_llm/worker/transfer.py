"""One prompt that is served for another worker: how far it is computed and sent.

Owns the counters of one transfer, and nothing that it does: worker/prefill.py moves them.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from edge_llm.engine.engine import KVChunk, PromptProgress
from edge_llm.errors import EdgeLLMError
from edge_llm.kv.store import Chain, Match, Piece
from edge_llm.worker.messages import PrefillRequest

Item = KVChunk | PromptProgress | EdgeLLMError


@dataclass(slots=True)
class Transfer:
    """One served prompt. `served_id` is unique here: a request that comes again must not get the old one's chunks.
    `chunks_out` (made, not yet sent) belongs to the engine thread."""

    request: PrefillRequest
    served_id: str
    known: Match
    deadline_s: float
    outbox: asyncio.Queue[Item] = field(default_factory=asyncio.Queue)
    kept: Chain | None = None
    chunks_out: int = 0
    done: int = 0
    sent: int = 0
    chunks_sent: int = 0
    admitted_tokens: int = 0
    has_turn: bool = False

    @property
    def total(self) -> int:
        return self.request.end or len(self.request.ids) - 1

    def keep(self, piece: Piece) -> None:
        """For later prompts, piece by piece: a transfer holds its chunks, the store no more than its cap."""
        if self.kept is not None:
            self.kept.add(self.request.ids[piece.p0 : piece.p1], piece)

    @property
    def missing(self) -> int:
        """Positions to compute."""
        return self.total - self.known.n_tokens

    @property
    def is_known_whole(self) -> bool:
        return self.known.n_tokens == self.total

    @property
    def needs_no_engine(self) -> bool:
        return self.is_known_whole or self.request.only_stored
