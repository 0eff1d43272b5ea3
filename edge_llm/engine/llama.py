"""The real backend: one GGUF model, a context for decode slots and one for prompts of others.

Owns the kernel policy, the start-up self-test, the probe that gives a node its exactness class, and the moves
between native state bytes and `StateBlob`. Refuses to know requests, sampling, text and networks.

Life of a load: header read -> memory sum checked -> weights loaded by policy -> probe (class) -> recorded level
looked up, slots capped to what it covers -> contexts -> state layout learned from a real blob -> split and
rejoined once. What fails the self-test is served unsplit, with the reason in `facts.split_reason`.

Invariants: the prompt context is unified, holds one prompt, from cell 0; the decode context has one stream per
slot. Local prompts are computed in their slot's own stream (blueprint section 4 has them computed in the prompt
context and adopted: measured equal bit for bit, and here their KV is held once instead of twice).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from edge_llm.catalogue.gguf import ModelCard, read_card
from edge_llm.engine.backend import Interrupted, Logits, Row
from edge_llm.engine.batch import RowCost, fillers
from edge_llm.engine.engine import EngineFacts
from edge_llm.engine.level import LevelRecord, capped, read_level
from edge_llm.engine.memory import MemoryPlan, ModelSizes, check_fits, plan_memory
from edge_llm.engine.native import (
    ContextSettings,
    FlashAttention,
    KVType,
    NativeContext,
    NativeModel,
    build_facts,
    has_shape_dependent_kernels,
    use_tiled_kernels,
)
from edge_llm.engine.sequencer import Sequencer
from edge_llm.engine.vocabulary import LlamaVocabulary
from edge_llm.errors import LocalProtocolError, RestoreRefused, WorkerError
from edge_llm.kv.codec import BlobLayout, StateBlob, UnaccountedState, cut, extract, learn
from edge_llm.kv.snapshot import Compatibility, ExactnessClass, Identity, Level, Policy
from edge_llm.machine import cpu_kind

# Formats whose repacked kernels round a row the same way whatever batch it is in (blueprint section 4, measured
# per machine kind by `edge-llm verify`). Anything else is loaded plain.
EXACT_WHEN_REPACKED: Final = {
    "x86_64": frozenset({"Q4_0", "IQ4_NL"}),
    "aarch64": frozenset({"Q4_0", "IQ4_NL", "Q4_K", "Q5_K"}),
}
_REPACK_COLUMNS: Final = 8  # ggml-cpu/repack.cpp interleaves up to 8 rows of a weight matrix
_PROBE_TOKENS: Final = 33
_SELF_TEST_TOKENS: Final = 24
_SERVED, _EXPORT = 0, 1  # sequence ids of the prompt context


@dataclass(frozen=True, slots=True)
class LlamaSettings:
    """How to load. `n_ctx` cells per sequence, `slots` 0 for a prefill worker; threads per phase."""

    model_path: Path
    model_name: str
    model_sha256: str
    n_ctx: int = 4096
    slots: int = 4
    serves_prompts: bool = True
    chunk_tokens: int = 128
    k_type: KVType = "f16"
    v_type: KVType = "f16"
    policy: Policy = "exact"
    flash_attention: FlashAttention = "auto"
    threads: int = 1
    threads_batch: int = 1
    level_cap: Level = "exact"
    levels_dir: Path | None = None
    available_bytes: int | None = None

    @property
    def effective_flash_attention(self) -> FlashAttention:
        """Flash attention picks kernels by row count and depth, so policy exact turns `auto` into off."""
        return "off" if self.flash_attention == "auto" and self.policy == "exact" else self.flash_attention

    @property
    def rows(self) -> int:
        return max(self.chunk_tokens, self.slots)

    def context(self, *, n_seq: int, is_unified: bool, outputs: int) -> ContextSettings:
        return ContextSettings(
            n_ctx=self.n_ctx,
            n_seq=n_seq,
            rows=self.rows,
            outputs=outputs,
            is_unified=is_unified,
            k_type=self.k_type,
            v_type=self.v_type,
            flash_attention=self.effective_flash_attention,
            threads=self.threads,
            threads_batch=self.threads_batch,
        )


def repacked_tensors(card: ModelCard, machine: str) -> list[str]:
    """Names of the tensors that policy exact may repack on this machine kind.

    Never the token embedding: llama.cpp reads single rows of it, which a repacked buffer cannot give (it aborts).
    """
    good = EXACT_WHEN_REPACKED.get(machine, frozenset())
    return [
        tensor.name
        for tensor in card.tensors
        if tensor.type in good
        and tensor.name.endswith(".weight")
        and tensor.name != "token_embd.weight"
        and len(tensor.shape) == 2
        and tensor.shape[1] % _REPACK_COLUMNS == 0
    ]


def model_memory(card: ModelCard, settings: LlamaSettings, repacked: Sequence[str]) -> MemoryPlan:
    """The memory sum of this model under these settings."""
    names = set(repacked)
    sizes = ModelSizes(
        weights_bytes=card.weights_bytes,
        repacked_bytes=sum(tensor.n_bytes for tensor in card.tensors if tensor.name in names),
        kv_bytes_per_token=card.kv_bytes_per_token(settings.k_type, settings.v_type),
        vocab_size=card.vocab_size,
        n_head=card.n_head,
        n_embd=card.n_embd,
        n_ff=card.n_ff,
    )
    return plan_memory(
        sizes, n_ctx=settings.n_ctx, slots=settings.slots, serves_prompts=settings.serves_prompts, rows=settings.rows
    )


class LlamaBackend:
    """`Backend` over llama.cpp. Build it with `load`; one thread, except `interrupt`."""

    def __init__(
        self,
        model: NativeModel,
        settings: LlamaSettings,
        facts: EngineFacts,
        decode: NativeContext | None,
        prompts: NativeContext | None,
        window: int = 0,
    ) -> None:
        self._model, self._settings = model, settings
        self._decode_context, self._prompt_context = decode, prompts
        self._prompt_layout: BlobLayout | None = None
        self._export_buffer = bytearray()
        self._facts = facts
        self._row_cost = RowCost(0.0, 0.0)
        self._window = window
        self._filled: set[int] = set()  # slots with KV: a hole there is no place for a throw-away row
        self._can_abort = facts.memory in ("full", "sliding-window")

    @property
    def facts(self) -> EngineFacts:
        return self._facts

    @property
    def row_cost(self) -> RowCost:
        return self._row_cost

    @property
    def pieces(self) -> LlamaVocabulary:
        """Token texts for the engine thread, from the loaded model itself."""
        return LlamaVocabulary(self._model)

    def prompt(self, slot: int, ids: Sequence[int], p0: int) -> None:
        self._filled.add(slot)
        if not self._slots.prompt(ids, p0, slot):
            raise Interrupted

    def decode(self, rows: Sequence[Row]) -> Logits:
        context = self._slots
        slots = [row.slot for row in rows]
        self._filled.update(slots)
        idle = fillers(slots, self._filled, self._row_cost)
        if not idle:
            return context.decode([row.token_id for row in rows], [row.position for row in rows], slots)
        every = sorted([*rows, *(Row(slot, 0, 0) for slot in idle)], key=lambda row: row.slot)
        logits = context.decode(
            [row.token_id for row in every], [row.position for row in every], [row.slot for row in every]
        )
        for slot in idle:
            context.remove(slot)
        return logits[[row.slot not in idle for row in every]]

    def drop(self, slot: int) -> None:
        self._filled.discard(slot)
        self._slots.remove(slot)

    def restore(self, slot: int, blob: StateBlob) -> None:
        context = self._slots
        whole = blob if blob.is_complete else blob.truncated()
        context.set_state(slot, whole.buffer)
        self._filled.add(slot)
        last = context.last_position(slot)
        if last != whole.filled_to - 1:
            self._filled.discard(slot)
            context.remove(slot)
            raise RestoreRefused(
                f"llama.cpp restored {last + 1} of {whole.filled_to} positions; recomputing the prompt here"
            )

    def export(self, slot: int, n_tokens: int) -> StateBlob:
        if self._facts.layout is None:
            raise WorkerError(f"the KV of this model cannot travel: {self._facts.split_reason}")
        if 0 < self._window < n_tokens:
            # llama_kv_cache::state_write leaves out what the window masks
            raise WorkerError(f"only the last {self._window} positions of a running sequence of this model travel")
        return StateBlob.from_native(self._facts.layout, self._slots.state(slot), n_tokens)

    def serve_open(self) -> None:
        self._prompts.clear()

    def serve_prompt(self, ids: Sequence[int], p0: int) -> None:
        if not self._prompts.prompt(ids, p0, _SERVED):
            raise Interrupted

    def serve_export(self, p0: int, p1: int) -> bytes:
        assert self._prompt_layout is not None
        context, size = self._prompts, self._prompt_layout.size(p1 - p0)
        if len(self._export_buffer) < size:
            self._export_buffer = bytearray(size)
        state = memoryview(self._export_buffer)[:size]
        context.mark(_SERVED, _EXPORT, p0, p1)
        try:
            context.state_into(_EXPORT, state)
        finally:
            context.remove(_EXPORT)
        return extract(self._prompt_layout, state, p0, p1)

    def interrupt(self) -> None:
        """No-op for recurrent state: llama.cpp cannot take back part of it, so a piece there runs to its end."""
        if self._can_abort:
            for context in self._contexts:
                context.abort()

    def arm(self) -> None:
        for context in self._contexts:
            context.arm()

    def use_threads(self, threads: int) -> None:
        """Threads of both phases from the next call on; `verify` compares counts."""
        for context in self._contexts:
            context.use_threads(threads)

    def close(self) -> None:
        for context in self._contexts:
            context.close()
        self._model.close()

    @property
    def _contexts(self) -> list[NativeContext]:
        return [context for context in (self._decode_context, self._prompt_context) if context is not None]

    @property
    def _slots(self) -> NativeContext:
        if self._decode_context is None:
            raise LocalProtocolError("this worker has no decode context")
        return self._decode_context

    @property
    def _prompts(self) -> NativeContext:
        if self._prompt_context is None:
            raise LocalProtocolError("this worker has no prompt context")
        return self._prompt_context

    # -- start-up

    def start(self) -> None:
        """Learn the state layouts, split and rejoin one sequence, time a row and a run."""
        ids = _test_ids(self._model.n_vocab, _SELF_TEST_TOKENS + 1)
        try:
            if not self._facts.splits:
                raise UnaccountedState(self._facts.split_reason)
            layouts = [self._learn(context, ids) for context in self._contexts]
            self._adopt_layouts(layouts, ids)
        except (UnaccountedState, RestoreRefused, WorkerError) as error:
            self._facts = replace(self._facts, splits=False, split_reason=error.message, layout=None)
        if self._decode_context is not None:
            self._row_cost = self._measure_rows()

    def _learn(self, context: NativeContext, ids: Sequence[int]) -> BlobLayout:
        context.prompt(ids[:-1], 0, 0)
        try:
            return learn(context.state(0), _SELF_TEST_TOKENS)
        finally:
            context.remove(0)

    def _adopt_layouts(self, layouts: list[BlobLayout], ids: Sequence[int]) -> None:
        if len({layout.geometry for layout in layouts}) != 1:
            raise UnaccountedState("prompt and decode context keep different KV")
        self._prompt_layout = layouts[-1] if self._prompt_context is not None else None
        decode_layout = layouts[0] if self._decode_context is not None else None
        self._facts = replace(self._facts, layout=decode_layout, v_layout=layouts[-1].v_layout)
        if self._prompt_layout is not None:
            self._check_split(ids[:-1], self._prompt_layout)
        if decode_layout is not None:
            self._check_restore(ids, decode_layout)

    def _check_split(self, ids: Sequence[int], layout: BlobLayout) -> None:
        """Chunks joined are the whole state, byte for byte."""
        half = len(ids) // 2 + 1
        self.serve_open()
        self.serve_prompt(ids[:half], 0)
        joined = StateBlob(layout, len(ids), _SERVED)
        joined.place(0, half, self.serve_export(0, half), self._facts.v_layout)
        self.serve_prompt(ids[half:], half)
        joined.place(half, len(ids), self.serve_export(half, len(ids)), self._facts.v_layout)
        whole = cut(layout, self._prompts.state(_SERVED), len(ids), 0, len(ids))
        self._prompts.clear()
        if bytes(joined.payload(0, len(ids))) != bytes(whole):
            raise UnaccountedState("self-test failed: KV chunks joined differ from the whole state")

    def _check_restore(self, ids: Sequence[int], layout: BlobLayout) -> None:
        """A restored sequence gives the bits of the one it was copied from (in another slot where there is one)."""
        target = self._facts.slots - 1
        self.prompt(0, ids[:-1], 0)
        blob = StateBlob.from_native(layout, self._slots.state(0), len(ids) - 1)
        before = self._slots.decode(ids[-1:], [len(ids) - 1], [0]).tobytes()
        self.drop(0)
        self.restore(target, blob)
        after = self._slots.decode(ids[-1:], [len(ids) - 1], [target]).tobytes()
        self.drop(target)
        if before != after:
            raise UnaccountedState(
                "self-test failed: a restored sequence gives other logits than the one it was copied from"
            )

    def _measure_rows(self) -> RowCost:
        rows = min(self._facts.slots, 4)
        one_row_s, many_rows_s = self._time_rows(1), self._time_rows(rows)
        return RowCost.fit(one_row_s, many_rows_s, rows)

    def _time_rows(self, rows: int) -> float:
        best_s = float("inf")
        for position in range(4):
            started_s = time.perf_counter()
            self._slots.decode([1] * rows, [position] * rows, range(rows))
            best_s = min(best_s, time.perf_counter() - started_s)
        for slot in range(rows):
            self.drop(slot)
        return best_s


def load(settings: LlamaSettings) -> tuple[Sequencer, LlamaVocabulary]:
    """A ready engine and a vocabulary-only copy for the tokenizing thread.

    Raises ConfigError when it does not fit, CatalogueError for a bad file, EngineFailed when llama.cpp refuses.
    """
    backend = load_backend(settings)
    vocabulary = LlamaVocabulary(NativeModel(settings.model_path, vocab_only=True))
    cost = backend.row_cost
    return Sequencer(backend, backend.pieces, decode_step_s=cost.run_s + cost.row_s), vocabulary


def load_backend(settings: LlamaSettings) -> LlamaBackend:
    """The backend alone: what `verify` and the measuring commands drive directly."""
    card = read_card(settings.model_path)
    repacked = repacked_tensors(card, cpu_kind().split("/")[0]) if settings.policy == "exact" else []
    memory = model_memory(card, settings, repacked)
    if settings.available_bytes is not None:
        check_fits(memory, settings.available_bytes, settings.model_name)
    use_tiled_kernels(settings.policy == "fast")
    model = NativeModel(settings.model_path, policy=settings.policy, repacked=repacked)
    build = build_facts() | {"repacked_tensors": str(len(repacked))}
    identity = _identity(model, card, settings, build)
    record = _recorded_level(settings, identity, build)
    slots = min(settings.slots, record.width) if record.width and record.level == "exact" else settings.slots
    # a chunk no wider than the window has no masked cell, so every position of it is exported
    chunk_tokens = min(settings.chunk_tokens, card.sliding_window or settings.chunk_tokens)
    settings = replace(settings, slots=slots, chunk_tokens=chunk_tokens)
    facts = _facts(card, model, settings, identity, record, build, memory)
    decode = NativeContext(model, settings.context(n_seq=slots, is_unified=False, outputs=slots)) if slots else None
    prompts = (
        NativeContext(model, settings.context(n_seq=2, is_unified=True, outputs=1)) if facts.serves_prompts else None
    )
    backend = LlamaBackend(model, settings, facts, decode, prompts, card.sliding_window)
    backend.start()
    return backend


def _test_ids(n_vocab: int, count: int) -> list[int]:
    """A fixed text of ordinary tokens, the same on every node."""
    return [3 + (7919 * i + 104729) % (n_vocab - 3) for i in range(count)]


def _identity(model: NativeModel, card: ModelCard, settings: LlamaSettings, build: dict[str, str]) -> Identity:
    """Compatibility from what the KV means, class from what its bits depend on (with the probe's logits)."""
    context = NativeContext(model, replace(settings, n_ctx=256, slots=1).context(n_seq=1, is_unified=False, outputs=1))
    ids = _test_ids(model.n_vocab, _PROBE_TOKENS)
    try:
        context.prompt(ids[:-1], 0, 0)
        logits = context.decode(ids[-1:], [len(ids) - 1], [0])
        probe = hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest()
        geometry = learn(context.state(0), len(ids)).geometry if card.memory in ("full", "sliding-window") else None
    except UnaccountedState:
        geometry = None
    finally:
        context.close()
    flags = {key: build[key] for key in ("llama_cpp_python", "system_info")}
    exactness = ExactnessClass(
        machine=cpu_kind(),
        build=hashlib.sha256(repr(sorted(flags.items())).encode()).hexdigest(),
        policy=settings.policy,
        is_flash_attention=settings.effective_flash_attention != "off",
        probe_sha256=probe,
    )
    kept = (
        Compatibility(settings.model_sha256, geometry, rope=card.rope)
        if geometry
        else (settings.model_sha256, settings.k_type)
    )
    compatibility = kept.digest if isinstance(kept, Compatibility) else hashlib.sha256(repr(kept).encode()).hexdigest()
    return Identity(compatibility, exactness.digest)


def _recorded_level(settings: LlamaSettings, identity: Identity, build: dict[str, str]) -> LevelRecord:
    if settings.policy == "exact" and has_shape_dependent_kernels(build["system_info"]):
        reason = "this llama-cpp-python was built with tinyBLAS; rebuild it with -DGGML_LLAMAFILE=OFF (`make up` does)"
        return capped(LevelRecord("none", reason, settings.slots), settings.level_cap)
    if settings.levels_dir is None:
        return capped(LevelRecord("unverified", "no folder with verified levels was given", 0), settings.level_cap)
    return capped(read_level(settings.levels_dir, identity), settings.level_cap)


def _facts(
    card: ModelCard,
    model: NativeModel,
    settings: LlamaSettings,
    identity: Identity,
    record: LevelRecord,
    build: dict[str, str],
    memory: MemoryPlan,
) -> EngineFacts:
    travels = card.memory in ("full", "sliding-window")
    reason = "" if travels else f"{card.architecture} keeps {card.memory} state, which cannot be cut by position"
    return EngineFacts(
        model_name=settings.model_name,
        model_sha256=settings.model_sha256,
        architecture=card.architecture,
        quantization=card.quantization,
        memory=card.memory,
        n_ctx=settings.n_ctx,
        n_ctx_train=card.n_ctx_train,
        slots=settings.slots,
        serves_prompts=settings.serves_prompts and travels,
        chunk_tokens=settings.chunk_tokens,
        vocab_size=model.n_vocab,
        kv_bytes_per_token=card.kv_bytes_per_token(settings.k_type, settings.v_type),
        splits=travels,
        split_reason=reason,
        identity=identity,
        layout=None,
        v_layout="rows",
        policy=settings.policy,
        is_flash_attention=settings.effective_flash_attention != "off",
        level=record.level,
        level_reason=record.reason,
        build=build,
        memory_bytes=memory.parts,
    )
