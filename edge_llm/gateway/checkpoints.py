"""Checkpoints: every so many tokens of an answer, a second worker gets its KV, so that a takeover computes no more.

Owns when a checkpoint is due, who keeps it, and that one request has one on its way. What is kept becomes known to the
planner, whose next plan for the request gives that worker credit for it. Refuses to know how KV is fetched
(worker/checkpoint.py): the running worker is never waited for, and whatever goes wrong here leaves the answer alone.

Only between workers of one class at level exact: elsewhere KV of generated tokens may not be used again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

import structlog

from edge_llm.cluster.view import ClusterView, Node
from edge_llm.errors import EdgeLLMError
from edge_llm.gateway.metrics import GatewayMetrics
from edge_llm.gateway.orders import Orders, peer_of
from edge_llm.gateway.planner import Planner
from edge_llm.gateway.running import Running
from edge_llm.worker.client import WorkerClient

# More than so many at once would be behind before they are there.
MAX_ON_THE_WAY: Final = 8
log = structlog.get_logger()


def keeper_for(running: Running, view: ClusterView, held: Mapping[str, int]) -> Node | None:
    """Who should keep a running answer's KV; None when nobody can. The one that holds most of it already, since only
    what is new travels; then one whose own streams do not feel it; then the one that may keep most.

    `held`: worker -> positions of this answer that are believed to be kept there.
    """
    plan = running.plan
    if plan is None or plan.decode.status.level != "exact":
        return None
    status = plan.decode.status
    cells = len(running.job.prompt_ids) + len(running.session.delivered)
    able = [
        node
        for node in view.ready(running.job.model)
        if node.worker != plan.decode.worker
        and node.status.splits
        and (node.status.exactness_class, node.status.level) == (status.exactness_class, "exact")
        and node.status.load.prefix_limit_bytes >= cells * node.status.kv_bytes_per_token
    ]

    def fitness(node: Node) -> tuple[int, bool, int, str]:
        return held.get(node.worker, 0), not node.decodes, node.status.load.prefix_limit_bytes, node.worker

    return max(able, key=fitness, default=None)


class Checkpoints:
    """Of all answers of one gateway. `every_tokens` 0: none."""

    def __init__(
        self,
        client: WorkerClient,
        orders: Orders,
        planner: Planner,
        metrics: GatewayMetrics,
        view: Callable[[], ClusterView],
        every_tokens: int,
    ) -> None:
        self._client, self._orders, self._planner, self._metrics = client, orders, planner, metrics
        self._view, self._every_tokens = view, every_tokens
        self._on_the_way: dict[str, asyncio.Task[None]] = {}

    def on_token(self, running: Running) -> None:
        """A token of this answer came."""
        if not self._every_tokens or len(running.session.delivered) % self._every_tokens:
            return
        request_id = running.job.request_id
        if not running.job.cache_prompt or request_id in self._on_the_way or len(self._on_the_way) >= MAX_ON_THE_WAY:
            return
        view = self._view()
        keeper = keeper_for(running, view, self._planner.held(running, view))
        if keeper is None:
            return
        task = asyncio.create_task(self._take(running, keeper), name=f"checkpoint {request_id}")
        self._on_the_way[request_id] = task
        task.add_done_callback(lambda _: self._on_the_way.pop(request_id, None))

    async def _take(self, running: Running, keeper: Node) -> None:
        """Top of a checkpoint's task."""
        request = self._orders.keep_request(running)
        try:
            reply = await self._client.keep(peer_of(keeper), request)
        except EdgeLLMError as error:
            log.info("no checkpoint", request_id=request.request_id, worker=keeper.worker, code=error.code)
            self._metrics.checkpointed(running.job.model, error.code, 0)
            return
        self._planner.kept(running, keeper, request.ids[: reply.kept_tokens])
        self._metrics.checkpointed(running.job.model, "ok", reply.fetched_bytes)

    async def close(self) -> None:
        """End what is on its way."""
        for task in self._on_the_way.values():
            task.cancel()
        await asyncio.gather(*self._on_the_way.values(), return_exceptions=True)
