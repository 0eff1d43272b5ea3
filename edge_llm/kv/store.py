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
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from edge_llm.kv.payload import join_payloads, slice_payload
from edge_llm.kv.snapshot import Geometry, VLayout

_KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class Piece:
    """Canonical payload of positions [p0, p1), V as the store has it."""

    p0: int
    p1: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Match:
    """KV of positions [0, n_tokens) of the ids asked for, in order and without gaps."""

    pieces: tuple[Piece, ...] = ()

    @property
    def n_tokens(self) -> int:
        return self.pieces[-1].p1 if self.pieces else 0


@dataclass(frozen=True, slots=True)
class _Kept:
    parent: bytes
    ids: tuple[int, ...]
    payload: bytes


class PrefixStore:
    """Pieces of one model and geometry, for all tenants, up to `limit_bytes` (0 keeps nothing)."""

    def __init__(self, geometry: Geometry, v_layout: VLayout, chunk_tokens: int, limit_bytes: int) -> None:
        self._geometry, self._chunk_tokens = geometry, chunk_tokens
        self.v_layout, self.limit_bytes, self.used_bytes = v_layout, limit_bytes, 0
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()  # least recently used first
        self._next: dict[bytes, set[bytes]] = {}  # keys of the pieces behind a piece

    def __len__(self) -> int:
        return len(self._kept)

    def match(self, tenant: str, ids: Sequence[int], *, only_chunks: bool = False) -> Match:
        """The longest kept beginning of `ids`. `only_chunks` stops at the last border: at level same-plan the same
        text must have been computed in the same pieces. What is found counts as used."""
        key, pieces, used = _root(tenant), list[Piece](), list[bytes]()
        for p0, p1 in pairwise(range(0, len(ids) + 1, self._chunk_tokens)):
            key = _key(key, ids[p0:p1])
            if (kept := self._kept.get(key)) is None:
                break
            pieces.append(Piece(p0, p1, kept.payload))
            used.append(key)
        if not only_chunks:
            self._add_part(tenant, ids, pieces, used)
        self._touch(used)
        return Match(tuple(pieces))

    def keep(self, tenant: str, ids: Sequence[int], pieces: Iterable[Piece]) -> int:
        """Keep consecutive pieces of `ids` from position 0 on, none over a border; returns how many positions are
        kept now. A piece that is known costs nothing."""
        key, done, used = _root(tenant), 0, list[bytes]()
        for piece in self._whole(pieces):
            part = tuple(ids[piece.p0 : piece.p1])
            parent, key = key, _key(key, part)
            self._touch(used)
            if not self._add(key, _Kept(parent, part, piece.payload), used):
                break
            used.append(key)
            done = piece.p1
        self._touch(used)
        return done

    def forget(self) -> None:
        """Drop everything."""
        self._kept.clear()
        self._next.clear()
        self.used_bytes = 0

    # -- pieces

    def _whole(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Pieces of the same chunk joined; nothing behind a gap."""
        begun: list[Piece] = []
        done = 0
        for piece in pieces:
            if piece.p0 != done or piece.p0 // self._chunk_tokens != (piece.p1 - 1) // self._chunk_tokens:
                break
            begun.append(piece)
            done = piece.p1
            if done % self._chunk_tokens == 0:
                yield self._joined(begun)
                begun = []
        if begun:
            yield self._joined(begun)

    def _joined(self, pieces: Sequence[Piece]) -> Piece:
        if len(pieces) == 1:
            return pieces[0]
        parts = [(piece.payload, piece.p1 - piece.p0) for piece in pieces]
        return Piece(pieces[0].p0, pieces[-1].p1, join_payloads(self._geometry, self.v_layout, parts))

    def _add_part(self, tenant: str, ids: Sequence[int], pieces: list[Piece], used: list[bytes]) -> None:
        """Append what a piece that goes on otherwise has in common with `ids`."""
        behind = used[-1] if used else _root(tenant)
        p0 = pieces[-1].p1 if pieces else 0
        rest = np.fromiter(ids[p0 : p0 + self._chunk_tokens], np.int64)
        best, length = b"", 0
        for key in self._next.get(behind, ()):
            common = _common(self._kept[key].ids, rest)
            if common > length:
                best, length = key, common
        if length:
            kept = self._kept[best]
            payload = slice_payload(self._geometry, self.v_layout, kept.payload, len(kept.ids), 0, length)
            pieces.append(Piece(p0, p0 + length, payload))
            used.append(best)

    def _add(self, key: bytes, kept: _Kept, in_use: Sequence[bytes]) -> bool:
        """Room first, then the piece. False when there is none without dropping what `in_use` names."""
        if key in self._kept:
            return True
        size = len(kept.payload)
        if size > self.limit_bytes:
            return False
        while self.used_bytes + size > self.limit_bytes:
            oldest = next(iter(self._kept))
            if oldest in in_use:
                return False
            self._drop(oldest)
        self._kept[key] = kept
        self._next.setdefault(kept.parent, set()).add(key)
        self.used_bytes += size
        return True

    def _drop(self, key: bytes) -> None:
        kept = self._kept.pop(key)
        self.used_bytes -= len(kept.payload)
        behind = self._next[kept.parent]
        behind.discard(key)
        if not behind:
            del self._next[kept.parent]

    def _touch(self, chain: Sequence[bytes]) -> None:
        """Most recently used, its beginning last: the end of a chain is dropped first."""
        for key in reversed(chain):
            self._kept.move_to_end(key)


def _root(tenant: str) -> bytes:
    return hashlib.blake2b(tenant.encode(), digest_size=_KEY_BYTES).digest()


def _key(parent: bytes, ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.asarray(ids, np.int64).tobytes(), key=parent, digest_size=_KEY_BYTES).digest()


def _common(ids: tuple[int, ...], rest: npt.NDArray[np.int64]) -> int:
    """How many leading ids are equal."""
    count = min(len(ids), len(rest))
    if not count or ids[0] != rest[0]:
        return 0
    differs = np.asarray(ids[:count]) != rest[:count]
    return int(differs.argmax()) if differs.any() else count
