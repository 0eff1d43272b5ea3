"""How one answer travels to its client: as SSE while it is made, or whole; and what it says about how it was made.

Owns keep-alives, hanging up, when text may go past its own task (wire.py, `Outlet`), and `timings` with
`timings.edge_llm`. Refuses to know routes, admission and planning.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final, TypeVar

from fastapi import Request

from edge_llm.errors import InvalidRequest, WorkerError
from edge_llm.gateway.intake import Arrival
from edge_llm.gateway.openai import Ask
from edge_llm.gateway.running import Finish, Job, Progress, Running, Silence, Text
from edge_llm.gateway.shape import DONE, KEEP_ALIVE, Shape, Usage, error_body, sse
from edge_llm.gateway.wire import Outlet

# So long a request may take to be accepted before anybody looks whether its client is there still: most take less, and
# one more task each is a share of their time to first token.
UNWATCHED_S: Final = 0.02
Result = TypeVar("Result")


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` comes to. A client that hangs up ends it: then nobody hears what is raised. It runs in the caller's
    own task, since under load each further one waits for its turn; the one that looks for the client begins only when
    the work takes longer than usual."""
    loop = asyncio.get_running_loop()
    looking: list[asyncio.Task[None]] = []
    async with _cut("the client hung up before its request was accepted") as cut:

        def end(_: asyncio.Task[None]) -> None:
            with suppress(RuntimeError):  # the block is over already, in the same turn of the loop
                cut.reschedule(loop.time())

        def look() -> None:
            looking.append(asyncio.create_task(_disconnected(request), name="disconnect"))
            looking[0].add_done_callback(end)

        timer = loop.call_later(UNWATCHED_S, look)
        try:
            return await work
        finally:
            timer.cancel()
            for gone in looking:
                gone.remove_done_callback(end)
                gone.cancel()


@asynccontextmanager
async def _cut(words: str) -> AsyncIterator[asyncio.Timeout]:
    """A block that ends when its timeout is set to now: with InvalidRequest of these words."""
    cut = asyncio.timeout(None)
    try:
        async with cut:
            yield cut
    except TimeoutError as error:
        if not cut.expired():
            raise
        raise InvalidRequest(words) from error


