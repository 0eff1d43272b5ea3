"""Who serves a request: pure decisions over a view of the cluster.

Owns the choice of decode worker and prefill candidates, together and at admission (Splitwise, papers.md 2.1), by what
is predicted (cluster/cost.py). Refuses to know clients, connections, clocks: the same view gives the same plan.

Where the request or anybody on these workers has limits of latency, plans are first compared by how many requests they
are predicted to make late, this one included, then by how many streams they leave to be slowed too far by the next
prompt (cluster/slo.py; goodput under both limits: DistServe, papers.md 3). A plan that must wait for a full prefill
worker is waited for while it is better so. Plans that are equal there, as all are without limits, are compared by
seconds:

Rule: of all plans that can be carried out now, the one for which everybody together waits least: the request itself
until its last token, the streams that run on either node, the prompts that will wait behind it. Local is the plan in
which the decode node computes the prompt. A node of the other pool (pools.py) helps out when its pool is overloaded:
with tokens when no decode worker has room, with prompts when all prefill workers have one and it is better by a margin;
so must it be for a mixed node to read for another one, since it could do all of a request. So must a node of another
exactness class be: predictions err, and promises are not given up for noise. Nor is a second node's time: where an idle
one can do all of it, a split must be sooner by a margin, too. When a full prefill worker is predicted to serve sooner
than the free ones, also behind those who wait for it already, the request waits for it, but never longer than the free
one would have taken; for a mixed one only where streams are gathered elsewhere (gathering.py) and it stands by for
prompts. Who asks for `split` waits for a decode worker that somebody can prefill for, and gets local only when there is
none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from edge_llm.cluster.cost import (
    TYPICAL_ANSWER_TOKENS,
    NodeCost,
    Prediction,
    Request,
    Side,
    predict_local,
    predict_split,
)
from edge_llm.cluster.slo import NOBODY_LATE, Judge, Verdict
from edge_llm.cluster.view import ClusterView, Node
from edge_llm.errors import Overloaded, UnknownModel, WorthAWait
from edge_llm.gateway.policies import Policy, Standby
from edge_llm.gateway.pools import Pool
from edge_llm.gateway.situation import (
    Situation,
    Wish,
    can_feed,
    fed,
    has_room,
    is_foreign,
    is_full,
    of_the_same_class,
    standing_by,
)
from edge_llm.worker.messages import Link

Reason = Literal["asked", "not_possible", "only_choice", "limits", "sooner", "less_harm", "one_node", "policy"]
MAX_CANDIDATES: Final = 2
# Pairs that are predicted: in a large cluster only those of the best few on either side.
SHORTLIST: Final = 4
# By how much a plan must be better to be worth another pool's or a mixed node, the promise of exactness, a second node.
SPILL_MARGIN: Final = 1.25
FOREIGN_MARGIN: Final = 1.10
SECOND_NODE_MARGIN: Final = 1.10


@dataclass(frozen=True, slots=True)
class Plan:
    """Decode worker and prefill candidates in order; none means the decode worker computes the prompt.

    `note` says why a wish for `split` became local, else None. `spills`: nodes that help out for the other pool.
    """

    decode: Node
    candidates: tuple[Node, ...]
    note: str | None = None
    prediction: Prediction | None = None
    reason: Reason = "only_choice"
    spills: tuple[tuple[Node, Pool], ...] = ()
    is_cross_class: bool = False
    verdict: Verdict = NOBODY_LATE

    @property
    def mode(self) -> Literal["split", "local"]:
        return "split" if self.candidates else "local"

    @property
    def reader(self) -> Node:
        """Who computes the prompt."""
        return self.candidates[0] if self.candidates else self.decode


@dataclass(frozen=True, slots=True)
class _Option:
    """One way to serve the request. helpers: nodes that do the other pool's work. is_full: not now, the prefill worker
    has no room."""

    decode: Node
    prefill: Node | None
    prediction: Prediction
    helpers: tuple[tuple[Node, Pool], ...]
    is_cross_class: bool = False
    is_full: bool = False
    is_read_by_mixed: bool = False
    verdict: Verdict = NOBODY_LATE

    @property
    def reader(self) -> Node:
        return self.prefill or self.decode

    @property
    def weight_s(self) -> float:
        """What options are compared by."""
        return self.shared_s * (SPILL_MARGIN if self.is_read_by_mixed and not self.helpers else 1.0)

    @property
    def shared_s(self) -> float:
        """The same, as if a mixed reader had nothing else to do."""
        margin = (SPILL_MARGIN if self.helpers else 1.0) * (FOREIGN_MARGIN if self.is_cross_class else 1.0)
        return self.prediction.everybody_s * margin

    @property
    def order(self) -> tuple[Verdict, float, bool, bool, str, str]:
        """Equal weights are decided by names, so that a view has one plan."""
        prefill = self.prefill.worker if self.prefill else ""
        return self.verdict, self.weight_s, bool(self.helpers), self.is_cross_class, self.decode.worker, prefill


def decide(wish: Wish, view: ClusterView, situation: Situation) -> Plan:
    """Choose for `wish`. Raises UnknownModel (nobody serves it) or Overloaded (nobody has room now)."""
    if wish.model not in view.models:
        known = ", ".join(view.models) or "none yet"
        raise UnknownModel(f"no worker serves the model {wish.model!r}; served are: {known}", param="model")
    able = [node for node in view.ready(wish.model) if node.decodes and node.worker not in wish.avoid]
    able = of_the_same_class(wish, able, situation)
    readers = [node for node in view.ready(wish.model) if node.prefills and node.worker not in wish.avoid]
    decoders = [node for node in able if has_room(node, wish, situation)]
    if not decoders:
        raise Overloaded(_why_nobody(wish, view, able), retry_after_s=2.0)
    must_split = wish.mode == "split" and wish.prompt_tokens >= 2
    if must_split and fed([node for node in able if wish.cells <= node.status.n_ctx], readers, wish, situation):
        decoders = fed(decoders, readers, wish, situation)
        if not decoders:
            raise Overloaded("all slots of the decode workers that can take over a prompt are taken", retry_after_s=2.0)
    decoders = standing_by(decoders, wish, situation)
    home = [node for node in readers if situation.pool_of(node) != "token"]
    idle = [node for node in home if not situation.work(node).prompts]
    if any(can_feed(reader, decoder, wish, situation) for reader in idle for decoder in decoders):
        readers = home
    if must_split:
        decoders = fed(decoders, readers, wish, situation) or decoders
    if situation.policy is not None:
        return _by_policy(situation.policy, wish, decoders, readers, situation)
    return _by_prediction(wish, decoders, readers, situation)


# -- by prediction


def _by_prediction(wish: Wish, decoders: Sequence[Node], readers: Sequence[Node], situation: Situation) -> Plan:
    request = _request(wish, decoders, readers, situation)
    sides = _sides(wish, decoders, readers, situation)
    found = _options(wish, request, sides, decoders, readers, situation)
    if wish.slo.is_set or any(side.work.has_limits for side in sides.values()):
        found = _judged(wish, request, sides, readers, situation, found)
    options = sorted(found, key=lambda option: option.order)
    splits, locals_ = ([one for one in options if bool(one.prefill) is is_split] for is_split in (True, False))
    allowed, note = options, None
    if wish.mode == "local" or wish.prompt_tokens < 2:
        allowed = locals_
    elif wish.mode == "split":
        allowed, note = (splits, None) if splits else (locals_, _why_not_split(wish, decoders, readers, situation))
    free = [option for option in allowed if not option.is_full]
    if not free:
        raise Overloaded("all prefill workers have a prompt waiting", retry_after_s=2.0)
    worth_a_wait = [option for option in allowed if not (option.is_full and option.is_read_by_mixed)]
    first, best = (_on_one_node(options, situation) or options[0] for options in (worth_a_wait, free))
    before_s = _before_s(request, sides, [option.reader for option in allowed if option.is_full], situation.ahead)
    if first.is_full and _is_worth_a_wait(wish, first, best, before_s):
        keeps_more = first.verdict < best.verdict
        raise WorthAWait(
            f"prefill worker {first.reader.worker} has a prompt waiting and will still be "
            f"{'better for limits of latency' if keeps_more else 'sooner'} than others",
            retry_after_s=2.0,
        )
    others = locals_ if best.prefill else [option for option in splits if not option.is_full]
    return Plan(
        decode=best.decode,
        candidates=_candidates(best, splits),
        note=note,
        prediction=best.prediction,
        reason=_reason(wish, best, others[0] if others else None, note),
        spills=best.helpers or _overflow(best, readers, situation),
        is_cross_class=best.is_cross_class,
        verdict=best.verdict,
    )


def _before_s(request: Request, sides: Mapping[str, Side], full: Sequence[Node], ahead: int) -> float:
    """How long full prefill workers take to begin with the prompts of so many who wait already, if these are like the
    request's."""
    readers = {node.worker: sides[node.worker] for node in full}.values()
    each_s = [side.cost.prefill_s(max(1, request.prompt_tokens - 1 - side.held), side.held) for side in readers]
    return ahead / sum(1 / max(own_s, 1e-9) for own_s in each_s) if each_s else 0.0


