"""Fairness between keys, and what is predicted of waiting: simulations with a clock of their own, no sockets."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.gateway.fairness import QUANTUM_TOKENS, DeficitRoundRobin
from edge_llm.gateway.service import UNKNOWN_RETRY_S, Service, tokens_ahead


def jain(values: list[float]) -> float:
    """1 = all have the same; 1/n = one has all (Jain, Chiu and Hawe, 1984)."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def serve_in_order(robin: DeficitRoundRobin[tuple[str, int]], until_empty: str) -> list[tuple[str, int]]:
    """Serve one after another until the first key has nothing left."""
    served = []
    while until_empty in robin.backlog():
        item = robin.order()[0]
        robin.serve(item[0], item)
        served.append(item)
    return served


def test_four_keys_get_the_same_tokens_however_long_their_requests_and_their_queues_are() -> None:
    robin: DeficitRoundRobin[tuple[str, int]] = DeficitRoundRobin()
    lengths = {"chat": 150, "code": 900, "documents": 4000, "mixed": 0}
    source = random.Random(4)
    cost: dict[tuple[str, int], int] = {}
    for name, length in lengths.items():
        total = 0
        while total < 100_000 * (20 if name == "documents" else 1):
            item = (name, len(cost))
            cost[item] = length or source.randint(50, 3000)
            total += cost[item]
            robin.add(name, item, cost[item])
    served: Counter[str] = Counter()
    for item in serve_in_order(robin, "chat"):
        served[item[0]] += cost[item]
    assert jain([float(served[name]) for name in lengths]) > 0.99


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5000)), min_size=1, max_size=60), st.integers(1, 500))
def test_keys_that_wait_never_differ_by_more_than_two_requests_and_a_quantum(
    requests: list[tuple[str, int]], quantum: int
) -> None:
    """The bound of deficit round robin, at every moment at which all keys wait."""
    robin: DeficitRoundRobin[int] = DeficitRoundRobin(quantum)
    for number, (name, cost) in enumerate(requests):
        robin.add(name, number, cost)
    dearest = max(cost for _, cost in requests)
    served: Counter[str] = Counter({name: 0 for name, _ in requests})
    everybody = set(served)
    while set(robin.backlog()) == everybody:
        name, cost = requests[robin.order()[0]]
        robin.serve(name, robin.order()[0])
        served[name] += cost
        assert max(served.values()) - min(served.values()) <= 2 * dearest + quantum


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5000)), min_size=1, max_size=40))
def test_everybody_is_in_the_order_once_and_those_of_one_key_in_theirs(requests: list[tuple[str, int]]) -> None:
    robin: DeficitRoundRobin[int] = DeficitRoundRobin()
    for number, (name, cost) in enumerate(requests):
        robin.add(name, number, cost)
    order = robin.order()
    assert sorted(order) == list(range(len(requests)))
    for key in "abc":
        own = [number for number in order if requests[number][0] == key]
        assert own == sorted(own)


def test_a_key_that_could_not_go_saves_up_no_more_than_its_dearest_request() -> None:
    robin: DeficitRoundRobin[str] = DeficitRoundRobin()
    robin.add("stuck", "long", 1000)
    for number in range(100):
        robin.add("busy", f"b{number}", 1000)
    for number in range(50):
        robin.serve("busy", f"b{number}")  # the long one was tried first and could not go
    for number in range(10):
        robin.add("stuck", f"s{number}", 1000)
    first = []
    for _ in range(20):
        item = robin.order()[0]
        robin.serve("busy" if item.startswith("b") else "stuck", item)
        first.append(item[0])
    assert first[0] == "l"
    assert abs(first.count("b") - 10) <= 1, "one request ahead, not fifty"


def test_a_short_request_of_a_new_key_comes_before_the_long_ones_that_wait() -> None:
    robin: DeficitRoundRobin[str] = DeficitRoundRobin()
    for number in range(50):
        robin.add("heavy", f"h{number}", 4000)
    robin.serve("heavy", robin.order()[0])
    robin.add("light", "hello", QUANTUM_TOKENS)
    assert robin.order()[0] == "hello"


# -- a whole cluster, simulated


