"""Goodput of whom over whose: the first contender beside each other one and the best of them, with what is certain."""

from __future__ import annotations

import pytest

from edge_llm.bench.goodput import Limits, Point
from edge_llm.bench.serve.answers import Answer
from edge_llm.bench.serve.ratios import BEST, ratios, words
from edge_llm.bench.serve.results import Tally
from edge_llm.bench.serve.schedule import Load

N = 40


def curve(*shares: tuple[float, float]) -> list[Point]:
    """Rates with the share of requests that keep their limits."""
    return [Point(rate, tuple(number < share * N for number in range(N))) for rate, share in shares]


AUTO = curve((1.0, 1.0), (2.0, 1.0), (4.0, 0.0))
LOCAL = curve((1.0, 1.0), (2.0, 0.0))


def test_the_first_is_compared_with_each_other_and_with_the_best_of_them() -> None:
    found = ratios({"auto": AUTO, "split": curve((1.0, 0.5), (2.0, 0.0)), "local": LOCAL})
    assert list(found) == ["auto over split", "auto over local", f"auto over {BEST}"]
    at_90 = found["auto over local"]["goodput_90"]
    assert at_90.ratio == pytest.approx(2.2 / 1.1)
    assert at_90.low <= at_90.ratio <= at_90.high
    assert at_90.is_certain
    assert at_90.least == at_90.most == pytest.approx(at_90.ratio)
    assert found[f"auto over {BEST}"]["goodput_90"].ratio == at_90.ratio


def test_of_two_there_is_one_ratio() -> None:
    assert list(ratios({"auto": AUTO, "local": LOCAL})) == ["auto over local"]


def test_who_was_measured_at_one_rate_only_is_compared_with_nobody() -> None:
    assert ratios({"auto": AUTO, "local": curve((1.0, 1.0))}) == {}
    assert ratios({"auto": curve((1.0, 1.0)), "local": LOCAL, "split": LOCAL}) == {}
    assert ratios({}) == {}


def test_what_the_rates_leave_open_is_said() -> None:
    open_ended = ratios({"auto": curve((1.0, 1.0), (2.0, 1.0)), "local": LOCAL})["auto over local"]["goodput_90"]
    assert not open_ended.is_certain
    assert open_ended.most is None
    assert open_ended.bounds == {"auto": "at_least", "local": "between"}
    assert words(open_ended).endswith("it may be 1.82 to more")
    assert "may be" not in words(ratios({"auto": AUTO, "local": LOCAL})["auto over local"]["goodput_90"])


def test_the_same_requests_in_the_same_limits_are_one_for_certain_whatever_is_drawn() -> None:
    noisy = curve((1.0, 0.95), (2.0, 0.7), (4.0, 0.2))
    found = ratios({"auto": noisy, "local": noisy})["auto over local"]["goodput_90"]
    assert (found.ratio, found.low, found.high) == (1.0, 1.0, 1.0)


def test_a_run_with_several_contenders_has_them_in_its_figures_and_a_lone_one_has_none() -> None:
    def served(ttft_s: float) -> list[Answer]:
        return [
            Answer(float(at), 2, sent_s=at, first_s=at + ttft_s, last_s=at + ttft_s, ended_s=at + ttft_s, pieces=2)
            for at in range(10)
        ]

    def tally_of(*names: str) -> Tally:
        tally = Tally(Limits(1.0, 0.2))
        for name, slow in zip(names, (2.0, 1.0), strict=False):
            tally.servers[name] = {}
            for rate in (1.0, 2.0, 4.0):
                done = tally.begin(name, Load("poisson", rate), None, 0)
                done.answers, done.is_done = served(0.5 * rate / slow), True
        return tally

    found = tally_of("auto", "local").found()
    assert found.ratios["auto over local"]["goodput_90"].ratio > 1.0
    assert any(line.startswith("goodput_90 of auto over local: ") for line in found.sentences)
    assert tally_of("auto").found().ratios == {}
