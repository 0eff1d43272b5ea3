"""What stands between strangers and the routes: who they are, how they may send, and headers on every answer
but those to a browser's question for leave.

Owns the credentials of every route (all need a key but the health checks), reading bodies within bounds, request and
trace ids, and security headers. Refuses to know JSON fields, limits of keys and the cluster; bytes before a request is
whole are wire.py's business. Browsers of other origins get no leave (but of `cors_origins`, app.py), and only JSON is
read, which they may not send without asking for it.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable
from ipaddress import ip_address
from typing import Final

import structlog
from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_llm.errors import (
    BodyTooSlow,
    EdgeLLMError,
    Forbidden,
    InvalidRequest,
    NotJSON,
    Overloaded,
    PayloadTooLarge,
    Unauthorized,
)
from edge_llm.gateway.intake import Caller
from edge_llm.gateway.keys import ANYBODY, ApiKey, Credentials
from edge_llm.gateway.shape import error_body, error_headers
from edge_llm.trace import HEADER, believed

PUBLIC: Final = frozenset({"/health", "/healthz", "/readyz"})
METRICS: Final = "/metrics"
SECURITY: Final[dict[str, str]] = {
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}
# what is printed and has no space: load balancers write `Root=1-67891233-abcdef`, others UUIDs or base64
_REQUEST_ID: Final = re.compile(r"[!-~]{1,128}")
_JSON: Final = re.compile(r"application/(json|[a-z0-9.-]+\+json)(\s*;.*)?", re.IGNORECASE)
# What proxies add, by default or as their manuals say: one on this machine speaks for others.
_FORWARDED: Final = frozenset({"forwarded", "via", "x-real-ip", "x-client-ip", "x-original-forwarded-for"})
_FORWARDED_PREFIX: Final = "x-forwarded-"
log = structlog.get_logger()


class Edge:
    """ASGI middleware around the whole app. `on_refusal` hears the code of what it refuses; once `is_leaving`, every
    answer is the last one of its connection, so that its client comes back to another gateway."""

    def __init__(
        self,
        app: ASGIApp,
        credentials: Credentials,
        on_refusal: Callable[[str], None],
        is_leaving: Callable[[], bool] = lambda: False,
        *,
        has_open_metrics: bool = False,
    ) -> None:
        self._app, self._credentials, self._on_refusal = app, credentials, on_refusal
        self._is_leaving, self._has_open_metrics = is_leaving, has_open_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        trace = believed(headers.get(HEADER, ""))

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                for name, value in ({"x-request-id": request_id} | SECURITY).items():
                    answer[name] = value
                if trace:
                    answer[HEADER] = trace
                if self._is_leaving():
                    answer["connection"] = "close"
            await send(message)

        try:
            key = self._identify(scope, headers)
        except EdgeLLMError as error:
            self._on_refusal(error.code)
            log.info("refused", request_id=request_id, code=error.code, client=_client(scope))
            more = {"www-authenticate": "Bearer"} if isinstance(error, Unauthorized) else {}
            answer = JSONResponse(error_body(error), error.status, error_headers(error) | more)
            await answer(scope, receive, send_with_headers)
            return
        scope.setdefault("state", {})["caller"] = Caller(key, request_id, trace)
        await self._app(scope, receive, send_with_headers)

    def _identify(self, scope: Scope, headers: Headers) -> ApiKey:
        """Who asks. Raises Unauthorized or Forbidden."""
        if self._credentials.is_open and not is_loopback(_host_of(headers.get("host", ""))):
            # a page of another site whose name was made to point here (DNS rebinding) sends that name
            raise Forbidden(
                "without API keys this endpoint answers on loopback names only, such as localhost; for others make "
                "a key with `edge-llm serve api-key` and start the gateway with --api-keys-file"
            )
        path = scope["path"]
        if path in PUBLIC:
            return ANYBODY
        if path == METRICS and (self._has_open_metrics or _is_of_this_machine(scope, headers)):
            return ANYBODY
        return self._credentials.identify(_credential(headers), time.time())


class Bodies:
    """Reads bodies: JSON only, each within `limit` bytes and `within_s`, all together within `held_bytes`."""

    def __init__(self, limit: int, held_bytes: int, within_s: float) -> None:
        self._limit, self._held_bytes, self._within_s = limit, held_bytes, within_s
        self._reading = 0

    async def read(self, request: Request) -> bytes:
        """The whole body. Raises what is wrong with it as soon as that shows."""
        self._check(request.headers)
        data = bytearray()
        try:
            async with asyncio.timeout(self._within_s):
                async for part in request.stream():
                    data += part
                    self._reading += len(part)
                    if len(data) > self._limit:
                        raise self._too_large()
                    if self._reading > self._held_bytes:
                        raise Overloaded("too many bodies are being read", retry_after_s=1.0)
        except TimeoutError as late:
            raise BodyTooSlow(f"the body did not come within {self._within_s:.0f} s") from late
        except ClientDisconnect as error:
            raise InvalidRequest("the client hung up before its request was whole") from error
        finally:
            self._reading -= len(data)
        return bytes(data)

    def _check(self, headers: Headers) -> None:
        if not _JSON.fullmatch(headers.get("content-type", "").strip()):
            raise NotJSON("send the body as JSON, with the header content-type: application/json")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise NotJSON("send the body as it is: no content-encoding is read")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._limit:
            raise self._too_large()

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body is larger than {self._limit} bytes")


def caller_of(request: Request) -> Caller:
    """Who sent a request that has passed the edge."""
    caller: Caller = request.state.caller
    return caller


def _credential(headers: Headers) -> str:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()


def _client(scope: Scope) -> str:
    client = scope.get("client")
    return client[0] if client else ""


def _host_of(header: str) -> str:
    """The name in a Host header, without the port."""
    return header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine and no other."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _is_of_this_machine(scope: Scope, headers: Headers) -> bool:
    """Whether nobody but this machine asks. A proxy on it speaks for others; one that says so in no header cannot be
    told from its own programs, and must keep the path to itself (README)."""
    names = {name.lower() for name in headers}
    is_forwarded = names & _FORWARDED or any(name.startswith(_FORWARDED_PREFIX) for name in names)
    return is_loopback(_client(scope)) and not is_forwarded
