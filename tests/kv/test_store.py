from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_llm.kv.payload import slice_payload
from edge_llm.kv.snapshot import CacheShape, Geometry, LayerShape, VLayout
from edge_llm.kv.store import Match, Piece, PrefixStore

CHUNK = 4
GEOMETRY = Geometry((CacheShape((LayerShape(1, 8, 1, 4, 2), LayerShape(1, 8, 1, 4, 2))),))
ROW = GEOMETRY.kv_bytes_per_token
texts = st.lists(st.integers(0, 2), min_size=1, max_size=14)
v_layouts = st.sampled_from(["rows", "columns"])


def row(ids: Sequence[int]) -> bytes:
    """KV of the last of `ids`: it depends on all of them."""
    return hashlib.shake_128(bytes(ids)).digest(ROW)


def payload(ids: Sequence[int], p0: int, p1: int, v_layout: VLayout) -> bytes:
    """Canonical payload of [p0, p1): K of each layer, then V of each layer."""
    rows = [row(ids[: at + 1]) for at in range(p0, p1)]
    k = [b"".join(r[8 * layer : 8 * layer + 8] for r in rows) for layer in range(2)]
    v = [[r[16 + 4 * layer : 20 + 4 * layer] for r in rows] for layer in range(2)]
    if v_layout == "rows":
        return b"".join(k) + b"".join(b"".join(layer) for layer in v)
    columns = [b"".join(r[2 * dim : 2 * dim + 2] for r in layer) for layer in v for dim in range(2)]
    return b"".join(k) + b"".join(columns)


def pieces_of(ids: Sequence[int], v_layout: VLayout = "rows") -> list[Piece]:
    return [
        Piece(p0, min(p0 + CHUNK, len(ids)), payload(ids, p0, min(p0 + CHUNK, len(ids)), v_layout))
        for p0 in range(0, len(ids), CHUNK)
    ]


def keep(store: PrefixStore, tenant: str, ids: Sequence[int], pieces: Sequence[Piece]) -> int:
    """Keep consecutive pieces of `ids` from position 0 on; returns how many positions are kept now."""
    chain = store.chain(tenant)
    for piece in pieces:
        chain.add(ids[piece.p0 : piece.p1], piece)
    return chain.finish()


def store_of(limit: int = 1 << 20) -> PrefixStore:
    return PrefixStore(CHUNK, limit)


def check_right(found: Match, ids: Sequence[int], v_layout: VLayout = "rows") -> None:
    """What was found is the KV of these ids, gapless from 0."""
    done = 0
    for piece in (piece.exact(GEOMETRY, v_layout) for piece in found.pieces):
        assert piece.p0 == done
        assert piece.payload == payload(ids, piece.p0, piece.p1, v_layout)
        done = piece.p1


def common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@settings(max_examples=200)
@given(st.lists(texts, max_size=6), texts, v_layouts)
def test_the_longest_common_beginning_of_anything_kept_is_found(
    kept: list[list[int]], wanted: list[int], v_layout: VLayout
) -> None:
    store = store_of()
    for ids in kept:
        assert keep(store, "a", ids, pieces_of(ids, v_layout)) == len(ids)
    found = store.match("a", wanted)
    check_right(found, wanted, v_layout)
    assert found.n_tokens == max((common(ids, wanted) for ids in kept), default=0)
    whole = store.match("a", wanted, only_chunks=True)
    check_right(whole, wanted, v_layout)
    assert whole.n_tokens % CHUNK == 0
    assert store.match("b", wanted) == Match()


@settings(max_examples=200)
@given(st.lists(st.tuples(texts, st.booleans()), max_size=30), st.integers(0, 12))
def test_the_cap_holds_at_every_moment_and_what_is_found_is_still_right(
    work: list[tuple[list[int], bool]], room: int
) -> None:
    store = store_of(room * ROW)
    for ids, is_kept in work:
        if is_kept:
            keep(store, "a", ids, pieces_of(ids))
        else:
            check_right(store.match("a", ids), ids)
        assert store.used_bytes <= room * ROW
    assert store.used_bytes == sum(kept.n_bytes for kept in store._kept.values())


def test_sequences_that_begin_alike_hold_their_beginning_once() -> None:
    store = store_of()
    keep(store, "a", [1, 1, 1, 1, 2], pieces_of([1, 1, 1, 1, 2]))
    keep(store, "a", [1, 1, 1, 1, 0, 0], pieces_of([1, 1, 1, 1, 0, 0]))
    assert store.used_bytes == (4 + 1 + 2) * ROW


def test_what_was_used_least_recently_goes_first_and_ends_before_beginnings() -> None:
    old, new = [0] * 8, [1] * 8
    store = store_of(16 * ROW)
    keep(store, "a", old, pieces_of(old))
    keep(store, "a", new, pieces_of(new))
    store.match("a", old)
    keep(store, "a", [2] * 4, pieces_of([2] * 4))
    assert store.match("a", new).n_tokens == 4
    assert store.match("a", old).n_tokens == 8


def test_a_piece_larger_than_the_cap_is_not_kept_and_drops_nothing() -> None:
    store = store_of(3 * ROW)
    keep(store, "a", [1], pieces_of([1]))
    assert keep(store, "a", [2] * 4, pieces_of([2] * 4)) == 0
    assert store.match("a", [1]).n_tokens == 1


def test_two_sequences_kept_at_the_same_time_never_hold_more_than_the_cap_or_leave_a_gap() -> None:
    store = store_of(10 * ROW)
    texts = [[0] * 12, [1] * 12]
    chains = [store.chain("a") for _ in texts]
    for at in range(3):
        for chain, ids in zip(chains, texts, strict=True):
            piece = pieces_of(ids)[at]
            chain.add(ids[piece.p0 : piece.p1], piece)
            assert store.used_bytes <= 10 * ROW
    for chain, ids in zip(chains, texts, strict=True):
        chain.finish()
        check_right(store.match("a", ids), ids)


def test_pieces_behind_a_gap_are_not_kept() -> None:
    ids = [1] * 8
    store = store_of()
    assert keep(store, "a", ids, pieces_of(ids)[1:]) == 0
    assert len(store) == 0


@given(texts, st.data(), v_layouts)
def test_rows_cut_out_of_a_payload_are_the_payload_of_those_rows(
    ids: list[int], data: st.DataObject, v_layout: VLayout
) -> None:
    p0 = data.draw(st.integers(0, len(ids) - 1))
    p1 = data.draw(st.integers(p0 + 1, len(ids)))
    whole = payload(ids, 0, len(ids), v_layout)
    assert slice_payload(GEOMETRY, v_layout, whole, len(ids), p0, p1) == payload(ids, p0, p1, v_layout)


def test_pieces_that_part_a_chunk_are_found_as_one() -> None:
    ids = [0, 1, 2, 0, 1, 1]
    store = store_of()
    parted = [Piece(p0, p1, payload(ids, p0, p1, "rows")) for p0, p1 in ((0, 3), (3, 4), (4, 6))]
    assert keep(store, "a", ids, parted) == 6
    check_right(store.match("a", ids), ids)
    assert store.match("a", ids, only_chunks=True).n_tokens == CHUNK


def test_a_payload_of_another_size_is_not_cut() -> None:
    with pytest.raises(Exception, match="should be 2 positions"):
        slice_payload(GEOMETRY, "rows", bytes(ROW), 2, 0, 1)
