"""A small cluster in one process: workers with the simulated engine on loopback ports, and a gateway that calls them.

Everything between gateway and workers is real: sockets, uvicorn, tickets, frames, the engine thread. Tokens and KV are
hashes of all that came before, so that a wrong byte of KV gives wrong tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Final, Literal

import aiohttp
import uvicorn
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from edge_llm.config import WorkerConfig
from edge_llm.engine.backend import Interrupted
from edge_llm.engine.sequencer import Sequencer
from edge_llm.engine.simulated import SimulatedBackend, SimulatedSettings, SimulatedVocabulary, create_simulated
from edge_llm.gateway.wire import bound_connections
from edge_llm.kv.codec import StateBlob
from edge_llm.kv.snapshot import ids_digest
from edge_llm.request import FinishReason, Generation, SamplingParams
from edge_llm.serving import bind
from edge_llm.worker.app import create_app
from edge_llm.worker.client import Peer, WorkerClient
from edge_llm.worker.messages import DecodeRequest, EventBatch, Failed, PrefillCandidate, PromptReport, Role, Sampling
from edge_llm.worker.pull import PATIENCE, Patience
from edge_llm.worker.tickets import KeyRing
from edge_llm.worker.worker import Worker

KEYS: Final = KeyRing.parse("test1:" + "5a" * 32, "the tests' key")
CHUNK: Final = 8
DEADLINE_S: Final = 30.0
GREEDY: Final = SamplingParams(temperature=0.0)
SAMPLED: Final = SamplingParams(temperature=0.9, top_p=0.95, repeat_penalty=1.1, seed=(1 << 64) - 3)


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    """A prompt of the simulated vocabulary; prompts of different seeds differ from the first token on."""
    return [3 + (seed * 97 + at * 31 + at * at * 7) % 256 for at in range(tokens)]


def undisturbed(
    prompt_ids: Sequence[int], max_tokens: int, sampling: SamplingParams = GREEDY, delivered: int = 0
) -> list[int]:
    """The tokens of an answer by the engine alone, without workers, from token `delivered` on."""
    engine, _ = create_simulated(SimulatedSettings(slots=1))
    engine.begin(0, Generation("alone", 0, tuple(prompt_ids), max_tokens, sampling))
    ids: list[int] = []
    while engine.has_work:
        ids += [event.token_id for event in engine.step().events]
    return ids[delivered:]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread or task brings about."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0.002)


class SkippingClock:
    """Monotonic time that a test can move forward."""

    def __init__(self) -> None:
        self.skipped_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.skipped_s


class HeldBackend(SimulatedBackend):
    """Computes prompts for others only after `go_on` was set: a prefill worker caught in the middle of its work."""

    def __init__(self, settings: SimulatedSettings) -> None:
        super().__init__(settings)
        self.go_on = threading.Event()
        self.is_held = threading.Event()
        self._is_broken_off = threading.Event()

    def serve_prompt(self, ids: Sequence[int], p0: int) -> None:
        self.is_held.set()
        while not self.go_on.wait(0.002):
            if self._is_broken_off.is_set():
                raise Interrupted
        super().serve_prompt(ids, p0)

    def interrupt(self) -> None:
        self._is_broken_off.set()
        super().interrupt()

    def arm(self) -> None:
        self._is_broken_off.clear()
        super().arm()


class CountingBackend(SimulatedBackend):
    """Remembers how many positions each restore put in: what reached the engine of what came over the wire."""

    def __init__(self, settings: SimulatedSettings) -> None:
        super().__init__(settings)
        self.restored: list[int] = []

    def restore(self, slot: int, blob: StateBlob) -> None:
        self.restored.append(blob.filled_to)
        super().restore(slot, blob)


class LoopbackServer(uvicorn.Server):
    """uvicorn inside the running event loop; `answers` is set once the port answers."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.answers = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.answers.set()

    async def main_loop(self) -> None:
        """uvicorn's own looks ten times a second whether it should end; a few hundred tests wait for that."""
        await self.on_tick(0)
        while not self.should_exit:  # noqa: ASYNC110 - a flag, set by whoever wants the end
            await asyncio.sleep(0.01)

    def die(self) -> None:
        """What a killed process looks like from outside: every connection is reset, nobody listens any more."""
        for listener in self.servers:
            listener.close()
        for connection in self.server_state.connections.copy():
            connection.transport.abort()
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def listening(
    app: ASGIApp, http: type[asyncio.Protocol] | Literal["auto"] = "auto", stall_s: float | None = None
) -> AsyncIterator[tuple[str, LoopbackServer]]:
    """An app on a loopback port; gives `ip:port` and the server. With `stall_s` connections are bounded as a gateway's
    are."""
    bound = bind("127.0.0.1", 0)
    if stall_s is not None:
        bound_connections(bound, stall_s)
    config = uvicorn.Config(app, http=http, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=2)
    server = LoopbackServer(config)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    starting = asyncio.create_task(server.answers.wait())
    try:
        await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
        assert server.started, "the app did not start; see its log"
        yield "{}:{}".format(*bound.getsockname()), server
    finally:
        starting.cancel()
        server.should_exit = True
        await serving
        bound.close()


