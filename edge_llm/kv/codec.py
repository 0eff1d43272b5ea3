"""llama.cpp's bytes of one sequence <-> the canonical payload that travels.

Pure. Owns the byte format of `llama_state_seq_get_data` (src/llama-kv-cache.cpp: state_write, state_write_meta,
state_write_data) as of the pinned llama.cpp. It is learned from a real blob at start (`learn`), which must
account for every byte; afterwards blobs are only ever compared with what was learned. Refuses to know contexts,
frames and where bytes come from.

Invariants: nothing here trusts a length inside a payload: every offset follows from the geometry and the token
count. A `StateBlob` is allocated once and filled in order; `filled_to` positions of it are valid.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from edge_llm.errors import LocalProtocolError, RemoteProtocolError, WorkerError
from edge_llm.kv.snapshot import CacheShape, Geometry, LayerShape, VLayout

Bytes = npt.NDArray[np.uint8]
Elements = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Buffer = bytes | bytearray | memoryview

_PREFIX: Final = struct.Struct("<Ii")  # magic, sequence id
_CELL: Final = np.dtype([("pos", "<i4"), ("n_seq", "<u4"), ("seq", "<i4")])  # without M-RoPE's extension
_U32: Final = struct.Struct("<I")
_LAYOUT: Final = struct.Struct("<II")  # v_trans, n_layer
_ROWS: Final = struct.Struct("<iQ")  # type, bytes per row
_COLUMNS: Final = struct.Struct("<iII")  # type, bytes per element, V dimensions
# ggml types whose values are single elements, so that V can be transposed: F32, F16, BF16
_ELEMENT_BYTES: Final = {0: 4, 1: 2, 30: 2}
_MAX_CACHES: Final = 2
_MAX_STREAMS: Final = 256
_MAX_LAYERS: Final = 1024
_MAX_ROW_BYTES: Final = 1 << 24


class UnaccountedState(WorkerError):
    """A state holds something this codec cannot account for: the model is served unsplit."""

    code = "unaccounted_state"


@dataclass(frozen=True, slots=True)
class BlobLayout:
    """How one context lays out a sequence: geometry, number of streams, V transposed or not, magic."""

    geometry: Geometry
    n_stream: int
    v_columns: bool
    magic: int

    @property
    def v_layout(self) -> VLayout:
        return "columns" if self.v_columns else "rows"

    def size(self, n_tokens: int) -> int:
        """Bytes of the state of a sequence of `n_tokens` positions."""
        return _PREFIX.size + sum(self._cache_size(cache, n_tokens) for cache in self.geometry.caches)

    def _cache_size(self, cache: CacheShape, n_tokens: int) -> int:
        head = _U32.size * (1 + self.n_stream) + n_tokens * _CELL.itemsize + _LAYOUT.size
        per_layer = _ROWS.size + (_COLUMNS.size if self.v_columns else _ROWS.size)
        rows = n_tokens * (cache.k_bytes_per_token + cache.v_bytes_per_token)
        return head + len(cache.layers) * per_layer + rows


class _Reader:
    """Bounded little-endian reads; running past the end is UnaccountedState."""

    def __init__(self, data: Buffer) -> None:
        self.data = memoryview(data).cast("B")
        self.at = 0

    def take(self, form: struct.Struct) -> tuple[int, ...]:
        return form.unpack(self.skip(form.size))

    def skip(self, size: int) -> memoryview:
        if size < 0 or self.at + size > len(self.data):
            raise UnaccountedState("the KV state is shorter than its own sizes say")
        self.at += size
        return self.data[self.at - size : self.at]


def learn(blob: Buffer, n_tokens: int) -> BlobLayout:
    """Read the layout out of a real state of one sequence with positions 0 .. n_tokens-1.

    Raises UnaccountedState when any byte is left unexplained: recurrent or hybrid state, M-RoPE cells, MLA caches
    without V, masked cells left out.
    """
    reader = _Reader(blob)
    magic, _seq = reader.take(_PREFIX)
    caches: list[CacheShape] = []
    kinds: set[tuple[int, int]] = set()
    while reader.at < len(reader.data):
        if len(caches) == _MAX_CACHES:
            raise UnaccountedState(f"{len(reader.data) - reader.at} bytes of KV state are of an unknown kind")
        cache, n_stream, v_trans = _learn_cache(reader, n_tokens)
        caches.append(cache)
        kinds.add((n_stream, v_trans))
    if len(kinds) != 1:
        raise UnaccountedState("the KV state has no cache, or caches of different layouts")
    n_stream, v_trans = kinds.pop()
    layout = BlobLayout(Geometry(tuple(caches)), n_stream, bool(v_trans), magic)
    if layout.size(n_tokens) != len(reader.data):
        explained = layout.size(n_tokens)
        raise UnaccountedState(f"the KV state has {len(reader.data)} bytes, its geometry explains {explained}")
    return layout


def _learn_cache(reader: _Reader, n_tokens: int) -> tuple[CacheShape, int, int]:
    """One cache: exactly one stream has cells, and they are positions 0 .. n_tokens-1 in order."""
    (n_stream,) = reader.take(_U32)
    if not 1 <= n_stream <= _MAX_STREAMS:
        raise UnaccountedState(f"the KV state names {n_stream} streams")
    found: tuple[CacheShape, int] | None = None
    for _ in range(n_stream):
        (cells,) = reader.take(_U32)
        if cells == 0:
            continue
        if cells != n_tokens or found is not None:
            raise UnaccountedState(f"the KV state has {cells} cells where {n_tokens} positions were computed")
        _check_cells(reader.skip(cells * _CELL.itemsize), 0, cells)
        found = _learn_layers(reader, n_tokens)
    if found is None:
        raise UnaccountedState("the KV state has no cells")
    return found[0], n_stream, found[1]


def _check_cells(data: memoryview, p0: int, p1: int) -> None:
    cells = np.frombuffer(data, _CELL)
    if not (np.array_equal(cells["pos"], np.arange(p0, p1)) and (cells["n_seq"] == 1).all()):
        raise UnaccountedState(f"the cells of the KV state are not positions {p0} to {p1 - 1} in order")


def _learn_layers(reader: _Reader, n_tokens: int) -> tuple[CacheShape, int]:
    v_trans, n_layer = reader.take(_LAYOUT)
    if v_trans > 1 or not 1 <= n_layer <= _MAX_LAYERS:
        raise UnaccountedState(f"the KV state has {n_layer} layers, V layout {v_trans}")
    keys = [_learn_rows(reader, n_tokens) for _ in range(n_layer)]
    values = [
        _learn_columns(reader, n_tokens) if v_trans else (*_learn_rows(reader, n_tokens), 0) for _ in range(n_layer)
    ]
    layers = (
        LayerShape(k_type, k_row, v_type, v_row, element or _ELEMENT_BYTES.get(v_type, 0))
        for (k_type, k_row), (v_type, v_row, element) in zip(keys, values, strict=True)
    )
    return CacheShape(tuple(layers)), v_trans


def _learn_rows(reader: _Reader, n_tokens: int) -> tuple[int, int]:
    kind, row_bytes = reader.take(_ROWS)
    if not 1 <= row_bytes <= _MAX_ROW_BYTES:
        raise UnaccountedState(f"a row of the KV state has {row_bytes} bytes")
    reader.skip(n_tokens * row_bytes)
    return kind, row_bytes


def _learn_columns(reader: _Reader, n_tokens: int) -> tuple[int, int, int]:
    kind, element_bytes, dimensions = reader.take(_COLUMNS)
    row_bytes = element_bytes * dimensions
    if element_bytes != _ELEMENT_BYTES.get(kind) or not 1 <= row_bytes <= _MAX_ROW_BYTES:
        raise UnaccountedState(f"V of the KV state has {dimensions} dimensions of {element_bytes} bytes, type {kind}")
    reader.skip(n_tokens * row_bytes)
    return kind, row_bytes, element_bytes


@dataclass(frozen=True, slots=True)
class _Offsets:
    """Where each layer's K and V data begin in a blob, cache by cache."""

    k: tuple[tuple[int, ...], ...]
    v: tuple[tuple[int, ...], ...]
    cells: tuple[int, ...]


