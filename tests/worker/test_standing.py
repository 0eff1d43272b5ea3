"""What an operator may change on a worker that runs: whether it takes work, and its role. Over real sockets."""

from __future__ import annotations

import asyncio

import pytest

from edge_llm.engine.simulated import SimulatedSettings
from edge_llm.errors import Draining, InvalidRequest
from edge_llm.worker.messages import PROTOCOL
from tests.loopback import CHUNK, Cluster, Node, prompt_of, undisturbed, until

pytestmark = pytest.mark.anyio
SLOW = SimulatedSettings(n_ctx=512, slots=4, chunk_tokens=CHUNK, decode_run_s=0.01)


async def drained(cluster: Cluster, node: Node) -> None:
    status = await cluster.gateway.client.drain(node.peer, is_draining=True)
    assert (status.is_draining, status.is_ready, status.protocol) == (True, False, PROTOCOL)


async def test_a_worker_that_was_told_to_drain_gives_its_sequence_to_another_one(cluster: Cluster) -> None:
    leaving = await cluster.start("decode", "d1", SLOW, prefix_cache_bytes=1 << 20)
    other = await cluster.start("decode", "d2", SLOW, prefix_cache_bytes=1 << 20)
    prompt = prompt_of(3 * CHUNK)
    begun = await cluster.gateway.ask(leaving.peer, prompt, max_tokens=60, request_id="moving")
    await begun.first_token()
    await drained(cluster, leaving)
    await until(lambda: begun.failed is not None)
    assert begun.failed is not None
    assert begun.failed.code == "draining"
    with pytest.raises(Draining, match="d1 is draining"):
        await cluster.gateway.ask(leaving.peer, prompt)
    moved = await (
        await cluster.gateway.ask(
            other.peer,
            prompt,
            [leaving.peer],
            delivered=begun.ids,
            max_tokens=60,
            request_id="moving",
            epoch=1,
            only_stored=True,
        )
    ).over()
    assert begun.ids + moved.ids == undisturbed(prompt, 60)
    assert moved.report.computed_tokens == 0, "its KV was fetched from the worker that drains"


async def test_draining_can_be_taken_back_and_begun_again(cluster: Cluster) -> None:
    node = await cluster.start("decode", "d1", SLOW)
    await drained(cluster, node)
    status = await cluster.gateway.client.drain(node.peer, is_draining=False)
    assert (status.is_draining, status.is_ready) == (False, True)
    answer = await cluster.gateway.ask(node.peer, prompt_of(4), max_tokens=400)
    await answer.first_token()
    await drained(cluster, node)
    await until(lambda: answer.failed is not None)
    assert node.slots_free == 4


async def test_what_was_not_handed_over_when_draining_is_taken_back_stays(cluster: Cluster) -> None:
    node = await cluster.start("decode", "d1", SLOW)
    answer = await cluster.gateway.ask(node.peer, prompt_of(4), max_tokens=40)
    await answer.first_token()
    # both before the event loop runs again: nothing could be handed over in between
    node.worker.standing.drain()
    node.worker.standing.resume()
    assert (await answer.over()).ids == undisturbed(prompt_of(4), 40)


async def test_the_end_of_the_process_cannot_be_taken_back(cluster: Cluster) -> None:
    node = await cluster.start("decode", "d1", SLOW)
    await node.worker.drain()
    with pytest.raises(Draining, match="stopping"):
        await cluster.gateway.client.drain(node.peer, is_draining=False)


async def test_a_worker_told_to_drain_before_it_is_stopped_has_nothing_left_to_do(cluster: Cluster) -> None:
    node = await cluster.start("decode", "d1", SLOW)
    answer = await cluster.gateway.ask(node.peer, prompt_of(4), max_tokens=400)
    await answer.first_token()
    await drained(cluster, node)
    await until(lambda: answer.failed is not None)
    async with asyncio.timeout(0.9):  # its drain_s is 1
        await node.worker.drain()
    assert answer.failed is not None
    assert answer.failed.code == "draining"


async def test_a_worker_stands_for_another_role_at_once_and_what_runs_goes_on(cluster: Cluster) -> None:
    node = await cluster.start("mixed", "m1", SLOW)
    answer = await cluster.gateway.ask(node.peer, prompt_of(4), max_tokens=40)
    await answer.first_token()
    assert (await cluster.gateway.client.role(node.peer, "prefill")).role == "prefill"
    assert (await answer.over()).ids == undisturbed(prompt_of(4), 40)
    assert (await cluster.gateway.client.status(node.peer)).role == "prefill"
    assert (await cluster.gateway.client.role(node.peer, "decode")).role == "decode"


async def test_a_role_that_the_engine_cannot_fill_is_refused_with_what_is_missing(cluster: Cluster) -> None:
    reader, writer = await cluster.start("prefill", "p1"), await cluster.start("decode", "d1")
    with pytest.raises(InvalidRequest, match="p1 cannot decode: it was loaded without slots"):
        await cluster.gateway.client.role(reader.peer, "decode")
    with pytest.raises(InvalidRequest, match="d1 cannot read prompts for others"):
        await cluster.gateway.client.role(writer.peer, "mixed")
    assert (await cluster.gateway.client.status(reader.peer)).role == "prefill"
    assert (await cluster.gateway.client.status(writer.peer)).role == "decode"
