"""On how many of a model's mixed nodes streams run, so that the others read prompts undisturbed.

Pure: arithmetic on rates, and a state machine over it; time is an argument. Owns the choice of homes: the mixed nodes
that streams go to. The others stand in the prompt pool; who is served by whom is the scheduler's choice all the same.
Refuses to know requests one by one.

Why: a stream that has a limit of time per token takes its node's time for a step in every such time, and most of a step
is the same for one stream and for eight where a core computes faster than it reads memory: the weights are read once.
So streams that are spread over all nodes cost all of them that, and prompts are read in what is left. Gathered on a few
they cost those few (the same reason as Splitwise's for pools of their own, papers.md 2, on nodes that can do both).
Where another stream costs a step as much as the first one, nothing is gained, and nothing is gathered.

Rule: of all numbers of homes the one with which the cluster serves most requests a second (`capacity_per_s`), if that
is `GAIN` of what it serves with streams everywhere, and so many requests come that it counts (`BUSY`). A change is made
when it has been due for `SUSTAINED_S`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import exp, sqrt
from typing import Final

from edge_llm.cluster.cost import Limits, NodeCost
from edge_llm.gateway.demand import Typical

# By how much more requests must be served before streams are gathered; until they are not any more.
GAIN: Final = 1.05
STILL_A_GAIN: Final = 1.0
# By how much more other homes must serve than those that there are.
BETTER: Final = 1.05
# Of what is served with streams everywhere, so much must come before that counts; until it does not any more.
BUSY: Final = 0.5
STILL_BUSY: Final = 0.35
SUSTAINED_S: Final = 5.0
# Streams come at random: a node must have room for so many standard deviations (of a Poisson number) more than on
_MORE_THAN_MEAN: Final = 1.0
# Of a large cluster only so many numbers of homes are tried.
_TRIED: Final = 16
_HALVINGS: Final = 24
_NOTHING_S: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Candidate:
    """A mixed node that all others can exchange KV with. `streams` run on it now."""

    worker: str
    cost: NodeCost
    slots: int
    streams: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """Streams go to `homes` from now on: everybody, or fewer."""

    homes: frozenset[str]
    why: str


@dataclass(slots=True)
class Gathering:
    """Of one model. `homes`: where streams go; None: everywhere."""

    homes: frozenset[str] | None = None
    _since_s: float | None = None

    def observe(self, nodes: Sequence[Candidate], typical: Typical | None, now_s: float) -> Change | None:
        """Call every second or so. Returns what was changed."""
        known = {node.worker for node in nodes}
        if self.homes is not None and not self.homes <= known:
            self.homes = None  # who is gone is nobody's home: begin anew with those who are left
        homes, why = self._wanted(nodes, typical)
        if homes == self.homes:
            self._since_s = None
            return None
        if self._since_s is None:
            self._since_s = now_s
        if now_s - self._since_s < SUSTAINED_S:
            return None
        self.homes, self._since_s = homes, None
        return Change(frozenset(known) if homes is None else homes, why)

    def _wanted(self, nodes: Sequence[Candidate], typical: Typical | None) -> tuple[frozenset[str] | None, str]:
        if typical is None or typical.tpot_s is None or len(nodes) < 2:
            return None, "nothing is known that speaks for it"
        everywhere = capacity_per_s(nodes, {node.worker for node in nodes}, typical)
        found = best_homes(nodes, typical, self.homes or frozenset())
        gathered = capacity_per_s(nodes, found, typical)
        if self.homes is not None and gathered < BETTER * capacity_per_s(nodes, self.homes, typical):
            found, gathered = self.homes, capacity_per_s(nodes, self.homes, typical)
        gain, busy = (GAIN, BUSY) if self.homes is None else (STILL_A_GAIN, STILL_BUSY)
        figures = f"{everywhere:.2f} requests/s with streams everywhere, {gathered:.2f} gathered on {len(found)}"
        why = f"{figures}, {typical.rate_per_s:.2f} come"
        is_due = gathered >= gain * everywhere > 0.0 and typical.rate_per_s >= busy * everywhere
        return (found if is_due else None), why


def best_homes(nodes: Sequence[Candidate], typical: Typical, now: Collection[str] = ()) -> frozenset[str]:
    """The homes with which most requests are served; all when no node can keep the pace. Nodes are tried in order of
    how little prompt work is lost to streams there, of equals those that are homes or have streams now."""
    able = [node for node in nodes if _Home.of(node, typical).most] or list(nodes)
    able.sort(key=lambda node: (_loses(node, typical), node.worker not in now, -node.streams, node.worker))
    tried = min(len(able), _TRIED)
    counts = [round(len(able) * number / tried) for number in range(1, tried + 1)]
    sets = [frozenset(node.worker for node in able[:count]) for count in counts]
    return max(sets, key=lambda homes: (capacity_per_s(nodes, homes, typical), len(homes)))


def capacity_per_s(nodes: Sequence[Candidate], homes: Collection[str], typical: Typical) -> float:
    """Requests a second that nodes serve within a limit of time per token when streams run on `homes` only. A model of
    averages: what is left of homes' time, and all of the others', reads prompts."""
    paced = [_Home.of(node, typical) for node in nodes if node.worker in homes]
    readers = sum(1 / _prompt_s(node, typical) for node in nodes if node.worker not in homes)
    low, high = 0.0, sum(1 / _prompt_s(node, typical) for node in nodes)
    for _ in range(_HALVINGS):
        rate = (low + high) / 2
        if _is_served(rate, paced, readers, typical):
            low = rate
        else:
            high = rate
    return low


@dataclass(frozen=True, slots=True)
class _Home:
    """A node with streams: so many at most, each of its tokens `gap_s` after the one before when prompts are read
    beside."""

    cost: NodeCost
    most: float
    gap_s: float
    prompt_s: float

    @classmethod
    def of(cls, node: Candidate, typical: Typical) -> _Home:
        cost, depth, limits = node.cost, _depth(typical), _limits(typical)
        alone_s = cost.step_s(1, depth)
        bearable_s = (cost.rates.of_limit or 1.0) * limits.tpots_s[0]
        most = max(0.0, min(float(node.slots), (bearable_s - cost.rates.run_s) / max(cost.row_s(depth), _NOTHING_S)))
        return cls(
            cost, most if most >= 1.0 else 0.0, alone_s + cost.piece(alone_s, limits).takes_s, _prompt_s(node, typical)
        )

    def reads_per_s(self, streams: float, typical: Typical) -> float:
        """Prompts that it reads beside so many streams on average; none of the time there is none, none are beside."""
        is_busy = 1 - exp(-streams)
        rows = max(1.0, streams)
        step_s = self.cost.step_s(rows, rows * _depth(typical))
        piece = self.cost.piece(step_s, _limits(typical))
        turn_s = max(step_s + piece.takes_s, _NOTHING_S)
        return (1 - is_busy + is_busy * piece.reads_s / turn_s) / self.prompt_s


def _is_served(rate: float, homes: Sequence[_Home], reads_per_s: float, typical: Typical) -> bool:
    room = sum(home.most for home in homes)
    if not room:
        return False
    for home in homes:
        streams = rate * home.most / room * typical.answer_tokens * home.gap_s
        if streams + _MORE_THAN_MEAN * sqrt(streams) > home.most:
            return False
        reads_per_s += home.reads_per_s(streams, typical)
    return reads_per_s >= rate


def _loses(node: Candidate, typical: Typical) -> float:
    """How much prompt work a stream costs a node: to two digits, so that equals are equal."""
    home = _Home.of(node, typical)
    if not home.most:
        return float("inf")
    return float(f"{node.cost.step_s(1, _depth(typical)) / max(home.gap_s, _NOTHING_S) / home.prompt_s:.1e}")


def _prompt_s(node: Candidate, typical: Typical) -> float:
    return max(1e-6, node.cost.prefill_s(round(typical.prompt_tokens)))


def _depth(typical: Typical) -> float:
    return typical.prompt_tokens + typical.answer_tokens / 2


def _limits(typical: Typical) -> Limits:
    assert typical.tpot_s is not None
    return Limits((typical.tpot_s,))
