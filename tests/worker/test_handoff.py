"""The hand-off over real sockets: whichever worker computed the prompt, the tokens are the same."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from edge_llm.engine.engine import Failure, PromptProgress, Step
from edge_llm.errors import ContextTooLong, InvalidRequest, Overloaded, WorkerError
from edge_llm.request import SamplingParams
from edge_llm.worker.adopt import Spare
from edge_llm.worker.client import Peer
from edge_llm.worker.messages import CancelRequest
from edge_llm.worker.pull import Patience
from tests.loopback import (
    CHUNK,
    DEADLINE_S,
    GREEDY,
    SAMPLED,
    Answer,
    Cluster,
    HeldBackend,
    Node,
    SkippingClock,
    prompt_of,
    settings_of,
    undisturbed,
    until,
)

pytestmark = pytest.mark.anyio
LENGTHS = (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)
BOTH = pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
# Long enough to still run when the test acts, slow enough to leave the machine alone.
ENDLESS_TOKENS = 400
SLOW = replace(settings_of("decode"), decode_run_s=0.005)


@BOTH
async def test_a_split_answer_equals_a_local_one_for_prompts_around_chunk_borders(
    cluster: Cluster, sampling: SamplingParams
) -> None:
    prefill, decode = await cluster.start("prefill", "p1"), await cluster.start("decode", "d1")
    for tokens in LENGTHS:
        prompt = prompt_of(tokens)
        local = await (await cluster.gateway.ask(decode.peer, prompt, sampling=sampling)).over()
        split = await (await cluster.gateway.ask(decode.peer, prompt, [prefill.peer], sampling=sampling)).over()
        assert split.ids == local.ids == undisturbed(prompt, 8, sampling)
        assert split.text == local.text
        assert split.indexes == list(range(8))
        assert (split.finish_reason, local.finish_reason) == ("length", "length")
        assert local.report.mode == "local"
        assert split.report.mode == ("split" if tokens > 1 else "local"), "one token has no KV to fetch"
    assert decode.slots_free == decode.worker.facts.slots


@BOTH
async def test_a_mixed_worker_serves_and_decodes_at_once(cluster: Cluster, sampling: SamplingParams) -> None:
    """Each of two workers computes prompts for the other while its own streams run."""
    one, other = await cluster.start("mixed", "m1"), await cluster.start("mixed", "m2")
    pairs = [(one, other), (other, one), (one, other), (other, one)]
    prompts = [prompt_of(2 * CHUNK + 3, seed) for seed in range(len(pairs))]

    async def one_answer(decode: Node, prefill: Node, prompt: list[int]) -> Answer:
        asked = await cluster.gateway.ask(decode.peer, prompt, [prefill.peer], max_tokens=24, sampling=sampling)
        return await asked.over()

    answers = await asyncio.gather(
        *(one_answer(decode, prefill, prompt) for (decode, prefill), prompt in zip(pairs, prompts, strict=True))
    )
    for answer, prompt in zip(answers, prompts, strict=True):
        assert answer.ids == undisturbed(prompt, 24, sampling)
        assert answer.report.mode == "split"


@pytest.mark.parametrize("tokens", LENGTHS)
async def test_the_report_accounts_for_every_position_and_byte(cluster: Cluster, tokens: int) -> None:
    prefill, decode = await cluster.start("prefill", "p1"), await cluster.start("decode", "d1")
    n = tokens - 1
    split = (await (await cluster.gateway.ask(decode.peer, prompt_of(tokens), [prefill.peer])).over()).report
    local = await (await cluster.gateway.ask(decode.peer, prompt_of(tokens))).over()
    assert split.handoff_bytes == decode.worker.facts.kv_bytes_per_token * n
    assert (split.restored_tokens, split.computed_tokens) == (n, 0)
    assert split.prefill_worker == ("p1" if n else "d1")
    assert 0 <= split.overlapped_bytes <= split.handoff_bytes
    assert (split.is_same_class, split.fallback) == (True, None)
    assert split.adopt_ms <= split.handoff_ms
    assert (local.report.restored_tokens, local.report.computed_tokens) == (0, n)
    assert (local.report.handoff_bytes, local.report.handoff_ms, local.report.adopt_ms) == (0, 0.0, 0.0)
    assert (local.report.prefill_worker, local.report.fallback) == ("d1", None)
    for report in (split, local.report):
        parts_ms = (report.wait_ms, report.prefill_ms, report.handoff_ms)
        assert all(0 <= part < 1e3 * DEADLINE_S for part in parts_ms), report
    assert local.progress[-1:] == ([(n, n)] if n else [])


async def test_a_prompt_of_one_chunk_was_computed_and_did_not_wait(cluster: Cluster) -> None:
    settings = replace(settings_of("decode"), serves_prompts=True, prompt_token_s=0.05)
    decode = await cluster.start("decode", "d1", settings)
    answer = await (await cluster.gateway.ask(decode.peer, prompt_of(CHUNK))).over()
    assert answer.report.prefill_ms >= 1e3 * 0.05 * (CHUNK - 1)


async def test_most_bytes_of_a_long_prompt_arrive_while_it_is_computed(cluster: Cluster) -> None:
    slow = replace(settings_of("prefill"), prompt_token_s=0.002)
    prefill, decode = await cluster.start("prefill", "p1", slow), await cluster.start("decode", "d1")
    tokens = 8 * CHUNK + 1
    answer = await (await cluster.gateway.ask(decode.peer, prompt_of(tokens), [prefill.peer])).over()
    # all but the last chunk have left before the last piece is done
    assert answer.report.overlapped_bytes >= decode.worker.facts.kv_bytes_per_token * 6 * CHUNK
    assert answer.report.prefill_ms >= 1e3 * 0.002 * 6 * CHUNK
    done = [done for done, _ in answer.progress]
    assert done == sorted(done)
    assert done[-1] == tokens - 1


@BOTH
async def test_a_serialized_hand_off_sends_every_byte_after_computing_and_gives_the_same_tokens(
    cluster: Cluster, sampling: SamplingParams
) -> None:
    prefill = await cluster.start("prefill", "p1", handoff="serialized")
    decode = await cluster.start("decode", "d1")
    for tokens in LENGTHS[1:]:
        prompt = prompt_of(tokens)
        answer = await (await cluster.gateway.ask(decode.peer, prompt, [prefill.peer], sampling=sampling)).over()
        assert answer.ids == undisturbed(prompt, 8, sampling)
        assert answer.report.handoff_bytes == decode.worker.facts.kv_bytes_per_token * (tokens - 1)
        assert (answer.report.mode, answer.report.overlapped_bytes, answer.report.fallback) == ("split", 0, None)


async def _held(cluster: Cluster, name: str = "p1") -> tuple[Node, HeldBackend]:
    backend = HeldBackend(settings_of("prefill"))
    return await cluster.start("prefill", name, backend=backend), backend


async def test_two_prompts_that_meet_on_one_prefill_worker_are_both_served(cluster: Cluster) -> None:
    (prefill, backend), decode = await _held(cluster), await cluster.start("decode", "d1")
    prompts = [prompt_of(3 * CHUNK, seed) for seed in range(2)]
    first = await cluster.gateway.ask(decode.peer, prompts[0], [prefill.peer])
    await until(backend.is_held.is_set)
    second = await cluster.gateway.ask(decode.peer, prompts[1], [prefill.peer])
    await until(lambda: prefill.worker.prefill.waiting == 1)
    backend.go_on.set()
    for asked, prompt in zip((first, second), prompts, strict=True):
        assert (await asked.over()).ids == undisturbed(prompt, 8)
        assert (asked.report.mode, asked.report.fallback) == ("split", None)
    status = await cluster.gateway.client.status(prefill.peer)
    assert status.load.prompts_met == 1
    assert (status.load.sequences_waiting, status.load.pending_prompt_tokens) == (0, 0)


async def test_a_third_prompt_is_refused_and_goes_to_the_next_candidate(cluster: Cluster) -> None:
    (busy, backend), free = await _held(cluster), await cluster.start("prefill", "p2")
    decode = await cluster.start("decode", "d1")
    prompts = [prompt_of(2 * CHUNK + 1, seed) for seed in range(4)]
    waiting = [await cluster.gateway.ask(decode.peer, prompt, [busy.peer]) for prompt in prompts[:2]]
    await until(lambda: busy.worker.prefill.admitted == 2)
    third = await (await cluster.gateway.ask(decode.peer, prompts[2], [busy.peer, free.peer])).over()
    assert third.ids == undisturbed(prompts[2], 8)
    assert (third.report.mode, third.report.prefill_worker) == ("split", "p2")
    assert third.report.fallback == f"p1: overloaded after 0 of {2 * CHUNK} tokens"
    fourth = await (await cluster.gateway.ask(decode.peer, prompts[3], [busy.peer])).over()
    assert fourth.ids == undisturbed(prompts[3], 8)
    assert (fourth.report.mode, fourth.report.prefill_worker) == ("local", "d1")
    assert "p1: overloaded" in (fourth.report.fallback or "")
    assert "computed here" in (fourth.report.fallback or "")
    backend.go_on.set()
    assert [(await asked.over()).ids for asked in waiting] == [undisturbed(prompt, 8) for prompt in prompts[:2]]


@BOTH
@pytest.mark.parametrize("is_split", [False, True], ids=["local", "split"])
async def test_a_resumed_answer_goes_on_as_if_it_had_never_stopped(
    cluster: Cluster, sampling: SamplingParams, is_split: bool
) -> None:
    prefill, decode = await cluster.start("prefill", "p1"), await cluster.start("decode", "d1")
    prompt, total = prompt_of(CHUNK + 2), 2 * CHUNK
    whole = undisturbed(prompt, total, sampling)
    for delivered in (1, CHUNK - 1, total - 1):
        asked = await cluster.gateway.ask(
            decode.peer,
            prompt,
            [prefill.peer] if is_split else [],
            max_tokens=total,
            sampling=sampling,
            delivered=whole[:delivered],
        )
        answer = await asked.over()
        assert answer.ids == whole[delivered:]
        assert answer.indexes == list(range(delivered, total))
        n = len(prompt) + delivered - 1
        assert answer.report.restored_tokens + answer.report.computed_tokens == n
        assert answer.report.restored_tokens == (n if is_split else 0)


async def test_a_newer_epoch_takes_the_place_of_an_older_one(cluster: Cluster) -> None:
    decode = await cluster.start("decode", "d1", replace(SLOW, slots=1))
    prompt = prompt_of(CHUNK)
    older = await cluster.gateway.ask(decode.peer, prompt, max_tokens=ENDLESS_TOKENS, request_id="same", epoch=1)
    await older.first_token()
    with pytest.raises(InvalidRequest, match="epoch 1"):
        await cluster.gateway.ask(decode.peer, prompt, request_id="same", epoch=0)
    newer = await cluster.gateway.ask(decode.peer, prompt, request_id="same", epoch=2)
    assert (await newer.over()).ids == undisturbed(prompt, 8)
    assert not older.is_over
    assert decode.slots_free == 1


async def test_what_an_older_epoch_did_last_does_not_touch_the_newer_one(cluster: Cluster) -> None:
    """A step may be heard of when its sequence has been replaced already."""
    decode = await cluster.start("decode", "d1", SLOW)
    prompt = prompt_of(CHUNK)
    newer = await cluster.gateway.ask(decode.peer, prompt, max_tokens=40, request_id="same", epoch=2)
    await newer.first_token()
    role = decode.worker.decode
    assert role is not None
    late = Failure("same", WorkerError("no KV cells left"), epoch=1)
    role.on_step(Step(failures=(late,), progress=(PromptProgress("same", 1, 999, epoch=1),)))
    assert (await newer.over()).ids == undisturbed(prompt, 40)
    assert (1, 999) not in newer.progress


async def test_cancel_frees_the_slot_at_once(cluster: Cluster) -> None:
    decode = await cluster.start("decode", "d1", replace(SLOW, slots=1))
    endless = await cluster.gateway.ask(decode.peer, prompt_of(CHUNK), max_tokens=ENDLESS_TOKENS, epoch=3)
    await endless.first_token()
    with pytest.raises(Overloaded, match="has 1 slot, and none is free"):
        await cluster.gateway.ask(decode.peer, prompt_of(CHUNK))
    cancel = cluster.gateway.client.cancel
    late = CancelRequest(request_id=endless.request_id, epoch=2)
    assert not (await cancel(decode.peer, late)).found, "a cancellation of an older epoch hit a newer one"
    now = CancelRequest(request_id=endless.request_id, epoch=3)
    assert (await cancel(decode.peer, now)).found
    assert decode.slots_free == 1
    next_one = await cluster.gateway.ask(decode.peer, prompt_of(CHUNK + 1))
    assert (await next_one.over()).ids == undisturbed(prompt_of(CHUNK + 1), 8), "the slot was not empty"
    assert not (await cancel(decode.peer, now)).found
    assert endless.ids == undisturbed(prompt_of(CHUNK), ENDLESS_TOKENS)[: len(endless.ids)]


async def test_cancel_ends_the_work_of_the_prefill_worker_too(cluster: Cluster) -> None:
    (prefill, backend), decode = await _held(cluster), await cluster.start("decode", "d1")
    asked = await cluster.gateway.ask(decode.peer, prompt_of(4 * CHUNK), [prefill.peer])
    await until(backend.is_held.is_set)
    assert (await cluster.gateway.client.cancel(decode.peer, CancelRequest(request_id=asked.request_id, epoch=0))).found
    assert decode.slots_free == decode.worker.facts.slots
    await until(lambda: prefill.worker.prefill.admitted == 0)
    backend.go_on.set()
    after = await cluster.gateway.ask(decode.peer, prompt_of(4 * CHUNK, 1), [prefill.peer])
    assert (await after.over()).ids == undisturbed(prompt_of(4 * CHUNK, 1), 8)
    assert (after.report.mode, after.report.fallback) == ("split", None)
    assert decode.worker.decode is not None
    assert decode.worker.decode.adopting.used_bytes == 0


async def test_a_gateway_that_went_away_loses_its_slots_after_its_lease_and_no_other_does(cluster: Cluster) -> None:
    clock = SkippingClock()
    decode = await cluster.start("decode", "d1", replace(SLOW, n_ctx=1 << 15), clock=clock)
    leaving = cluster.second_gateway()
    # they would end by themselves only long after this test's deadline
    far = int(3 * DEADLINE_S / SLOW.decode_run_s)
    lost = [await leaving.ask(decode.peer, prompt_of(CHUNK, seed), max_tokens=far) for seed in range(2)]
    stays = await cluster.gateway.ask(decode.peer, prompt_of(CHUNK, 2), max_tokens=200)
    for asked in (*lost, stays):
        await asked.first_token()
    await leaving.leave()
    lease_s = decode.worker.config.gateway_lease_s
    for _ in range(3):
        # within the lease its sequences run on: it may come back
        assert decode.slots_free == decode.worker.facts.slots - 3
        clock.skipped_s += 0.4 * lease_s
        heard = len(stays.ids)
        await until(lambda heard=heard: len(stays.ids) > heard + 1)  # type: ignore[misc]
    await until(lambda: decode.slots_free >= decode.worker.facts.slots - 1)
    assert (await stays.over()).ids == undisturbed(prompt_of(CHUNK, 2), 200)
    assert not any(asked.is_over for asked in lost)
    again = await cluster.gateway.ask(decode.peer, prompt_of(CHUNK, 3))
    assert (await again.over()).ids == undisturbed(prompt_of(CHUNK, 3), 8)


async def test_what_cannot_be_answered_is_refused_before_a_slot_is_taken(cluster: Cluster) -> None:
    decode = await cluster.start("decode", "d1")
    facts = decode.worker.facts
    with pytest.raises(ContextTooLong, match=str(facts.n_ctx)):
        await cluster.gateway.ask(decode.peer, prompt_of(CHUNK), max_tokens=facts.n_ctx)
    with pytest.raises(InvalidRequest, match="vocabulary"):
        await cluster.gateway.ask(decode.peer, [facts.vocab_size])
    outside = Peer("p9", "192.0.2.1:9")
    with pytest.raises(WorkerError, match="allowed networks"):
        await cluster.gateway.ask(decode.peer, prompt_of(CHUNK), [outside])
    assert decode.slots_free == facts.slots


async def test_an_engine_failure_ends_its_requests_and_says_that_another_worker_may_help(cluster: Cluster) -> None:
    decode = await cluster.start("decode", "d1", SLOW)
    asked = await cluster.gateway.ask(decode.peer, prompt_of(CHUNK), max_tokens=ENDLESS_TOKENS)
    await asked.first_token()

    def broken(_engine: object) -> None:
        raise MemoryError("gone")

    decode.worker.loop.post(broken)
    await until(lambda: asked.is_over)
    assert asked.failed is not None
    assert (asked.failed.code, asked.failed.is_retryable) == ("engine_failed", True)
    assert not decode.worker.is_ready


async def test_a_prefill_worker_that_was_predicted_to_take_long_is_waited_for_and_no_other(cluster: Cluster) -> None:
    held = HeldBackend(settings_of("prefill"))
    prefill = await cluster.start("prefill", "p1", backend=held)
    decode = await cluster.start("decode", "d1", patience=Patience(stall_s=DEADLINE_S, advance_s=0.2))
    slow, other = prompt_of(2 * CHUNK), prompt_of(2 * CHUNK, 1)
    candidate = cluster.gateway.candidate(prefill.peer, "slow", slow)
    patient = msgspec.structs.replace(candidate, patience_s=DEADLINE_S)
    first = await cluster.gateway.ask(decode.peer, slow, request_id="slow", candidates=[patient])
    await until(held.is_held.is_set)
    second = await (await cluster.gateway.ask(decode.peer, other, [prefill.peer])).over()  # behind the first one
    held.go_on.set()
    assert (second.report.mode, (await first.over()).report.mode) == ("local", "split")
    assert (first.ids, second.ids) == (undisturbed(slow, 8), undisturbed(other, 8))


async def test_the_memory_of_a_snapshot_is_used_again_and_nothing_of_the_one_before_shows(cluster: Cluster) -> None:
    prefill, decode = await cluster.start("prefill", "p1"), await cluster.start("decode", "d1")
    for tokens in (4 * CHUNK + 3, 2 * CHUNK, 5 * CHUNK + 1, CHUNK + 1, 5 * CHUNK):
        prompt = prompt_of(tokens, seed=tokens)
        answer = await (await cluster.gateway.ask(decode.peer, prompt, [prefill.peer])).over()
        assert answer.ids == undisturbed(prompt, 8)
        assert (answer.report.mode, answer.report.fallback) == ("split", None)


def test_of_spare_memories_the_larger_one_is_kept_and_taken_once() -> None:
    spare = Spare()
    assert spare.take() is None
    small, large = np.zeros(10, np.uint8), np.zeros(20, np.uint8)
    for memory in (small, large, small):
        spare.give(memory)
    assert spare.take() is large
    assert spare.take() is None
