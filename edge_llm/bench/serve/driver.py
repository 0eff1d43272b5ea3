"""Requests to any OpenAI-style server: at given times, whatever becomes of the earlier ones, or so many at once.

Owns when requests are sent, and how late this side was itself: a generator that cannot keep up measures itself.
Refuses to know what is in a request, how an answer is read (answers.py) and what is compared.

Open loop: each call at its time. Closed loop: so many clients, each with its next request as soon as it has its answer.
What has not ended when a replay is over is hung up, and counted as that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final

import aiohttp

from edge_llm.bench.least_busy import LeastBusy
from edge_llm.bench.serve.answers import Answer, Call, ask, noting_ways
from edge_llm.bench.stats import percentile

COMPLETIONS: Final = "/v1/completions"
# The longest event that is read: the last one of an answer may carry all its token ids.
_LINE_BYTES: Final = 1 << 20
_CONNECT_S: Final = 30.0
# Servers close what is idle for five seconds, as a rule: a request that meets the closing would be a failure of ours.
_IDLE_S: Final = 2.0
# A client whose request failed waits so long: a server that is gone shall not be asked thousands of times a second.
_PAUSE_S: Final = 0.1
OnEnd = Callable[[Answer], None]


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
    cut_after_s: float | None,
    on_sent: Callable[[int], None] = lambda _sent: None,
    path: str = COMPLETIONS,
    clock: Callable[[], float] = time.monotonic,
    on_end: OnEnd = lambda _answer: None,
    timeout_s: float | None = None,
    began_s: float | None = None,
) -> list[Answer]:
    """Send all calls, each at its time; their answers in the order of `calls`, which is by time.

    What is not over `cut_after_s` after the last call is hung up, and so is a request that is not over `timeout_s`
    after it was sent. `on_sent` hears how many are sent, `on_end` of each answer when it is over. `began_s` (of
    `clock`): when time 0 is, None: now.
    """
    start_s = clock() if began_s is None else began_s
    answers = [Answer.to(call) for call in calls]
    tasks: list[asyncio.Task[None]] = []

    async def one(call: Call, answer: Answer) -> None:
        try:
            await ask(session, servers, path, call, answer, lambda: clock() - start_s, timeout_s)
        finally:
            on_end(answer)

    try:
        for number, (call, answer) in enumerate(zip(calls, answers, strict=True)):
            await asyncio.sleep(max(0.0, start_s + call.at_s - clock()))
            tasks.append(asyncio.create_task(one(call, answer), name=f"request {number}"))
            on_sent(number + 1)
        if tasks:
            done, _ = await asyncio.wait(tasks, timeout=cut_after_s)
            for task in done:
                task.result()  # what a server does is in its answer: an exception is a mistake of ours
    finally:
        await _hang_up(tasks)
    return answers


async def circulate(
    calls: Iterable[Call],
    clients: int,
    session: aiohttp.ClientSession,
    servers: LeastBusy,
    seconds: float | None = None,
    on_sent: Callable[[int], None] = lambda _sent: None,
    path: str = COMPLETIONS,
    clock: Callable[[], float] = time.monotonic,
    on_end: OnEnd = lambda _answer: None,
    timeout_s: float | None = None,
) -> list[Answer]:
    """A closed loop: `clients` that take the next call when they have their answer, until all are taken or `seconds`
    are over (what is under way then may end). Answers in the order in which they were sent."""
    start_s = clock()
    waiting = iter(calls)
    answers: list[Answer] = []

    async def client() -> None:
        for call in waiting:  # shared: each takes what is next
            now_s = clock() - start_s
            if seconds is not None and now_s >= seconds:
                return
            sent = replace(call, at_s=now_s)
            answer = Answer.to(sent)
            answers.append(answer)
            on_sent(len(answers))
            try:
                await ask(session, servers, path, sent, answer, lambda: clock() - start_s, timeout_s)
            finally:
                on_end(answer)
            if answer.error:
                await asyncio.sleep(_PAUSE_S)

    tasks = [asyncio.create_task(client(), name=f"client {number}") for number in range(clients)]
    try:
        await asyncio.gather(*tasks)
    finally:
        await _hang_up(tasks)
    return answers


async def _hang_up(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def sending(
    headers: Mapping[str, str] | None = None, is_kept: bool = True
) -> AsyncIterator[aiohttp.ClientSession]:
    """A session without limits of its own: how long is waited is the replay's affair. Servers shall not compress: what
    is compressed comes in other pieces than tokens. `is_kept`: connections are used again; else each request has one of
    its own."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
    connector = (
        aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S)
        if is_kept
        else aiohttp.TCPConnector(limit=0, force_close=True)
    )
    async with aiohttp.ClientSession(
        timeout=timeout,
        connector=connector,
        trace_configs=[noting_ways()],
        headers={"accept-encoding": "identity", **(headers or {})},
        read_bufsize=_LINE_BYTES,
    ) as session:
        yield session
