"""A short way to the routes that every request waits for, past what a framework puts around all of them.

Owns the way there and back: by method and whole path to an endpoint, and from our own errors to answers. All else goes
on to the framework's app. A request is often the first work in a while, and on cold caches every layer between an app's
door and a route is part of its time to first token, at the gateway and at every worker it asks.
Refuses to know what is served; who may ask is the endpoints' business, or that of who stands before.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from edge_llm.errors import EdgeLLMError


class Straight:
    """ASGI middleware. `routes` are the app's own, of a fixed path each; `on_error` answers what they raise."""

    def __init__(
        self,
        app: ASGIApp,
        routes: Iterable[Route],
        on_error: Callable[[Request, Exception], Awaitable[Response]],
    ) -> None:
        self._app, self._on_error = app, on_error
        self._endpoints = {(method, route.path): route.endpoint for route in routes for method in route.methods or ()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        try:
            response = await endpoint(request)
        except EdgeLLMError as error:
            response = await self._on_error(request, error)
            error.__traceback__ = None  # its frames may hold it, and with it a whole prompt until they are collected
        await response(scope, receive, send)
