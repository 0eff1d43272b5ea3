"""What names of figures say: units, which way is better, and what is nobody's fault."""

from __future__ import annotations

import pytest

from edge_llm.report.words import Better, better, definitions, of_sample, short, shown, subject, title, unit


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (("ttft_s", "conv_1", "p90"), "s"),
        (("resumed_s_max",), "s"),
        (("ttft_added_ms_p50",), "ms"),
        (("late_p99_ms",), "ms"),
        (("cpu_us_per_token",), "us/token"),
        (("tokens_per_s",), "tokens/s"),
        (("goodput_90", "per_s"), "/s"),
        (("rss_peak_bytes",), "B"),
        (("sampler_share_greedy",), "share"),
        (("memory", "sender_growth_bytes"), "B"),
        (("decode_ratio",), "x"),
        (("ttft_s", "all", "n"), ""),
        (("requests",), ""),
    ],
)
def test_a_name_has_its_unit_and_a_statistic_that_of_what_it_is_about(path: tuple[str, ...], expected: str) -> None:
    assert unit(path) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (("policies", "predicted", "ttft_s", "all", "p90"), Better.LOWER),
        (("answers.capacity", "ttft_s"), Better.LOWER),
        (("split, 1 streams", "client_ttft_s"), Better.LOWER),
        (("client_cpu_share",), Better.NEITHER),
        (("contenders", "auto", "loads", "label poisson, 1/s", "figures", "ttft_ms", "p90"), Better.LOWER),
        (("contenders", "auto", "loads", "label poisson, 1/s", "figures", "ttft_ms", "std"), Better.NEITHER),
        (("figures", "output_throughput"), Better.HIGHER),
        (("models", "m", "arc_easy", "acc", "value"), Better.HIGHER),
        (("models", "m", "arc_easy", "acc", "stderr"), Better.NEITHER),
        (("models", "m", "arc_easy", "p_value"), Better.NEITHER),
        (("models", "x", "decode_tokens_per_s"), Better.HIGHER),
        (("traces", "conv", "regimes", "r", "arrangements", "auto", "goodput_90", "per_s"), Better.HIGHER),
        (("curve", "rate_per_s 0.5", "attainment"), Better.HIGHER),
        (("decode_ratio",), Better.HIGHER),
        (("decode_stall_ratio",), Better.LOWER),
        (("overlap_share",), Better.HIGHER),
        (("export_share",), Better.LOWER),
        (("perplexity",), Better.LOWER),
        (("kl_mean",), Better.LOWER),
        (("arc_easy", "acc_norm"), Better.HIGHER),
        (("streams_lost",), Better.PROMISE),
        (("holds",), Better.PROMISE),
        (("rows", "model m, node pi", "claim", "holds"), Better.NEITHER),
        (("rows", "model m, node pi", "claim", "holds_above_idle"), Better.NEITHER),
        (("contenders", "auto", "loads", "label poisson, 1/s", "slowdown", "holds"), Better.NEITHER),
        (("rows", "model m, node pi", "ram_share"), Better.LOWER),
        (("rows", "model m, node pi", "above_idle_ram_share"), Better.LOWER),
        (("rows", "model m, node pi", "cpu_share"), Better.LOWER),
        (("rows", "model m, node pi", "generation_tokens_per_s"), Better.HIGHER),
        (("rows", "model m, node pi", "tokens_per_joule"), Better.HIGHER),
        (("rows", "model m, node pi", "differs_from_chance"), Better.NEITHER),
        (("against_llama_perplexity", "models", "m", "wikitext", "perplexity", "llama_perplexity"), Better.REFERENCE),
        (("against_llama_perplexity", "models", "m", "wikitext", "perplexity", "ratio"), Better.NEITHER),
        (("retry_after_s_p50",), Better.NEITHER),
        (("offered_per_s",), Better.NEITHER),
        (("late_ms", "p99"), Better.NEITHER),
        (("requests",), Better.NEITHER),
        (("seconds_per_point",), Better.NEITHER),
        (("cpu_share", "client"), Better.NEITHER),
    ],
)
def test_a_name_says_which_way_is_better(path: tuple[str, ...], expected: Better) -> None:
    assert better(path) is expected


@pytest.mark.parametrize(
    "name",
    [
        "smollm2: llama.cpp: decode_tokens_per_s",
        "smollm2: default: batch4_tokens_per_s",
        "llama_server, 4 streams: client_ttft_s",
        "least_busy.all.ttft_s",
        "conv, two llama-server, 0.5/s: ttft_s",
    ],
)
def test_what_others_do_is_nobodys_regression_of_ours(name: str) -> None:
    assert better(of_sample(name)) is Better.REFERENCE


def test_a_ratio_to_others_is_ours() -> None:
    assert better(("models", "x", "default_decode_ratio")) is Better.HIGHER


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("split, 1 streams: wait_ms", ("split, 1 streams", "wait_ms")),
        ("answers.capacity.ttft_s", ("answers.capacity", "ttft_s")),
        ("conv, auto, 0.512/s: e2e_s", ("conv, auto, 0.512/s", "e2e_s")),
        ("export_share", ("", "export_share")),
    ],
)
def test_a_sample_is_somebodys_something(name: str, expected: tuple[str, str]) -> None:
    assert of_sample(name) == expected


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("overlap_share",), 0.97939, "97.9 %"),
        (("snapshot_bytes",), 39_144_960, "39.1 MB"),
        (("ram_bytes",), 8 << 30, "8.59 GB"),
        (("chunk_bytes",), 12, "12 B"),
        (("ttft_s",), 16.5716, "16.6 s"),
        (("decode_ratio",), 0.96308, "0.963"),
        (("tokens_compared",), 8296, "8,296"),
        (("tokens_per_s",), 7939.956, "7,940 tokens/s"),
        (("temperature_c",), None, "-"),
        (("ids_equal",), True, "yes"),
        (("differences",), [], "none"),
        (("turns_at_s",), [25.0, 85.0], "25 s, 85 s"),
    ],
)
def test_values_are_written_for_people(path: tuple[str, ...], value: object, expected: str) -> None:
    assert shown(path, value) == expected


def test_long_lists_say_how_long_they_are() -> None:
    assert shown(("x",), list(range(100))).endswith("... (100)")


@pytest.mark.parametrize("value", [0.0, 0.00012, 0.12345, 1.0, 12.345, 123.456, 1234.5, 999_999.0, -3.25])
def test_short_numbers_stay_within_a_percent(value: float) -> None:
    assert float(short(value).replace(",", "")) == pytest.approx(value, rel=0.01)


def test_a_heading_leaves_the_unit_to_the_cells() -> None:
    assert title("ttft_closed_loop_s_p95") == "ttft closed loop p95"
    assert title("handoff_bytes") == "handoff"
    assert subject(("ttft_s", "all", "p90")) == "ttft_s"


def test_only_words_that_occur_are_defined() -> None:
    assert [name for name, _ in definitions(["client_ttft_s", "requests"])] == ["TTFT"]
    ((_, text),) = definitions(["tpot_s"])
    assert "(E2E - TTFT) / (tokens - 1)" in text
