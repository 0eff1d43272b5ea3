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
is `GAIN` of what it serves with streams everywhere, so many requests come that it counts (`BUSY`), and most ask for a
pace (`LIMITED`). Of what a node could read only that counts which is in time, as far as the fastest one's is: one that
is later with every prompt than requests allow is no reader. A change is made when it has been due for `SUSTAINED_S`.
Equal nodes are told apart by name, so that two gateways that begin together choose the same ones; homes are not moved
among equals.
The figures are those with which the simulated traces of tests/gateway/test_gathering_trace.py are served best.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, exp, inf, sqrt
from typing import Final

from edge_llm.cluster.cost import UNMEASURED_BYTES_PER_S, Limits, NodeCost
from edge_llm.cluster.view import Node
from edge_llm.gateway.demand import Typical

# By how much more requests must be served before streams are gathered; until they are not any more.
GAIN: Final = 1.05
STILL_A_GAIN: Final = 1.0
# By how much more other homes must serve than those that there are.
BETTER: Final = 1.05
# Of what is served with streams everywhere, so much must come before that counts; until it does not any more.
BUSY: Final = 0.35
STILL_BUSY: Final = 0.25
# So many of the requests must ask for a pace; until they do not any more.
LIMITED: Final = 0.6
STILL_LIMITED: Final = 0.4
SUSTAINED_S: Final = 5.0
# Streams come at random: a home must have room for so many standard deviations (of a Poisson number) more than it has
# on average.
_MORE_THAN_MEAN: Final = 1.0
# Of a large cluster only so many numbers of homes are tried.
_TRIED: Final = 12
_HALVINGS: Final = 14
_NOTHING_S: Final = 1e-9
# One wait in ten is so many times the mean one, where waits are distributed exponentially.
_TENTH: Final = 2.3


@dataclass(frozen=True, slots=True)
class Candidate:
    """A mixed node that all others can exchange KV with; `kv_bytes_per_s` come to it at most."""

    worker: str
    cost: NodeCost
    slots: int
    kv_bytes_per_s: float

    @classmethod
    def of(cls, node: Node) -> Candidate:
        """As it says itself; at most so much KV comes to it, as it measured its best way."""
        kv_bytes_per_s = max((link.bytes_per_s for link in node.status.load.links), default=0.0)
        return cls(node.worker, NodeCost.of(node.status), node.status.slots, kv_bytes_per_s or UNMEASURED_BYTES_PER_S)

    @property
    def is_known(self) -> bool:
        """Whether what it says of itself can be counted with: it reads prompts as its streams' limits allow, at rates
        that can be true."""
        costs_s = (self.cost.step_s(1, 1), self.cost.prefill_s(self.cost.chunk_tokens))
        row_s = self.cost.row_s(1)
        is_paced = self.slots > 0 and self.cost.rates.of_limit > 0.0
        return is_paced and 0.0 <= row_s < inf and all(0.0 < cost_s < inf for cost_s in costs_s)


def alike(nodes: Sequence[Node], homes: Collection[str]) -> Sequence[Node]:
    """Mixed nodes that can all exchange KV and give the same tokens: the group with homes, else the largest; none where
    an operator has given out roles."""
    if any(node.status.role != "mixed" for node in nodes):
        return ()
    groups: dict[tuple[str, str], list[Node]] = {}
    for node in nodes:
        if node.prefills and node.decodes:
            groups.setdefault((node.status.compatibility, node.status.exactness_class), []).append(node)
    # a view lists who answered last at its end: names decide between equals
    return max(
        (sorted(group, key=lambda node: node.worker) for group in groups.values()),
        key=lambda group: (any(node.worker in homes for node in group), len(group), group[0].worker),
        default=(),
    )


