from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from socket import IPPROTO_TCP, TCP_NODELAY

import pytest
import structlog

from edge_llm.config import LogLevel
from edge_llm.errors import ConfigError
from edge_llm.serving import MAX_FILES, bind, configure_logging, raise_file_limit


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


def test_a_line_that_cannot_be_written_is_lost_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    nobody_reads = open(writing, "w", buffering=1)
    monkeypatch.setattr("sys.stderr", nobody_reads)
    configure_logging("info")
    try:
        structlog.get_logger().error("said into a broken pipe")
        structlog.get_logger().warning("and again")
        kept = io.StringIO()
        monkeypatch.setattr("sys.stderr", kept)
        configure_logging("info")
        structlog.get_logger().error("said to somebody")
        assert "said to somebody" in kept.getvalue()
    finally:
        monkeypatch.undo()
        configure_logging("info")
        with suppress(BrokenPipeError):
            nobody_reads.close()


def test_a_service_may_have_as_many_connections_as_it_may_ask_for() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, MAX_FILES), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_taken_port_is_said_with_what_to_do() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match="--port"):
            bind("127.0.0.1", taken.getsockname()[1])


@pytest.fixture
def _own_logging() -> Iterator[None]:
    yield
    structlog.reset_defaults()


@pytest.mark.usefixtures("_own_logging")
@pytest.mark.parametrize(
    ("level", "said"), [("debug", ["a", "b", "c"]), ("info", ["b", "c"]), ("warning", ["c"]), ("error", [])]
)
def test_lines_below_the_level_are_not_written_and_all_others_say_which_request(
    capsys: pytest.CaptureFixture[str], level: LogLevel, said: list[str]
) -> None:
    configure_logging(level)
    logging.getLogger("uvicorn.error").warning("Invalid HTTP %s received.", "request")
    theirs = json.loads(capsys.readouterr().err)
    assert (theirs["event"], theirs["logger"], theirs["level"]) == (
        "Invalid HTTP request received.",
        "uvicorn.error",
        "warning",
    )
    log = structlog.get_logger()
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        log.debug("a")
        log.info("b", tokens=3)
        log.warning("c", request_id="r2")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == said
    ids = {"a": "r1", "b": "r1", "c": "r2"}  # a line's own word beats what is bound
    assert all(line["request_id"] == ids[line["event"]] and line["level"] and line["timestamp"] for line in lines)
