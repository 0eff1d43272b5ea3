from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_llm.errors import EdgeLLMError, LocalProtocolError, RemoteProtocolError
from edge_llm.kv.codec import BlobLayout, StateBlob, UnaccountedState, _write_heads, cut, extract, learn
from edge_llm.kv.snapshot import CacheShape, Geometry, LayerShape, VLayout

F16, Q8_0 = 1, 8
LAYER = LayerShape(F16, 12, F16, 8, 2)
WIDE = LayerShape(F16, 20, F16, 16, 2)
QUANTIZED_K = LayerShape(Q8_0, 34, F16, 8, 2)
GEOMETRIES = [
    Geometry((CacheShape((LAYER, WIDE)),)),
    Geometry((CacheShape((LAYER,)), CacheShape((WIDE, LAYER)))),
    Geometry((CacheShape((QUANTIZED_K, QUANTIZED_K)),)),
]
geometries = st.sampled_from(GEOMETRIES)


def layout(geometry: Geometry, n_stream: int = 1, v_columns: bool = True) -> BlobLayout:
    return BlobLayout(geometry, n_stream, v_columns, magic=0xAF143CD8)


def native(shape: BlobLayout, values: bytes, p0: int, p1: int, stream: int) -> bytes:
    """llama.cpp's own writer (src/llama-kv-cache.cpp, state_write), written down independently.

    `values` is the canonical payload with V in rows.
    """
    n, out, k_at = p1 - p0, [struct.pack("<Ii", shape.magic, stream)], 0
    k_total = sum(c.k_bytes_per_token for c in shape.geometry.caches) * n
    v_at = k_total
    for cache in shape.geometry.caches:
        out.append(struct.pack("<I", shape.n_stream))
        out.append(struct.pack("<I", 0) * stream + struct.pack("<I", n))
        out.extend(struct.pack("<iIi", pos, 1, stream) for pos in range(p0, p1))
        out.append(struct.pack("<II", int(shape.v_columns), len(cache.layers)))
        for layer in cache.layers:
            size = n * layer.k_row_bytes
            out.append(struct.pack("<iQ", layer.k_type, layer.k_row_bytes) + values[k_at : k_at + size])
            k_at += size
        for layer in cache.layers:
            size = n * layer.v_row_bytes
            data = values[v_at : v_at + size]
            v_at += size
            if shape.v_columns:
                columns = np.frombuffer(data, "<u2").reshape(n, -1).T.tobytes()
                dims = layer.v_row_bytes // layer.v_element_bytes
                out.append(struct.pack("<iII", layer.v_type, layer.v_element_bytes, dims) + columns)
            else:
                out.append(struct.pack("<iQ", layer.v_type, layer.v_row_bytes) + data)
        out.append(struct.pack("<I", 0) * (shape.n_stream - 1 - stream))
    return b"".join(out)


def values(geometry: Geometry, p0: int, p1: int) -> bytes:
    """Rows-form canonical payload in which every byte depends on its position, part and place."""
    out = []
    for which in ("k", "v"):
        for cache_number, cache in enumerate(geometry.caches):
            for number, layer in enumerate(cache.layers):
                width = layer.k_row_bytes if which == "k" else layer.v_row_bytes
                for p in range(p0, p1):
                    seed = (p * 31 + number * 7 + cache_number * 3 + (which == "v")) % 251
                    out.append(bytes((seed + 11 * i) % 256 for i in range(width)))
    return b"".join(out)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("v_columns", [True, False])
@pytest.mark.parametrize(("n_stream", "stream"), [(1, 0), (4, 0), (4, 2), (4, 3)])
def test_a_layout_is_learned_from_a_native_state(
    geometry: Geometry, v_columns: bool, n_stream: int, stream: int
) -> None:
    shape = layout(geometry, n_stream, v_columns)
    assert learn(native(shape, values(geometry, 0, 9), 0, 9, stream), 9) == shape


@given(geometries, st.booleans(), st.booleans(), st.integers(1, 40), st.integers(1, 17), st.integers(0, 3))
def test_chunks_joined_are_the_whole_state_for_every_chunk_size(
    geometry: Geometry, from_columns: bool, to_columns: bool, n: int, chunk: int, stream: int
) -> None:
    source, target = layout(geometry, 1, from_columns), layout(geometry, 4, to_columns)
    blob = StateBlob(target, n, stream)
    for p0 in range(0, n, chunk):
        p1 = min(n, p0 + chunk)
        payload = extract(source, native(source, values(geometry, p0, p1), p0, p1, 0), p0, p1)
        blob.place(p0, p1, payload, source.v_layout)
    assert blob.is_complete
    assert bytes(blob.buffer) == native(target, values(geometry, 0, n), 0, n, stream)
    assert cut(target, blob.buffer, n, 0, n) == blob.payload(0, n)


@given(geometries, st.booleans(), st.integers(2, 30), st.data())
def test_cutting_a_whole_state_gives_what_the_export_of_a_range_gives(
    geometry: Geometry, v_columns: bool, n: int, data: st.DataObject
) -> None:
    shape = layout(geometry, 2, v_columns)
    p0 = data.draw(st.integers(0, n - 1))
    p1 = data.draw(st.integers(p0 + 1, n))
    whole = native(shape, values(geometry, 0, n), 0, n, 1)
    ranged = native(shape, values(geometry, p0, p1), p0, p1, 1)
    assert cut(shape, whole, n, p0, p1) == extract(shape, ranged, p0, p1)