@dataclass(slots=True)
class Gathering:
    """Of one model. `homes`: where streams go, and how many each has room for; empty: everywhere. `why`: of the last
    change."""

    homes: Mapping[str, float] = field(default_factory=dict)
    why: str = ""
    _due: frozenset[str] = frozenset()
    _since_s: float = 0.0

    def keep(self, ready: Collection[str]) -> bool:
        """Forget homes that are not there any more; whether there were some. At once: answers that ran there are
        planned anew in the same moment."""
        if self.homes.keys() <= set(ready):
            return False
        self.homes = {worker: room for worker, room in self.homes.items() if worker in ready}
        self._due, self.why = frozenset(self.homes), "a node with streams is not there for them any more"
        return True

    def observe(self, nodes: Sequence[Candidate], typical: Typical | None, now_s: float) -> bool:
        """Call every second or so, after `keep`. Whether streams go elsewhere now."""
        known = [node for node in nodes if node.is_known]
        wanted, why = self._wanted(known, typical)
        if wanted != self._due:
            self._due, self._since_s = wanted, now_s
        is_changed = wanted != self.homes.keys()
        if is_changed and now_s - self._since_s < SUSTAINED_S:
            return False
        # of homes that stay, too: rates and limits change
        self.homes = _rooms([node for node in known if node.worker in wanted], typical)
        if is_changed:
            self.why = why
        return is_changed

    def _wanted(self, nodes: Sequence[Candidate], typical: Typical | None) -> tuple[frozenset[str], str]:
        """Homes; none: everywhere."""
        nowhere = frozenset[str]()
        busy, limited = (STILL_BUSY, STILL_LIMITED) if self.homes else (BUSY, LIMITED)
        if typical is None or len(nodes) < 2 or typical.limited_share < limited:
            return nowhere, "too few requests, nodes, or limits of time per token"
        cluster = Cluster(nodes, typical)
        everywhere_per_s = cluster.capacity_per_s([node.worker for node in nodes])
        if typical.rate_per_s < busy * everywhere_per_s:
            return nowhere, f"{typical.rate_per_s:.2f} requests/s come, nodes that do both serve {everywhere_per_s:.2f}"
        found = cluster.best_homes(self.homes or self._due)
        found_per_s = cluster.capacity_per_s(found)
        if self.homes and found_per_s < BETTER * (now_per_s := cluster.capacity_per_s(self.homes)):
            found, found_per_s = frozenset(self.homes), now_per_s
        why = f"{everywhere_per_s:.2f} requests/s with streams everywhere, {found_per_s:.2f} gathered on {len(found)}"
        gain = STILL_A_GAIN if self.homes else GAIN
        is_due = len(found) < len(nodes) and found_per_s >= gain * everywhere_per_s > 0.0
        return (found if is_due else nowhere), why


def _rooms(homes: Sequence[Candidate], typical: Typical | None) -> dict[str, float]:
    """For how many streams each has room."""
    return {home.worker: _Home.of(home, typical).most_streams for home in homes} if typical is not None else {}


class Cluster:
    """Nodes under one kind of request: what is the same for all choices of homes is worked out once."""

    def __init__(self, nodes: Sequence[Candidate], typical: Typical) -> None:
        self._answer_tokens = typical.answer_tokens
        in_time = {node.worker: _read_in_time(node, typical) for node in nodes}
        best = max(in_time.values(), default=0.0)
        shares = {worker: share / best if best else 1.0 for worker, share in in_time.items()}
        self._homes = {node.worker: _Home.of(node, typical, shares[node.worker]) for node in nodes}

    def best_homes(self, now: Collection[str]) -> frozenset[str]:
        """The homes with which most requests are served; all when no node can keep the pace. Nodes are tried in order
        of how little prompt work is lost to streams there, of equals those that are homes `now`."""
        able = [worker for worker, home in self._homes.items() if home.most_streams] or list(self._homes)
        able.sort(key=lambda worker: (self._homes[worker].loses_per_s, worker not in now, worker))
        tried = min(len(able), _TRIED)
        counts = [round(len(able) * number / tried) for number in range(1, tried + 1)]
        sets = [frozenset(able[:count]) for count in counts]
        return max(sets, key=lambda homes: (self.capacity_per_s(homes), len(homes)))

    def capacity_per_s(self, homes: Collection[str]) -> float:
        """Requests a second that are served within their limits when streams run on `homes` only. A model of averages:
        what is left of homes' time, and all of the others', reads prompts; what others read has to be carried."""
        paced = [home for worker, home in self._homes.items() if worker in homes]
        reads_per_s = sum(home.alone_per_s for worker, home in self._homes.items() if worker not in homes)
        low_per_s, high_per_s = 0.0, sum(home.alone_per_s for home in self._homes.values())
        for _ in range(_HALVINGS):
            rate_per_s = (low_per_s + high_per_s) / 2
            if self._is_served(rate_per_s, paced, reads_per_s):
                low_per_s = rate_per_s
            else:
                high_per_s = rate_per_s
        return low_per_s

    def _is_served(self, rate_per_s: float, homes: Sequence[_Home], others_read_per_s: float) -> bool:
        room, own_per_s, carried_per_s = sum(home.most_streams for home in homes), 0.0, 0.0
        if not room:
            return False
        for home in homes:
            streams = rate_per_s * home.most_streams / room * self._answer_tokens * home.gap_s
            if streams + _MORE_THAN_MEAN * sqrt(streams) > home.most_streams:
                return False
            own_per_s += home.reads_per_s(streams)
            carried_per_s += home.carried_per_s
        return own_per_s + min(others_read_per_s, carried_per_s) >= rate_per_s


