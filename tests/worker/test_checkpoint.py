"""Checkpoints over real sockets: KV of a sequence that runs elsewhere comes here, and nothing else does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from edge_llm.engine.simulated import SimulatedBackend, SimulatedSettings
from edge_llm.errors import EdgeLLMError, InvalidRequest, Overloaded, PrefillFailed, WorkerError
from edge_llm.worker.client import Peer
from edge_llm.worker.messages import KeepReply, KeepRequest
from tests.loopback import CHUNK, Answer, Cluster, Node, prompt_of, settings_of, undisturbed, until

pytestmark = pytest.mark.anyio
CACHE = 1 << 20
TOKENS = 400
SLOW = SimulatedSettings(n_ctx=512, slots=4, serves_prompts=False, chunk_tokens=CHUNK, decode_run_s=0.005)
PROMPT = prompt_of(3 * CHUNK + 5)
KV_BYTES = SimulatedBackend(settings_of("decode")).facts.kv_bytes_per_token


async def begun(cluster: Cluster, tokens: int = 2 * CHUNK + 1) -> tuple[Node, Answer]:
    """A worker and its stream, which has so many tokens and goes on for long."""
    source = await cluster.start("decode", "d1", SLOW)
    answer = await cluster.gateway.ask(source.peer, PROMPT, max_tokens=TOKENS, request_id="r")
    await until(lambda: len(answer.ids) >= tokens)
    return source, answer


async def keeping(cluster: Cluster, keeper: Node, source: Peer, ids: Sequence[int], request_id: str = "r") -> KeepReply:
    candidate = cluster.gateway.candidate(source, request_id, ids, only_stored=True)
    request = KeepRequest(request_id=request_id, ids=list(ids), source=candidate)
    return await cluster.gateway.client.keep(keeper.peer, request)


async def test_a_running_sequence_is_kept_as_far_as_it_is_and_goes_on(cluster: Cluster) -> None:
    source, answer = await begun(cluster)
    keeper = await cluster.start("prefill", "p1", prefix_cache_bytes=CACHE)
    ids = [*PROMPT, *answer.ids]
    reply = await keeping(cluster, keeper, source.peer, ids)
    assert reply == KeepReply(kept_tokens=len(ids) - 1, fetched_bytes=(len(ids) - 1) * KV_BYTES)
    later = await cluster.start("decode", "d2")
    taken = await (await cluster.gateway.ask(later.peer, ids, [keeper.peer], max_tokens=8, must_split=True)).over()
    assert taken.report.prefill_cached_tokens == len(ids) - 1
    assert taken.ids == undisturbed(PROMPT, TOKENS)[len(ids) - len(PROMPT) :][:8]
    assert (await answer.over()).ids == undisturbed(PROMPT, TOKENS)


async def test_only_what_is_new_travels(cluster: Cluster) -> None:
    source, answer = await begun(cluster)
    keeper = await cluster.start("prefill", "p1", prefix_cache_bytes=CACHE)
    first = [*PROMPT, *answer.ids]
    await keeping(cluster, keeper, source.peer, first)
    await until(lambda: len(answer.ids) >= 5 * CHUNK)
    second = [*PROMPT, *answer.ids]
    reply = await keeping(cluster, keeper, source.peer, second)
    assert reply == KeepReply(kept_tokens=len(second) - 1, fetched_bytes=(len(second) - len(first)) * KV_BYTES)
    assert (await keeping(cluster, keeper, source.peer, second)).fetched_bytes == 0


async def test_a_sequence_that_does_not_run_there_gives_nothing(cluster: Cluster) -> None:
    source, answer = await begun(cluster)
    keeper = await cluster.start("prefill", "p1", prefix_cache_bytes=CACHE)
    others = [*PROMPT, *(1 + token if token < 200 else 3 for token in answer.ids)]
    ahead = [*PROMPT, *undisturbed(PROMPT, TOKENS)]
    for ids, request_id in ((others, "r"), ([*PROMPT, *answer.ids], "nobody"), (ahead, "r")):
        with pytest.raises(PrefillFailed, match="the rest is gone"):
            await keeping(cluster, keeper, source.peer, ids, request_id)
    assert keeper.worker.prefixes.used_bytes == 0
    assert (await answer.over()).ids == undisturbed(PROMPT, TOKENS)


async def test_a_worker_without_room_says_so_and_fetches_nothing(cluster: Cluster) -> None:
    source, answer = await begun(cluster)
    keeper = await cluster.start("prefill", "p1", prefix_cache_bytes=0)
    calls = len(cluster.heard)
    with pytest.raises(WorkerError, match="no room"):
        await keeping(cluster, keeper, source.peer, [*PROMPT, *answer.ids])
    assert [path for path, _ in cluster.heard[calls:]] == ["/keep"]


async def test_what_has_no_room_is_kept_in_part(cluster: Cluster) -> None:
    source, answer = await begun(cluster)
    keeper = await cluster.start("prefill", "p1", prefix_cache_bytes=2 * CHUNK * KV_BYTES)
    reply = await keeping(cluster, keeper, source.peer, [*PROMPT, *answer.ids])
    assert reply.kept_tokens == 2 * CHUNK
    assert keeper.worker.prefixes.used_bytes == 2 * CHUNK * KV_BYTES


async def test_an_address_that_the_ticket_does_not_name_is_not_asked(cluster: Cluster) -> None:
    _, answer = await begun(cluster)
    keeper = await cluster.start("prefill", "p1", prefix_cache_bytes=CACHE)
    ids = [*PROMPT, *answer.ids]
    outside = Peer("d1", "203.0.113.7:9000")
    with pytest.raises(WorkerError, match="outside the allowed networks"):
        await keeping(cluster, keeper, outside, ids)


async def test_token_ids_outside_the_vocabulary_are_refused(cluster: Cluster) -> None:
    source, _ = await begun(cluster)
    keeper = await cluster.start("prefill", "p1", prefix_cache_bytes=CACHE)
    with pytest.raises(InvalidRequest, match="outside the vocabulary"):
        await keeping(cluster, keeper, source.peer, [*PROMPT, 1 << 20])


async def test_one_checkpoint_at_a_time_leaves_a_worker(cluster: Cluster) -> None:
    source, answer = await begun(cluster)
    keeper = await cluster.start("prefill", "p1", prefix_cache_bytes=CACHE)
    ids = [*PROMPT, *answer.ids]
    source.worker.prefill.running_out = 1
    with pytest.raises(Overloaded, match="another checkpoint"):
        await keeping(cluster, keeper, source.peer, ids)
    source.worker.prefill.running_out = 0
    assert (await keeping(cluster, keeper, source.peer, ids)).kept_tokens == len(ids) - 1
    assert source.worker.prefill.running_out == 0


async def test_a_checkpoint_does_not_release_a_sequence_that_is_moving_away(cluster: Cluster) -> None:
    """A draining worker waits until the next one has the KV; a third one that kept it is not that one."""
    source, answer = await begun(cluster)
    keeper = await cluster.start("prefill", "p1", prefix_cache_bytes=CACHE)
    given: list[str] = []
    source.worker.prefill.on_given = given.append
    await keeping(cluster, keeper, source.peer, [*PROMPT, *answer.ids])
    assert given == []


async def test_a_source_that_is_gone_is_an_error_for_the_gateway_alone(cluster: Cluster) -> None:
    _, answer = await begun(cluster)
    keeper = await cluster.start("prefill", "p1", prefix_cache_bytes=CACHE)
    nowhere = Peer("d9", "127.0.0.1:1")
    with pytest.raises(EdgeLLMError, match="d9"):
        await keeping(cluster, keeper, nowhere, [*PROMPT, *answer.ids])
    assert (await answer.over()).ids == undisturbed(PROMPT, TOKENS)
