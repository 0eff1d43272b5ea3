"""A load generator whose requests leave at their times, whatever became of those before, and what came back.

Owns raw HTTP/1.1 requests to /v1/completions, one connection each: status, refusals with their code and Retry-After,
the time of the first text and of the end, what the last event says. Keeps how late each request left, so that a
generator that was the bottleneck shows. Refuses to know what is measured.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Final, cast
from urllib.parse import urlsplit

from edge_llm.bench.raw_http import (
    DONE,
    EMPTY_TEXT,
    TAIL_BYTES,
    TEXT,
    generated_tokens,
    last_object,
    request_bytes,
)

_HEAD_END: Final = b"\r\n\r\n"
# A request that has not ended after so long is hung up and counts as lost.
PATIENCE_S: Final = 120.0
_RETRY_S: Final = 0.05
# Requests that leave later than this share of what is judged (99 % of them) make it the generator's figure.
LATE_SHARE: Final = 0.1


@dataclass(frozen=True, slots=True)
class Call:
    """A request to be sent `due_s` after the start; `kind` is for whoever counts."""

    due_s: float
    body: Mapping[str, Any]
    kind: str = ""


class Answer(asyncio.Protocol):
    """One request and what came of it; monotonic seconds. `late_s`: after its time that it left."""

    def __init__(self, call: Call, request: bytes, late_s: float) -> None:
        self.call, self.late_s = call, late_s
        self.asked_s = time.monotonic()
        self.first_s = self.ended_s = 0.0
        self.status = 0
        self.ended = asyncio.Event()
        self._request, self._head, self._kept = request, b"", b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by name
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self.status:
            self._head += data
            if _HEAD_END not in self._head:
                return
            head, _, data = self._head.partition(_HEAD_END)
            self._head, self.status = head, int(head.split(b" ", 2)[1])
        self._kept = (self._kept + data)[-TAIL_BYTES:]
        if self.status != 200:
            if len(self._kept) >= int(self._header(b"content-length") or 0):
                self._end()
            return
        if not self.first_s and self._kept.count(TEXT) > self._kept.count(EMPTY_TEXT):
            self.first_s = time.monotonic()
        if DONE in self._kept:
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def hang_up(self) -> None:
        """Stop listening; what has not ended never will."""
        self._end()

    def _end(self) -> None:
        if not self.ended_s:
            self.ended_s = time.monotonic()
            self.ended.set()
        if self._transport is not None:
            self._transport.close()

    def _header(self, name: bytes) -> str:
        for line in self._head.split(b"\r\n")[1:]:
            key, _, value = line.partition(b":")
            if key.strip().lower() == name:
                return value.strip().decode()
        return ""

    # -- what came

    @property
    def is_whole(self) -> bool:
        """All tokens that were asked for, and the end of the stream."""
        return self.status == 200 and DONE in self._kept and self.tokens == self.call.body["max_tokens"]

    @property
    def is_refused(self) -> bool:
        """An answer that says no before anything was begun, for a reason that a program can read."""
        return self.status in (429, 503) and bool(self.code)

    @property
    def ttft_s(self) -> float | None:
        """From before the connection to the first text."""
        return self.first_s - self.asked_s if self.first_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first."""
        return (self.ended_s - self.first_s) / (self.tokens - 1) if self.first_s and self.tokens > 1 else None

    @property
    def took_s(self) -> float:
        return self.ended_s - self.asked_s

    @property
    def tokens(self) -> int:
        """What the last event says was generated."""
        return generated_tokens(self._kept)

    @property
    def queue_s(self) -> float | None:
        """What the server says of the time until the request was given to a worker."""
        waited_ms = last_object(self._kept, "timings").get("edge_llm", {}).get("queue_ms")
        return None if waited_ms is None else float(waited_ms) / 1e3

    @property
    def retry_after_s(self) -> float | None:
        """None: not said, or not as a number of seconds."""
        said = self._header(b"retry-after")
        return float(said) if said.isdigit() else None

    @property
    def code(self) -> str:
        """Of an error, of the answer or in its stream; empty without."""
        if self.status == 200:
            return str(last_object(self._kept, "error").get("code", ""))
        try:
            return str(json.loads(self._kept)["error"]["code"])
        except (ValueError, KeyError, TypeError):
            return ""

    @property
    def complaint(self) -> str:
        """How it ended, for people."""
        return f"status {self.status}: {self._kept[-200:].decode(errors='replace').strip()}"


class OpenLoop:
    """Requests to one server. `on_end` hears of every answer when it is over."""

    def __init__(self, url: str, on_end: Callable[[Answer], None] = lambda _answer: None) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname or "", address.port or 80
        self._on_end = on_end

    async def offer(self, calls: Sequence[Call], began_s: float | None = None) -> list[Answer]:
        """Send each call when it is due, and wait for all answers. `began_s` (monotonic): when time 0 is."""
        start_s = time.monotonic() if began_s is None else began_s
        async with asyncio.TaskGroup() as group:
            tasks = []
            for call in calls:
                await asyncio.sleep(max(0.0, start_s + call.due_s - time.monotonic()))
                late_s = max(0.0, time.monotonic() - start_s - call.due_s)
                tasks.append(group.create_task(self._ask(call, late_s)))
        return [task.result() for task in tasks]

    async def saturate(self, body_of: Callable[[int], Mapping[str, Any]], clients: int, seconds: float) -> list[Answer]:
        """So many clients that ask again as soon as they have their answer (or soon after a refusal): a closed loop,
        which keeps a server full without drowning it."""
        numbers, answers, until_s = count(), list[Answer](), time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < until_s:
                answer = await self._ask(Call(0.0, body_of(next(numbers))), 0.0)
                answers.append(answer)
                if not answer.is_whole:
                    await asyncio.sleep(_RETRY_S)

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
        return answers

    async def _ask(self, call: Call, late_s: float) -> Answer:
        answer = Answer(call, request_bytes(self._host, self._port, call.body), late_s)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.get_running_loop().create_connection(lambda: answer, self._host, self._port)
                await answer.ended.wait()
        except (TimeoutError, OSError):
            pass  # its status says that nothing came
        finally:
            answer.hang_up()
        self._on_end(answer)
        return answer


def poisson(rate_per_s: float, from_s: float, until_s: float, rng: random.Random) -> Iterator[float]:
    """Times of independent arrivals in [from_s, until_s)."""
    now_s = from_s
    while (now_s := now_s + rng.expovariate(rate_per_s)) < until_s:
        yield now_s


def completion(prompt_tokens: int, answer_tokens: int, number: int) -> dict[str, Any]:
    """A streamed request of so many tokens for the simulated vocabulary: a beginning, then one token a byte
    (engine/simulated.py). No two numbers share a prefix, and nothing is kept of any."""
    text = f"{number} {'so it went on and on ' * (prompt_tokens // 20 + 1)}"
    return {
        "prompt": text[: max(1, prompt_tokens - 1)],
        "max_tokens": answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "cache_prompt": False,
    }
