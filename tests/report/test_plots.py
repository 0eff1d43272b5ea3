"""Which drawings a record has, from its samples, curves, case lines and the boards beside it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import msgspec
import pytest

from edge_llm.bench.resources import SamplerCost, Watched
from edge_llm.report.distributions import distributions
from edge_llm.report.frontier import best, candidates, frontier_plots
from edge_llm.report.rates import found_curves, rate_plots
from edge_llm.report.requests import request_of, requests_of
from edge_llm.report.timelines import kv_plots, resource_plots, stage_plots
from tests.report.conftest import MODEL, STARTED, a_record

TEN = [0.1 * n for n in range(1, 11)]


def served(count: int, case: str = "auto") -> list[dict[str, Any]]:
    return [
        {"case": case, "at_s": float(n), "ttft_s": 0.5, "e2e_s": 2.5, "tpot_s": 0.1, "prompt_tokens": 100, "tokens": 20}
        for n in range(count)
    ]


# -- distributions


def test_policies_of_the_same_requests_are_in_one_drawing() -> None:
    samples = {f"{policy}.{window}.ttft_s": TEN for policy in ("ours", "random") for window in ("all", "conv_1")}
    (plot,) = distributions(samples, [])
    assert "ours (n 10" in plot.svg
    assert "conv_1" not in plot.svg


def test_loads_and_rates_have_a_drawing_each() -> None:
    samples = {"answers.capacity.ttft_s": TEN, "answers.overload.ttft_s": TEN, "prompts.capacity.ttft_s": TEN}
    assert [plot.title.partition(":")[0] for plot in distributions(samples, [])] == ["answers", "prompts"]
    samples = {f"conv, {who}, {rate}/s: e2e_s": TEN for who in ("auto (strict)", "local") for rate in ("0.5", "1.0")}
    assert [plot.title.partition(":")[0] for plot in distributions(samples, [])] == ["conv, 0.5/s", "conv, 1.0/s"]


def test_too_few_samples_make_no_curve() -> None:
    assert distributions({"split: ttft_s": TEN[:5]}, []) == []


def test_many_samples_keep_their_ends() -> None:
    (plot,) = distributions({"load_ttft_s": [float(n) for n in range(5000)]}, [])
    assert "load (n 5000, median 2.5e+03 s)" in plot.svg
    assert len(plot.svg) < 20_000


def test_lines_of_requests_have_distributions_and_the_gaps_between_arrivals() -> None:
    plots = distributions({}, requests_of([{**line, "arrivals_s": [n, n + 0.1]} for n, line in enumerate(served(9))]))
    assert [plot.title.rpartition("(")[2] for plot in plots] == ["TTFT)", "E2E)", "TPOT)", "ITL)"]


def test_what_the_samples_have_is_not_taken_from_the_lines_again() -> None:
    samples = {"auto, poisson, 0.5/s: ttft_s": TEN, "local, poisson, 0.5/s: ttft_s": TEN, "x: e2el_s": TEN}
    plots = distributions(samples, requests_of(served(9, "auto, poisson, 0.5/s, pass 1")))
    assert [plot.title for plot in plots] == [
        "poisson, 0.5/s: time to first token (TTFT)",
        "end to end (E2E)",
        "poisson, 0.5/s: time per output token (TPOT)",
    ]


def test_answers_that_failed_are_in_no_distribution() -> None:
    assert distributions({}, requests_of([{**line, "is_complete": False} for line in served(20)])) == []


# -- curves


def curve(*rates: float) -> list[dict[str, Any]]:
    return [
        {"rate_per_s": r, "attainment": 1 - r / 2, "low": 0.0, "high": 1.0, "ttft_s": {"p90": r} if r else {}}
        for r in rates
    ]


def test_curves_beside_each_other_are_in_one_drawing() -> None:
    tree = {
        "traces": {
            "conv": {
                "regimes": {
                    "strict": {"arrangements": {"auto": {"curve": curve(0.5, 1)}, "local": {"curve": curve(1)}}}
                }
            }
        }
    }
    ((where, key, known),) = found_curves(tree)
    assert (where, key, list(known)) == (("conv", "strict"), "rate_per_s", ["auto", "local"])
    assert [plot.title for plot in rate_plots(tree)] == [
        "conv / strict: requests within their limits",
        "conv / strict: TTFT at each rate",
    ]


def test_a_rate_at_which_nobody_was_answered_has_no_latency() -> None:
    (attainment, latency) = rate_plots({"auto": {"curve": curve(0.0, 1.0)}})
    assert attainment.svg.count("<title>auto:") == 2
    assert latency.svg.count("<title>auto:") == 1


def test_lists_of_other_things_are_no_curves() -> None:
    assert rate_plots({"rows": [{"test": "pp512"}], "spots": [1.0, 2.0], "empty": []}) == []


# -- stages, KV, boards


def test_stages_of_samples_are_drawn_whole_and_after_prefill() -> None:
    stages = {
        "queue_ms": 3.0,
        "wait_ms": 10.0,
        "prefill_ms": 9000.0,
        "last_chunk_ms": 2.0,
        "adopt_ms": 5.0,
        "first_decode_ms": 20.0,
    }
    whole, tail = stage_plots({f"split: {name}": [value] for name, value in stages.items()}, [])
    assert "prefill, 9<" in whole.svg
    assert "prefill" not in tail.svg.partition("aria-label")[2].partition(">")[2].replace("prefill ended", "")


def test_a_request_of_a_server_that_reports_nothing_has_two_stages() -> None:
    (plot,) = stage_plots({}, requests_of(served(2)))
    assert "until the first token, 0.5" in plot.svg
    assert "decode, 2" in plot.svg


def test_a_request_of_ours_has_its_own_stages_and_what_is_left_is_the_network() -> None:
    line = {**served(1)[0], "own": {"queue_ms": 100, "prefill_ms": 300, "first_decode_ms": 50}}
    (plot,) = stage_plots({}, requests_of([line]))
    for said in ("queue, 0.1", "prefill, 0.3", "network, 0.05", "decode, 2"):
        assert said in plot.svg


def test_only_the_first_requests_are_drawn_and_it_says_so() -> None:
    (plot,) = stage_plots({}, requests_of(served(50)))
    assert "the first 30 of 50" in plot.title


def test_the_busiest_case_of_everybody_comes_first() -> None:
    lines = []
    for who in ("auto", "local"):
        for rate in (1, 4):
            case = f"{who}, poisson, {rate}/s, pass 1"
            lines += [{**line, "case": case, "at_s": line["at_s"] / rate} for line in served(8)]
    titles = [plot.title.partition(":")[0] for plot in stage_plots({}, requests_of(lines))]
    assert titles == ["auto, poisson, 4/s", "local, poisson, 4/s", "auto, poisson, 1/s", "local, poisson, 1/s"]
    assert kv_plots(requests_of(lines), 1000)[0].title.startswith("poisson, 4/s")


def test_requests_without_an_answer_are_in_no_drawing() -> None:
    unanswered = requests_of([{"case": "auto", "at_s": 1.0, "first_s": None, "status": 503}])
    assert len(unanswered) == 1
    assert stage_plots({}, unanswered) == []
    assert kv_plots(unanswered, 1000) == []


def test_kv_grows_with_an_answer_and_goes_with_it() -> None:
    line = {"case": "a", "sent_s": 0.0, "first_s": 1.0, "last_s": 3.0, "prompt_tokens": 100, "answer_tokens": 20}
    (plot,) = kv_plots(requests_of([line, {**line, "first_s": 2.0, "sent_s": 1.5}]), 10_000)
    path = plot.svg.partition('class="l d0" d="M')[2].partition('"')[0]
    heights = [float(point.split()[1]) for point in path.split("L")]
    assert heights[0] == heights[-1] == max(heights)  # nothing is held before the first token and after the last
    assert min(heights) < 40  # two requests at once, near the top
    assert kv_plots(requests_of([line]), 0) == []


def test_a_line_with_durations_and_one_with_moments_tell_the_same() -> None:
    moments = {"case": "a, pass 1", "sent_s": 2.0, "first_s": 2.5, "last_s": 4.5, "answer_tokens": 21}
    lengths = {"case": "a", "at_s": 2.0, "ttft_s": 0.5, "e2e_s": 2.5, "tokens": 21}
    one, other = request_of(moments, 1), request_of(lengths, 1)
    assert one == other
    assert one is not None
    assert one.metrics() == {"ttft_s": [0.5], "e2e_s": [2.5], "tpot_s": [0.1]}


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"case": "pp512", "avg_ts": 120.0},
        {"sent_s": "soon"},
        {"sent_s": True},
        {"sent_s": 5.0, "first_s": 4.0},
        {"sent_s": 1.0, "first_s": 2.0, "last_s": 1.5},
    ],
)
def test_what_is_no_request_or_runs_backwards_is_none(line: dict[str, Any]) -> None:
    assert request_of(line, 1) is None


def watched(**series: list[float | None]) -> Watched:
    count = len(next(iter(series.values())))
    return Watched(
        node="local",
        part="run",
        started_at=STARTED,
        period_s=1.0,
        at_s=[float(n) for n in range(count)],
        series={name.replace("__", "/"): values for name, values in series.items()},
        summaries={},
        sampler=SamplerCost(0.01, 3.0, count, 0),
    )


def test_boards_are_drawn_as_far_as_they_can_be_read() -> None:
    board = watched(cpu_share=[0.1, 0.9], temperature_c=[None, None], w__rss_bytes=[1e9, 2e9], w__cpu_cores=[1.0, 1.0])
    assert [plot.title for plot in resource_plots([board])] == [
        "local: CPU",
        "local: CPU of each process",
        "local: memory of each process",
    ]


def test_parts_are_called_by_what_tells_them_apart_and_the_idle_one_comes_last() -> None:
    board = watched(cpu_share=[0.1, 0.9])
    parts = ("idle", "pp64, policy exact, threads 1", "tg16, policy exact, threads 1")
    titles = [plot.title for plot in resource_plots([msgspec.structs.replace(board, part=part) for part in parts])]
    assert titles == ["pp64: CPU", "tg16: CPU", "local, idle: CPU"]
    nodes = [msgspec.structs.replace(board, node=node) for node in ("pi-1", "pi-2")]
    assert [plot.title for plot in resource_plots(nodes)] == ["pi-1: CPU", "pi-2: CPU"]


def test_a_silent_network_is_no_drawing() -> None:
    assert resource_plots([watched(net_in_bytes_per_s=[10.0, 2e3], loopback_bytes_per_s=[0.0, None])]) == []
    assert len(resource_plots([watched(net_in_bytes_per_s=[10.0, 2e6])])) == 1


def test_what_other_nodes_publish_is_drawn_with_their_units() -> None:
    board = watched(worker__kv_share=[0.1, 0.9], worker__kv_in_bytes_per_s=[1e6, 5e6], net_in_bytes_per_s=[2e6, None])
    plots = resource_plots([board])
    assert [plot.title for plot in plots] == ["local: KV cells in use", "local: KV handed over"]
    assert ">worker, kv in<" in plots[1].svg
    assert "worker, kv in: 1, 5" in plots[1].svg


# -- accuracy against speed


def test_what_no_other_beats_is_the_frontier() -> None:
    dots = [(10.0, 0.5), (20.0, 0.4), (15.0, 0.3), (20.0, 0.35), (5.0, 0.5)]
    assert best(dots, is_up=True) == [(10.0, 0.5), (20.0, 0.4)]
    assert best([(10.0, 8.0), (20.0, 9.0), (5.0, 9.0)], is_up=False) == [(10.0, 8.0), (20.0, 9.0)]


def test_speed_and_accuracy_of_a_file_are_joined_over_records_of_one_machine() -> None:
    other = msgspec.structs.replace(MODEL, name="tiny-q8_0", sha256="e" * 64)
    speeds = a_record(
        models=[MODEL, other],
        figures={"models": {"tiny-q4_0": {"decode_tokens_per_s": 50.0}, "tiny-q8_0": {"decode_tokens_per_s": 30.0}}},
    )
    right = a_record(
        kind="accuracy",
        models=[MODEL, other],
        nodes=[],
        figures={"rows": [{"model": "tiny-q4_0", "accuracy": 0.4}, {"model": "tiny-q8_0", "accuracy": 0.45}]},
    )
    old = a_record(started_at=STARTED - timedelta(days=9), models=[MODEL], figures={"decode_tokens_per_s": 1.0})
    found = {one.model: (one.tokens_per_s, one.accuracy) for one in candidates([speeds, right, old])}
    assert found == {"tiny-q4_0": (50.0, 0.4), "tiny-q8_0": (30.0, 0.45)}
    (plot,) = frontier_plots([speeds, right, old])
    assert "Raspberry Pi 5" in plot.title
    assert frontier_plots([speeds]) == []


def test_what_was_measured_otherwise_is_not_drawn_beside_it() -> None:
    other = msgspec.structs.replace(MODEL, name="tiny-q8_0", file="tiny-q8_0.gguf", sha256="e" * 64)
    speeds = ((MODEL.file, 40.0), (other.file, 25.0))
    rows = [
        {"model_filename": file, "n_prompt": n_prompt, "n_gen": n_gen, "avg_ts": times * rate}
        for file, rate in speeds
        for n_prompt, n_gen, times in ((512, 0, 20.0), (0, 128, 1.0))
    ]
    board = a_record(kind="node", models=[MODEL, other], figures={"rows": rows})
    both = {"rows": [{"model": MODEL.name, "accuracy": 0.4}, {"model": other.name, "accuracy": 0.45}]}
    right = a_record(kind="accuracy", models=[MODEL, other], nodes=[], figures=both)
    # newer, of other items and another placement, and of one model only
    alone = a_record(kind="cluster", models=[MODEL], figures={"accuracy": 0.9, "generation_tokens_per_s": 7.0})
    found = {one.model: (one.tokens_per_s, one.accuracy) for one in candidates([alone, right, board])}
    assert found == {MODEL.name: (40.0, 0.4), other.name: (25.0, 0.45)}