def _offsets(layout: BlobLayout, n_tokens: int, stream: int) -> _Offsets:
    """Offsets in a state of `n_tokens` positions whose cells stand in the `stream`-th place."""
    at = _PREFIX.size
    v_head = _COLUMNS.size if layout.v_columns else _ROWS.size
    keys: list[tuple[int, ...]] = []
    values: list[tuple[int, ...]] = []
    cells: list[int] = []
    for cache in layout.geometry.caches:
        at += _U32.size * (2 + stream)
        cells.append(at)
        at += n_tokens * _CELL.itemsize + _LAYOUT.size
        k_at, v_at = [], []
        for layer in cache.layers:
            k_at.append(at + _ROWS.size)
            at += _ROWS.size + n_tokens * layer.k_row_bytes
        for layer in cache.layers:
            v_at.append(at + v_head)
            at += v_head + n_tokens * layer.v_row_bytes
        at += _U32.size * (layout.n_stream - 1 - stream)
        keys.append(tuple(k_at))
        values.append(tuple(v_at))
    return _Offsets(tuple(keys), tuple(values), tuple(cells))


def _write_heads(blob: memoryview, layout: BlobLayout, n_tokens: int, stream: int) -> _Offsets:
    """Everything of a state but its K and V data."""
    offsets = _offsets(layout, n_tokens, stream)
    _PREFIX.pack_into(blob, 0, layout.magic, stream)
    cells = np.zeros(n_tokens, _CELL)
    cells["pos"], cells["n_seq"], cells["seq"] = np.arange(n_tokens), 1, stream
    for number, cache in enumerate(layout.geometry.caches):
        at = offsets.cells[number]
        _write_counts(blob, layout.n_stream, n_tokens, stream, at)
        blob[at : at + cells.nbytes] = cells.tobytes()
        _LAYOUT.pack_into(blob, at + cells.nbytes, int(layout.v_columns), len(cache.layers))
        for layer, k_at, v_at in zip(cache.layers, offsets.k[number], offsets.v[number], strict=True):
            _ROWS.pack_into(blob, k_at - _ROWS.size, layer.k_type, layer.k_row_bytes)
            if layout.v_columns:
                dimensions = layer.v_row_bytes // layer.v_element_bytes
                _COLUMNS.pack_into(blob, v_at - _COLUMNS.size, layer.v_type, layer.v_element_bytes, dimensions)
            else:
                _ROWS.pack_into(blob, v_at - _ROWS.size, layer.v_type, layer.v_row_bytes)
        end = offsets.v[number][-1] + n_tokens * cache.layers[-1].v_row_bytes
        behind = _U32.size * (layout.n_stream - 1 - stream)
        blob[end : end + behind] = bytes(behind)
    return offsets


