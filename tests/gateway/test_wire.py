"""What a connection may be made to hold or to do by who sends bytes in an odd order. Real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest

from tests.gateway.conftest import CHAT, HELLO, Service, serving
from tests.gateway.test_edge import Wire, post_head, wire
from tests.loopback import running_cluster

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


async def test_chat_still_works_here(service: Service) -> None:
    assert (await service.post(CHAT, HELLO)).status == 200
