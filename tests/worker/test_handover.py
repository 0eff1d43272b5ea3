"""How long a draining worker holds KV for whoever goes on with it: leases by a clock of the test's own, and sequences
that nobody fetches over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from edge_llm.engine.simulated import SimulatedBackend, SimulatedSettings
from edge_llm.worker.handover import CALL_S, LEASE_S, LONGEST_S, Leases
from edge_llm.worker.links import Links
from tests.loopback import CHUNK, Answer, Cluster, Node, SkippingClock, prompt_of, settings_of, until

pytestmark = pytest.mark.anyio
SLOTS = 8
MAX_TOKENS = 400
SLOW = SimulatedSettings(n_ctx=512, slots=SLOTS, chunk_tokens=CHUNK, decode_run_s=0.05)
ROOM_FOR_ONE = (CHUNK + MAX_TOKENS) * SimulatedBackend(settings_of("decode")).facts.kv_bytes_per_token
SLOW_BYTES_PER_S = 12.5e6  # 100 Mbit/s


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def links_of(**bytes_per_s: float) -> Links:
    """Ways over which bytes came so fast."""
    links, clock = Links(), Clock()
    for peer, rate in bytes_per_s.items():
        meter = links.meter(peer, clock)
        meter.answered()
        for _ in range(2000):
            clock.now_s += 0.001
            meter.came(int(rate * 0.001))
    return links


def goes_on() -> bool:
    return True


class Held:
    """Leases of a hand-over that has begun, on a clock that the test moves."""

    def __init__(self, links: Links | None = None) -> None:
        self.clock = Clock()
        self.leases = Leases(links or Links(), self.clock)
        self.leases.begin()

    def lasts_s(self, n_bytes: int) -> float:
        """How long so many bytes are held when nobody fetches them, to a tenth of a second."""
        self.leases.hold("r1", n_bytes)
        began_s = self.clock.now_s
        while self.leases.held_bytes:
            self.clock.now_s += 0.1
        return self.clock.now_s - began_s

    async def wait(self, room_bytes: int = 0, goes_on: Callable[[], bool] = goes_on) -> None:
        async with asyncio.timeout(1.0):  # of real time: far below a lease
            await self.leases.wait(room_bytes, goes_on)


# -- how long a lease is


def test_a_lease_is_long_enough_for_the_slowest_way_known() -> None:
    held = Held(links_of(fast=117e6, slow=SLOW_BYTES_PER_S))
    assert held.lasts_s(250_000_000) == pytest.approx(40.0, abs=0.2)


def test_a_lease_has_a_least_and_a_longest_duration() -> None:
    assert Held(links_of(slow=SLOW_BYTES_PER_S)).lasts_s(1000) == pytest.approx(LEASE_S, abs=0.2)
    assert Held(links_of(slow=SLOW_BYTES_PER_S)).lasts_s(8 << 30) == pytest.approx(LONGEST_S, abs=0.2)


def test_where_no_rate_is_known_the_bytes_do_not_count() -> None:
    links = Links()
    links.meter("p1", Clock()).answered()
    assert Held(links).lasts_s(8 << 30) == pytest.approx(LEASE_S, abs=0.2), "one answer says nothing of a rate"


# -- what is waited for


async def test_what_is_past_its_lease_is_forgotten() -> None:
    held = Held()
    held.leases.hold("r1", 100)
    held.clock.now_s += LEASE_S
    assert held.leases.held_bytes == 0
    await held.wait()


async def test_a_wait_is_over_with_the_lease_that_was_left() -> None:
    held = Held()
    held.leases.hold("r1", 100)
    held.clock.now_s += LEASE_S - 0.02
    waiting = asyncio.create_task(held.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    held.clock.now_s += 0.02
    await waiting


async def test_who_fetches_ends_the_wait_for_it_and_room_is_what_was_asked_for() -> None:
    held = Held()
    for name in ("r1", "r2"):
        held.leases.hold(name, 100)
    await held.wait(room_bytes=200)
    waiting = asyncio.create_task(held.wait(room_bytes=100))
    await asyncio.sleep(0)
    assert not waiting.done()
    held.leases.given("r2")
    await waiting
    assert held.leases.held_bytes == 100


async def test_nobody_is_waited_for_when_a_drain_is_taken_back() -> None:
    held, answers = Held(), [True, False]
    held.leases.hold("r1", 100)
    await held.wait(goes_on=lambda: answers.pop(0))
    assert held.leases.held_bytes == 100, "it may still be fetched"


async def test_nothing_of_an_earlier_drain_counts_in_the_next() -> None:
    held = Held()
    held.leases.hold("r1", 100)
    held.clock.now_s += 1.0
    held.leases.begin()
    await held.wait()
    assert held.lasts_s(100) == pytest.approx(LEASE_S, abs=0.2)


def test_leases_run_in_parallel_from_the_beginning_of_the_hand_over() -> None:
    held = Held()
    held.clock.now_s += LEASE_S - 3.0
    assert held.lasts_s(100) == pytest.approx(3.0, abs=0.2)
    assert held.lasts_s(100) == pytest.approx(CALL_S, abs=0.2), "long enough to be asked for"


def test_a_slow_way_on_which_each_is_fetched_costs_none_its_lease() -> None:
    held = Held()
    for number in range(SLOTS):
        held.leases.hold(f"r{number}", 100)
        held.clock.now_s += LEASE_S - 1.0
        assert held.leases.held_bytes == 100
        held.leases.given(f"r{number}")


def test_a_conversation_that_is_fetched_for_a_next_turn_prolongs_nothing() -> None:
    held = Held()
    held.clock.now_s += LEASE_S - 3.0
    held.leases.given("of no drain")
    assert held.lasts_s(100) == pytest.approx(3.0, abs=0.2)


# -- sequences that nobody fetches


async def begun(cluster: Cluster, node: Node, count: int) -> list[Answer]:
    """Answers that have their first tokens."""
    asked = [
        await cluster.gateway.ask(node.peer, prompt_of(CHUNK, seed=number), max_tokens=MAX_TOKENS)
        for number in range(count)
    ]
    for answer in asked:
        await answer.first_token()
    return asked


def failed(answers: list[Answer]) -> int:
    return sum(answer.failed is not None for answer in answers)


async def test_eight_sequences_that_nobody_fetches_are_handed_over_within_about_one_lease(cluster: Cluster) -> None:
    clock = SkippingClock()
    node = await cluster.start("decode", "d1", SLOW, clock=clock, prefix_cache_bytes=ROOM_FOR_ONE)
    answers = await begun(cluster, node, SLOTS)
    assert node.worker.decode is not None
    began_s = clock()
    draining = asyncio.create_task(node.worker.decode.hand_over())
    await until(lambda: failed(answers) == 1)
    await asyncio.sleep(0.1)
    assert failed(answers) == 1, "there is room for one copy, and it may yet be fetched"
    clock.skipped_s += LEASE_S
    while not draining.done():
        clock.skipped_s += 0.01
        await asyncio.sleep(0.01)
    assert failed(answers) == SLOTS
    assert {answer.failed.code for answer in answers if answer.failed} == {"draining"}
    assert clock() - began_s < 2 * LEASE_S


async def test_a_drain_does_not_wait_for_what_an_earlier_one_handed_over(cluster: Cluster) -> None:
    node = await cluster.start("decode", "d1", SLOW, prefix_cache_bytes=ROOM_FOR_ONE)
    standing = node.worker.standing
    for _ in range(3):
        (answer,) = await begun(cluster, node, 1)
        standing.drain()
        async with asyncio.timeout(2.0):  # far below the lease
            with pytest.raises(AssertionError, match="draining"):
                await answer.over()
        standing.resume()


async def test_a_drain_that_begins_in_the_moment_the_last_is_taken_back_owes_nothing_to_it(cluster: Cluster) -> None:
    node = await cluster.start("decode", "d1", SLOW, prefix_cache_bytes=ROOM_FOR_ONE)
    first, second = await begun(cluster, node, 2)
    node.worker.standing.drain()
    await until(lambda: first.failed is not None)
    assert second.failed is None
    node.worker.standing.resume()
    node.worker.standing.drain()
    async with asyncio.timeout(2.0):  # far below the lease
        await until(lambda: second.failed is not None)
