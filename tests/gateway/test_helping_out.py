"""Workers that do the other role's work, over real sockets: a role is an identity, not a capability."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pytest

from edge_llm.engine.simulated import SimulatedSettings
from edge_llm.worker.messages import Role
from tests.gateway.conftest import COMPLETIONS, Service, asking, serving
from tests.loopback import prompt_of, running_cluster, settings_of, undisturbed

pytestmark = pytest.mark.anyio
PROMPT: Final = prompt_of(30)


def helping(role: Role) -> SimulatedSettings:
    """What a worker of `role` can do when its memory allows the other role's work too."""
    own = settings_of(role)
    return replace(own, slots=own.slots or 2, serves_prompts=True)


async def test_a_prefill_worker_with_spare_slots_answers_when_no_decode_worker_is_left(service: Service) -> None:
    node = await service.start("prefill", "p1", helping("prefill"))
    assert node.worker.role == "prefill", "it keeps its identity"
    own = (await service.post(COMPLETIONS, asking(PROMPT, "split"))).own
    assert own["token_ids"] == undisturbed(PROMPT, 8)
    assert (own["mode"], own["decode_node"]) == ("local", "p1")
    body = (await service.get("/cluster")).body
    assert [(event["kind"], event["worker"], event["to"]) for event in body["pool_events"]] == [
        ("spill", "p1", "token")
    ]
    assert body["nodes"][0]["pool"] == "prompt"


async def test_a_decode_worker_with_a_prompt_context_reads_for_another_when_no_prefill_worker_is_left(
    service: Service,
) -> None:
    for name in ("d1", "d2"):
        node = await service.start("decode", name, helping("decode"))
        assert node.worker.role == "decode"
    own = (await service.post(COMPLETIONS, asking(PROMPT, "split"))).own
    assert own["token_ids"] == undisturbed(PROMPT, 8)
    assert (own["mode"], {own["prefill_node"], own["decode_node"]}) == ("split", {"d1", "d2"})


async def test_with_both_pools_there_everybody_keeps_to_its_own(service: Service) -> None:
    await service.start("prefill", "p1", helping("prefill"))
    await service.start("decode", "d1", helping("decode"))
    own = (await service.post(COMPLETIONS, asking(PROMPT, "split"))).own
    assert (own["prefill_node"], own["decode_node"]) == ("p1", "d1")
    assert (await service.get("/cluster")).body["pool_events"] == []


async def test_a_comparison_policy_is_a_setting() -> None:
    async with running_cluster() as cluster, serving(cluster, policy="round_robin") as turns:
        for name in ("d1", "d2"):
            await turns.start("decode", name)
        made = [(await turns.post(COMPLETIONS, asking(PROMPT, "local"))).own["decode_node"] for _ in range(4)]
    assert made == ["d1", "d2", "d1", "d2"]
