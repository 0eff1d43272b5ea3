"""What a client sees of checkpoints: nothing, but that a dead worker costs less."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from edge_llm.cluster.view import ClusterView, Node
from edge_llm.engine.simulated import SimulatedBackend, SimulatedSettings
from edge_llm.gateway.checkpoints import keeper_for
from edge_llm.gateway.running import Job, Running
from edge_llm.gateway.scheduler import Plan
from edge_llm.gateway.session import Session
from tests.gateway.conftest import COMPLETIONS, Service, asking, serving
from tests.loopback import CHUNK, GREEDY, prompt_of, running_cluster, settings_of, undisturbed, until
from tests.nodes import load_of, node_of
from tests.scrapes import families_of, value

pytestmark = pytest.mark.anyio
CACHE = 1 << 20
EVERY = 2 * CHUNK
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


async def test_a_checkpoint_ships_what_is_new_since_the_one_before(keeping: Service) -> None:
    """The prefill worker has the prompt's KV: it computed it. What a checkpoint that came too late left out comes with
    the next one, and nothing comes twice."""
    await keeping.start("prefill", "p1", prefix_cache_bytes=CACHE)
    await keeping.start("decode", "d1", SLOW)
    await keeping.stream(COMPLETIONS, asking(PROMPT, "split", max_tokens=5 * EVERY - 1))
    taken = await counted(keeping, "checkpoints_total", outcome="ok")
    assert 2 <= taken <= 4
    shipped = await counted(keeping, "checkpoint_bytes_total") / (EVERY * KV_BYTES)
    assert shipped == int(shipped)
    assert taken <= shipped <= 4


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
        await streamed.heard(lambda heard: len(heard.chunks) > EVERY // 2)
        keeper.server.die()
        await streamed.whole()
    assert streamed.own["token_ids"] == undisturbed(PROMPT, TOKENS)
    assert streamed.own["replanned"] == 0


# -- who keeps


def able(worker: str, role: Any = "prefill", room: int = CACHE, **changes: Any) -> Node:
    return node_of(worker, role, load=load_of(prefix_limit_bytes=room), **changes)


def decoding_on(node: Node) -> Running:
    job = Job("r", "m", tuple(PROMPT), TOKENS, GREEDY, (), (), "auto")
    running = Running(job, Session("r"), 0.0, 0.0)
    running.plan = Plan(node, ())
    return running


def chosen(*others: Node, held: dict[str, int] | None = None, decode: Node | None = None) -> str | None:
    decode = decode or able("d0", "decode")
    keeper = keeper_for(decoding_on(decode), ClusterView((decode, *others)), held or {})
    return keeper.worker if keeper else None


def test_the_worker_that_has_most_of_it_keeps_it() -> None:
    assert chosen(able("p1"), able("d1", "decode"), held={"d1": 2 * CHUNK, "p1": CHUNK}) == "d1"


def test_a_prefill_worker_comes_before_one_whose_streams_would_feel_it() -> None:
    assert chosen(able("d1", "decode", room=2 * CACHE), able("p1")) == "p1"


def test_more_room_comes_before_less() -> None:
    assert chosen(able("p1"), able("p2", room=2 * CACHE)) == "p2"


@pytest.mark.parametrize(
    "changes",
    [{"exactness_class": "c" * 64}, {"level": "same-plan"}, {"splits": False}, {"is_ready": False}, {"model": "n"}],
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


def test_what_is_not_exact_is_not_checkpointed() -> None:
    assert chosen(able("p1"), decode=able("d0", "decode", level="same-plan")) is None
