from __future__ import annotations

import asyncio
from socket import IPPROTO_TCP, TCP_NODELAY

import pytest

from edge_llm.errors import ConfigError
from edge_llm.serving import bind


def test_small_writes_to_a_caller_leave_at_once() -> None:
    """Tokens are small writes: with Nagle's algorithm each would wait for the receiver's delayed ACK."""

    async def nodelay_of_an_accepted_connection() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def accepted(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(IPPROTO_TCP, TCP_NODELAY))
            writer.close()

        bound = bind("127.0.0.1", 0)
        async with await asyncio.start_server(accepted, sock=bound):
            _, writer = await asyncio.open_connection(*bound.getsockname()[:2])
            async with asyncio.timeout(5):
                result = await found
            writer.close()
            await writer.wait_closed()
            return result

    assert asyncio.run(nodelay_of_an_accepted_connection()) != 0


def test_a_taken_port_is_said_with_what_to_do() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match="--port"):
            bind("127.0.0.1", taken.getsockname()[1])
