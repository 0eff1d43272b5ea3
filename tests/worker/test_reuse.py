"""KV that is kept between requests, over real sockets: what is used, by whom, and that no token changes."""

from __future__ import annotations

import asyncio

import pytest

from edge_llm.engine.engine import KeptKV
from edge_llm.engine.simulated import SimulatedBackend, SimulatedSettings
from edge_llm.errors import Unauthorized
from edge_llm.kv.codec import StateBlob
from edge_llm.worker.client import Peer
from edge_llm.worker.prefixes import Prefixes
from tests.loopback import CHUNK, SAMPLED, Cluster, Node, prompt_of, settings_of, undisturbed, until

pytestmark = pytest.mark.anyio
CACHE = 1 << 20


async def decode_worker(cluster: Cluster, name: str = "d1", cache: int = CACHE) -> Node:
    return await cluster.start("decode", name, prefix_cache_bytes=cache)


async def prefill_worker(cluster: Cluster, name: str = "p1", cache: int = CACHE) -> Node:
    return await cluster.start("prefill", name, prefix_cache_bytes=cache)


async def kept(node: Node, positions: int) -> None:
    """An answer is kept beside the event loop: wait until it is."""
    per_token = SimulatedBackend(settings_of("decode")).facts.kv_bytes_per_token
    await until(lambda: node.worker.prefixes.used_bytes >= positions * per_token)


async def test_a_next_turn_computes_only_what_is_new(cluster: Cluster) -> None:
    decode = await decode_worker(cluster)
    first = prompt_of(5 * CHUNK + 3)
    answer = await (await cluster.gateway.ask(decode.peer, first, max_tokens=CHUNK + 2, sampling=SAMPLED)).over()
    context = len(first) + len(answer.ids) - 1  # the last token was drawn, never evaluated
    await kept(decode, context)
    second = [*first, *answer.ids, *prompt_of(9, seed=4)]
    again = await (await cluster.gateway.ask(decode.peer, second, sampling=SAMPLED)).over()
    assert again.ids == undisturbed(second, 8, SAMPLED)
    assert again.report.cached_tokens == context
    assert again.report.computed_tokens == len(second) - 1 - context


async def test_a_short_next_turn_is_computed_where_the_conversation_is(cluster: Cluster) -> None:
    """Also when a prefill worker is offered: it lacks the answer, and would compute that first."""
    prefill, decode = await prefill_worker(cluster), await decode_worker(cluster)
    first = prompt_of(4 * CHUNK)
    answer = await (await cluster.gateway.ask(decode.peer, first, [prefill.peer], max_tokens=3 * CHUNK)).over()
    context = len(first) + len(answer.ids) - 1
    await kept(decode, context)
    served = prefill.worker.prefixes.query_tokens
    for new in (CHUNK, CHUNK + 1):
        turn = [*first, *answer.ids, *prompt_of(new - 1, seed=new)]
        again = await (await cluster.gateway.ask(decode.peer, turn, [prefill.peer], cache_prompt=True)).over()
        assert again.ids == undisturbed(turn, 8)
        is_short = len(turn) - 1 - context <= CHUNK
        assert again.report.mode == ("local" if is_short else "split")
        assert (prefill.worker.prefixes.query_tokens == served) == is_short


async def test_a_next_turn_that_comes_at_once_finds_the_conversation(cluster: Cluster) -> None:
    """The answer's KV is copied beside its last tokens; who asks in that moment waits for the copy."""
    big = SimulatedSettings(n_ctx=40_000, slots=2, chunk_tokens=CHUNK)
    decode = await cluster.start("decode", "d1", big, prefix_cache_bytes=64 << 20)
    first = prompt_of(30_000)  # two megabytes of KV: copied in a thread
    answer = await (await cluster.gateway.ask(decode.peer, first, max_tokens=4)).over()
    again = await (await cluster.gateway.ask(decode.peer, [*first, *answer.ids, 7], max_tokens=1)).over()
    assert again.report.cached_tokens == len(first) + 3


@pytest.mark.parametrize("new", [0, 3])
async def test_a_split_that_was_asked_for_is_one_also_when_it_is_not_needed(cluster: Cluster, new: int) -> None:
    """A client that says `split` twice sees two workers twice, and the KV that both have does not travel again."""
    prefill, decode = await prefill_worker(cluster), await decode_worker(cluster)
    prompt = prompt_of(3 * CHUNK + 2)
    await (await cluster.gateway.ask(decode.peer, prompt, [prefill.peer], max_tokens=1)).over()
    await kept(decode, len(prompt))
    turn = [*prompt, *prompt_of(new, seed=3)]
    again = await (await cluster.gateway.ask(decode.peer, turn, [prefill.peer], must_split=True)).over()
    assert again.ids == undisturbed(turn, 8)
    assert (again.report.mode, again.report.prefill_worker, again.report.fallback) == ("split", "p1", None)
    assert again.report.handoff_bytes <= CHUNK * decode.worker.facts.kv_bytes_per_token


