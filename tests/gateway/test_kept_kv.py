"""What clients see of KV that is kept: next turns, and sequences of workers that drain."""

from __future__ import annotations

import asyncio

import pytest

from edge_llm.engine.simulated import SimulatedSettings
from tests.gateway.conftest import CHAT, COMPLETIONS, Service, asking
from tests.loopback import CHUNK, prompt_of, undisturbed, until

pytestmark = pytest.mark.anyio
CACHE = 1 << 20
SLOW = SimulatedSettings(n_ctx=512, slots=4, chunk_tokens=CHUNK, decode_run_s=0.005)
PROMPT = prompt_of(4 * CHUNK + 3)


async def test_a_next_turn_says_how_much_of_it_was_kept(service: Service) -> None:
    node = await service.start("decode", "d1", prefix_cache_bytes=CACHE)
    talk = [{"role": "user", "content": "Tell me about rivers, and take your time with it."}]
    first = await service.post(CHAT, {"messages": talk, "max_tokens": 40, "temperature": 0, "ignore_eos": True})
    assert first.body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    await until(lambda: node.worker.prefixes.used_bytes > 0)
    talk += [first.body["choices"][0]["message"], {"role": "user", "content": "And lakes?"}]
    second = await service.post(CHAT, {"messages": talk, "max_tokens": 8, "temperature": 0})
    cached = second.body["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first.body["usage"]["prompt_tokens"]
    assert cached == second.body["timings"]["cache_n"] == second.own["cached_tokens"]
    fresh = await service.post(CHAT, {"messages": talk, "max_tokens": 8, "temperature": 0, "cache_prompt": False})
    assert fresh.body["timings"]["cache_n"] == 0
    assert fresh.body["choices"][0]["message"] == second.body["choices"][0]["message"]


@pytest.mark.parametrize("mode", ["local", "split"])
@pytest.mark.parametrize("begins", ["with nothing known", "as others did"])
async def test_a_worker_that_drains_hands_its_streams_over_without_computing_them_again(
    service: Service, mode: str, begins: str
) -> None:
    await service.start("prefill", "p1")
    nodes = [await service.start("decode", name, SLOW, prefix_cache_bytes=CACHE) for name in ("d1", "d2")]
    known = 6 if begins == "as others did" else 0
    if known:  # as every chat begins with the tokens of its template
        others = [asking([*PROMPT[:known], *prompt_of(9, seed)], "local", max_tokens=30) for seed in range(1, 7)]
        answers = await asyncio.gather(*(service.post(COMPLETIONS, other) for other in others))
        assert {answer.own["decode_node"] for answer in answers} == {"d1", "d2"}
    async with service.streaming(COMPLETIONS, asking(PROMPT, mode, max_tokens=90)) as streamed:
        await streamed.heard(lambda heard: len(heard.chunks) > 6)
        (busy,) = [node for node in nodes if node.slots_free < 4]
        (idle,) = [node for node in nodes if node is not busy]
        await busy.worker.drain()
        await streamed.whole()
    own = streamed.own
    assert own["token_ids"] == undisturbed(PROMPT, 90)
    assert (own["replanned"], own["level"], own["decode_node"]) == (1, "exact", idle.peer.worker)
    read_by = "p1" if mode == "split" else busy.peer.worker
    assert (own["mode"], own["prefill_node"]) == (mode, read_by), "who read the prompt, not who gave its KV away"
    assert (own["cached_tokens"], own["prefill_cached_tokens"]) == (known, 0), "the rest was computed for this request"
    assert own["fallback"] is None
    assert idle.worker.decode is not None
    if not known:
        assert idle.worker.decode.prompt_token_s == 0.0, "no prompt was computed there"


async def test_a_stream_outlives_more_drained_workers_than_it_may_lose_by_failure(service: Service) -> None:
    nodes = [await service.start("decode", f"d{n}", SLOW, prefix_cache_bytes=CACHE) for n in range(6)]
    async with service.streaming(COMPLETIONS, asking(PROMPT, "local", max_tokens=200)) as streamed:
        for _ in range(5):
            seen = len(streamed.chunks)
            await streamed.heard(lambda heard, seen=seen: len(heard.chunks) > seen + 5)  # type: ignore[misc]
            (busy,) = [node for node in nodes if node.slots_free < 4]
            await busy.worker.drain()
        await streamed.whole()
    assert streamed.own["token_ids"] == undisturbed(PROMPT, 200)
    assert streamed.own["replanned"] == 5
