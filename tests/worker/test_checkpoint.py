"""Checkpoints over real sockets: KV of a sequence that runs elsewhere comes here, and nothing else does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence

import pytest

from edge_llm.engine.simulated import SimulatedBackend, SimulatedSettings
from edge_llm.errors import EdgeLLMError, InvalidRequest, Overloaded, PrefillFailed, WorkerError, WorkerSilent
from edge_llm.kv.store import Piece
from edge_llm.worker.adopt import ByteBudget
from edge_llm.worker.checkpoint import KEEP_S, Fetch, Keeper
from edge_llm.worker.client import CALL_S, Peer
from edge_llm.worker.messages import KeepReply, KeepRequest, PrefillCandidate, PrefillRequest
from edge_llm.worker.prefixes import Prefixes
from edge_llm.worker.tickets import Claims
from tests.loopback import CHUNK, KEYS, Answer, Cluster, Node, prompt_of, settings_of, undisturbed, until

pytestmark = pytest.mark.anyio
CACHE = 1 << 20
TOKENS = 400
SLOW = SimulatedSettings(n_ctx=512, slots=4, serves_prompts=False, chunk_tokens=CHUNK, decode_run_s=0.005)
PROMPT = prompt_of(3 * CHUNK + 5)
KV_BYTES = SimulatedBackend(settings_of("decode")).facts.kv_bytes_per_token


async def begun(
    cluster: Cluster, tokens: int = 2 * CHUNK + 1, tenant: str = "", cache_prompt: bool = True
) -> tuple[Node, Answer]:
    """A worker and its stream, which has so many tokens and goes on for long."""
    source = await cluster.start("decode", "d1", SLOW)
    answer = await cluster.gateway.ask(
        source.peer, PROMPT, max_tokens=TOKENS, request_id="r", tenant=tenant, cache_prompt=cache_prompt
    )
    await until(lambda: len(answer.ids) >= tokens)
    return source, answer


async def keeping(
    cluster: Cluster,
    keeper: Node,
    source: Peer,
    ids: Sequence[int],
    request_id: str = "r",
    *,
    tenant: str = "",
    signed_tenant: str | None = None,
) -> KeepReply:
    """`signed_tenant`: whose KV the ticket allows, when that is another one."""
    allowed = tenant if signed_tenant is None else signed_tenant
    candidate = cluster.gateway.candidate(source, request_id, ids, allowed, only_stored=True)
    request = KeepRequest(request_id=request_id, ids=list(ids), tenant=tenant, source=candidate)
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
    assert reply == KeepReply(kept_tokens=2 * CHUNK, fetched_bytes=3 * CHUNK * KV_BYTES), "the rest is not waited for"
    assert keeper.worker.prefixes.used_bytes == 2 * CHUNK * KV_BYTES


async def test_an_address_outside_the_allowed_networks_is_not_asked(cluster: Cluster) -> None:
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


# -- whose KV


async def test_what_is_kept_for_one_tenant_is_not_there_for_another(cluster: Cluster) -> None:
    source, answer = await begun(cluster, tenant="a")
    keeper = await cluster.start("prefill", "p1", prefix_cache_bytes=CACHE)
    ids = [*PROMPT, *answer.ids]
    await keeping(cluster, keeper, source.peer, ids, tenant="a")
    later = await cluster.start("decode", "d2")
    for tenant, cached_tokens in (("b", 0), ("a", len(ids) - 1)):
        asked = await cluster.gateway.ask(later.peer, ids, [keeper.peer], tenant=tenant, must_split=True)
        assert (await asked.over()).report.prefill_cached_tokens == cached_tokens


async def test_a_sequence_is_given_to_its_own_tenant_only(cluster: Cluster) -> None:
    """Neither with another one's ticket, nor where the gateway itself is mistaken."""
    source, answer = await begun(cluster, tenant="a")
    keeper = await cluster.start("prefill", "p1", prefix_cache_bytes=CACHE)
    ids = [*PROMPT, *answer.ids]
    with pytest.raises(WorkerError, match="the ticket is for another prompt"):
        await keeping(cluster, keeper, source.peer, ids, tenant="b", signed_tenant="a")
    with pytest.raises(PrefillFailed, match="the rest is gone"):
        await keeping(cluster, keeper, source.peer, ids, tenant="b")
    assert keeper.worker.prefixes.used_bytes == 0


async def test_a_request_that_leaves_nothing_is_given_to_nobody(cluster: Cluster) -> None:
    source, answer = await begun(cluster, cache_prompt=False)
    keeper = await cluster.start("prefill", "p1", prefix_cache_bytes=CACHE)
    with pytest.raises(PrefillFailed, match="the rest is gone"):
        await keeping(cluster, keeper, source.peer, [*PROMPT, *answer.ids])


# -- what others feel of it


