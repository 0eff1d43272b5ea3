"""Who serves a request: one pure decision over a view.

First form: join the shortest queue. The decode worker is the one with the most free slots for its load, the prefill
candidates are ordered by the seconds of prompt work before them (pending tokens over measured rate). Owns the choice
and its words; refuses to do anything about it. Time, randomness and I/O are not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from edge_llm.cluster.view import ClusterView, Node
from edge_llm.errors import Overloaded, UnknownModel

Mode = Literal["auto", "split", "local"]
MAX_CANDIDATES: Final = 2
# Rate assumed for a worker that has not prefilled anything yet; only the order of candidates depends on it.
_UNMEASURED_TOKENS_PER_S: Final = 100.0
# A worker computes one prompt and lets one more wait (worker/prefill.py); further ones wait here.
_PROMPTS_PER_WORKER: Final = 2


@dataclass(frozen=True, slots=True)
class Wish:
    """What the scheduler needs to know of a request. `avoid` are workers that already failed it."""

    model: str
    prompt_tokens: int
    max_tokens: int
    mode: Mode = "auto"
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Plan:
    """Decode worker and prefill candidates in order; none means the decode worker computes the prompt.

    `note` says why a wish for `split` became local, else None.
    """

    decode: Node
    candidates: tuple[Node, ...]
    note: str | None = None

    @property
    def mode(self) -> Literal["split", "local"]:
        return "split" if self.candidates else "local"


@dataclass(frozen=True, slots=True)
class Booked:
    """What this gateway has sent to a worker since its last status: sequences and prompt tokens."""

    sequences: int = 0
    prompts: int = 0
    prompt_tokens: int = 0

    def with_sequence(self) -> Booked:
        return replace(self, sequences=self.sequences + 1)

    def with_prompt(self, tokens: int) -> Booked:
        return replace(self, prompts=self.prompts + 1, prompt_tokens=self.prompt_tokens + tokens)


def decide(wish: Wish, view: ClusterView, booked: Mapping[str, Booked]) -> Plan:
    """Choose for `wish`. Raises UnknownModel (nobody serves it) or Overloaded (no slot is free now)."""
    if wish.model not in view.models:
        known = ", ".join(view.models) or "none yet"
        raise UnknownModel(f"no worker serves the model {wish.model!r}; served are: {known}", param="model")
    able = [node for node in view.ready(wish.model) if node.decodes and node.worker not in wish.avoid]
    decoders = [node for node in able if _slots_free(node, booked) > 0 and _fits(node, wish)]
    if not decoders:
        raise Overloaded(_why_nobody(wish, view, able), retry_after_s=2.0)
    decode = min(decoders, key=lambda node: (_busy(node, booked), node.worker))
    if wish.mode == "local" or wish.prompt_tokens < 2:
        return Plan(decode, ())
    candidates, note = _candidates(wish, view, decode, booked)
    if not candidates:
        return Plan(decode, (), note if wish.mode == "split" else None)
    if wish.mode == "auto" and wish.prompt_tokens <= decode.status.chunk_tokens:
        return Plan(decode, ())
    free = tuple(node for node in candidates if _prompts(node, booked) < _PROMPTS_PER_WORKER)
    if free:
        return Plan(decode, free[:MAX_CANDIDATES])
    if wish.mode == "auto" and not _sequences(decode, booked):
        return Plan(decode, ())  # nobody there to disturb, and every prefill worker has a queue
    raise Overloaded("all prefill workers have a prompt waiting", retry_after_s=2.0)


def _candidates(
    wish: Wish, view: ClusterView, decode: Node, booked: Mapping[str, Booked]
) -> tuple[tuple[Node, ...], str | None]:
    """Prefill workers whose KV `decode` can adopt, the soonest first; of its own exactness class if there are any."""
    if not decode.status.splits:
        return (), f"not split: {decode.status.split_reason}"
    fitting = [
        node
        for node in view.ready(wish.model)
        if node.prefills
        and node.worker != decode.worker
        and node.worker not in wish.avoid
        and node.status.compatibility == decode.status.compatibility
        and node.status.n_ctx >= wish.prompt_tokens
    ]
    if not fitting:
        return (), "not split: no other worker prefills this model"

    def wait(node: Node) -> tuple[bool, bool, float, str]:
        is_foreign = node.status.exactness_class != decode.status.exactness_class
        return is_foreign, node.decodes, _prompt_wait_s(node, booked), node.worker

    return tuple(sorted(fitting, key=wait)), None


def _prompt_wait_s(node: Node, booked: Mapping[str, Booked]) -> float:
    tokens = node.status.load.pending_prompt_tokens + booked.get(node.worker, Booked()).prompt_tokens
    return tokens / (node.status.load.prefill_tokens_per_s or _UNMEASURED_TOKENS_PER_S)


def _slots_free(node: Node, booked: Mapping[str, Booked]) -> int:
    return node.status.slots - _sequences(node, booked)


def _sequences(node: Node, booked: Mapping[str, Booked]) -> int:
    return max(node.status.load.sequences_running, booked.get(node.worker, Booked()).sequences)


def _prompts(node: Node, booked: Mapping[str, Booked]) -> int:
    """Prompts this gateway has there, and whatever others made wait."""
    return max(booked.get(node.worker, Booked()).prompts, node.status.load.sequences_waiting)


def _busy(node: Node, booked: Mapping[str, Booked]) -> float:
    """Share of slots taken, then prompt work waiting: the shortest queue."""
    taken = 1 - _slots_free(node, booked) / max(1, node.status.slots)
    return taken + min(1.0, _prompt_wait_s(node, booked))


def _fits(node: Node, wish: Wish) -> bool:
    return wish.prompt_tokens + wish.max_tokens <= node.status.n_ctx


def _why_nobody(wish: Wish, view: ClusterView, able: list[Node]) -> str:
    if any(_fits(node, wish) for node in able):
        return "all slots of all decode workers are taken"
    if able:
        return f"no decode worker that is left has a context of {wish.prompt_tokens + wish.max_tokens} tokens"
    if wish.avoid:
        return "the workers that could decode this have failed and no other is left"
    roles = ", ".join(f"{node.worker} ({node.status.role})" for node in view.nodes)
    return f"no worker that decodes {wish.model} is ready; the cluster has: {roles}"