def _is_worth_a_wait(wish: Wish, first: _Option, best: _Option, before_s: float) -> bool:
    """Whether the full worker of `first` is waited for, though `best` could begin now."""
    left_s, ends_s = wish.time_left_s, before_s + first.prediction.completion_s
    if left_s is not None and best.prediction.completion_s <= left_s < ends_s:
        return False
    if first.verdict < best.verdict and (not before_s or _is_in_time(wish, before_s + first.prediction.ttft_s)):
        return True
    return before_s + first.weight_s <= best.weight_s and wish.waited_s <= best.prediction.ttft_s


def _is_in_time(wish: Wish, ttft_s: float) -> bool:
    """Whether a first token that comes so long from now is within the request's limit, if it has one."""
    return wish.slo.ttft_s is None or wish.past.since_arrival_s + ttft_s <= wish.slo.ttft_s


def _on_one_node(free: Sequence[_Option], situation: Situation) -> _Option | None:
    """The idle node that does all of it about as soon as the two of the best plan would, if that is a split."""
    best, alone = free[0], next((option for option in free if not option.prefill), None)
    if not best.prefill or alone is None or alone.verdict != best.verdict:
        return None
    work = situation.work(alone.decode)
    is_as_good = alone.shared_s <= SECOND_NODE_MARGIN * best.shared_s
    return alone if is_as_good and not work.sequences and not work.prompts else None


