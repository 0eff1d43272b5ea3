"""Cutting canonical payloads without a native state between.

Pure. Owns arithmetic on the canonical form (kv/snapshot.py says how it lies), and what no payload from elsewhere may
hold. Refuses to know llama.cpp's bytes. Invariant: no bit of a row changes; V columns move as whole elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Final

import numpy as np
import numpy.typing as npt

from edge_llm.errors import LocalProtocolError, RemoteProtocolError
from edge_llm.kv.snapshot import Geometry, LayerShape, VLayout

Rows = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
# ggml types of floating point elements, as unsigned integers: what is not the sign, and the least of that which is no
# finite number. F32, F16, BF16.
_FLOATS: Final[Mapping[int, tuple[type[np.unsignedinteger], int, int]]] = {
    0: (np.uint32, 0x7FFFFFFF, 0x7F800000),
    1: (np.uint16, 0x7FFF, 0x7C00),
    30: (np.uint16, 0x7FFF, 0x7F80),
}
# Quantized types by block: bytes of one, which begins with an F16 scale. Q4_0, Q8_0.
_BLOCK_BYTES: Final[Mapping[int, int]] = {2: 18, 8: 34}
_F16: Final = 1
# Elements that are looked at together: a copy of all would be as large as the payload.
_BLOCK: Final = 1 << 16


def check_finite(geometry: Geometry, payload: bytes | bytearray | memoryview) -> None:
    """Raises RemoteProtocolError when a payload of whole positions holds an infinity or NaN.

    llama.cpp masks a cell by giving it weight 0, and 0 times NaN is NaN: after a restore such KV would spoil every
    later sequence in the same cells, until somebody writes over it.
    """
    data, at = np.frombuffer(payload, np.uint8), 0
    n_tokens = len(data) // geometry.kv_bytes_per_token
    layers = [layer for cache in geometry.caches for layer in cache.layers]
    parts = [(layer.k_type, layer.k_row_bytes) for layer in layers] + [
        (layer.v_type, layer.v_row_bytes) for layer in layers
    ]
    for kind, same in groupby(parts, key=lambda part: part[0]):
        size = n_tokens * sum(row_bytes for _, row_bytes in same)
        if not _is_finite(kind, data[at : at + size]):
            raise RemoteProtocolError("KV with infinite or undefined values, which would spoil what is computed later")
        at += size


def _is_finite(kind: int, data: npt.NDArray[np.uint8]) -> bool:
    if kind in _BLOCK_BYTES:
        scales = data.reshape(-1, _BLOCK_BYTES[kind])[:, :2]
        return _is_finite(_F16, np.ascontiguousarray(scales).reshape(-1))
    if kind not in _FLOATS or not len(data):
        return True  # of other types only whole numbers are known
    element, magnitude, infinite = _FLOATS[kind]
    values = data.view(element)
    blocks = (values[at : at + _BLOCK] for at in range(0, len(values), _BLOCK))
    return all(int((block & element(magnitude)).max()) < infinite for block in blocks)


def slice_payload(geometry: Geometry, v_layout: VLayout, payload: bytes, n_tokens: int, p0: int, p1: int) -> bytes:
    """Rows [p0, p1) of the payload of `n_tokens` positions, counted from its own first one."""
    if not 0 <= p0 < p1 <= n_tokens:
        raise LocalProtocolError(f"rows {p0} to {p1} of {n_tokens}")
    parts = _parts(geometry, v_layout, payload, n_tokens)
    return b"".join((part[p0:p1] if axis == 0 else part[:, p0:p1]).tobytes() for part, axis in parts)


def _parts(geometry: Geometry, v_layout: VLayout, payload: bytes, n_tokens: int) -> Iterator[tuple[Rows, int]]:
    """K of each layer [n, row_bytes], then V of each layer: the same, or [dimensions, n] elements; each with the axis
    that counts positions."""
    data = np.frombuffer(payload, np.uint8)
    if len(data) != geometry.payload_bytes(n_tokens):
        raise LocalProtocolError(f"a payload of {len(data)} bytes that should be {n_tokens} positions")
    layers = [layer for cache in geometry.caches for layer in cache.layers]
    at = 0
    for layer in layers:
        yield data[at : at + n_tokens * layer.k_row_bytes].reshape(n_tokens, layer.k_row_bytes), 0
        at += n_tokens * layer.k_row_bytes
    for layer in layers:
        v = data[at : at + n_tokens * layer.v_row_bytes]
        yield (_columns(v, layer, n_tokens), 1) if v_layout == "columns" else (v.reshape(n_tokens, -1), 0)
        at += n_tokens * layer.v_row_bytes


def _columns(data: npt.NDArray[np.uint8], layer: LayerShape, n_tokens: int) -> Rows:
    """Whole elements: moving them byte by byte takes ten times as long."""
    elements = data.view(np.uint16) if layer.v_element_bytes == 2 else data.view(np.uint32)
    return elements.reshape(layer.v_row_bytes // layer.v_element_bytes, n_tokens)
