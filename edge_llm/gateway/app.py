"""The public endpoint: routes only. Parses by openai.py, runs by dispatch.py, streams updates as SSE.

Owns HTTP status codes, limits, keep-alives from a wall clock, and what an answer says about how it was made
(`timings.edge_llm`). Refuses to know workers' messages and planning.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, Final

import aiohttp
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from edge_llm.cluster.discovery import Discovery, Heard
from edge_llm.cluster.probe import Prober
from edge_llm.config import GatewayConfig
from edge_llm.errors import (
    EdgeLLMError,
    InvalidRequest,
    ShuttingDown,
    UnknownModel,
)
from edge_llm.exposition import CONTENT_TYPE, Exposition
from edge_llm.gateway import answer
from edge_llm.gateway.decision import Decision
from edge_llm.gateway.dispatch import Dispatcher
from edge_llm.gateway.edge import SECURITY, Bodies, Edge, caller_of
from edge_llm.gateway.intake import Arrival, Caller, Intake
from edge_llm.gateway.keys import Credentials
from edge_llm.gateway.metrics import GatewayMetrics
from edge_llm.gateway.openai import Ask, parse
from edge_llm.gateway.operating import Operating, add_routes
from edge_llm.gateway.overview import found_by, overview
from edge_llm.gateway.planner import Planner
from edge_llm.gateway.policies import policy_of
from edge_llm.gateway.queue import Bounds
from edge_llm.gateway.shape import Shape, error_body, error_headers, together
from edge_llm.gateway.tokenizing import Tokenizers
from edge_llm.gateway.wire import outlet_of
from edge_llm.straight import Straight
from edge_llm.trace import follow
from edge_llm.worker.client import WorkerClient
from edge_llm.worker.stream import ClosingStream
from edge_llm.worker.tickets import KeyRing

_DRAIN_POLL_S: Final = 0.05
_UNUSUAL: Final = re.compile(r"[^A-Za-z0-9._:-]")
_ID_CHARS: Final = 64
# Of one request: more would wait for each other's slots, and be refused as waiting too long.
_PROMPTS_AT_ONCE: Final = 4
# Workers close connections that were idle for 5 s (uvicorn): let go before, so that no request meets one that closes.
IDLE_S: Final = 4.0
_HERE: Final = (
    "; this server has /v1/chat/completions, /v1/completions and /v1/models (a client that asks for /v1/responses of "
    "itself can be told to use chat completions)"
)
log = structlog.get_logger()


class Gateway:
    """Everything a gateway process has, from start to stop."""

    def __init__(self, config: GatewayConfig, keys: KeyRing, discovery: Discovery, credentials: Credentials) -> None:
        self.config = config
        self._keys, self._discovery = keys, discovery
        self.name = config.name or f"gateway-{secrets.token_hex(4)}"
        self.dispatcher: Dispatcher
        self.intake: Intake
        self.operating: Operating
        self.credentials = credentials
        self.is_leaving, self.asked_s = False, 0.0
        self._began_s, self._had_decoder = time.monotonic(), False
        self.bodies = Bodies(config.max_body_bytes, config.queue_bytes, config.read_s)
        self.started = int(time.time())
        self.exposition = Exposition(config.metrics_alias)
        self.metrics = GatewayMetrics(self.exposition.registry, self.name)
        self.metrics.watch(lambda: self.dispatcher.view, lambda: self.dispatcher.states, self._found)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Connect to the cluster and keep looking at it."""
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
            client = WorkerClient(session, self._keys, self.name, time.time, lambda: secrets.token_hex(12))
            config = self.config
            bounds = Bounds(config.queue_length, config.queue_bytes, config.queue_predicted_wait_s, config.queue_wait_s)
            planner = Planner(policy_of(config.policy, config.policy_seed), config.cross_class, on_outcome=self._judge)
            self.dispatcher = Dispatcher(
                client,
                self.name,
                bounds,
                config.replan_limit,
                self.metrics,
                planner,
                buffer_bytes=config.stream_buffer_bytes,
                checkpoint_tokens=config.checkpoint_tokens,
            )
            tokenizers = Tokenizers(client, lambda: self.dispatcher.view)
            self.intake = Intake(config, self.dispatcher, tokenizers, time.monotonic)
            self.operating = Operating(client, lambda worker: self.dispatcher.view.node(worker))
            prober = Prober(self._discovery, client, config.probe_s, self.dispatcher.on_view)
            self.dispatcher.prober = prober
            async with self._discovery.watching(prober.news):
                await prober.probe_all()
                probing = asyncio.create_task(prober.run(), name="prober")
                try:
                    yield
                finally:
                    probing.cancel()
                    with suppress(asyncio.CancelledError):
                        await probing
                    await self.dispatcher.close()

    def has_settled(self, has_decoder: bool) -> bool:
        """Whether clients may be sent here. A gateway that has just begun waits for its workers first; later it says
        itself that there is none: whoever looks for the reason must be able to ask it."""
        self._had_decoder |= has_decoder
        return self._had_decoder or time.monotonic() - self._began_s >= self.config.settle_s

    async def drain(self) -> None:
        """Not ready from now on. Answer who still comes until all have gone elsewhere, then take nothing new and let
        answers finish, for `drain_s` in all; then end what is left with an error."""
        self.is_leaving = True
        ends_s = time.monotonic() + self.config.drain_s
        log.info("draining", requests=self.dispatcher.requests, within_s=self.config.drain_s)
        await self._left_alone(ends_s)
        within_s = max(0.0, ends_s - time.monotonic())
        self.intake.close(within_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not self.dispatcher.is_idle:  # noqa: ASYNC110 - what is waited for has no event of its own
                    await asyncio.sleep(_DRAIN_POLL_S)
        self.dispatcher.end_all(ShuttingDown("this gateway stopped before the answer was complete"))

    async def _left_alone(self, ends_s: float) -> None:
        """Nothing was asked, and nothing ran, for `leaving_s`."""
        quiet_since_s = time.monotonic()
        while (now_s := time.monotonic()) < min(quiet_since_s + self.config.leaving_s, ends_s):
            quiet_since_s = max(quiet_since_s, self.asked_s if self.dispatcher.is_idle else now_s)
            await asyncio.sleep(_DRAIN_POLL_S)

    def _found(self) -> tuple[int, Heard]:
        """How many places are known, and how fresh that is."""
        prober = self.dispatcher.prober
        return prober.places if prober else 0, self._discovery.heard()

    def discovery(self) -> dict[str, object]:
        """The same for people, with who does not answer and why."""
        places, heard = self._found()
        silent = self.dispatcher.prober.silent if self.dispatcher.prober else ()
        return found_by(places, heard, silent)

    def _judge(self, decision: Decision) -> None:
        """A plan's first token came."""
        self.metrics.judged(decision.model, "ttft", decision.ttft_error_ratio)
        self.metrics.judged(decision.model, "tpot", decision.tpot_error_ratio)


def create_app(gateway: Gateway) -> FastAPI:
    """All routes of one gateway, which runs as long as the app does."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with gateway.running():
            yield

    answering = _answering(gateway)
    app = FastAPI(routes=[*answering], lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    on_error = _error_answer(gateway)
    app.add_middleware(Straight, routes=answering, on_error=on_error)
    app.add_middleware(
        Edge,
        credentials=gateway.credentials,
        on_refusal=gateway.metrics.rejected,
        is_leaving=lambda: gateway.is_leaving,
        has_open_metrics=gateway.config.open_metrics,
    )
    if gateway.config.cors_origins:  # around the edge: a browser asks for leave without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=gateway.config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_exception_handler(EdgeLLMError, on_error)
    _say_other_errors(app)
    _say_how_it_is(app, gateway)
    _say_models(app, gateway)
    add_routes(app, lambda: gateway.operating, gateway.bodies)
    return app


def _error_answer(gateway: Gateway) -> Callable[[Request, Exception], Awaitable[Response]]:
    """Our own errors in OpenAI's form."""

    async def on_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, EdgeLLMError)
        if not getattr(request.state, "is_accepted", False):
            gateway.metrics.rejected(error.code)
        return JSONResponse(error_body(error), error.status, error_headers(error))

    return on_error


