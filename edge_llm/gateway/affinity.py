"""Which worker still holds which beginnings of prompts and conversations, as far as this gateway can know.

Pure. Owns chains of digests (one per whole chunk of ids, each including all before it, rooted in the tenant: the shape
of kv/store.py, which holds the KV itself) per worker, in the order of their use. Refuses to know KV and workers:
what is believed here is corrected by what they report.

Invariants: a worker's beliefs are never larger than what it may keep, the least recently used go first; a worker that
was started again holds nothing; one tenant's chains say nothing about another's.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Chain:
    """Digests of the whole chunks that some ids begin with."""

    chunk_tokens: int
    links: tuple[bytes, ...]


def chain_of(tenant: str, ids: Sequence[int], chunk_tokens: int) -> Chain:
    """The chain of `ids`; what is behind the last whole chunk is left out."""
    data = np.asarray(ids, np.int64)
    link = hashlib.blake2b(tenant.encode(), digest_size=_DIGEST_BYTES).digest()
    links: list[bytes] = []
    for end in range(chunk_tokens, len(data) + 1, chunk_tokens):
        link = hashlib.blake2b(data[end - chunk_tokens : end].tobytes(), key=link, digest_size=_DIGEST_BYTES).digest()
        links.append(link)
    return Chain(chunk_tokens, tuple(links))


@dataclass(slots=True)
class _Belief:
    """What one life of a worker holds, least recently used first; at most `room` chunks."""

    life: Hashable
    room: int
    held: OrderedDict[bytes, None] = field(default_factory=OrderedDict)


class Affinity:
    """Beliefs about all workers."""

    def __init__(self) -> None:
        self._beliefs: dict[str, _Belief] = {}

    def meet(self, worker: str, life: Hashable, room: int) -> None:
        """A worker is seen: in another life than before it holds nothing. `room` is how many chunks it may keep."""
        belief = self._beliefs.get(worker)
        if belief is None or belief.life != life:
            self._beliefs[worker] = _Belief(life, room)
            return
        belief.room = room
        self._shrink(belief)

    def held(self, worker: str, chain: Chain) -> int:
        """How many leading positions the worker is believed to hold."""
        belief = self._beliefs.get(worker)
        count = 0
        if belief is not None:
            for link in chain.links:
                if link not in belief.held:
                    break
                count += 1
        return count * chain.chunk_tokens

    def keep(self, worker: str, chain: Chain) -> None:
        """The worker has computed or received this and keeps it. Its beginning stays longest."""
        belief = self._beliefs.get(worker)
        if belief is None:
            return
        for link in reversed(chain.links[: belief.room]):
            belief.held[link] = None
            belief.held.move_to_end(link)
        self._shrink(belief)

    def correct(self, worker: str, chain: Chain, tokens: int) -> None:
        """The worker held only `tokens` positions of it."""
        belief = self._beliefs.get(worker)
        if belief is not None:
            for link in chain.links[-(-tokens // chain.chunk_tokens) :]:
                belief.held.pop(link, None)

    def _shrink(self, belief: _Belief) -> None:
        while len(belief.held) > belief.room:
            belief.held.popitem(last=False)
