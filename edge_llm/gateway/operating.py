"""What an operator may change on the workers of a running cluster: POST /cluster/WORKER/drain and /cluster/WORKER/role.

Owns who may (API keys with `operator: true`), the shape of the bodies, and passing an order on as a signed call. A
gateway remembers nothing of it: the worker does what it is told and reports how it is, to every gateway, so that it
does not matter which one was asked. Refuses to know what draining and roles mean.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import msgspec
import structlog
from fastapi import FastAPI, Request, Response

from edge_llm.cluster.view import Node
from edge_llm.errors import InvalidRequest, NotOperator, UnknownWorker
from edge_llm.gateway.edge import Bodies, caller_of
from edge_llm.gateway.overview import node_entry
from edge_llm.worker.client import Peer, WorkerClient
from edge_llm.worker.messages import DrainRequest, Message, RoleRequest, WorkerStatus

Body = TypeVar("Body", bound=Message)
log: Final = structlog.get_logger()


class Operating:
    """Orders of one gateway. `find`: a worker of its view by name."""

    def __init__(self, client: WorkerClient, find: Callable[[str], Node | None]) -> None:
        self._client, self._find = client, find

    async def drain(self, worker: str, order: DrainRequest) -> bytes:
        return await self._passed_on(worker, lambda peer: self._client.drain(peer, order.is_draining))

    async def role(self, worker: str, order: RoleRequest) -> bytes:
        return await self._passed_on(worker, lambda peer: self._client.role(peer, order.role))

    async def _passed_on(self, worker: str, call: Callable[[Peer], Awaitable[WorkerStatus]]) -> bytes:
        node = self._find(worker)
        if node is None:
            raise UnknownWorker(f"no worker {worker!r} answers this gateway; GET /cluster lists those that do")
        status = await call(Peer(worker, node.place.address))
        now_s = time.monotonic()
        return msgspec.json.encode(node_entry(Node(node.place, status, now_s), None, now_s))


def add_routes(app: FastAPI, operating: Callable[[], Operating], bodies: Bodies) -> None:
    """Each checks who asks, parses, passes on, and answers how the worker is then."""

    @app.post("/cluster/{worker}/drain")
    async def drain(request: Request, worker: str) -> Response:
        order = await _order(request, bodies, worker, DrainRequest)
        return Response(await operating().drain(worker, order), media_type="application/json")

    @app.post("/cluster/{worker}/role")
    async def role(request: Request, worker: str) -> Response:
        order = await _order(request, bodies, worker, RoleRequest)
        return Response(await operating().role(worker, order), media_type="application/json")


async def _order(request: Request, bodies: Bodies, worker: str, kind: type[Body]) -> Body:
    key = caller_of(request).key
    if not key.is_operator:
        raise NotOperator(key.id)
    try:
        order = msgspec.json.decode(await bodies.read(request), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"not an order: {error}") from error
    log.info("operator's order", key=key.id, worker=worker, order=repr(order))
    return order
