"""An operator's orders: over HTTP to the gateway, from there signed to the worker, and seen by every gateway."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from edge_llm.engine.simulated import SimulatedSettings
from edge_llm.errors import InvalidApiKey
from edge_llm.gateway.keys import ApiKey, identify
from tests.gateway.conftest import COMPLETIONS, Reply, Service, asking, serving
from tests.loopback import CHUNK, prompt_of, running_cluster, undisturbed, until

pytestmark = pytest.mark.anyio
SLOW = SimulatedSettings(n_ctx=512, slots=4, chunk_tokens=CHUNK, decode_run_s=0.01)
PROMPT, TOKENS = prompt_of(3 * CHUNK), 60


class TwoKeys:
    """An operator, and somebody."""

    is_open = False

    def identify(self, credential: str, now_s: float) -> ApiKey:
        keys = [
            ApiKey("boss", "t", hashlib.sha256(b"sk-boss").digest(), is_operator=True),
            ApiKey("guest", "t", hashlib.sha256(b"sk-guest").digest()),
        ]
        return identify(keys, credential, now_s)


@pytest.fixture
async def guarded() -> AsyncIterator[Service]:
    async with running_cluster() as cluster, serving(cluster, TwoKeys()) as made:
        yield made


async def order(service: Service, worker: str, what: str, body: Any, key: str = "") -> Reply:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return await service.post(f"/cluster/{worker}/{what}", body, headers=headers)


async def test_a_drained_worker_loses_nothing_and_gets_nothing_until_it_is_taken_back(service: Service) -> None:
    leaving = await service.start("decode", "d1", SLOW, prefix_cache_bytes=1 << 20)
    async with service.streaming(COMPLETIONS, asking(PROMPT, max_tokens=TOKENS)) as streamed:
        await streamed.heard(lambda so_far: len(so_far.chunks) >= 2)
        await service.start("decode", "d2", SLOW, prefix_cache_bytes=1 << 20)
        reply = await order(service, "d1", "drain", {"is_draining": True})
        assert (reply.status, reply.body["worker"], reply.body["is_draining"]) == (200, "d1", True)
        await streamed.whole()
    assert streamed.own["token_ids"] == undisturbed(PROMPT, TOKENS)
    assert (streamed.own["replanned"], streamed.own["decode_node"]) == (1, "d2")
    assert leaving.slots_free == 4
    for _ in range(3):
        assert (await service.post(COMPLETIONS, asking(PROMPT))).own["decode_node"] == "d2"
    assert (await order(service, "d1", "drain", {"is_draining": False})).body["is_ready"] is True
    await until(lambda: len(service.gateway.dispatcher.view.ready()) == 2)


async def test_a_role_that_was_changed_is_what_the_cluster_shows_and_plans_with(service: Service) -> None:
    await service.start("mixed", "m1")
    await service.start("mixed", "m2")
    assert (await order(service, "m1", "role", {"role": "prefill"})).body["role"] == "prefill"
    assert (await order(service, "m2", "role", {"role": "decode"})).body["role"] == "decode"

    async def roles() -> dict[str, str]:
        async with service.client.get("/cluster") as reply:
            return {node["worker"]: node["role"] for node in (await reply.json())["nodes"]}

    async with asyncio.timeout(5):
        while await roles() != {"m1": "prefill", "m2": "decode"}:  # noqa: ASYNC110 - asks over HTTP
            await asyncio.sleep(0.01)
    answer = await service.post(COMPLETIONS, asking(PROMPT, mode="split"))
    assert (answer.own["prefill_node"], answer.own["decode_node"]) == ("m1", "m2")


async def test_what_a_worker_cannot_do_is_said_to_the_operator(service: Service) -> None:
    await service.start("decode", "d1")
    reply = await order(service, "d1", "role", {"role": "prefill"})
    assert reply.status == 400
    assert "d1 cannot read prompts for others" in reply.error["message"]


async def test_a_worker_that_nobody_knows_is_not_found(service: Service) -> None:
    reply = await order(service, "nobody", "drain", {"is_draining": True})
    assert (reply.status, reply.error["code"]) == (404, "worker_not_found")


@pytest.mark.parametrize("body", [{}, {"is_draining": "yes"}, {"is_draining": True, "more": 1}, [], None])
async def test_what_is_no_order_is_refused(service: Service, body: Any) -> None:
    await service.start("decode", "d1")
    reply = await order(service, "d1", "drain", body)
    assert (reply.status, reply.error["code"]) == (400, "invalid_request")
    assert "not an order" in reply.error["message"]


async def test_only_operators_may_change_workers(guarded: Service) -> None:
    node = await guarded.start("decode", "d1")
    for key, status in (("sk-guest", 403), ("sk-nobody", 401), ("", 401)):
        reply = await order(guarded, "d1", "drain", {"is_draining": True}, key)
        assert reply.status == status, json.dumps(reply.body)
    assert not node.worker.is_draining
    assert (await order(guarded, "d1", "drain", {"is_draining": True}, "sk-boss")).status == 200
    assert node.worker.is_draining
    with pytest.raises(InvalidApiKey):
        TwoKeys().identify("sk-nobody", 0.0)


async def test_everybody_is_told_whether_their_key_may_change_workers(guarded: Service, service: Service) -> None:
    async def caller(of: Service, **headers: str) -> Any:
        async with of.client.get("/cluster", headers=headers) as reply:
            return (await reply.json())["caller"]

    assert await caller(guarded, authorization="Bearer sk-guest") == {"id": "guest", "is_operator": False}
    assert await caller(guarded, authorization="Bearer sk-boss") == {"id": "boss", "is_operator": True}
    assert (await caller(service))["is_operator"], "without keys everybody on this machine may"
