"""Text <-> token ids and the chat template of a real model.

Owns tokenizing, pieces and template rendering. Templates are untrusted model data: llama-cpp-python's sandboxed
formatter runs them, output is bounded. Refuses to know sequences and HTTP. Any thread may call it: llama.cpp's
vocabulary is read only once it is loaded, a rendering keeps its state to itself, and what is cached is the same whoever
finds it first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final

from edge_llm.engine.native import NativeModel, library
from edge_llm.errors import InvalidRequest
from edge_llm.request import NO_OPTIONS, TemplateOption

MAX_RENDERED_CHARS: Final = 16 << 20
# What else a template can bring about with messages that it did not expect.
_OF_TEMPLATES: Final = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError)


class LlamaVocabulary:
    """`engine.Vocabulary` over a loaded model (best: a vocabulary-only copy)."""

    def __init__(self, model: NativeModel) -> None:
        self._lib = library()
        self._model = model
        self._pieces: dict[int, bytes] = {}

    @property
    def size(self) -> int:
        return self._model.n_vocab

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        is_end = self._lib.llama_vocab_is_eog
        return frozenset(i for i in range(self.size) if is_end(self._model.vocab, i))

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode("utf-8", errors="replace")
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._lib.llama_tokenize(self._model.vocab, data, len(data), ids, room, add_special, parse_special)
        if count < 0:
            raise InvalidRequest("the text cannot be tokenized", param="prompt")
        return list(ids[:count])

    def render_chat(
        self, messages: Sequence[dict[str, str]], options: Mapping[str, TemplateOption] = NO_OPTIONS
    ) -> str:
        import jinja2

        try:
            text = str(self._formatter(messages=[self._known(message) for message in messages], **options).prompt)
        except (jinja2.TemplateError, *_OF_TEMPLATES) as error:
            raise InvalidRequest(
                f"this model's chat template refuses these messages: {error}", param="messages"
            ) from error
        if len(text) > MAX_RENDERED_CHARS:
            raise InvalidRequest(
                "this model's chat template makes too long a prompt of these messages", param="messages"
            )
        return text

    def _known(self, message: dict[str, str]) -> dict[str, str]:
        """What the newer of OpenAI's models call developer is the system to all others; a template that does not know
        the name would leave the message out."""
        if message["role"] != "developer" or "developer" in self._template:
            return message
        return {**message, "role": "system"}

    def piece(self, token_id: int) -> bytes:
        known = self._pieces.get(token_id)
        if known is None:
            known = self._pieces[token_id] = self._read_piece(token_id)
        return known

    def _read_piece(self, token_id: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        size = self._lib.llama_token_to_piece(self._model.vocab, token_id, buffer, len(buffer), 0, False)
        if size < 0:
            buffer = ctypes.create_string_buffer(-size)
            size = self._lib.llama_token_to_piece(self._model.vocab, token_id, buffer, len(buffer), 0, False)
        return buffer.raw[: max(size, 0)]

    @cached_property
    def _template(self) -> str:
        return self._model.metadata("tokenizer.chat_template") or ""

    @cached_property
    def _formatter(self) -> Any:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        if not self._template:
            raise InvalidRequest("this model has no chat template: use /v1/completions", param="messages")
        return Jinja2ChatFormatter(self._template, eos_token=self._text_of("eos"), bos_token=self._text_of("bos"))

    def _text_of(self, which: str) -> str:
        token = getattr(self._lib, f"llama_vocab_{which}")(self._model.vocab)
        text = self._lib.llama_vocab_get_text(self._model.vocab, token) if token >= 0 else None
        return text.decode(errors="replace") if text else ""
