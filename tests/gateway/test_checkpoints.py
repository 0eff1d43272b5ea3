"""What a client sees of checkpoints: nothing, but that a dead worker costs less."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from edge_llm.cluster.view import ClusterView, Node
from edge_llm.engine.simulated import SimulatedBackend, SimulatedSettings
from edge_llm.errors import Overloaded, WorkerUnreachable
from edge_llm.gateway.checkpoints import MAX_ON_THE_WAY, Checkpoints, able_to_keep, keeper_of
from edge_llm.gateway.metrics import ROLE, GatewayMetrics
from edge_llm.gateway.orders import Orders
from edge_llm.gateway.planner import Planner
from edge_llm.gateway.running import Job, Running
from edge_llm.gateway.scheduler import Plan
from edge_llm.gateway.session import Session, State
from edge_llm.worker.checkpoint import MAX_KEEPING
from edge_llm.worker.client import Peer, WorkerClient
from edge_llm.worker.messages import KeepReply, KeepRequest
from tests.gateway.conftest import COMPLETIONS, Service, asking, serving
from tests.loopback import CHUNK, DEADLINE_S, GREEDY, KEYS, prompt_of, running_cluster, settings_of, undisturbed, until
from tests.nodes import load_of, node_of, report_of
from tests.scrapes import families_of, value

pytestmark = pytest.mark.anyio
CACHE = 1 << 20
EVERY = 2 * CHUNK
MIXED = SimulatedSettings(n_ctx=512, slots=4, chunk_tokens=CHUNK, decode_run_s=0.005)
SLOW = SimulatedSettings(n_ctx=512, slots=4, serves_prompts=False, chunk_tokens=CHUNK, decode_run_s=0.005)
PROMPT = prompt_of(4 * CHUNK + 3)
TOKENS = 120
KV_BYTES = SimulatedBackend(settings_of("decode")).facts.kv_bytes_per_token


@pytest.fixture
async def keeping() -> AsyncIterator[Service]:
    """A gateway that takes checkpoints."""
    async with running_cluster() as cluster, serving(cluster, checkpoint_tokens=EVERY) as made:
        yield made


async def counted(service: Service, name: str, **labels: str) -> float:
    async with service.client.get("/metrics") as reply:
        return value(families_of(await reply.text()), name, **labels)


async def all_over(service: Service) -> None:
    """Every checkpoint that was begun has come to its end."""
    begun = sum(path == "/keep" for path, _ in service.cluster.heard)
    async with asyncio.timeout(DEADLINE_S):
        while await ended(service) < begun:  # noqa: ASYNC110 - a counter is read from outside
            await asyncio.sleep(0.002)


async def ended(service: Service) -> float:
    async with service.client.get("/metrics") as reply:
        samples = families_of(await reply.text())["edge_llm_checkpoints"].samples
    return sum(sample.value for sample in samples if sample.name.endswith("_total"))


def kept_tokens(service: Service) -> int:
    """Of all workers together, in positions."""
    return sum(node.worker.prefixes.used_bytes for node in service.cluster.nodes) // KV_BYTES


@pytest.mark.parametrize("mode", ["auto", "split"])
async def test_a_takeover_computes_only_what_came_after_the_last_checkpoint(keeping: Service, mode: str) -> None:
    await keeping.start("prefill", "p1", prefix_cache_bytes=CACHE)
    nodes = [await keeping.start("decode", name, SLOW) for name in ("d1", "d2")]
    async with keeping.streaming(COMPLETIONS, asking(PROMPT, mode, max_tokens=TOKENS)) as streamed:
        await streamed.heard(lambda heard: len(heard.chunks) > 3 * EVERY)
        await until(lambda: kept_tokens(keeping) >= len(PROMPT) + 3 * EVERY - 1)
        (busy,) = [node for node in nodes if node.slots_free < 4]
        busy.server.die()
        await streamed.whole()
    own = streamed.own
    assert own["token_ids"] == undisturbed(PROMPT, TOKENS)
    assert (own["replanned"], own["level"]) == (1, "exact")
    assert own["prefill_node"] == "p1", "who keeps the checkpoint reads the rest"
    assert own["prefill_cached_tokens"] >= len(PROMPT) + 3 * EVERY - CHUNK


async def test_the_decode_worker_that_kept_it_goes_on_by_itself(keeping: Service) -> None:
    nodes = [await keeping.start("mixed", name, MIXED, prefix_cache_bytes=CACHE) for name in ("m1", "m2")]
    async with keeping.streaming(COMPLETIONS, asking(PROMPT, "local", max_tokens=TOKENS)) as streamed:
        await streamed.heard(lambda heard: len(heard.chunks) > EVERY)
        await until(lambda: kept_tokens(keeping) >= len(PROMPT) + EVERY - 1)
        (busy,) = [node for node in nodes if node.slots_free < 4]
        busy.server.die()
        await streamed.whole()
    own = streamed.own
    assert own["token_ids"] == undisturbed(PROMPT, TOKENS)
    assert (own["replanned"], own["level"]) == (1, "exact")
    assert own["cached_tokens"] >= len(PROMPT) + EVERY - CHUNK


async def test_a_checkpoint_ships_what_is_new_since_the_one_before(keeping: Service) -> None:
    """The prefill worker has the prompt's KV: it computed it. What a checkpoint that came too late left out comes with
    the next one, and nothing comes twice."""
    keeper = await keeping.start("prefill", "p1", prefix_cache_bytes=CACHE)
    await keeping.start("decode", "d1", SLOW)
    streamed = await keeping.stream(COMPLETIONS, asking(PROMPT, "split", max_tokens=5 * EVERY - 1))
    await all_over(keeping)
    assert 2 <= await counted(keeping, "checkpoints_total", outcome="ok") <= 4
    shipped = await counted(keeping, "checkpoint_bytes_total") / KV_BYTES
    kept = await keeper.worker.prefixes.match("", [*PROMPT, *streamed.own["token_ids"]])
    assert shipped == kept.n_tokens - (len(PROMPT) - 1)
    assert shipped >= 2 * EVERY


async def test_without_the_setting_no_kv_is_copied(service: Service) -> None:
    await service.start("prefill", "p1", prefix_cache_bytes=CACHE)
    await service.start("decode", "d1", SLOW)
    await service.stream(COMPLETIONS, asking(PROMPT, "split", max_tokens=4 * EVERY))
    assert "/keep" not in {path for path, _ in service.cluster.heard}


async def test_who_asks_that_nothing_be_kept_is_not_checkpointed(keeping: Service) -> None:
    await keeping.start("prefill", "p1", prefix_cache_bytes=CACHE)
    await keeping.start("decode", "d1", SLOW)
    await keeping.stream(COMPLETIONS, asking(PROMPT, "split", max_tokens=4 * EVERY, cache_prompt=False))
    assert "/keep" not in {path for path, _ in keeping.cluster.heard}


async def test_a_keeper_that_dies_costs_the_answer_nothing(keeping: Service) -> None:
    keeper = await keeping.start("prefill", "p1", prefix_cache_bytes=CACHE)
    await keeping.start("decode", "d1", SLOW)
    async with keeping.streaming(COMPLETIONS, asking(PROMPT, "split", max_tokens=TOKENS)) as streamed:
        await until(lambda: "/keep" in {path for path, _ in keeping.cluster.heard})
        keeper.server.die()
        await streamed.whole()
    assert streamed.own["token_ids"] == undisturbed(PROMPT, TOKENS)
    assert streamed.own["replanned"] == 0


# -- who keeps


def able(worker: str, role: Any = "prefill", room: int = CACHE, **changes: Any) -> Node:
    return node_of(worker, role, load=load_of(prefix_limit_bytes=room), **changes)


def decoding_on(node: Node, request_id: str = "r", prompt: Sequence[int] = PROMPT) -> Running:
    job = Job(request_id, "m", tuple(prompt), TOKENS, GREEDY, (), (), "auto")
    running = Running(job, Session(request_id, State.DECODING), 0.0, 0.0)
    running.plan = Plan(node, ())
    return running


def chosen(
    *others: Node, held: dict[str, int] | None = None, decode: Node | None = None, request_id: str = "r"
) -> str | None:
    decode = decode or able("d0", "decode")
    allowed = able_to_keep(decoding_on(decode, request_id), ClusterView((decode, *others)))
    keeper = keeper_of(request_id, allowed, held or {})
    return keeper.worker if keeper else None


def test_the_worker_that_has_most_of_it_keeps_it() -> None:
    assert chosen(able("p1"), able("d1", "decode"), held={"d1": 2 * CHUNK, "p1": CHUNK}) == "d1"


def test_a_prefill_worker_comes_before_one_whose_streams_would_feel_it() -> None:
    assert chosen(able("d1", "decode", room=9 * CACHE), able("p1")) == "p1"


def test_workers_keep_answers_in_proportion_to_their_room() -> None:
    workers = able("p1"), able("p2"), able("p3", room=2 * CACHE)
    keepers = Counter(chosen(*workers, request_id=f"r{number}") for number in range(400))
    assert keepers.keys() == {"p1", "p2", "p3"}
    assert 80 <= keepers["p1"] <= 120
    assert 80 <= keepers["p2"] <= 120


def test_an_answer_stays_with_its_keeper_when_another_one_goes() -> None:
    workers = [able(name) for name in ("p1", "p2", "p3")]
    for number in range(20):
        keeper = chosen(*workers, request_id=f"r{number}")
        stayed = [node for node in workers if node.worker == keeper or node.worker == "p1"]
        assert chosen(*stayed, request_id=f"r{number}") == keeper


@pytest.mark.parametrize(
    "changes",
    [
        {"exactness_class": "c" * 64},
        {"compatibility": "c" * 64},
        {"level": "same-plan"},
        {"splits": False},
        {"is_ready": False},
        {"model": "n"},
        {"chunk_tokens": 2 * CHUNK},
        {"n_ctx": len(PROMPT) - 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_worker_whose_kv_would_not_be_the_same_keeps_nothing(changes: dict[str, Any]) -> None:
    assert chosen(able("p1", **changes)) is None
    assert chosen(able("p1")) == "p1"


def test_a_worker_without_room_for_all_of_it_keeps_nothing() -> None:
    assert chosen(able("p1", room=len(PROMPT) * 64 - 1)) is None
    assert chosen(able("p1", room=len(PROMPT) * 64)) == "p1"


def test_the_worker_that_runs_it_is_no_keeper_of_it() -> None:
    assert chosen() is None


@pytest.mark.parametrize("changes", [{"level": "same-plan"}, {"splits": False}])
def test_what_is_not_exact_or_does_not_travel_is_not_checkpointed(changes: dict[str, Any]) -> None:
    assert chosen(able("p1", **changes), decode=able("d0", "decode", **changes)) is None


def test_kv_that_came_from_another_class_is_not_checkpointed() -> None:
    decode, keeper = able("d0", "decode"), able("p1")
    running = decoding_on(decode)
    for is_same_class in (True, False):
        running.report = report_of(is_same_class=is_same_class)
        assert able_to_keep(running, ClusterView((decode, keeper))) == ([keeper] if is_same_class else [])


# -- whose turn it is


class Desk:
    """Checkpoints of answers that the test lets grow; a worker keeps one when the test says so."""

    def __init__(self, session: aiohttp.ClientSession, *nodes: Node) -> None:
        self.view = ClusterView(nodes)
        self.planner = Planner(clock=lambda: 0.0)
        self.planner.on_view(self.view)
        self.registry = CollectorRegistry()
        self.asked: list[tuple[str, KeepRequest]] = []
        self._replies: dict[str, asyncio.Future[KeepReply]] = {}
        orders = Orders(WorkerClient(session, KEYS, "g", lambda: 0.0, lambda: "nonce"), "g")
        metrics = GatewayMetrics(self.registry, "g")
        self.checkpoints = Checkpoints(self._keep, orders, self.planner, metrics, lambda: self.view, EVERY)

    async def _keep(self, peer: Peer, request: KeepRequest) -> KeepReply:
        self.asked.append((peer.worker, request))
        reply: asyncio.Future[KeepReply] = asyncio.get_running_loop().create_future()
        self._replies[request.request_id] = reply
        return await reply

    @property
    def order(self) -> list[str]:
        return [request.request_id for _, request in self.asked]

    async def grow(self, *answers: Running, tokens: int = 1) -> None:
        """By so many tokens, in step."""
        for _ in range(tokens):
            for running in answers:
                running.session.delivered.append(3)
                self.checkpoints.on_token(running)
        await settled()

    async def end(self, request_id: str, reply: KeepReply | Exception) -> None:
        if isinstance(reply, Exception):
            self._replies.pop(request_id).set_exception(reply)
        else:
            self._replies.pop(request_id).set_result(reply)
        await settled()

    def count(self, outcome: str) -> float:
        labels = {"model_name": "m", "role": ROLE, "node": "g", "outcome": outcome}
        return self.registry.get_sample_value("edge_llm_checkpoints_total", labels) or 0.0


KEPT = KeepReply(kept_tokens=0, fetched_bytes=0)


async def settled() -> None:
    """Tasks that can go on have done so."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """For signing only: nothing is sent."""
    async with aiohttp.ClientSession() as made:
        yield made


async def test_answers_that_are_due_together_have_their_turns(session: aiohttp.ClientSession) -> None:
    """Also when the first ones are due again before the last one had its turn."""
    node = able("d0", "decode")
    desk, answers = Desk(session, node, able("p1")), [decoding_on(node, f"r{number}") for number in range(4)]
    await desk.grow(*answers, tokens=EVERY - 1)
    assert desk.order == []
    await desk.grow(*answers)
    assert desk.order == ["r0"], "a worker gives one at once"
    for number in range(1, 4):
        await desk.grow(*answers, tokens=EVERY // 2)
        await desk.end(f"r{number - 1}", KEPT)
        assert desk.order[-1] == f"r{number}"
    await desk.end("r3", KEPT)
    await desk.end("r0", KEPT)
    assert desk.order == ["r0", "r1", "r2", "r3", "r0", "r1"]


async def test_a_checkpoint_that_was_late_takes_all_that_came_meanwhile(session: aiohttp.ClientSession) -> None:
    node = able("d0", "decode")
    desk, running = Desk(session, node, able("p1")), decoding_on(node)
    await desk.grow(running, tokens=EVERY)
    await desk.grow(running, tokens=EVERY + 3)
    assert desk.order == ["r"], "an answer has one on its way"
    await desk.end("r", KEPT)
    await desk.grow(running, tokens=EVERY - 1)
    assert [len(request.ids) - len(PROMPT) for _, request in desk.asked] == [EVERY, 2 * EVERY + 3]


async def test_one_worker_that_is_slow_holds_up_its_own_answers_only(session: aiohttp.ClientSession) -> None:
    assert MAX_ON_THE_WAY == MAX_KEEPING, "one keeper may have to take all of them"
    nodes = [able(f"d{number}", "decode") for number in range(MAX_ON_THE_WAY + 2)]
    desk, answers = Desk(session, *nodes, able("p1")), [decoding_on(node, f"r-{node.worker}") for node in nodes]
    second = decoding_on(nodes[0], "second")
    await desk.grow(answers[0], second, *answers[1:], tokens=EVERY)
    assert desk.order == [f"r-d{number}" for number in range(MAX_ON_THE_WAY)]
    await desk.end("r-d1", KEPT)
    assert desk.order[MAX_ON_THE_WAY:] == ["r-d4"], "the second of d0 waits for the first"
    await desk.end("r-d0", KEPT)
    assert desk.order[MAX_ON_THE_WAY:] == ["r-d4", "second"]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (WorkerUnreachable("gone"), "worker_unreachable"),
        (Overloaded("full", retry_after_s=1.0), "overloaded"),
        (RuntimeError("a bug of ours"), "gateway_failed"),
    ],
)
async def test_what_fails_is_counted_and_the_next_one_comes_in_its_time(
    session: aiohttp.ClientSession, error: Exception, outcome: str
) -> None:
    node = able("d0", "decode")
    desk, running = Desk(session, node, able("p1")), decoding_on(node)
    await desk.grow(running, tokens=EVERY)
    await desk.end("r", error)
    assert desk.count(outcome) == 1
    await desk.grow(running, tokens=EVERY - 1)
    assert desk.order == ["r"], "a keeper that is full or gone is not asked with every token"
    await desk.grow(running)
    assert desk.order == ["r", "r"]


@pytest.mark.parametrize("state", [State.DONE, State.CANCELLED, State.REPLANNING, State.PREFILLING])
async def test_what_does_not_run_any_more_loses_its_turn(session: aiohttp.ClientSession, state: State) -> None:
    node = able("d0", "decode")
    desk, answers = Desk(session, node, able("p1")), [decoding_on(node, f"r{number}") for number in range(3)]
    await desk.grow(*answers, tokens=EVERY)
    answers[1].session.state = state
    await desk.end("r0", KEPT)
    assert desk.order == ["r0", "r2"]


async def test_what_is_kept_is_known_to_the_planner(session: aiohttp.ClientSession) -> None:
    """As far as it was kept, and no further than there is KV, whatever the worker says."""
    node = able("d0", "decode")
    whole = 4 * CHUNK + EVERY
    for told, believed in ((0, 0), (3 * CHUNK, 3 * CHUNK), (1 << 30, whole - CHUNK)):
        desk, running = Desk(session, node, able("p1")), decoding_on(node, prompt=prompt_of(4 * CHUNK))
        await desk.grow(running, tokens=EVERY)
        await desk.end("r", KeepReply(kept_tokens=told, fetched_bytes=1))
        assert desk.planner.held(running, desk.view).get("p1", 0) == believed
        assert desk.count("ok") == 1


async def test_who_holds_it_is_asked_again(session: aiohttp.ClientSession) -> None:
    node, keepers = able("d0", "decode"), [able(f"p{number}") for number in range(8)]
    desk, running = Desk(session, node, *keepers), decoding_on(node)
    other = next(keeper for keeper in keepers if keeper.worker != chosen(*keepers))
    desk.planner.kept(running, other, PROMPT)
    await desk.grow(running, tokens=EVERY)
    assert [worker for worker, _ in desk.asked] == [other.worker]


async def test_after_the_end_nothing_is_begun(session: aiohttp.ClientSession) -> None:
    node = able("d0", "decode")
    desk, answers = Desk(session, node, able("p1")), [decoding_on(node, f"r{number}") for number in range(2)]
    await desk.grow(*answers, tokens=EVERY)
    await desk.checkpoints.close()
    await desk.grow(*answers, tokens=2 * EVERY)
    assert desk.order == ["r0"]
