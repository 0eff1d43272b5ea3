"""How fast a peer's bytes come, from when they came."""

from __future__ import annotations

import pytest

from edge_llm.worker.links import FORGOTTEN_S, GAP_S, MIN_BURST_BYTES, Links
from edge_llm.worker.messages import Link

MIB = 1 << 20


class Wire:
    """A transfer whose clock the test moves."""

    def __init__(self, links: Links | None = None) -> None:
        self.now_s = 100.0
        self.links = links or Links()
        self.ask()

    def ask(self) -> None:
        self.meter = self.links.meter("p1", lambda: self.now_s)

    def answer(self, after_s: float) -> None:
        self.now_s += after_s
        self.meter.answered()

    def read(self, after_s: float, size: int) -> None:
        self.now_s += after_s
        self.meter.came(size)

    @property
    def link(self) -> Link:
        (link,) = self.links.published
        return link


def test_reads_that_follow_each_other_say_how_fast_the_link_is() -> None:
    wire = Wire()
    wire.answer(0.002)
    wire.read(0.5, 64 << 10)  # the chunk had to be computed first
    for _ in range(40):
        wire.read(0.001, 100_000)
    assert wire.link.bytes_per_s == pytest.approx(100e6)


def test_a_peer_that_computes_slowly_is_not_a_slow_link() -> None:
    wire = Wire()
    wire.answer(0.002)
    for _ in range(10):
        wire.read(2 * GAP_S, 4 * MIB)
    assert wire.link.bytes_per_s == 0.0, "every chunk came alone"


def test_nothing_is_concluded_from_a_few_bytes() -> None:
    wire = Wire()
    wire.answer(0.002)
    wire.read(0.001, MIN_BURST_BYTES - 1)
    assert wire.link.bytes_per_s == 0.0


def test_the_round_trip_is_the_shortest_answer_and_fades() -> None:
    wire = Wire()
    for took_s in (0.010, 0.002, 0.300):
        wire.ask()
        wire.answer(took_s)
    assert wire.link.round_trip_s == pytest.approx(0.002, rel=0.05)
    assert wire.link.samples == 3
    for _ in range(300):
        wire.ask()
        wire.answer(0.020)
    assert wire.link.round_trip_s == pytest.approx(0.020), "a link that became slower is one"


def test_a_peer_that_nothing_came_from_for_a_day_is_forgotten() -> None:
    links = Links()
    for peer, now_s in (("gone", 0.0), ("here", 0.0), ("here", FORGOTTEN_S)):
        links.meter(peer, lambda now_s=now_s: now_s).answered()  # type: ignore[misc]
    assert [link.peer for link in links.published] == ["here"]


def test_a_peer_that_never_answered_has_no_link() -> None:
    assert Wire().links.published == []