def _write_counts(blob: memoryview, n_stream: int, n_tokens: int, stream: int, cells_at: int) -> None:
    """Number of streams, then the cells of each: none before `stream`, whose cells begin at `cells_at`."""
    counts = struct.pack(f"<{2 + stream}I", n_stream, *([0] * stream), n_tokens)
    blob[cells_at - len(counts) : cells_at] = counts


class _Parts:
    """Views of a blob's K and V data, one pair per layer: K [n, row_bytes]; V [n, row_bytes] or
    [dimensions, n, element_bytes]. Writing to a view writes to the blob."""

    def __init__(self, blob: Bytes, layout: BlobLayout, n_tokens: int, offsets: _Offsets) -> None:
        self.k: list[Bytes] = []
        self.v: list[Bytes | Elements] = []
        self.layers: list[LayerShape] = []
        for number, cache in enumerate(layout.geometry.caches):
            for layer, k_at, v_at in zip(cache.layers, offsets.k[number], offsets.v[number], strict=True):
                self.layers.append(layer)
                self.k.append(blob[k_at : k_at + n_tokens * layer.k_row_bytes].reshape(n_tokens, -1))
                v = blob[v_at : v_at + n_tokens * layer.v_row_bytes]
                self.v.append(_columns_of(v, layer, n_tokens) if layout.v_columns else v.reshape(n_tokens, -1))


def _elements(data: Bytes, layer: LayerShape) -> Elements:
    """V elements as unsigned integers of their size: copies then move whole elements and no bit can change."""
    return data.view(np.uint16) if layer.v_element_bytes == 2 else data.view(np.uint32)


def _columns_of(data: Bytes, layer: LayerShape, n_tokens: int) -> Elements:
    """[V dimensions, n_tokens]"""
    return _elements(data, layer).reshape(-1, n_tokens)