async def test_a_shared_beginning_is_prefilled_once(cluster: Cluster) -> None:
    """The prefill worker keeps it, whichever decode workers ask."""
    prefill = await prefill_worker(cluster)
    decoders = [await decode_worker(cluster, name, cache=0) for name in ("d1", "d2")]
    system = prompt_of(3 * CHUNK + 5)
    for number, decode in enumerate(decoders):
        prompt = [*system, *prompt_of(CHUNK, seed=number + 1)]
        answer = await (await cluster.gateway.ask(decode.peer, prompt, [prefill.peer])).over()
        assert answer.ids == undisturbed(prompt, 8)
        assert answer.report.mode == "split"
        assert answer.report.prefill_cached_tokens == (len(system) if number else 0)
        assert answer.report.cached_tokens == 0


async def test_a_prompt_known_whole_needs_no_turn_of_a_busy_prefill_worker(cluster: Cluster) -> None:
    prefill = await prefill_worker(cluster)
    decode = await decode_worker(cluster, cache=0)
    prompt = prompt_of(4 * CHUNK)
    await (await cluster.gateway.ask(decode.peer, prompt, [prefill.peer])).over()
    before = prefill.worker.prefill.prompt_token_s
    again = await (await cluster.gateway.ask(decode.peer, prompt, [prefill.peer])).over()
    assert again.ids == undisturbed(prompt, 8)
    assert again.report.prefill_cached_tokens == again.report.restored_tokens == len(prompt) - 1
    assert prefill.worker.prefill.prompt_token_s == before, "something was computed"


async def test_what_both_sides_keep_is_joined_without_a_seam(cluster: Cluster) -> None:
    """The decode worker has a beginning of odd length, the prefill worker a longer one: only the difference travels."""
    prefill, decode = await prefill_worker(cluster), await decode_worker(cluster)
    prompt = prompt_of(6 * CHUNK + 1)
    short = prompt[: 2 * CHUNK + 3]
    await (await cluster.gateway.ask(decode.peer, short, max_tokens=1)).over()
    await kept(decode, len(short))
    other = await decode_worker(cluster, "d2", cache=0)
    await (await cluster.gateway.ask(other.peer, prompt[: 4 * CHUNK + 2], [prefill.peer])).over()
    answer = await (await cluster.gateway.ask(decode.peer, prompt, [prefill.peer])).over()
    assert answer.ids == undisturbed(prompt, 8)
    assert (answer.report.cached_tokens, answer.report.prefill_cached_tokens) == (len(short), 4 * CHUNK + 1)
    per_token = decode.worker.facts.kv_bytes_per_token
    assert answer.report.handoff_bytes == (len(prompt) - 1 - len(short)) * per_token


async def test_no_tenant_gets_what_another_one_left(cluster: Cluster) -> None:
    prefill, decode = await prefill_worker(cluster), await decode_worker(cluster)
    prompt = prompt_of(4 * CHUNK)
    await (await cluster.gateway.ask(decode.peer, prompt, [prefill.peer], tenant="a")).over()
    await kept(decode, len(prompt))
    other = await (await cluster.gateway.ask(decode.peer, prompt, [prefill.peer], tenant="b")).over()
    assert (other.report.cached_tokens, other.report.prefill_cached_tokens) == (0, 0)
    same = await (await cluster.gateway.ask(decode.peer, prompt, [prefill.peer], tenant="a")).over()
    assert same.report.cached_tokens == len(prompt) - 1


async def test_a_ticket_of_one_tenant_does_not_open_the_kv_of_another(cluster: Cluster) -> None:
    prefill, decode = await prefill_worker(cluster), await decode_worker(cluster)
    prompt = prompt_of(2 * CHUNK)
    candidate = cluster.gateway.candidate(prefill.peer, "r-mine", prompt, "a")
    forged = await cluster.gateway.ask(decode.peer, prompt, request_id="r-mine", tenant="b", candidates=[candidate])
    answer = await forged.over()
    assert answer.report.mode == "local"
    assert answer.report.fallback is not None
    assert Unauthorized.code in answer.report.fallback or "worker_failed" in answer.report.fallback


async def test_a_measured_request_uses_and_leaves_nothing(cluster: Cluster) -> None:
    prefill, decode = await prefill_worker(cluster), await decode_worker(cluster)
    prompt = prompt_of(3 * CHUNK)
    for _ in range(2):
        answer = await (await cluster.gateway.ask(decode.peer, prompt, [prefill.peer], cache_prompt=False)).over()
        assert (answer.report.cached_tokens, answer.report.prefill_cached_tokens) == (0, 0)
    assert decode.worker.prefixes.used_bytes == prefill.worker.prefixes.used_bytes == 0


