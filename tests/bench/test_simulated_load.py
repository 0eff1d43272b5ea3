"""Load on simulated clusters: requests leave at their times, and answers, refusals and silence are told apart."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from edge_llm.bench.serve.answers import Answer, Call
from edge_llm.bench.serve.arrivals import poisson
from edge_llm.bench.simulated_load import complaint, line_of, offer, queue_s, saturate, simulated_call, took_s

pytestmark = pytest.mark.anyio
LAST = '{"choices":[{"text":""}],"timings":{"predicted_n":2,"edge_llm":{"queue_ms":12.5}}}'
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
WHOLE = (
    HEAD,
    b": accepted\n\n",
    b'data: {"choices":[{"text":"a"}]}\n\n',
    b'data: {"choices":[{"text":"b"}]}\n\n',
    f"data: {LAST}\n\ndata: [DONE]\n\n".encode(),
)


def call(at_s: float = 0.0) -> Call:
    return simulated_call(at_s, 8, 2, number=1)


def refusal(code: str = "overloaded") -> bytes:
    body = json.dumps({"error": {"message": "full " * 100, "code": code}}).encode()
    head = f"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 3\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


@asynccontextmanager
async def listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """A server; whatever it still does at the end is ended."""
    tasks: list[asyncio.Task[None]] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            writer.transport.abort()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.create_task(connected(reader, writer)))

    started = await asyncio.start_server(begin, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{started.sockets[0].getsockname()[1]}"
    started.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def server(parts: Sequence[bytes], hold_s: float = 0.0, *, hangs_up: bool = False) -> AsyncIterator[str]:
    """Sends `parts`, one write each, to whoever asks, and keeps the connection open unless it `hangs_up`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        await asyncio.sleep(hold_s)
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        if hangs_up:
            writer.close()
            await writer.wait_closed()
        else:
            await reader.read()

    async with listening(serve) as url:
        yield url


async def ask(parts: Sequence[bytes], *, hangs_up: bool = False) -> Answer:
    async with server(parts, hangs_up=hangs_up) as url:
        (answer,) = await offer(url, [call()])
    return answer


async def test_a_whole_answer_has_its_tokens_its_times_and_the_servers_own_word_of_the_wait() -> None:
    answer = await ask(WHOLE)
    assert answer.is_complete
    assert not answer.is_refused
    assert queue_s(answer) == 0.0125
    assert answer.ttft_s is not None
    assert answer.tpot_s is not None
    assert 0 < answer.ttft_s <= took_s(answer)
    line = line_of(answer)
    assert (line["is_complete"], line["answer_tokens"], line["error"], line["code"]) == (True, 2, "", "")
    assert line["sent_s"] <= line["first_s"] <= line["last_s"] <= line["ended_s"]


async def test_wherever_the_network_cuts_the_answer_is_the_same() -> None:
    data = b"".join(WHOLE)
    for cut in range(1, len(data), 7):
        answer = await ask([data[:cut], data[cut:]])
        assert (answer.is_complete, answer.tokens, queue_s(answer)) == (True, 2, 0.0125), cut


async def test_a_refusal_has_code_and_retry_after_and_is_over_when_its_body_is_there() -> None:
    data = refusal()
    for cut in range(1, len(data), 61):
        answer = await ask([data[:cut], data[cut:]])
        assert (answer.is_refused, answer.status, answer.code) == (True, 503, "overloaded"), cut
        assert answer.retry_after_s == 3.0
        assert answer.ttft_s is None
    assert "full" in complaint(answer)
    assert len(complaint(answer)) <= 300


@pytest.mark.parametrize("body", [b"full", b'{"error": "full"}', b'{"error": {"code": null}}'])
async def test_a_status_without_a_code_is_no_refusal_that_a_program_can_read(body: bytes) -> None:
    head = f"HTTP/1.1 503 Service Unavailable\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    answer = await ask([head + body])
    assert (answer.status, answer.code, answer.is_refused) == (503, "", False)


