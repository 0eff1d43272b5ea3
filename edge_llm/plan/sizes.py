"""What counts of a model in a worker's memory sum, from its header or from what a board that has it said of it.

Pure. Owns the two ways to `SizesOf`; the arithmetic is catalogue/memory.py's. Refuses to find files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edge_llm.catalogue.gguf import KV_TYPE_BYTES, ModelCard
from edge_llm.catalogue.memory import ModelSizes, repacked_tensors, sizes_of
from edge_llm.errors import ConfigError
from edge_llm.kv.snapshot import Policy
from edge_llm.plan.boards import MACHINES, SizesOf

_COUNTS: Final = ("weights_bytes", "kv_bytes_per_token", "vocabulary", "heads", "embedding", "feed_forward")
_WHOLE: Final = frozenset({"full", "sliding-window"})


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model whose sizes are known. `splits`: whether its KV can travel. `context`: tokens that it was trained for; 0:
    its file does not say. `file`: its name without a folder. `sha256`: empty: not known."""

    sizes: SizesOf
    splits: bool
    kv_bytes_per_token: int
    file_bytes: int
    context: int
    file: str
    sha256: str = ""


def from_card(card: ModelCard, policy: Policy) -> KnownModel:
    def sizes(machine: str, k_type: str, v_type: str) -> ModelSizes:
        repacked = repacked_tensors(card, machine)
        return sizes_of(card, policy=policy, repacked=repacked, k_type=k_type, v_type=v_type)

    return KnownModel(
        sizes,
        card.memory in _WHOLE,
        card.kv_bytes_per_token(),
        card.file_bytes,
        card.n_ctx_train,
        Path(card.path).name,
    )


def from_facts(facts: Mapping[str, Any], policy: Policy, where: str) -> KnownModel:
    """`facts`: what `edge-llm models show MODEL --json` prints. Raises ConfigError that names what is missing."""
    wanted = [*_COUNTS, "head_size_k", "head_size_v", "file_bytes", *map(repacked_key, MACHINES.values())]
    wrong = [key for key in wanted if not _is_count(facts.get(key))]
    if wrong or not isinstance(facts.get("memory"), str):
        raise ConfigError(
            f"{where} is not what `edge-llm models show MODEL --json` prints: {', '.join(wrong) or 'memory'} is missing"
        )
    head_k, head_v = facts["head_size_k"], facts["head_size_v"]

    def sizes(machine: str, k_type: str, v_type: str) -> ModelSizes:
        share = (head_k * KV_TYPE_BYTES[k_type] + head_v * KV_TYPE_BYTES[v_type]) / (2 * (head_k + head_v) or 1)
        return ModelSizes(
            weights_bytes=facts["weights_bytes"],
            # under policy fast llama.cpp copies what it can: all of it is the most that can be
            repacked_bytes=facts[repacked_key(machine)] if policy == "exact" else facts["weights_bytes"],
            kv_bytes_per_token=int(facts["kv_bytes_per_token"] * share),
            vocab_size=facts["vocabulary"],
            n_head=facts["heads"],
            n_embd=facts["embedding"],
            n_ff=facts["feed_forward"],
        )

    context = facts.get("context")
    return KnownModel(
        sizes,
        facts["memory"] in _WHOLE,
        facts["kv_bytes_per_token"],
        facts["file_bytes"],
        context if isinstance(context, int) else 0,
        str(facts.get("file", "")),
        str(facts.get("sha256") or ""),
    )


def check_context(name: str, model: KnownModel, n_ctx: int) -> None:
    """Raises ConfigError for a context that is longer than the model's own: it starts, and makes no sense past that."""
    if 0 < model.context < n_ctx:
        raise ConfigError(
            f"n_ctx: {n_ctx:,} is more than {name} was trained for, {model.context:,} tokens, and n_ctx is of one "
            f"sequence: what it says past that makes no sense. Write n_ctx: {model.context} or less"
        )


def facts_of(card: ModelCard) -> dict[str, int]:
    """What `models show` adds to a header's own words, so that `from_facts` can do without the file."""
    by_name = {tensor.name: tensor.n_bytes for tensor in card.tensors}
    return {
        "embedding": card.n_embd,
        "feed_forward": card.n_ff,
        **{
            repacked_key(machine): sum(by_name[name] for name in repacked_tensors(card, machine))
            for machine in MACHINES.values()
        },
    }


def repacked_key(machine: str) -> str:
    return f"repacked_bytes_{machine}"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 1 << 50
