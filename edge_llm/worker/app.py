"""The worker's HTTP: which route calls what, who may call it, how errors look.

Owns the edge. Every route but PUBLIC is made by `gated`, so it is closed to all but the one right ticket: the operation
a ticket must name is the route's own. Plain Starlette: a request is often the first work in a while, and on cold caches
what FastAPI adds to a route costs a millisecond of each. Refuses to know what a worker is made of (worker.py).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge_llm import trace
from edge_llm.errors import EdgeLLMError, InvalidRequest, Unauthorized, WorkerError
from edge_llm.exposition import CONTENT_TYPE
from edge_llm.straight import Straight
from edge_llm.worker.bodies import error_reply, proven_reply_of, reply_of
from edge_llm.worker.messages import (
    CancelReply,
    CancelRequest,
    DecodeReply,
    DecodeRequest,
    DrainRequest,
    KeepRequest,
    PrefillRequest,
    RoleRequest,
    TokenizeRequest,
    decode,
)
from edge_llm.worker.stream import ClosingStream
from edge_llm.worker.tickets import Operation
from edge_llm.worker.worker import Admitted, Worker

PUBLIC: Final = frozenset({"/healthz", "/readyz", "/metrics"})
NO_ROUTE: Final = "no ticket allows this route"
_GET: Final[frozenset[Operation]] = frozenset({"status", "events"})


def create_app(worker: Worker) -> Starlette:
    """All routes of one worker, which runs as long as the app does."""

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with worker.running():
            yield

    operations = [gated(worker, name, handler) for name, handler in HANDLERS.items()]
    app = Starlette(
        routes=[*_public(worker), *operations],
        middleware=[Middleware(Straight, routes=operations, on_error=_on_error)],
        lifespan=lifespan,
        exception_handlers={EdgeLLMError: _on_error, HTTPException: _on_no_route, Exception: _on_bug(worker)},
    )
    app.router.redirect_slashes = False  # a path that is none is denied, not corrected
    return app


def _public(worker: Worker) -> tuple[Route, ...]:
    """What probes and scrapers may ask without a ticket."""

    async def healthz(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(_request: Request) -> Response:
        return Response("ready" if worker.is_ready else "not ready", 200 if worker.is_ready else 503)

    async def metrics(_request: Request) -> Response:
        return Response(worker.exposition.text(), media_type=CONTENT_TYPE)

    found = (Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", metrics))
    assert {route.path for route in found} == PUBLIC
    return found


# -- what each operation does with a call that was let in


async def _status(worker: Worker, _request: Request, admitted: Admitted) -> Response:
    return proven_reply_of(worker.status(), worker.keys, admitted.ticket)


async def _events(worker: Worker, request: Request, _admitted: Admitted) -> Response:
    gateway = request.query_params.get("gateway", "")
    if not 0 < len(gateway) <= 128:
        raise InvalidRequest("name the gateway: /events?gateway=NAME", param="gateway")
    worker.outboxes.open(gateway)
    return ClosingStream(worker.outboxes.stream(gateway), "application/x-ndjson")


async def _tokenize(worker: Worker, _request: Request, admitted: Admitted) -> Response:
    return reply_of(await worker.tokenizer.tokenize(decode(TokenizeRequest, admitted.body)))


async def _decode(worker: Worker, _request: Request, admitted: Admitted) -> Response:
    worker.refuse_unless_ready()
    if worker.decode is None:
        raise InvalidRequest(f"worker {worker.config.name} has role prefill and decodes nothing")
    worker.decode.accept(decode(DecodeRequest, admitted.body), admitted.claims)
    return reply_of(DecodeReply(), 202)


async def _cancel(worker: Worker, _request: Request, admitted: Admitted) -> Response:
    message = decode(CancelRequest, admitted.body)
    found = worker.decode.cancel(message.request_id, message.epoch) if worker.decode else False
    return reply_of(CancelReply(found=found))


async def _keep(worker: Worker, _request: Request, admitted: Admitted) -> Response:
    worker.refuse_unless_ready()
    assert worker.keeper is not None  # the app serves only while the worker runs
    return reply_of(await worker.keeper.keep(decode(KeepRequest, admitted.body), admitted.claims))


async def _drain(worker: Worker, _request: Request, admitted: Admitted) -> Response:
    is_begin = decode(DrainRequest, admitted.body).is_draining
    (worker.standing.drain if is_begin else worker.standing.resume)()
    return reply_of(worker.status())


async def _role(worker: Worker, _request: Request, admitted: Admitted) -> Response:
    worker.standing.take_role(decode(RoleRequest, admitted.body).role)
    return reply_of(worker.status())


async def _prefill(worker: Worker, _request: Request, admitted: Admitted) -> Response:
    message = decode(PrefillRequest, admitted.body)
    if not message.only_stored:  # what is kept needs no engine, and a draining worker gives it away
        worker.refuse_unless_ready()
    transfer = await worker.prefill.accept(message, admitted.claims)
    key = worker.keys.transfer_key(admitted.ticket)
    parts = worker.metrics.sent(worker.prefill.stream(transfer, key, worker.loop))
    return ClosingStream(parts, "application/octet-stream")


Handler = Callable[[Worker, Request, Admitted], Awaitable[Response]]
HANDLERS: Final[dict[Operation, Handler]] = {
    "status": _status,
    "events": _events,
    "tokenize": _tokenize,
    "decode": _decode,
    "cancel": _cancel,
    "keep": _keep,
    "drain": _drain,
    "role": _role,
    "prefill": _prefill,
}


def gated(worker: Worker, operation: Operation, handler: Handler) -> Route:
    """The route of an operation: `handler` hears only calls whose ticket allows it."""

    async def endpoint(request: Request) -> Response:
        admitted = await worker.admit(request, operation)
        trace.follow(request.headers.get(trace.HEADER, ""))
        if admitted.claims.request_id:
            structlog.contextvars.bind_contextvars(request_id=admitted.claims.request_id)
        return await handler(worker, request, admitted)

    route = Route(f"/{operation}", endpoint, methods=["GET" if operation in _GET else "POST"])
    route.methods = {"GET"} if operation in _GET else {"POST"}  # Starlette lets HEAD in with GET
    return route


# -- errors


async def _on_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, EdgeLLMError)
    return error_reply(error)


async def _on_no_route(_request: Request, _error: Exception) -> Response:
    """A path or method that has no route is denied in the gate's words."""
    return error_reply(Unauthorized(NO_ROUTE))


def _on_bug(worker: Worker) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def on_bug(_request: Request, error: Exception) -> Response:
        return error_reply(WorkerError(f"worker {worker.config.name} failed: {type(error).__name__}; see its log"))

    return on_bug
