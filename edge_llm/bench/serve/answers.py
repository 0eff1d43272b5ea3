"""One request to any OpenAI-style server, and all that its client sees: times of every piece, counts, how it failed.

Owns sending one body, reading server-sent events (and answers in one piece) of completions and chats, and the kinds of
failure. Refuses to know when requests are sent (driver.py), what is compared and what limits are; it shares no code
with our gateway. Errors of a server, silence, a broken connection and garbage are counted by kind; nothing is raised.

Times are seconds after the replay's start. The first token is the first event with text: no server sends a token whose
text is withheld (half a UTF-8 character). How many tokens there were is the server's own count (`usage`, else
llama.cpp's `timings`), else the number of events with text; `counted_by` says which.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Final, Literal

import aiohttp
import msgspec
from aiohttp.http_exceptions import HttpProcessingError

from edge_llm.bench.goodput import Timing
from edge_llm.bench.least_busy import LeastBusy

_DATA: Final = b"data:"
_DONE: Final = b"[DONE]"
_WHY_CHARS: Final = 300
_BODY_BYTES: Final = 16 << 20
_ERROR_BYTES: Final = 8 << 10
_REFUSALS: Final = (429, 503)
CUT: Final = "it was not over in time and hung up"
# Kinds of failure; an HTTP status other than 200 is `http_<status>`.
UNREACHABLE: Final = "unreachable"  # no connection
DISCONNECTED: Final = "disconnected"  # closed before the answer, or in its middle
NO_END: Final = "no_end"  # closed in order, but without [DONE]
STREAM_ERROR: Final = "error_in_stream"
GARBAGE: Final = "garbage"  # no HTTP, no JSON, or JSON of another shape
TIMEOUT: Final = "timeout"
UNFINISHED: Final = "unfinished"  # this side hung up: the replay was over
EMPTY: Final = "empty"  # an end, and no token before it
CountedBy = Literal["usage", "timings", "events"]


@dataclass(frozen=True, slots=True)
class Call:
    """A request and when to send it. `tokens`: how long its answer was made to be; `may_stop`: it may end sooner (its
    end token is not ignored). `number` tells it from others of a replay."""

    at_s: float
    body: Mapping[str, Any]
    tokens: int
    may_stop: bool = False
    number: int = 0
    prompt_tokens: int = 0


@dataclass(slots=True)
class Way:
    """How one try reached its server; `is_used`: by a connection that had carried another request."""

    is_used: bool = False


def noting_ways() -> aiohttp.TraceConfig:
    """For a session: fills the `Way` that is given along with a request."""
    noting = aiohttp.TraceConfig()

    async def note(is_used: bool, context: SimpleNamespace) -> None:
        if isinstance(context.trace_request_ctx, Way):
            context.trace_request_ctx.is_used = is_used

    noting.on_connection_reuseconn.append(lambda _session, context, _params: note(True, context))
    noting.on_connection_create_end.append(lambda _session, context, _params: note(False, context))
    return noting


@dataclass(slots=True)
class Answer:
    """What a client saw of one call. `own`: our gateway's report, empty of other servers. `code`: of an error, where a
    program can read it, in a body or in the stream. `reconnects`: connections that turned out to be closed.

    One that ended early is not complete, however it says that it is over, unless it might: all are asked with
    `ignore_eos`, and a server that stops sooner (its context is full) has done less than the others.
    """

    at_s: float
    asked_tokens: int
    url: str = ""
    sent_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None
    ended_s: float | None = None
    pieces: int = 0
    counted_tokens: int | None = None
    error: str = ""
    own: Mapping[str, Any] = field(default_factory=dict)
    may_stop: bool = False
    number: int = 0
    asked_prompt_tokens: int = 0
    kind: str = ""
    status: int | None = None
    code: str = ""
    retry_after_s: float | None = None
    headers_s: float | None = None
    arrivals_s: list[float] = field(default_factory=list)
    counted_by: CountedBy = "events"
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    reconnects: int = 0

    @classmethod
    def to(cls, call: Call) -> Answer:
        return cls(
            call.at_s,
            call.tokens,
            may_stop=call.may_stop,
            number=call.number,
            asked_prompt_tokens=call.prompt_tokens,
        )

    @property
    def tokens(self) -> int:
        return self.pieces if self.counted_tokens is None else self.counted_tokens

    @property
    def is_complete(self) -> bool:
        return self.ended_s is not None and not self.error and (self.may_stop or self.tokens >= self.asked_tokens)

    @property
    def is_cut_short(self) -> bool:
        """It came to its end without an error, and before it had all tokens, though it should have had them."""
        return self.ended_s is not None and not self.error and not self.is_complete

    @property
    def is_refused(self) -> bool:
        """The server said no before anything was begun, for a reason that a program can read."""
        return self.status in _REFUSALS and bool(self.code)

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None or self.sent_s is None else self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """None of a single token."""
        if self.first_s is None or self.last_s is None or self.tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        """Until the last token; of an answer in one piece, until it was there."""
        return None if self.last_s is None or self.sent_s is None else self.last_s - self.sent_s

    @property
    def itl_s(self) -> list[float]:
        """From each event with text to the next."""
        return [later - earlier for earlier, later in pairwise(self.arrivals_s)]

    @property
    def late_s(self) -> float:
        """How much after its time it was sent."""
        return 0.0 if self.sent_s is None else self.sent_s - self.at_s

    @property
    def timing(self) -> Timing:
        return Timing(self.ttft_s, self.tpot_s, self.is_complete)

    def failed(self, kind: str, why: str) -> None:
        """The first reason stays."""
        if not self.kind:
            self.kind, self.error = kind, why[:_WHY_CHARS] or kind


async def ask(
    session: aiohttp.ClientSession,
    servers: LeastBusy,
    path: str,
    call: Call,
    answer: Answer,
    now_s: Callable[[], float],
    timeout_s: float | None = None,
) -> None:
    """Fills `answer`. Nothing is raised but a cancellation, which is noted in it."""
    deadline = asyncio.timeout(timeout_s)
    try:
        with servers.chosen() as url:
            answer.url = url
            async with deadline:
                await _asked(session, url.rstrip("/") + path, call, answer, now_s)
    except asyncio.CancelledError:
        answer.failed(UNFINISHED, CUT)
        raise
    except (aiohttp.ClientError, HttpProcessingError, msgspec.MsgspecError, TimeoutError, OSError, ValueError) as error:
        if deadline.expired():
            answer.failed(TIMEOUT, f"no end within {timeout_s:g} s")
        else:
            answer.failed(_kind_of(error), str(error) or type(error).__name__)
    finally:
        answer.ended_s = now_s()


async def _asked(
    session: aiohttp.ClientSession, url: str, call: Call, answer: Answer, now_s: Callable[[], float]
) -> None:
    """Once more on a new connection when one that was used before was closed in the meantime (RFC 9112, 9.3.1): a
    server may hang up after an answer without having said so. The time of sending is that of the last try."""
    way = Way()
    while True:
        answer.sent_s, way.is_used = now_s(), False
        try:
            async with session.post(url, json=call.body, allow_redirects=False, trace_request_ctx=way) as reply:
                answer.headers_s, answer.status = now_s(), reply.status
                await _read(reply, answer, now_s)
            return
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if not way.is_used or answer.headers_s is not None:
                raise
            answer.reconnects += 1


def _kind_of(error: Exception) -> str:
    match error:
        case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
            return UNREACHABLE
        case aiohttp.ClientResponseError() | msgspec.MsgspecError():
            return GARBAGE
        case aiohttp.ClientError() | OSError():
            return DISCONNECTED
        case _:  # no HTTP after all, a line without an end, bytes that are no text
            return GARBAGE


async def _read(reply: aiohttp.ClientResponse, answer: Answer, now_s: Callable[[], float]) -> None:
    if reply.status != 200:
        said = reply.headers.get("retry-after", "")
        answer.retry_after_s = float(said) if said.isdigit() else None
        data = await _error_body(reply)
        answer.code = _code_of(data)
        answer.failed(f"http_{reply.status}", f"HTTP {reply.status}: {data.decode(errors='replace')}")
    elif reply.content_type == "application/json":
        await _read_whole(reply, answer, now_s)
    else:
        await _read_events(reply, answer, now_s)
    if not answer.error and not answer.tokens and not answer.may_stop:
        answer.failed(EMPTY, "it came to its end without a token")


async def _error_body(reply: aiohttp.ClientResponse) -> bytes:
    """All of it when its length was said, else what comes first: a server that says no may leave its line open."""
    data = await reply.content.read(_WHY_CHARS)
    while len(data) < min(reply.content_length or 0, _ERROR_BYTES):
        part = await reply.content.read(_ERROR_BYTES)
        if not part:
            break
        data += part
    return data


class _Coded(msgspec.Struct, frozen=True):
    code: str | int | None = None


class _Refusal(msgspec.Struct, frozen=True):
    error: _Coded


def _code_of(data: bytes) -> str:
    """Of a body in OpenAI's shape; empty of any other."""
    try:
        code = msgspec.json.decode(data, type=_Refusal).error.code
    except msgspec.MsgspecError:
        return ""
    return "" if code is None else str(code)


