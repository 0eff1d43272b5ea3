"""Checkpoints: every so many tokens of an answer, a second worker gets its KV, so that a takeover computes no more.

Owns when a checkpoint is due, who keeps it, and whose turn it is: an answer has one on its way, a worker gives one at
once, and of those that wait the one that was due first comes first. Answers that begin together become due together:
without turns the same one would win each time. What is kept becomes known to the planner, whose next plan for the
request gives that worker credit for it. Refuses to know how KV is fetched (worker/checkpoint.py): the running worker is
never waited for, and whatever goes wrong here leaves the answer alone.

Only between workers of one class at level exact: elsewhere KV of generated tokens may not be used again.

A token costs a comparison here; only one that begins a checkpoint costs what grows with the answer (digests of ids).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import structlog

from edge_llm.cluster.view import ClusterView, Node
from edge_llm.errors import EdgeLLMError
from edge_llm.gateway.metrics import GatewayMetrics
from edge_llm.gateway.orders import Orders, peer_of
from edge_llm.gateway.planner import Planner
from edge_llm.gateway.running import Running
from edge_llm.gateway.session import State
from edge_llm.worker.client import Peer
from edge_llm.worker.messages import KeepReply, KeepRequest, WorkerStatus

# As many as one worker lets in (worker/checkpoint.py: MAX_KEEPING): what it would refuse waits here for its turn.
MAX_ON_THE_WAY: Final = 4
log = structlog.get_logger()


def able_to_keep(running: Running, view: ClusterView) -> list[Node]:
    """Workers that may keep a running answer's KV and have room for all of it."""
    plan, report = running.plan, running.report
    if plan is None or (report is not None and not report.is_same_class):
        return []
    status = plan.decode.status
    if not status.splits or status.level != "exact":
        return []
    kind, cells = _kind(status), len(running.job.prompt_ids) + len(running.session.delivered)
    return [
        node
        for node in view.ready(running.job.model)
        if node.worker != plan.decode.worker
        and _kind(node.status) == kind
        and node.status.n_ctx >= cells
        and node.status.load.prefix_limit_bytes >= cells * node.status.kv_bytes_per_token
    ]


def _kind(status: WorkerStatus) -> tuple[bool, str, str, str, int]:
    """What two workers must have in common: the bits, and the borders of the pieces that are kept."""
    return status.splits, status.level, status.compatibility, status.exactness_class, status.chunk_tokens


def keeper_of(request_id: str, able: Sequence[Node], held: Mapping[str, int]) -> Node | None:
    """Who should keep it; None when nobody can. The one that holds most of it already, since only what is new travels;
    then one whose own streams do not feel it; then by lot, so that each keeps answers in proportion to its room.

    `held`: worker -> positions of this answer that are believed to be kept there.
    """

    def fitness(node: Node) -> tuple[int, bool, float, str]:
        return held.get(node.worker, 0), not node.decodes, _lot(request_id, node), node.worker

    return max(able, key=fitness, default=None)


def _lot(request_id: str, node: Node) -> float:
    """The same for the same request and worker; the largest one falls to workers as often as their room says (weighted
    rendezvous hashing)."""
    digest = hashlib.blake2b(f"{request_id} {node.worker}".encode(), digest_size=8).digest()
    drawn = ((int.from_bytes(digest, "big") >> 12) + 0.5) / (1 << 52)  # between 0 and 1, neither of them
    return node.status.load.prefix_limit_bytes / -math.log(drawn)


class Checkpoints:
    """Of all answers of one gateway. `every_tokens` 0: none. `keep` tells a worker to (worker/client.py)."""

    def __init__(
        self,
        keep: Callable[[Peer, KeepRequest], Awaitable[KeepReply]],
        orders: Orders,
        planner: Planner,
        metrics: GatewayMetrics,
        view: Callable[[], ClusterView],
        every_tokens: int,
    ) -> None:
        self._keep, self._orders, self._planner, self._metrics = keep, orders, planner, metrics
        self._view, self._every_tokens = view, every_tokens
        self._due: dict[str, Running] = {}  # the longest due first; empty when nothing is on its way
        self._on_the_way: dict[str, str] = {}  # request -> worker that gives its KV
        self._tasks: set[asyncio.Task[None]] = set()

    def on_token(self, running: Running) -> None:
        """A token of this answer came."""
        if not self._every_tokens or len(running.session.delivered) - running.checkpoint_tokens < self._every_tokens:
            return
        if running.job.cache_prompt and running.job.request_id not in self._due:
            self._due[running.job.request_id] = running
            self._begin()

    def _begin(self) -> None:
        """Begin with those whose turn it is. An answer that has no worker now becomes due again when it has."""
        for request_id, running in list(self._due.items()):
            if len(self._on_the_way) >= MAX_ON_THE_WAY:
                return
            if running.plan is None or running.session.state is not State.DECODING:
                del self._due[request_id]
                continue
            source = running.plan.decode.worker
            if request_id not in self._on_the_way and source not in self._on_the_way.values():
                del self._due[request_id]
                self._start(running, source)

    def _start(self, running: Running, source: str) -> None:
        """Whatever comes of it, the next one is due so many tokens later."""
        running.checkpoint_tokens = len(running.session.delivered)
        request_id, view = running.job.request_id, self._view()
        able = able_to_keep(running, view)
        keeper = keeper_of(request_id, able, self._planner.held(running, view) if len(able) > 1 else {})
        if keeper is None:
            return
        taking = self._take(running, keeper, self._orders.keep_request(running))
        task = asyncio.create_task(taking, name=f"checkpoint {request_id}")
        self._on_the_way[request_id] = source
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._over(request_id, task))

    def _over(self, request_id: str, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        del self._on_the_way[request_id]
        self._begin()

    async def _take(self, running: Running, keeper: Node, request: KeepRequest) -> None:
        """Top of a checkpoint's task."""
        model = running.job.model
        try:
            reply = await self._keep(peer_of(keeper), request)
            self._planner.kept(running, keeper, request.ids[:-1][: reply.kept_tokens])
            self._metrics.checkpointed(model, "ok", reply.fetched_bytes)
        except EdgeLLMError as error:
            log.info("no checkpoint", request_id=request.request_id, worker=keeper.worker, code=error.code)
            self._metrics.checkpointed(model, error.code, 0)
        except Exception as error:  # top of the task: the answer goes on, and others wait for their turn
            log.error("checkpoint failed", request_id=request.request_id, error=repr(error), exc_info=True)
            self._metrics.checkpointed(model, "gateway_failed", 0)

    async def close(self) -> None:
        """End what is on its way, and begin nothing more."""
        self._every_tokens = 0
        self._due.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
