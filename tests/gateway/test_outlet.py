"""The short way of a token to its client, and the long one for clients that lag: every text once, in order."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Final

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import ASGIApp, Receive, Scope, Send

from edge_llm.engine.simulated import SimulatedSettings
from edge_llm.gateway.answer import _at_once, _Said
from edge_llm.gateway.openai import Ask
from edge_llm.gateway.running import Job, Running, Text
from edge_llm.gateway.session import Session
from edge_llm.gateway.shape import Shape
from edge_llm.gateway.wire import Outlet, bounded, outlet_of
from edge_llm.request import SamplingParams
from tests.gateway.conftest import CHAT, COMPLETIONS, HELLO, asking, serving, streaming_raw
from tests.loopback import listening, prompt_of, running_cluster

pytestmark = pytest.mark.anyio
LONG_ANSWER: Final = 3000


def running_one() -> Running:
    job = Job("r", "m", (1, 2), 8, SamplingParams(temperature=0.0), (), (), "auto")
    return Running(job, Session("r"), 0.0, 0.0)


class Hearer:
    """A stream: takes what its request has to say, is busy for some turns with each, and is asked for what goes at
    once."""

    def __init__(self, running: Running, busy_turns: int) -> None:
        self.heard: list[str] = []
        self.at_once, self.is_free = 0, True
        self._running, self._busy_turns = running, busy_turns
        running.at_once = self._take

    def _take(self, text: str) -> bool:
        if self.is_free:
            self.heard.append(text)
            self.at_once += 1
        return self.is_free

    async def hear(self) -> None:
        while True:
            update = await self._running.heard()
            assert isinstance(update, Text)
            for _ in range(self._busy_turns):
                await asyncio.sleep(0)
            self.heard.append(update.text)


@given(
    st.lists(st.sampled_from(["say", "turn", "client lags", "client keeps up"]), max_size=40),
    st.integers(0, 3),
)
def test_whatever_the_client_does_it_hears_every_text_once_and_in_order(steps: list[str], busy_turns: int) -> None:
    async def scene() -> None:
        running = running_one()
        hearer = Hearer(running, busy_turns)
        hearing = asyncio.create_task(hearer.hear())
        said = 0
        for step in steps:
            if step == "say":
                running.say(str(said))
                said += 1
            elif step == "turn":
                await asyncio.sleep(0)
            else:
                hearer.is_free = step == "client keeps up"
        for _ in range((busy_turns + 2) * (said + 1)):
            await asyncio.sleep(0)
        hearing.cancel()
        assert hearer.heard == [str(number) for number in range(said)]
        assert running.unread_bytes == 0

    asyncio.run(scene())


async def test_text_goes_at_once_only_while_its_stream_waits_with_nothing_before_it() -> None:
    running = running_one()
    hearer = Hearer(running, busy_turns=0)
    running.say("before anybody waits")
    assert hearer.at_once == 0
    hearing = asyncio.create_task(hearer.hear())
    running.say("behind it")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    running.say("to a stream that waits")
    assert hearer.at_once == 1
    assert hearer.heard == ["before anybody waits", "behind it", "to a stream that waits"]
    hearing.cancel()


def unchunked(body: bytes) -> bytes:
    """RFC 9112, 7.1."""
    parts: list[bytes] = []
    while True:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            assert body == b"\r\n", "something came after the last chunk"
            return b"".join(parts)
        assert body[length : length + 2] == b"\r\n"
        parts.append(body[:length])
        body = body[length + 2 :]


async def test_a_client_that_reads_by_fits_and_starts_hears_what_others_hear() -> None:
    settings = SimulatedSettings(n_ctx=4096, slots=2, decode_run_s=0.0002)
    async with running_cluster() as cluster, serving(cluster, stream_buffer_bytes=64 << 20, stall_s=60.0) as service:
        await service.start("mixed", "m1", settings)
        body = asking(prompt_of(6), max_tokens=LONG_ANSWER)
        whole = await service.post(COMPLETIONS, body)
        connection = streaming_raw(service, body)

        async def by_fits() -> bytes:
            received, size = b"", 1
            while part := await asyncio.to_thread(connection.recv, size):
                received += part
                size = size * 3 % 65537  # from single bytes to whole buffers, and back
                if len(received) % 7 == 0:
                    await asyncio.sleep(0.002)
            return received

        try:
            head, _, rest = (await by_fits()).partition(b"\r\n\r\n")
        finally:
            connection.close()
    assert head.startswith(b"HTTP/1.1 200")
    *events, done, end = unchunked(rest).split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole.body["choices"][0]["text"]
    assert chunks[-1]["timings"]["edge_llm"]["token_ids"] == whole.own["token_ids"]


@dataclass
class Counted:
    """An outlet that notes what it writes, or is never free."""

    real: Outlet
    parts: list[bytes]
    is_open: bool

    @property
    def is_free(self) -> bool:
        return self.is_open and self.real.is_free

    def write(self, part: bytes) -> None:
        self.parts.append(part)
        self.real.write(part)


class Counting:
    """An app behind a connection whose outlets are counted: what went through each, and whether it may."""

    def __init__(self, app: ASGIApp, is_open: bool) -> None:
        self.parts: list[list[bytes]] = []
        self._app, self._is_open = app, is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (real := outlet_of(scope)) is not None:
            self.parts.append([])
            scope["state"]["outlet"] = Counted(real, self.parts[-1], self._is_open)
        await self._app(scope, receive, send)


@pytest.mark.parametrize("is_open", [True, False], ids=["the short way", "the long way"])
async def test_answers_on_one_connection_go_token_by_token_through_their_own_outlets(is_open: bool) -> None:
    apps: list[Counting] = []

    def wrapped(app: ASGIApp) -> ASGIApp:
        apps.append(Counting(app, is_open))
        return apps[0]

    settings = SimulatedSettings(n_ctx=512, slots=2, decode_run_s=0.01)
    async with running_cluster() as cluster, serving(cluster, wrapped=wrapped) as service:
        await service.start("mixed", "m1", settings)
        answers = [await service.stream(CHAT, HELLO) for _ in range(3)]
    assert len({answer.text for answer in answers}) == 1
    assert all(answer.is_done and answer.choices[0]["delta"]["role"] == "assistant" for answer in answers)
    counts = [len(parts) for parts in apps[0].parts]
    # eight tokens, the first one with the role; of the last one the text only
    assert counts == [len(answer.chunks) - 2 if is_open else 0 for answer in answers]


async def test_an_outlet_is_free_from_the_head_of_a_streamed_answer_to_its_end() -> None:
    seen: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        outlet = outlet_of(scope)
        assert outlet is not None
        seen.append(outlet.is_free)
        length = [(b"content-length", b"4")] if scope["path"] == "/whole" else []
        await send({"type": "http.response.start", "status": 200, "headers": length})
        seen.append(outlet.is_free)
        if outlet.is_free:
            outlet.write(b"one ")
        await send({"type": "http.response.body", "body": b"two ", "more_body": bool(not length)})
        if not length:
            await send({"type": "http.response.body", "body": b"three", "more_body": False})
        seen.append(outlet.is_free)

    async with listening(app, bounded(4096, 5.0)) as (address, _), aiohttp.ClientSession(f"http://{address}") as client:
        async with client.get("/streamed") as reply:
            assert await reply.read() == b"one two three"
        async with client.get("/whole") as reply:
            assert await reply.read() == b"two "
    assert seen == [False, True, False, False, False, False]


async def test_text_that_cannot_be_written_ends_its_own_answer_only() -> None:
    class Free:
        is_free = True

        def write(self, part: bytes) -> None:
            raise AssertionError(f"{part!r} was written")

    said = _Said(Ask.__new__(Ask), Shape("r", 0, "m", is_chat=True), 0.0)
    assert not _at_once(Free(), None, said, "\ud800")  # type: ignore[arg-type]
    assert said.head(), "what failed took nothing with it"