async def _read_whole(reply: aiohttp.ClientResponse, answer: Answer, now_s: Callable[[], float]) -> None:
    """An answer in one piece: it has no first token that anybody saw."""
    data = bytearray()
    async for part in reply.content.iter_any():
        data += part
        if len(data) > _BODY_BYTES:
            raise ValueError(f"an answer of more than {_BODY_BYTES} bytes")
    at_s = now_s()
    _hear(msgspec.json.decode(data, type=_Event), answer, at_s)
    answer.first_s, answer.last_s, answer.arrivals_s = None, at_s, []


async def _read_events(reply: aiohttp.ClientResponse, answer: Answer, now_s: Callable[[], float]) -> None:
    async for line in reply.content:
        if not line.startswith(_DATA):
            continue
        data = line.removeprefix(_DATA).strip()
        if data == _DONE:
            return
        _hear(msgspec.json.decode(data, type=_Event), answer, now_s())
        if answer.error:
            return
    answer.failed(NO_END, "the stream ended without [DONE]")


class _Said(msgspec.Struct, frozen=True):
    """Of a chat, in pieces or whole. Servers that think aloud send that under one of two names; it is text, too."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def has_text(self) -> bool:
        return bool(self.content or self.reasoning_content or self.reasoning)


class _Choice(msgspec.Struct, frozen=True):
    """Of a completion (`text`) or of a chat (`delta`, or `message` in one piece)."""

    text: str | None = None
    delta: _Said | None = None
    message: _Said | None = None
    finish_reason: str | None = None

    @property
    def has_text(self) -> bool:
        return bool(self.text) or any(said is not None and said.has_text for said in (self.delta, self.message))


class _Details(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, frozen=True):
    completion_tokens: int | None = None
    prompt_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Timings(msgspec.Struct, frozen=True):
    predicted_n: int | None = None
    edge_llm: dict[str, Any] | None = None


class _Event(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: Any = None


def _hear(event: _Event, answer: Answer, now_s: float) -> None:
    if event.error is not None:
        answer.failed(STREAM_ERROR, str(event.error))
        if isinstance(event.error, dict):
            answer.code = str(event.error.get("code") or "")
        return
    if any(choice.has_text for choice in event.choices):
        answer.first_s = now_s if answer.first_s is None else answer.first_s
        answer.last_s = now_s
        answer.pieces += 1
        answer.arrivals_s.append(now_s)
    for choice in event.choices:
        answer.finish_reason = choice.finish_reason or answer.finish_reason
    _count(event, answer)


def _count(event: _Event, answer: Answer) -> None:
    if event.timings is not None:
        if event.timings.predicted_n is not None and answer.counted_by != "usage":
            answer.counted_tokens, answer.counted_by = event.timings.predicted_n, "timings"
        answer.own = event.timings.edge_llm or answer.own
    if event.usage is None:
        return
    if event.usage.completion_tokens is not None:
        answer.counted_tokens, answer.counted_by = event.usage.completion_tokens, "usage"
    answer.prompt_tokens = event.usage.prompt_tokens
    if event.usage.prompt_tokens_details is not None:
        answer.cached_tokens = event.usage.prompt_tokens_details.cached_tokens