def _say_other_errors(app: FastAPI) -> None:
    """Those of the framework and bugs in the same form."""

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        here = _HERE * (error.status_code == 404)
        failure = InvalidRequest(f"{request.method} {request.url.path}: {error.detail}{here}")
        return JSONResponse(error_body(failure), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        failure = EdgeLLMError(f"the gateway failed: {type(error).__name__}; see its log")
        return JSONResponse(error_body(failure), failure.status, SECURITY)


def _say_how_it_is(app: FastAPI, gateway: Gateway) -> None:
    """For probes, scrapers and whoever watches the cluster."""

    @app.api_route("/healthz", methods=["GET", "HEAD"])
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    # as llama-server and vLLM call it, and load generators ask before they begin
    @app.api_route("/health", methods=["GET", "HEAD"])
    @app.api_route("/readyz", methods=["GET", "HEAD"])
    async def readyz() -> Response:
        if gateway.is_leaving:
            return Response("draining", 503)
        has_decoder = any(node.decodes for node in gateway.dispatcher.view.ready())
        words = "ready" if has_decoder else "no decode worker is ready"
        return Response(words, 200 if gateway.has_settled(has_decoder) else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(gateway.exposition.text(), media_type=CONTENT_TYPE)

    @app.get("/cluster")
    async def cluster(request: Request) -> Response:
        of, key = gateway.dispatcher, caller_of(request).key
        nodes, planner = sorted(of.view.nodes, key=lambda node: node.worker), of.planner
        body = overview(
            gateway.name,
            of.requests,
            nodes,
            planner.booked(of.view),
            time.monotonic(),
            {node.worker: planner.pool_of(node) for node in nodes},
            planner.decisions(None if key.is_operator else key.tenant),
            planner.pool_events,
            gateway.discovery(),
            {"id": key.id, "is_operator": key.is_operator},
        )
        return Response(body, media_type="application/json")


def _say_models(app: FastAPI, gateway: Gateway) -> None:
    """OpenAI's list: what the caller may use of what is served."""

    @app.api_route("/v1/models", methods=["GET", "HEAD"])
    @app.api_route("/v1/models/", methods=["GET", "HEAD"])
    async def models(request: Request) -> Response:
        allowed = gateway.intake.models(caller_of(request).key)
        return JSONResponse({"object": "list", "data": [_model_entry(gateway, model) for model in allowed]})

    @app.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> Response:
        if model not in gateway.intake.models(caller_of(request).key):
            raise UnknownModel(f"no worker serves the model {model!r}", param="model")
        return JSONResponse(_model_entry(gateway, model))


def _answering(gateway: Gateway) -> list[Route]:
    """The two routes that every request waits for: plain ones, which FastAPI adds nothing to."""

    async def chat_completions(request: Request) -> Response:
        return await _answer(gateway, request, is_chat=True)

    async def completions(request: Request) -> Response:
        return await _answer(gateway, request, is_chat=False)

    return [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
    ]


async def _answer(gateway: Gateway, request: Request, *, is_chat: bool) -> Response:
    arrived_s = gateway.asked_s = time.monotonic()
    caller = caller_of(request)
    body = await gateway.bodies.read(request)
    ask = parse(
        body,
        is_chat=is_chat,
        random_seed=lambda: secrets.randbits(63),
        mode_header=request.headers.get("x-edge-llm-mode"),
        timeout_header=request.headers.get("x-request-timeout-s"),
    )
    if ask.others:
        return JSONResponse(together(await _several(gateway, request, (ask, *ask.others), len(body), arrived_s)))
    if not ask.is_stream:
        return JSONResponse(await _whole(gateway, request, ask, len(body), arrived_s))
    with ExitStack() as held:
        arrival = held.enter_context(_arriving(gateway, caller, ask, len(body), arrived_s))
        job, node = await answer.while_connected(request, arrival.job())
        shape = Shape(caller.request_id, int(time.time()), node.status.model, is_chat)
        held.pop_all()  # the stream leaves what it holds when it ends
        outlet = outlet_of(request.scope)
        parts = answer.stream(arrival, ask, job, shape, arrived_s, gateway.config.keep_alive_s, outlet)
        await anext(parts)  # what is refused at once is an HTTP error, not an error in a stream
        response = ClosingStream(parts, "text/event-stream", gateway.config.stall_s)
        response.headers["x-accel-buffering"] = "no"  # nginx would keep tokens until it has a buffer of them
        return response


async def _several(
    gateway: Gateway, request: Request, asks: Sequence[Ask], size: int, arrived_s: float
) -> list[dict[str, Any]]:
    """The answers to all prompts of a request: each counts as a request of its key, so many at once as the key may."""
    key = caller_of(request).key
    if key.requests_per_minute is not None and len(asks) > key.requests_per_minute:
        raise InvalidRequest(
            f"{len(asks)} prompts are so many requests, and this API key may make {key.requests_per_minute} a minute: "
            "send fewer at once",
            param="prompt",
        )

    gateway.intake.check_open()

    async def one(index: int) -> dict[str, Any]:
        try:
            return await _whole(gateway, request, asks[index], size // len(asks), arrived_s, is_new=False)
        except EdgeLLMError as error:
            error.message = f"prompt[{index}]: {error.message}"
            raise

    works = (partial(one, index) for index in range(len(asks)))
    return await answer.all_of(works, min(_PROMPTS_AT_ONCE, key.max_streams or _PROMPTS_AT_ONCE))


async def _whole(
    gateway: Gateway, request: Request, ask: Ask, size: int, arrived_s: float, *, is_new: bool = True
) -> dict[str, Any]:
    """The answer to one prompt of a request, when all of it is there. `is_new`: the request has no other."""
    caller = caller_of(request)
    with _arriving(gateway, caller, ask, size, arrived_s, is_new=is_new) as arrival:
        job, node = await answer.while_connected(request, arrival.job())
        shape = Shape(caller.request_id, int(time.time()), node.status.model, ask.is_chat)
        return await answer.whole(arrival, request, ask, job, shape, arrived_s)


def _arriving(
    gateway: Gateway, caller: Caller, ask: Ask, size: int, arrived_s: float, *, is_new: bool = True
) -> Arrival:
    # workers' messages take fewer characters than a client's header may have
    job_id = f"{_UNUSUAL.sub('_', caller.request_id)[:_ID_CHARS]}.{secrets.token_hex(4)}"
    structlog.contextvars.bind_contextvars(request_id=job_id)
    follow(caller.trace)
    return gateway.intake.arrive(caller, ask, job_id, size, arrived_s, is_new=is_new)


def _model_entry(gateway: Gateway, model: str) -> dict[str, Any]:
    status = next(node.status for node in gateway.dispatcher.view.nodes if node.status.model == model)
    meta = {
        "n_ctx": status.n_ctx,
        "architecture": status.architecture,
        "quantization": status.quantization,
        "kv_bytes_per_token": status.kv_bytes_per_token,
        "vocab_size": status.vocab_size,
        "sha256": status.model_sha256,
    }
    entry = {"id": model, "object": "model", "created": gateway.started, "owned_by": "edge-llm", "meta": meta}
    # vLLM's, which its own bench reads
    return {**entry, "root": model, "parent": None, "max_model_len": status.n_ctx}