@dataclass(slots=True)
class Answer:
    """What a gateway heard about one request so far. `text` and `indexes` belong to `ids`, token by token."""

    request_id: str
    ids: list[int] = field(default_factory=list)
    indexes: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    progress: list[tuple[int, int]] = field(default_factory=list)
    reports: list[PromptReport] = field(default_factory=list)
    failed: Failed | None = None
    lost: Exception | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    @property
    def report(self) -> PromptReport:
        (report,) = self.reports
        return report

    @property
    def is_over(self) -> bool:
        return self.finish_reason is not None or self.failed is not None

    async def over(self) -> Answer:
        await self._until(lambda: self.is_over)
        assert self.failed is None, self.failed
        return self

    async def first_token(self) -> None:
        await self._until(lambda: bool(self.ids))

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                if self.lost is not None:
                    raise AssertionError("the gateway cannot hear its workers any more") from self.lost
                self.changed.clear()
                await self.changed.wait()


class Gateway:
    """Asks workers, reads their event streams, sorts what they say by request and epoch."""

    def __init__(self, session: aiohttp.ClientSession, name: str) -> None:
        self._numbers = itertools.count()
        self.name = name
        self.client = WorkerClient(session, KEYS, name, time.time, lambda: f"{name}-{next(self._numbers)}")
        self._answers: dict[tuple[str, int], Answer] = {}
        self._listeners: dict[Peer, asyncio.Task[None]] = {}

    def listen(self, peer: Peer) -> None:
        self._listeners[peer] = asyncio.create_task(self._listen(peer))

    async def leave(self) -> None:
        """Hang up on all workers."""
        for task in self._listeners.values():
            task.cancel()
        await asyncio.gather(*self._listeners.values(), return_exceptions=True)

    def candidate(
        self,
        peer: Peer,
        request_id: str,
        ids: Sequence[int],
        tenant: str = "",
        only_stored: bool = False,
        holder: Peer | None = None,
    ) -> PrefillCandidate:
        ticket = self.client.prefill_ticket(peer, request_id, ids_digest(ids), tenant, holder)
        return PrefillCandidate(worker=peer.worker, address=peer.address, ticket=ticket, only_stored=only_stored)

    async def ask(
        self,
        peer: Peer,
        prompt_ids: Sequence[int],
        via: Sequence[Peer] = (),
        *,
        max_tokens: int = 8,
        sampling: SamplingParams = GREEDY,
        delivered: Sequence[int] = (),
        request_id: str = "",
        epoch: int = 0,
        tenant: str = "",
        cache_prompt: bool = True,
        only_stored: bool = False,
        time_left_s: float = 0.0,
        candidates: Sequence[PrefillCandidate] = (),
        holder: Peer | None = None,
        must_split: bool = False,
    ) -> Answer:
        """POST /decode; `via` are the prefill candidates in order, or `candidates` with tickets of the test's own.
        `holder` (`peer` itself) is where they may fetch what is before."""
        request_id = request_id or f"r{next(self._numbers)}"
        context = [*prompt_ids, *delivered]
        answer = self._answers[request_id, epoch] = Answer(request_id)
        request = DecodeRequest(
            request_id=request_id,
            epoch=epoch,
            gateway=self.name,
            prompt_ids=list(prompt_ids),
            delivered_ids=list(delivered),
            max_tokens=max_tokens,
            sampling=_on_the_wire(sampling),
            candidates=list(candidates)
            or [self.candidate(prefill, request_id, context, tenant, only_stored, peer) for prefill in via],
            holder=self.candidate(holder or peer, request_id, context, tenant, True),
            tenant=tenant,
            cache_prompt=cache_prompt,
            must_split=must_split,
            time_left_s=time_left_s,
        )
        await self.client.decode(peer, request)
        return answer

    async def _listen(self, peer: Peer) -> None:
        try:
            async for batch in self.client.events(peer):
                for request in self._sort(batch):
                    self._answers[request].changed.set()
        except Exception as error:
            for answer in self._answers.values():
                answer.lost = answer.lost or error
                answer.changed.set()
            raise

    def _sort(self, batch: EventBatch) -> set[tuple[str, int]]:
        touched: set[tuple[str, int]] = set()
        for prompted in batch.prompted:
            self._answers[prompted.request_id, prompted.epoch].reports.append(prompted.report)
        for token in batch.tokens:
            answer = self._answers[token.request_id, token.epoch]
            assert answer.reports, "a token came before its prompt's report"
            answer.ids.append(token.token_id)
            answer.indexes.append(token.index)
            answer.text += token.text
            answer.finish_reason = token.finish_reason
            touched.add((token.request_id, token.epoch))
        for progress in batch.progress:
            self._answers[progress.request_id, progress.epoch].progress.append((progress.done, progress.total))
        for failed in batch.failed:
            self._answers[failed.request_id, failed.epoch].failed = failed
            touched.add((failed.request_id, failed.epoch))
        return touched


