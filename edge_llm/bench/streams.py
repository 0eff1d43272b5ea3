"""A client of an OpenAI-style server that keeps the time of every piece of text it gets.

Owns sending, reading server-sent events and arrival times, the same for our gateway and for llama-server. It shares
no code with the gateway, so what it sees is what any client sees. Refuses to know what is compared.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import aiohttp

from edge_llm.bench.processes import MeasureFailed
from edge_llm.bench.stats import median

# Before an arrival counts, each stream has shown its pace over this many gaps.
WARM_GAPS: Final = 24
_STALLED_S: Final = 300.0
_DONE: Final = "[DONE]"


@dataclass(slots=True)
class Stream:
    """One running answer: when its pieces of text arrived (monotonic seconds)."""

    arrivals_s: list[float] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, now_s: float) -> None:
        self.arrivals_s.append(now_s)
        self.changed.set()


@dataclass(frozen=True, slots=True)
class Gaps:
    """Of one stream around an arrival, in seconds: mean gap before it, largest gap while it was worked on."""

    mean_before_s: float
    largest_during_s: float

    @property
    def stall_ratio(self) -> float:
        return self.largest_during_s / self.mean_before_s


def gaps_around(arrivals_s: Sequence[float], sent_s: float, answered_s: float) -> Gaps:
    """Gaps that end before `sent_s`, and those that overlap [sent_s, answered_s]. Raises MeasureFailed without both."""
    before = [later - earlier for earlier, later in pairwise(arrivals_s) if later <= sent_s]
    during = [later - earlier for earlier, later in pairwise(arrivals_s) if later > sent_s and earlier < answered_s]
    if not before or not during:
        raise MeasureFailed("a stream ended too early to see a gap before and after the arrival")
    return Gaps(sum(before) / len(before), max(during))


def largest_gap_before(arrivals_s: Sequence[float], sent_s: float, first_s: float, answer_s: float) -> float:
    """The longest that a stream was silent between an arrival and its first token (at `first_s`): what a prompt that is
    worked on does to a stream, without what its answer does as one more row. Silence that begins earlier counts from
    there; one that lasts until the first token, until `answer_s` before that, when the prompt was there and work on
    the answer began. Raises MeasureFailed when the stream ended before."""
    paced = [later - earlier for earlier, later in pairwise(arrivals_s) if later <= sent_s]
    # the step that makes the first token reaches both clients at about the same time: half a gap tells it from others
    until_s = first_s - (median(paced) if paced else 0.0) / 2
    gaps = []
    for earlier, later in pairwise(arrivals_s):
        if later > sent_s and earlier < until_s:
            gaps.append(later - earlier if later < until_s else max(0.0, first_s - answer_s - earlier))
    if not gaps:
        raise MeasureFailed("a stream ended too early to see a gap while the prompt arrived")
    return max(gaps)


class StreamClient:
    """Requests against one server. `extra` goes into every body (a mode, a server's own switches)."""

    def __init__(self, session: aiohttp.ClientSession, extra: Mapping[str, Any]) -> None:
        self._session, self._extra = session, extra

    async def ask(self, prompt: Sequence[int] | str, max_tokens: int) -> tuple[dict[str, Any], float]:
        """A whole answer to token ids or text, and the seconds until its first text."""
        body = {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            **self._extra,
        }
        started_s, first_s = time.monotonic(), 0.0
        last: dict[str, Any] = {}
        async for data in self._events(body):
            if _has_text(data):
                first_s = first_s or time.monotonic()
            last = data if "timings" in data else last
        if not first_s:
            raise MeasureFailed("the server answered without any text")
        return last, first_s - started_s

    @asynccontextmanager
    async def running(self, count: int, max_tokens: int) -> AsyncIterator[list[Stream]]:
        """`count` streams that have found their pace; they are hung up at the end of the block."""
        streams = [Stream() for _ in range(count)]
        tasks = [
            asyncio.create_task(self._run(stream, number, max_tokens), name=f"stream {number}")
            for number, stream in enumerate(streams)
        ]
        try:
            await self._until_warm(tasks, streams)
            # the first ones ran with fewer neighbours: what counts as pace starts when all run
            for stream in streams:
                del stream.arrivals_s[:-1]
            await self._until_warm(tasks, streams)
            yield streams
        finally:
            for task in tasks:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)

    async def next_text(self, stream: Stream, after_s: float) -> None:
        """Wait until the stream got something after `after_s`."""
        async with asyncio.timeout(_STALLED_S):
            while not stream.arrivals_s or stream.arrivals_s[-1] <= after_s:
                stream.changed.clear()
                await stream.changed.wait()

    async def _until_warm(self, tasks: Sequence[asyncio.Task[None]], streams: Sequence[Stream]) -> None:
        try:
            async with asyncio.timeout(_STALLED_S):
                for stream in streams:
                    while len(stream.arrivals_s) <= WARM_GAPS and not any(task.done() for task in tasks):
                        stream.changed.clear()
                        await stream.changed.wait()
        except TimeoutError:
            raise MeasureFailed("a stream did not find its pace: it sent nothing") from None
        for task in tasks:
            if task.done():
                raise MeasureFailed(f"a stream ended before it found its pace: {task.exception() or 'no reason given'}")

    async def _run(self, stream: Stream, number: int, max_tokens: int) -> None:
        prompt = f"Story number {number + 1}, told slowly and in many words. Once upon a time"
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            **self._extra,
        }
        try:
            async for data in self._events(body):
                if _has_text(data):
                    stream.add(time.monotonic())
        finally:
            stream.changed.set()

    async def _events(self, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async with self._session.post("/v1/completions", json=body) as reply:
            if reply.status != 200:
                raise MeasureFailed(f"HTTP {reply.status}: {(await reply.text())[:300]}")
            async for line in reply.content:
                text = line.decode(errors="replace").strip()
                if not text.startswith("data: ") or text == f"data: {_DONE}":
                    continue
                data = json.loads(text.removeprefix("data: "))
                if "error" in data:
                    raise MeasureFailed(f"the server failed in the stream: {data['error']}")
                yield data


@asynccontextmanager
async def client_of(url: str, extra: Mapping[str, Any]) -> AsyncIterator[StreamClient]:
    """A client of the server at `url`."""
    timeout = aiohttp.ClientTimeout(total=None, sock_read=_STALLED_S)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield StreamClient(session, extra)


def prompt_ids(count: int, vocab_size: int, seed: int) -> list[int]:
    """Token ids that no earlier prompt began with."""
    rng = random.Random(seed)
    return [rng.randrange(vocab_size // 20, vocab_size) for _ in range(count)]


def _has_text(data: Mapping[str, Any]) -> bool:
    return any(choice.get("text") for choice in data.get("choices", []))