def _stream_of(layout: BlobLayout, blob: Buffer) -> int:
    """Which place the cells of a native state stand in: zero counts before them."""
    reader = _Reader(blob)
    magic, _seq = reader.take(_PREFIX)
    (n_stream,) = reader.take(_U32)
    if magic != layout.magic or n_stream != layout.n_stream:
        raise UnaccountedState(f"the KV state has {n_stream} streams where {layout.n_stream} were learned")
    for stream in range(n_stream):
        if reader.take(_U32) != (0,):
            return stream
    raise UnaccountedState("the KV state has no cells")


def _checked_parts(layout: BlobLayout, blob: Buffer, p0: int, p1: int) -> _Parts:
    """Views into a native state that holds exactly positions [p0, p1), after comparing every head with the layout."""
    n_tokens = p1 - p0
    data = np.frombuffer(blob, np.uint8)
    stream = _stream_of(layout, blob)
    if len(data) != layout.size(n_tokens):
        expected = layout.size(n_tokens)
        raise UnaccountedState(f"the KV state has {len(data)} bytes where {n_tokens} positions need {expected}")
    offsets = _offsets(layout, n_tokens, stream)
    for number, cache in enumerate(layout.geometry.caches):
        at = offsets.cells[number]
        size = n_tokens * _CELL.itemsize
        if data[at - 4 : at].tobytes() != _U32.pack(n_tokens):
            raise UnaccountedState("a cache of the KV state has another number of cells")
        _check_cells(memoryview(blob)[at : at + size], p0, p1)
        head = _LAYOUT.pack(int(layout.v_columns), len(cache.layers))
        if data[at + size : at + size + _LAYOUT.size].tobytes() != head:
            raise UnaccountedState("a cache of the KV state has another layout than was learned")
        for layer, k_at in zip(cache.layers, offsets.k[number], strict=True):
            if data[k_at - _ROWS.size : k_at].tobytes() != _ROWS.pack(layer.k_type, layer.k_row_bytes):
                raise UnaccountedState("a layer of the KV state has another type or row size than was learned")
    return _Parts(data, layout, n_tokens, offsets)


def extract(layout: BlobLayout, blob: Buffer, p0: int, p1: int) -> bytes:
    """Canonical payload out of a native state that holds exactly positions [p0, p1), V as the layout has it."""
    parts = _checked_parts(layout, blob, p0, p1)
    return b"".join([part.data.cast("B") for part in (*parts.k, *parts.v)])


def cut(layout: BlobLayout, blob: Buffer, n_tokens: int, p0: int, p1: int) -> bytes:
    """Canonical payload of [p0, p1) out of a native state of the whole sequence [0, n_tokens)."""
    return _join(_checked_parts(layout, blob, 0, n_tokens), layout, p0, p1)


def _join(parts: _Parts, layout: BlobLayout, p0: int, p1: int) -> bytes:
    k = [part[p0:p1].tobytes() for part in parts.k]
    v = [(part[:, p0:p1] if layout.v_columns else part[p0:p1]).tobytes() for part in parts.v]
    return b"".join(k + v)


