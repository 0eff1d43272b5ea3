"""Who is in the view: those who answer under their own name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import aiohttp
import pytest
import structlog.testing
from fastapi import FastAPI, Request, Response
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.cluster.discovery import Discovery
from edge_llm.cluster.probe import FORGOTTEN_S, LEASE_S, MISSES, SILENT_A_ROUND, Known, Prober, due
from edge_llm.cluster.view import ClusterView, Node, Place
from edge_llm.errors import ConfigError
from edge_llm.worker.bodies import proven_reply_of
from edge_llm.worker.client import WorkerClient
from edge_llm.worker.messages import ErrorReply, WorkerStatus, encode
from edge_llm.worker.tickets import PROOF_HEADER, ticket_of
from tests.loopback import KEYS, LoopbackServer, listening, until
from tests.nodes import load_of, node_of

pytestmark = pytest.mark.anyio


@dataclass
class StatusOnly:
    """A worker that can say how it is and nothing else; `status` None: it fails. `proof`: sent instead of its own."""

    status: WorkerStatus | None
    place: Place = field(init=False)
    server: LoopbackServer = field(init=False)
    answers: asyncio.Event = field(default_factory=asyncio.Event)
    is_hanging_up: bool = False
    asked: int = 0
    proof: str | None = None
    proofs: list[str] = field(default_factory=list)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/status")
        async def status(request: Request) -> Response:
            self.asked += 1
            await self.answers.wait()
            if self.is_hanging_up:
                for connection in self.server.server_state.connections.copy():
                    connection.transport.abort()
            if self.status is None:
                return Response(encode(ErrorReply(code="worker_failed", message="out of order")), 503)
            reply = proven_reply_of(self.status, KEYS, ticket_of(request.headers.get("authorization")))
            self.proofs.append(reply.headers[PROOF_HEADER])
            reply.headers[PROOF_HEADER] = self.proofs[-1] if self.proof is None else self.proof
            return reply

        return app


class Written(Discovery):
    """Discovery of what the test wrote down; a problem is raised instead."""

    def __init__(self) -> None:
        self.written: tuple[Place, ...] = ()
        self.problem: Exception | None = None
        self.rounds = 0

    def places(self) -> tuple[Place, ...]:
        self.rounds += 1
        if self.problem is not None:
            raise self.problem
        return self.written


class Scene:
    """A prober, the workers it looks at, and every change it told of."""

    def __init__(self, session: aiohttp.ClientSession, stack: AsyncExitStack, interval_s: float = 0.005) -> None:
        self.discovery = Written()
        self.changes: list[tuple[ClusterView, ClusterView]] = []
        self.now_s = 100.0
        client = WorkerClient(session, KEYS, "g1", lambda: 0.0, partial(next, map(str, count())))
        self.prober = Prober(self.discovery, client, interval_s, self._on_change, lambda: self.now_s)
        self._stack = stack

    def _on_change(self, before: ClusterView, after: ClusterView) -> None:
        assert self.prober.view is after, "the view is told before it is true"
        self.changes.append((before, after))

    async def start(self, node: Node) -> StatusOnly:
        """A worker with this status; its place is written down."""
        worker = StatusOnly(node.status)
        worker.answers.set()
        address, worker.server = await self._stack.enter_async_context(listening(worker.app()))
        worker.place = Place(node.worker, address)
        self.discovery.written += (worker.place,)
        return worker

    async def probed(self, rounds: int = 1) -> list[str]:
        for _ in range(rounds):
            await self.prober.probe_all()
        return sorted(node.worker for node in self.prober.view.nodes)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        yield Scene(session, stack)


@pytest.fixture
async def seldom() -> AsyncIterator[Scene]:
    """A scene whose prober has no second round while a test lasts."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        yield Scene(session, stack, interval_s=3600)


@asynccontextmanager
async def probing(scene: Scene) -> AsyncIterator[None]:
    running = asyncio.create_task(scene.prober.run())
    try:
        yield
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def test_who_answers_is_in_the_view_with_place_status_and_time(scene: Scene) -> None:
    one, two = node_of("d1", "decode"), node_of("p1", "prefill")
    first, second = await scene.start(one), await scene.start(two)
    assert await scene.probed() == ["d1", "p1"]
    view = scene.prober.view
    assert view.node("d1") == Node(first.place, one.status, 100.0)
    assert view.node("p1") == Node(second.place, two.status, 100.0)
    assert [len(after.nodes) for _, after in scene.changes] == [1, 2]


async def test_a_new_status_takes_the_place_of_the_old_and_only_changes_are_told(scene: Scene) -> None:
    worker = await scene.start(node_of("d1", "decode"))
    await scene.probed(3)
    assert len(scene.changes) == 1, "nothing had changed, not even the time"
    busier = node_of("d1", "decode", load=load_of(sequences_running=3)).status
    worker.status = busier
    scene.now_s = 101.0
    await scene.probed()
    assert scene.prober.view.nodes == (Node(worker.place, busier, 101.0),)
    before, after = scene.changes[-1]
    assert (len(before.nodes), len(after.nodes)) == (1, 1)


