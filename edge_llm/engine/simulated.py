"""A backend that computes nothing: tokens and KV bytes are hashes of everything that came before.

Owns a stand-in for the model below engine/sequencer.py, for tests of scheduling, hand-off and faults, and for load
experiments with many workers on one machine. It keeps what exactness rests on and drops the arithmetic: the KV row of
a position depends on every row before it, logits depend on every row present, and both come from the bytes that are
in the slot. A missing, swapped or corrupted row therefore changes all later tokens, as it would in a model.

Durations are settings. Refuses to know sequences, requests and networks.
Invariant: state travels in llama.cpp's own byte format (kv/codec.py), so that codec and frames are used for real.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from edge_llm.engine.backend import Interrupted, Logits, Row
from edge_llm.engine.engine import EngineFacts
from edge_llm.engine.rates import Rates
from edge_llm.engine.sequencer import Sequencer
from edge_llm.errors import InvalidRequest, LocalProtocolError, RestoreRefused
from edge_llm.kv.codec import BlobLayout, StateBlob
from edge_llm.kv.snapshot import (
    CacheShape,
    Compatibility,
    ExactnessClass,
    Geometry,
    Identity,
    LayerShape,
    Level,
    digest_of,
)
from edge_llm.request import NO_OPTIONS, TemplateOption

MODEL: Final = "simulated"
_I16: Final = 25  # ggml type: any bits are a number
_ROW_BYTES: Final = 16
_LAYERS: Final = 2
_GEOMETRY: Final = Geometry((CacheShape((LayerShape(_I16, _ROW_BYTES, _I16, _ROW_BYTES, 2),) * _LAYERS),))
_MAGIC: Final = 0x73696D31
_BOS, _EOS = 1, 2
_FIRST_BYTE: Final = 3  # token id of the byte 0
VOCAB_SIZE: Final = _FIRST_BYTE + 256
# How far printable ASCII lies above the rest: answers are then mostly readable, with cut UTF-8 in between.
_LEAD: Final = np.zeros(VOCAB_SIZE, np.float32)
_LEAD[_FIRST_BYTE + 32 : _FIRST_BYTE + 127] = 4.0
# Logits are a window into this noise; where it begins is a hash of everything before. Fifty times as cheap as new
# noise for each token, and a thousand streams on one core need that.
_NOISE_PLACES: Final = 1 << 17
_NOISE: Final = np.random.Generator(np.random.Philox(key=1)).standard_normal(_NOISE_PLACES + VOCAB_SIZE, np.float32)


@dataclass(frozen=True, slots=True)
class SimulatedSettings:
    """`prompt_token_s`, `decode_run_s` and `decode_row_s` are how long work takes; 0 is as fast as it goes."""

    n_ctx: int = 4096
    slots: int = 4
    serves_prompts: bool = True
    chunk_tokens: int = 128
    model_name: str = MODEL
    prompt_token_s: float = 0.0
    decode_run_s: float = 0.0
    decode_row_s: float = 0.0
    level: Level = "exact"


@dataclass(slots=True)
class _Memory:
    """KV rows of one sequence, position by position, and a running digest of them."""

    rows: list[bytes] = field(default_factory=list)
    digest: bytes = b""

    def append(self, row: bytes) -> None:
        self.rows.append(row)
        self.digest = _hash(self.digest, row)

    def compute(self, ids: Sequence[int], p0: int) -> None:
        """Rows of `ids` at positions p0.., each from all that came before."""
        if p0 != len(self.rows):
            raise LocalProtocolError(f"position {p0} does not follow the {len(self.rows)} that have KV")
        for token_id in ids:
            self.append(_hash(self.digest, token_id.to_bytes(4, "little"), size=2 * _LAYERS * _ROW_BYTES))

    def payload(self, p0: int, p1: int) -> bytes:
        """Canonical payload (kv/snapshot.py): K rows of each layer, then V rows of each layer."""
        return b"".join(
            b"".join(row[part * _ROW_BYTES : (part + 1) * _ROW_BYTES] for row in self.rows[p0:p1])
            for part in range(2 * _LAYERS)
        )

    @classmethod
    def from_payload(cls, payload: bytes, n_tokens: int) -> _Memory:
        made, run = cls(), n_tokens * _ROW_BYTES
        for position in range(n_tokens):
            at = position * _ROW_BYTES
            made.append(b"".join(payload[part * run + at :][:_ROW_BYTES] for part in range(2 * _LAYERS)))
        return made


class SimulatedBackend:
    """`Backend` without a model; one thread, except `interrupt`."""

    def __init__(self, settings: SimulatedSettings) -> None:
        self._settings = settings
        self._slots = [_Memory() for _ in range(settings.slots)]
        self._served = _Memory()
        self._is_interrupted = threading.Event()
        layout = BlobLayout(_GEOMETRY, n_stream=max(1, settings.slots), v_columns=False, magic=_MAGIC)
        self._layout = layout
        self._facts = _facts(settings, layout)

    @property
    def facts(self) -> EngineFacts:
        return self._facts

    def prompt(self, slot: int, ids: Sequence[int], p0: int) -> None:
        self._spend_on_prompt(len(ids))
        self._slots[slot].compute(ids, p0)

    def decode(self, rows: Sequence[Row]) -> Logits:
        self._check_rows(rows)
        ends_s = time.monotonic() + self._settings.decode_run_s + len(rows) * self._settings.decode_row_s
        for row in rows:
            self._slots[row.slot].compute([row.token_id], row.position)
        logits = np.stack([_logits(self._slots[row.slot].digest) for row in rows])
        if (left_s := ends_s - time.monotonic()) > 0:
            time.sleep(left_s)
        return logits

    def drop(self, slot: int) -> None:
        self._slots[slot] = _Memory()

    def restore(self, slot: int, blob: StateBlob) -> None:
        if self._slots[slot].rows:
            raise RestoreRefused(f"slot {slot} is not empty")
        self._slots[slot] = _restored(blob)

    def export(self, slot: int, n_tokens: int) -> StateBlob:
        blob = StateBlob(self._layout, n_tokens, 0)
        blob.place(0, n_tokens, self._slots[slot].payload(0, n_tokens), "rows")
        return blob

    def serve_open(self, blob: StateBlob | None = None) -> None:
        self._served = _restored(blob) if blob is not None else _Memory()

    def serve_prompt(self, ids: Sequence[int], p0: int) -> None:
        self._spend_on_prompt(len(ids))
        self._served.compute(ids, p0)

    def serve_export(self, p0: int, p1: int) -> bytes:
        return self._served.payload(p0, p1)

    def interrupt(self) -> None:
        self._is_interrupted.set()

    def arm(self) -> None:
        self._is_interrupted.clear()

    def close(self) -> None:
        """Nothing native here."""

    def _spend_on_prompt(self, tokens: int) -> None:
        if self._is_interrupted.wait(tokens * self._settings.prompt_token_s):
            raise Interrupted

    def _check_rows(self, rows: Sequence[Row]) -> None:
        slots = [row.slot for row in rows]
        if not rows or slots != sorted(set(slots)):
            raise LocalProtocolError(f"decode rows must be in ascending slot order, each slot once: {slots}")


class SimulatedVocabulary:
    """`engine.Vocabulary` of bytes: token id = byte + 3; ids 0 to 2 are control tokens."""

    @property
    def size(self) -> int:
        return VOCAB_SIZE

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset({_EOS})

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        ids = [_FIRST_BYTE + byte for byte in text.encode("utf-8", errors="replace")]
        return [_BOS, *ids] if add_special else ids

    def render_chat(
        self, messages: Sequence[dict[str, str]], options: Mapping[str, TemplateOption] = NO_OPTIONS
    ) -> str:
        if not messages:
            raise InvalidRequest("messages is empty: send at least one message", param="messages")
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"

    def piece(self, token_id: int) -> bytes:
        return bytes([token_id - _FIRST_BYTE]) if token_id >= _FIRST_BYTE else b""


def create_simulated(settings: SimulatedSettings) -> tuple[Sequencer, SimulatedVocabulary]:
    """A ready engine and its vocabulary."""
    vocabulary = SimulatedVocabulary()
    first = Rates(settings.decode_run_s, settings.decode_row_s, token_s=settings.prompt_token_s)
    return Sequencer(SimulatedBackend(settings), vocabulary, first=first), vocabulary


def _restored(blob: StateBlob) -> _Memory:
    if blob.layout.geometry != _GEOMETRY:
        raise RestoreRefused("the state has another geometry")
    return _Memory.from_payload(blob.payload(0, blob.filled_to), blob.filled_to)


def _hash(*parts: bytes, size: int = 32) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=size).digest()


def _logits(digest: bytes) -> Logits:
    at = int.from_bytes(digest[:8], "little") % _NOISE_PLACES
    return _NOISE[at : at + VOCAB_SIZE] + _LEAD


def _facts(settings: SimulatedSettings, layout: BlobLayout) -> EngineFacts:
    sha256 = digest_of(settings.model_name)
    exactness = ExactnessClass("any", "simulated", "exact", is_flash_attention=False, probe_sha256=sha256)
    return EngineFacts(
        model_name=settings.model_name,
        model_sha256=sha256,
        architecture="simulated",
        quantization="none",
        memory="full",
        n_ctx=settings.n_ctx,
        n_ctx_train=settings.n_ctx,
        slots=settings.slots,
        serves_prompts=settings.serves_prompts,
        chunk_tokens=settings.chunk_tokens,
        vocab_size=VOCAB_SIZE,
        kv_bytes_per_token=_GEOMETRY.kv_bytes_per_token,
        splits=True,
        split_reason="",
        identity=Identity(Compatibility(sha256, _GEOMETRY, rope="none").digest, exactness.digest),
        layout=layout if settings.slots else None,
        prompt_layout=layout if settings.serves_prompts else None,
        v_layout="rows",
        policy="exact",
        is_flash_attention=False,
        level=settings.level,
        level_reason="hashes are the same everywhere",
    )