class StateBlob:
    """A native state in the making: allocated once, filled by payloads in order, handed to the engine whole."""

    def __init__(self, layout: BlobLayout, n_tokens: int, stream: int, memory: Bytes | None = None) -> None:
        """Reserve a state of `n_tokens` positions for the context that `layout` was learned from, in `memory` that an
        earlier one had, if it is large enough."""
        if n_tokens < 1 or not 0 <= stream:
            raise LocalProtocolError(f"a state of {n_tokens} positions in stream {stream}")
        self.layout, self.n_tokens, self.filled_to = layout, n_tokens, 0
        # the place of the cells is read past when a target sequence is given (state_read), so 0 serves all slots
        self._stream = min(stream, layout.n_stream - 1)
        # not bytearray: zeroing it holds the interpreter lock, 50 ms for 40 MB, and running streams wait. These pages
        # come with the first write to them; what was not placed is never read.
        size = layout.size(n_tokens)
        self.memory = memory if memory is not None and len(memory) >= size else np.empty(size, np.uint8)
        native = self.memory[:size]
        self._native = native.data
        offsets = _write_heads(self._native, layout, n_tokens, self._stream)
        self._parts = _Parts(native, layout, n_tokens, offsets)

    @classmethod
    def from_native(cls, layout: BlobLayout, blob: bytearray | memoryview, n_tokens: int) -> StateBlob:
        """A filled StateBlob of a native state of positions [0, n_tokens). Takes `blob` over: nothing is copied."""
        made = cls.__new__(cls)
        made.layout, made.n_tokens, made.filled_to = layout, n_tokens, n_tokens
        made._parts = _checked_parts(layout, blob, 0, n_tokens)
        made._stream = _stream_of(layout, blob)
        made._native = memoryview(blob)
        made.memory = np.frombuffer(blob, np.uint8)
        return made

    @property
    def is_complete(self) -> bool:
        return self.filled_to == self.n_tokens

    @property
    def nbytes(self) -> int:
        return self._native.nbytes

    @property
    def buffer(self) -> memoryview:
        """The native bytes; only a complete state may be handed to an engine."""
        if not self.is_complete:
            raise LocalProtocolError(f"state has {self.filled_to} of {self.n_tokens} positions")
        return self._native

    def place(self, p0: int, p1: int, payload: Buffer, v_layout: VLayout) -> None:
        """Scatter the canonical payload of [p0, p1), which must follow what is there.

        Raises RemoteProtocolError for gaps, overlaps, wrong lengths and V that cannot be transposed.
        """
        if p0 != self.filled_to or not p0 < p1 <= self.n_tokens:
            raise RemoteProtocolError(
                f"KV of positions {p0} to {p1} where {self.filled_to} to {self.n_tokens} is missing"
            )
        count = p1 - p0
        data = np.frombuffer(payload, np.uint8)
        if len(data) != self.layout.geometry.payload_bytes(count):
            expected = self.layout.geometry.payload_bytes(count)
            raise RemoteProtocolError(f"KV of {count} positions has {len(data)} bytes, not {expected}")
        at = 0
        for layer, target in zip(self._parts.layers, self._parts.k, strict=True):
            size = count * layer.k_row_bytes
            target[p0:p1] = data[at : at + size].reshape(count, -1)
            at += size
        for layer, columns_or_rows in zip(self._parts.layers, self._parts.v, strict=True):
            size = count * layer.v_row_bytes
            self._place_v(layer, columns_or_rows, data[at : at + size], (p0, p1), v_layout)
            at += size
        self.filled_to = p1

    def _place_v(
        self, layer: LayerShape, target: Bytes | Elements, source: Bytes, span: tuple[int, int], v_layout: VLayout
    ) -> None:
        p0, p1 = span
        if v_layout == self.layout.v_layout:
            if self.layout.v_columns:
                target[:, p0:p1] = _columns_of(source, layer, p1 - p0)
            else:
                target[p0:p1] = source.reshape(p1 - p0, -1)
            return
        if not layer.v_element_bytes:
            raise RemoteProtocolError(
                "a quantized V cache cannot be transposed: both workers need the same flash attention setting"
            )
        if self.layout.v_columns:
            target[:, p0:p1] = _elements(source, layer).reshape(p1 - p0, -1).T
        else:
            target[p0:p1] = np.ascontiguousarray(_columns_of(source, layer, p1 - p0).T).view(np.uint8)

    def payload(self, p0: int, p1: int) -> bytes:
        """Canonical payload of [p0, p1), V as this layout has it."""
        if not 0 <= p0 < p1 <= self.filled_to:
            raise LocalProtocolError(f"positions {p0} to {p1} of {self.filled_to} filled")
        return _join(self._parts, self.layout, p0, p1)

    def cut_short(self) -> None:
        """Become a complete state of exactly the positions filled so far (a sender died midway), in the memory that is
        there: everything moves towards the beginning, so the first one first."""
        if not self.filled_to:
            raise LocalProtocolError("a state without positions")
        native, count = np.frombuffer(self._native, np.uint8), self.filled_to
        offsets = _offsets(self.layout, count, self._stream)
        shorter = _Parts(native, self.layout, count, offsets)
        layers_before = 0
        for cache in self.layout.geometry.caches:
            mine = range(layers_before, layers_before + len(cache.layers))
            for layer in mine:
                shorter.k[layer][:] = self._parts.k[layer][:count]
            for layer in mine:
                whole = self._parts.v[layer]
                shorter.v[layer][:] = whole[:, :count] if self.layout.v_columns else whole[:count]
            layers_before = mine.stop
        self._native = self._native[: self.layout.size(count)]
        _write_heads(self._native, self.layout, count, self._stream)
        self._parts, self.n_tokens = shorter, count