def _request(wish: Wish, decoders: Sequence[Node], readers: Sequence[Node], situation: Situation) -> Request:
    answer = wish.answer_tokens if wish.answer_tokens is not None else TYPICAL_ANSWER_TOKENS
    computing = {node.worker for node in (*decoders, *readers)}
    behind = situation.waiting / max(1, len(computing))
    return Request(wish.prompt_tokens, max(1.0, min(answer, wish.max_tokens)), behind, wish.slo.tpot_s)


def _sides(wish: Wish, decoders: Sequence[Node], readers: Sequence[Node], situation: Situation) -> Mapping[str, Side]:
    return {
        node.worker: Side(NodeCost.of(node.status), situation.work(node), wish.held.get(node.worker, 0))
        for node in (*decoders, *readers)
    }


def _judged(
    wish: Wish,
    request: Request,
    sides: Mapping[str, Side],
    readers: Sequence[Node],
    situation: Situation,
    options: Iterable[_Option],
) -> Iterator[_Option]:
    """The same options with what they mean for limits of latency."""
    coming = wish.prompt_tokens if situation.next_prompt_tokens is None else situation.next_prompt_tokens
    judge = Judge(wish.slo, request, sides, {node.worker for node in readers}, coming, wish.past, situation.watches)
    for option in options:
        verdict = judge.verdict(option.reader.worker, option.decode.worker, option.prediction)
        yield replace(option, verdict=verdict)


def _options(
    wish: Wish,
    request: Request,
    sides: Mapping[str, Side],
    decoders: Sequence[Node],
    readers: Sequence[Node],
    situation: Situation,
) -> Iterator[_Option]:
    """Every way to serve the request, with what it is predicted to cost."""
    able = [node for node in readers if any(can_feed(node, decode, wish, situation) for decode in decoders)]
    near = _shortlist(able, lambda node: predict_local(request, sides[node.worker]).everybody_s)
    # a decode worker without this prompt's work: the prompt comes from elsewhere
    bare = replace(request, prompt_tokens=1)
    able_decoders = fed(decoders, near, wish, situation)
    far = _shortlist(able_decoders, lambda node: predict_local(bare, replace(sides[node.worker], held=0)).everybody_s)
    for decode in decoders:
        helping: tuple[tuple[Node, Pool], ...] = ()
        if situation.pool_of(decode) == "prompt":
            helping = ((decode, "token"),)
        own = sides[decode.worker]
        yield _Option(decode, None, predict_local(request, own), helping)
        if wish.prompt_tokens < 2 or decode not in far:
            continue
        for prefill in near:
            if not can_feed(prefill, decode, wish, situation):
                continue
            spills = (*helping, (prefill, "prompt")) if situation.pool_of(prefill) == "token" else helping
            yield _Option(
                decode,
                prefill,
                predict_split(request, sides[prefill.worker], own, _link(prefill, decode)),
                spills,
                is_foreign(prefill, decode),
                is_full(prefill, situation),
                situation.pool_of(prefill) == "mixed",
            )


def _overflow(best: _Option, readers: Sequence[Node], situation: Situation) -> tuple[tuple[Node, Pool], ...]:
    """A decode worker that reads a prompt because all prefill workers have one helps out as well."""
    home = [node for node in readers if situation.pool_of(node) != "token"]
    is_short = bool(home) and all(situation.work(node).prompts for node in home)
    is_helping = is_short and best.prefill is None and situation.pool_of(best.decode) == "token"
    return ((best.decode, "prompt"),) if is_helping else ()


