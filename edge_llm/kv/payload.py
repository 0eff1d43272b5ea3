"""Cutting canonical payloads without a native state between.

Pure. Owns arithmetic on the canonical form (kv/snapshot.py says how it lies). Refuses to know llama.cpp's bytes.
Invariant: no bit of a row changes; V columns move as whole elements.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from edge_llm.errors import LocalProtocolError
from edge_llm.kv.snapshot import Geometry, LayerShape, VLayout

Rows = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


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
