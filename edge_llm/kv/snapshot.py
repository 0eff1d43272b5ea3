"""What one sequence's KV is, apart from any bytes: its geometry, its identity, and the rules of fit.

Pure. Owns the vocabulary of `kv/`: geometry (what rows exist), compatibility (must match, or the KV is
refused) and exactness class (may differ by policy, then the promise is `none`).
Refuses to know llama.cpp's byte format (kv/codec.py) and the wire (kv/frames.py).
Canonical payload of positions [p0, p1): for each cache, for each layer its K rows; then for each cache,
for each layer its V rows (`rows`: one row per position; `columns`: V transposed, one run of
p1 - p0 elements per V dimension).
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final, Literal

from edge_llm.errors import IncompatibleKV

VLayout = Literal["rows", "columns"]
MemoryKind = Literal["full", "sliding-window", "recurrent", "hybrid"]
# Kinds whose state cannot be cut by position: every request runs unsplit on one worker.
UNSPLIT: Final[frozenset[MemoryKind]] = frozenset({"recurrent", "hybrid"})
Level = Literal["exact", "same-plan", "none", "unverified"]
Policy = Literal["exact", "fast"]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer of one cache, per position. Types are ggml type numbers, sizes are bytes.

    `v_element_bytes` is the size of one V element (f32 4, f16/bf16 2), 0 when V is quantized by block and
    therefore cannot be transposed.
    """

    k_type: int
    k_row_bytes: int
    v_type: int
    v_row_bytes: int
    v_element_bytes: int


@dataclass(frozen=True, slots=True)
class CacheShape:
    """One KV cache: llama.cpp keeps one for full attention, two (base, window) for sliding windows."""

    layers: tuple[LayerShape, ...]

    @property
    def k_bytes_per_token(self) -> int:
        return sum(layer.k_row_bytes for layer in self.layers)

    @property
    def v_bytes_per_token(self) -> int:
        return sum(layer.v_row_bytes for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Geometry:
    """All KV rows one position has."""

    caches: tuple[CacheShape, ...]

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(cache.k_bytes_per_token + cache.v_bytes_per_token for cache in self.caches)

    def payload_bytes(self, tokens: int) -> int:
        """Length of the canonical payload of `tokens` positions."""
        return tokens * self.kv_bytes_per_token


@dataclass(frozen=True, slots=True)
class Compatibility:
    """Everything that must be equal for KV to mean the same thing on both sides."""

    model_sha256: str
    geometry: Geometry
    rope: str
    adapters: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        return digest_of(asdict(self))


@dataclass(frozen=True, slots=True)
class ExactnessClass:
    """Nodes of one class replace each other bit for bit.

    `machine`: architecture and CPU features; `build`: llama.cpp commit and ggml flags;
    `probe_sha256`: hash of the logits of a fixed probe (it catches what the other fields miss).
    """

    machine: str
    build: str
    policy: Policy
    is_flash_attention: bool
    probe_sha256: str

    @property
    def digest(self) -> str:
        return digest_of(asdict(self))


@dataclass(frozen=True, slots=True)
class Identity:
    """The two digests that travel with KV and that workers publish."""

    compatibility: str
    exactness_class: str


def check_compatible(ours: Identity, theirs: Identity) -> bool:
    """Return whether the exactness classes agree too; raise IncompatibleKV when the KV itself cannot be used."""
    if ours.compatibility != theirs.compatibility:
        raise IncompatibleKV(
            "the KV offered was made by another model, cache type or geometry "
            f"(ours {ours.compatibility[:12]}, theirs {theirs.compatibility[:12]}); computing locally"
        )
    return ours.exactness_class == theirs.exactness_class


def digest_of(value: object) -> str:
    """sha256 hex of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def ids_digest(ids: Sequence[int]) -> str:
    """sha256 hex of token ids as little-endian i32: binds a ticket and a KV stream to one prompt."""
    numbers = array("i", ids)  # element by element it would be most of what a gateway does for a long prompt
    if sys.byteorder == "big":
        numbers.byteswap()
    return hashlib.sha256(numbers.tobytes()).hexdigest()
