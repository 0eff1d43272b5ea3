"""How long the tickets of an order live: as long as they may lie with the decode worker before they are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import aiohttp
import pytest
from msgspec import structs

from edge_llm.cluster.slo import Slo
from edge_llm.cluster.view import ClusterView
from edge_llm.gateway.orders import MARGIN, Orders
from edge_llm.gateway.planner import Planner
from edge_llm.gateway.policies import policy_of
from edge_llm.gateway.running import Running
from edge_llm.gateway.scheduler import Plan
from edge_llm.worker.client import WorkerClient
from edge_llm.worker.messages import ADVANCE_S, DecodeRequest, PrefillCandidate, Rates
from edge_llm.worker.tickets import LIFETIME_S, MAX_LIFETIME_S, MAX_SKEW_S
from tests.gateway.test_planner import Scene, node
from tests.loopback import KEYS
from tests.nodes import PACED

# A board that reads 40 tokens a second: 4,096 of them take 102 s.
SLOW: Final = Rates(run_s=0.1, row_s=0.02, token_s=1 / 40)
PROMPT: Final = range(4001)
READ_S: Final = 100.0
SIGNED_S: Final = 1000.0
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def slow_boards() -> Scene:
    load = {"rates": SLOW}
    return Scene(
        *(node(f"p{number}", "prefill", n_ctx=8192, load=load) for number in (1, 2, 3)),
        node("d1", "decode", n_ctx=8192, load=load),
    )


async def ordered(scene: Scene, running: Running, plan: Plan, age_s: float = 0.0) -> DecodeRequest:
    waits = scene.planner.waits(running, plan, scene.view)
    async with aiohttp.ClientSession() as session:
        client = WorkerClient(session, KEYS, "g", lambda: SIGNED_S, lambda: "nonce")
        return Orders(client, "g").decode_request(running, plan, 0.0, waits, age_s)


def lives_s(candidate: PrefillCandidate) -> float:
    """How long after it was signed a ticket may be used, skew of clocks left out."""
    claims = KEYS.verify(candidate.ticket, candidate.worker, "prefill", SIGNED_S)
    return claims.ends_s - SIGNED_S


async def limits_told(rates: Rates, *, goes_on: bool) -> tuple[float, float]:
    scene = Scene(node("m1", "mixed", load={"rates": rates}))
    running = scene.request(range(10))
    running.job = replace(running.job, slo=Slo(tpot_s=0.2))
    if goes_on:
        running.session.delivered.extend([1, 2])
    order = await ordered(scene, running, scene.plan(running), age_s=1.5)
    return order.tpot_s, order.age_s


async def test_a_worker_is_told_of_limits_what_it_says_that_it_heeds() -> None:
    """An older one refuses fields that it does not know, and with them a stream that is to go on there."""
    now = structs.replace(PACED, run_s=0.1, token_s=0.1)
    assert await limits_told(now, goes_on=True) == (0.2, 1.5)
    assert await limits_told(now, goes_on=False) == (0.2, 0.0)
    assert await limits_told(structs.replace(now, least_piece_steps=0.0), goes_on=True) == (0.2, 0.0)
    assert await limits_told(structs.replace(now, of_limit=0.0), goes_on=True) == (0.0, 0.0)


async def test_a_ticket_of_an_idle_cluster_lives_no_longer_than_any() -> None:
    scene = slow_boards()
    running = scene.request(range(10), mode="split")
    first, second = (await ordered(scene, running, scene.plan(running))).candidates
    assert lives_s(first) == LIFETIME_S
    assert lives_s(second) == LIFETIME_S + ADVANCE_S, "the first one may be waited for in vain"


async def test_behind_long_prompts_of_slow_boards_it_lives_until_its_turn_has_come() -> None:
    scene = slow_boards()
    for _ in range(2):
        scene.plan(scene.request(PROMPT, mode="split"))
    last = scene.request(PROMPT, mode="split")
    first, *_ = (await ordered(scene, last, scene.plan(last))).candidates
    assert 2 * READ_S > LIFETIME_S + MAX_SKEW_S, "else there is nothing to see here"
    assert lives_s(first) == pytest.approx(LIFETIME_S + MARGIN * 2 * READ_S)
    assert first.patience_s >= MARGIN * READ_S > ADVANCE_S, "it is given time to read the prompt"


async def test_what_is_read_already_or_here_need_not_be_waited_for() -> None:
    scene = slow_boards()
    read, local = scene.request(PROMPT, mode="split"), scene.request(PROMPT, mode="local")
    scene.plan(read)
    scene.planner.progressed(read, 3000)
    scene.plan(local)
    last = scene.request(PROMPT, mode="split")
    assert scene.planner.waits(last, scene.plan(last), scene.view).before_s == pytest.approx(READ_S / 4)


async def test_what_a_prefill_worker_reads_for_another_decode_worker_first_is_waited_for_too() -> None:
    """d2 fetches from p1 before it fetches from p2, and p1 reads 100 s for d1 before."""
    load = {"rates": SLOW}
    p1, p2 = (node(f"p{number}", "prefill", n_ctx=8192, load=load) for number in (1, 2))
    d1, d2 = (node(f"d{number}", "decode", n_ctx=8192, load=load) for number in (1, 2))
    scene = Scene(p1, d1)
    scene.plan(scene.request(PROMPT, mode="split"))
    scene.see(p1, d2)
    scene.plan(scene.request(range(41), mode="split"))
    scene.see(p2, d2)
    last = scene.request(PROMPT, mode="split")
    made = scene.plan(last)
    assert (made.reader.worker, made.decode.worker) == ("p2", "d2")
    scene.see(p1, p2, d1, d2)
    assert scene.planner.waits(last, made, scene.view).before_s == pytest.approx(READ_S + 1.0)


async def test_its_own_prompt_is_not_waited_for_before_itself() -> None:
    scene = slow_boards()
    scene.see(scene.view.nodes[0], scene.view.nodes[-1])
    for _ in range(2):
        last = scene.request(PROMPT, mode="split")
        made = scene.plan(last)
    assert made.reader.worker == "p1"
    assert scene.planner.waits(last, made, scene.view).before_s == pytest.approx(READ_S)


async def test_nothing_lives_for_ever() -> None:
    scene = slow_boards()
    for _ in range(3):
        scene.plan(scene.request(range(8000), mode="split"))
    last = scene.request(PROMPT, mode="split")
    request = await ordered(scene, last, scene.plan(last))
    sources: Sequence[PrefillCandidate | None] = [*request.candidates, request.holder]
    assert [lives_s(source) for source in sources if source] == [MAX_LIFETIME_S] * len(sources)


async def test_a_policy_that_predicts_nothing_has_its_tickets_live_as_long() -> None:
    scene = slow_boards()
    scene.planner = Planner(policy_of("round_robin", 0), clock=lambda: scene.now_s)
    scene.planner.on_view(scene.view)
    running = scene.request(PROMPT, mode="split")
    waits = scene.planner.waits(running, scene.plan(running), ClusterView(scene.view.nodes))
    assert waits.before_s == 0.0
    assert waits.own_s == pytest.approx(READ_S)
