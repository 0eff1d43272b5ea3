"""Open and closed loops send on time, keep what a client sees, count what goes wrong, and say when they were late."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from edge_llm.bench.goodput import Limits
from edge_llm.bench.least_busy import LeastBusy
from edge_llm.bench.serve.answers import CUT, Answer, Call, ask
from edge_llm.bench.serve.driver import circulate, lateness, replay, sending, served_per_s
from edge_llm.bench.serve.metrics import figures

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


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ((text("a"), {"error": {"message": "no worker left"}}), "error_in_stream"),
        ((text("a"),), "no_end"),
        (("data: {not json\n\n",), "garbage"),
        (("data: \xff\xfe\n\n",), "garbage"),
        (("data: " + "x" * (3 << 20),), "garbage"),
        ((DONE,), "empty"),
    ],
)
async def test_failures_have_kinds(parts: tuple[Any, ...], kind: str) -> None:
    (answer,) = await replayed(lambda request, _body: events(request, *parts), [Call(0.0, {}, 3)])
    assert answer.kind == kind, answer.error
    assert not answer.is_complete


@pytest.mark.anyio
async def test_a_status_is_a_kind_and_its_retry_after_is_kept() -> None:
    async def refuse(_request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.Response(status=body["status"], text="no", headers={"Retry-After": "7"})

    calls = [Call(0.0, {"status": status}, 3) for status in (429, 503, 500, 302)]
    answers = await replayed(refuse, calls)
    assert [answer.kind for answer in answers] == ["http_429", "http_503", "http_500", "http_302"]
    assert [answer.retry_after_s for answer in answers] == [7.0] * 4


@pytest.mark.anyio
async def test_a_server_that_hangs_is_counted_not_waited_for() -> None:
    async def hang(request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        reply = await events(request, text("a"))
        await asyncio.sleep(60)
        return reply

    async with Server(hang).running() as url, sending() as session:
        (answer,) = await replay([Call(0.0, {}, 3)], session, LeastBusy([url]), None, timeout_s=0.2)
    assert (answer.kind, answer.pieces) == ("timeout", 1)
    assert "0.2 s" in answer.error


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        (b"", "disconnected"),
        (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 999\r\n\r\ndata: ", "disconnected"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "garbage"),
    ],
)
async def test_a_connection_that_breaks_and_one_that_talks_something_else_are_told_apart(
    sent: bytes, kind: str
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(sent)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening, sending() as session:
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        (answer,) = await replay([Call(0.0, {}, 3)], session, LeastBusy([url]), 5.0)
    assert answer.kind == kind, answer.error
    async with sending() as session:
        (nobody,) = await replay([Call(0.0, {}, 3)], session, LeastBusy([url]), 5.0)
    assert nobody.kind == "unreachable"


@pytest.mark.anyio
async def test_an_answer_in_one_piece_has_an_end_and_no_first_token() -> None:
    async def whole(_request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        choice = {"message": {"role": "assistant", "content": "a b c"}, "finish_reason": "stop"}
        usage = {"completion_tokens": 3, "prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
        return web.json_response({"choices": [choice], "usage": usage})

    (answer,) = await replayed(whole, [Call(0.0, {}, 3)], path="/v1/chat/completions")
    assert answer.is_complete
    assert (answer.tokens, answer.prompt_tokens, answer.cached_tokens) == (3, 9, 4)
    assert (answer.counted_by, answer.finish_reason) == ("usage", "stop")
    assert answer.ttft_s is None
    assert answer.e2e_s is not None


@pytest.mark.anyio
async def test_an_answer_that_may_stop_is_complete_when_it_does() -> None:
    (answer,) = await replayed(three_tokens, [Call(0.0, {}, tokens=40, may_stop=True)])
    assert answer.is_complete
    assert not answer.is_cut_short


@pytest.mark.anyio
async def test_tokens_are_counted_by_usage_else_by_timings_else_by_events() -> None:
    usage, timings = {"usage": {"completion_tokens": 3}}, {"timings": {"predicted_n": 4}}
    for parts, counted in (((usage, timings), ("usage", 3)), ((timings,), ("timings", 4)), ((), ("events", 2))):
        whole: tuple[Any, ...] = (text("a"), text("b"), *parts, DONE)

        async def say(request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
            return await events(request, *whole)  # noqa: B023 - it answers before the next one is made

        (answer,) = await replayed(say, [Call(0.0, {}, 2)])
        assert (answer.counted_by, answer.tokens) == counted


@pytest.mark.anyio
async def test_what_a_model_thinks_aloud_is_text_too() -> None:
    parts = ({"choices": [{"delta": {name: "hm"}}]} for name in ("reasoning_content", "reasoning", "content"))
    whole: tuple[Any, ...] = (*parts, DONE)
    (answer,) = await replayed(lambda request, _body: events(request, *whole), [Call(0.0, {}, 3)])
    assert answer.pieces == 3
    assert len(answer.itl_s) == 2


@pytest.mark.anyio
async def test_a_closed_loop_keeps_so_many_requests_under_way_and_no_more() -> None:
    async def slow(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(0.01)
        return await three_tokens(request, body)

    server, ended = Server(slow), list[Answer]()
    async with server.running() as url, sending() as session:
        calls = (Call(0.0, {"prompt": number}, 3, number=number) for number in range(12))
        answers = await circulate(calls, 3, session, LeastBusy([url]), on_end=ended.append)
    assert server.most_open == 3
    assert [answer.number for answer in answers] == list(range(12))
    assert all(answer.is_complete for answer in answers)
    assert sorted(answer.number for answer in ended) == list(range(12))
    assert all(answer.late_s < 1.0 for answer in answers), "who waits for an answer is not late"


@pytest.mark.anyio
async def test_a_closed_loop_ends_when_its_time_is_over_and_lets_answers_end() -> None:
    async with Server(three_tokens).running() as url, sending() as session:
        endless = (Call(0.0, {}, 3) for _ in iter(int, 1))
        answers = await circulate(endless, 2, session, LeastBusy([url]), seconds=0.2)
    assert answers
    assert all(answer.is_complete for answer in answers)


@pytest.mark.anyio
async def test_a_closed_loop_does_not_storm_a_server_that_is_gone() -> None:
    async with sending() as session:
        endless = (Call(0.0, {}, 3) for _ in iter(int, 1))
        answers = await circulate(endless, 1, session, LeastBusy(["http://127.0.0.1:9"]), seconds=0.5)
    assert 0 < len(answers) <= 6
    assert {answer.kind for answer in answers} == {"unreachable"}


@pytest.mark.anyio
async def test_an_interrupted_loop_still_tells_of_what_was_under_way() -> None:
    async def hang(request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        reply = await events(request, text("a"))
        await asyncio.sleep(60)
        return reply

    ended = list[Answer]()
    async with Server(hang).running() as url, sending() as session:
        loop = circulate([Call(0.0, {}, 3)] * 4, 2, session, LeastBusy([url]), on_end=ended.append)
        task = asyncio.create_task(loop)
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert [answer.kind for answer in ended] == ["unfinished"] * 2


class HangsUp:
    """A server that says it keeps connections, and closes each when the next request comes on it."""

    def __init__(self, answers_each: int) -> None:
        self.answers_each = answers_each
        self.requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = (
            b"".join(f"data: {json.dumps(part)}\n\n".encode() for part in (text("a"), text("b"), LAST)) + DONE.encode()
        )
        for number in range(self.answers_each + 1):
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:  # the client is through
                break
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            self.requests += 1
            if number == self.answers_each:
                break
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            writer.write(b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n")
            await writer.drain()
        writer.close()


async def one_after_the_other(server: HangsUp, count: int) -> list[Answer]:
    async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listening, sending() as session:
        url = "http://{}:{}".format(*listening.sockets[0].getsockname()[:2])
        servers, answers = LeastBusy([url]), [Answer(0.0, 3) for _ in range(count)]
        for answer in answers:
            await ask(session, servers, "/v1/completions", Call(0.0, {}, 3), answer, time.monotonic)
        return answers


@pytest.mark.anyio
async def test_a_request_that_meets_a_connection_closed_after_an_answer_is_sent_again_on_a_new_one() -> None:
    server = HangsUp(answers_each=1)
    answers = await one_after_the_other(server, 4)
    assert [answer.error for answer in answers] == [""] * 4
    assert all(answer.is_complete for answer in answers)
    assert [answer.reconnects for answer in answers] == [0, 1, 1, 1]
    assert figures([answers], is_open=False).reconnected == 3


@pytest.mark.anyio
async def test_a_new_connection_that_is_closed_without_an_answer_is_a_failure_and_asked_once() -> None:
    server = HangsUp(answers_each=0)
    (answer,) = await one_after_the_other(server, 1)
    assert (answer.kind, answer.reconnects, server.requests) == ("disconnected", 0, 1)
