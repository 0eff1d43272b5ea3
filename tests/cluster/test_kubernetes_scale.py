"""Hundreds of pods that run nothing, workers among them, and all of them replaced."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

import aiohttp
import pytest
from fastapi import FastAPI, Request, Response

from edge_llm.cluster.kubernetes import Kubernetes, client_of
from edge_llm.cluster.probe import Prober
from edge_llm.worker.bodies import proven_reply_of
from edge_llm.worker.client import WorkerClient
from edge_llm.worker.tickets import ticket_of
from tests.cluster.fake_apiserver import (
    NAMESPACE,
    FakeApiServer,
    Object,
    endpoint,
    endpoint_slice,
    kubeconfig,
    serving_api,
)
from tests.loopback import KEYS, listening, until
from tests.nodes import node_of

pytestmark = pytest.mark.anyio
NOTHING, WORKERS, A_SLICE, AT_ONCE = 400, 20, 100, 10


def any_worker(asked: list[str]) -> FastAPI:
    """Answers as whoever is asked for, as if each pod had an address of its own."""
    app = FastAPI()

    @app.get("/status")
    async def status(request: Request) -> Response:
        ticket = ticket_of(request.headers.get("authorization"))
        claims = ticket.split(".")[1]
        name = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["audience"]
        asked.append(name)
        return proven_reply_of(node_of(name, "decode").status, KEYS, ticket)

    return app


@dataclass
class Pods:
    """What the control plane writes while it replaces pods."""

    api: FakeApiServer
    port: int
    workers: dict[int, list[Object]] = field(default_factory=dict)

    async def write_nothings(self, generation: int, replaced: int = NOTHING) -> None:
        """Pods of which the first `replaced` are of this generation; nobody listens at their addresses."""
        for first in range(0, NOTHING, A_SLICE):
            pods = [
                endpoint(
                    f"fake-{generation if at < replaced else generation - 1}-{at}", f"127.7.{at // 200}.{at % 200}"
                )
                for at in range(first, first + A_SLICE)
            ]
            if first < replaced <= first + A_SLICE or replaced == NOTHING:
                await self.api.put(endpoint_slice(f"fake-{first}", pods, port=9))

    async def write_workers(self) -> None:
        pods = [pod for number in sorted(self.workers) for pod in self.workers[number]]
        await self.api.put(endpoint_slice("workers", pods, port=self.port))

    async def replace(self, number: int, generation: int) -> None:
        """One after the other, as a rolling update does: a new one that loads, that is ready, and no old one."""
        old = self.workers.get(number, [])
        for ready in (False, True):
            self.workers[number] = [*old, endpoint(f"w-{generation}-{number}", "127.0.0.1", ready=ready)]
            await self.write_workers()
        self.workers[number] = self.workers[number][-1:]
        await self.write_workers()


@asynccontextmanager
async def looking(discovery: Kubernetes) -> AsyncIterator[Prober]:
    """A prober with the gateway's own interval."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        client = WorkerClient(session, KEYS, "g", time.time, partial(next, map(str, count())))
        prober = Prober(discovery, client, 1.0, lambda _before, _after: None)
        async with discovery.watching(prober.news):
            await prober.probe_all()
            running = asyncio.create_task(prober.run())
            try:
                yield prober
            finally:
                running.cancel()
                with suppress(asyncio.CancelledError):
                    await running


def names(prober: Prober) -> set[str]:
    return {node.worker for node in prober.view.nodes}


async def test_after_a_rolling_restart_among_hundreds_that_run_nothing_the_view_is_right(tmp_path: Path) -> None:
    asked: list[str] = []
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(serving_api())
        address, _ = await stack.enter_async_context(listening(any_worker(asked)))
        pods = Pods(api, int(address.rpartition(":")[2]))
        await pods.write_nothings(0)
        for number in range(WORKERS):
            await pods.replace(number, 0)
        discovery = Kubernetes(partial(client_of, kubeconfig(tmp_path / "config", api)), NAMESPACE)
        prober = await stack.enter_async_context(looking(discovery))
        assert prober.places == NOTHING + WORKERS
        assert names(prober) == {f"w-0-{number}" for number in range(WORKERS)}
        for number in range(WORKERS):
            await pods.replace(number, 1)
        for replaced in range(AT_ONCE, NOTHING + 1, AT_ONCE):
            await pods.write_nothings(1, replaced)
        await until(lambda: names(prober) == {f"w-1-{number}" for number in range(WORKERS)})
        await until(lambda: prober.places == NOTHING + WORKERS)
        assert all(place.worker.startswith("fake-1-") for place, _ in prober.silent)
        lists = [asked for asked in api.asked if asked.verb == "list"]
        assert len(lists) == 1, "the watch told it all"
