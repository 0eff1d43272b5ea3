"""An open loop sends on time, keeps what a client sees, counts what goes wrong, and says when it was late itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from edge_llm.bench.goodput import Limits
from edge_llm.bench.least_busy import LeastBusy
from edge_llm.bench.replay import CUT, Answer, Call, lateness, replay, sending, served_per_s

Handler = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


class Server:
    """Answers with `handler`; remembers bodies, and how many requests were open at once."""

    def __init__(self, handler: Handler) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.open = self.most_open = 0
        self._handler = handler

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            return await self._handler(request, body)
        finally:
            self.open -= 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post("/v1/completions", self.answer)
        app.router.add_post("/v1/chat/completions", self.answer)
        async with TestServer(app) as server:
            yield str(server.make_url(""))


async def events(request: web.Request, *parts: dict[str, Any] | str) -> web.StreamResponse:
    reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await reply.prepare(request)
    for part in parts:
        data = part if isinstance(part, str) else f"data: {json.dumps(part)}\n\n"
        await reply.write(data.encode())
    return reply


def text(word: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": word}], "usage": None}


LAST = {"choices": [], "usage": {"completion_tokens": 3}, "timings": {"predicted_n": 3, "edge_llm": {"mode": "split"}}}
DONE = "data: [DONE]\n\n"


async def three_tokens(request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
    return await events(request, ": accepted\n\n", text(""), text("a"), text("bc"), LAST, DONE)


async def replayed(
    handler: Handler, calls: list[Call], cut_after_s: float = 5.0, path: str = "/v1/completions"
) -> list[Answer]:
    async with Server(handler).running() as url, sending() as session:
        return await replay(calls, session, LeastBusy([url]), cut_after_s, path=path)


@pytest.mark.anyio
async def test_an_answer_has_its_times_its_tokens_and_what_our_gateway_says() -> None:
    (answer,) = await replayed(three_tokens, [Call(0.0, {"prompt": [1, 2]}, tokens=3)])
    assert (answer.error, answer.is_complete) == ("", True)
    assert (answer.pieces, answer.tokens) == (2, 3), "text came twice, for three tokens"
    assert answer.own == {"mode": "split"}
    assert answer.sent_s is not None
    assert answer.first_s is not None
    assert answer.last_s is not None
    assert answer.sent_s <= answer.first_s <= answer.last_s
    assert answer.timing.meets(Limits(60.0, 60.0))


def test_time_per_token_is_what_lies_between_the_first_and_the_last_over_one_less_than_the_tokens() -> None:
    answer = Answer(1.0, 5, "u", sent_s=1.5, first_s=2.0, last_s=4.0, ended_s=4.1, pieces=3, counted_tokens=5)
    assert answer.ttft_s == 0.5
    assert answer.tpot_s == 0.5
    assert answer.e2e_s == 2.5
    assert answer.late_s == 0.5
    assert Answer(0.0, 1, sent_s=0.0, first_s=1.0, last_s=1.0, pieces=1).tpot_s is None
    assert Answer(0.0, 9, sent_s=0.0, first_s=1.0, last_s=2.0, pieces=3).tpot_s == 0.5, "nobody counted: by events"


@pytest.mark.anyio
async def test_a_chat_of_somebody_elses_server_is_read_too() -> None:
    async def chat(request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        role, word = {"delta": {"role": "assistant", "content": ""}}, {"delta": {"content": "hi"}}
        return await events(request, {"choices": [role]}, {"choices": [word]}, {"choices": [word]}, DONE)

    (answer,) = await replayed(chat, [Call(0.0, {}, 2)], path="/v1/chat/completions")
    assert (answer.error, answer.tokens, answer.own) == ("", 2, {})


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ((text("a"), {"error": {"message": "no worker left", "code": "x"}}), "no worker left"),
        ((text("a"),), "without [DONE]"),
        (("data: {not json\n\n",), "malformed"),
        (('data: {"choices": 3}\n\n',), "Expected"),
        (("data: [1]\n\n",), "Expected"),
    ],
)
async def test_an_answer_that_breaks_off_is_counted_with_its_reason(parts: tuple[Any, ...], complaint: str) -> None:
    (answer,) = await replayed(lambda request, _body: events(request, *parts), [Call(0.0, {}, 3)])
    assert not answer.is_complete
    assert complaint in answer.error
    assert not answer.timing.meets(Limits(60.0, 60.0))


@pytest.mark.anyio
async def test_an_answer_that_stops_before_it_has_all_tokens_keeps_no_limit_and_is_not_served() -> None:
    (answer,) = await replayed(three_tokens, [Call(0.0, {}, tokens=4)])
    assert answer.error == ""
    assert answer.is_cut_short
    assert not answer.is_complete
    assert not answer.timing.meets(Limits(60.0, 60.0))
    assert served_per_s([answer]) == 0.0


@pytest.mark.anyio
async def test_a_refusal_a_hang_up_and_nobody_there_are_answers_as_well() -> None:
    async def by_turns(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body["prompt"] == "refuse":
            return web.json_response({"error": {"message": "all slots are taken"}}, status=503)
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    calls = [Call(0.0, {"prompt": what}, 3) for what in ("refuse", "abort")]
    refused, aborted = await replayed(by_turns, calls)
    assert "HTTP 503" in refused.error
    assert "all slots are taken" in refused.error
    assert aborted.error
    async with sending() as session:
        (nobody,) = await replay(calls[:1], session, LeastBusy(["http://127.0.0.1:9"]), 5.0)
    assert nobody.error
    assert nobody.ttft_s is None
    assert served_per_s([refused, aborted, nobody]) == 0.0


@pytest.mark.anyio
async def test_requests_do_not_wait_for_earlier_ones_and_what_hangs_is_cut_off() -> None:
    async def hang(request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        reply = await events(request, text("a"))
        await asyncio.sleep(60)
        return reply

    server = Server(hang)
    async with server.running() as url, sending() as session:
        answers = await replay([Call(0.0, {}, 3)] * 5, session, LeastBusy([url]), cut_after_s=0.5)
        assert server.most_open == 5
    assert [answer.error for answer in answers] == [CUT] * 5
    assert all(answer.ttft_s is not None and not answer.is_complete for answer in answers)


@pytest.mark.anyio
async def test_calls_are_sent_in_their_order_and_heard_of() -> None:
    server, heard = Server(three_tokens), list[int]()
    async with server.running() as url, sending() as session:
        calls = [Call(0.01 * number, {"prompt": str(number)}, 3) for number in range(4)]
        answers = await replay(calls, session, LeastBusy([url]), 5.0, heard.append)
    assert heard == [1, 2, 3, 4]
    assert [body["prompt"] for body in server.bodies] == ["0", "1", "2", "3"]
    assert all(answer.late_s >= 0.0 for answer in answers)
    assert answers[-1].sent_s is not None
    assert answers[-1].sent_s >= 0.03
    assert 0 < served_per_s(answers) < 4 / 0.03


@pytest.mark.anyio
async def test_a_replay_that_is_interrupted_leaves_no_request_behind() -> None:
    async def hang(request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        reply = await events(request, text("a"))
        await asyncio.sleep(60)
        return reply

    async with Server(hang).running() as url, sending() as session:
        task = asyncio.create_task(replay([Call(0.0, {}, 3)] * 2, session, LeastBusy([url]), 60.0))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not [other for other in asyncio.all_tasks() if other.get_name().startswith("request ")]


def test_a_late_generator_shows() -> None:
    late = lateness([Answer(float(at), 1, sent_s=at + (0.5 if at == 99 else 0.001)) for at in range(100)])
    assert late.p50_s == pytest.approx(0.001)
    assert late.max_s == pytest.approx(0.5)
    assert late.p50_s < late.p99_s < late.max_s


def test_the_least_busy_server_is_asked_and_of_equals_the_one_that_was_asked_longest_ago() -> None:
    servers = LeastBusy(["a", "b", "c"])
    for turn in (["a", "b", "c"], ["a", "b", "c"]):
        assert [_ask_at_once(servers) for _ in turn] == turn
    with servers.chosen() as first, servers.chosen() as second, servers.chosen() as third:
        assert {first, second, third} == {"a", "b", "c"}
    with servers.chosen() as first:
        with servers.chosen() as second:
            pass
        assert second != first
        with servers.chosen() as third, servers.chosen() as fourth:
            assert first not in (third, fourth), "it has one open"
    with pytest.raises(ValueError, match="no server"):
        LeastBusy([])


def _ask_at_once(servers: LeastBusy) -> str:
    with servers.chosen() as url:
        return url


def test_a_request_that_fails_makes_its_server_free_again() -> None:
    servers = LeastBusy(["a", "b"])
    with pytest.raises(OSError), servers.chosen():
        raise OSError
    with servers.chosen() as one, servers.chosen() as other:
        assert {one, other} == {"a", "b"}
