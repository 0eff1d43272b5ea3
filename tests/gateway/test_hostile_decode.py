"""A decode worker that lies or fails in its own words: the answer comes from an honest one, or the blame is right.

The liar is an app of the workers' protocol whose events are written by the test.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from edge_llm.engine.simulated import SimulatedVocabulary
from edge_llm.worker.bodies import proven_reply_of
from edge_llm.worker.client import Peer
from edge_llm.worker.messages import (
    HEARTBEAT_S,
    CancelReply,
    CancelRequest,
    DecodeReply,
    DecodeRequest,
    ErrorReply,
    EventBatch,
    Failed,
    Prompted,
    Token,
    TokenizeReply,
    TokenizeRequest,
    WorkerStatus,
    decode,
    encode,
)
from edge_llm.worker.tickets import ticket_of
from tests.gateway.conftest import COMPLETIONS, Service, asking, serving
from tests.loopback import CHUNK, KEYS, listening, prompt_of, running_cluster, undisturbed, until
from tests.nodes import node_of, report_of

pytestmark = pytest.mark.anyio
PROMPT: Final = prompt_of(CHUNK + 3)
WHOLE: Final = undisturbed(PROMPT, 8)
VOCABULARY: Final = SimulatedVocabulary()
REPORT: Final = report_of(prefill_worker="liar", computed_tokens=len(PROMPT) - 1)
Saying = Callable[[DecodeRequest], list[EventBatch | bytes]]


@dataclass
class Liar:
    """Says what the test wrote to whoever asks it to decode; while `is_stuck` it answers nobody, and while `is_mute` it
    tokenizes nothing."""

    saying: Saying = field(default=lambda _request: [])
    refusal: tuple[int, ErrorReply] | None = None
    is_stuck: bool = False
    is_mute: bool = False
    tokenizing: int = 0
    requests: list[DecodeRequest] = field(default_factory=list)
    cancelled: list[CancelRequest] = field(default_factory=list)
    listeners: int = 0
    lines: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)

    @property
    def status(self) -> WorkerStatus:
        # named so that it is taken before an honest worker that is as idle
        return node_of("a-liar", "decode", model="simulated", slots=1).status

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/status")
        async def status(request: Request) -> Response:
            return proven_reply_of(self.status, KEYS, ticket_of(request.headers.get("authorization")))

        @app.post("/tokenize")
        async def tokenize(request: Request) -> Response:
            text = decode(TokenizeRequest, await request.body()).text or ""
            self.tokenizing += 1
            await until(lambda: not self.is_mute)
            ids = VOCABULARY.tokenize(text, add_special=True, parse_special=True)
            return Response(encode(TokenizeReply(ids=ids, stop_ids=[])))

        @app.post("/decode")
        async def decode_route(request: Request) -> Response:
            message = decode(DecodeRequest, await request.body())
            self.requests.append(message)
            await until(lambda: not self.is_stuck)
            if self.refusal is not None:
                return Response(encode(self.refusal[1]), self.refusal[0])
            for said in self.saying(message):
                self.lines.put_nowait(said if isinstance(said, bytes) else encode(said) + b"\n")
            return Response(encode(DecodeReply()), 202)

        @app.post("/cancel")
        async def cancel(request: Request) -> Response:
            self.cancelled.append(decode(CancelRequest, await request.body()))
            return Response(encode(CancelReply(found=True)))

        @app.get("/events")
        async def events() -> Response:
            return StreamingResponse(self._events(), media_type="application/x-ndjson")

        return app

    async def _events(self) -> AsyncIterator[bytes]:
        self.listeners += 1
        try:
            yield encode(EventBatch()) + b"\n"
            while line := await self._next_line():
                yield line
        finally:
            self.listeners -= 1

    async def _next_line(self) -> bytes:
        """A heartbeat when there is nothing to say."""
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                return await self.lines.get()
        except TimeoutError:
            return encode(EventBatch()) + b"\n"


@asynccontextmanager
async def lying(service: Service, **liar: Any) -> AsyncIterator[Liar]:
    made = Liar(**liar)
    async with listening(made.app()) as (address, _):
        await service.add(Peer("a-liar", address))
        try:
            yield made
        finally:
            made.lines.put_nowait(b"")


def prompted(request: DecodeRequest) -> EventBatch:
    return EventBatch(prompted=[Prompted(request_id=request.request_id, epoch=request.epoch, report=REPORT)])


def tokens(request: DecodeRequest, *indexes: int, epoch: int | None = None) -> EventBatch:
    """Tokens of the true answer, whatever index the test gives them."""
    return EventBatch(
        tokens=[
            Token(
                request_id=request.request_id,
                epoch=request.epoch if epoch is None else epoch,
                index=index,
                token_id=WHOLE[index],
                text=VOCABULARY.piece(WHOLE[index]).decode(),
                finish_reason="length" if index == len(WHOLE) - 1 else None,
            )
            for index in indexes
        ]
    )


def failed(request: DecodeRequest, **said: Any) -> EventBatch:
    about: Any = {"request_id": request.request_id, "epoch": request.epoch, "message": "it is", "status": 503, **said}
    return EventBatch(failed=[Failed(**about)])


def broken(request: DecodeRequest) -> EventBatch:
    return failed(request, code="engine_failed", is_retryable=True)


LIES: Final[dict[str, Saying]] = {
    "a token before the prompt's report": lambda r: [tokens(r, 0)],
    "a gap": lambda r: [prompted(r), tokens(r, 0, 1), tokens(r, 3)],
    "a repetition": lambda r: [prompted(r), tokens(r, 0, 1), tokens(r, 1)],
    "an early end": lambda r: [prompted(r), tokens(r, 0), tokens(r, 7)],
    "no JSON": lambda r: [prompted(r), tokens(r, 0), b"{]\n"],
    "an unknown field": lambda r: [prompted(r), tokens(r, 0), b'{"gossip": 1}\n'],
    "the end of its events": lambda r: [prompted(r), tokens(r, 0), b""],
    "a failure of its engine": lambda r: [prompted(r), tokens(r, 0), broken(r)],
}


@pytest.mark.parametrize("lie", LIES)
async def test_after_whatever_a_worker_says_wrong_an_honest_one_goes_on_without_gap(service: Service, lie: str) -> None:
    async with lying(service, saying=LIES[lie]) as liar:
        await service.start("decode", "honest")
        streamed = await service.stream(COMPLETIONS, asking(PROMPT))
        assert len(liar.requests) == 1
        assert streamed.own["token_ids"] == WHOLE
        assert streamed.text.encode() == b"".join(map(VOCABULARY.piece, WHOLE))
        assert (streamed.own["decode_node"], streamed.own["replanned"]) == ("honest", 1)
        assert streamed.is_done
        if "JSON" not in lie and "field" not in lie and "events" not in lie:
            await until(lambda: bool(liar.cancelled))
            assert [cancel.request_id for cancel in liar.cancelled] == [liar.requests[0].request_id]
    assert service.gateway.dispatcher.requests == {}


async def test_events_of_other_requests_and_epochs_are_not_this_ones(service: Service) -> None:
    def saying(request: DecodeRequest) -> list[EventBatch | bytes]:
        stranger = DecodeRequest(
            request_id="nobody",
            epoch=0,
            gateway="gateway",
            prompt_ids=[1],
            max_tokens=1,
            sampling=request.sampling,
        )
        return [
            prompted(stranger),
            tokens(stranger, 0, 1),
            broken(stranger),
            tokens(request, 0, epoch=5),
            prompted(request),
            prompted(request),
            tokens(request, 0, 1),
            tokens(request, 0, 1, epoch=5),
            tokens(request, *range(2, 8)),
            tokens(request, 7),
        ]

    async with lying(service, saying=saying):
        own = (await service.post(COMPLETIONS, asking(PROMPT))).own
    assert (own["token_ids"], own["replanned"], own["decode_node"]) == (WHOLE, 0, "a-liar")


@pytest.mark.parametrize(
    ("said", "status", "code", "kind"),
    [
        (("context_length_exceeded", 400), 400, "context_length_exceeded", "invalid_request_error"),
        (("invalid_request", 400), 400, "invalid_request", "invalid_request_error"),
        (("protocol_error", 500), 503, "worker_failed", "unavailable_error"),
        (("internal_error", 500), 503, "worker_failed", "unavailable_error"),
    ],
)
async def test_a_failure_that_no_other_worker_mends_is_told_with_the_right_blame(
    service: Service, said: tuple[str, int], status: int, code: str, kind: str
) -> None:
    def saying(request: DecodeRequest) -> list[EventBatch | bytes]:
        return [failed(request, code=said[0], status=said[1], is_retryable=False)]

    async with lying(service, saying=saying) as liar:
        reply = await service.post(COMPLETIONS, asking(PROMPT))
        assert (reply.status, reply.error["code"], reply.error["type"]) == (status, code, kind)
        streamed = await service.stream(COMPLETIONS, asking(PROMPT))
        assert streamed.chunks[-1]["error"]["code"] == code
        assert not streamed.is_done
        assert len(liar.requests) == 2, "what nobody can mend was tried again"


async def test_a_worker_that_is_full_after_all_is_not_a_broken_one(service: Service) -> None:
    async with lying(service, saying=lambda r: [prompted(r), tokens(r, *range(8))]) as liar:
        liar.refusal = (503, ErrorReply(code="overloaded", message="full", retry_after_s=0.1))
        asked = asyncio.create_task(service.post(COMPLETIONS, asking(PROMPT)))
        await until(lambda: len(liar.requests) == 2)
        liar.refusal = None
        own = (await asked).own
    assert (own["token_ids"], own["replanned"], own["decode_node"]) == (WHOLE, 0, "a-liar")
    assert [request.epoch for request in liar.requests] == list(range(len(liar.requests)))


async def test_a_worker_that_refuses_for_itself_is_left_and_one_that_blames_the_request_is_believed(
    service: Service,
) -> None:
    async with lying(service) as liar:
        await service.start("decode", "honest")
        # blame first: whoever has answered once is measured, and then predicted to be faster than the liar
        liar.refusal = (400, ErrorReply(code="invalid_request", message="bad", param="prompt"))
        reply = await service.post(COMPLETIONS, asking(PROMPT))
        assert (reply.status, reply.error["param"]) == (400, "prompt")
        liar.refusal = (401, ErrorReply(code="unauthorized", message="who are you"))
        own = (await service.post(COMPLETIONS, asking(PROMPT))).own
        assert (own["decode_node"], own["replanned"]) == ("honest", 1)


async def test_a_worker_that_is_named_no_more_is_heard_until_its_last_request_is_over_and_then_hung_up_on(
    service: Service,
) -> None:
    async with lying(service, saying=lambda r: [prompted(r), tokens(r, 0)]) as liar:
        async with service.streaming(COMPLETIONS, asking(PROMPT)) as streamed:
            await until(lambda: service.requests("decoding") == 1)
            service.discovery.written = ()
            await until(lambda: not service.gateway.dispatcher.view.nodes)
            liar.lines.put_nowait(encode(tokens(liar.requests[0], *range(1, 8))) + b"\n")
            await streamed.whole()
        assert (streamed.own["token_ids"], streamed.own["replanned"]) == (WHOLE, 0)
        await until(lambda: liar.listeners == 0)


async def test_an_idle_worker_that_is_named_no_more_is_hung_up_on_and_heard_when_it_is_named_again(
    service: Service,
) -> None:
    async with lying(service, saying=lambda r: [prompted(r), tokens(r, *range(8))]) as liar:
        await until(lambda: liar.listeners == 1)
        written, service.discovery.written = service.discovery.written, ()
        await until(lambda: liar.listeners == 0)
        service.discovery.written = written
        await until(lambda: liar.listeners == 1)
        assert (await service.post(COMPLETIONS, asking(PROMPT))).own["token_ids"] == WHOLE


async def test_a_cancellation_never_overtakes_the_request_that_it_cancels(service: Service) -> None:
    async with lying(service, is_stuck=True) as liar:
        async with service.streaming(COMPLETIONS, asking(PROMPT)):
            await until(lambda: len(liar.requests) == 1)
        await until(lambda: not service.gateway.dispatcher.requests)
        assert (await service.get("/healthz")).status == 200
        assert liar.cancelled == []
        liar.is_stuck = False
        await until(lambda: len(liar.cancelled) == 1)
        assert liar.cancelled[0].request_id == liar.requests[0].request_id


async def test_a_prompt_that_nobody_tokenizes_takes_no_longer_than_the_request_has(service: Service) -> None:
    async with lying(service, is_mute=True) as liar:
        reply = await service.post(COMPLETIONS, asking(PROMPT), {"x-request-timeout-s": "0.2"})
        assert liar.tokenizing == 1
        liar.is_mute = False
    assert (reply.status, reply.error["code"]) == (504, "deadline_exceeded")


async def test_a_client_that_leaves_before_its_prompt_is_tokenized_leaves_its_place(service: Service) -> None:
    async with lying(service, is_mute=True) as liar:
        asked = asyncio.create_task(service.post(COMPLETIONS, asking(PROMPT)))
        await until(lambda: liar.tokenizing == 1)
        assert len(service.gateway.dispatcher._queue) == 1
        asked.cancel()
        await until(lambda: len(service.gateway.dispatcher._queue) == 0)
        liar.is_mute = False


async def test_a_request_that_broke_enough_workers_is_given_up() -> None:
    async with (
        running_cluster() as cluster,
        serving(cluster, replan_limit=0) as service,
        lying(service, saying=lambda r: [prompted(r), tokens(r, 0), broken(r)]) as liar,
    ):
        await service.start("decode", "honest")
        reply = await service.post(COMPLETIONS, asking(PROMPT))
        assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (503, "engine_failed", "1")
        await until(lambda: bool(liar.cancelled))


async def test_a_request_that_is_always_refused_for_want_of_room_waits_only_so_long() -> None:
    refusal = (503, ErrorReply(code="overloaded", message="full", retry_after_s=0.1))
    async with (
        running_cluster() as cluster,
        serving(cluster, queue_wait_s=0.15) as service,
        lying(service, refusal=refusal) as liar,
    ):
        reply = await service.post(COMPLETIONS, asking(PROMPT))
        assert (reply.status, reply.error["code"]) == (503, "overloaded")
        assert len(liar.requests) > 1