@pytest.mark.parametrize(
    ("tokens", "used"), [(2 * CHUNK + 3, 2 * CHUNK), (2 * CHUNK + 1, 2 * CHUNK), (2 * CHUNK, CHUNK)]
)
async def test_below_exact_only_whole_chunks_that_were_read_as_prompts_are_used(
    cluster: Cluster, tokens: int, used: int
) -> None:
    """A decode step evaluates the last token of a prompt: the chunk that it ends was not read as one."""
    settings = SimulatedSettings(n_ctx=512, slots=4, chunk_tokens=CHUNK, level="same-plan")
    decode = await cluster.start("mixed", "m1", settings, prefix_cache_bytes=CACHE)
    prompt = prompt_of(tokens)
    answer = await (await cluster.gateway.ask(decode.peer, prompt, max_tokens=3 * CHUNK)).over()
    await kept(decode, used)
    again = await (await cluster.gateway.ask(decode.peer, [*prompt, *answer.ids, 5])).over()
    assert again.report.cached_tokens == used


async def test_below_exact_what_moves_goes_on_with_all_of_it_and_is_nobody_elses_prompt() -> None:
    facts = SimulatedBackend(SimulatedSettings(n_ctx=512, slots=4, chunk_tokens=CHUNK, level="same-plan")).facts
    assert facts.layout is not None
    prefixes, ids = Prefixes(facts, CACHE), tuple(prompt_of(3 * CHUNK))
    state = StateBlob(facts.layout, len(ids), 0)
    state.place(0, len(ids), bytes(len(ids) * facts.kv_bytes_per_token), facts.layout.v_layout)
    await prefixes.keep_answer("a", CHUNK + 1, KeptKV("r", ids, state, 0), is_moving=True)
    assert (await prefixes.match("a", [*ids, 5], is_moving=True)).n_tokens == len(ids)
    assert (await prefixes.match("a", [*ids, 5])).n_tokens == 0


# -- the reverse hand-off


SLOW_PREFILL = SimulatedSettings(n_ctx=512, slots=0, chunk_tokens=CHUNK, prompt_token_s=0.04)


async def long_turn(cluster: Cluster, prefill: Node, decode: Node) -> tuple[list[int], int]:
    """A conversation whose answer only the decode worker has KV of, and a next turn too long for it alone."""
    first = prompt_of(2 * CHUNK)
    answer = await (await cluster.gateway.ask(decode.peer, first, [prefill.peer], max_tokens=5 * CHUNK)).over()
    context = len(first) + len(answer.ids) - 1
    await kept(decode, context)
    return [*first, *answer.ids, *prompt_of(2 * CHUNK, seed=9)], context


async def test_a_long_next_turn_is_prefilled_behind_the_answer_that_its_decode_worker_holds(cluster: Cluster) -> None:
    prefill = await cluster.start("prefill", "p1", SLOW_PREFILL, prefix_cache_bytes=CACHE)
    decode = await decode_worker(cluster)
    turn, context = await long_turn(cluster, prefill, decode)
    before = prefill.worker.prefixes.used_bytes
    again = await (await cluster.gateway.ask(decode.peer, turn, [prefill.peer])).over()
    assert again.ids == undisturbed(turn, 8)
    assert (again.report.mode, again.report.cached_tokens) == ("split", context)
    per_token = decode.worker.facts.kv_bytes_per_token
    assert again.report.handoff_bytes == (len(turn) - 1 - context) * per_token, "what D has does not come back"
    assert prefill.worker.prefill.pending_tokens == prefill.worker.prefill.admitted == 0
    assert decode.worker.prefill.stored_out == 0
    assert prefill.worker.links.published[0].peer == "d1", "the answer's KV was fetched"
    assert prefill.worker.prefixes.used_bytes - before == (len(turn) - 1 - (2 * CHUNK - CHUNK)) * per_token


async def test_what_is_sooner_computed_is_not_fetched(cluster: Cluster) -> None:
    prefill, decode = await prefill_worker(cluster), await decode_worker(cluster)
    turn, _ = await long_turn(cluster, prefill, decode)
    prefill.worker.prefill.prompt_token_s = 1e-9
    again = await (await cluster.gateway.ask(decode.peer, turn, [prefill.peer])).over()
    assert again.ids == undisturbed(turn, 8)
    assert not prefill.worker.links.published


