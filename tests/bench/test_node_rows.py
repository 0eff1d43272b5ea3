"""The words of bench node: lists, names of tests, their order, and every output format."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from typing import Any

import pytest

from edge_llm.bench.node_rows import (
    FORMATS,
    LLAMA_BENCH_COLUMNS,
    OUR_COLUMNS,
    BadList,
    NodeTest,
    Sweep,
    Table,
    complete,
    flash_attentions,
    numbers,
    pairs,
    words,
)


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (["512"], (512,)),
        (["1,2,4"], (1, 2, 4)),
        (["1-4"], (1, 2, 3, 4)),
        (["0-4096+2048"], (0, 2048, 4096)),
        (["1-10*2"], (1, 2, 4, 8)),
        (["8,1-4*2,16-18"], (8, 1, 2, 4, 16, 17, 18)),
        (["1", "2,3"], (1, 2, 3)),
        (["4,4"], (4,)),
        (["5-5"], (5,)),
    ],
)
def test_lists_and_ranges_are_read_as_llama_bench_reads_them(texts: list[str], values: tuple[int, ...]) -> None:
    assert numbers(texts, "-p") == values


@pytest.mark.parametrize(
    "text", ["", "a", "1,", "1-", "-1", "1-4/2", "4-1", "1-4+0", "0-4*2", "1-9*1", "1.5", "1-9999999"]
)
def test_a_list_that_cannot_be_read_is_refused_by_its_option(text: str) -> None:
    with pytest.raises(BadList, match=r"^-ub: "):
        numbers([text], "-ub")


def test_a_value_below_the_least_is_refused() -> None:
    with pytest.raises(BadList, match="0 is below 1"):
        numbers(["2,0"], "-b", least=1)


def test_words_are_those_allowed_and_flash_attention_has_llama_cpps_spellings() -> None:
    assert words(["f16,q8_0", "f16"], "-ctk", ("f16", "q8_0")) == ("f16", "q8_0")
    with pytest.raises(BadList, match="'q3' is none of f16, q8_0"):
        words(["q3"], "-ctk", ("f16", "q8_0"))
    assert flash_attentions(["0,1", "auto", "off"], "-fa") == ("off", "on", "auto")
    with pytest.raises(BadList):
        flash_attentions(["yes"], "-fa")


def test_pairs_are_a_prompt_and_a_decode_length_each() -> None:
    assert pairs(["512,128", "64,0"], "-pg") == ((512, 128), (64, 0))
    for text in ("512", "512,128,3", "a,b"):
        with pytest.raises(BadList, match="-pg"):
            pairs([text], "-pg")


@pytest.mark.parametrize(
    ("test", "name", "phase"),
    [
        (NodeTest(512, 0), "pp512", "prefill"),
        (NodeTest(0, 128), "tg128", "decode"),
        (NodeTest(512, 128), "pp512+tg128", "both"),
        (NodeTest(512, 0, 2048), "pp512 @ d2048", "prefill"),
        (NodeTest(0, 128, 64, n_parallel=4), "tg128 x 4 @ d64", "decode"),
    ],
)
def test_a_test_is_named_as_llama_bench_names_it(test: NodeTest, name: str, phase: str) -> None:
    assert (test.name, test.phase) == (name, phase)


def test_a_micro_batch_is_what_llama_cpp_makes_of_both_sizes() -> None:
    assert NodeTest(512, 0, n_batch=64, n_ubatch=128).micro_batch == 64
    assert NodeTest(512, 0, n_batch=2048, n_ubatch=128).micro_batch == 128
    assert NodeTest(16, 0).micro_batch == 256  # never more than there are cells


def test_policy_exact_has_no_flash_attention_unless_it_is_asked_for() -> None:
    assert NodeTest(1, 0, policy="exact").effective_flash_attention == "off"
    assert NodeTest(1, 0, policy="exact", flash_attention="on").effective_flash_attention == "on"
    assert NodeTest(1, 0, policy="fast").effective_flash_attention == "auto"


def test_tests_come_in_llama_benchs_order() -> None:
    sweep = Sweep(
        n_prompt=(8, 16), n_gen=(4,), n_pg=((8, 4),), n_depth=(0, 32), threads_decode=(1, 2), threads_prefill=(1, 2)
    )
    found = [(test.n_threads, test.name) for test in sweep.tests()]
    names = ["pp8", "pp16", "tg4", "pp8+tg4"]
    assert found == [(threads, name + depth) for threads in (1, 2) for depth in ("", " @ d32") for name in names]


def test_a_sweep_of_one_phase_does_not_measure_the_other_one_again() -> None:
    tests = Sweep(n_prompt=(8,), n_gen=(4,), threads_decode=(1, 2, 4), threads_prefill=(3,)).tests()
    assert [(test.name, test.shown_threads) for test in tests] == [("pp8", 3), ("tg4", 1), ("tg4", 2), ("tg4", 4)]


def test_only_decode_tests_have_several_sequences() -> None:
    tests = Sweep(n_prompt=(8,), n_gen=(4,), n_pg=((8, 4),), n_parallel=(1, 8)).tests()
    assert [test.name for test in tests] == ["pp8", "tg4", "tg4 x 8", "pp8+tg4"]


def test_every_other_list_multiplies_and_policies_are_outermost() -> None:
    tests = Sweep(n_gen=(0,), policies=("exact", "fast"), type_k=("f16", "q8_0"), n_ubatch=(64, 512)).tests()
    assert [(test.policy, test.n_ubatch, test.type_k) for test in tests] == [
        (policy, n_ubatch, type_k)
        for policy in ("exact", "fast")
        for n_ubatch in (64, 512)
        for type_k in ("f16", "q8_0")
    ]


def test_a_memory_curve_has_each_context_with_and_without_flash_attention_and_else_the_first_settings() -> None:
    points = Sweep(n_ubatch=(64, 512), type_k=("q8_0", "f16"), threads_prefill=(2, 1)).curve([256, 1000])
    assert [(point.cells, point.flash_attention) for point in points] == [
        (256, "off"),
        (256, "on"),
        (1024, "off"),
        (1024, "on"),
    ]
    assert {(point.n_ubatch, point.type_k, point.n_threads_batch) for point in points} == {(64, "q8_0", 2)}


def test_sizes_of_zero_are_no_tests() -> None:
    assert Sweep(n_prompt=(0,), n_gen=(0,), n_pg=((0, 0),)).tests() == []


def a_row(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys((*LLAMA_BENCH_COLUMNS, *OUR_COLUMNS))
    about = {
        "model_filename": 'odd "name", with commas.gguf',
        "model_type": "llama 135M Q4_1",
        "model_size": 95 << 20,
        "model_n_params": 134_515_008,
        "backends": "CPU",
        "n_threads": 1,
        "repack": True,
        "policy": "exact",
        "level": "exact",
        "test": "tg128",
        "avg_ts": 41.256,
        "stddev_ts": 0.5,
        "roofline_share": 0.4567,
        "rss_peak_bytes": 200 << 20,
        "cpu_share": 0.5,
        "is_complete": True,
        "samples_ns": [1, 2],
        "samples_ts": [41.0, 41.5],
    }
    return {**row, **about, **changes}


def printed(form: str, *rows: dict[str, Any], **arguments: Any) -> str:
    table = Table(form, **arguments)
    return table.head() + "".join(table.line(row) for row in rows) + table.foot()


def test_csv_begins_with_llama_benchs_columns_and_reads_back() -> None:
    found = list(csv.DictReader(io.StringIO(printed("csv", a_row(), a_row(test="pp512", ratio=1.01)))))
    assert list(found[0])[: len(LLAMA_BENCH_COLUMNS)] == list(LLAMA_BENCH_COLUMNS)
    assert found[0]["model_filename"] == 'odd "name", with commas.gguf'
    assert (found[0]["avg_ts"], found[0]["repack"], found[0]["power_w"]) == ("41.256000", "1", "")
    assert (found[1]["test"], found[1]["ratio"]) == ("pp512", "1.010000")


def test_json_is_an_array_of_rows_with_their_samples_and_null_for_what_was_not_measured() -> None:
    found = json.loads(printed("json", a_row(), a_row(test="pp512")))
    assert [row["test"] for row in found] == ["tg128", "pp512"]
    assert (found[0]["samples_ns"], found[0]["samples_ts"], found[0]["power_w"]) == ([1, 2], [41.0, 41.5], None)
    assert json.loads(printed("json")) == []


def test_jsonl_is_a_row_a_line() -> None:
    lines = printed("jsonl", a_row(), a_row()).splitlines()
    assert [json.loads(line) for line in lines] == [complete(a_row())] * 2


def test_sql_makes_a_table_that_can_be_asked() -> None:
    database = sqlite3.connect(":memory:")
    database.executescript(printed("sql", a_row(model_filename="it's.gguf")))
    found = database.execute("SELECT model_filename, avg_ts, ratio, typeof(n_threads) FROM llama_bench").fetchall()
    assert found == [("it's.gguf", 41.256, None, "integer")]
    database.close()


def test_markdown_has_llama_benchs_columns_the_definitions_and_says_what_was_cut_short() -> None:
    text = printed("md", a_row(), a_row(is_complete=False, cpu_share=None), notes=["t/s: tokens"])
    head, line, first, second = text.splitlines()[:4]
    titles = [title.strip() for title in head.strip("|").split("|")]
    assert titles[:5] == ["model", "size", "params", "backend", "threads"]
    assert line.count("|") == head.count("|") == first.count("|")
    for words_of_it in ("llama 135M Q4_1", "95.00 MiB", "134.52 M", "tg128", "41.26 ± 0.50", "45.7 %", "200"):
        assert words_of_it in first
    assert "(cut short)" in second
    assert text.endswith("\nt/s: tokens\n")


def test_columns_that_do_not_vary_are_not_shown_to_people() -> None:
    assert "type_k" not in printed("md", a_row())
    assert "type_k" in printed("md", a_row(type_k="q8_0"), varying={"type_k"})


def test_every_format_prints_something_for_a_row_of_nulls_where_nulls_may_be() -> None:
    for form in FORMATS:
        assert printed(form, a_row(level=None, roofline_share=None, rss_peak_bytes=None))
