"""A gateway that is told to stop: whoever still comes is answered, and sent away with the answer."""

from __future__ import annotations

import asyncio

import pytest

from edge_llm.engine.simulated import SimulatedSettings
from edge_llm.worker.messages import TokenizeReply, TokenizeRequest
from tests.gateway.conftest import COMPLETIONS, Service, asking, serving
from tests.loopback import CHUNK, prompt_of, running_cluster, undisturbed, until

pytestmark = pytest.mark.anyio
SLOW = SimulatedSettings(n_ctx=512, slots=4, chunk_tokens=CHUNK, decode_run_s=0.01)
PROMPT, TOKENS = prompt_of(3 * CHUNK), 40


async def readiness(service: Service) -> tuple[int, str]:
    async with service.client.get("/readyz") as reply:
        return reply.status, await reply.text()


async def test_while_clients_still_come_they_are_answered_for_the_last_time_on_their_connection() -> None:
    async with running_cluster() as cluster, serving(cluster, leaving_s=60, drain_s=60) as service:
        await service.start("decode", "d1", SLOW)
        assert "connection" not in (await service.post(COMPLETIONS, asking(PROMPT))).headers
        async with service.streaming(COMPLETIONS, asking(PROMPT, max_tokens=TOKENS)) as streamed:
            await streamed.heard(lambda so_far: len(so_far.chunks) >= 2)
            draining = asyncio.create_task(service.gateway.drain())
            await until(lambda: service.gateway.is_leaving)
            assert await readiness(service) == (503, "draining")
            late = await service.post(COMPLETIONS, asking(PROMPT))
            assert (late.status, late.headers["connection"]) == (200, "close")
            assert not draining.done()
            await streamed.whole()
        assert streamed.own["token_ids"] == undisturbed(PROMPT, TOKENS)
        # as if nobody had come for so long
        service.gateway.config = service.gateway.config.model_copy(update={"leaving_s": 0.0})
        await draining
        refused = await service.post(COMPLETIONS, asking(PROMPT))
        assert (refused.status, refused.error["code"], refused.headers["connection"]) == (503, "draining", "close")


async def test_clients_that_never_go_away_do_not_keep_it_beyond_its_time() -> None:
    async with running_cluster() as cluster, serving(cluster, leaving_s=60, drain_s=0.2) as service:
        await service.start("decode", "d1", SLOW)
        async with service.streaming(COMPLETIONS, asking(PROMPT, max_tokens=400)) as streamed:
            await streamed.heard(lambda so_far: len(so_far.chunks) >= 2)
            await service.gateway.drain()
            await streamed.whole()
        assert streamed.chunks[-1]["error"]["code"] == "draining"


async def test_without_the_setting_what_is_new_is_refused_at_once() -> None:
    async with running_cluster() as cluster, serving(cluster) as service:
        await service.start("decode", "d1", SLOW)
        async with service.streaming(COMPLETIONS, asking(PROMPT, max_tokens=TOKENS)) as streamed:
            await streamed.heard(lambda so_far: len(so_far.chunks) >= 2)
            draining = asyncio.create_task(service.gateway.drain())
            await until(lambda: not service.gateway.intake.is_open)
            assert (await service.post(COMPLETIONS, asking(PROMPT))).error["code"] == "draining"
            await streamed.whole()
        await draining


async def test_a_request_that_is_still_being_tokenized_is_waited_for_too() -> None:
    async with running_cluster() as cluster, serving(cluster, drain_s=20) as service:
        node = await service.start("decode", "d1", SLOW)
        may_go_on, tokenize = asyncio.Event(), node.worker.tokenizer.tokenize

        async def held(request: TokenizeRequest) -> TokenizeReply:
            await may_go_on.wait()
            return await tokenize(request)

        node.worker.tokenizer.tokenize = held  # type: ignore[method-assign]
        asked = asyncio.create_task(service.post(COMPLETIONS, asking(PROMPT)))
        await until(lambda: not service.gateway.dispatcher.is_idle)
        draining = asyncio.create_task(service.gateway.drain())
        await until(lambda: not service.gateway.intake.is_open)
        done, _ = await asyncio.wait({draining}, timeout=0.2)
        assert not done
        may_go_on.set()
        assert (await asked).own["token_ids"] == undisturbed(PROMPT, 8)
        await draining