def _on_the_wire(sampling: SamplingParams) -> Sampling:
    return Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        repeat_penalty=sampling.repeat_penalty,
        seed=str(sampling.seed),
    )


@dataclass(frozen=True, slots=True)
class Node:
    """A running worker and how to reach it."""

    worker: Worker
    peer: Peer
    server: LoopbackServer

    @property
    def slots_free(self) -> int:
        assert self.worker.decode is not None
        return self.worker.decode.slots_free


class Hearing:
    """Writes down which calls a worker got, path and headers."""

    def __init__(self, app: ASGIApp, heard: list[tuple[str, Headers]]) -> None:
        self._app, self._heard = app, heard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            self._heard.append((scope["path"], Headers(scope=scope)))
        await self._app(scope, receive, send)


class Cluster:
    """Starts workers, and gateways that listen to those that decode; use the fixture `cluster` or `running_cluster`."""

    def __init__(self, session: aiohttp.ClientSession, stack: AsyncExitStack) -> None:
        self.session = session
        self._stack = stack
        self._nodes: list[Node] = []
        self.heard: list[tuple[str, Headers]] = []
        self._servers: list[LoopbackServer] = []
        self.gateway = Gateway(session, "g1")
        self._gateways = [self.gateway]

    async def start(
        self,
        role: Role,
        name: str,
        settings: SimulatedSettings | None = None,
        *,
        backend: SimulatedBackend | None = None,
        clock: Callable[[], float] = time.monotonic,
        patience: Patience = PATIENCE,
        prefix_cache_bytes: int = 0,
        handoff: Literal["overlapped", "serialized"] = "overlapped",
    ) -> Node:
        settings = settings or settings_of(role)
        engine = Sequencer(backend or SimulatedBackend(settings), SimulatedVocabulary())
        config = WorkerConfig(name=name, role=role, drain_s=1.0, prefix_cache_bytes=prefix_cache_bytes, handoff=handoff)
        worker = Worker(config, engine, SimulatedVocabulary(), KEYS, monotonic=clock, patience=patience)
        app = create_app(worker)
        app.add_middleware(Hearing, heard=self.heard)
        address, server = await self._stack.enter_async_context(listening(app))
        self._servers.append(server)
        node = Node(worker, Peer(name, address), server)
        self._nodes.append(node)
        if worker.decode is not None:
            self.gateway.listen(node.peer)
        return node

    @property
    def nodes(self) -> Sequence[Node]:
        return self._nodes

    def second_gateway(self) -> Gateway:
        gateway = Gateway(self.session, "g2")
        self._gateways.append(gateway)
        for node in self._nodes:
            if node.worker.decode is not None:
                gateway.listen(node.peer)
        return gateway

    async def stop(self) -> None:
        """Tell all servers at once, after hanging up: open event streams would hold up their end."""
        for gateway in self._gateways:
            await gateway.leave()
        for server in self._servers:
            server.should_exit = True


def settings_of(role: Role) -> SimulatedSettings:
    """What a worker of this role simulates: small chunks, so that a short prompt has several."""
    slots = 0 if role == "prefill" else 4
    return SimulatedSettings(n_ctx=512, slots=slots, serves_prompts=role != "decode", chunk_tokens=CHUNK)


@asynccontextmanager
async def running_cluster() -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        made = Cluster(session, stack)
        try:
            yield made
        finally:
            await made.stop()
