"""Planning with all that this gateway knows: who has which work, who holds which prefixes, which pools help out.

Owns the inputs of `decide` and what becomes of its decisions: each is logged with its prediction, kept for GET /cluster
and judged when the request is over. Refuses to know queues and connections; the choice itself is scheduler.py.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import structlog

from edge_llm.cluster.cost import NodeCost, Work
from edge_llm.cluster.slo import Past, Slo, Watches
from edge_llm.cluster.view import ClusterView, Node
from edge_llm.errors import Overloaded
from edge_llm.gateway.affinity import Affinity, Chain, chain_of
from edge_llm.gateway.decision import UNTOLD, Decision
from edge_llm.gateway.demand import Demand, Typical
from edge_llm.gateway.gathering import Candidate, Gathering, alike
from edge_llm.gateway.policies import Policy
from edge_llm.gateway.pools import EventKind, Pool, PoolEvent, Pools, Standing
from edge_llm.gateway.running import Running
from edge_llm.gateway.scheduler import Plan, decide
from edge_llm.gateway.session import State
from edge_llm.gateway.situation import CrossClass, Situation, Wish
from edge_llm.gateway.ways import Ways
from edge_llm.gateway.workbook import Booking, WorkBook, left_of

DECISIONS_KEPT: Final = 200
OBSERVE_S: Final = 1.0
log = structlog.get_logger()
Life = tuple[str, int, float]


@dataclass(frozen=True, slots=True)
class Waits:
    """What is predicted of a prompt that is read elsewhere: how long others' KV comes before it to the decode worker,
    which takes one after the other, and how long it takes then."""

    before_s: float = 0.0
    own_s: float = 0.0


@dataclass(slots=True)
class _Known:
    """What is remembered of a request that is not over. `failed`: workers, in which life, and when."""

    chains: dict[int, Chain] = field(default_factory=dict)
    failed: dict[str, tuple[Life, float]] = field(default_factory=dict)
    decision: Decision | None = None


class Planner:
    """Plans for all requests of one gateway. `on_outcome` hears of every decision whose first token came."""

    def __init__(
        self,
        policy: Policy | None = None,
        cross_class: CrossClass = "when_faster",
        clock: Callable[[], float] = time.monotonic,
        on_outcome: Callable[[Decision], None] = lambda _decision: None,
    ) -> None:
        self._policy, self._cross_class, self._clock, self._on_outcome = policy, cross_class, clock, on_outcome
        self._book, self._affinity, self._pools = WorkBook(), Affinity(), Pools()
        self._watches, self._ways = Watches(), Ways()
        self._known: dict[str, _Known] = {}
        self._demand, self._gathered, self._readers = Demand(), dict[str, Gathering](), set[str]()
        self._seen_s: dict[str, float] = {}
        self._observed_s = 0.0
        self._decisions: deque[Decision] = deque(maxlen=DECISIONS_KEPT)
        self._unlogged: dict[str, Decision] = {}

    # -- planning

    def plan(self, running: Running, view: ClusterView, waiting: int = 0, ahead: int = 0) -> Plan:
        """Decide for a request that has no worker; `waiting` others of its model have none either, `ahead` of them
        could get none just now and come before it. Raises what `decide` raises."""
        job = running.job
        known = self._known.get(job.request_id) or self._met(running)
        situation = Situation(
            self.works(view, job.model),
            waiting,
            ahead,
            self._ways.apart(self._clock()),
            self._born_pool_of if job.mode == "local" else self.pool_of,
            {} if job.mode == "local" else self._gathering(job.model).homes,
            self._cross_class,
            self._policy,
            self._demand.prompt_tokens(job.model),
            self._watches,
        )
        plan, wish = self._decide(running, known, view, situation)
        is_first = known.decision is None
        known.decision = self._record(running, plan, wish)
        if is_first:
            held = known.decision.held_tokens
            self._demand.planned(job.model, wish.prompt_tokens, held, may_split=job.mode != "local")
        now_s, expected_s = self._clock(), plan.prediction.ttft_s if plan.prediction else 0.0
        self._book.book(
            running.job.request_id,
            Booking(
                decode=plan.decode.worker,
                reader=plan.reader.worker,
                prompt_tokens=wish.prompt_tokens,
                max_tokens=wish.max_tokens,
                answer_tokens=known.decision.answer_tokens,
                held=known.decision.held_tokens,
                delivered=running.session.delivered,
                before=len(running.session.delivered),
                due_s=None if wish.slo.ttft_s is None else running.arrived_s + wish.slo.ttft_s,
                expected_s=now_s + expected_s,
                tpot_s=wish.slo.tpot_s,
                first_token_s=running.first_token_s,
            ),
        )
        return plan

    def _met(self, running: Running) -> _Known:
        """Seen for the first time. Who never splits is served as if nobody did, and nothing is arranged for it."""
        if running.job.mode != "local":
            self._demand.arrived(running.job.model, running.job.slo, self._clock())
        return self._known.setdefault(running.job.request_id, _Known())

    def _decide(self, running: Running, known: _Known, view: ClusterView, situation: Situation) -> tuple[Plan, Wish]:
        """First without any worker that failed this request in its present life; when that leaves nobody, with those
        of them that were seen well since."""
        failed = [n for n in view.nodes if n.worker in known.failed and known.failed[n.worker][0] == n.life]
        wish = self._wish(running, known, view, frozenset(node.worker for node in failed))
        try:
            return decide(wish, view, situation), wish
        except Overloaded:
            still = frozenset(node.worker for node in failed if node.seen_s <= known.failed[node.worker][1])
            if still == wish.avoid:
                raise
        wish = self._wish(running, known, view, still)
        return decide(wish, view, situation), wish

    def _wish(self, running: Running, known: _Known, view: ClusterView, avoid: frozenset[str]) -> Wish:
        job, delivered, before = running.job, len(running.session.delivered), running.made_by
        now_s = self._clock()
        return Wish(
            model=job.model,
            prompt_tokens=len(job.prompt_ids) + delivered,
            max_tokens=job.max_tokens - delivered,
            mode=job.mode,
            avoid=avoid,
            answer_tokens=self.answer_left(running),
            held=self._held(running, known, view),
            exactness_class=before.status.exactness_class if before is not None else None,
            waited_s=now_s - running.waits_since_s,
            time_left_s=None if job.deadline_s is None else job.deadline_s - now_s,
            # the first token of an answer that goes on elsewhere came when it came
            slo=Slo(None, job.slo.tpot_s) if delivered else job.slo,
            past=Past(now_s - running.arrived_s, delivered, now_s - running.first_token_s if delivered else 0.0),
        )

    def typical_answer(self, model: str) -> float:
        """Tokens that an answer of this model is expected to have, as far as its limit allows."""
        return self._demand.answer_tokens(model)

    def answer_left(self, running: Running) -> float:
        """Tokens that the answer is expected to go on for, going by others of its model, within its limit."""
        delivered = len(running.session.delivered)
        return left_of(self.typical_answer(running.job.model), delivered, running.job.max_tokens)

    def _held(self, running: Running, known: _Known, view: ClusterView) -> dict[str, int]:
        if not running.job.cache_prompt:
            return {}
        held = {
            node.worker: self._affinity.held(node.worker, self._chain(running, known, node.status.chunk_tokens))
            for node in view.ready(running.job.model)
        }
        return {worker: count for worker, count in held.items() if count}

    def _chain(self, running: Running, known: _Known, chunk_tokens: int) -> Chain:
        if chunk_tokens not in known.chains:
            ids = (*running.job.prompt_ids, *running.session.delivered)
            known.chains[chunk_tokens] = chain_of(running.job.tenant, ids, chunk_tokens)
        return known.chains[chunk_tokens]

    def _record(self, running: Running, plan: Plan, wish: Wish) -> Decision:
        now_s, job = self._clock(), running.job
        held_tokens = min(wish.held.get(plan.reader.worker, 0), wish.prompt_tokens - 1)
        for node, pool in plan.spills:
            _tell(self._pools.spilled(node.worker, node.status.model, node.status.role, pool, now_s))
        decision = Decision(
            request_id=job.request_id,
            tenant=job.tenant,
            model=job.model,
            at_s=now_s,
            plan=plan,
            prompt_tokens=wish.prompt_tokens,
            answer_tokens=wish.answer_tokens or 0.0,
            held_tokens=held_tokens,
            waited_s=wish.waited_s,
        )
        self._decisions.append(decision)
        self.write_down(job.request_id)  # the one before, if nothing came of it
        self._unlogged[job.request_id] = decision
        return decision

    def write_down(self, request_id: str) -> None:
        """Log what was decided for it, once. Not when it is: its worker waits for that, and this takes longer."""
        if (decision := self._unlogged.pop(request_id, None)) is not None:
            entry = decision.entry(decision.at_s)
            log.info("planned", **{key: value for key, value in entry.items() if key not in UNTOLD})

    def waits(self, running: Running, plan: Plan, view: ClusterView) -> Waits:
        """How long the decode worker of a plan that was just made will wait for KV."""
        fetching = self._book.fetching(plan.decode.worker)
        own, now_s, before_s = fetching.pop(running.job.request_id, None), self._clock(), 0.0
        # a worker reads prompts in order: those of other decode workers, and its own, come before what is fetched
        for worker in sorted({booking.reader for booking in fetching.values()}):
            if (reader := view.node(worker)) is not None:
                cost = NodeCost.of(reader.status)
                before_s += cost.queued_s(self._book.work(worker, now_s))
                if own is not None and own.reader == worker:
                    before_s -= cost.prefill_s(own.prompt_work.tokens, own.prompt_work.start)
        if plan.prediction is not None:
            return Waits(before_s, plan.prediction.ttft_s)
        work_there = self._book.work(plan.reader.worker, now_s)  # this request is booked
        return Waits(before_s, NodeCost.of(plan.reader.status).queued_s(work_there))

    # -- what happens to requests

    def progressed(self, running: Running, done: int) -> None:
        """`done` positions of its prompt are computed."""
        self._book.read(running.job.request_id, done)

    def prompted(self, running: Running) -> None:
        """Its prompt is whole: what was believed of prefixes is corrected by what the workers found."""
        self._book.prompted(running.job.request_id, self._clock())
        known, plan, report = self._known.get(running.job.request_id), running.plan, running.report
        if known is None or plan is None or report is None:
            return
        self._ways.reported(plan.decode.worker, report, self._clock())
        if not running.job.cache_prompt:
            return
        self._correct(running, known, plan.decode, report.cached_tokens)
        for node in plan.candidates:
            if node.worker == report.prefill_worker and report.mode == "split":
                self._correct(running, known, node, report.prefill_cached_tokens)
                self._keep(node, running, running.job.prompt_ids[:-1])

    def held_at_most(self, running: Running, view: ClusterView) -> int:
        """Leading positions of its prompt that some worker is believed to hold."""
        known = self._known.get(running.job.request_id) or self._met(running)
        return max(self._held(running, known, view).values(), default=0)

    def held(self, running: Running, view: ClusterView) -> dict[str, int]:
        """How many leading positions of the answer so far each worker is believed to hold; those that hold none are
        left out."""
        return self._held(running, _Known(), view)

    def kept(self, running: Running, node: Node, ids: Sequence[int]) -> None:
        """A worker keeps KV of a running answer, as far as `ids`."""
        self._keep(node, running, ids)

    def failed(self, running: Running) -> None:
        """Its decode worker failed it."""
        known, plan = self._known.get(running.job.request_id), running.plan
        if known is not None and plan is not None:
            known.failed[plan.decode.worker] = (plan.decode.life, self._clock())
        self.left(running)

    def left(self, running: Running) -> None:
        """Its workers do not have it any more."""
        self._book.remove(running.job.request_id)
        if (known := self._known.get(running.job.request_id)) is not None:
            known.chains.clear()  # what was delivered belongs to the next prompt

    def over(self, running: Running) -> None:
        """Nobody waits for it any more."""
        self._book.remove(running.job.request_id)
        self.write_down(running.job.request_id)
        known = self._known.pop(running.job.request_id, None)
        if known is None or known.decision is None:
            return
        decision = known.decision
        if running.first_token_s >= decision.at_s:
            decision.ttft_s = running.first_token_s - decision.at_s
            decision.completion_s = running.last_token_s - decision.at_s
            decision.tokens = len(running.session.delivered)
            self._on_outcome(decision)
        if running.session.state is State.DONE:
            self._finished(running, decision.plan.decode)

    def _finished(self, running: Running, decode: Node) -> None:
        job, count = running.job, len(running.session.delivered)
        is_cut = running.session.finish_reason == "length"
        self._demand.answered(job.model, count, is_cut=is_cut, may_split=job.mode != "local")
        if job.cache_prompt:
            # the last token was drawn, never evaluated; elsewhere than at level exact only prompts are kept
            whole = decode.status.level == "exact"
            self._keep(
                decode, running, ((*job.prompt_ids, *running.session.delivered) if whole else job.prompt_ids)[:-1]
            )

    def _correct(self, running: Running, known: _Known, node: Node, found: int) -> None:
        chain = self._chain(running, known, node.status.chunk_tokens)
        if self._affinity.held(node.worker, chain) > found:
            self._affinity.correct(node.worker, chain, found)

    def _keep(self, node: Node, running: Running, ids: Sequence[int]) -> None:
        self._affinity.keep(node.worker, chain_of(running.job.tenant, ids, node.status.chunk_tokens))

    # -- what is known of workers

    def on_view(self, view: ClusterView) -> None:
        """Read what new statuses show."""
        for node in view.nodes:
            if self._seen_s.get(node.worker) != node.seen_s:
                self._seen_s[node.worker] = node.seen_s
                self._affinity.meet(node.worker, node.life, _chunks_kept(node))
                self._book.seen(node.status)
        now_s = self._clock()
        is_due = now_s - self._observed_s >= OBSERVE_S
        if is_due:
            self._observed_s = now_s
            self._readers.intersection_update(node.worker for node in view.nodes)
            for event in self._pools.observe(self._standings(view), now_s):
                _tell(event)
        # every answer of every worker comes by here: what is not due looks at homes alone
        models = {model for model, gathered in self._gathered.items() if gathered.homes}
        for model in sorted({*models, *view.models} if is_due else models) if self._policy is None else ():
            self._gather(model, view, now_s, is_due=is_due)

    def works(self, view: ClusterView, model: str | None = None) -> Mapping[str, Work]:
        """What each worker, or each of a model, has to do, as far as is known here."""
        now_s = self._clock()
        return {
            node.worker: self._book.work(node.worker, now_s)
            for node in view.nodes
            if model is None or node.status.model == model
        }

    def booked(self, view: ClusterView) -> dict[str, Work]:
        """The same of those that have something to do."""
        return {worker: work for worker, work in self.works(view).items() if work != Work()}

    def decisions(self, tenant: str | None = None) -> list[dict[str, Any]]:
        """The last ones, the newest first; of one tenant's requests if named."""
        now_s = self._clock()
        told = (decision for decision in reversed(self._decisions) if tenant in (None, decision.tenant))
        return [decision.entry(now_s) for decision in told]

    @property
    def pool_events(self) -> tuple[PoolEvent, ...]:
        """The last ones, the newest first."""
        return tuple(reversed(self._pools.events))

    def pool_of(self, node: Node) -> Pool:
        """Where a node stands now, whatever its role."""
        if node.worker in self._readers and node.status.role == "mixed":
            return "prompt"
        return self._born_pool_of(node)

    def _born_pool_of(self, node: Node) -> Pool:
        return self._pools.of(node.worker, node.status.model, node.status.role)

    def _gathering(self, model: str) -> Gathering:
        return self._gathered.setdefault(model, Gathering())

    def _gather(self, model: str, view: ClusterView, now_s: float, *, is_due: bool) -> None:
        """Where streams of a model's mixed nodes run: homes that are gone are known at once, others found in time."""
        gathering = self._gathering(model)
        nodes = alike(view.ready(model), gathering.homes)
        is_changed = gathering.keep([node.worker for node in nodes])
        if is_due:
            seen = [Candidate.of(node) for node in nodes]
            is_changed |= gathering.observe(seen, self._typical(model, nodes, now_s), now_s)
        gathered = {node.worker for node in nodes} if gathering.homes else set()
        for node in view.nodes if is_changed or is_due else ():
            if node.status.model != model:
                continue
            was_reader = node.worker in self._readers
            self._readers.discard(node.worker)
            if is_reader := node.worker in gathered - gathering.homes.keys():
                self._readers.add(node.worker)
            if is_reader != was_reader and node.status.role == "mixed":
                kind: EventKind = "repurpose" if is_reader else "return"
                _tell(self._pools.moved(node.worker, model, kind, gathering.why, now_s))

    def _typical(self, model: str, nodes: Sequence[Node], now_s: float) -> Typical | None:
        """Requests that come to all gateways: as many more than ours as there are more streams."""
        typical = self._demand.typical(model, now_s)
        running = sum(self._book.work(node.worker, now_s).decoding for node in nodes)
        own = running - sum(self._book.foreign(node.worker) for node in nodes)
        return replace(typical, rate_per_s=typical.rate_per_s * running / own) if typical and own > 0 else typical

    def _standings(self, view: ClusterView) -> list[Standing]:
        """A prompt that a decode worker computes for itself is work that its model's prompt pool could not take only
        while all of that pool is busy; else it was planned there because that is better. A sequence that waits for its
        prompt is no work of the token pool yet."""
        works = self.works(view)
        readers = [node for node in view.ready() if node.prefills and self.pool_of(node) != "token"]
        idle = {node.status.model for node in readers if not works[node.worker].prompts}

        def prompt_work(node: Node) -> float:
            work, is_choice = works[node.worker], self.pool_of(node) == "token" and node.status.model in idle
            return 1.0 if (work.served if is_choice else work.prompts) else 0.0

        return [
            Standing(
                node.worker,
                node.status.model,
                node.status.role,
                prompt_work=prompt_work(node),
                prompt_room=float(node.prefills and node.status.is_ready),
                token_work=float(works[node.worker].decoding),
                token_room=float(node.status.slots if node.status.is_ready else 0),
            )
            for node in view.nodes
        ]


def _tell(told: PoolEvent) -> None:
    log.info("pool", kind=told.kind, worker=told.worker, model=told.model, born=told.born, to=told.to, why=told.why)


def _chunks_kept(node: Node) -> int:
    """Whole chunks that a worker may keep."""
    chunk_bytes = node.status.kv_bytes_per_token * node.status.chunk_tokens
    return node.status.load.prefix_limit_bytes // chunk_bytes if chunk_bytes else 0
