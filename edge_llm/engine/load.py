"""Loading a model: from a file and settings to a ready engine.

Owns the settings, and the probe that gives a node its exactness class. Refuses to know what is done with the engine.

Life of a load: header read -> memory sum checked -> weights loaded by policy -> probe (class) -> recorded level
looked up, slots capped to what it covers -> contexts -> `LlamaBackend.start`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from edge_llm.catalogue.gguf import ModelCard, read_card
from edge_llm.catalogue.memory import MemoryPlan, check_fits, plan_memory, repacked_tensors, sizes_of
from edge_llm.engine.engine import EngineFacts
from edge_llm.engine.level import LevelRecord, capped, read_level
from edge_llm.engine.llama import LlamaBackend, known_ids
from edge_llm.engine.native import (
    ContextSettings,
    FlashAttention,
    KVType,
    NativeContext,
    NativeModel,
    build_facts,
    has_shape_dependent_kernels,
    has_tile_kernels,
    use_tiled_kernels,
)
from edge_llm.engine.sequencer import Sequencer
from edge_llm.engine.vocabulary import LlamaVocabulary
from edge_llm.kv.codec import UnaccountedState, learn
from edge_llm.kv.snapshot import Compatibility, ExactnessClass, Identity, Level, Policy
from edge_llm.machine import cpu_kind

_PROBE_TOKENS: Final = 33


@dataclass(frozen=True, slots=True)
class LlamaSettings:
    """How to load. `n_ctx` cells per sequence, `slots` 0 for a prefill worker; threads per phase. `prefix_cache_bytes`
    is what the worker keeps beside the engine: it counts in the memory sum only."""

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
    prefix_cache_bytes: int = 0
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


def model_memory(card: ModelCard, settings: LlamaSettings, repacked: Sequence[str]) -> MemoryPlan:
    """The memory sum of this model under these settings."""
    sizes = sizes_of(card, policy=settings.policy, repacked=repacked, k_type=settings.k_type, v_type=settings.v_type)
    return plan_memory(
        sizes,
        n_ctx=settings.n_ctx,
        slots=settings.slots,
        serves_prompts=settings.serves_prompts,
        rows=settings.rows,
        prefix_cache_bytes=settings.prefix_cache_bytes,
    )


def load(settings: LlamaSettings) -> tuple[Sequencer, LlamaVocabulary]:
    """A ready engine and a vocabulary-only copy for tokenizing.

    Raises ConfigError when it does not fit, CatalogueError for a bad file, EngineFailed when llama.cpp refuses.
    """
    backend = load_backend(settings)
    vocabulary = LlamaVocabulary(NativeModel(settings.model_path, vocab_only=True))
    return Sequencer(backend, backend.pieces, first=backend.first_rates), vocabulary


def load_backend(settings: LlamaSettings) -> LlamaBackend:
    """The backend alone: what `verify` and the measuring commands drive directly.

    Loading computes (the probe, a first step), and it does so on a thread that ends. OpenMP keeps a team of threads for
    each thread that has ever computed, and once all teams together outnumber the cores, it lets them sleep at every
    barrier (libgomp: `gomp_managed_threads` above the available CPUs): a step of two threads took 2.4 times as long.
    Only the thread that steps the engine later on shall have a team.
    """
    with ThreadPoolExecutor(1, "load") as thread:
        return thread.submit(_loaded, settings).result()


def _loaded(settings: LlamaSettings) -> LlamaBackend:
    card = read_card(settings.model_path)
    repacked = repacked_tensors(card, cpu_kind().split("/")[0]) if settings.policy == "exact" else []
    memory = model_memory(card, settings, repacked)
    if settings.available_bytes is not None:
        check_fits(memory, settings.available_bytes, settings.model_name)
    use_tiled_kernels(settings.policy == "fast")
    model = NativeModel(settings.model_path, policy=settings.policy, repacked=repacked)
    build = build_facts() | {"repacked_tensors": str(len(repacked))}
    identity = identity_of(model, card, settings, build)
    record = recorded_level(settings, identity, build)
    slots = min(settings.slots, record.width) if record.width and record.level == "exact" else settings.slots
    # a chunk no wider than the window has no masked cell, so every position of it is exported
    chunk_tokens = min(settings.chunk_tokens, card.sliding_window or settings.chunk_tokens)
    settings = replace(settings, slots=slots, chunk_tokens=chunk_tokens)
    facts = _facts(card, model, settings, identity, record, build, memory)
    decode = NativeContext(model, settings.context(n_seq=slots, is_unified=False, outputs=slots)) if slots else None
    prompts = (
        NativeContext(model, settings.context(n_seq=2, is_unified=True, outputs=1)) if facts.serves_prompts else None
    )
    backend = LlamaBackend(model, facts, decode, prompts, card.sliding_window)
    backend.start()
    return backend


def identity_of(model: NativeModel, card: ModelCard, settings: LlamaSettings, build: dict[str, str]) -> Identity:
    """Compatibility from what the KV means, class from what its bits depend on (with the probe's logits)."""
    context = NativeContext(model, replace(settings, n_ctx=256, slots=1).context(n_seq=1, is_unified=False, outputs=1))
    ids = known_ids(model.n_vocab, _PROBE_TOKENS)
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


def recorded_level(settings: LlamaSettings, identity: Identity, build: dict[str, str]) -> LevelRecord:
    """What `verify` found for this identity. A foreign build is what it was measured to be, and says how to rebuild."""
    if settings.levels_dir is None:
        found = LevelRecord("unverified", "no folder with verified levels was given", 0)
    else:
        found = read_level(settings.levels_dir, identity)
    if settings.policy == "exact" and has_shape_dependent_kernels(build["system_info"]):
        hint = "this llama-cpp-python was built with tinyBLAS; rebuild it with -DGGML_LLAMAFILE=OFF (`make up` does)"
        found = replace(found, reason=f"{found.reason}; {hint}")
    if settings.policy == "fast" and has_tile_kernels(build["system_info"]):
        hint = "this llama-cpp-python has AMX kernels, which may crash: no weights are repacked; `make up` rebuilds it"
        found = replace(found, reason=f"{found.reason}; {hint}")
    return capped(found, settings.level_cap)


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
        prompt_layout=None,
        v_layout="rows",
        policy=settings.policy,
        is_flash_attention=settings.effective_flash_attention != "off",
        level=record.level,
        level_reason=record.reason,
        build=build,
        memory_bytes=memory.parts,
    )