async def test_a_worker_may_miss_some_rounds_and_leaves_after_too_many(scene: Scene) -> None:
    worker = await scene.start(node_of("d1", "decode"))
    status = worker.status
    await scene.probed()
    for _ in range(2):
        worker.status = None
        assert await scene.probed(MISSES - 1) == ["d1"]
        worker.status = status
        assert await scene.probed() == ["d1"], "an answer did not set the count back"
    worker.status = None
    assert await scene.probed(MISSES) == []
    worker.status = status
    assert await scene.probed() == ["d1"]


async def test_a_worker_that_nobody_listens_for_any_more_leaves_at_once(scene: Scene) -> None:
    worker, _stays = await scene.start(node_of("d1", "decode")), await scene.start(node_of("d2", "decode"))
    assert await scene.probed() == ["d1", "d2"]
    worker.server.die()
    assert await scene.probed() == ["d2"]


async def test_a_worker_that_has_been_silent_for_its_lease_leaves_at_the_next_miss(scene: Scene) -> None:
    worker = await scene.start(node_of("d1", "decode"))
    await scene.probed()
    worker.status = None
    scene.now_s += LEASE_S - 0.1
    assert await scene.probed() == ["d1"]
    scene.now_s += 0.1
    assert await scene.probed() == []


async def test_a_worker_whose_connection_is_reset_leaves_at_once(scene: Scene) -> None:
    worker = await scene.start(node_of("d1", "decode"))
    await scene.probed()
    worker.is_hanging_up = True
    assert await scene.probed() == []
    worker.is_hanging_up = False
    assert await scene.probed() == ["d1"]


async def test_a_silent_worker_holds_up_nobody(scene: Scene) -> None:
    silent, other = await scene.start(node_of("d1", "decode")), await scene.start(node_of("d2", "decode"))
    await scene.probed()
    silent.answers.clear()
    async with probing(scene):
        asked = other.asked
        await until(lambda: other.asked > asked + 5)
        assert silent.asked == 2, "it is not asked again while its answer is awaited"
        silent.answers.set()


async def test_a_worker_under_another_name_is_not_the_one_that_was_meant(scene: Scene) -> None:
    worker = await scene.start(node_of("d1", "decode"))
    assert await scene.probed() == ["d1"]
    worker.status = node_of("d9", "decode").status
    assert await scene.probed(MISSES - 1) == ["d1"]
    assert await scene.probed() == []
    assert await scene.probed(2) == [], "a stranger came in under its own name"


async def test_a_worker_that_was_taken_out_of_the_file_leaves_and_one_that_was_added_comes(scene: Scene) -> None:
    await scene.start(node_of("d1", "decode"))
    assert await scene.probed() == ["d1"]
    scene.discovery.written = ()
    assert await scene.probed() == []
    await scene.start(node_of("d2", "decode"))
    assert await scene.probed() == ["d2"]


async def test_while_the_file_is_bad_the_old_places_are_asked_all_the_same(scene: Scene) -> None:
    await scene.start(node_of("d1", "decode"))
    assert await scene.probed() == ["d1"]
    scene.discovery.problem = ConfigError("w.yaml is not YAML")
    with structlog.testing.capture_logs() as logs:
        assert await scene.probed(MISSES + 1) == ["d1"]
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["workers file"], (
        "once, not each time"
    )
    scene.prober.lost("d1")
    assert await scene.probed() == ["d1"], "lost while the file was bad, and never looked for again"
    scene.discovery.problem, scene.discovery.written = None, ()
    assert await scene.probed() == []


async def test_a_lost_worker_leaves_at_once_and_comes_back_when_it_answers(scene: Scene) -> None:
    await scene.start(node_of("d1", "decode"))
    await scene.probed()
    scene.prober.lost("d1")
    assert scene.prober.view.nodes == ()
    scene.prober.lost("d1")
    assert len(scene.changes) == 2, "losing what is lost is no change"
    assert await scene.probed() == ["d1"]


async def test_probing_goes_on_round_after_round_whatever_happens_in_one(scene: Scene) -> None:
    worker = await scene.start(node_of("d1", "decode"))
    scene.discovery.problem = RuntimeError("a bug in discovery")
    async with probing(scene):
        await until(lambda: scene.discovery.rounds > 2)
        assert scene.prober.view.nodes == ()
        scene.discovery.problem = None
        await until(lambda: len(scene.prober.view.nodes) == 1)
        worker.server.die()
        await until(lambda: not scene.prober.view.nodes)


# -- who is it


@pytest.mark.parametrize("proof", ["", "0" * 64, "\xff"], ids=["none", "another", "no hex"])
async def test_who_does_not_prove_to_have_the_cluster_key_is_no_worker(scene: Scene, proof: str) -> None:
    forged = await scene.start(node_of("d1", "decode"))
    forged.proof = proof
    assert await scene.probed(2) == []
    ((place, why),) = scene.prober.silent
    assert place == forged.place
    assert "does not prove that it has the cluster key" in why


