"""A gateway on a loopback port in front of simulated workers on others, and a client that reads as a stranger would."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import pytest
from fastapi import FastAPI
from starlette.types import ASGIApp

from edge_llm.cluster.discovery import Discovery
from edge_llm.cluster.view import Place
from edge_llm.config import GatewayConfig
from edge_llm.engine.simulated import SimulatedBackend, SimulatedSettings
from edge_llm.gateway.app import Gateway, create_app
from edge_llm.gateway.keys import Credentials, NoKeys
from edge_llm.gateway.wire import bounded
from edge_llm.worker.client import Peer
from edge_llm.worker.messages import Role
from tests.loopback import DEADLINE_S, KEYS, Cluster, LoopbackServer, Node, listening, running_cluster, until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO: Final = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
PROBE_S: Final = 0.02
NO_KEYS: Final = NoKeys()


class Written(Discovery):
    """Discovery of what the test wrote down."""

    def __init__(self) -> None:
        self.written: tuple[Place, ...] = ()

    def places(self) -> tuple[Place, ...]:
        return self.written


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: dict[str, Any]

    @property
    def error(self) -> dict[str, Any]:
        assert self.body.keys() == {"error"}
        error: dict[str, Any] = self.body["error"]
        assert error.keys() == {"message", "type", "code", "param"}
        return error

    @property
    def own(self) -> dict[str, Any]:
        return own_timings(self.body)


@dataclass(slots=True)
class Streamed:
    """What a client heard of a streamed answer so far, event by event."""

    reply: aiohttp.ClientResponse
    chunks: list[dict[str, Any]] = field(default_factory=list)
    keep_alives: int = 0
    is_done: bool = False

    async def heard(self, condition: Callable[[Streamed], bool]) -> Streamed:
        """Read on until `condition` holds."""
        while not condition(self):
            assert await self._event(), "the stream ended before that"
        return self

    async def whole(self) -> Streamed:
        while await self._event():
            pass
        return self

    async def _event(self) -> bool:
        line = await self.reply.content.readline()
        if not line:
            return False
        if line == b"\n":
            self.keep_alives += 1
            return True
        assert await self.reply.content.readline() == b"\n", "an event ends with an empty line"
        assert not self.is_done, "something came after [DONE]"
        if line == b"data: [DONE]\n":
            self.is_done = True
        else:
            self.chunks.append(json.loads(line.removeprefix(b"data: ")))
        return True

    @property
    def choices(self) -> list[dict[str, Any]]:
        assert not [chunk for chunk in self.chunks if "error" in chunk], self.chunks[-1]
        return [choice for chunk in self.chunks for choice in chunk["choices"]]

    @property
    def text(self) -> str:
        return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in self.choices)

    @property
    def finish_reasons(self) -> list[str]:
        return [choice["finish_reason"] for choice in self.choices if choice["finish_reason"] is not None]

    @property
    def own(self) -> dict[str, Any]:
        return own_timings(next(chunk for chunk in self.chunks if "timings" in chunk))


def own_timings(body: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer says about how it was made."""
    own: dict[str, Any] = body["timings"]["edge_llm"]
    return own


def asking(prompt: Sequence[int] | Sequence[Sequence[int]], mode: str = "auto", **more: Any) -> dict[str, Any]:
    """A greedy completion of token ids that no stop token ends, with the ids of the answer."""
    vendor = {"mode": mode, "return_token_ids": True}
    return {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "edge_llm": vendor, **more}


def streaming_raw(service: Service, body: Mapping[str, Any]) -> socket.socket:
    """A connection on which this completion was asked for as a stream, and nothing is read yet; with as little buffer
    as the kernel gives. The answer is its last."""
    host, port = service.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.settimeout(DEADLINE_S)
    connection.connect((host, int(port)))
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@dataclass(frozen=True, slots=True)
class Service:
    """A running gateway, the cluster it looks at, and a session whose paths are the gateway's."""

    gateway: Gateway
    cluster: Cluster
    discovery: Written
    client: aiohttp.ClientSession
    url: str
    app: FastAPI
    server: LoopbackServer

    async def start(
        self,
        role: Role,
        name: str,
        settings: SimulatedSettings | None = None,
        *,
        backend: SimulatedBackend | None = None,
        prefix_cache_bytes: int = 0,
    ) -> Node:
        """Start a worker, write it down and wait until the gateway sees it."""
        node = await self.cluster.start(role, name, settings, backend=backend, prefix_cache_bytes=prefix_cache_bytes)
        await self.add(node.peer)
        return node

    async def add(self, peer: Peer) -> None:
        place = Place(peer.worker, peer.address)
        others = tuple(other for other in self.discovery.written if other.worker != place.worker)
        self.discovery.written = (*others, place)
        await until(lambda: any(node.place == place for node in self.gateway.dispatcher.view.nodes))

    async def post(self, path: str, body: object, headers: Mapping[str, str] | None = None) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": "application/json", **(headers or {})}
        async with self.client.post(path, data=data, headers=sent) as reply:
            return Reply(reply.status, reply.headers, await reply.json())

    async def post_text(self, path: str, body: object, headers: Mapping[str, str] | None = None) -> str:
        async with self.client.post(path, json=body, headers=headers) as reply:
            return await reply.text()

    async def get(self, path: str) -> Reply:
        async with self.client.get(path) as reply:
            return Reply(reply.status, reply.headers, await reply.json())

    @asynccontextmanager
    async def streaming(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[Streamed]:
        """Leaving the block early hangs up."""
        async with self.client.post(path, json={**body, "stream": True}, headers=headers) as reply:
            assert reply.status == 200, await reply.text()
            assert reply.content_type == "text/event-stream"
            yield Streamed(reply)

    async def stream(self, path: str, body: Mapping[str, Any]) -> Streamed:
        """A whole streamed answer."""
        async with self.streaming(path, body) as streamed:
            return await streamed.whole()

    def requests(self, state: str) -> int:
        return self.gateway.dispatcher.requests.get(state, 0)


@asynccontextmanager
async def serving(
    cluster: Cluster,
    credentials: Credentials = NO_KEYS,
    wrapped: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    **config: Any,
) -> AsyncIterator[Service]:
    """A gateway before `cluster`, which may still be empty; `config` are fields of GatewayConfig. `wrapped`: its app
    behind something of the test's."""
    discovery = Written()
    gateway = Gateway(GatewayConfig(**{"name": "gateway", "probe_s": PROBE_S, **config}), KEYS, discovery, credentials)
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    app = create_app(gateway)
    protocol = bounded(gateway.config.max_head_bytes, gateway.config.read_s)
    async with listening(wrapped(app), protocol, config.get("stall_s")) as (address, server):
        url = f"http://{address}"
        async with aiohttp.ClientSession(url, timeout=timeout) as client:
            yield Service(gateway, cluster, discovery, client, url, app, server)


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, as the gateway does."""
    return "asyncio"


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    """A gateway of this test alone, with no worker yet."""
    async with running_cluster() as cluster, serving(cluster) as made:
        yield made
