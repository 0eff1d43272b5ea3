"""A client outside the cluster: HTTP to the fixed port of a node, from a namespace that has no pod and no service.

Owns the session, streams that are followed token by token, load that runs in the background, and reading /cluster.
Everything here runs in the namespace `OUTSIDE` (see `shell.moved_to`). Refuses to know Kubernetes.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from edge_llm.bench.followed import Followed, follow, judge
from edge_llm.bench.streams import prompt_ids
from tests.kubernetes.shell import Broken

STREAM_S: Final = 240.0
_POLL_S: Final = 0.1
_numbers: Final = itertools.count(1)


@dataclass(slots=True)
class Load:
    """Requests that went on in the background: each one as its client saw it."""

    streams: list[Followed] = field(default_factory=list)

    @property
    def finished(self) -> list[Followed]:
        return [stream for stream in self.streams if stream.is_over]

    @property
    def failed(self) -> list[Followed]:
        return [stream for stream in self.finished if stream.failure]

    def used(self, key: str) -> Counter[str]:
        """How often each worker did this part (`decode_node`, `prefill_node`)."""
        return Counter(str(stream.own.get(key)) for stream in self.finished if not stream.failure)


@dataclass(frozen=True, slots=True)
class Outside:
    """`session` has the endpoint's address and an operator's API key."""

    session: aiohttp.ClientSession
    url: str

    async def overview(self) -> dict[str, Any]:
        """The cluster as the gateway sees it."""
        timeout = aiohttp.ClientTimeout(total=10)
        async with self.session.get("/cluster", timeout=timeout) as reply:
            if reply.status != 200:
                raise Broken(f"/cluster: HTTP {reply.status}: {(await reply.text())[:200]}")
            found: dict[str, Any] = await reply.json()
            return found

    async def ready(self) -> dict[str, dict[str, Any]]:
        """Workers that take requests, by name."""
        return {node["worker"]: node for node in (await self.overview())["nodes"] if node["is_ready"]}

    async def silent(self, worker: str) -> str:
        """What the gateway says of a worker that it cannot use; empty: nothing."""
        found = ((await self.overview()).get("discovery") or {}).get("silent_workers", ())
        return next((str(one["message"]) for one in found if one["worker"] == worker), "")

    async def until(
        self, what: str, condition: Callable[[dict[str, dict[str, Any]]], bool], deadline_s: float = 120.0
    ) -> float:
        """Seconds until the gateway's ready workers were like that. Raises Broken."""
        began_s = time.monotonic()
        seen: object = "the gateway does not answer"
        while time.monotonic() - began_s < deadline_s:
            try:
                ready = await self.ready()
            except (Broken, aiohttp.ClientError, TimeoutError) as error:
                seen = error
            else:
                if condition(ready):
                    return time.monotonic() - began_s
                seen = {name: node["role"] for name, node in ready.items()}
            await asyncio.sleep(_POLL_S)
        raise Broken(f"{what}: not within {deadline_s:.0f} s; the gateway's ready workers: {seen}")

    async def model(self) -> dict[str, Any]:
        async with self.session.get("/v1/models") as reply:
            found: dict[str, Any] = (await reply.json())["data"][0]
            return found

    def stream(self, body: Mapping[str, Any]) -> tuple[Followed, asyncio.Task[None]]:
        """A streamed completion that has been sent, and the task that reads it to its end."""
        followed = Followed(f"test-{next(_numbers)}")
        task = asyncio.create_task(follow(self.session, body, followed, lambda: None), name=followed.request_id)
        return followed, task

    async def ask(self, body: Mapping[str, Any]) -> Followed:
        """A streamed completion, read to its end. Raises Broken when it failed."""
        followed, task = self.stream(body)
        await asyncio.wait_for(task, STREAM_S)
        if followed.failure:
            raise Broken(f"{followed.request_id}: {followed.failure}")
        return followed

    async def after_tokens(self, followed: Followed, task: asyncio.Task[None], count: int) -> None:
        """Wait until so many pieces of text came. Raises Broken when the stream ended before."""
        while len(followed.arrivals_s) < count:
            if task.done():
                raise Broken(f"the stream ended after {len(followed.arrivals_s)} pieces: {followed.failure or 'done'}")
            await asyncio.sleep(0.005)

    @asynccontextmanager
    async def load(self, bodies: Callable[[int], Mapping[str, Any]], at_once: int) -> AsyncIterator[Load]:
        """So many streams at a time, one after another, until the block ends; those that run then come to their end."""
        load, is_over = Load(), asyncio.Event()
        numbers = itertools.count()

        async def client() -> None:
            while not is_over.is_set():
                followed, task = self.stream(bodies(next(numbers)))
                load.streams.append(followed)
                try:
                    await asyncio.wait_for(task, STREAM_S)
                except TimeoutError:
                    followed.failure = followed.failure or f"not over after {STREAM_S:.0f} s"
                if followed.failure:
                    await asyncio.sleep(0.2)

        tasks = [asyncio.create_task(client(), name=f"load {number}") for number in range(at_once)]
        try:
            yield load
        finally:
            is_over.set()
            await asyncio.gather(*tasks)


@asynccontextmanager
async def outside(url: str, api_key: str) -> AsyncIterator[Outside]:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=STREAM_S)
    headers = {"authorization": f"Bearer {api_key}"}
    # every request its own connection: through one that is kept, all of them would reach the gateway of yesterday
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(url, timeout=timeout, headers=headers, connector=connector) as session:
        yield Outside(session, url)


def completion(
    seed: int, prompt_tokens: int, answer_tokens: int, vocab_size: int, mode: str = "split", **more: object
) -> dict[str, Any]:
    """A prompt that nobody asked before. Two of the same seed are the same request, kept KV left out."""
    return {
        "prompt": prompt_ids(prompt_tokens, vocab_size, seed),
        "max_tokens": answer_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "cache_prompt": False,
        "edge_llm": {"mode": mode, "return_token_ids": True},
        **more,
    }


def differences(followed: Followed, reference: Followed) -> str:
    """Empty when the stream is what the undisturbed one was, token for token."""
    verdict = judge(followed, reference.ids, reference.text)
    if verdict.is_good:
        return ""
    return f"{followed.failure or verdict} ({len(followed.ids)} tokens, {len(reference.ids)} undisturbed)"


def proven(streams: Sequence[Followed], references: Sequence[Followed]) -> int:
    """Tokens that were compared and are equal. Raises Broken."""
    for stream, reference in zip(streams, references, strict=True):
        if wrong := differences(stream, reference):
            raise Broken(f"{stream.request_id}: {wrong}")
    return sum(len(stream.ids) for stream in streams)
