"""What strangers may send, byte by byte and in which time, and what every answer carries. Real sockets."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from edge_llm.gateway.edge import SECURITY
from tests.gateway.conftest import CHAT, COMPLETIONS, HELLO, Service, asking, serving
from tests.loopback import DEADLINE_S, prompt_of, running_cluster

pytestmark = pytest.mark.anyio
HEAD_BYTES: Final = 4096
READ_S: Final = 0.4
TRACE: Final = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[Service]:
    bounds: dict[str, Any] = {
        "max_head_bytes": HEAD_BYTES,
        "max_body_bytes": 64 << 10,
        "queue_bytes": 128 << 10,
        "read_s": READ_S,
    }
    async with (
        running_cluster() as cluster,
        serving(cluster, **bounds) as made,
    ):
        await made.start("mixed", "m1")
        yield made


class Wire:
    """A connection that sends what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def rest(self) -> bytes:
        """Everything until the server closes."""
        async with asyncio.timeout(DEADLINE_S):
            return await self._reader.read()

    async def head(self) -> bytes:
        async with asyncio.timeout(DEADLINE_S):
            return await self._reader.readuntil(b"\r\n\r\n")


@asynccontextmanager
async def wire(service: Service) -> AsyncIterator[Wire]:
    host, port = service.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()


def post_head(length: int, *more: str, path: str = CHAT) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", f"content-length: {length}"]
    return "\r\n".join([*lines, *more, "", ""]).encode()


def refused_on_the_wire(answer: bytes, status: int, code: str) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), answer[:200]
    assert json.loads(body)["error"]["code"] == code
    for name, value in SECURITY.items():
        assert f"{name}: {value}".encode() in head


# -- heads


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * HEAD_BYTES + b"\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * HEAD_BYTES,
        b"GET /" + b"a" * HEAD_BYTES + b" HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nx: " + b"a" * (4 * HEAD_BYTES),  # never ends
    ],
    ids=["one header", "many", "path", "endless"],
)
async def test_a_head_that_is_too_large_is_refused_and_the_connection_closed(
    service: Service, request_head: bytes
) -> None:
    async with wire(service) as connection:
        await connection.send(request_head)
        refused_on_the_wire(await connection.rest(), 431, "headers_too_large")


@pytest.mark.parametrize("begun", [b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nhost: loc"])
async def test_a_head_that_does_not_come_is_not_waited_for(service: Service, begun: bytes) -> None:
    async with wire(service) as connection:
        await connection.send(begun)
        refused_on_the_wire(await connection.rest(), 408, "request_timeout")


async def test_a_connection_that_says_nothing_is_closed(service: Service) -> None:
    async with wire(service) as connection:
        assert await connection.rest() == b""


async def test_a_second_request_has_no_more_time_than_the_first(service: Service) -> None:
    async with wire(service) as connection:
        await connection.send(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert (await connection.head()).startswith(b"HTTP/1.1 200 ")
        await connection.send(b"GET /healthz HT")
        answer = await connection.rest()
        assert b"HTTP/1.1 408 " in answer


async def test_what_is_no_http_is_refused_in_the_form_of_every_error(service: Service) -> None:
    async with wire(service) as connection:
        await connection.send(b"\x16\x03\x01 hello\r\n\r\n")
        refused_on_the_wire(await connection.rest(), 400, "invalid_request")


async def test_a_long_answer_outlives_the_time_for_heads(service: Service) -> None:
    async with wire(service) as connection:
        body = json.dumps({**HELLO, "max_tokens": 200, "stream": True, "ignore_eos": True}).encode()
        await connection.send(post_head(len(body), "connection: close") + body)
        assert b"data: [DONE]" in await connection.rest()


# -- bodies


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/jsonp"},
        {"content-type": ""},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
async def test_only_json_as_it_is_is_read(service: Service, headers: dict[str, str]) -> None:
    reply = await service.post(CHAT, HELLO, headers)
    assert (reply.status, reply.error["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/ld+json"])
async def test_json_goes_by_several_names(service: Service, kind: str) -> None:
    assert (await service.post(CHAT, HELLO, {"content-type": kind})).status == 200


async def test_a_body_without_a_type_is_refused(service: Service) -> None:
    async with wire(service) as connection:
        await connection.send(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"
        )
        assert (await connection.rest()).startswith(b"HTTP/1.1 415 ")


async def test_a_body_that_does_not_come_is_not_waited_for(service: Service) -> None:
    async with wire(service) as connection:
        await connection.send(post_head(1000, "connection: close") + b'{"messages": ')
        answer = await connection.rest()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"request_timeout"' in answer


async def test_a_length_beyond_the_bound_is_refused_before_anything_is_read(service: Service) -> None:
    async with wire(service) as connection:
        await connection.send(post_head(10**12))
        assert (await connection.head()).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("head", ["content-length", "chunked"])
async def test_who_still_sends_a_body_that_was_refused_hears_why_and_may_ask_again(service: Service, head: str) -> None:
    size = 4 << 20
    body, start = b" " * size, post_head(size)
    if head == "chunked":
        start = start.replace(f"content-length: {size}".encode(), b"transfer-encoding: chunked")
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (size, body)
    async with wire(service) as connection:
        await connection.send(start + body)
        assert (await connection.head()).startswith(b"HTTP/1.1 413 ")
        await connection.send(post_head(2, "connection: close") + b"{}")
        assert b"HTTP/1.1 400 " in await connection.rest()


async def test_the_body_of_a_request_that_came_before_the_last_answer_is_no_head_and_is_heard(service: Service) -> None:
    body = json.dumps({**HELLO, "user": "u" * 5 * HEAD_BYTES}).encode()
    async with wire(service) as connection:
        first = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
        await connection.send(first + post_head(len(body), "connection: close") + body[:10])
        assert (await connection.head()).startswith(b"HTTP/1.1 200 ")
        for at in range(10, len(body), HEAD_BYTES):
            await connection.send(body[at : at + HEAD_BYTES])
            await asyncio.sleep(0.01)
        assert b"HTTP/1.1 200 " in await connection.rest()


async def test_bodies_that_are_read_at_once_are_bounded_together(service: Service) -> None:
    async with wire(service) as first, wire(service) as second, wire(service) as third:
        for connection in (first, second, third):
            await connection.send(post_head(60_000, "connection: close") + b" " * 50_000)
        answers = await asyncio.gather(first.rest(), second.rest(), third.rest())
    assert sorted(answer[9:12] for answer in answers) == [b"408", b"408", b"503"]
    assert (await service.post(CHAT, HELLO)).status == 200, "what was read is not counted for ever"


# -- answers


async def test_every_answer_carries_the_security_headers_and_no_leave_for_other_origins(service: Service) -> None:
    origin = {"origin": "https://evil.example"}
    for method, path, body in (
        ("GET", "/healthz", None),
        ("GET", "/v1/models", None),
        ("GET", "/nothing", None),
        ("DELETE", CHAT, None),
        ("OPTIONS", CHAT, None),
        ("POST", CHAT, {**HELLO, "max_tokens": 1}),
        ("POST", CHAT, {**HELLO, "max_tokens": 1, "stream": True}),
        ("POST", CHAT, {}),
    ):
        async with service.client.request(method, path, json=body, headers=origin) as reply:
            assert {name: reply.headers[name] for name in SECURITY} == SECURITY, (method, path)
            assert not [name for name in reply.headers if name.lower().startswith("access-control-")]
            assert re.fullmatch(r"[0-9a-f]{16}", reply.headers["x-request-id"])


async def test_pages_of_an_origin_that_was_named_may_ask_and_others_may_not() -> None:
    async with running_cluster() as cluster, serving(cluster, cors_origins=["http://localhost:3000"]) as service:
        await service.start("decode", "d1")
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
        for origin, is_let in (("http://localhost:3000", True), ("https://evil.example", False)):
            async with service.client.options(CHAT, headers={"origin": origin, **asks}) as reply:
                assert (reply.status == 200) is is_let
            async with service.client.post(CHAT, json={**HELLO, "max_tokens": 1}, headers={"origin": origin}) as reply:
                assert (reply.headers.get("access-control-allow-origin") == origin) is is_let


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "10.0.0.1", "", "localhost.evil.example"])
async def test_without_keys_only_loopback_names_are_answered(service: Service, host: str) -> None:
    """A page of another site may make its own name point to this machine, and then may read what we answer."""
    async with service.client.get("/v1/models", headers={"host": host}) as reply:
        assert (reply.status, (await reply.json())["error"]["code"]) == (403, "forbidden")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "[::1]:8080", "127.9.9.9"])
