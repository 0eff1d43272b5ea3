"""How near a decode step is to what memory allows: the bytes it must read, and their share of the bandwidth. Pure.

Owns the count: every weight once per step, whatever the number of sequences; of the experts of a mixture as many as
that many tokens choose at most; the KV of every sequence at the mean depth of the test. The token embedding counts
only where it is the output matrix too: a step reads one row of it.
Refuses to know how bandwidth and rates are measured.

A share above 1 is possible: weights that stay in a processor's cache are not read from memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from edge_llm.catalogue.gguf import Tensor

_EMBEDDING: Final = "token_embd.weight"
_OUTPUT: Final = "output.weight"
# ffn_gate_exps, ffn_up_exps, ffn_down_exps: all experts of a layer in one tensor
_EXPERTS: Final = "_exps."


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What one decode step reads."""

    weights_bytes: int
    kv_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes


def read_weights_bytes(tensors: Sequence[Tensor], rows: int, expert_share: float = 1.0) -> int:
    """Weights read by a step of `rows` sequences; `expert_share` of the experts serve one token."""
    is_tied = all(tensor.name != _OUTPUT for tensor in tensors)
    read_share = min(1.0, rows * expert_share)
    total = 0.0
    for tensor in tensors:
        if tensor.name == _EMBEDDING and not is_tied:
            continue
        total += tensor.n_bytes * (read_share if _EXPERTS in tensor.name else 1.0)
    return int(total)


def step_bytes(weights_bytes: int, kv_bytes_per_token: int, rows: int, n_depth: int, n_gen: int) -> StepBytes:
    """Of a test of `n_gen` steps behind `n_depth` tokens: at its mean depth, the token itself included."""
    mean_depth = n_depth + (n_gen + 1) / 2
    return StepBytes(weights_bytes, int(rows * kv_bytes_per_token * mean_depth))


def roofline_share(bytes_per_step: int, steps_per_s: float, bandwidth_bytes_per_s: float) -> float | None:
    """None without a bandwidth."""
    return bytes_per_step * steps_per_s / bandwidth_bytes_per_s if bandwidth_bytes_per_s > 0 else None