async def test_a_holder_that_is_gone_costs_no_token(cluster: Cluster) -> None:
    prefill = await cluster.start("prefill", "p1", SLOW_PREFILL, prefix_cache_bytes=CACHE)
    decode = await decode_worker(cluster)
    turn, context = await long_turn(cluster, prefill, decode)
    nobody = Peer("d9", "127.0.0.1:9")
    candidate = cluster.gateway.candidate(prefill.peer, "r-gone", turn, holder=nobody)
    again = await (
        await cluster.gateway.ask(decode.peer, turn, request_id="r-gone", candidates=[candidate], holder=nobody)
    ).over()
    assert again.ids == undisturbed(turn, 8)
    assert (again.report.mode, again.report.cached_tokens) == ("split", context)


async def test_a_holder_that_the_ticket_does_not_name_is_never_called(cluster: Cluster) -> None:
    prefill, decode = await prefill_worker(cluster), await decode_worker(cluster)
    turn, _ = await long_turn(cluster, prefill, decode)
    candidate = cluster.gateway.candidate(prefill.peer, "r-forged", turn)
    again = await (await cluster.gateway.ask(decode.peer, turn, request_id="r-forged", candidates=[candidate])).over()
    assert again.ids == undisturbed(turn, 8)
    assert again.report.mode == "local"
    assert not prefill.worker.links.published


# -- moving a running sequence


async def test_a_draining_worker_gives_its_sequences_away_and_no_token_is_computed_twice(cluster: Cluster) -> None:
    slow = SimulatedSettings(n_ctx=512, slots=4, chunk_tokens=CHUNK, decode_run_s=0.01)
    first = await cluster.start("decode", "d1", slow, prefix_cache_bytes=CACHE)
    second = await decode_worker(cluster, "d2")
    prompt = prompt_of(4 * CHUNK + 1)
    answer = await cluster.gateway.ask(first.peer, prompt, max_tokens=60, sampling=SAMPLED, request_id="moving")
    await until(lambda: len(answer.ids) >= 5)
    assert first.worker.decode is not None
    draining = asyncio.create_task(first.worker.decode.hand_over())
    await until(lambda: answer.failed is not None)
    assert answer.failed is not None
    assert (answer.failed.code, answer.failed.is_retryable) == ("draining", True)
    moved = await (
        await cluster.gateway.ask(
            second.peer,
            prompt,
            [first.peer],
            max_tokens=60,
            sampling=SAMPLED,
            delivered=answer.ids,
            request_id="moving",
            epoch=1,
            only_stored=True,
        )
    ).over()
    assert answer.ids + moved.ids == undisturbed(prompt, 60, SAMPLED)
    assert moved.report.computed_tokens == 0, "the KV moved, nothing was computed again"
    assert moved.report.prefill_worker == "d1"
    async with asyncio.timeout(0.5):  # far below the lease
        await draining


async def test_a_worker_that_drains_waits_until_its_sequences_were_fetched(cluster: Cluster) -> None:
    slow = SimulatedSettings(n_ctx=512, slots=4, chunk_tokens=CHUNK, decode_run_s=0.01)
    node = await cluster.start("decode", "d1", slow, prefix_cache_bytes=CACHE)
    answer = await cluster.gateway.ask(node.peer, prompt_of(3 * CHUNK), max_tokens=60)
    await answer.first_token()
    draining = asyncio.create_task(node.worker.drain())
    await until(lambda: answer.failed is not None)
    await asyncio.sleep(0.05)
    assert not draining.done(), "what it holds is nowhere else"
    draining.cancel()


async def test_what_a_draining_worker_no_longer_holds_is_computed_again(cluster: Cluster) -> None:
    first, second = await decode_worker(cluster, "d1", cache=0), await decode_worker(cluster, "d2")
    prompt = prompt_of(3 * CHUNK)
    answer = await (await cluster.gateway.ask(second.peer, prompt, [first.peer], only_stored=True)).over()
    assert answer.ids == undisturbed(prompt, 8)
    assert answer.report.fallback is not None
    assert "prefill_failed" in answer.report.fallback
    assert answer.report.computed_tokens == len(prompt) - 1


# -- deadlines


async def test_work_whose_deadline_passes_ends_and_frees_its_slot(cluster: Cluster) -> None:
    slow = SimulatedSettings(n_ctx=512, slots=4, chunk_tokens=CHUNK, decode_run_s=0.02)
    decode = await cluster.start("decode", "d1", slow)
    answer = await cluster.gateway.ask(decode.peer, prompt_of(4), max_tokens=400, time_left_s=0.2)
    await until(lambda: answer.failed is not None)
    assert answer.failed is not None
    assert (answer.failed.code, answer.failed.status, answer.failed.is_retryable) == ("deadline_exceeded", 504, False)
    assert decode.slots_free == 4
    assert 0 < len(answer.ids) < 400