async def test_loopback_has_many_names(service: Service, host: str) -> None:
    async with service.client.get("/v1/models", headers={"host": host}) as reply:
        assert reply.status == 200


# -- traces


async def test_a_trace_is_given_back_and_reaches_the_workers(service: Service) -> None:
    async with wire(service) as connection:
        body = json.dumps(asking(prompt_of(12), max_tokens=2)).encode()
        await connection.send(
            post_head(len(body), f"traceparent: {TRACE}", "connection: close", path=COMPLETIONS) + body
        )
        answer = await connection.rest()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert f"traceparent: {TRACE}".encode() in answer
    seen = {path: headers.get("traceparent") for path, headers in service.cluster.heard}
    assert seen["/tokenize"] == seen["/decode"] == TRACE


async def test_a_trace_follows_a_prompt_to_who_reads_it_and_stands_in_every_log_line() -> None:
    async with running_cluster() as cluster, serving(cluster) as split:
        for role, name in (("prefill", "p1"), ("decode", "d1")):
            await split.start(role, name)  # type: ignore[arg-type]
        with capture_logs(processors=[merge_contextvars]) as logs:
            reply = await split.post(COMPLETIONS, asking(prompt_of(12), "split"), {"traceparent": TRACE})
            assert reply.own["mode"] == "split"
            await split.post(COMPLETIONS, asking(prompt_of(12)))
    reading = [headers.get("traceparent") for path, headers in cluster.heard if path == "/prefill"]
    assert reading[0] == TRACE
    assert reading[1:] in ([], [None]), "the next request has another trace"
    told = {entry["event"] for entry in logs if entry.get("traceparent") == TRACE}
    assert {"planned", "accepted", "finished", "request over"} <= told


@pytest.mark.parametrize(
    "trace",
    [
        "00-" + "0" * 32 + "-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        TRACE.upper(),
        TRACE + "-more",
        "x" * 55,
    ],
)
async def test_a_trace_that_is_not_well_formed_goes_nowhere(service: Service, trace: str) -> None:
    service.cluster.heard.clear()
    async with service.client.post(CHAT, json={**HELLO, "max_tokens": 1}, headers={"traceparent": trace}) as reply:
        assert reply.status == 200
        assert "traceparent" not in reply.headers
    assert service.cluster.heard
    assert not [headers for _, headers in service.cluster.heard if "traceparent" in headers]
