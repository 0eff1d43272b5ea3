"""A plan in the workers' words: the message that a decode worker gets, with a ticket for everything it may fetch.

Owns the translation and the signing. Refuses to know when it is sent and what becomes of it.

A ticket lives as long as it may lie with the decode worker before it is used: while others' KV comes first, and while a
candidate before this one is waited for in vain. Predictions err, and a board that is too hot runs at half its clock:
`MARGIN` times as long as predicted is allowed for.
"""

from __future__ import annotations

from typing import Final

from edge_llm.cluster.view import Node
from edge_llm.gateway.planner import Waits
from edge_llm.gateway.running import Running
from edge_llm.gateway.scheduler import Plan
from edge_llm.kv.snapshot import ids_digest
from edge_llm.request import SamplingParams
from edge_llm.worker import messages
from edge_llm.worker.client import Peer, WorkerClient
from edge_llm.worker.messages import ADVANCE_S, DecodeRequest, KeepRequest, PrefillCandidate
from edge_llm.worker.tickets import LIFETIME_S, MAX_LIFETIME_S

MARGIN: Final = 2.0


class Orders:
    """Writes what workers are asked to do, in the name of one gateway."""

    def __init__(self, client: WorkerClient, gateway: str) -> None:
        self._client, self._gateway = client, gateway

    def decode_request(
        self, running: Running, plan: Plan, time_left_s: float, waits: Waits, age_s: float = 0.0
    ) -> DecodeRequest:
        """Generate what is left of an answer, as planned. `age_s`: since its first token."""
        job, session = running.job, running.session
        digest = ids_digest((*job.prompt_ids, *session.delivered))
        # an older worker refuses what it does not know; what it publishes says what that is
        rates = plan.decode.status.load.rates
        tpot_s = job.slo.tpot_s or 0.0 if rates.of_limit else 0.0
        return DecodeRequest(
            request_id=job.request_id,
            epoch=session.epoch,
            gateway=self._gateway,
            prompt_ids=list(job.prompt_ids),
            delivered_ids=session.delivered,
            max_tokens=job.max_tokens,
            sampling=_sampling(job.sampling),
            stop=list(job.stop),
            stop_ids=list(job.stop_ids),
            candidates=self._candidates(running, plan, digest, waits),
            cache_prompt=job.cache_prompt,
            tenant=job.tenant,
            time_left_s=time_left_s,
            holder=self._holder(running, plan, digest, waits),
            must_split=job.mode == "split",
            tpot_s=tpot_s,
            age_s=age_s if tpot_s and session.delivered and rates.least_piece_steps else 0.0,
        )

    def keep_request(self, running: Running) -> KeepRequest:
        """Keep KV of all tokens so far, which the decode worker has: it evaluates the last one now."""
        assert running.plan is not None
        job, ids = running.job, (*running.job.prompt_ids, *running.session.delivered)
        source = self._source(running, running.plan.decode, ids_digest(ids), LIFETIME_S, only_stored=True)
        return KeepRequest(request_id=job.request_id, ids=list(ids), tenant=job.tenant, source=source)

    def _candidates(self, running: Running, plan: Plan, digest: str, waits: Waits) -> list[PrefillCandidate]:
        """Where the decode worker may get KV: first from a draining worker that holds all of it."""
        holder, moved = peer_of(plan.decode), running.holder
        made: list[PrefillCandidate] = []
        if moved is not None and moved.place != plan.decode.place:
            made.append(self._source(running, moved, digest, _lifetime_s(waits), only_stored=True))
        for node in plan.candidates:
            lifetime_s = _lifetime_s(waits, in_vain=len(made))
            made.append(self._source(running, node, digest, lifetime_s, holder=holder, patience_s=_patience_s(waits)))
        return made

    def _holder(self, running: Running, plan: Plan, digest: str, waits: Waits) -> PrefillCandidate | None:
        """The decode worker itself, as a place where a prefill worker may fetch what only it holds."""
        if not plan.candidates or not running.job.cache_prompt:
            return None
        # a prefill worker asks here when its own turn comes
        lifetime_s = _lifetime_s(waits, in_vain=len(plan.candidates))
        return self._source(running, plan.decode, digest, lifetime_s, only_stored=True)

    def _source(
        self,
        running: Running,
        node: Node,
        digest: str,
        lifetime_s: float,
        *,
        only_stored: bool = False,
        holder: Peer | None = None,
        patience_s: float = 0.0,
    ) -> PrefillCandidate:
        job = running.job
        ticket = self._client.prefill_ticket(peer_of(node), job.request_id, digest, job.tenant, holder, lifetime_s)
        return PrefillCandidate(
            worker=node.worker,
            address=node.place.address,
            ticket=ticket,
            only_stored=only_stored,
            patience_s=patience_s,
        )


def _patience_s(waits: Waits) -> float:
    """How long a prefill worker may take until it gets further."""
    return min(MAX_LIFETIME_S, MARGIN * waits.own_s)


def _lifetime_s(waits: Waits, in_vain: int = 0) -> float:
    """How long a ticket may lie, when so many candidates may be waited for before it."""
    one_s = max(ADVANCE_S, _patience_s(waits))
    return min(MAX_LIFETIME_S, LIFETIME_S + MARGIN * waits.before_s + in_vain * one_s)


def peer_of(node: Node) -> Peer:
    """A node as the client calls it."""
    return Peer(node.worker, node.place.address)


def _sampling(params: SamplingParams) -> messages.Sampling:
    return messages.Sampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repeat_penalty=params.repeat_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        penalty_last_n=params.penalty_last_n,
        seed=str(params.seed),
        logit_bias={str(token): bias for token, bias in params.logit_bias.items()},
    )
