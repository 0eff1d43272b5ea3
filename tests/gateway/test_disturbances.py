"""What a client sees when others leave, workers die, slots are taken or nobody is there: a pause or a plain refusal."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import pytest

from edge_llm.engine.backend import Logits, Row
from edge_llm.engine.engine import EngineFacts
from edge_llm.engine.simulated import SimulatedBackend, SimulatedSettings
from edge_llm.request import SamplingParams
from edge_llm.worker.loop import STUCK_S
from tests.gateway.conftest import CHAT, COMPLETIONS, HELLO, PROBE_S, Service, Streamed, asking, serving
from tests.loopback import (
    CHUNK,
    DEADLINE_S,
    GREEDY,
    HeldBackend,
    Node,
    prompt_of,
    running_cluster,
    settings_of,
    undisturbed,
    until,
)

pytestmark = pytest.mark.anyio
# Long enough to still run when the test acts, slow enough to leave the machine alone.
ENDLESS: Final = 400
SLOW: Final = replace(settings_of("decode"), decode_run_s=0.005)
ONE_SLOT: Final = replace(SLOW, slots=1)
# What a client held is free again on both nodes.
FREED_S: Final = 1.0
PROMPT: Final = prompt_of(3 * CHUNK + 5)
TOKENS: Final = 60
SAMPLED: Final = SamplingParams(temperature=0.9, top_p=0.95, repeat_penalty=1.1, seed=12345)
SAMPLED_FIELDS: Final = {"temperature": 0.9, "top_p": 0.95, "repeat_penalty": 1.1, "seed": 12345}


def after(events: int) -> Any:
    return lambda streamed: len(streamed.chunks) >= events


async def is_idle(service: Service, *nodes: Node, within_s: float = DEADLINE_S) -> None:
    """Nobody holds anything any more, at the gateway and at the workers."""
    async with asyncio.timeout(within_s):
        await _is_idle(service, *nodes)


async def _is_idle(service: Service, *nodes: Node) -> None:
    await until(lambda: not service.gateway.dispatcher.requests)
    for node in nodes:
        if node.worker.decode is not None:
            await until(lambda node=node: node.slots_free == node.worker.facts.slots)  # type: ignore[misc]
        await until(lambda node=node: node.worker.prefill.admitted == 0)  # type: ignore[misc]


# -- clients that leave


async def test_a_client_that_hangs_up_mid_stream_frees_its_slot(service: Service) -> None:
    decode = await service.start("decode", "d1", ONE_SLOT)
    async with service.streaming(COMPLETIONS, asking(PROMPT, max_tokens=ENDLESS)) as streamed:
        await streamed.heard(after(3))
        assert decode.slots_free == 0
    await is_idle(service, decode, within_s=FREED_S)
    assert (await service.post(COMPLETIONS, asking(PROMPT))).own["token_ids"] == undisturbed(PROMPT, 8)


async def test_a_client_that_hangs_up_before_a_whole_answer_frees_its_slot(service: Service) -> None:
    decode = await service.start("decode", "d1", ONE_SLOT)
    asked = asyncio.create_task(service.post(COMPLETIONS, asking(PROMPT, max_tokens=ENDLESS)))
    await until(lambda: decode.slots_free == 0)
    asked.cancel()
    await is_idle(service, decode)
    assert (await service.post(COMPLETIONS, asking(PROMPT))).status == 200


async def test_a_client_that_hangs_up_while_its_prompt_is_read_ends_that_work_too(service: Service) -> None:
    backend = HeldBackend(settings_of("prefill"))
    prefill, decode = await service.start("prefill", "p1", backend=backend), await service.start("decode", "d1")
    async with service.streaming(COMPLETIONS, asking(PROMPT, "split")):
        await until(backend.is_held.is_set)
    await is_idle(service, prefill, decode, within_s=FREED_S)
    backend.go_on.set()
    own = (await service.post(COMPLETIONS, asking(PROMPT, "split"))).own
    assert (own["mode"], own["fallback"], own["token_ids"]) == ("split", None, undisturbed(PROMPT, 8))


async def test_a_client_that_hangs_up_while_it_waits_leaves_no_gap_in_the_queue(service: Service) -> None:
    decode = await service.start("decode", "d1", ONE_SLOT)
    async with service.streaming(COMPLETIONS, asking(PROMPT, max_tokens=ENDLESS)) as first:
        await first.heard(after(2))
        async with service.streaming(COMPLETIONS, asking(PROMPT)):
            await until(lambda: service.requests("queued") == 1)
            last = asyncio.create_task(service.post(COMPLETIONS, asking(PROMPT)))
            await until(lambda: service.requests("queued") == 2)
        await until(lambda: service.requests("queued") == 1)
    assert (await last).own["token_ids"] == undisturbed(PROMPT, 8)
    await is_idle(service, decode)


# -- workers that die


async def victim_of(streamed: Streamed, nodes: list[Node]) -> tuple[Node, Node]:
    """The decode worker that has the only request, and the other one."""
    await streamed.heard(after(6))
    (busy,) = [node for node in nodes if node.slots_free < node.worker.facts.slots]
    (idle,) = [node for node in nodes if node is not busy]
    return busy, idle


@pytest.mark.parametrize("mode", ["local", "split"])
@pytest.mark.parametrize(("sampling", "fields"), [(GREEDY, {}), (SAMPLED, SAMPLED_FIELDS)], ids=["greedy", "sampled"])
async def test_a_decode_worker_lost_mid_stream_costs_a_pause_and_no_token(
    service: Service, sampling: SamplingParams, fields: dict[str, Any], mode: str
) -> None:
    await service.start("prefill", "p1")
    nodes = [await service.start("decode", name, SLOW) for name in ("d1", "d2")]
    body = asking(PROMPT, mode, max_tokens=TOKENS) | fields
    reference = await service.post(COMPLETIONS, body)
    async with service.streaming(COMPLETIONS, body) as streamed:
        busy, idle = await victim_of(streamed, nodes)
        busy.server.die()
        await streamed.whole()
    assert streamed.own["token_ids"] == reference.own["token_ids"] == undisturbed(PROMPT, TOKENS, sampling)
    assert streamed.text == reference.body["choices"][0]["text"]
    assert streamed.finish_reasons == ["length"]
    assert streamed.is_done
    assert (streamed.own["replanned"], streamed.own["level"]) == (1, "exact")
    assert streamed.own["decode_node"] == idle.peer.worker
    assert min(value for name, value in streamed.own.items() if name.endswith("_ms")) >= 0
    await is_idle(service, idle)


async def test_a_decode_worker_lost_before_the_first_token_costs_nothing_but_time(service: Service) -> None:
    backend = HeldBackend(settings_of("prefill"))
    await service.start("prefill", "p1", backend=backend)
    first = await service.start("decode", "d1")
    asked = asyncio.create_task(service.post(COMPLETIONS, asking(PROMPT, "split")))
    await until(backend.is_held.is_set)
    second = await service.start("decode", "d2")
    first.server.die()
    backend.go_on.set()
    own = (await asked).own
    assert own["token_ids"] == undisturbed(PROMPT, 8)
    assert (own["decode_node"], own["replanned"]) == ("d2", 1)
    await is_idle(service, second)


async def test_a_lost_prefill_worker_is_replaced_by_the_next_candidate(service: Service) -> None:
    backend = HeldBackend(settings_of("prefill"))
    held = await service.start("prefill", "p1", backend=backend)
    await service.start("prefill", "p2")
    decode = await service.start("decode", "d1")
    asked = asyncio.create_task(service.post(COMPLETIONS, asking(PROMPT, "split")))
    await until(backend.is_held.is_set)
    held.server.die()
    own = (await asked).own
    backend.go_on.set()
    assert own["token_ids"] == undisturbed(PROMPT, 8)
    assert (own["mode"], own["prefill_node"], own["replanned"]) == ("split", "p2", 0)
    assert own["fallback"].startswith("p1: ")
    await is_idle(service, decode)


async def test_without_another_candidate_the_decode_worker_reads_the_prompt_itself(service: Service) -> None:
    backend = HeldBackend(settings_of("prefill"))
    held, decode = await service.start("prefill", "p1", backend=backend), await service.start("decode", "d1")
    asked = asyncio.create_task(service.post(COMPLETIONS, asking(PROMPT, "split")))
    await until(backend.is_held.is_set)
    held.server.die()
    own = (await asked).own
    backend.go_on.set()
    assert own["token_ids"] == undisturbed(PROMPT, 8)
    assert (own["mode"], own["prefill_node"]) == ("local", "d1")
    assert "p1: " in own["fallback"]
    assert "computed here" in own["fallback"]
    await until(lambda: len(service.gateway.dispatcher.view.nodes) == 1)
    unsplit = (await service.post(COMPLETIONS, asking(PROMPT, "split"))).own
    assert (unsplit["mode"], unsplit["fallback"]) == ("local", "not split: no other worker prefills this model")
    await is_idle(service, decode)


def hang_up_on_everybody(node: Node) -> None:
    """The network's fault, not the worker's: its connections break, it lives on."""
    for connection in node.server.server_state.connections.copy():
        connection.transport.abort()


async def test_a_request_goes_back_to_a_worker_that_it_lost_once_that_is_seen_well_again(service: Service) -> None:
    decode = await service.start("decode", "d1", SLOW)
    async with service.streaming(COMPLETIONS, asking(PROMPT, max_tokens=TOKENS)) as streamed:
        await streamed.heard(after(6))
        hang_up_on_everybody(decode)
        await streamed.whole()
    assert streamed.own["token_ids"] == undisturbed(PROMPT, TOKENS)
    assert (streamed.own["decode_node"], streamed.own["replanned"]) == ("d1", 1)


async def test_a_request_prefers_any_other_worker_to_one_that_it_lost(service: Service) -> None:
    decode = await service.start("decode", "d1", SLOW)
    async with service.streaming(COMPLETIONS, asking(PROMPT, max_tokens=TOKENS)) as streamed:
        await streamed.heard(after(6))
        await service.start("decode", "d2")
        hang_up_on_everybody(decode)
        await streamed.whole()
    assert (streamed.own["decode_node"], streamed.own["replanned"]) == ("d2", 1)


async def test_a_worker_that_came_back_elsewhere_under_its_name_is_heard_there(service: Service) -> None:
    await service.start("decode", "d1")
    assert (await service.post(COMPLETIONS, asking(PROMPT))).status == 200
    await service.start("decode", "d1")  # the old one still runs, and its connection is still open
    assert (await service.post(COMPLETIONS, asking(PROMPT))).own["token_ids"] == undisturbed(PROMPT, 8)


# -- promises


class OtherClass(SimulatedBackend):
    """The same model on a machine of another exactness class."""

    @property
    def facts(self) -> EngineFacts:
        facts = super().facts
        return replace(facts, identity=replace(facts.identity, exactness_class="c" * 64))


class SamePlan(SimulatedBackend):
    """A machine whose results depend on chunks and batches."""

    @property
    def facts(self) -> EngineFacts:
        return replace(super().facts, level="same-plan")


async def test_kv_of_another_class_takes_the_promise_away(service: Service) -> None:
    await service.start("prefill", "p1", backend=OtherClass(settings_of("prefill")))
    await service.start("decode", "d1")
    assert (await service.post(COMPLETIONS, asking(PROMPT, "split"))).own["level"] == "none"
    assert (await service.post(COMPLETIONS, asking(PROMPT, "local"))).own["level"] == "exact"


@pytest.mark.parametrize("kind", [OtherClass, SamePlan])
async def test_an_answer_that_went_on_where_it_may_differ_says_so(
    service: Service, kind: type[SimulatedBackend]
) -> None:
    first = await service.start("decode", "d1", backend=kind(SLOW))
    async with service.streaming(COMPLETIONS, asking(PROMPT, max_tokens=TOKENS)) as streamed:
        await streamed.heard(after(4))
        second = await service.start("decode", "d2", backend=SamePlan(SLOW) if kind is SamePlan else None)
        first.server.die()
        await streamed.whole()
    assert (streamed.own["replanned"], streamed.own["level"]) == (1, "none")
    alone = (await service.post(COMPLETIONS, asking(PROMPT))).own["level"]
    assert alone == second.worker.facts.level, "the next answer is promised what this worker can"


# -- slots


async def test_requests_wait_for_a_slot_in_order_and_all_are_answered(service: Service) -> None:
    decode = await service.start("decode", "d1", ONE_SLOT)
    prompts = [prompt_of(CHUNK, seed) for seed in range(4)]
    finished: list[int] = []

    async def one(at: int) -> dict[str, Any]:
        reply = await service.post(COMPLETIONS, asking(prompts[at], max_tokens=20))
        finished.append(at)
        return reply.own

    asked = []
    for at in range(len(prompts)):
        asked.append(asyncio.create_task(one(at)))
        await until(lambda at=at: sum(service.gateway.dispatcher.requests.values()) == at + 1)  # type: ignore[misc]
    owns = await asyncio.gather(*asked)
    assert [own["token_ids"] for own in owns] == [undisturbed(prompt, 20) for prompt in prompts]
    assert finished == [0, 1, 2, 3]
    waits = [own["queue_ms"] for own in owns]
    assert waits == sorted(waits)
    await is_idle(service, decode)


async def test_a_full_model_does_not_hold_up_another(service: Service) -> None:
    await service.start("decode", "d1", ONE_SLOT)
    await service.start("decode", "d2", replace(ONE_SLOT, model_name="other"))
    async with service.streaming(COMPLETIONS, {**asking(PROMPT, max_tokens=ENDLESS), "model": "simulated"}) as running:
        await running.heard(after(2))
        waiting = asyncio.create_task(service.post(COMPLETIONS, {**asking(PROMPT), "model": "simulated"}))
        await until(lambda: service.requests("queued") == 1)
        assert (await service.post(COMPLETIONS, {**asking(PROMPT), "model": "other"})).own["decode_node"] == "d2"
        unnamed = await service.post(COMPLETIONS, asking(PROMPT))
        assert (unnamed.status, unnamed.error["param"]) == (400, "model")
        assert "other, simulated" in unnamed.error["message"]
    assert (await waiting).own["decode_node"] == "d1"


@pytest.mark.parametrize("is_stream", [False, True])
async def test_when_too_many_wait_the_next_is_told_when_to_come_back(is_stream: bool) -> None:
    async with running_cluster() as cluster, serving(cluster, queue_length=1) as service:
        await service.start("decode", "d1", ONE_SLOT)
        async with service.streaming(COMPLETIONS, asking(PROMPT, max_tokens=ENDLESS)) as running:
            await running.heard(after(2))
            async with service.streaming(COMPLETIONS, asking(PROMPT)):
                await until(lambda: service.requests("queued") == 1)
                refused = await service.post(COMPLETIONS, {**asking(PROMPT), "stream": is_stream})
                assert (refused.status, refused.error["code"]) == (503, "overloaded")
                assert refused.headers["retry-after"] == "5"


async def test_who_waits_too_long_is_told_in_the_way_the_answer_would_have_come() -> None:
    async with running_cluster() as cluster, serving(cluster, queue_wait_s=0.1, keep_alive_s=0.02) as service:
        await service.start("decode", "d1", ONE_SLOT)
        async with service.streaming(COMPLETIONS, asking(PROMPT, max_tokens=ENDLESS)) as running:
            await running.heard(after(2))
            whole = await service.post(COMPLETIONS, asking(PROMPT))
            assert (whole.status, whole.headers["retry-after"]) == (503, "5")
            assert "all slots of all decode workers are taken" in whole.error["message"]
            streamed = await service.stream(CHAT, HELLO)
            assert streamed.chunks[-1]["error"]["code"] == "overloaded"
            assert streamed.keep_alives
            assert not streamed.is_done


# -- nobody there


async def test_without_a_worker_every_request_is_told_to_come_back(service: Service) -> None:
    for path, body in ((CHAT, HELLO), (COMPLETIONS, asking(PROMPT)), (CHAT, {**HELLO, "stream": True})):
        reply = await service.post(path, body)
        assert (reply.status, reply.error["type"], reply.error["code"]) == (503, "unavailable_error", "overloaded")
        assert reply.headers["retry-after"] == "2"
    assert (await service.get("/v1/models")).body["data"] == []
    async with service.client.get("/readyz") as ready:
        assert ready.status == 503


async def test_a_prefill_worker_alone_answers_nobody(service: Service) -> None:
    await service.start("prefill", "p1")
    reply = await service.post(CHAT, HELLO)
    assert (reply.status, reply.headers["retry-after"]) == (503, "2")
    assert "decodes" in reply.error["message"]
    async with service.client.get("/readyz") as ready:
        assert (ready.status, await ready.text()) == (503, "no decode worker is ready")
    await service.start("decode", "d1")
    assert (await service.post(CHAT, HELLO)).status == 200


async def test_a_gateway_that_has_lost_all_its_workers_stays_there_to_say_so() -> None:
    async with running_cluster() as cluster, serving(cluster) as service:
        only = await service.start("decode", "d1")
        async with service.client.get("/readyz") as ready:
            assert (ready.status, await ready.text()) == (200, "ready")
        only.server.die()
        await until(lambda: not service.gateway.dispatcher.view.ready())
        async with service.client.get("/readyz") as ready:
            assert (ready.status, await ready.text()) == (200, "no decode worker is ready")
        reply = await service.post(COMPLETIONS, asking(PROMPT))
        assert (reply.status, reply.headers["retry-after"]) == (503, "2")


async def test_a_gateway_that_never_finds_a_worker_answers_after_a_while_so_that_it_can_be_asked_why() -> None:
    async with running_cluster() as cluster, serving(cluster, settle_s=0.0) as service:
        async with service.client.get("/readyz") as ready:
            assert (ready.status, await ready.text()) == (200, "no decode worker is ready")
        assert (await service.get("/cluster")).body["nodes"] == []


async def test_a_draining_worker_finishes_what_it_has_and_gets_nothing_new(service: Service) -> None:
    leaving = await service.start("decode", "d1", SLOW)
    async with service.streaming(COMPLETIONS, asking(PROMPT, max_tokens=TOKENS)) as streamed:
        await streamed.heard(after(2))
        leaving.worker.standing.is_draining = True
        await until(lambda: not service.gateway.dispatcher.view.ready())
        refused = await service.post(CHAT, HELLO)
        assert (refused.status, refused.headers["retry-after"]) == (503, "2")
        await streamed.whole()
    assert streamed.own["token_ids"] == undisturbed(PROMPT, TOKENS)
    assert streamed.own["replanned"] == 0


# -- silence


async def test_a_long_prompt_is_never_silent_for_who_did_not_ask_for_progress() -> None:
    slow = SimulatedSettings(n_ctx=512, slots=4, chunk_tokens=CHUNK, prompt_token_s=0.005)
    async with running_cluster() as cluster, serving(cluster, keep_alive_s=4 * PROBE_S) as service:
        await service.start("decode", "d1", slow)
        # progress comes more often than the keep-alive is due
        streamed = await service.stream(COMPLETIONS, asking(prompt_of(8 * CHUNK), "local", return_progress=False))
    assert streamed.keep_alives
    assert streamed.own["token_ids"] == undisturbed(prompt_of(8 * CHUNK), 8)


# -- an engine that hangs


class StuckBackend(SimulatedBackend):
    """Decodes until `is_stuck` is set, then not until `go_on` is."""

    def __init__(self, settings: SimulatedSettings) -> None:
        super().__init__(settings)
        self.is_stuck, self.is_held, self.go_on = threading.Event(), threading.Event(), threading.Event()

    def decode(self, rows: Sequence[Row]) -> Logits:
        if self.is_stuck.is_set():
            self.is_held.set()
            self.go_on.wait(DEADLINE_S)
        return super().decode(rows)


async def test_a_worker_whose_engine_hangs_is_given_up_and_its_streams_go_on_elsewhere(service: Service) -> None:
    late_s = 0.0
    backend = StuckBackend(SLOW)
    stuck = await service.cluster.start("decode", "d1", backend=backend, clock=lambda: time.monotonic() + late_s)
    await service.add(stuck.peer)
    async with service.streaming(COMPLETIONS, asking(PROMPT, max_tokens=TOKENS)) as streamed:
        await streamed.heard(after(6))
        await service.start("decode", "d2", SLOW)
        backend.is_stuck.set()
        await asyncio.to_thread(backend.is_held.wait)
        late_s = STUCK_S + 1.0  # that it has been so for two minutes
        await streamed.whole()
    assert streamed.own["token_ids"] == undisturbed(PROMPT, TOKENS)
    assert (streamed.own["decode_node"], streamed.own["replanned"]) == ("d2", 1)
    assert not stuck.worker.is_ready
    backend.go_on.set()
