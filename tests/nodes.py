"""Nodes of a view, as if a worker had reported them."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from edge_llm.cluster.view import Node, Place
from edge_llm.engine.pacing import LEAST_PIECE_STEPS, LEAST_PROMPT_STEPS, MOST_PROMPT_STEPS, OF_LIMIT, PROMPT_STEPS
from edge_llm.worker.messages import Load, PromptReport, Rates, Role, WorkerStatus

IDLE = Load(
    slots_free=0,
    sequences_running=0,
    sequences_waiting=0,
    pending_prompt_tokens=0,
    kv_cells_free=0,
    decode_step_s=0.0,
    prefill_tokens_per_s=0.0,
)


# What a worker of this build says of how it reads prompts beside streams.
PACED: Final = Rates(
    prompt_steps=PROMPT_STEPS,
    of_limit=OF_LIMIT,
    least_prompt_steps=LEAST_PROMPT_STEPS,
    most_prompt_steps=MOST_PROMPT_STEPS,
    least_piece_steps=LEAST_PIECE_STEPS,
)


def load_of(**changes: Any) -> Load:
    return msgspec.structs.replace(IDLE, **changes)


def node_of(worker: str, role: Role, **changes: Any) -> Node:
    """A worker as its status would describe it; `changes` are fields of WorkerStatus."""
    status = WorkerStatus(
        worker=worker,
        role=role,
        is_ready=True,
        is_draining=False,
        model="m",
        model_sha256="0" * 64,
        architecture="simulated",
        quantization="none",
        memory="full",
        n_ctx=512,
        slots=0 if role == "prefill" else 4,
        chunk_tokens=8,
        vocab_size=259,
        kv_bytes_per_token=64,
        splits=True,
        split_reason="",
        compatibility="a" * 64,
        exactness_class="b" * 64,
        policy="exact",
        level="exact",
        level_reason="",
        version="0",
        pid=1,
        serves_prompts=role != "decode",
        build={},
        memory_bytes={},
        load=IDLE,
    )
    return Node(Place(worker, f"{worker}:1"), msgspec.structs.replace(status, **changes), seen_s=0.0)


def report_of(**changes: Any) -> PromptReport:
    """How a prompt came to be that took no time."""
    names = "wait_ms prefill_ms handoff_ms adopt_ms handoff_bytes overlapped_bytes restored_tokens computed_tokens"
    nothing = dict.fromkeys(names.split(), 0)
    return PromptReport(**{"mode": "local", "prefill_worker": "d1", "is_same_class": True, **nothing, **changes})
