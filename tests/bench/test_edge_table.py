"""Rows of the Edge paper's table: what is computed of answers and boards, what is said of the paper's claim."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from edge_llm.bench.edge_board import Board, WorkerUse, board_of
from edge_llm.bench.edge_claim import LEAST_SAMPLES, Load, claim_of
from edge_llm.bench.edge_table import ClusterFigures, Row, Trial, rows_of, schema, scores_of
from edge_llm.bench.edge_table_text import DEFINITIONS, chance_words, csv_text, markdown, sentences
from edge_llm.bench.record import ModelFacts, Process
from edge_llm.bench.resources import Sampler, SamplerCost, SeriesSummary, Span, Watched, watched
from edge_llm.bench.serve.answers import Answer
from edge_llm.report.frontier import candidates
from edge_llm.report.tables import figure_tables
from tests.report.conftest import a_record

MODEL = ModelFacts("tiny", "tiny.gguf", "sha", 4 << 20, "Q4_0")
PI = "Raspberry Pi 5 Model B Rev 1.0"


def answer(first_s: float = 1.0, gap_s: float = 0.1, tokens: int = 11, sent_s: float = 0.0, **own: Any) -> Answer:
    """One that has 100 prompt tokens, read in half a second, as our gateway reports it."""
    told = {"mode": "split", "queue_ms": 10.0, "wait_ms": 200.0, "prefill_ms": 300.0, "handoff_ms": 40.0}
    told |= {"first_decode_ms": 50.0, "prefill_node": "p", "decode_node": "d"}
    last_s = sent_s + first_s + gap_s * (tokens - 1)
    made = Answer(0.0, tokens, sent_s=sent_s, first_s=sent_s + first_s, last_s=last_s, ended_s=last_s, own=told | own)
    made.counted_tokens, made.prompt_tokens, made.cached_tokens = tokens, 100, 0
    return made


def failed(kind: str) -> Answer:
    made = Answer(0.0, 11, sent_s=0.0, ended_s=5.0)
    made.failed(kind, "why")
    return made


def board(node: str = "local", **known: Any) -> Board:
    shares = {"cpu_share": 0.4, "above_idle_cpu_share": 0.3, "ram_share": 0.2, "above_idle_ram_share": 0.1}
    return Board(node, **(shares | known))


def trial(*answers: Answer, boards: Sequence[Board] = (), **known: Any) -> Trial:
    return Trial(MODEL, "split", answers, tuple(boards), **known)


def row(**known: Any) -> Row:
    return msgspec.structs.replace(rows_of(trial(answer(), boards=[board()]))[0], **known)


# -- throughput and latency


def test_each_phase_has_its_own_seconds_and_never_those_of_the_whole_answer() -> None:
    (one,) = rows_of(trial(answer(), answer(), answer(gap_s=0.2), boards=[board()]))
    assert one.prompt_tokens_per_s == pytest.approx(100 / 0.5)
    assert one.generation_tokens_per_s == pytest.approx(10.0)
    assert one.total_s == pytest.approx(2.0)
    assert one.ttft_s == pytest.approx(1.0)
    assert one.tpot_ms == pytest.approx(100.0)


def test_the_parts_of_an_answer_are_its_whole() -> None:
    one = answer(first_s=0.6)
    (found,) = rows_of(trial(one))
    parts = (found.queue_ms, found.prefill_ms, found.transfer_ms, found.decode_ms)
    assert list(parts) == pytest.approx([10.0, 500.0, 40.0, 50.0 + 1000.0])
    assert sum(part for part in parts if part is not None) == pytest.approx(1e3 * (one.e2e_s or 0.0))


def test_prompt_tokens_that_were_kept_are_not_counted_as_computed() -> None:
    kept = answer()
    kept.cached_tokens = 50
    assert rows_of(trial(kept))[0].prompt_tokens_per_s == pytest.approx(100.0)


def test_a_server_that_reports_no_parts_has_none() -> None:
    foreign = answer()
    foreign.own = {}
    (found,) = rows_of(trial(foreign))
    assert found.generation_tokens_per_s is not None
    assert (found.prompt_tokens_per_s, found.queue_ms, found.decode_ms, found.modes) == (None, None, None, {})


def test_what_failed_is_counted_by_kind_and_in_no_latency() -> None:
    short = answer(gap_s=9.0)
    short.counted_tokens = 3
    (found,) = rows_of(trial(answer(), short, failed("timeout"), failed("timeout")))
    assert (found.requests, found.completed) == (4, 1)
    assert found.failed == {"cut_short": 1, "timeout": 2}
    assert found.tpot_ms == pytest.approx(100.0)
    assert any("3 of 4 requests failed: 1 cut_short, 2 timeout" in line for line in sentences([found], PI))


def test_medians_have_intervals_where_there_is_more_than_one() -> None:
    (found,) = rows_of(trial(*(answer(gap_s=0.1 + 0.01 * number) for number in range(9))))
    at = found.intervals["generation_tokens_per_s"]
    assert found.generation_tokens_per_s is not None
    assert at.low <= found.generation_tokens_per_s <= at.high
    assert at.n == 9
    assert not rows_of(trial(answer()))[0].intervals


# -- boards


def test_every_board_has_a_row_with_what_it_did_there() -> None:
    boards = [board(name, workers={name: WorkerUse(0.5, 300, 100)}) for name in ("p", "d", "spare")]
    found = rows_of(trial(answer(), boards=boards))
    assert [(one.node, one.roles) for one in found] == [("p", "prefill"), ("d", "decode"), ("spare", "")]
    assert [one.generation_tokens_per_s for one in found] == [pytest.approx(10.0)] * 3
    assert (found[0].peak_rss_bytes, found[0].above_idle_peak_rss_bytes) == (300, 200)


def test_workers_of_one_board_are_added_up_and_the_gateway_is_no_worker() -> None:
    workers = {"prefill-1": WorkerUse(0.2, 300, 100), "decode-1": WorkerUse(0.2, 500, 100)}
    (found,) = rows_of(trial(answer(), boards=[board(workers=workers | {"gateway": WorkerUse(0.1, 900, 1)})]))
    assert (found.peak_rss_bytes, found.above_idle_peak_rss_bytes) == (800, 600)
    assert found.roles == "prefill-1, decode-1"
    assert "gateway" in found.workers


def test_a_cluster_that_nobody_watched_has_a_row_without_loads_and_without_a_verdict() -> None:
    (found,) = rows_of(trial(answer()))
    assert found.node == "not watched"
    assert (found.cpu_share, found.throttled, found.peak_rss_bytes, found.tokens_per_joule) == (None, None, None, None)
    assert found.claim.holds is None
    assert "cannot be told" in found.claim.words


def test_a_sampled_board_gives_mean_cpu_highest_ram_and_both_above_idle() -> None:
    rows: list[Mapping[str, float | None]] = [
        {"cpu_share": 0.1, "ram_share": 0.2, "cpu0_share": 0.1, "cpu1_share": 0.1, "w/cpu_cores": None},
        {"cpu_share": 0.5, "ram_share": 0.3, "cpu0_share": 0.9, "cpu1_share": 0.1, "w/cpu_cores": 0.8},
        {"cpu_share": 0.7, "ram_share": 0.4, "cpu0_share": 0.9, "cpu1_share": 0.5, "w/cpu_cores": 1.2},
    ]
    heat = ({"temperature_c": 50.0 + at, "throttled/soft": float(at == 2), "throttled/hard": 0.0} for at in range(3))
    sampler = Sampler("local", lambda _now: {}, [(float(at), {**one, **next(heat)}) for at, one in enumerate(rows)], 1)
    span = Span("part", datetime.now(UTC), 1.0, 1.0, 3.0)
    found = board_of(watched(sampler, span, {}), {"w": Process("w", (), 1.0, 1.0, 100, 150, 200)})
    assert found.cpu_share == pytest.approx(0.6)
    assert found.above_idle_cpu_share == pytest.approx(0.5)
    assert [found.ram_share, found.above_idle_ram_share] == pytest.approx([0.4, 0.2])
    assert (found.temperature_c, found.throttled) == (52.0, ("soft",))
    assert found.workers["w"] == WorkerUse(0.5, 200, 100)
    assert found.power_w is None


def test_a_node_elsewhere_has_one_worker_and_no_readings_are_none() -> None:
    summaries = {"worker/rss_bytes": SeriesSummary(2, 0, 150.0, 200.0), "throttled/hot": SeriesSummary(0, 2)}
    one = Watched(
        node="pi-1",
        part="part",
        started_at=datetime.now(UTC),
        period_s=1.0,
        at_s=[],
        series={},
        summaries=summaries,
        sampler=SamplerCost(0.0, 0.0, 0, 0),
    )
    found = board_of(one, at_rest={"worker/rss_bytes": SeriesSummary(0, 0, idle=120.0)})
    assert found.workers == {"pi-1": WorkerUse(None, 200, 120)}
    assert (found.cpu_share, found.throttled, found.mapped_share) == (None, None, None)


# -- memory that is mapped


def sampled(
    *rows: Mapping[str, float | None], node: str = "local", idle: int = 0, facts: Mapping[str, str] | None = None
) -> Watched:
    sampler = Sampler(node, lambda _now: {}, [(float(at), one) for at, one in enumerate(rows)], idle)
    return watched(sampler, Span("part", datetime.now(UTC), 1.0, float(idle), float(len(rows))), facts or {})


def of_memory(**processes: tuple[float, float | None, float]) -> dict[str, float | None]:
    """A reading of a board with 4000 bytes, a quarter of them in use; of processes RSS, PSS, anonymous."""
    row: dict[str, float | None] = {"cpu_share": 0.3, "ram_share": 0.25, "ram_used_bytes": 1000.0}
    for name, sizes in processes.items():
        row |= {f"{name}/{what}_bytes": size for what, size in zip(("rss", "pss", "anonymous"), sizes, strict=True)}
    return row


def process(name: str) -> Process:
    return Process(name, (), 1.0, 1.0, 100, 150, 2500)


def test_a_mapped_model_counts_in_the_verdict_though_the_kernel_calls_its_pages_available() -> None:
    """2.1 GB of weights on a board of 4 GB: what is not available is a quarter, what is used is over three quarters."""
    one = board_of(sampled(of_memory(w=(2500, 2450, 400))), {"w": process("w")})
    assert one.mapped_share == pytest.approx(2050 / 4000)
    (found,) = rows_of(trial(answer(), boards=[one]))
    assert (found.ram_share, found.claim.is_ram_below_half, found.claim.holds) == (0.25, False, False)
    assert "RAM 76%" in found.claim.words
    assert "51.2" in markdown([found]).splitlines()[2]


def test_workers_that_map_the_same_file_have_it_once() -> None:
    processes = {name: process(name) for name in ("p", "d", "gateway")}
    shared = board_of(sampled(of_memory(p=(900, 500, 100), d=(900, 500, 100), gateway=(90, 90, 10))), processes)
    assert shared.mapped_share == pytest.approx(800 / 4000)
    without_pss = board_of(sampled(of_memory(p=(900, 500, 100), d=(1000, None, 100))), processes)
    assert without_pss.mapped_share == pytest.approx(900 / 4000)


def test_on_a_cluster_that_runs_already_the_model_was_mapped_before() -> None:
    at_rest = sampled(of_memory(worker=(800, None, 100)), of_memory(worker=(800, None, 100)), node="pi-1", idle=1)
    busy = sampled(of_memory(worker=(1300, None, 200)), node="pi-1")
    one = board_of(busy, at_rest=at_rest.summaries)
    assert one.mapped_share == pytest.approx(1100 / 4000)
    assert one.above_idle_mapped_share == pytest.approx(400 / 4000)


@pytest.mark.parametrize(("ram_share", "holds"), [(0.25, None), (0.6, False)])
def test_without_knowing_what_is_mapped_less_than_half_is_no_verdict(ram_share: float, holds: bool | None) -> None:
    unknown = board(ram_share=ram_share, workers={"w": WorkerUse(0.1, 2500, 100)})
    (found,) = rows_of(trial(answer(), boards=[unknown]))
    assert found.claim.holds is holds
    assert f"RAM at least {ram_share:.0%}" in found.claim.words
    assert ("what its workers map was not read" in found.claim.words) is (holds is None)


def test_rows_of_older_records_are_read_without_it() -> None:
    older = msgspec.to_builtins(row())
    del older["mapped_share"], older["above_idle_mapped_share"]
    found = msgspec.convert(older, Row)
    assert (found.mapped_share, found.claim.holds) == (None, True)
    assert markdown([found])


# -- a board that is held back


def test_what_held_a_board_back_between_two_samples_is_remembered_and_leaves_no_verdict() -> None:
    facts = {"throttled_since_boot_before": "soft", "throttled_since_boot_after": "under_voltage, soft"}
    readings = of_memory(w=(200, 200, 100)) | {"throttled/under_voltage": 0.0, "throttled/soft": 0.0}
    one = board_of(sampled(readings, facts=facts), {"w": process("w")})
    assert one.throttled == ("under_voltage",), "soft was set before the run"
    rows = rows_of(trial(answer(), boards=[one]))
    assert (rows[0].claim.holds, rows[0].claim.holds_above_idle) == (None, None)
    assert "the board was held back: under_voltage" in rows[0].claim.words
    assert any("held back during the requests (under_voltage)" in line for line in sentences(rows, PI))


def test_a_board_that_remembers_nothing_new_was_not_held_back() -> None:
    facts = {"throttled_since_boot_before": "nothing", "throttled_since_boot_after": "nothing"}
    readings = [of_memory(w=(200, 200, 100))] * LEAST_SAMPLES
    one = board_of(sampled(*readings, facts=facts), {"w": process("w")})
    assert one.throttled == ()
    (found,) = rows_of(trial(answer(), boards=[one]))
    assert found.claim.holds is True
    assert not any("held back" in line for line in sentences([found], PI))


def test_tokens_per_joule_need_a_meter_on_every_board() -> None:
    metered = board("p", power_w=4.0, above_idle_power_w=2.0)
    answers = (answer(), answer(sent_s=2.0))  # 4 s, 22 tokens
    (one,) = rows_of(trial(*answers, boards=[metered]))
    assert one.tokens_per_joule == pytest.approx(22 / 16)
    assert one.above_idle_tokens_per_joule == pytest.approx(22 / 8)
    two = rows_of(trial(*answers, boards=[metered, board("d")]))
    assert [found.tokens_per_joule for found in two] == [None, None]


# -- the claim


@pytest.mark.parametrize(
    ("rate", "cpu", "ram", "holds", "speed"),
    [
        (8.0, 0.4, 0.3, True, "within"),
        (5.0, 0.49, 0.49, True, "within"),
        (30.0, 0.4, 0.3, True, "faster"),
        (4.9, 0.4, 0.3, False, "slower"),
        (8.0, 0.5, 0.3, False, "within"),
        (8.0, 0.4, 0.51, False, "within"),
        (8.0, None, 0.3, None, "within"),
        (None, 0.4, 0.3, None, "unknown"),
        (4.0, None, None, False, "slower"),
    ],
)
def test_the_claim_holds_with_five_tokens_per_second_and_less_than_half_of_both(
    rate: float | None, cpu: float | None, ram: float | None, holds: bool | None, speed: str
) -> None:
    found = claim_of(rate, Load(cpu), Load(ram))
    assert (found.holds, found.speed) == (holds, speed)


def test_a_claim_that_holds_only_above_idle_says_both_with_the_figures() -> None:
    found = claim_of(8.0, Load(0.55, 0.45), Load(0.3, 0.1))
    assert (found.holds, found.holds_above_idle, found.is_cpu_below_half) == (False, True, False)
    assert found.words == (
        "does not hold: 8.0 tokens/s (5 to 12 claimed), CPU 55% (+45% above idle), RAM 30% (+10% above idle) "
        "(less than 50% claimed)"
    )


def test_a_glance_at_the_cpu_is_no_verdict_and_says_how_many_are_needed() -> None:
    few = claim_of(30.0, Load(0.55, 0.4, samples=1), Load(0.3))
    assert (few.holds, few.holds_above_idle, few.is_cpu_below_half) == (None, None, None)
    assert few.words.startswith("has no verdict (1 sample of CPU, needs 5): 30.0 tokens/s")
    assert "CPU 55% (1 sample, +40% above idle)" in few.words
    enough = claim_of(30.0, Load(0.55, 0.4, samples=LEAST_SAMPLES), Load(0.3, 0.1))
    assert (enough.holds, enough.holds_above_idle) == (False, True)
    assert claim_of(3.0, Load(0.2, samples=1), Load(0.3)).holds is False, "too slow is too slow, whatever the CPU"


def test_a_mean_stands_beside_the_number_of_its_readings() -> None:
    (seldom,) = rows_of(trial(answer(), boards=[board(cpu_samples=2)]))
    assert seldom.cpu_samples == 2
    assert seldom.claim.holds is None
    assert "40.0 (+30.0), n 2" in markdown([seldom])
    assert any("the paper's claim has no verdict (2 samples of CPU, needs 5)" in one for one in sentences([seldom], PI))


def test_a_row_that_was_interrupted_says_of_how_many_requests_it_is() -> None:
    (part,) = rows_of(trial(answer(), answer(), boards=[board()], planned=300))
    assert (part.completed, part.requests, part.planned) == (2, 2, 300)
    assert "2 of 300, cut short" in markdown([part])
    assert "tiny, split: cut short after 2 of 300 requests" in sentences([part], PI)


def test_a_verdict_on_another_board_says_that_it_is_one() -> None:
    assert any("neither confirms nor refutes" in line for line in sentences([row()], "Some CPU"))
    assert not any("neither confirms nor refutes" in line for line in sentences([row()], PI))


def test_a_board_elsewhere_is_not_called_what_this_one_is() -> None:
    there = sentences([row(node="pi-1"), row(node="pi-2")], "Some CPU")
    assert any("pi-1, pi-2: board unknown" in line for line in there)
    assert not any("Some CPU" in line for line in there)
    assert any("board unknown" in line for line in sentences([row(node="pi-1")], PI)), "this one is no proof of that"


def test_a_board_elsewhere_that_says_what_it_is_is_called_that() -> None:
    found = sentences([row(node="pi-1", board="Raspberry Pi 5 Model B Rev 1.0"), row(node="nuc", board="Some CPU")], PI)
    assert not any("board unknown" in line or "pi-1 is" in line for line in found)
    assert any("nuc is Some CPU" in line and "neither confirms nor refutes" in line for line in found)


def test_a_board_that_was_busy_before_is_named() -> None:
    busy = rows_of(trial(answer(), boards=[board(cpu_share=0.7, above_idle_cpu_share=0.3)]))
    assert any("local was 40% busy before" in line for line in sentences(busy, PI))
    assert not any(
        "busy before" in line for line in sentences([row(above_idle_cpu_share=at) for at in (0.35, None)], PI)
    )


# -- accuracy


def choices(right: int, wrong: int, of: int = 4, task: str = "t") -> list[dict[str, Any]]:
    return [{"task": task, "acc": float(at < right), "n_choices": of} for at in range(right + wrong)]


def test_items_with_choices_of_all_tasks_count_together_and_are_tested_against_chance() -> None:
    found = scores_of([*choices(30, 10), *choices(5, 5, of=2, task="u"), {"task": "g", "acc": 1.0}])
    assert found.accuracy == pytest.approx(0.7)
    assert found.interval is not None
    assert found.interval.n == 50
    assert found.chance == pytest.approx(0.3)
    assert found.p_value is not None
    assert found.p_value < 1e-6


def test_accuracy_that_may_be_chance_is_said_to_be_that() -> None:
    one = rows_of(trial(answer()), choices(11, 29))[0]
    assert one.differs_from_chance is False
    assert "does not differ from chance, 25.0%" in chance_words(one)
    worse = rows_of(trial(answer()), choices(1, 59))[0]
    assert worse.differs_from_chance
    assert "below 25.0%" in chance_words(worse)


def test_tasks_without_choices_have_no_chance_level_and_failed_items_are_left_out() -> None:
    cases: list[dict[str, Any]] = [
        {"task": "g", "acc": 1.0},
        {"task": "g", "acc": 0.0},
        {"task": "g", "failed": "too long"},
    ]
    one = rows_of(trial(answer()), cases)[0]
    assert (one.accuracy, one.chance, one.differs_from_chance) == (0.5, None, None)
    assert "no chance level" in chance_words(one)


def test_perplexity_is_of_the_first_text() -> None:
    window = {"task": "wiki", "nll": 4.0, "nll_squares": 8.0, "count": 2}
    found = scores_of([window, {**window, "task": "other", "nll": 400.0}])
    assert found.perplexity == pytest.approx(7.389, abs=1e-3)
    assert (found.accuracy, found.interval) == (None, None)


# -- how it is written


def test_markdown_has_a_line_for_each_row_and_a_dash_for_what_could_not_be_read() -> None:
    rows = rows_of(trial(answer(), boards=[board()]), choices(20, 20)) + rows_of(trial(answer()))
    lines = markdown(rows).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert len({line.count("|") for line in lines}) == 1
    assert "40.0 (+30.0)" in lines[2]
    assert "50.0 (35 to 65, 40)" in lines[2]
    assert "10 / 500 / 40 / 1050" in lines[2]
    assert lines[2].rstrip(" |").endswith("holds")
    assert lines[3].rstrip(" |").endswith("-")


def test_csv_has_every_figure_and_verdict_in_columns_of_its_own() -> None:
    rows = rows_of(trial(answer(), answer(), failed("timeout"), boards=[board(throttled=())]), choices(20, 20))
    (found,) = csv.DictReader(io.StringIO(csv_text([*rows])))
    assert float(found["generation_tokens_per_s"]) == pytest.approx(10.0)
    assert float(found["generation_tokens_per_s_low"]) == pytest.approx(10.0)
    assert (found["accuracy_n"], found["claim_holds"], found["failed"]) == ("40", "True", "timeout: 1")
    assert (found["throttled"], found["temperature_c"], found["modes"]) == ("no", "", "split: 2")


def test_figures_fit_their_published_schema_and_everything_shown_is_defined() -> None:
    rows = rows_of(trial(answer(), boards=[board(workers={"w": WorkerUse(0.1, 2, 1)})]), choices(2, 2))
    figures = ClusterFigures(definitions=dict(DEFINITIONS), rows=rows, models={}, sentences=sentences(rows, PI))
    tree = json.loads(msgspec.json.encode(figures))
    assert msgspec.convert(tree, ClusterFigures) == figures
    assert "ClusterFigures" in json.dumps(schema())
    for word in ("prompt t/s", "generation t/s", "TTFT", "TPOT", "CPU", "RAM", "peak RSS", "claim", "tokens/J"):
        assert DEFINITIONS[word]


def test_the_report_tells_rows_apart_and_joins_speed_accuracy_and_memory_of_each_model() -> None:
    q8 = msgspec.structs.replace(MODEL, name="tiny-q8_0", sha256="other")
    trials = [
        Trial(model, placement, (answer(),), (board(workers={"w": WorkerUse(0.1, 300 << 20, 1)}),))
        for model in (MODEL, q8)
        for placement in ("mixed", "split")
    ]
    rows = [one for found in trials for one in rows_of(found, choices(30, 10))]
    figures = ClusterFigures(definitions={}, rows=rows, models={}, sentences=[])
    record = a_record(kind="cluster", figures=msgspec.to_builtins(figures), models=[MODEL, q8])
    known = candidates([record])
    assert [(one.model, one.accuracy) for one in known] == [("tiny", 0.75), ("tiny-q8_0", 0.75)]
    assert [one.tokens_per_s for one in known] == pytest.approx([10.0, 10.0])
    assert {one.memory_bytes for one in known} == {300 << 20}
    (table,) = [one for one in figure_tables({"rows": record.figures["rows"]}) if one.title == "rows"]
    assert table.columns[1:] == (
        "tiny, local, mixed",
        "tiny, local, split",
        "tiny-q8_0, local, mixed",
        "tiny-q8_0, local, split",
    )
    shown = {line[0]: line[1] for line in table.rows}
    assert (shown["generation tokens/s"], shown["cpu share"]) == ("10 tokens/s", "40 %")