async def test_a_checkpoint_takes_no_memory_that_a_prompt_waits_for(cluster: Cluster) -> None:
    source, answer = await begun(cluster)
    keeper = await cluster.start("prefill", "p1", prefix_cache_bytes=CACHE)
    assert source.worker.decode is not None
    async with source.worker.decode.adopting.reserved(SLOW.n_ctx * KV_BYTES):
        with pytest.raises(Overloaded, match="memory of a checkpoint"):
            await keeping(cluster, keeper, source.peer, [*PROMPT, *answer.ids])
    ids = [*PROMPT, *answer.ids]
    assert (await keeping(cluster, keeper, source.peer, ids)).kept_tokens == len(ids) - 1
    assert source.worker.decode.adopting.used_bytes == 0


async def test_room_that_somebody_waits_for_is_no_room() -> None:
    budget = ByteBudget(10)
    assert budget.has_room(11), "a larger one may pass alone"
    async with budget.reserved(6):
        assert budget.has_room(4)
        assert not budget.has_room(5)
        waiting = asyncio.create_task(_hold(budget, 5))
        await asyncio.sleep(0)
        assert not budget.has_room(1)
    await waiting
    assert budget.has_room(10)


async def _hold(budget: ByteBudget, size: int) -> None:
    async with budget.reserved(size):
        pass


async def test_checkpoints_do_not_count_as_prompts_that_were_looked_up(cluster: Cluster) -> None:
    source, answer = await begun(cluster)
    keeper = await cluster.start("prefill", "p1", prefix_cache_bytes=CACHE)
    before = [(node.worker.prefixes.query_tokens, node.worker.prefixes.hit_tokens) for node in (source, keeper)]
    for _ in range(2):
        await keeping(cluster, keeper, source.peer, [*PROMPT, *answer.ids])
    assert before == [(node.worker.prefixes.query_tokens, node.worker.prefixes.hit_tokens) for node in (source, keeper)]


async def test_a_receiver_that_hangs_up_leaves_nothing_behind(cluster: Cluster) -> None:
    """When the response returns, not when somebody collects garbage."""
    source, answer = await begun(cluster)
    prefill, ids = source.worker.prefill, [*PROMPT, *answer.ids]
    candidate = cluster.gateway.candidate(source.peer, "r", ids, only_stored=True)
    claims = KEYS.verify(candidate.ticket, "d1", "prefill", time.time())
    request = PrefillRequest(
        request_id="r",
        ids=ids,
        compatibility=source.worker.facts.identity.compatibility,
        only_stored=True,
        is_running=True,
    )
    transfer = await prefill.accept(request, claims)
    stream = prefill.stream(transfer, KEYS.transfer_key(candidate.ticket), source.worker.loop)
    async for _ in stream:
        if prefill.running_out:
            break
    assert (prefill.stored_out, prefill.running_out) == (1, 1)
    await stream.aclose()
    assert (prefill.stored_out, prefill.running_out) == (0, 0)


# -- a source that is slow, without sockets


FACTS = SimulatedBackend(settings_of("prefill")).facts
IDS = prompt_of(4 * CHUNK)


def slow(pieces: int) -> tuple[Fetch, list[PrefillRequest]]:
    """A source that gives so many pieces and then nothing, and what it was asked."""
    asked: list[PrefillRequest] = []

    async def fetch(_source: PrefillCandidate, request: PrefillRequest) -> AsyncGenerator[Piece, None]:
        asked.append(request)
        for number in range(pieces):
            p0 = request.start + number * CHUNK
            yield Piece(p0, p0 + CHUNK, bytes(CHUNK * KV_BYTES))
        await asyncio.Event().wait()

    return fetch, asked


async def kept_from(fetch: Fetch, prefixes: Prefixes) -> KeepReply:
    source = PrefillCandidate(worker="d1", address="127.0.0.1:9", ticket="t", only_stored=True)
    request = KeepRequest(request_id="r", ids=IDS, source=source)
    claims = Claims("p1", "keep", "r", 0.0, "n", peers={"d1": "127.0.0.1:9"})
    keeper = Keeper(fetch, prefixes, lambda: FACTS, ("127.0.0.0/8",), patience_s=0.05)
    return await keeper.keep(request, claims)


async def test_the_gateway_hears_what_a_slow_source_gave_in_time() -> None:
    assert KEEP_S < CALL_S, "else it is gone"
    prefixes = Prefixes(FACTS, CACHE)
    (first, _), (second, asked) = slow(2), slow(1)
    assert await kept_from(first, prefixes) == KeepReply(kept_tokens=2 * CHUNK, fetched_bytes=2 * CHUNK * KV_BYTES)
    assert await kept_from(second, prefixes) == KeepReply(kept_tokens=3 * CHUNK, fetched_bytes=CHUNK * KV_BYTES)
    assert [request.start for request in asked] == [2 * CHUNK], "what came is not asked for again"


async def test_a_source_that_gives_nothing_is_an_error() -> None:
    fetch, _ = slow(0)
    with pytest.raises(WorkerSilent, match="worker d1 gave no KV"):
        await kept_from(fetch, Prefixes(FACTS, CACHE))


async def test_more_is_not_fetched_than_has_room() -> None:
    fetch, _ = slow(3)
    reply = await kept_from(fetch, Prefixes(FACTS, CHUNK * KV_BYTES))
    assert reply == KeepReply(kept_tokens=CHUNK, fetched_bytes=2 * CHUNK * KV_BYTES)
