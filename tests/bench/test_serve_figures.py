"""What answers come to: latencies, attainment, saturation, goodput by search, scales of limits, slowdown."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import msgspec
import pytest

from edge_llm.bench.goodput import Limits, Point
from edge_llm.bench.serve.answers import Answer
from edge_llm.bench.serve.metrics import DEFINITIONS, attained, figures, spread
from edge_llm.bench.serve.results import ServeFigures, Tally, schema
from edge_llm.bench.serve.saturation import LEAST, saturation
from edge_llm.bench.serve.schedule import Load
from edge_llm.bench.serve.search import Search, bracket
from edge_llm.bench.serve.slowdown import Alone, alone_of, chosen, slowdown


def answer(
    at_s: float = 0.0, ttft_s: float = 0.5, gap_s: float = 0.1, tokens: int = 11, prompt: int = 100, kind: str = ""
) -> Answer:
    """One that came in pieces of a token each, or failed."""
    found = Answer(at_s, tokens, "u", sent_s=at_s, asked_prompt_tokens=prompt, number=round(at_s * 10))
    if kind:
        found.failed(kind, "it failed")
        found.ended_s = at_s + 0.01
        return found
    found.arrivals_s = [at_s + ttft_s + number * gap_s for number in range(tokens)]
    found.first_s, found.last_s, found.pieces = found.arrivals_s[0], found.arrivals_s[-1], tokens
    found.ended_s = found.last_s
    found.counted_tokens, found.counted_by, found.prompt_tokens = tokens, "usage", prompt
    return found


# -- metrics


def test_latencies_are_what_their_definitions_say() -> None:
    found = figures([[answer(0.0), answer(1.0, ttft_s=0.7)]], is_open=True)
    assert found.events == 22
    assert found.ttft_ms is not None
    assert (found.ttft_ms.min, found.ttft_ms.max) == pytest.approx((500.0, 700.0))
    assert found.tpot_ms is not None
    assert found.tpot_ms.mean == pytest.approx(100.0), "(1.5 - 0.5) / (11 - 1)"
    assert found.itl_ms is not None
    assert found.itl_ms.n == 20, "ten gaps of each: the first token's is none"
    assert found.itl_ms.median == pytest.approx(100.0)
    assert found.e2el_ms is not None
    assert found.e2el_ms.max == pytest.approx(1700.0)
    assert found.duration_s == pytest.approx(2.7)
    assert found.request_throughput == pytest.approx(2 / 2.7)
    assert found.output_throughput == pytest.approx(22 / 2.7)
    assert found.total_token_throughput == pytest.approx(222 / 2.7)
    assert found.counted_by == {"usage": 2}
    assert {"ttft", "itl", "tpot", "e2el", "throughput", "goodput"} <= DEFINITIONS.keys()


def test_stages_that_our_gateway_reports_are_summed_up_and_what_is_no_number_is_not() -> None:
    whole, local = answer(0.0), answer(1.0)
    whole.own = {
        "mode": "split",
        "queue_ms": 3,
        "wait_ms": 7.0,
        "prefill_ms": 40.0,
        "handoff_ms": 2.5,
        "first_decode_ms": True,
    }
    local.own = {"mode": "local", "queue_ms": 5, "prefill_ms": 60.0, "handoff_ms": None}
    found = figures([[whole, local]], is_open=True)
    means = {name: one.mean for name, one in found.stages_ms.items()}
    assert means == {"queue": 4.0, "wait": 7.0, "prefill": 50.0, "handoff": 2.5}
    assert list(means) == ["queue", "wait", "prefill", "handoff"], "in the order in which they follow each other"
    assert found.modes == {"split": 1, "local": 1}


def test_what_failed_is_counted_by_kind_and_is_in_no_latency() -> None:
    answers = [answer(0.0), *(answer(1.0, kind=kind) for kind in ("http_503", "http_503", "timeout"))]
    short = answer(2.0)
    short.counted_tokens = 3
    found = figures([[*answers, short]], is_open=False)
    assert (found.requests, found.completed, found.cut_short) == (5, 1, 1)
    assert found.failed == {"http_503": 2, "timeout": 1}
    assert found.ttft_ms is not None
    assert found.ttft_ms.n == 1
    assert found.saturation is None, "a closed loop cannot be over-saturated"


def test_no_answer_at_all_has_figures_too() -> None:
    found = figures([[answer(0.0, kind="unreachable")]], is_open=True, limits=Limits(1.0, 1.0))
    assert found.ttft_ms is None
    assert found.request_throughput == 0.0
    assert found.attained is not None
    assert found.attained.attainment == 0.0
    assert figures([], is_open=True).requests == 0


def test_an_answer_in_one_piece_has_an_end_only() -> None:
    whole = answer()
    whole.first_s, whole.arrivals_s = None, []
    found = figures([[whole]], is_open=False)
    assert found.completed == 1
    assert (found.ttft_ms, found.tpot_ms, found.itl_ms) == (None, None, None)
    assert found.e2el_ms is not None


def test_passes_are_added_up_each_from_its_own_beginning() -> None:
    one, both = figures([[answer(3.0)]], is_open=False), figures([[answer(3.0)], [answer(3.0)]], is_open=False)
    assert both.duration_s == pytest.approx(2 * one.duration_s)
    assert both.request_throughput == pytest.approx(one.request_throughput)


def test_a_server_that_is_gone_early_does_not_stop_the_clock_of_an_open_loop() -> None:
    answers = [answer(float(at), kind="" if at < 10 else "unreachable") for at in range(101)]
    found = figures([answers], is_open=True, limits=Limits(1.0, 0.2))
    assert found.duration_s == pytest.approx(100.0), "when the last one was due"
    assert found.request_throughput == pytest.approx(0.1)
    assert found.attained is not None
    assert found.attained.request_goodput == pytest.approx(0.1)


def test_in_a_closed_loop_requests_that_hang_cost_time_and_in_an_open_one_only_arrivals_do() -> None:
    hung = answer(2.0, kind="timeout")
    hung.ended_s = 62.0
    assert figures([[answer(0.0), hung]], is_open=False).duration_s == pytest.approx(62.0)
    assert figures([[answer(0.0), hung]], is_open=True).duration_s == pytest.approx(2.0)
    assert figures([[hung]], is_open=True).duration_s == pytest.approx(62.0), "nothing else says how long it was"


def test_what_was_offered_in_bursts_is_the_rate_that_was_asked_for() -> None:
    bursts = [answer(8.0 * (number // 8)) for number in range(16)]
    assert figures([bursts], is_open=True).offered_per_s == pytest.approx(1.0)


def test_attainment_needs_both_limits_and_counts_failures_as_missed() -> None:
    answers = [answer(), answer(ttft_s=3.0), answer(gap_s=0.4), answer(kind="timeout")]
    found = attained(answers, Limits(1.0, 0.2), duration_s=10.0)
    assert found is not None
    assert (found.attainment, found.ttft_attainment, found.tpot_attainment) == (0.25, 0.5, 0.5)
    assert found.request_goodput == pytest.approx(0.1)
    assert found.low < 0.25 < found.high
    only_ttft = attained(answers, Limits(1.0, math.inf), 10.0)
    assert only_ttft is not None
    assert (only_ttft.attainment, only_ttft.tpot_s) == (0.5, None)


def test_a_generator_that_is_late_shows() -> None:
    late = [answer(float(number)) for number in range(20)]
    for one in late:
        one.sent_s = one.at_s + 0.2
    found = figures([late], is_open=True)
    assert found.generator is not None
    assert found.generator.is_fault
    assert found.generator.late_ms_p50 == pytest.approx(200.0)
    on_time = figures([[answer(float(number)) for number in range(20)]], is_open=True)
    assert on_time.generator is not None
    assert not on_time.generator.is_fault


def test_a_spread_has_an_interval_where_there_are_samples_for_one() -> None:
    found = spread([float(number) for number in range(101)])
    assert found is not None
    assert (found.p50, found.p90, found.p95, found.p99) == (50.0, 90.0, 95.0, 99.0)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 50.0 < found.high
    many = spread([1.0] * 3000)
    assert many is not None
    assert many.low is None
    assert spread([]) is None


# -- saturation


def served(rate_per_s: float, service_s: float, count: int, seed: int = 1) -> list[Answer]:
    """One server, first come first served, under Poisson arrivals."""
    rng, now_s, free_s, found = random.Random(seed), 0.0, 0.0, []
    for _ in range(count):
        now_s += rng.expovariate(rate_per_s)
        free_s = max(free_s, now_s) + service_s
        found.append(answer(now_s, ttft_s=free_s - now_s, gap_s=0.0, tokens=2))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_a_backlog_that_grows_is_over_saturation(seed: int) -> None:
    found = saturation([served(2.0, 1.0, 100, seed)])
    assert found.is_saturated
    assert found.backlog_growth > 10
    assert "grows" in found.why


@pytest.mark.parametrize("seed", range(8))
def test_a_server_that_keeps_up_is_not(seed: int) -> None:
    assert saturation([served(0.5, 1.0, 100, seed)]).is_saturated is False


def test_few_requests_say_nothing_and_refusals_say_it_at_once() -> None:
    assert saturation([served(9.0, 1.0, LEAST - 1)]).is_saturated is None
    refusing = [answer(float(at), kind="http_503" if at % 2 else "") for at in range(8)]
    found = saturation([refusing])
    assert found.is_saturated
    assert "refused" in found.why
    assert saturation([]).is_saturated is None


def test_one_saturated_pass_of_several_is_enough() -> None:
    assert saturation([served(0.5, 1.0, 60), served(3.0, 1.0, 60)]).is_saturated


# -- search


def searched(search: Search, keeps: float, requests: int = 200) -> list[Point]:
    """A server that keeps the limits of all up to a rate, and of ever fewer above."""
    points: list[Point] = []
    while (rate := search.next_rate(points)) is not None:
        share = min(1.0, (keeps / rate) ** 2)
        points.append(Point(rate, tuple(number < share * requests for number in range(requests))))
    return points


@pytest.mark.parametrize("first", [0.1, 1.0, 7.0, 60.0])
def test_the_highest_rate_is_found_from_below_and_from_above(first: float) -> None:
    points = searched(Search((0.9,), first, closeness=1.1, most_rates=30), keeps=7.0)
    below, above = bracket(points, 0.9)
    assert below is not None
    assert above is not None
    truth = 7.0 / math.sqrt(0.9)
    assert below <= truth <= above
    assert above / below <= 1.1
    assert len(points) <= 20


def test_a_second_goal_needs_few_more_rates() -> None:
    one = searched(Search((0.9,), 1.0, 1.1, 40), keeps=7.0)
    both = searched(Search((0.9, 0.99), 1.0, 1.1, 40), keeps=7.0)
    assert len(both) - len(one) <= 4
    for goal in (0.9, 0.99):
        below, above = bracket(both, goal)
        assert below is not None
        assert above is not None
        assert above / below <= 1.1


def test_a_search_ends_when_its_rates_are_spent_or_there_is_no_end_to_it() -> None:
    assert len(searched(Search((0.9, 0.99), 1.0, 1.0001, most_rates=5), keeps=7.0)) == 5
    never = searched(Search((0.9,), 1.0, least_per_s=0.1, most_rates=50), keeps=0.0)
    assert min(point.rate_per_s for point in never) >= 0.1
    always = searched(Search((0.9,), 1.0, most_per_s=20.0, most_rates=50), keeps=1e9)
    assert max(point.rate_per_s for point in always) <= 20.0


# -- slowdown


def test_slowdown_is_against_the_same_request_alone() -> None:
    alone = alone_of([answer(prompt=100, ttft_s=0.5, gap_s=0.1), answer(prompt=300, ttft_s=1.5, gap_s=0.1)])
    assert alone is not None
    loaded = [answer(prompt=100, ttft_s=1.0), answer(prompt=200, ttft_s=2.0), answer(prompt=300, ttft_s=3.0)]
    found = slowdown(loaded, alone, sent_alone=2)
    assert found is not None
    assert found.table["ttft"]["p50"].slowdown == pytest.approx(2.0), "of 200 tokens, on the line between: 1.0 s"
    assert found.table["tbt"]["p99"].slowdown == pytest.approx(1.0)
    assert found.table["e2e"]["p50"].limit == 1.25
    assert not found.table["e2e"]["p50"].is_kept
    assert not found.holds
    assert (found.requests, found.of, found.alone) == (3, 3, 2)


def test_nine_limits_hold_only_when_no_request_failed() -> None:
    alone = alone_of([answer()])
    assert alone is not None
    whole = slowdown([answer()] * 4, alone, 1)
    assert whole is not None
    assert whole.holds
    with_failure = slowdown([answer()] * 4 + [answer(kind="timeout")], alone, 1)
    assert with_failure is not None
    assert not with_failure.holds
    assert (with_failure.requests, with_failure.of) == (4, 5)


def test_beyond_what_was_sent_alone_the_last_one_counts() -> None:
    alone = Alone((100, 200), (1.0, 2.0), (0.1, 0.3))
    assert [alone.ttft_of(tokens) for tokens in (50, 100, 150, 200, 900)] == [1.0, 1.0, 1.5, 2.0, 2.0]
    assert alone.tpot_of(150) == pytest.approx(0.2)
    assert alone_of([answer(kind="timeout")]) is None
    assert slowdown([answer(kind="timeout")], alone, 2) is None


def test_an_answer_that_comes_at_once_is_no_measure_of_others() -> None:
    at_once = answer(gap_s=0.0)
    assert alone_of([at_once]) is None
    both = alone_of([at_once, answer(gap_s=0.1)])
    assert both is not None
    assert both.tpot_s == pytest.approx((0.1,))
    assert slowdown([answer()], Alone((100,), (0.5,), (0.0,)), 1) is None


def test_a_server_that_sends_its_whole_answer_as_one_event_has_figures_and_two_sentences() -> None:
    def lump(at_s: float) -> Answer:
        found = answer(at_s, gap_s=0.0)
        found.arrivals_s, found.pieces = found.arrivals_s[:1], 1
        return found

    tally = tally_of([(1.0, [lump(float(at)) for at in range(4)])], wants_slowdown=True)
    tally.alone["server"] = [lump(0.0)]
    found = tally.found()
    (load,) = found.contenders["server"].loads
    assert load.slowdown is None
    assert (load.figures.events, load.figures.answer_tokens) == (4, 44)
    lines = "\n".join(found.sentences)
    assert "44 answer tokens came in 4 events" in lines
    assert "server: no slowdown" in lines
    by_token = tally_of([(1.0, [answer(float(at)) for at in range(4)])]).found()
    assert not any("events" in line for line in by_token.sentences)


def test_requests_to_be_sent_alone_are_chosen_evenly_by_size() -> None:
    assert chosen([5, 1, 4, 2, 3], lambda size: size, 3) == [1, 3, 5]
    assert chosen([5, 1], lambda size: size, 3) == [1, 5]
    assert chosen([5, 1, 4], lambda size: size, 1) == [4]


# -- the whole


def tally_of(points: Sequence[tuple[float, Sequence[Answer]]], **options: object) -> Tally:
    tally = Tally(Limits(1.0, 0.2), **{"nodes": 2, **options})  # type: ignore[arg-type]
    tally.servers["server"] = {"urls": ["u"], "model": "m", "prompts": "text"}
    for rate, answers in points:
        done = tally.begin("server", Load("poisson", rate, None, len(answers)), None, 0)
        done.answers, done.is_done = list(answers), True
    return tally


def test_goodput_is_interpolated_and_divided_by_nodes() -> None:
    good, bad = [answer(float(at)) for at in range(10)], [answer(float(at), ttft_s=3.0) for at in range(10)]
    found = tally_of([(1.0, good), (2.0, [*good[:8], *bad[:2]])]).found().contenders["server"]
    at_90 = found.goodput["goodput_90"]
    assert at_90.per_s == pytest.approx(1.5)
    assert at_90.per_node_per_s == pytest.approx(0.75)
    assert at_90.bound == "between"
    assert at_90.requests_per_rate == 10
    assert any("too few for 99 %" in line for line in tally_of([(1.0, good), (2.0, bad)]).found().sentences)
    assert tally_of([(1.0, good)]).found().contenders["server"].goodput == {}, "one rate is no curve"


def test_there_is_no_figure_per_node_where_nobody_said_how_many_there_are() -> None:
    points = [
        (1.0, [answer(float(at)) for at in range(10)]),
        (2.0, [answer(float(at), ttft_s=3.0) for at in range(10)]),
    ]
    unknown = tally_of(points, nodes=None).found()
    assert unknown.contenders["server"].goodput["goodput_90"].per_node_per_s is None
    own = tally_of(points, nodes=None, own_nodes={"server": 4}).found().contenders["server"].goodput["goodput_90"]
    assert own.per_node_per_s == pytest.approx(own.per_s / 4)


@pytest.mark.parametrize(("requests", "too_few_for"), [(8, ["90 %", "99 %"]), (30, ["99 %"]), (100, [])])
def test_an_interval_of_few_requests_is_warned_of(requests: int, too_few_for: list[str]) -> None:
    good = [answer(float(at)) for at in range(requests)]
    bad = [answer(float(at), ttft_s=3.0) for at in range(requests)]
    lines = [line for line in tally_of([(1.0, good), (1.15, bad)]).found().sentences if "too few" in line]
    assert len(lines) == len(too_few_for)
    assert all(goal in line for goal, line in zip(too_few_for, lines, strict=True))


def test_a_pass_that_was_cut_is_in_no_attainment_of_a_rate() -> None:
    good = [answer(float(at)) for at in range(10)]
    tally = tally_of([(1.0, good)])
    cut = tally.begin("server", Load("poisson", 2.0, None, 10), None, 0)
    cut.answers = good[:3]
    assert [point.rate_per_s for point in tally.points("server")] == [1.0]
    cut.is_done = True
    assert [point.rate_per_s for point in tally.points("server")] == [1.0, 2.0]


def test_one_replay_is_judged_by_all_scales_of_the_limits() -> None:
    answers = [answer(float(at), ttft_s=0.1 * at + 0.05, gap_s=0.05) for at in range(10)]
    found = tally_of([(1.0, answers)], scales=(0.5, 1.0, 2.0)).found().contenders["server"].loads[0]
    assert found.slo_scales is not None
    assert found.slo_scales.attainment == {"0.5": 0.5, "1": 1.0, "2": 1.0}
    assert found.slo_scales.tightest == {"tightest_90": 1.0, "tightest_99": 1.0}


def test_an_interrupted_load_counts_what_had_ended() -> None:
    tally = Tally()
    tally.servers["server"] = {}
    done = tally.begin("server", Load("poisson", 1.0), None, 0)
    done.answers += [answer(1.0), answer(0.0), answer(2.0, kind="unfinished")]
    (load,) = tally.found().contenders["server"].loads
    assert not load.is_whole
    assert (load.figures.requests, load.figures.failed) == (2, {})
    assert any("interrupted" in line for line in tally.found().sentences)


def test_what_must_not_be_overlooked_is_said() -> None:
    answers = served(2.0, 1.0, 60)
    for one in answers:
        one.prompt_tokens, one.counted_by = 150, "events"
    answers.append(answer(40.0, kind="http_500"))
    lines = "\n".join(tally_of([(2.0, answers)]).found().sentences)
    assert "over-saturated" in lines
    assert "1 of 61 requests failed: 1 http_500" in lines
    assert "60 answers by events" in lines
    assert "9000 tokens as the server counts, 6000 were asked for" in lines


def test_figures_are_what_their_schema_says() -> None:
    found = msgspec.json.encode(tally_of([(1.0, [answer(float(at)) for at in range(20)])], scales=(1.0,)).found())
    assert msgspec.json.decode(found, type=ServeFigures).contenders["server"].loads[0].figures.completed == 20
    assert "ServeFigures" in schema()["$defs"]