@dataclass
class Simulation:
    """`slots` workers that take `seconds(tokens)` for a request; the order is the queue's."""

    slots: int
    seconds: Callable[[int], float]
    robin: DeficitRoundRobin[int] = field(default_factory=DeficitRoundRobin)
    service: Service = field(default_factory=Service)
    now_s: float = 0.0
    came: dict[int, tuple[str, int, float]] = field(default_factory=dict)
    begun: dict[int, float] = field(default_factory=dict)
    running: list[tuple[float, int]] = field(default_factory=list)

    def come(self, key: str, tokens: int) -> int:
        number = len(self.came)
        self.came[number] = (key, tokens, self.now_s)
        self.robin.add(key, number, tokens)
        self._begin()
        return number

    def until(self, end_s: float) -> None:
        while self.running and self.running[0][0] <= end_s:
            self.now_s, number = heapq.heappop(self.running)
            self.service.ended("m", str(number), self.now_s, self.came[number][1])
            self._begin()
        self.now_s = end_s

    def _begin(self) -> None:
        while len(self.running) < self.slots and (order := self.robin.order()):
            number = order[0]
            key, tokens, _ = self.came[number]
            self.robin.serve(key, number)
            self.begun[number] = self.now_s
            self.service.began("m", str(number), self.now_s)
            heapq.heappush(self.running, (self.now_s + self.seconds(tokens), number))

    def waited_s(self, number: int) -> float:
        return self.begun[number] - self.came[number][2]


def test_one_tenants_long_prompts_never_starve_another() -> None:
    cluster = Simulation(slots=4, seconds=lambda tokens: tokens / 100)
    for _ in range(200):
        cluster.come("heavy", 4000)
    waits = []
    for _ in range(40):
        cluster.until(cluster.now_s + 25.0)
        waits.append(cluster.come("light", 200))
    cluster.until(cluster.now_s + 2000.0)
    longest_s = max(cluster.waited_s(number) for number in waits)
    assert longest_s <= 40.0, "at most what runs has to end: 4,000 tokens at 100 a second"


@pytest.mark.parametrize("spread", [0.0, 1.0], ids=["all alike", "from 1 to 40 times"])
@pytest.mark.parametrize("slots", [1, 8])
def test_predicted_waiting_is_what_comes_to_pass(slots: int, spread: float) -> None:
    source = random.Random(7)

    def tokens() -> int:
        return int(400 * 40 ** (source.random() * spread))

    cluster = Simulation(slots, seconds=lambda tokens: tokens / 50 * source.uniform(0.7, 1.3))
    for _ in range(60 * slots):
        cluster.come("a", tokens())
    while len(cluster.begun) < 16 + slots:
        cluster.until(cluster.now_s + 1.0)
    predicted, number = [], []
    for _ in range(150):
        cluster.until(cluster.now_s + tokens() / 50 / slots * 0.9)
        size = tokens()
        backlog = cluster.robin.backlog()
        wait_s = cluster.service.wait_s("m", tokens_ahead(backlog, backlog, "a", size))
        assert wait_s is not None
        predicted.append(wait_s)
        number.append(cluster.come("a", size))
    cluster.until(1e6)
    waited = [cluster.waited_s(n) for n in number]
    assert sum(waited) / len(waited) > 10, "nothing was learnt from a queue that is empty"
    assert sum(predicted) / sum(waited) == pytest.approx(1.0, abs=0.3)


def test_what_waits_before_a_new_request_is_its_own_key_and_as_much_of_the_others() -> None:
    backlog = {"heavy": 50_000, "light": 300}
    assert tokens_ahead(backlog, backlog, "light", 100) == 300 + 400
    assert tokens_ahead(backlog, backlog, "new", 100) == 100 + 100
    assert tokens_ahead(backlog, backlog, "heavy", 100) == 50_000 + 300
    assert tokens_ahead({}, {}, "new", 100) == 0
    assert tokens_ahead(backlog, {"heavy": 1000, "light": 30}, "light", 100) == 30 + 8, "a 125th of the heavy key's"


def test_failures_teach_nothing_and_little_is_not_enough() -> None:
    service = Service()
    for number in range(20):
        service.began("m", f"{number}", 0.0)
        service.ended("m", f"{number}", 0.001, None)
    assert service.wait_s("m", 1000) is None
    assert service.retry_after_s("m", None, 0.0) == UNKNOWN_RETRY_S
    for number in range(5):
        service.began("m", f"{number}", 0.0)
    for number in range(4):
        service.ended("m", f"{number}", 10.0, 100)
    assert service.wait_s("m", 1000) == pytest.approx(100.0)
    assert service.wait_s("other", 1000) is None
    service.ended("m", "never began", 10.0, 100)
    assert service.running("m") == 1


def test_who_is_refused_is_told_when_enough_has_drained_in_whole_seconds() -> None:
    service = Service()
    for number in range(40):
        service.began("m", f"{number}", 0.0)
    for number in range(32):
        service.ended("m", f"{number}", 10.0, 100)
    assert service.tokens_per_s("m") == pytest.approx(80.0)  # eight run on, ten tokens a second each
    assert service.retry_after_s("m", 42.3, 30.0) == 13
    assert service.retry_after_s("m", None, 0.0) == 2  # 100 tokens at 80 a second: until the next one ends
    assert service.retry_after_s("m", 1e9, 30.0) == 120
