"""What a connection may be made to hold or to do by who sends bytes in an odd order. Real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest
from starlette.types import Receive, Scope, Send

from edge_llm.gateway.wire import bounded
from tests.gateway.conftest import CHAT, HELLO, Service, serving
from tests.gateway.test_edge import Wire, post_head, wire
from tests.loopback import listening, running_cluster

pytestmark = pytest.mark.anyio
HEAD_BYTES: Final = 4096
ASKED: Final = json.dumps(HELLO).encode()
OFFER: Final = ("connection: Upgrade, HTTP2-Settings, close", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB")
HEALTH: Final = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[Service]:
    bounds: dict[str, Any] = {"max_head_bytes": HEAD_BYTES, "max_body_bytes": 64 << 10, "read_s": 5.0}
    async with running_cluster() as cluster, serving(cluster, **bounds) as made:
        await made.start("mixed", "m1")
        yield made


async def closed_while(connection: Wire, part: bytes, times: int) -> bool:
    """Whether the server ends the connection on a client that goes on sending."""
    try:
        for _ in range(times):
            await connection.send(part)
            await asyncio.sleep(0)
        await connection.rest()
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


# -- another protocol


@pytest.mark.parametrize("cut", [0, 5], ids=["at once", "body later"])
async def test_a_client_that_offers_another_protocol_is_answered_in_this_one(service: Service, cut: int) -> None:
    """Java's own client does so with the first request of every connection."""
    request = post_head(len(ASKED), *OFFER) + ASKED
    at = len(request) - len(ASKED) if cut else len(request)
    async with wire(service) as connection:
        await connection.send(request[:at])
        await asyncio.sleep(0.05)
        await connection.send(request[at:])
        answer = await connection.rest()
    assert answer.startswith(b"HTTP/1.1 200 "), answer[:300]
    assert answer.count(b"HTTP/1.1 ") == 1


async def test_a_body_behind_an_offer_is_no_request(service: Service) -> None:
    inner = HEALTH
    for head in (post_head(len(inner), *OFFER), post_head(len(inner), *OFFER).replace(b"Upgrade: h2c", b"upgrade:h2c")):
        async with wire(service) as connection:
            await connection.send(head + inner)
            answer = await connection.rest()
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.count(b"HTTP/1.1 ") == 1


async def test_an_offer_that_comes_in_two_parts_is_refused_and_nothing_behind_it_is_read(service: Service) -> None:
    request = post_head(len(HEALTH), *OFFER) + HEALTH
    at = request.index(b"rade: h2c")
    async with wire(service) as connection:
        await connection.send(request[:at])
        await asyncio.sleep(0.05)
        await connection.send(request[at:])
        answer = await connection.rest()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"HTTP/1.1 2" not in answer
    assert b"without CONNECT or Upgrade" in answer


async def test_words_of_a_body_stay_as_they_are(service: Service) -> None:
    prompt = "\r\nupgrade: now\r\n\r\nUpgrade: later"
    body = {"model": "simulated", "prompt": prompt, "max_tokens": 1, "edge_llm": {"return_token_ids": True}}
    said = await service.post("/v1/completions", body)
    assert said.status == 200
    assert said.body["usage"]["prompt_tokens"] == len(prompt) + 1


# -- more than is to be held


async def test_requests_that_are_sent_ahead_are_bounded(service: Service) -> None:
    async with wire(service) as connection:
        assert await closed_while(connection, HEALTH * 500, 200)


async def test_a_few_requests_that_are_sent_ahead_are_answered(service: Service) -> None:
    async with wire(service) as connection:
        await connection.send(HEALTH * 8 + HEALTH.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        assert (await connection.rest()).count(b"HTTP/1.1 200 ") == 9


@pytest.mark.parametrize("head", ["x: ", "x"], ids=["value", "name"])
async def test_a_trailer_that_never_ends_is_not_held(service: Service, head: str) -> None:
    start = post_head(0, path="/v1/nothing").replace(b"content-length: 0", b"transfer-encoding: chunked")
    async with wire(service) as connection:
        await connection.send(start + b"0\r\n" + head.encode())
        assert (await connection.head()).startswith(b"HTTP/1.1 4")
        assert await closed_while(connection, b"a" * 65536, 100)


async def test_a_head_that_never_ends_behind_a_running_answer_is_not_held(service: Service) -> None:
    body = json.dumps({**HELLO, "stream": True, "max_tokens": 400}).encode()
    async with wire(service) as connection:
        await connection.send(post_head(len(body)) + body)
        assert (await connection.head()).startswith(b"HTTP/1.1 200 ")
        await connection.send(b"GET / HTTP/1.1\r\nx: ")
        assert await closed_while(connection, b"a" * 65536, 100)


# -- ends


async def test_a_connection_whose_refused_body_came_later_is_not_kept_for_ever(service: Service) -> None:
    async with wire(service) as connection:
        await connection.send(post_head(10, path="/v1/nothing"))
        assert (await connection.head()).startswith(b"HTTP/1.1 4")
        await asyncio.sleep(0.05)
        await connection.send(b"0123456789")
        await connection.rest()  # closed while nobody says anything


@pytest.mark.parametrize("extra", [(), ("connection: close",)], ids=["keep-alive", "close"])
async def test_who_still_sends_a_refused_body_hears_why(service: Service, extra: tuple[str, ...]) -> None:
    size = 4 << 20
    async with wire(service) as connection:
        await connection.send(post_head(size, *extra))
        await asyncio.sleep(0.05)
        for _ in range(size >> 16):
            await connection.send(b" " * 65536)
        assert (await connection.head()).startswith(b"HTTP/1.1 413 ")


class Impatient(bounded(HEAD_BYTES, 5.0)):  # type: ignore[misc]
    """Connections on which nobody is answered end at once, nearly."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.timeout_keep_alive = 0.1


async def _slow(scope: Scope, receive: Receive, send: Send) -> None:
    """Refuses what has a body without reading it; else takes longer than a connection is kept."""
    if scope["method"] == "GET":
        await asyncio.sleep(0.5)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def test_an_answer_is_not_cut_by_the_time_that_a_silent_connection_is_kept() -> None:
    """The rest of a body that was refused comes in one piece with the next request."""
    async with listening(_slow, Impatient) as (address, _):
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(post_head(10) + b"01234")
        await reader.readuntil(b"ok")
        writer.write(b"56789" + HEALTH)
        assert (await asyncio.wait_for(reader.readuntil(b"ok"), 5.0)).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_a_request_behind_the_last_answer_of_its_connection_is_not_executed() -> None:
    asked: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        asked.append(scope["path"])
        await _slow(scope, receive, send)

    async with listening(app, Impatient) as (address, _):
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(post_head(10, "connection: close", path="/first") + b"01234")
        await reader.readuntil(b"ok")
        writer.write(b"56789" + post_head(0, path="/behind"))
        assert not await asyncio.wait_for(reader.read(), 5.0)
        writer.close()
    assert asked == ["/first"]


async def test_that_a_client_is_gone_is_told_to_the_request_that_is_being_answered_not_to_the_last_one_alone() -> None:
    begun, told = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "not asked how it lives"
        begun.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        told.set()

    async with listening(app, Impatient) as (address, _):
        _, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(HEALTH + HEALTH)
        await asyncio.wait_for(begun.wait(), 5.0)
        writer.transport.abort()
        await asyncio.wait_for(told.wait(), 5.0)


async def test_chat_still_works_here(service: Service) -> None:
    assert (await service.post(CHAT, HELLO)).status == 200
