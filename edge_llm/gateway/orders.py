"""A plan in the workers' words: the message that a decode worker gets, with a ticket for everything it may fetch.

Owns the translation and the signing. Refuses to know when it is sent and what becomes of it.
"""

from __future__ import annotations

from edge_llm.cluster.view import Node
from edge_llm.gateway.running import Running
from edge_llm.gateway.scheduler import Plan
from edge_llm.kv.snapshot import ids_digest
from edge_llm.request import SamplingParams
from edge_llm.worker import messages
from edge_llm.worker.client import Peer, WorkerClient
from edge_llm.worker.messages import DecodeRequest, PrefillCandidate


class Orders:
    """Writes what workers are asked to do, in the name of one gateway."""

    def __init__(self, client: WorkerClient, gateway: str) -> None:
        self._client, self._gateway = client, gateway

    def decode_request(self, running: Running, plan: Plan, time_left_s: float) -> DecodeRequest:
        """Generate what is left of an answer, as planned."""
        job, session = running.job, running.session
        digest = ids_digest((*job.prompt_ids, *session.delivered))
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
            candidates=self._candidates(running, plan, digest),
            cache_prompt=job.cache_prompt,
            tenant=job.tenant,
            time_left_s=time_left_s,
            holder=self._holder(running, plan, digest),
            must_split=job.mode == "split",
        )

    def _candidates(self, running: Running, plan: Plan, digest: str) -> list[PrefillCandidate]:
        """Where the decode worker may get KV: first from a draining worker that holds all of it."""
        holder, moved = peer_of(plan.decode), running.holder
        is_elsewhere = moved is not None and moved.place != plan.decode.place
        moving = [self._source(running, moved, digest, only_stored=True)] if moved is not None and is_elsewhere else []
        return moving + [self._source(running, node, digest, holder=holder) for node in plan.candidates]

    def _holder(self, running: Running, plan: Plan, digest: str) -> PrefillCandidate | None:
        """The decode worker itself, as a place where a prefill worker may fetch what only it holds."""
        if not plan.candidates or not running.job.cache_prompt:
            return None
        return self._source(running, plan.decode, digest, only_stored=True)

    def _source(
        self, running: Running, node: Node, digest: str, *, only_stored: bool = False, holder: Peer | None = None
    ) -> PrefillCandidate:
        ticket = self._client.prefill_ticket(peer_of(node), running.job.request_id, digest, running.job.tenant, holder)
        return PrefillCandidate(worker=node.worker, address=node.place.address, ticket=ticket, only_stored=only_stored)


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
