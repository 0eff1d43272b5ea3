"""A request, what else is known when it is planned, and which workers could serve it. Pure.

Owns what is possible. Refuses to know which of it is best (scheduler.py), clients, connections and clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from edge_llm.cluster.cost import Work, work_of
from edge_llm.cluster.slo import NO_LIMITS, NOTHING_PAST, Past, Slo, Watches
from edge_llm.cluster.view import Node
from edge_llm.gateway.policies import Policy
from edge_llm.gateway.pools import Pool

# A worker computes one prompt and lets one more wait (worker/prefill.py); further ones wait here.
PROMPTS_PER_WORKER: Final = 2
Mode = Literal["auto", "split", "local"]
CrossClass = Literal["never", "when_faster"]


@dataclass(frozen=True, slots=True)
class Wish:
    """What the scheduler needs to know of a request.

    answer_tokens: how long the answer is expected to be (None: typical). avoid: workers that failed it and have not
    come back. held: how many positions of its prompt a worker is believed to hold. exactness_class: of the worker that
    gave the tokens delivered so far. waited_s: how long it has been without a plan; time_left_s: until its whole
    answer has to be there. slo: its limits of latency; past: what of them is used up.
    """

    model: str
    prompt_tokens: int
    max_tokens: int
    mode: Mode = "auto"
    avoid: frozenset[str] = frozenset()
    answer_tokens: float | None = None
    held: Mapping[str, int] = field(default_factory=dict)
    exactness_class: str | None = None
    waited_s: float = 0.0
    time_left_s: float | None = None
    slo: Slo = NO_LIMITS
    past: Past = NOTHING_PAST

    @property
    def cells(self) -> int:
        """KV cells to reserve."""
        return self.prompt_tokens + self.max_tokens


@dataclass(frozen=True, slots=True)
class Situation:
    """What else is known now. A worker that `works` does not name has the work that it says it has.

    waiting: others of its model that have no plan yet; ahead: of them, those whose turn comes before its. apart: pairs
    of reader and decode worker of which the second could not get KV from the first moments ago. pool_of: where a node
    stands (none: everybody stands by for both).
    stream_room: of nodes that streams were gathered on, for how many there is room (gathering.py).
    next_prompt_tokens: how long the next prompt is expected to be (None: as this one). watches: kept between
    decisions.
    """

    works: Mapping[str, Work] = field(default_factory=dict)
    waiting: int = 0
    ahead: int = 0
    apart: Collection[tuple[str, str]] = ()
    pool_of: Callable[[Node], Pool] = lambda _node: "mixed"
    stream_room: Mapping[str, float] = field(default_factory=dict)
    cross_class: CrossClass = "when_faster"
    policy: Policy | None = None
    next_prompt_tokens: float | None = None
    watches: Watches = field(default_factory=Watches)

    def work(self, node: Node) -> Work:
        return self.works.get(node.worker) or work_of(node.status)


def standing_by(decoders: list[Node], wish: Wish, situation: Situation) -> list[Node]:
    """Those of the token pool that are not crowded, and where streams are gathered who holds most of this prompt; all
    when nobody stands by."""
    home = [node for node in decoders if situation.pool_of(node) != "prompt" and not is_crowded(node, situation)]
    holders = [node for node in decoders if situation.stream_room and _holds_most(node, wish)]
    return [*home, *(node for node in holders if node not in home)] if home else decoders


def is_crowded(node: Node, situation: Situation) -> bool:
    room = situation.stream_room.get(node.worker)
    work = situation.work(node)
    # whose prompt is still being read has its stream when others' are over; but there are many after a node died
    return room is not None and (work.decoding >= round(room) or work.sequences >= 2 * room)


def _holds_most(node: Node, wish: Wish) -> bool:
    return node.status.role == "mixed" and 2 * wish.held.get(node.worker, 0) >= wish.prompt_tokens


def has_room(node: Node, wish: Wish, situation: Situation) -> bool:
    """A free slot, and cells for prompt and longest answer."""
    status, work = node.status, situation.work(node)
    reserved = work.reserved_cells + wish.cells
    return work.sequences < status.slots and wish.cells <= status.n_ctx and reserved <= status.slots * status.n_ctx


def can_feed(prefill: Node, decode: Node, wish: Wish, situation: Situation) -> bool:
    """Whether `prefill` can compute this prompt so that `decode` can adopt it, and may."""
    return (
        decode.status.splits
        and prefill.worker != decode.worker
        and prefill.status.compatibility == decode.status.compatibility
        and prefill.status.n_ctx >= wish.prompt_tokens
        and (wish.mode == "split" or (prefill.worker, decode.worker) not in situation.apart)
        and not (situation.cross_class == "never" and is_foreign(prefill, decode))
    )


def is_full(prefill: Node, situation: Situation) -> bool:
    """Whether it takes no further prompt now."""
    return situation.work(prefill).served >= PROMPTS_PER_WORKER


def fed(decoders: Sequence[Node], readers: Sequence[Node], wish: Wish, situation: Situation) -> list[Node]:
    """Those for which another worker can compute this prompt."""
    return [node for node in decoders if any(can_feed(reader, node, wish, situation) for reader in readers)]


def is_foreign(prefill: Node, decode: Node) -> bool:
    return prefill.status.exactness_class != decode.status.exactness_class


def of_the_same_class(wish: Wish, nodes: list[Node], situation: Situation) -> list[Node]:
    """An answer that has begun goes on where the same tokens would have come, if anywhere."""
    if wish.exactness_class is None:
        return nodes
    same = [node for node in nodes if node.status.exactness_class == wish.exactness_class]
    if situation.cross_class == "never":
        return same
    return same if any(has_room(node, wish, situation) for node in same) else nodes
