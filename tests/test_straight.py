"""The short way to hot routes: they are answered as by the app around them, and all else is answered by it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message

from edge_llm.errors import EdgeLLMError, InvalidRequest
from edge_llm.straight import Straight


async def hot(request: Request) -> Response:
    if (await request.body()) == b"bad":
        raise InvalidRequest("bad body", param="body")
    return PlainTextResponse("hot")


async def cold(_request: Request) -> Response:
    raise InvalidRequest("cold and bad")


async def on_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, EdgeLLMError)
    return JSONResponse({"code": error.code}, error.status)


async def asked(method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
    """Status and body of the answer of an app with a hot and a cold route."""
    straight = [Route("/hot", hot, methods=["POST"])]
    app = Starlette(
        routes=[*straight, Route("/cold", cold)],
        middleware=[Middleware(Straight, routes=straight, on_error=on_error)],
        exception_handlers={EdgeLLMError: on_error},
    )
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b"", "scheme": "http"}
    await app(scope, receive, send)
    text = b"".join(message.get("body", b"") for message in sent[1:]).decode()
    return sent[0]["status"], json.loads(text) if text.startswith("{") else text


@pytest.mark.anyio
async def test_a_hot_route_answers_and_its_errors_are_answered() -> None:
    assert await asked("POST", "/hot", b"good") == (200, "hot")
    assert await asked("POST", "/hot", b"bad") == (400, {"code": InvalidRequest("").code})


@pytest.mark.anyio
async def test_other_methods_and_other_paths_are_the_apps() -> None:
    assert (await asked("GET", "/hot"))[0] == 405
    assert (await asked("POST", "/nowhere"))[0] == 404
    assert await asked("GET", "/cold") == (400, {"code": InvalidRequest("").code})
