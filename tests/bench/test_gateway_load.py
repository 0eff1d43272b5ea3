"""The client that holds a thousand streams, and `edge-llm bench gateway` in small."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from edge_llm.bench.gateway_load import BARS, Plan, missed
from edge_llm.bench.load_client import LoadClient

ANSWER = b"".join(
    (
        b"HTTP/1.1 200 OK\r\n\r\n: accepted\n\n",
        b'data: {"choices":[{"index":0,"finish_reason":null,"text":"a"}]}\n\n',
        b'data: {"choices":[{"index":0,"finish_reason":null,"text":"b"}]}\n\n',
        b'data: {"choices":[{"index":0,"finish_reason":"length","text":""}],"timings":{"predicted_n":2}}\n\n',
        b"data: [DONE]\n\n",
    )
)


@asynccontextmanager
async def server(parts: list[bytes]) -> AsyncIterator[LoadClient]:
    """Answers every request with `parts`, one write each, and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = LoadClient("127.0.0.1", listening.sockets[0].getsockname()[1])
    yield client
    client.hang_up()
    listening.close()


@pytest.mark.anyio
async def test_pieces_with_text_are_counted_and_the_last_event_says_how_many_tokens_there_were() -> None:
    async with server([ANSWER]) as client:
        await client.start([{"prompt": "x"}] * 3, per_s=1000)
        assert await client.until(lambda stream: stream.ended_s > 0, within_s=5)
    assert [stream.pieces for stream in client.streams] == [2, 2, 2]
    assert [stream.tokens for stream in client.streams] == [2, 2, 2]
    assert all(stream.sent_s <= stream.first_s <= stream.ended_s for stream in client.streams)


@pytest.mark.anyio
async def test_a_stream_that_breaks_off_has_no_tokens_and_shows_what_came() -> None:
    refusal = b'HTTP/1.1 503 Service Unavailable\r\n\r\n{"error":{"message":"all slots are taken"}}'
    async with server([refusal]) as client:
        await client.start([{"prompt": "x"}], per_s=1000)
        assert await client.until(lambda stream: stream.ended_s > 0, within_s=5)
    (stream,) = client.streams
    assert (stream.pieces, stream.tokens) == (0, 0)
    assert "all slots are taken" in stream.complaint


def test_a_missed_bar_is_named_and_so_is_a_figure_that_is_not_there() -> None:
    good = dict.fromkeys(BARS, 0.0)
    assert missed(good) == []
    assert missed(good | {"rss_mb": 151.0}) == ["rss_mb is 151, not at most 150"]
    assert missed({name: 0.0 for name in BARS if name != "failed"}) == ["failed was not measured"]


def test_workers_have_room_for_all_streams_and_answers_outlast_the_window() -> None:
    plan = Plan(1000, tokens_per_s=8.0, window_s=30.0, gateway_core=1, load_core=0)
    assert plan.workers * 62 >= 1000
    assert plan.answer_tokens / plan.tokens_per_s > 30.0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="the gateway needs a core of its own")
@pytest.mark.timeout(150)
def test_the_command_measures_a_small_load_without_a_failure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edge_llm", "bench", "gateway", "--streams", "20", "--quick", "--json"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=140, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert BARS.keys() <= found.keys()
    assert found["failed"] == 0
    assert found["tokens_per_s"] > 20 * 4
