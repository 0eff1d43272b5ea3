"""Text to token ids on a worker: short texts at once, long ones elsewhere, a bounded number of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import pytest

from edge_llm.engine.simulated import SimulatedVocabulary
from edge_llm.errors import ContextTooLong, InvalidRequest, Overloaded
from edge_llm.request import NO_OPTIONS, TemplateOption
from edge_llm.worker.messages import MAX_TOKENS_IN_MESSAGE, ChatMessage, TokenizeRequest
from edge_llm.worker.tokenizing import INLINE_BYTES, MAX_TOKENIZING, Tokenizer

pytestmark = pytest.mark.anyio
SHORT, LONG = "a" * INLINE_BYTES, "a" * (INLINE_BYTES + 1)


class Watched(SimulatedVocabulary):
    """Remembers on which threads it was used, and waits before it tokenizes while it is held."""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.free = threading.Event()
        self.free.set()

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        self.threads.append(threading.current_thread().name)
        self.free.wait(30.0)
        return super().tokenize(text, add_special=add_special, parse_special=parse_special)


class Broken(SimulatedVocabulary):
    """A model whose chat template refuses everything."""

    def render_chat(
        self, messages: Sequence[dict[str, str]], options: Mapping[str, TemplateOption] = NO_OPTIONS
    ) -> str:
        raise InvalidRequest("this model's chat template refuses these messages", param="messages")


@asynccontextmanager
async def tokenizer(vocabulary: SimulatedVocabulary) -> AsyncIterator[Tokenizer]:
    made = Tokenizer(vocabulary, "w1", lambda: 512)
    await made.warm()
    try:
        yield made
    finally:
        await made.close()


@pytest.mark.parametrize("text", [SHORT, LONG, "\u4e16" * INLINE_BYTES])
async def test_where_it_is_done_changes_no_token(text: str) -> None:
    vocabulary = SimulatedVocabulary()
    async with tokenizer(vocabulary) as made:
        reply = await made.tokenize(TokenizeRequest(text=text))
    assert reply.ids == vocabulary.tokenize(text, add_special=True, parse_special=True)
    assert reply.stop_ids == sorted(vocabulary.stop_ids)


@pytest.mark.parametrize(
    ("request_", "is_here"),
    [
        (TokenizeRequest(text=SHORT), True),
        (TokenizeRequest(text=LONG), False),
        (TokenizeRequest(text="\u4e16" * (INLINE_BYTES // 2)), False),
        (TokenizeRequest(messages=[ChatMessage(role="user", content="hello")]), True),
        (TokenizeRequest(messages=[ChatMessage(role="user", content="")] * INLINE_BYTES), False),
    ],
)
async def test_what_is_short_is_done_at_once_and_what_is_long_in_its_own_thread(
    request_: TokenizeRequest, is_here: bool
) -> None:
    vocabulary = Watched()
    async with tokenizer(vocabulary) as made:
        await made.tokenize(request_)
    assert (vocabulary.threads[-1] == threading.current_thread().name) == is_here


async def test_long_texts_wait_up_to_a_number_and_short_ones_pass_them() -> None:
    vocabulary = Watched()
    async with tokenizer(vocabulary) as made:
        vocabulary.free.clear()
        waiting = [asyncio.create_task(made.tokenize(TokenizeRequest(text=LONG))) for _ in range(MAX_TOKENIZING)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match=f"{MAX_TOKENIZING} texts wait to be tokenized on worker w1"):
            await made.tokenize(TokenizeRequest(text=LONG))
        vocabulary.free.set()
        assert {len(reply.ids) for reply in await asyncio.gather(*waiting)} == {len(LONG) + 1}
        await made.tokenize(TokenizeRequest(text=LONG))


async def test_a_template_that_fails_stops_no_worker_from_starting() -> None:
    async with tokenizer(Broken()) as made:
        assert (await made.tokenize(TokenizeRequest(text="hello"))).ids


async def test_what_no_context_could_hold_is_refused_with_both_numbers() -> None:
    async with tokenizer(SimulatedVocabulary()) as made:
        with pytest.raises(ContextTooLong, match="512"):
            await made.tokenize(TokenizeRequest(text="a" * (MAX_TOKENS_IN_MESSAGE + 1)))


async def test_a_request_has_either_messages_or_a_text() -> None:
    async with tokenizer(SimulatedVocabulary()) as made:
        for wrong in (TokenizeRequest(), TokenizeRequest(text="x", messages=[ChatMessage(role="user", content="x")])):
            with pytest.raises(InvalidRequest):
                await made.tokenize(wrong)


async def test_what_the_template_is_told_beside_the_messages_reaches_it() -> None:
    told: list[object] = []

    class Asked(SimulatedVocabulary):
        def render_chat(
            self, messages: Sequence[dict[str, str]], options: Mapping[str, TemplateOption] = NO_OPTIONS
        ) -> str:
            told.append(dict(options))
            return super().render_chat(messages, options)

    async with tokenizer(Asked()) as made:
        messages = [ChatMessage(role="user", content="x")]
        await made.tokenize(TokenizeRequest(messages=messages, template_options={"enable_thinking": False}))
    assert told[-1] == {"enable_thinking": False}