async def all_of(works: Iterable[Callable[[], Coroutine[Any, Any, Result]]], at_once: int) -> list[Result]:
    """What each comes to, in their order, so many at a time. The first error ends all of them and is raised as it is:
    a task group would wrap it."""
    gate = asyncio.Semaphore(at_once)

    async def one(work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        async with gate:
            return await work()

    tasks = [asyncio.create_task(one(work)) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def whole(
    arrival: Arrival, request: Request, ask: Ask, job: Job, shape: Shape, arrived_s: float
) -> dict[str, Any]:
    """Collect an answer. A client that hangs up cancels it."""
    async with arrival.running(job, arrived_s) as running:
        request.state.is_accepted = True
        gone = asyncio.create_task(_disconnected(request), name="disconnect")
        try:
            text, finish = await _collect(running, gone)
        finally:
            gone.cancel()
    if finish.error is not None:
        raise finish.error
    timings = _timings(running, ask, arrived_s)
    return shape.whole(text, finish.reason or "stop", _usage(running), timings)


async def _collect(running: Running, gone: asyncio.Task[None]) -> tuple[str, Finish]:
    parts: list[str] = []
    while True:
        getting = asyncio.create_task(running.heard())
        try:
            await asyncio.wait({getting, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            getting.cancel()  # of one that is done it does nothing
        if not getting.done():
            return "", Finish(None, WorkerError("the client hung up"))
        update = getting.result()
        if isinstance(update, Finish):
            return "".join(parts), update
        if isinstance(update, Text):
            parts.append(update.text)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def stream(
    arrival: Arrival, ask: Ask, job: Job, shape: Shape, arrived_s: float, keep_alive_s: float, outlet: Outlet | None
) -> AsyncGenerator[bytes, None]:
    """SSE of one answer. The first part comes when the request is accepted, and is empty: there is nothing to say yet.
    Then something comes at least every `keep_alive_s`; text past this generator through the outlet, while it waits and
    the client keeps up."""
    with arrival:
        async with arrival.running(job, arrived_s) as running:
            beat, said = _Beat(running, keep_alive_s), _Said(ask, shape, arrived_s)
            if outlet is not None:
                running.at_once = partial(_at_once, outlet, beat, said)
            try:
                yield b""
                while not isinstance(update := await running.heard(), Finish):
                    if part := said.part(update):
                        beat.said_s = time.monotonic()
                        yield part
            finally:
                running.at_once = None
                beat.end()
            if update.error is not None:
                yield sse(error_body(update.error))
                return
            timings = _timings(running, ask, arrived_s)
            usage = shape.usage(_usage(running), timings) if ask.wants_usage else b""
            yield said.head() + shape.last(update.reason or "stop", timings) + usage + DONE


def _at_once(outlet: Outlet, beat: _Beat, said: _Said, text: str) -> bool:
    """Whether this text needs no further way to its client."""
    if not text:
        return True
    if not outlet.is_free:
        return False
    try:
        part = said.text(text)
    except TypeError:  # text that is no Unicode: its own stream is to fail of it, not all that this worker feeds
        return False
    beat.said_s = time.monotonic()
    outlet.write(part)
    return True


class _Said:
    """What a stream's client hears of each update. The head goes with the first chunk, whichever that is."""

    def __init__(self, ask: Ask, shape: Shape, arrived_s: float) -> None:
        self._ask, self._shape, self._arrived_s = ask, shape, arrived_s
        self._head = shape.first()

    def head(self) -> bytes:
        """Once."""
        head, self._head = self._head, b""
        return head

    def text(self, text: str) -> bytes:
        chunk = self._shape.text(text)
        return self.head() + chunk

    def part(self, update: Text | Progress | Silence) -> bytes:
        """Nothing of withheld text and of progress that it did not ask for."""
        match update:
            case Text(text):
                return self.text(text) if text else b""
            case Progress(done, total) if self._ask.wants_progress:
                elapsed_ms = 1e3 * (time.monotonic() - self._arrived_s)
                return self.head() + self._shape.progress(done, total, elapsed_ms)
            case Silence():
                return KEEP_ALIVE
        return b""


class _Beat:
    """Tells a stream of silence: what it `said_s` last is `every_s` ago. One timer for its whole life, not one for each
    wait: those would cost more than the tokens waited for."""

    def __init__(self, running: Running, every_s: float) -> None:
        self._running, self._every_s = running, every_s
        self.said_s = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(every_s, self._look)

    def end(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        left_s = self.said_s + self._every_s - time.monotonic()
        if left_s <= 0:
            left_s = self._every_s
            if self._running.updates.empty():
                self._running.tell(Silence())
        self._timer = asyncio.get_running_loop().call_later(left_s, self._look)


def _usage(running: Running) -> Usage:
    return Usage(len(running.job.prompt_ids), len(running.session.delivered), _cached_tokens(running))


def _cached_tokens(running: Running) -> int:
    """Prompt tokens that nobody computed for this request: kept by the decode worker or by its prefill worker."""
    report = running.reading
    kept = max(report.cached_tokens, report.prefill_cached_tokens) if report else 0
    return min(kept, len(running.job.prompt_ids))


def _timings(running: Running, ask: Ask, arrived_s: float) -> dict[str, Any]:
    """llama.cpp's `timings` object with ours inside. Milliseconds on the gateway's monotonic clock, except what the
    decode worker reports about the prompt."""
    prompt_n, predicted_n = len(running.job.prompt_ids), len(running.session.delivered)
    prompt_ms = 1e3 * max(0.0, (running.prompted_s or running.first_token_s) - running.sent_s)
    predicted_ms = 1e3 * max(0.0, running.last_token_s - (running.prompted_s or running.first_token_s))
    return {
        "cache_n": _cached_tokens(running),
        "prompt_n": prompt_n,
        "prompt_ms": round(prompt_ms, 3),
        "prompt_per_second": _rate(prompt_n, prompt_ms),
        "predicted_n": predicted_n,
        "predicted_ms": round(predicted_ms, 3),
        "predicted_per_second": _rate(predicted_n, predicted_ms),
        "edge_llm": _own_timings(running, ask, arrived_s),
    }


def _own_timings(running: Running, ask: Ask, arrived_s: float) -> dict[str, Any]:
    report, plan = running.reading, running.plan
    own: dict[str, Any] = {
        "mode": report.mode if report else None,
        "prefill_node": report.prefill_worker if report else None,
        "decode_node": plan.decode.worker if plan else None,
        "level": running.level,
        "queue_ms": round(1e3 * (running.sent_s - arrived_s), 3),
        "wait_ms": _rounded(report.wait_ms if report else None),
        "prefill_ms": _rounded(report.prefill_ms if report else None),
        "handoff_ms": _rounded(report.handoff_ms if report else None),
        "adopt_ms": _rounded(report.adopt_ms if report else None),
        "cached_tokens": report.cached_tokens if report else 0,
        "prefill_cached_tokens": report.prefill_cached_tokens if report else 0,
        "handoff_bytes": report.handoff_bytes if report else 0,
        "overlapped_bytes": report.overlapped_bytes if report else 0,
        "first_decode_ms": _rounded(1e3 * (running.first_token_s - running.prompted_s)),
        "ttft_ms": _rounded(1e3 * (running.first_token_s - arrived_s)),
        "fallback": "; ".join(running.notes) or None,
        "replanned": len(running.session.lost),
    }
    if ask.passed_over:
        own["passed_over"] = list(ask.passed_over)
    if ask.wants_token_ids:
        own["token_ids"] = list(running.session.delivered)
    return own


def _rounded(value_ms: float | None) -> float | None:
    return None if value_ms is None else round(value_ms, 3)


def _rate(count: int, ms: float) -> float | None:
    return round(1e3 * count / ms, 3) if ms > 0 else None
