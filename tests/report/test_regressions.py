"""Two records side by side: chance is not a regression, a regression is not chance, a promise is a promise."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from edge_llm.bench.record import EngineBuild
from edge_llm.report.compare import Comparison, NotComparable, compare, numbers, schema
from edge_llm.report.verdict import written
from tests.report.conftest import MODEL, PI, a_record

FILES = ("a.json", "b.json")
LIMIT = 0.05


def times(middle: float, count: int, seed: int, spread: float = 0.05) -> list[float]:
    draw = random.Random(seed)
    return [middle * (1 + spread * (draw.random() - 0.5)) for _ in range(count)]


def compared(a: dict[str, Any], b: dict[str, Any]) -> Comparison:
    return compare(a_record(**a), a_record(**b), FILES, LIMIT)


def of_samples(name: str, before: list[float], after: list[float]) -> Comparison:
    return compared({"samples": {name: before}, "figures": {}}, {"samples": {name: after}, "figures": {}})


def test_a_record_beside_itself_is_the_same() -> None:
    found = compared({}, {})
    assert found.regressions == []
    assert found.differences == []
    assert {one.verdict for one in found.samples} | {one.verdict for one in found.figures} == {"same"}


def test_two_runs_of_the_same_are_not_a_regression() -> None:
    found = of_samples("ttft_s", times(1.0, 200, 1, 0.5), times(1.0, 200, 2, 0.5))
    assert found.regressions == []
    assert found.samples[0].verdict == "same"


@pytest.mark.parametrize("count", [5, 12, 13, 300])
def test_ten_percent_slower_is_a_regression_whatever_the_number_of_samples(count: int) -> None:
    found = of_samples("ttft_s", times(1.0, count, 1), times(1.1, count, 2))
    (one,) = found.samples
    assert one.verdict == "worse"
    assert one.low is not None
    assert one.high is not None
    assert one.ratio is not None
    assert 1.0 < one.low <= one.ratio <= one.high
    assert len(found.regressions) == 1


def test_more_tokens_per_second_are_better_and_fewer_are_worse() -> None:
    fast, slow = times(120.0, 5, 1), times(100.0, 5, 2)
    assert of_samples("decode_tokens_per_s", slow, fast).samples[0].verdict == "better"
    found = of_samples("decode_tokens_per_s", fast, slow)
    assert found.samples[0].worse_by == pytest.approx(1 / 6, rel=0.2)
    assert found.regressions


def test_a_significant_change_below_the_limit_is_worse_and_no_regression() -> None:
    found = of_samples("ttft_s", times(1.0, 300, 1), times(1.02, 300, 2))
    assert found.samples[0].verdict == "worse"
    assert found.regressions == []


def test_too_few_samples_are_said_and_judge_nobody() -> None:
    found = of_samples("ttft_s", [1.0, 1.1], [9.0, 9.1])
    assert found.samples[0].verdict == "too_few"
    assert found.samples[0].p is None
    assert found.regressions == []
    assert not found.is_tested
    assert "too few values" in written(found)


def test_what_others_became_is_a_change_of_the_machine() -> None:
    found = of_samples("m: llama.cpp: decode_tokens_per_s", times(100, 9, 1), times(50, 9, 2))
    assert found.samples[0].verdict == "changed"
    assert found.regressions == []
    assert "not ours" in written(found, only_changed=True)


def test_a_median_of_zero_has_no_ratio_and_is_compared_all_the_same() -> None:
    found = of_samples("queue_s", [0.0] * 9, [1.0] * 9)
    assert found.samples[0].ratio is None
    assert found.samples[0].verdict == "worse"
    assert found.regressions


def figures(before: dict[str, Any], after: dict[str, Any]) -> Comparison:
    return compared({"figures": before, "samples": {}}, {"figures": after, "samples": {}})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"streams_lost": 0}, {"streams_lost": 1}),
        ({"holds": True}, {"holds": False}),
        ({"failed": 0}, {"failed": 1}),
        ({"per_kind": {"kill": {"bad_streams": 0}}}, {"per_kind": {"kill": {"bad_streams": 2}}}),
    ],
)
def test_a_broken_promise_is_a_regression_without_any_statistics(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert len(figures(before, after).regressions) == 1
    assert figures(after, before).regressions == []


def load(**kinds: int) -> dict[str, Any]:
    """Of 100 requests, as serve records say it."""
    figure = {"requests": 100, "completed": 100 - sum(kinds.values()), "failed": kinds}
    return {"contenders": {"split": {"loads": [{"label": "open", "figures": figure}]}}}


def test_requests_that_fail_are_a_regression_though_the_others_are_as_fast() -> None:
    found = figures(load(), load(http_500=50))
    place = "contenders / split / loads / label open / figures"
    assert found.regressions == [
        f"{place} / completed_share: was 1.0, is 0.5",
        f"{place} / failed / http_500: was 0, is 50",
    ]
    assert found.only_in_b == []
    assert figures(load(http_500=50), load()).regressions == []


def test_more_failures_of_a_kind_that_was_there_before_are_a_regression_of_the_share() -> None:
    assert [line.partition(":")[0].rpartition(" / ")[2] for line in figures(load(a=2), load(a=20)).regressions] == [
        "completed_share"
    ]
    assert figures(load(a=10), load(a=12)).regressions == []


def test_what_others_fail_at_is_no_regression_of_ours() -> None:
    def beside(**kinds: int) -> dict[str, Any]:
        return {"llama_server": load(**kinds)["contenders"]["split"]}

    assert figures(beside(), beside(http_500=50)).regressions == []


def test_shares_of_few_requests_and_of_means_are_not_tested() -> None:
    few = figures({"requests": 3, "completed": 3}, {"requests": 3, "completed": 0})
    assert [one.verdict for one in few.figures if one.path == ["completed_share"]] == ["too_few"]
    assert few.tests == 0
    assert "1 of 1 shares of completed requests (too few requests)" in written(few, only_changed=True)
    means = figures({"requests": 3.5, "completed": 3.0}, {"requests": 3.5, "completed": 0.0})
    assert [one.path for one in means.figures] == [["requests"], ["completed"]]


def test_where_nothing_could_be_tested_the_conclusion_says_so() -> None:
    text = written(of_samples("ttft_s", [1.0, 1.1], [9.0, 9.1]))
    assert "NOTHING COULD BE TESTED" in text
    assert "Not testable: 1 of 1 samples (too few values)." in text
    tested = written(of_samples("ttft_s", times(1.0, 9, 1), times(1.0, 9, 1)))
    assert "Nothing is significantly worse" in tested
    assert "Not testable" not in tested


def test_the_papers_claim_on_a_board_is_no_promise_of_ours() -> None:
    def row(holds: bool) -> dict[str, Any]:
        return {"rows": [{"model": "m", "node": "pi", "claim": {"holds": holds}}]}

    found = figures(row(True), row(False))
    assert [one.path[-1] for one in found.figures] == ["holds"]
    assert found.figures[0].verdict == "untested"
    assert found.regressions == []


def test_a_figure_without_samples_or_interval_is_shown_and_not_judged() -> None:
    found = figures({"resumed_s_max": 1.0}, {"resumed_s_max": 9.0})
    assert found.figures[0].verdict == "untested"
    assert found.regressions == []
    assert "(worse)" in written(found)


def test_figures_with_intervals_changed_when_these_are_apart() -> None:
    def goodput(per_s: float) -> dict[str, Any]:
        return {"goodput_90": {"per_s": per_s, "low": per_s - 0.1, "high": per_s + 0.1}}

    assert figures(goodput(1.0), goodput(1.15)).regressions == []
    assert figures(goodput(1.0), goodput(0.5)).regressions == ["goodput_90 / per_s: was 1.0, is 0.5"]
    assert figures(goodput(0.5), goodput(1.0)).regressions == []


def test_rows_of_lists_are_found_again_by_name_not_by_place() -> None:
    before = {"rows": [{"test": "pp512", "avg_ts": 100.0}, {"test": "tg128", "avg_ts": 10.0}]}
    after = {"rows": [{"test": "tg128", "avg_ts": 10.0}, {"test": "pp512", "avg_ts": 100.0}]}
    assert {one.verdict for one in figures(before, after).figures} == {"same"}


def test_rows_that_nothing_tells_apart_and_lists_of_numbers_are_not_compared_by_place() -> None:
    tree = {
        "x": [1.0, 2.0],
        "rows": [{"test": "a", "n": 1}, {"test": "a", "n": 2}],
        "z": "word",
        "n": float("nan"),
        "y": True,
    }
    assert numbers(tree) == {("y",): True}


def test_rows_of_a_sweep_are_told_apart_by_all_that_was_swept() -> None:
    row = {"model_type": "m", "test": "tg128", "policy": "exact", "n_threads_batch": 1, "n_batch": 8, "n_ubatch": 8}
    row |= {"type_k": "f16", "type_v": "f16", "flash_attn": 0}
    rows = [{**row, "n_threads": threads, "avg_ts": 10.0 * threads} for threads in (1, 2)]
    found = {one.ratio for one in figures({"rows": rows}, {"rows": rows[::-1]}).figures if one.path[-1] == "avg_ts"}
    assert found == {1.0}


def test_what_only_one_side_has_is_named() -> None:
    found = figures({"x_s": 1.0, "old_s": 2.0}, {"x_s": 1.0, "new_s": 2.0})
    assert (found.only_in_a, found.only_in_b) == (["old_s"], ["new_s"])
    text = written(found)
    assert "Only in A: old_s" in text
    assert "Only in B: new_s" in text


def test_records_of_two_kinds_or_with_nothing_in_common_are_refused() -> None:
    with pytest.raises(NotComparable, match=r"bench faults.*bench engine"):
        compared({"kind": "faults"}, {})
    with pytest.raises(NotComparable, match="in common"):
        compared({"figures": {"a": 1}, "samples": {}}, {"figures": {"b": 1}, "samples": {}})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nodes": [msgspec.structs.replace(PI, board="Raspberry Pi 4")]}, "DIFFERENT MACHINES"),
        ({"nodes": [msgspec.structs.replace(PI, usable_cores=(0,))]}, "DIFFERENT MACHINES"),
        ({"nodes": []}, "DIFFERENT MACHINES"),
        ({"models": [msgspec.structs.replace(MODEL, sha256="0" * 64)]}, "DIFFERENT MODEL FILES"),
        ({"engines": [EngineBuild("ours", {"flags": "-DGGML_LLAMAFILE=ON"})]}, "DIFFERENT BUILDS"),
        ({"is_complete": False}, "NOT BOTH RUNS ARE WHOLE"),
    ],
)
def test_what_makes_it_a_comparison_of_something_else_is_said_first(change: dict[str, Any], said: str) -> None:
    text = written(compared({}, change))
    assert said in text
    assert text.index(said) < text.index("B/A")


def test_what_was_asked_differs_only_where_both_say_it() -> None:
    asked = {"workload": {"rate_per_s": 1}}
    assert "DIFFERENT WORKLOADS" in written(compared(asked, {"workload": {"rate_per_s": 2}}))
    older = compared({}, asked)
    assert [(one.area, one.is_loud) for one in older.differences] == [("workload", False)]


def test_of_long_flags_only_those_that_differ_are_said() -> None:
    flags = " ".join(f"-DOPTION_{n}=ON" for n in range(20))
    a, b = ({"engines": [EngineBuild("ours", {"flags": text})]} for text in (flags, f"{flags} -DNEW=ON"))
    (found,) = compared(a, b).differences
    assert (found.a, found.b) == ("nothing more", "-DNEW=ON")


def test_other_settings_code_and_kernels_are_said_quietly() -> None:
    kernel = msgspec.structs.replace(PI, kernel="6.12", load_before=0.1, ram_bytes=PI.ram_bytes + 4096)
    found = compared({}, {"config": {"core": 2}, "tool_version": "0.2", "nodes": [kernel]})
    assert [(one.area, one.is_loud) for one in found.differences] == [
        ("machine", False),
        ("settings", False),
        ("code", False),
    ]
    assert "What else differs" in written(found)


def test_what_is_worse_comes_first() -> None:
    a = {"samples": {"a_ttft_s": times(1, 9, 1), "b_ttft_s": times(1, 9, 2)}}
    b = {"samples": {"a_ttft_s": times(1, 9, 3), "b_ttft_s": times(2, 9, 4)}}
    text = written(compared(a, b))
    assert text.index("| b_ttft_s") < text.index("| a_ttft_s")
    assert "| a_ttft_s" not in written(compared(a, b), only_changed=True)


def test_the_json_of_a_comparison_follows_its_schema() -> None:
    found = compared({}, {"nodes": []})
    assert msgspec.json.decode(msgspec.json.encode(found), type=Comparison) == found
    assert "Comparison" in schema()["$defs"]


def test_figures_without_intervals_judge_nothing_and_equal_ones_need_no_test() -> None:
    assert not figures({"ttft_s": 1.0, "requests": 3}, {"ttft_s": 4.0, "requests": 3}).is_tested
    assert figures({"ttft_s": 1.0}, {"ttft_s": 1.0}).is_tested
    assert figures({"streams_lost": 1}, {"streams_lost": 0}).is_tested
