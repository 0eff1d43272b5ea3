"""Work that nobody waits for: it is ended where it runs, and leaves nothing behind here."""

from __future__ import annotations

import asyncio

import pytest

from edge_llm.engine.simulated import SimulatedSettings
from edge_llm.errors import RemoteProtocolError, WorkerUnreachable
from edge_llm.gateway.running import Running
from edge_llm.gateway.scheduler import Plan
from edge_llm.worker.client import Peer
from edge_llm.worker.messages import CancelReply, CancelRequest
from tests.gateway.conftest import COMPLETIONS, Service, asking
from tests.loopback import CHUNK, prompt_of, undisturbed, until

pytestmark = pytest.mark.anyio
PROMPT = prompt_of(2 * CHUNK + 3)
# 400 tokens take longer than a test waits: only a cancellation frees the slot in time
ENDLESS = SimulatedSettings(n_ctx=512, slots=2, chunk_tokens=CHUNK, decode_run_s=0.05)


async def test_what_an_earlier_gateway_of_this_name_began_is_ended(service: Service) -> None:
    node = await service.start("decode", "d1", ENDLESS)
    abandoned = asking(PROMPT, max_tokens=400)
    async with service.streaming(COMPLETIONS, abandoned) as streamed:
        await streamed.heard(lambda heard: len(heard.chunks) > 3)
        # the books of a gateway that was started anew are empty
        service.gateway.dispatcher._running.clear()
        await until(lambda: node.slots_free == 2)


async def test_a_request_whose_worker_is_lost_between_plan_and_sending_is_planned_again(service: Service) -> None:
    await service.start("decode", "d1")
    dispatcher = service.gateway.dispatcher
    plan = dispatcher._plan
    lost: list[str] = []

    def plan_and_lose(running: Running) -> Plan:
        found = plan(running)
        if not lost:
            lost.append(running.job.request_id)
            asyncio.get_running_loop().call_soon(
                dispatcher.lose, running, WorkerUnreachable("its event connection broke just now")
            )
        return found

    dispatcher._plan = plan_and_lose  # type: ignore[method-assign]
    reply = await service.post(COMPLETIONS, asking(PROMPT))
    assert lost
    assert reply.own["token_ids"] == undisturbed(PROMPT, 8)
    assert reply.own["replanned"] == 1


async def test_an_old_epoch_whose_cancellation_was_lost_is_ended_while_its_request_goes_on_elsewhere(
    service: Service,
) -> None:
    first, dispatcher = await service.start("decode", "d1", ENDLESS), service.gateway.dispatcher
    cancel, lost = dispatcher._client.cancel, list[CancelRequest]()

    async def lose_the_first(peer: Peer, request: CancelRequest) -> CancelReply:
        if not lost:
            lost.append(request)
            raise WorkerUnreachable("it did not get through")
        return await cancel(peer, request)

    dispatcher._client.cancel = lose_the_first  # type: ignore[method-assign]
    async with service.streaming(COMPLETIONS, asking(PROMPT, max_tokens=400)) as streamed:
        await streamed.heard(lambda heard: len(heard.chunks) > 3)
        second = await service.start("decode", "d2", ENDLESS)
        (running,) = dispatcher._running.values()
        dispatcher.lose(running, RemoteProtocolError("a token is missing"))
        await until(lambda: second.slots_free == 1)
        await until(lambda: first.slots_free == 2)
        assert lost
        assert not running.session.is_over
