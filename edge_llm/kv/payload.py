"""Cutting and joining canonical payloads without a native state between.

Pure. Owns arithmetic on the canonical form (kv/snapshot.py says how it lies). Refuses to know llama.cpp's bytes.
Invariant: no bit of a row changes; V columns move as whole elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from edge_llm.errors import LocalProtocolError
from edge_llm.kv.snapshot import Geometry, LayerShape, VLayout

Bytes = npt.NDArray[np.uint8]


def slice_payload(geometry: Geometry, v_layout: VLayout, payload: bytes, n_tokens: int, p0: int, p1: int) -> bytes:
    """Rows [p0, p1) of the payload of `n_tokens` positions, counted from its own first one."""
    if not 0 <= p0 < p1 <= n_tokens:
        raise LocalProtocolError(f"rows {p0} to {p1} of {n_tokens}")
    return b"".join(part[..., p0:p1, :].tobytes() for part in _parts(geometry, v_layout, payload, n_tokens))


def join_payloads(geometry: Geometry, v_layout: VLayout, payloads: Sequence[tuple[bytes, int]]) -> bytes:
    """The payload of consecutive ones, each given with its number of positions."""
    every = [_parts(geometry, v_layout, payload, n_tokens) for payload, n_tokens in payloads]
    return b"".join(np.concatenate(same, axis=-2).tobytes() for same in zip(*every, strict=True))


def _parts(geometry: Geometry, v_layout: VLayout, payload: bytes, n_tokens: int) -> Iterator[Bytes]:
    """K of each layer [n, row_bytes], then V of each layer: the same, or [dimensions, n, element_bytes]."""
    data = np.frombuffer(payload, np.uint8)
    if len(data) != geometry.payload_bytes(n_tokens):
        raise LocalProtocolError(f"a payload of {len(data)} bytes that should be {n_tokens} positions")
    layers = [layer for cache in geometry.caches for layer in cache.layers]
    at = 0
    for layer in layers:
        yield data[at : at + n_tokens * layer.k_row_bytes].reshape(n_tokens, layer.k_row_bytes)
        at += n_tokens * layer.k_row_bytes
    for layer in layers:
        v = data[at : at + n_tokens * layer.v_row_bytes]
        yield _columns(v, layer, n_tokens) if v_layout == "columns" else v.reshape(n_tokens, layer.v_row_bytes)
        at += n_tokens * layer.v_row_bytes


def _columns(data: Bytes, layer: LayerShape, n_tokens: int) -> Bytes:
    return data.reshape(layer.v_row_bytes // layer.v_element_bytes, n_tokens, layer.v_element_bytes)