async def test_another_program_at_a_workers_address_is_called_that(scene: Scene) -> None:
    app = FastAPI()
    async with listening(app) as (address, _):
        scene.discovery.written = (Place("d1", address),)
        assert await scene.probed() == []
        ((_place, why),) = scene.prober.silent
        assert f"what answers at {address} as worker d1, with HTTP status 404, is no worker" in why


async def test_a_proof_is_good_for_one_answer_only(scene: Scene) -> None:
    forged = await scene.start(node_of("d1", "decode"))
    assert await scene.probed() == ["d1"]
    forged.proof = forged.proofs[0]
    assert await scene.probed(MISSES) == []


async def test_what_is_wrong_with_a_place_is_told_once_and_again_when_it_is_something_else(scene: Scene) -> None:
    with structlog.testing.capture_logs() as logged:
        worker = await scene.start(node_of("d1", "decode"))
        worker.status = None
        await scene.probed(MISSES + 2)
        worker.status, worker.proof = node_of("d1", "decode").status, ""
        await scene.probed(2)
    said = [line["message"] for line in logged if line["event"] == "worker does not answer"]
    assert ["out of order" in message for message in said] == [True, False]
    assert "cluster key" in said[1]


# -- news, and places that never answer


async def test_what_discovery_has_news_of_is_asked_at_once(seldom: Scene) -> None:
    first = await seldom.start(node_of("d1", "decode"))
    async with probing(seldom):
        await until(lambda: len(seldom.prober.view.nodes) == 1)
        await seldom.start(node_of("d2", "decode"))
        seldom.prober.news(["d2"])
        await until(lambda: len(seldom.prober.view.nodes) == 2)
        assert first.asked == 1, "nobody had news of it"
        seldom.discovery.written = (first.place,)
        seldom.prober.news(["d2"])
        await until(lambda: len(seldom.prober.view.nodes) == 1)


async def test_news_of_a_place_that_is_being_asked_is_not_lost(scene: Scene) -> None:
    worker = await scene.start(node_of("d1", "decode"))
    worker.status, answer = None, worker.status
    worker.answers.clear()
    async with probing(scene):
        await until(lambda: worker.asked == 1)
        scene.prober.news(["d1"])
        worker.answers.set()
        await until(lambda: worker.asked > 1)
        worker.status = answer
        await until(lambda: len(scene.prober.view.nodes) == 1)


async def test_news_while_nothing_can_be_looked_up_breaks_nothing(scene: Scene) -> None:
    await scene.start(node_of("d1", "decode"))
    async with probing(scene):
        scene.discovery.problem = RuntimeError("a bug in discovery")
        scene.prober.news(["d1"])
        await until(lambda: scene.discovery.rounds > 3)
        scene.discovery.problem = None
        await until(lambda: len(scene.prober.view.nodes) == 1)


async def test_a_worker_that_moved_is_not_believed_to_be_where_it_was(scene: Scene) -> None:
    old = await scene.start(node_of("d1", "decode"))
    assert await scene.probed() == ["d1"]
    scene.discovery.written = ()
    new = await scene.start(node_of("d1", "decode"))
    new.status = None
    assert await scene.probed() == []
    new.status = old.status
    assert await scene.probed() == ["d1"]
    assert scene.prober.view.nodes[0].place == new.place


async def test_places_that_are_not_named_any_more_are_forgotten(scene: Scene) -> None:
    for number in range(3):
        worker = await scene.start(node_of(f"d{number}", "decode"))
        worker.status = None
    await scene.probed()
    assert (scene.prober.places, len(scene.prober.silent)) == (3, 3)
    scene.discovery.written = ()
    await scene.probed()
    assert (scene.prober.places, len(scene.prober.silent)) == (0, 0)


def place_of(number: int) -> Place:
    return Place(f"d{number}", f"10.0.0.1:{number}")


@given(st.lists(st.none() | st.floats(0, 200), max_size=100), st.integers(0, 100))
def test_every_silent_place_has_its_turn_and_they_share_a_bounded_number(
    answered_s: list[float | None], asked: int
) -> None:
    now_s = 200.0
    known = {
        place_of(number): Known(turn=number + 1 if number < asked else 0, answered_s=at_s if number < asked else None)
        for number, at_s in enumerate(answered_s)
    }
    lively = {
        place
        for place, what in known.items()
        if not what.turn or (what.answered_s is not None and now_s - what.answered_s <= FORGOTTEN_S)
    }
    turn, seen = 1000, set[Place]()
    for _ in range(-(-(len(known) - len(lively)) // SILENT_A_ROUND)):
        asked_now = due(known, now_s)
        assert lively <= set(asked_now)
        silent = [place for place in asked_now if place not in lively]
        assert len(silent) <= SILENT_A_ROUND
        seen |= set(silent)
        for place in silent:
            turn += 1
            known[place].turn = turn
    assert seen == known.keys() - lively


def test_few_silent_places_are_asked_every_round() -> None:
    known = {place_of(number): Known(turn=number + 1, misses=50) for number in range(SILENT_A_ROUND)}
    assert set(due(known, 0.0)) == known.keys()