def _read_in_time(node: Candidate, typical: Typical) -> float:
    """How busy a node may be with prompts until a tenth of them come too late: with prompts that come at random, and
    take it `own_s` each, a load of r lets them wait r / (1 - r) / 2 of that on average (M/D/1), and a tenth 2.3 times
    as long. A slow node may be late with every prompt, and reads none in time."""
    if typical.ttft_s is None:
        return 1.0
    own_s = _own_s(node, typical)
    spare = max(0.0, typical.ttft_s - own_s) / (_TENTH * own_s)
    return 2 * spare / (1 + 2 * spare)


def _own_s(node: Candidate, typical: Typical) -> float:
    held = typical.prompt_tokens - typical.computed_tokens
    return max(node.cost.prefill_s(round(typical.computed_tokens), round(held)), _NOTHING_S)


@dataclass(frozen=True, slots=True)
class _Home:
    """A node with streams, `most_streams` at most, each of its tokens `gap_s` after the one before when prompts are
    read beside. Prompts a second: `alone_per_s` that it reads without streams, `beside_per_s` beside 1, 2, ... of them;
    `carried_per_s` that can come to it from elsewhere; `loses_per_s` that it does not read because of a stream."""

    most_streams: float
    gap_s: float
    alone_per_s: float
    beside_per_s: tuple[float, ...]
    carried_per_s: float

    @classmethod
    def of(cls, node: Candidate, typical: Typical, in_time: float = 1.0) -> _Home:
        """`in_time`: of what it could read, so much counts."""
        cost, limits = node.cost, Limits((typical.tpot_s,))
        depth = typical.prompt_tokens + typical.answer_tokens / 2
        bearable_s = cost.rates.of_limit * typical.tpot_s
        room = (bearable_s - cost.rates.run_s) / max(cost.row_s(depth), _NOTHING_S)
        most = min(float(node.slots), room) if room >= 1.0 else 0.0
        alone_s, beside = cost.step_s(1, depth), list[float]()
        alone_per_s = in_time / _own_s(node, typical)
        for rows in range(1, ceil(most) + 1):
            step_s = cost.step_s(rows, rows * depth)
            piece = cost.piece(step_s, limits)
            beside.append(alone_per_s * piece.reads_s / max(step_s + piece.takes_s, _NOTHING_S))
        gap_s = alone_s + cost.piece(alone_s, limits).takes_s
        prompt_bytes = max(1.0, cost.kv_bytes_per_token * typical.computed_tokens)
        return cls(most, gap_s, alone_per_s, tuple(beside), node.kv_bytes_per_s / prompt_bytes)

    @property
    def loses_per_s(self) -> float:
        """To two digits, so that equals are equal."""
        return float(f"{self.alone_per_s - self.beside_per_s[0]:.1e}") if self.beside_per_s else self.alone_per_s

    def reads_per_s(self, streams: float) -> float:
        """Beside so many streams on average: by chance there is none at times."""
        if not self.beside_per_s:
            return self.alone_per_s
        is_busy, at = 1 - exp(-streams), max(0.0, streams - 1.0)
        lower = min(int(at), len(self.beside_per_s) - 1)
        upper = min(lower + 1, len(self.beside_per_s) - 1)
        beside = self.beside_per_s[lower] + (at - lower) * (self.beside_per_s[upper] - self.beside_per_s[lower])
        return (1 - is_busy) * self.alone_per_s + is_busy * max(0.0, beside)
