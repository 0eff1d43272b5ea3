"""KV of finished prompts and answers, kept as host payloads so that what they begin with is computed once.

Owns which positions of which token ids are kept, for whom, and what goes when the cap is reached. Refuses to know
engines, sockets and clocks. Not thread-safe: one owner.

A kept sequence is a chain of pieces: whole chunks between absolute borders, then at most one shorter one. A piece is
found by the digest of all ids up to its end, so sequences that begin alike share their pieces and a system prompt is
held once. The digest starts from the tenant: one tenant's KV is invisible to every other one (the time to first token
would tell what others asked: CVE-2025-46570).

Invariants: `used_bytes` never exceeds `limit_bytes`, also not while a piece is added; a piece is found only behind its
predecessors; what was used least recently goes first, the end of a chain before its beginning.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from edge_llm.kv.payload import slice_payload
from edge_llm.kv.snapshot import Geometry, VLayout

_KEY_BYTES = 16
_ID = np.dtype(">u4")  # big-endian: ids are in order as their bytes are


@dataclass(frozen=True, slots=True)
class Piece:
    """Canonical payload of positions [p0, p1), V as the store has it. With `rows`, the payload has that many positions,
    of which only the first belong to the piece: whoever uses it cuts it first (`exact`)."""

    p0: int
    p1: int
    payload: bytes
    rows: int = 0

    def exact(self, geometry: Geometry, v_layout: VLayout) -> Piece:
        """The piece with a payload of its own. Takes milliseconds for each megabyte when there is something to cut."""
        if not self.rows:
            return self
        count = self.p1 - self.p0
        return Piece(self.p0, self.p1, slice_payload(geometry, v_layout, self.payload, self.rows, 0, count))


@dataclass(frozen=True, slots=True)
class Match:
    """KV of positions [0, n_tokens) of the ids asked for, in order and without gaps."""

    pieces: tuple[Piece, ...] = ()

    @property
    def n_tokens(self) -> int:
        return self.pieces[-1].p1 if self.pieces else 0


@dataclass(frozen=True, slots=True)
class _Kept:
    """At most a chunk: pieces as they came, not joined (that costs as much as computing a token). `ids`: as _ID."""

    parent: bytes
    ids: bytes
    pieces: tuple[Piece, ...]

    @property
    def n_bytes(self) -> int:
        return sum(len(piece.payload) for piece in self.pieces)


class PrefixStore:
    """Pieces of one model and geometry, for all tenants, up to `limit_bytes` (0 keeps nothing)."""

    def __init__(self, chunk_tokens: int, limit_bytes: int) -> None:
        self.chunk_tokens, self.limit_bytes, self.used_bytes = chunk_tokens, limit_bytes, 0
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()  # least recently used first
        self._next: dict[bytes, list[tuple[bytes, bytes]]] = {}  # behind a piece: ids and keys, in order of ids

    def __len__(self) -> int:
        return len(self._kept)

    def match(self, tenant: str, ids: Sequence[int], *, only_chunks: bool = False) -> Match:
        """The longest kept beginning of `ids`. `only_chunks` stops at the last border: at level same-plan the same
        text must have been computed in the same pieces. What is found counts as used."""
        key, pieces, used = _root(tenant), list[Piece](), list[bytes]()
        for p0, p1 in pairwise(range(0, len(ids) + 1, self.chunk_tokens)):
            key = _key(key, ids[p0:p1])
            if (kept := self._kept.get(key)) is None:
                break
            pieces += kept.pieces
            used.append(key)
        if not only_chunks:
            self._add_part(tenant, ids, pieces, used)
        self._touch(used)
        return Match(tuple(pieces))

    def chain(self, tenant: str) -> Chain:
        """Begin to keep a sequence, piece by piece as it is computed."""
        return Chain(self, _root(tenant))

    # -- pieces

    def _add_part(self, tenant: str, ids: Sequence[int], pieces: list[Piece], used: list[bytes]) -> None:
        """Append what a piece that goes on otherwise has in common with `ids`. In order of ids nobody has more in
        common with them than the two between which they belong: thousands of prompts may begin with one token."""
        p0 = pieces[-1].p1 if pieces else 0
        rest = _packed(ids[p0 : p0 + self.chunk_tokens])
        behind = self._next.get(used[-1] if used else _root(tenant), [])
        place = bisect_left(behind, (rest, b""))
        near = [(_common(others, rest), key) for others, key in behind[max(0, place - 1) : place + 1]]
        length, best = max(near, default=(0, b""))
        if length:
            pieces += _until(self._kept[best].pieces, p0 + length)
            used.append(best)

    def put(self, key: bytes, parent: bytes, ids: Sequence[int], pieces: Sequence[Piece], in_use: list[bytes]) -> bool:
        """For Chain: keep `pieces` as one. Room first; False when there is none without dropping `in_use`,
        which is what the chain holds already."""
        if in_use and in_use[-1] not in self._kept:
            return False  # another chain needed its room: nothing behind it could be found
        self._touch([*in_use, key])
        if key in self._kept:
            return True
        kept = _Kept(parent, _packed(ids), tuple(pieces))
        size = kept.n_bytes
        if size > self.limit_bytes:
            return False
        while self.used_bytes + size > self.limit_bytes:
            oldest = next(iter(self._kept))
            if oldest in in_use:
                return False
            self._drop(oldest)
        self._kept[key] = kept
        insort(self._next.setdefault(parent, []), (kept.ids, key))
        self.used_bytes += size
        self._touch([*in_use, key])
        return True

    def _drop(self, key: bytes) -> None:
        kept = self._kept.pop(key)
        self.used_bytes -= kept.n_bytes
        behind = self._next[kept.parent]
        del behind[bisect_left(behind, (kept.ids, key))]
        if not behind:
            del self._next[kept.parent]

    def _touch(self, chain: Sequence[bytes]) -> None:
        """Most recently used, its beginning last: the end of a chain is dropped first."""
        for key in reversed(chain):
            if key in self._kept:
                self._kept.move_to_end(key)


class Chain:
    """A sequence that is being kept: pieces in order, from position 0 on. What has no room ends it."""

    def __init__(self, store: PrefixStore, root: bytes) -> None:
        self._store, self._key = store, root
        self._begun: list[Piece] = []
        self._ids: list[int] = []
        self._used: list[bytes] = []
        self._is_open = True
        self._seen = 0
        self.kept_to = 0

    @property
    def is_open(self) -> bool:
        """Whether the piece that comes next would be kept."""
        return self._is_open

    def add(self, ids: Sequence[int], piece: Piece) -> None:
        """Keep a piece with its own ids; a gap, or a piece over a border or not cut, ends the chain."""
        size = self._store.chunk_tokens
        is_next = piece.p0 == self._seen and piece.p0 // size == (piece.p1 - 1) // size and not piece.rows
        self._is_open &= is_next
        if not self._is_open:
            return
        self._begun.append(piece)
        self._ids += ids
        self._seen = piece.p1
        if piece.p1 % size == 0:
            self._close_chunk()

    def finish(self) -> int:
        """Keep what is shorter than a chunk too; returns how many positions are kept."""
        if self._is_open and self._begun:
            self._close_chunk()
        self._is_open = False
        return self.kept_to

    def _close_chunk(self) -> None:
        parent, self._key = self._key, _key(self._key, self._ids)
        self._is_open = self._store.put(self._key, parent, self._ids, self._begun, self._used)
        if self._is_open:
            self._used.append(self._key)
            self.kept_to = self._seen
        self._begun, self._ids = [], []


def _until(pieces: Sequence[Piece], end: int) -> list[Piece]:
    """Pieces up to position `end`, the last one marked as longer than its part."""
    found = [piece for piece in pieces if piece.p1 <= end]
    rest = next((piece for piece in pieces if piece.p0 < end < piece.p1), None)
    return [*found, Piece(rest.p0, end, rest.payload, rest.p1 - rest.p0)] if rest is not None else found


def _root(tenant: str) -> bytes:
    return hashlib.blake2b(tenant.encode(), digest_size=_KEY_BYTES).digest()


def _key(parent: bytes, ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.asarray(ids, np.int64).tobytes(), key=parent, digest_size=_KEY_BYTES).digest()


def _packed(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, _ID).tobytes()


def _common(ids: bytes, others: bytes) -> int:
    """How many leading ids are equal."""
    count = min(len(ids), len(others)) // _ID.itemsize
    differs = np.frombuffer(ids, _ID, count) != np.frombuffer(others, _ID, count)
    return int(differs.argmax()) if differs.any() else count
