"""The load generator whose requests leave at their times: what it makes of answers, refusals and silence."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from edge_llm.bench.open_loop import Answer, Call, OpenLoop, completion, poisson

pytestmark = pytest.mark.anyio
BODY = {"prompt": "x", "max_tokens": 2}
LAST = '{"choices":[{"text":""}],"timings":{"predicted_n":2,"edge_llm":{"queue_ms":12.5}}}'
WHOLE = (
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
    b": accepted\n\n",
    b'data: {"choices":[{"text":"a"}]}\n\n',
    b'data: {"choices":[{"text":"b"}]}\n\n',
    f"data: {LAST}\n\ndata: [DONE]\n\n".encode(),
)


def refusal(code: str = "overloaded") -> bytes:
    body = json.dumps({"error": {"message": "full", "code": code}}).encode()
    head = f"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 3\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


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
        if not hangs_up:
            await reader.read()
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    listening.close()


async def ask(parts: Sequence[bytes], *, hangs_up: bool = False) -> Answer:
    async with server(parts, hangs_up=hangs_up) as url:
        (answer,) = await OpenLoop(url).offer([Call(0.0, BODY)])
    return answer


async def test_a_whole_answer_has_its_tokens_its_times_and_the_servers_own_word_of_the_wait() -> None:
    answer = await ask(WHOLE)
    assert answer.is_whole
    assert not answer.is_refused
    assert answer.queue_s == 0.0125
    assert answer.ttft_s is not None
    assert answer.tpot_s is not None
    assert 0 < answer.ttft_s <= answer.took_s


async def test_wherever_the_network_cuts_the_answer_is_the_same() -> None:
    data = b"".join(WHOLE)
    for cut in range(1, len(data), 7):
        answer = await ask([data[:cut], data[cut:]])
        assert (answer.is_whole, answer.tokens, answer.queue_s) == (True, 2, 0.0125), cut


async def test_a_refusal_has_code_and_retry_after_and_is_over_when_its_body_is_there() -> None:
    data = refusal()
    for cut in range(1, len(data), 11):
        answer = await ask([data[:cut], data[cut:]])
        assert (answer.is_refused, answer.status, answer.code) == (True, 503, "overloaded"), cut
        assert answer.retry_after_s == 3.0
        assert answer.ttft_s is None


async def test_an_error_in_the_stream_is_neither_whole_nor_a_refusal() -> None:
    error = b'data: {"error":{"message":"gone","code":"worker_lost"}}\n\n'
    answer = await ask([*WHOLE[:3], error], hangs_up=True)
    assert (answer.is_whole, answer.is_refused) == (False, False)
    assert (answer.status, answer.code) == (200, "worker_lost")


async def test_an_answer_that_breaks_off_is_not_whole() -> None:
    answer = await ask(WHOLE[:3], hangs_up=True)
    assert (answer.status, answer.is_whole, answer.tokens) == (200, False, 0)


async def test_who_is_not_there_is_no_refusal() -> None:
    async with server([]) as url:
        pass
    (answer,) = await OpenLoop(url).offer([Call(0.0, BODY)])
    assert (answer.status, answer.is_whole, answer.is_refused) == (0, False, False)


async def test_requests_leave_at_their_times_though_nobody_has_answered_yet() -> None:
    async with server(WHOLE, hold_s=0.5) as url:
        began_s = time.monotonic()
        answers = await OpenLoop(url).offer([Call(0.02 * number, BODY) for number in range(10)])
    asked_s = [answer.asked_s - began_s for answer in answers]
    assert max(asked_s) < 0.5, "the last one left before the first one was answered"
    assert all(asked >= answer.call.due_s for asked, answer in zip(asked_s, answers, strict=True))


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
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        answers = await OpenLoop(url).saturate(lambda _number: BODY, clients=3, seconds=0.3)
    assert most == 3
    assert len(answers) > 3
    assert all(answer.is_whole for answer in answers)


def test_poisson_arrivals_come_at_their_rate_and_again_for_the_same_seed() -> None:
    times_s = list(poisson(50.0, 10.0, 110.0, random.Random(3)))
    assert times_s == list(poisson(50.0, 10.0, 110.0, random.Random(3)))
    assert times_s == sorted(times_s)
    assert 10.0 <= times_s[0] < times_s[-1] < 110.0
    assert 4700 < len(times_s) < 5300


@pytest.mark.parametrize("tokens", [2, 8, 300])
def test_a_simulated_prompt_has_as_many_tokens_as_asked_for(tokens: int) -> None:
    body = completion(tokens, 5, number=3)
    assert 1 + len(body["prompt"].encode()) == tokens
    assert completion(tokens, 5, number=4)["prompt"] != body["prompt"]
