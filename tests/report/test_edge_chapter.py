"""The Edge paper's table in a report: three tables that fit on a page, two drawings, a line in the overview."""

from __future__ import annotations

from typing import Any

import msgspec

from edge_llm.bench.edge_board import Board
from edge_llm.bench.edge_table import Row, Trial, rows_of
from edge_llm.bench.record import ModelFacts, Record
from edge_llm.bench.serve.answers import Answer
from edge_llm.report.chapters import report_of
from edge_llm.report.document import Part, Report
from edge_llm.report.edge import edge_main
from edge_llm.report.evidence import Evidence, Found
from edge_llm.report.words import NOT_READ
from tests.report.conftest import MODEL, a_record

BIG = ModelFacts("big-q8_0", "b.gguf", "e" * 64, 40_000_000, "Q8_0")


def answers(gap_s: float) -> tuple[Answer, ...]:
    """Two, as our gateway reports them."""
    told = {"queue_ms": 10.0, "wait_ms": 0.0, "prefill_ms": 500.0, "handoff_ms": 40.0, "first_decode_ms": 50.0}
    made = []
    for one_gap_s in (gap_s, 1.1 * gap_s):
        last_s = 0.6 + 10 * one_gap_s
        one = Answer(0.0, 11, sent_s=0.0, first_s=0.6, last_s=last_s, ended_s=last_s, own=told)
        one.counted_tokens, one.prompt_tokens, one.cached_tokens = 11, 100, 0
        made.append(one)
    return tuple(made)


def rows() -> list[Row]:
    """Two models, two placements, two boards."""
    found = []
    for model, gap_s in ((MODEL, 0.1), (BIG, 0.3)):
        for placement, slower in (("mixed", 1.0), ("split", 1.2)):
            boards = tuple(Board(node, 0.4, 0.3, 0.2, 0.1) for node in ("pi-1", "pi-2"))
            found += rows_of(Trial(model, placement, answers(slower * gap_s), boards))
    return found


def a_cluster(some: list[Row], **figures: Any) -> Record:
    made = {
        "rows": msgspec.to_builtins(some),
        "sentences": ["a sentence"],
        "definitions": {"row": "a line"},
        "models": {},
    }
    return a_record(kind="cluster", models=[MODEL, BIG], figures=made | figures, samples={}, notes=["a sentence"])


def reported(record: Record) -> Report:
    return report_of(Found((Evidence("r.json", record),), ()), "A report")


def part_of(record: Record) -> Part:
    ((part,),) = [chapter.parts for chapter in reported(record).chapters]
    return part


def test_the_printed_cells_are_in_tables_that_a_page_can_hold() -> None:
    speed, costs, knows = part_of(a_cluster(rows())).tables
    assert len(speed.rows) == len(costs.rows) == 8
    assert speed.rows[0][0] == "tiny-q4_0, mixed, pi-1"
    assert speed.columns[1:4] == ("n", "prompt t/s", "generation t/s")
    assert speed.rows[0][3] == "9.55"
    assert costs.rows[0][1] == "40.0 (+30.0)"
    assert [row[0] for row in knows.rows] == ["tiny-q4_0", "big-q8_0"]
    for table in (speed, costs, knows):
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_what_no_board_could_read_is_no_column() -> None:
    _, costs, knows = part_of(a_cluster(rows())).tables
    assert "C" not in costs.columns
    assert "tokens/J" not in costs.columns
    assert "perplexity" not in knows.columns
    warm = [msgspec.structs.replace(row, temperature_c=61.0) if n == 0 else row for n, row in enumerate(rows())]
    _, costs, _ = part_of(a_cluster(warm)).tables
    at = costs.columns.index("C")
    assert [row[at] for row in costs.rows[:2]] == ["61", NOT_READ]


def test_speeds_and_the_parts_of_an_answer_are_drawn_once_for_each_placement() -> None:
    speeds, times = part_of(a_cluster(rows())).plots
    assert speeds.title == "generated tokens per second of one stream"
    for label in ("tiny-q4_0, mixed", "tiny-q4_0, split", "big-q8_0, mixed", "big-q8_0, split"):
        assert speeds.svg.count(f">{label}</text>") == 1
        assert times.svg.count(f">{label}</text>") == 1
    assert "pi-2" not in speeds.svg
    assert all(stage in times.svg for stage in ("queue", "prefill", "transfer of KV", "decode"))


def test_one_model_is_not_named_in_each_row() -> None:
    one = [row for row in rows() if row.model == MODEL.name and row.node == "pi-1"]
    part = part_of(a_cluster(one))
    assert [row[0] for row in part.tables[0].rows] == ["mixed", "split"]
    assert [row[0] for row in part.tables[2].rows] == [MODEL.name]


def test_a_server_that_tells_no_parts_has_no_drawing_of_them() -> None:
    foreign = [msgspec.structs.replace(row, queue_ms=None) for row in rows()]
    assert [plot.title for plot in part_of(a_cluster(foreign)).plots] == ["generated tokens per second of one stream"]


def test_the_overview_says_how_fast_and_where_the_paper_is_right() -> None:
    record = a_cluster(rows())
    assert edge_main(record) == "2.65 to 9.55 tokens/s generated; the paper's claim holds in 4 of 8 rows"
    assert edge_main(record) in reported(record).overview.rows[0]
    assert edge_main(a_cluster([])) == ""


def test_sentences_are_said_once() -> None:
    part = part_of(a_cluster(rows()))
    assert part.sentences == ("a sentence",)
    assert part.notes == ()


def test_rows_of_another_shape_are_told_by_their_figures() -> None:
    part = part_of(a_record(kind="cluster", figures={"rows": [{"model": "m", "tokens_per_s": 3.5}]}, samples={}))
    assert part.plots == ()
    assert any("3.5" in cell for table in part.tables for row in table.rows for cell in row)
