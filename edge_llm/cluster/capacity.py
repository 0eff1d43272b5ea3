"""How much work nodes can do together, from the rates they published: what is known before any request has ended.

Pure. Owns the arithmetic of a full cluster in a steady state. Refuses to know queues, and what service was measured
(gateway/service.py): that replaces it as soon as there is some.

A node that decodes reads prompts, too, where prefill workers cannot keep up: its time is shared out between both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_llm.cluster.cost import NodeCost
from edge_llm.cluster.view import Node


@dataclass(frozen=True, slots=True)
class _Takes:
    """Seconds of a node's time for a request: to read its prompt, and for its share of full decode steps."""

    prompt_s: float
    answer_s: float


def serves_per_s(nodes: Sequence[Node], prompt_tokens: int, answer_tokens: float) -> float | None:
    """Requests of this size that are done per second when all slots are taken; None where a node that decodes has
    published no rates, or nobody decodes."""
    decoders = [node for node in nodes if node.decodes]
    if not decoders or not all(_is_measured(node) for node in decoders):
        return None
    takes = [_takes(node, prompt_tokens, answer_tokens) for node in decoders]
    readers = [node for node in nodes if node.prefills and not node.decodes and _is_measured(node)]
    read_per_s = sum(1 / max(_prompt_s(node, prompt_tokens), 1e-9) for node in readers)
    alone = sum(1 / (one.prompt_s + one.answer_s) for one in takes)
    relieved = 1 + read_per_s * sum(one.prompt_s for one in takes) / len(takes) ** 2
    return min(alone * relieved, sum(1 / one.answer_s for one in takes))


def _takes(node: Node, prompt_tokens: int, answer_tokens: float) -> _Takes:
    rows, depth = node.status.slots, prompt_tokens + answer_tokens / 2
    step_s = NodeCost.of(node.status).step_s(rows, rows * depth)
    return _Takes(_prompt_s(node, prompt_tokens), max(1e-9, answer_tokens * step_s / rows))


def _prompt_s(node: Node, prompt_tokens: int) -> float:
    return NodeCost.of(node.status).prefill_s(prompt_tokens)


def _is_measured(node: Node) -> bool:
    """Whether its rates are its own, measured or estimated when it started, and not what is assumed of anybody."""
    rates, load = node.status.load.rates, node.status.load
    reads = rates.token_s or rates.call_s or rates.pair_s or load.prefill_tokens_per_s
    writes = rates.run_s or rates.row_s or rates.cell_s or load.decode_step_s
    return bool(reads and (writes or not node.decodes))