@pytest.mark.parametrize("v_columns", [True, False])
def test_a_state_of_a_sender_that_died_midway_is_cut_to_what_arrived(v_columns: bool) -> None:
    geometry = GEOMETRIES[1]
    shape = layout(geometry, 3, v_columns)
    blob = StateBlob(shape, 20, 1)
    blob.place(0, 7, values(geometry, 0, 7), "rows")
    with pytest.raises(LocalProtocolError):
        _ = blob.buffer
    blob.cut_short()
    assert bytes(blob.buffer) == native(shape, values(geometry, 0, 7), 0, 7, 1)
    assert blob.payload(0, 7) == cut(shape, blob.buffer, 7, 0, 7)


@given(geometries, st.booleans(), st.integers(1, 30), st.data())
def test_whatever_arrived_a_state_that_is_cut_short_is_the_state_of_that(
    geometry: Geometry, v_columns: bool, n: int, data: st.DataObject
) -> None:
    shape = layout(geometry, 2, v_columns)
    count = data.draw(st.integers(1, n))
    blob = StateBlob(shape, n, 1)
    blob.place(0, count, values(geometry, 0, count), "rows")
    blob.cut_short()
    assert bytes(blob.buffer) == native(shape, values(geometry, 0, count), 0, count, 1)


def test_a_state_read_back_from_an_engine_is_the_state_that_was_put_there() -> None:
    geometry = GEOMETRIES[0]
    shape = layout(geometry, 4)
    state = native(shape, values(geometry, 0, 11), 0, 11, 3)
    assert StateBlob.from_native(shape, bytearray(state), 11).payload(0, 11) == cut(shape, state, 11, 0, 11)


@pytest.mark.parametrize(("p0", "p1", "size"), [(1, 3, 2), (0, 0, 0), (0, 6, 6), (0, 2, 1), (0, 2, 3)])
def test_payloads_out_of_order_or_of_a_wrong_size_are_refused(p0: int, p1: int, size: int) -> None:
    geometry = GEOMETRIES[0]
    blob = StateBlob(layout(geometry), 5, 0)
    with pytest.raises(RemoteProtocolError):
        blob.place(p0, p1, bytes(geometry.payload_bytes(size)), "rows")
    assert blob.filled_to == 0


def test_a_quantized_v_cannot_be_transposed_and_says_so() -> None:
    geometry = Geometry((CacheShape((LayerShape(Q8_0, 34, Q8_0, 34, 0),)),))
    blob = StateBlob(BlobLayout(geometry, 1, False, 1), 2, 0)
    with pytest.raises(RemoteProtocolError, match="flash attention"):
        blob.place(0, 2, bytes(geometry.payload_bytes(2)), "columns")


GEOMETRY = GEOMETRIES[0]
GOOD = native(layout(GEOMETRY, 2), values(GEOMETRY, 0, 5), 0, 5, 1)


def test_what_the_format_cannot_explain_is_refused() -> None:
    shape = layout(GEOMETRY, 2)
    variants = {
        "extra bytes": GOOD + b"\x01",
        "extra state of a recurrent model": GOOD + struct.pack("<IIQ", 1, 64, 0) + bytes(64),
        "cut short": GOOD[:-3],
        "empty": b"",
        "other positions": native(shape, values(GEOMETRY, 3, 8), 3, 8, 1),
        "fewer cells (masked by a window)": native(shape, values(GEOMETRY, 0, 4), 0, 4, 1),
    }
    for name, blob in variants.items():
        with pytest.raises(UnaccountedState):
            learn(blob, 5)
            pytest.fail(name)
    with pytest.raises(UnaccountedState):
        extract(shape, GOOD, 1, 6)
    with pytest.raises(UnaccountedState):
        extract(layout(GEOMETRY, 3), GOOD, 0, 5)
    with pytest.raises(UnaccountedState):
        extract(layout(GEOMETRIES[1], 2), GOOD, 0, 5)


@settings(max_examples=400)
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_a_damaged_state_never_does_more_than_be_refused_or_read_as_data(at: int, byte: int) -> None:
    blob = bytearray(GOOD)
    blob[at] = byte
    for read in (lambda: learn(blob, 5), lambda: extract(layout(GEOMETRY, 2), blob, 0, 5)):
        try:
            read()
        except EdgeLLMError:
            pass


def test_v_layout_words_are_the_ones_that_travel() -> None:
    words: set[VLayout] = {layout(GEOMETRY, 1, True).v_layout, layout(GEOMETRY, 1, False).v_layout}
    assert words == {"columns", "rows"}


@pytest.mark.parametrize("v_columns", [False, True])
@pytest.mark.parametrize("stream", [0, 1, 2])
def test_heads_of_a_state_leave_no_byte_but_k_and_v_as_it_was(stream: int, v_columns: bool) -> None:
    """The memory of a state is not zeroed: whatever no payload brings has to be written."""
    for geometry in GEOMETRIES:
        shape, n = layout(geometry, n_stream=3, v_columns=v_columns), 5
        ones, zeros = bytearray(b"\xff" * shape.size(n)), bytearray(shape.size(n))
        for memory in (ones, zeros):
            _write_heads(memoryview(memory), shape, n, stream)
        untouched = sum(one != zero for one, zero in zip(ones, zeros, strict=True))
        assert untouched == shape.geometry.payload_bytes(n)
