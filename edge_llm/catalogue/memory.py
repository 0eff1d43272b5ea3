"""How much memory a worker needs for a model, as a sum a person can check, before anything is loaded.

Pure. Owns the arithmetic of blueprint section 6, and which weights are copied (repacked) on which machine; refuses to
know boards: a header or sizes come in, a `MemoryPlan` comes out. The compute buffer is an upper estimate from
llama.cpp's graph: attention scores of one micro-batch without flash attention, the feed-forward activations, and
logits. A worker that starts, `doctor` and `cluster render` all ask here: what is said to fit is what starts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from edge_llm.catalogue.gguf import ModelCard
from edge_llm.errors import ConfigError
from edge_llm.kv.snapshot import Policy
from edge_llm.words import counted

# Interpreter, FastAPI, numpy and the vocabulary's Python side, resident before a model is loaded.
PYTHON_BYTES: Final = 160 << 20
# Of a hand-off, beside a snapshot: two that are not sent yet and one that is being exported; one that is put away, the
# next one that is coming in, and what a first hand-off touches. `bench handoff` holds both ends to it.
CHUNKS_ON_THEIR_WAY: Final = 3
WORKER_ADVICE: Final = (
    "Lower --n-ctx, --slots or prefix_cache_bytes, use a smaller quantization, or run role prefill and decode on "
    "different boards."
)
# Formats whose repacked kernels round a row the same way whatever batch it is in (blueprint section 4, measured
# per machine kind by `edge-llm verify`). Anything else is loaded plain.
EXACT_WHEN_REPACKED: Final = {
    "x86_64": frozenset({"Q4_0", "IQ4_NL"}),
    "aarch64": frozenset({"Q4_0", "IQ4_NL", "Q4_K", "Q5_K"}),
}
_REPACK_COLUMNS: Final = 8  # ggml-cpu/repack.cpp interleaves up to 8 rows of a weight matrix


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What the GGUF header says, in bytes and counts."""

    weights_bytes: int
    repacked_bytes: int
    kv_bytes_per_token: int
    vocab_size: int
    n_head: int
    n_embd: int
    n_ff: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Named parts in bytes; `total_bytes` is their sum."""

    parts: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    def table(self) -> str:
        """One line per part and the sum, in MiB."""
        rows = [*self.parts.items(), ("sum", self.total_bytes)]
        return "\n".join(f"  {name:<28} {size / (1 << 20):>10,.0f} MiB" for name, size in rows)


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


def sizes_of(
    card: ModelCard, *, policy: Policy, repacked: Collection[str], k_type: str = "f16", v_type: str = "f16"
) -> ModelSizes:
    """What of a header counts in the sum. Under policy `fast` llama.cpp repacks whatever it can: all matrices are
    counted, which is the most it can be."""
    names = set(repacked) if policy == "exact" else {t.name for t in card.tensors if len(t.shape) == 2}
    return ModelSizes(
        weights_bytes=card.weights_bytes,
        repacked_bytes=sum(tensor.n_bytes for tensor in card.tensors if tensor.name in names),
        kv_bytes_per_token=card.kv_bytes_per_token(k_type, v_type),
        vocab_size=card.vocab_size,
        n_head=card.n_head,
        n_embd=card.n_embd,
        n_ff=card.n_ff,
    )


def plan_memory(
    sizes: ModelSizes, *, n_ctx: int, slots: int, serves_prompts: bool, rows: int, prefix_cache_bytes: int = 0
) -> MemoryPlan:
    """The sum for one worker. `rows` is the largest micro-batch; repacked weights are a private second copy."""
    contexts = (1 if slots else 0) + (1 if serves_prompts else 0)
    scores = 2 * rows * sizes.n_head * n_ctx * 4
    activations = rows * (3 * sizes.n_ff + 8 * sizes.n_embd) * 4
    logits = 2 * max(slots, 1) * sizes.vocab_size * 4
    kv = sizes.kv_bytes_per_token
    return MemoryPlan(
        {
            "weights": sizes.weights_bytes,
            "repacked weights": sizes.repacked_bytes,
            f"KV of {counted(slots, 'slot')}": slots * n_ctx * kv,
            "KV of the prompt context": n_ctx * kv if serves_prompts else 0,
            "compute and logits buffers": contexts * (scores + activations + logits),
            "one snapshot in adoption": n_ctx * kv if slots else 0,
            "chunks on their way": CHUNKS_ON_THEIR_WAY * min(rows, n_ctx) * kv,
            "kept prefixes": prefix_cache_bytes,
            "one of them in use": min(prefix_cache_bytes, n_ctx * kv),
            "Python": PYTHON_BYTES,
        }
    )


def check_fits(plan: MemoryPlan, available_bytes: int, what: str, advice: str = WORKER_ADVICE) -> None:
    """Raise ConfigError with the sum when `plan` does not fit. `advice`: what to change, in the options of whoever
    asks."""
    if plan.total_bytes > available_bytes:
        raise ConfigError(
            f"{what} does not fit: it needs {plan.total_bytes >> 20:,} MiB, this board has "
            f"{available_bytes >> 20:,} MiB free for it.\n{plan.table()}\n{advice}"
        )
