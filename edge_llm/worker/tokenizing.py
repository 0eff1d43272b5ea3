"""Text to token ids, for gateways: they have no model.

Owns where that is done: a short text on the event loop, where it takes less time than a change of threads, a long one
in a thread of its own, a bounded number of them at a time. Refuses to know tickets and HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import structlog

from edge_llm.engine.engine import Vocabulary
from edge_llm.errors import ContextTooLong, InvalidRequest, Overloaded
from edge_llm.worker.messages import MAX_TOKENS_IN_MESSAGE, TokenizeReply, TokenizeRequest

MAX_TOKENIZING: Final = 64
# About 500 tokens of English: half a millisecond on x86-64, where two changes of threads take one and a half when cold.
INLINE_BYTES: Final = 2048
# What a chat template writes around a message, about.
_MESSAGE_BYTES: Final = 64


log = structlog.get_logger()


class Tokenizer:
    """One worker's vocabulary behind a bound. `n_ctx` is for the error that says what would fit."""

    def __init__(self, vocabulary: Vocabulary, worker: str, n_ctx: Callable[[], int]) -> None:
        self._vocabulary, self._worker, self._n_ctx = vocabulary, worker, n_ctx
        self._thread = ThreadPoolExecutor(1, "tokenize")
        self._waiting = 0

    async def warm(self) -> None:
        """What is slow once (stop ids, the chat template's compilation), before the first request asks for it."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._try)

    def _try(self) -> None:
        try:
            self._vocabulary.render_chat([{"role": "user", "content": "hello"}])
        except InvalidRequest as error:  # texts are completed without a template, a chat will be told
            log.warning("no chat with this model", error=error.message)
        self._reply(self._vocabulary.tokenize("hello", add_special=True, parse_special=True))

    async def close(self) -> None:
        """Drop what waits, and wait for what is being done."""
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    async def tokenize(self, request: TokenizeRequest) -> TokenizeReply:
        """Raises InvalidRequest, ContextTooLong, Overloaded."""
        if (request.messages is None) == (request.text is None):
            raise InvalidRequest("send either messages or text", param="messages")
        if _bytes(request) <= INLINE_BYTES:
            return self._tokenize(request)
        if self._waiting >= MAX_TOKENIZING:
            raise Overloaded(f"{MAX_TOKENIZING} texts wait to be tokenized on worker {self._worker}")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._tokenize, request)
        finally:
            self._waiting -= 1

    def _tokenize(self, request: TokenizeRequest) -> TokenizeReply:
        vocabulary = self._vocabulary
        if request.messages is not None:
            if not request.messages:
                raise InvalidRequest("messages is empty: send at least one message", param="messages")
            messages = [{"role": m.role, "content": m.content} for m in request.messages]
            text = vocabulary.render_chat(messages, request.template_options)
            # the template writes the special tokens itself
            return self._reply(vocabulary.tokenize(text, add_special=False, parse_special=True))
        return self._reply(vocabulary.tokenize(request.text or "", add_special=True, parse_special=True))

    def _reply(self, ids: list[int]) -> TokenizeReply:
        if len(ids) > MAX_TOKENS_IN_MESSAGE:
            raise ContextTooLong(
                f"the prompt has {len(ids)} tokens, this worker's context {self._n_ctx()}", param="messages"
            )
        return TokenizeReply(ids=ids, stop_ids=sorted(self._vocabulary.stop_ids))


def _bytes(request: TokenizeRequest) -> int:
    """How much text it is (UTF-8); each message weighs what a template may add to it."""
    if request.messages is None:
        return len((request.text or "").encode("utf-8", "replace"))
    return sum(_MESSAGE_BYTES + len(m.content.encode("utf-8", "replace")) for m in request.messages)