def _shortlist(nodes: Sequence[Node], cost_s: Callable[[Node], float]) -> Sequence[Node]:
    return nodes if len(nodes) <= SHORTLIST else sorted(nodes, key=cost_s)[:SHORTLIST]


def _candidates(best: _Option, splits: Sequence[_Option]) -> tuple[Node, ...]:
    """The chosen prefill worker, then the next best ones for the same decode worker."""
    if best.prefill is None:
        return ()
    rest = [option for option in splits if option.decode is best.decode and option is not best]
    rest.sort(key=lambda option: (option.is_full, option.order))
    nodes = [best.prefill, *(option.prefill for option in rest if option.prefill)]
    return tuple(nodes[:MAX_CANDIDATES])


def _reason(wish: Wish, best: _Option, other: _Option | None, note: str | None) -> Reason:
    if wish.mode != "auto":
        return "not_possible" if note else "asked"
    if other is None:
        return "only_choice"
    if best.verdict < other.verdict:
        return "limits"
    if not best.prefill and other.prediction.everybody_s < best.prediction.everybody_s:
        return "one_node"
    return "sooner" if best.prediction.completion_s <= other.prediction.completion_s else "less_harm"


# -- by a policy that predicts nothing


def _by_policy(
    policy: Policy, wish: Wish, decoders: Sequence[Node], readers: Sequence[Node], situation: Situation
) -> Plan:
    """The policy's decode worker of the token pool, its prefill worker of the prompt pool; `auto` splits what is
    longer than a chunk. The other pool is asked only when nobody else is there."""
    decode = policy.next("token", _standby(decoders, "prompt", situation))
    wants_split = wish.mode == "split" or (wish.mode == "auto" and wish.prompt_tokens > decode.status.chunk_tokens)
    if not wants_split or wish.prompt_tokens < 2:
        policy.took("token", decode)
        return Plan(decode, (), reason="policy")
    fitting = [node for node in readers if can_feed(node, decode, wish, situation)]
    if not fitting:
        note = _why_not_split(wish, [decode], readers, situation) if wish.mode == "split" else None
        policy.took("token", decode)
        return Plan(decode, (), note, reason="policy")
    free = [node for node in fitting if not is_full(node, situation)]
    if not free:
        raise Overloaded("all prefill workers have a prompt waiting", retry_after_s=2.0)
    first = policy.next("prompt", _standby(free, "token", situation))
    policy.took("token", decode)
    policy.took("prompt", first)
    rest = [node for node in free if node is not first]
    second = sorted(rest, key=lambda node: node.worker)[: MAX_CANDIDATES - 1]
    return Plan(decode, (first, *second), reason="policy", is_cross_class=is_foreign(first, decode))


def _standby(nodes: Sequence[Node], other_pool: Pool, situation: Situation) -> list[Standby]:
    home = [node for node in nodes if situation.pool_of(node) != other_pool] or nodes
    return [Standby(node, situation.work(node)) for node in sorted(home, key=lambda node: node.worker)]


# -- words


def _link(prefill: Node, decode: Node) -> Link | None:
    """The way as its receiver measured it."""
    return next((link for link in decode.status.load.links if link.peer == prefill.worker), None)


def _why_not_split(wish: Wish, decoders: Sequence[Node], readers: Sequence[Node], situation: Situation) -> str | None:
    if wish.prompt_tokens < 2:
        return None
    if not any(node.status.splits for node in decoders):
        return f"not split: {decoders[0].status.split_reason}"
    loose = replace(situation, cross_class="when_faster")
    if any(can_feed(reader, decoder, wish, loose) for reader in readers for decoder in decoders):
        return "not split: the other prefill workers are of another exactness class (setting cross_class)"
    return "not split: no other worker prefills this model"


def _why_nobody(wish: Wish, view: ClusterView, able: list[Node]) -> str:
    if any(wish.cells <= node.status.n_ctx for node in able):
        return "all slots of all decode workers are taken"
    if able:
        return f"no decode worker that is left has a context of {wish.cells} tokens"
    if wish.avoid:
        return "the workers that could decode this have failed and no other is left"
    if wish.exactness_class is not None and any(node.decodes for node in view.ready(wish.model)):
        return "no worker of the exactness class that began this answer is left (setting cross_class)"
    roles = ", ".join(f"{node.worker} ({node.status.role})" for node in view.nodes)
    return f"no worker that decodes {wish.model} is ready; the cluster has: {roles}"
