"""Requests sent at given times to any OpenAI-style server, whatever becomes of the earlier ones: an open loop.

Owns sending on time, reading server-sent events of completions and chats, the times that a client sees, and how late it
was itself: a generator that cannot keep up measures itself. Refuses to know what is compared and what limits are; it
shares no code with our gateway. A server that answers errors, hangs, or breaks off is counted, nothing is raised.

Times are seconds after the replay's start. The first token is the first event with text: no server sends a token whose
text is withheld (half a UTF-8 character). How many tokens there were is the server's own count (`usage`, else
llama.cpp's `timings`), else the number of events with text.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import msgspec

from edge_llm.bench.goodput import Timing
from edge_llm.bench.least_busy import LeastBusy
from edge_llm.bench.stats import percentile

_DATA: Final = b"data:"
_DONE: Final = b"[DONE]"
_WHY_CHARS: Final = 300
CUT: Final = "it was not over in time and hung up"
# The longest event that is read: the last one of an answer may carry all its token ids.
_LINE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Call:
    """A request and when to send it. `tokens`: how long its answer was made to be."""

    at_s: float
    body: Mapping[str, Any]
    tokens: int


@dataclass(slots=True)
class Answer:
    """What a client saw of one call. `own`: our gateway's report, empty of other servers.

    One that ended early is not complete, however it says that it is over: all are asked with `ignore_eos`, and a
    server that stops sooner (its context is full) has done less than the others.
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

    @property
    def tokens(self) -> int:
        return self.pieces if self.counted_tokens is None else self.counted_tokens

    @property
    def is_complete(self) -> bool:
        return self.ended_s is not None and not self.error and self.tokens >= self.asked_tokens

    @property
    def is_cut_short(self) -> bool:
        """It came to its end without an error, and before it had all tokens."""
        return self.ended_s is not None and not self.error and self.tokens < self.asked_tokens

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
        return None if self.last_s is None or self.sent_s is None else self.last_s - self.sent_s

    @property
    def late_s(self) -> float:
        """How much after its time it was sent."""
        return 0.0 if self.sent_s is None else self.sent_s - self.at_s

    @property
    def timing(self) -> Timing:
        return Timing(self.ttft_s, self.tpot_s, self.is_complete)


@dataclass(frozen=True, slots=True)
class Lateness:
    """Of the generator, in seconds."""

    p50_s: float
    p99_s: float
    max_s: float


def lateness(answers: Sequence[Answer]) -> Lateness:
    """Raises ValueError without answers."""
    late_s = [answer.late_s for answer in answers]
    return Lateness(percentile(late_s, 0.5), percentile(late_s, 0.99), max(late_s))


def served_per_s(answers: Sequence[Answer]) -> float:
    """Whole answers per second, from the first request to the last token; 0 without any."""
    ends_s = [answer.last_s for answer in answers if answer.is_complete and answer.last_s is not None]
    return len(ends_s) / max(ends_s) if ends_s and max(ends_s) > 0 else 0.0


async def replay(
    calls: Sequence[Call],
    session: aiohttp.ClientSession,
    servers: LeastBusy,
    cut_after_s: float,
    on_sent: Callable[[int], None] = lambda _sent: None,
    path: str = "/v1/completions",
    clock: Callable[[], float] = time.monotonic,
) -> list[Answer]:
    """Send all calls, each at its time; their answers in the order of `calls`, which is by time.

    What is not over `cut_after_s` after the last call is hung up. `on_sent` hears how many are sent.
    """
    start_s = clock()
    answers = [Answer(call.at_s, call.tokens) for call in calls]
    tasks: list[asyncio.Task[None]] = []
    try:
        for number, (call, answer) in enumerate(zip(calls, answers, strict=True)):
            await asyncio.sleep(max(0.0, start_s + call.at_s - clock()))
            asking = _ask(session, servers, path, call.body, answer, lambda: clock() - start_s)
            tasks.append(asyncio.create_task(asking, name=f"request {number}"))
            on_sent(number + 1)
        if tasks:
            await asyncio.wait(tasks, timeout=cut_after_s)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return answers


async def _ask(
    session: aiohttp.ClientSession,
    servers: LeastBusy,
    path: str,
    body: Mapping[str, Any],
    answer: Answer,
    now_s: Callable[[], float],
) -> None:
    try:
        with servers.chosen() as url:
            answer.url, answer.sent_s = url, now_s()
            async with session.post(url.rstrip("/") + path, json=body) as reply:
                await _read(reply, answer, now_s)
    except asyncio.CancelledError:
        answer.error = answer.error or CUT
        raise
    except (aiohttp.ClientError, msgspec.MsgspecError, TimeoutError, OSError, ValueError) as error:
        answer.error = answer.error or str(error)[:_WHY_CHARS] or type(error).__name__
    finally:
        answer.ended_s = now_s()


async def _read(reply: aiohttp.ClientResponse, answer: Answer, now_s: Callable[[], float]) -> None:
    if reply.status != 200:
        answer.error = f"HTTP {reply.status}: {(await reply.text())[:_WHY_CHARS]}"
        return
    async for line in reply.content:
        if not line.startswith(_DATA):
            continue
        data = line.removeprefix(_DATA).strip()
        if data == _DONE:
            return
        _hear(msgspec.json.decode(data, type=_Event), answer, now_s())
        if answer.error:
            return
    answer.error = "the stream ended without [DONE]"


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    """Of a completion (`text`) or of a chat (`delta`)."""

    text: str | None = None
    delta: _Delta | None = None


class _Usage(msgspec.Struct, frozen=True):
    completion_tokens: int | None = None


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
        answer.error = str(event.error)[:_WHY_CHARS]
        return
    if any(choice.text or (choice.delta and choice.delta.content) for choice in event.choices):
        answer.first_s = now_s if answer.first_s is None else answer.first_s
        answer.last_s = now_s
        answer.pieces += 1
    if event.timings is not None:
        if event.timings.predicted_n is not None:
            answer.counted_tokens = event.timings.predicted_n
        answer.own = event.timings.edge_llm or answer.own
    if event.usage is not None and event.usage.completion_tokens is not None:
        answer.counted_tokens = event.usage.completion_tokens


@asynccontextmanager
async def sending(headers: Mapping[str, str] | None = None) -> AsyncIterator[aiohttp.ClientSession]:
    """A session without limits of its own: how long is waited is the replay's affair."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30.0)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=connector, headers=headers, read_bufsize=_LINE_BYTES
    ) as session:
        yield session
