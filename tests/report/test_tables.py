"""Figures as tables: nothing is left out, what is alike stands beside each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_llm.bench.record import load
from edge_llm.report.tables import figure_tables, flat, listed
from edge_llm.report.words import shown

RECORDS = sorted((Path(__file__).parents[2] / "bench_results").glob("*.json"))


def cells(figures: dict[str, object]) -> set[str]:
    return {cell for table in figure_tables(figures) for row in (table.columns, *table.rows) for cell in row}


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_figure_of_every_record_is_in_a_table(path: Path) -> None:
    figures = load(path).figures
    there = cells(figures)
    for found, value in flat(figures).items():
        if not isinstance(value, list) or not value or not isinstance(value[0], dict):
            assert shown(found, value) in there, found


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_rows_are_as_long_as_their_heading(path: Path) -> None:
    for table in figure_tables(load(path).figures):
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_things_alike_are_rows_of_one_table() -> None:
    (table,) = figure_tables({"a": {"ttft_s": 1.0, "n": 3}, "b": {"ttft_s": 2.0, "n": 4}})
    assert table.columns == ("", "ttft", "n")
    assert table.rows == (("a", "1 s", "3"), ("b", "2 s", "4"))


def test_things_not_alike_are_tables_of_their_own() -> None:
    first, second = figure_tables({"memory": {"rss_bytes": 5}, "times": {"ttft_s": 1.0}})
    assert (first.title, second.title) == ("memory", "times")


def test_few_things_with_many_figures_are_columns() -> None:
    (table,) = figure_tables({who: {f"f{n}": n for n in range(20)} for who in ("a", "b")})
    assert table.columns == ("figure", "a", "b")
    assert len(table.rows) == 20


def test_a_list_is_named_by_what_tells_its_rows_apart() -> None:
    table = listed("rows", [{"test": "pp512", "avg_ts": 120.5}, {"test": "tg128", "avg_ts": 40.25}])
    assert [row[0] for row in table.rows] == ["pp512", "tg128"]
    pairs = listed("pairs", [{"from": "a", "to": "b", "ms": 1}, {"from": "b", "to": "a", "ms": 2}])
    assert [row[0] for row in pairs.rows] == ["a, b", "b, a"]


def test_a_list_of_things_with_one_name_is_numbered_and_keeps_the_name() -> None:
    table = listed("curve", [{"model": "m", "n_ctx": 512}, {"model": "m", "n_ctx": 1024, "peak_bytes": 5}])
    assert table.columns == ("", "model", "n ctx", "peak")
    assert table.rows == (("1", "m", "512", "-"), ("2", "m", "1,024", "5 B"))
