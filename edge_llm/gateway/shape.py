"""The OpenAI dialect, as it is answered: whole bodies, SSE and errors.

Pure. Owns every field name of an answer and the rules clients depend on: the first chunk has the role, every chunk has
`choices` with `index`, usage only when asked for, errors after the first byte travel in the stream. Refuses to know
workers, sessions and requests (openai.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from edge_llm.errors import EdgeLLMError, Overloaded

DONE: Final = b"data: [DONE]\n\n"
# What a silent stream says: an empty line, which is no event (HTML standard, server-sent events, 9.2.6). A comment is
# none either, but clients that take streams apart by hand strip each piece they read, and then glue a comment to the
# events behind it (vLLM's bench) or read it as JSON (SGLang's).
KEEP_ALIVE: Final = b"\n"
_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}
# What OpenAI's clients send again; so they do after 500, and may: who knows what it was.
_RETRIED: Final = (408, 409, 429, 504)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
        )

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Usage:
        return cls(body["prompt_tokens"], body["completion_tokens"], body["prompt_tokens_details"]["cached_tokens"])


@dataclass(frozen=True, slots=True)
class Shape:
    """What all chunks of one answer share."""

    request_id: str
    created: int
    model: str
    is_chat: bool
    _around_text: tuple[bytes, bytes] = field(init=False, repr=False, compare=False)
    """Of a chunk of text all but the text: it is the same for every token."""

    def __post_init__(self) -> None:
        before, _, after = self._chunk({"content": ""} if self.is_chat else "", None).rpartition(b'""')
        object.__setattr__(self, "_around_text", (before, after))

    def whole(self, text: str, finish_reason: str, usage: Usage, timings: Mapping[str, Any]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        return {
            **self._head("chat.completion" if self.is_chat else "text_completion"),
            "choices": [choice],
            "usage": usage.as_json(),
            "timings": timings,
        }

    def first(self) -> bytes:
        """The chunk that names the role (chat only). It goes with the first token, as elsewhere: clients take the first
        chunk for it (vLLM's bench, and many after it)."""
        return self._chunk({"role": "assistant", "content": ""}, None) if self.is_chat else b""

    def text(self, text: str) -> bytes:
        before, after = self._around_text
        return before + orjson.dumps(text) + after

    def last(self, finish_reason: str, timings: Mapping[str, Any]) -> bytes:
        """The chunk with the finish reason and the timings."""
        return self._chunk({} if self.is_chat else "", finish_reason, timings=timings)

    def usage(self, usage: Usage, timings: Mapping[str, Any]) -> bytes:
        """The extra chunk of stream_options.include_usage: no choices."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return sse({**self._head(kind), "choices": [], "usage": usage.as_json(), "timings": timings})

    def progress(self, done: int, total: int, elapsed_ms: float) -> bytes:
        """llama.cpp's prompt_progress, in a chunk without text."""
        progress = {"total": total, "cache": 0, "processed": done, "time_ms": round(elapsed_ms)}
        return self._chunk({} if self.is_chat else "", None, prompt_progress=progress)

    def _chunk(self, delta: dict[str, str] | str, finish_reason: str | None, **more: Any) -> bytes:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
        choice |= {"delta": delta} if self.is_chat else {"text": delta}
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return sse({**self._head(kind), "choices": [choice], **more})

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {"id": f"{prefix}-{self.request_id}", "object": kind, "created": self.created, "model": self.model}


def together(bodies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Answers to several prompts as one body: choices in the prompts' order, each with its timings; tokens in all."""
    choices = [
        {**choice, "index": index, "timings": body["timings"]}
        for index, body in enumerate(bodies)
        for choice in body["choices"]
    ]
    counted = [Usage.of(body["usage"]) for body in bodies]
    head = {name: value for name, value in bodies[0].items() if name != "timings"}
    return {**head, "choices": choices, "usage": sum(counted[1:], counted[0]).as_json()}


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def error_body(error: EdgeLLMError) -> dict[str, Any]:
    """OpenAI's error object."""
    fallback = "invalid_request_error" if error.status < 500 else "server_error"
    kind = _TYPES.get(error.status, fallback)
    return {"error": {"message": error.message, "type": kind, "code": error.code, "param": error.param}}


def error_headers(error: EdgeLLMError) -> dict[str, str]:
    """Retry-After for what may work later. OpenAI's clients send again whatever failed with such a status, unless they
    are told (their `_should_retry`): a time that is over is over."""
    if not error.is_retryable:
        return {"x-should-retry": "false"} if error.status in _RETRIED else {}
    wait_s = error.retry_after_s if isinstance(error, Overloaded) else 1.0
    return {"retry-after": str(max(1, round(wait_s)))}
