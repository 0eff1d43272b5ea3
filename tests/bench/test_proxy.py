"""The fault proxy against a plain server: what it passes, what it breaks, and what it says it saw."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from edge_llm.bench.proxy import FaultProxy, Rule

pytestmark = pytest.mark.anyio
REPLY = bytes(range(256)) * 40
REQUEST = b'POST /prefill HTTP/1.1\r\n\r\n{"protocol":1,"request_id":"r1.ab","ids":[]}'


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers each request with the same bytes until its caller ends."""
    with suppress(ConnectionError):
        while await reader.read(4096):
            writer.write(REPLY)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def fronted(*rules: Rule) -> AsyncIterator[tuple[FaultProxy, int]]:
    """A proxy before one server; gives the port of the front."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with FaultProxy(seed=1) as proxy:
        proxy.rules.extend(rules)
        address = proxy.front("p1", server.sockets[0].getsockname()[1])
        yield proxy, int(address.rpartition(":")[2])
    server.close()


async def ask(port: int, request: bytes = REQUEST) -> bytes:
    """What comes back before the connection ends or is silent; b"reset" at the end when it was reset."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    got = b""
    try:
        async with asyncio.timeout(0.5):
            while len(got) < len(REPLY) and (data := await reader.read(4096)):
                got += data
    except ConnectionResetError:
        got += b"reset"
    except TimeoutError:
        got += b"silence"
    writer.close()
    return got


async def test_without_rules_bytes_pass_unchanged_and_the_request_is_named() -> None:
    async with fronted() as (proxy, port):
        assert await ask(port) == REPLY
        (exchange,) = proxy.of("r1", "prefill")
    assert (exchange.worker, exchange.request_id, exchange.reply_bytes) == ("p1", "r1.ab", len(REPLY))


async def test_a_reset_comes_after_exactly_so_many_bytes_and_once() -> None:
    rule = Rule("reset", route="prefill", request="r1", after_bytes=1000)
    async with fronted(rule) as (_, port):
        # what the receiver has not read when a reset comes, it may never see
        first = await ask(port)
        second = await ask(port)
    assert first.endswith(b"reset")
    assert len(first) <= 1000 + len(b"reset")
    assert second == REPLY
    assert rule.touched == ["r1.ab"]


async def test_a_close_comes_in_good_order_after_exactly_so_many_bytes() -> None:
    async with fronted(Rule("close", after_bytes=1000)) as (_, port):
        assert await ask(port) == REPLY[:1000]


async def test_a_flip_changes_one_bit() -> None:
    async with fronted(Rule("flip", after_bytes=777)) as (_, port):
        got = await ask(port)
    differing = [at for at, (a, b) in enumerate(zip(got, REPLY, strict=True)) if a != b]
    assert differing == [777]
    assert (got[777] ^ REPLY[777]).bit_count() == 1


async def test_a_hole_swallows_in_one_direction_until_it_is_lifted_and_then_resets() -> None:
    rule = Rule("swallow", after_bytes=500)
    async with fronted(rule) as (proxy, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST)
        assert await reader.readexactly(500) == REPLY[:500]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await reader.read(1)
        proxy.lift(rule)
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        writer.close()
        assert await ask(port) == REPLY


async def test_a_rule_for_one_request_leaves_others_alone() -> None:
    async with fronted(Rule("close", request="r1")) as (_, port):
        assert await ask(port, REQUEST.replace(b"r1.ab", b"r2.ab")) == REPLY
        assert await ask(port) == b""


async def test_a_bandwidth_cut_delays_and_loses_nothing() -> None:
    rule = Rule("slow", bytes_per_s=200_000)
    async with fronted(rule) as (_, port):
        assert await ask(port) == REPLY
    assert rule.touched_bytes == len(REPLY)


async def test_a_diverted_route_reaches_the_other_port_and_comes_back() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        writer.write(b"stranger")
        writer.close()

    other = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with fronted() as (proxy, port):
        proxy.divert("prefill", {"p1": other.sockets[0].getsockname()[1]})
        assert await ask(port) == b"stranger"
        assert await ask(port, b"GET /status HTTP/1.1\r\n\r\n") == REPLY
        proxy.divert("prefill", {})
        assert await ask(port) == REPLY
    other.close()


async def test_a_front_without_a_worker_behind_it_resets() -> None:
    async with FaultProxy(seed=1) as proxy:
        port = int(proxy.front("gone", 1).rpartition(":")[2])
        assert await ask(port) == b"reset"