async def test_an_error_in_the_stream_is_neither_whole_nor_a_refusal() -> None:
    error = b'data: {"error":{"message":"gone","code":"worker_lost"}}\n\n'
    answer = await ask([*WHOLE[:3], error], hangs_up=True)
    assert (answer.is_complete, answer.is_refused) == (False, False)
    assert (answer.status, answer.code) == (200, "worker_lost")


async def test_an_answer_that_breaks_off_is_not_whole() -> None:
    answer = await ask(WHOLE[:3], hangs_up=True)
    assert (answer.status, answer.is_complete) == (200, False)
    assert line_of(answer)["error"]


async def test_an_answer_that_ends_too_soon_says_how_far_it_came() -> None:
    async with server(WHOLE) as url:
        (answer,) = await offer(url, [simulated_call(0.0, 8, 5, number=1)])
    assert not answer.is_complete
    assert complaint(answer) == "it ended after 2 of 5 tokens"


async def test_who_is_not_there_is_no_refusal() -> None:
    async with server([]) as url:
        pass
    (answer,) = await offer(url, [call()])
    assert (answer.status, answer.is_complete, answer.is_refused) == (None, False, False)
    assert line_of(answer)["status"] == 0


async def test_requests_leave_at_their_times_though_nobody_has_answered_yet() -> None:
    async with server(WHOLE, hold_s=0.5) as url:
        answers = await offer(url, [call(0.02 * number) for number in range(10)])
    sent_s = [answer.sent_s for answer in answers if answer.sent_s is not None]
    first_s = [answer.first_s for answer in answers if answer.first_s is not None]
    assert len(sent_s) == len(first_s) == 10
    assert max(sent_s) < min(first_s), "the last one left before the first one was answered"
    assert all(answer.late_s >= 0 for answer in answers)


async def test_time_begins_when_it_is_told_to() -> None:
    async with server(WHOLE) as url:
        (answer,) = await offer(url, [call(0.25)], began_s=time.monotonic() - 0.2)
    assert answer.sent_s is not None
    assert answer.sent_s >= 0.25
    assert answer.is_complete


async def test_a_request_that_is_stopped_is_not_told_of_as_one_that_failed() -> None:
    heard: list[Answer] = []
    async with server(WHOLE, hold_s=60.0) as url:
        offering = asyncio.create_task(offer(url, [call()], heard.append))
        await asyncio.sleep(0.1)
        offering.cancel()
        await asyncio.gather(offering, return_exceptions=True)
    assert heard == []


async def test_each_answer_is_heard_of_when_it_is_over() -> None:
    heard: list[Answer] = []
    async with server(WHOLE) as url:
        answers = await offer(url, [call(), call(0.01)], heard.append)
    assert sorted(answer.at_s for answer in heard) == [answer.at_s for answer in answers]


async def test_a_closed_loop_has_never_more_requests_under_way_than_clients() -> None:
    under_way, most = 0, 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await reader.read(65536)
        await asyncio.sleep(0.01)
        under_way -= 1
        writer.write(b"".join(WHOLE))
        await reader.read()

    async with listening(serve) as url:
        answers = await saturate(url, (call() for _ in itertools.count()), clients=3, seconds=0.3)
    assert most == 3
    assert len(answers) > 3
    assert all(answer.is_complete for answer in answers)


def test_poisson_arrivals_come_at_their_rate_and_again_for_the_same_seed() -> None:
    times_s = list(poisson(50.0, 10.0, 110.0, random.Random(3)))
    assert times_s == list(poisson(50.0, 10.0, 110.0, random.Random(3)))
    assert times_s == sorted(times_s)
    assert 10.0 <= times_s[0] < times_s[-1] < 110.0
    assert 4700 < len(times_s) < 5300


@pytest.mark.parametrize("tokens", [2, 8, 300])
def test_a_simulated_prompt_has_as_many_tokens_as_asked_for(tokens: int) -> None:
    made = simulated_call(0.0, tokens, 5, number=3)
    assert made.prompt_tokens == 1 + len(made.body["prompt"].encode()) == tokens
    assert simulated_call(0.0, tokens, 5, number=4).body["prompt"] != made.body["prompt"]
