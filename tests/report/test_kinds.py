"""Tables and drawings of each kind, from figures as the benches themselves make them."""

from __future__ import annotations

from typing import Any

import msgspec

from edge_llm.bench.accuracy.figures import figures as accuracy_figures
from edge_llm.bench.goodput import Limits
from edge_llm.bench.node_rows import complete
from edge_llm.bench.record import Record
from edge_llm.bench.serve.answers import Answer
from edge_llm.bench.serve.results import Tally
from edge_llm.bench.serve.schedule import Load
from edge_llm.report.chapters import report_of
from edge_llm.report.document import Part, Table
from edge_llm.report.evidence import Evidence, Found
from edge_llm.report.frontier import candidates
from edge_llm.report.scores import mean_accuracy
from tests.report.conftest import MODEL, a_record

OTHER = msgspec.structs.replace(MODEL, name="tiny-q8_0", sha256="e" * 64, quantization="Q8_0")


def part_of(record: Record) -> Part:
    ((part,),) = [chapter.parts for chapter in report_of(Found((Evidence("r.json", record),), ()), "r").chapters]
    return part


def column(table: Table, name: str) -> list[str]:
    return [row[table.columns.index(name)] for row in table.rows]


# -- serve


def an_answer(at_s: float, ttft_s: float) -> Answer:
    answer = Answer(at_s, 11, asked_prompt_tokens=100)
    answer.sent_s = answer.headers_s = at_s
    answer.first_s, answer.last_s = at_s + ttft_s, at_s + ttft_s + 0.5
    answer.arrivals_s = [answer.first_s + 0.05 * n for n in range(11)]
    answer.ended_s, answer.pieces, answer.counted_tokens, answer.counted_by = answer.last_s, 11, 11, "usage"
    return answer


def served(*contenders: str, clients: int | None = None) -> dict[str, Any]:
    tally = Tally(limits=Limits(1.0, 0.06), scales=(0.5, 1.0, 2.0), nodes=2)
    for name in contenders:
        tally.servers[name] = {}
        for rate in (1.0, 2.0, 4.0):
            load = Load("closed", clients=int(rate)) if clients else Load("poisson", rate_per_s=rate)
            replayed = tally.begin(name, load, None, 0)
            replayed.answers += [an_answer(n / rate, 0.4 * rate) for n in range(20)]
            replayed.is_done = True
    found: dict[str, Any] = msgspec.to_builtins(tally.found())
    return found


def test_each_contender_has_its_loads_and_all_have_one_table_of_goodput() -> None:
    part = part_of(a_record(kind="serve", figures=served("auto", "local")))
    titles = [table.title.partition(":")[0] for table in part.tables]
    assert titles == ["auto", "local", "Goodput", "Goodput of one over another's"]
    loads = dict(zip(part.tables[0].columns, zip(*part.tables[0].rows, strict=True), strict=True))
    assert loads["poisson, 1/s"][loads["figure"].index("ttft p50")] == "400 ms"
    assert loads["poisson, 4/s"][loads["figure"].index("attainment")].startswith("0 % (0 to ")
    assert [row[0] for row in part.tables[2].rows] == ["auto, 90 %", "auto, 99 %", "local, 90 %", "local, 99 %"]
    assert [row[0] for row in part.tables[3].rows] == ["auto over local, 90 %", "auto over local, 99 %"]


def test_open_loops_are_drawn_over_the_rate_and_limits_over_their_scale() -> None:
    titles = [plot.title for plot in part_of(a_record(kind="serve", figures=served("auto", "local"))).plots]
    assert titles[:7] == [
        "requests within their limits",
        "TTFT at each rate",
        "TPOT at each rate",
        "ITL at each rate",
        "E2E at each rate",
        "throughput",
        "latency against throughput",
    ]
    assert titles.count("poisson, 2/s: requests within scaled limits") == 1


def test_closed_loops_are_drawn_over_the_number_of_clients() -> None:
    part = part_of(a_record(kind="serve", figures=served("auto", clients=1)))
    assert "requests at once" in part.plots[0].svg


def test_what_must_not_be_overlooked_is_a_sentence() -> None:
    sentences = part_of(a_record(kind="serve", figures=served("auto"))).sentences
    assert any("too few for 99 %" in sentence for sentence in sentences)


# -- accuracy


def items(model: str, right: int, task: str = "arc_easy") -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "task": task,
            "item": str(n),
            "setup": "s",
            "acc": float(n < right),
            "acc_norm": 1.0,
            "n_choices": 4,
            "gold": [n % 4],
            "chosen": n % 4,
        }
        for n in range(40)
    ]


def test_shares_have_errors_intervals_and_chance_beside_them() -> None:
    texts = [
        {"model": "tiny-q4_0", "task": "text", "item": "0", "setup": "s", "nll": 20.0, "nll_squares": 50.0, "count": 10}
    ]
    figures = accuracy_figures([*items("tiny-q8_0", 30), *items("tiny-q4_0", 9), *texts], "tiny-q8_0")
    part = part_of(a_record(kind="accuracy", models=[OTHER, MODEL], figures=figures))
    tasks, perplexities, beside = part.tables
    assert column(tasks, "acc") == ["75 % +- 6.93", "22.5 % +- 6.69"]
    assert column(tasks, "chance") == ["25 %", "25 %"]
    assert [cell.partition(" ")[0] for cell in column(tasks, "differs from chance")] == ["yes", "no"]
    assert column(perplexities, "perplexity") == ["7.39"]
    assert beside.title == "Beside tiny-q8_0, item by item"
    assert column(beside, "lost") == ["21"]
    assert "arc_easy, chance" in part.plots[0].svg


def test_llama_perplexitys_figures_stand_beside_ours() -> None:
    pair = {"ours": 20.02, "llama_perplexity": 20.0, "ratio": 1.001}
    against = {"models": {"tiny": {"wikitext": {"windows": 4, "window_tokens": 512, "perplexity": pair}}}}
    figures = accuracy_figures(items("tiny", 30)) | {"against_llama_perplexity": against}
    table = part_of(a_record(kind="accuracy", figures=figures)).tables[-1]
    assert table.title == "Beside llama-perplexity"
    assert table.rows == (("tiny, wikitext", "4", "20.02, 20, 1.0010", "-", "-"),)


def test_models_are_compared_over_tasks_that_all_of_them_have() -> None:
    cases = [*items("a", 30), *items("b", 20), *items("b", 40, "piqa")]
    record = a_record(kind="accuracy", figures=accuracy_figures(cases))
    assert mean_accuracy(record) == {"a": 0.75, "b": 0.5}
    assert (
        mean_accuracy(a_record(kind="accuracy", figures=accuracy_figures([*items("a", 1), *items("b", 1, "x")]))) == {}
    )


def test_accuracy_is_joined_with_the_speed_of_the_same_file() -> None:
    accuracy = a_record(kind="accuracy", models=[MODEL], nodes=[], figures=accuracy_figures(items("tiny-q4_0", 30)))
    speed = a_record(figures={"decode_tokens_per_s": 50.0})
    (found,) = candidates([speed, accuracy])
    assert (found.accuracy, found.tokens_per_s) == (0.75, 50.0)


# -- node


def a_row(**changes: Any) -> dict[str, Any]:
    row = {"test": "tg128", "model_type": "llama 135M", "n_prompt": 0, "n_gen": 128, "n_threads": 1, "policy": "exact"}
    return complete(
        {**row, "avg_ts": 40.0, "stddev_ts": 1.5, "samples_ts": [39.0, 41.0], "is_complete": True, **changes}
    )


def test_columns_that_never_change_are_said_once() -> None:
    rows = [a_row(n_threads=threads, roofline_share=0.7) for threads in (1, 2)]
    (table,) = part_of(a_record(kind="node", figures={"rows": rows})).tables
    assert table.columns == ("test", "threads", "tokens/s", "roofline", "")
    assert table.rows[0] == ("tg128", "1", "40 +- 1.50", "70 %", "")
    assert "policy exact" in table.note


def test_labels_of_rows_say_no_more_than_tells_them_apart() -> None:
    made = [
        {"test": test, "policy": policy, "level": level, "flash_attn": flash, "model_type": "m", "n_gen": 0}
        | {"samples_ts": [1.0, 2.0], "avg_ts": 1.5}
        for test in ("pp64", "pp128")
        for policy, level, flash in (("exact", "exact", 0), ("fast", "unverified", -1))
    ]
    svg = part_of(a_record(kind="node", figures={"rows": made}, samples={})).plots[0].svg
    for label in ("pp64, exact", "pp64, fast", "pp128, exact", "pp128, fast"):
        assert f">{label}</text>" in svg


def test_models_that_have_no_item_in_common_have_no_table_of_it() -> None:
    figures = {"models": {"m": {"t": {"n": 1, "failed": 0, "perplexity": 2.0, "tokens": 9}}}, "reference": "m"}
    part = part_of(a_record(kind="accuracy", figures=figures | {"against_reference": {"n": {}}}))
    assert [table.title for table in part.tables] == ["Texts"]


def test_a_row_that_was_cut_short_says_so() -> None:
    (table,) = part_of(a_record(kind="node", figures={"rows": [a_row(), a_row(is_complete=False)]})).tables
    assert column(table, "") == ["", "cut short"]


def test_memory_is_drawn_over_the_context_for_both_phases() -> None:
    curve = [
        {"model": "m", "n_ctx": n, "flash_attention": fa, "prefill_peak_bytes": 1e8 + n, "decode_peak_bytes": 1e8}
        for n in (512, 1024)
        for fa in ("off", "on")
    ]
    plots = part_of(a_record(kind="node", figures={"rows": [a_row()], "memory_curve": curve})).plots
    (plot,) = [plot for plot in plots if plot.title == "peak memory at each context"]
    assert "m, prefill, flash attention on" in plot.svg


# -- net


def test_pairs_of_nodes_are_named_by_both() -> None:
    pairs = [{"from": "p1", "to": "d1", "round_trip_ms": 0.3}, {"from": "p2", "to": "d1", "round_trip_ms": None}]
    (table,) = part_of(a_record(kind="net", figures={"pairs": pairs, "definitions": {"x": "y"}, "notes": ["n"]})).tables
    assert table.rows == (("p1, d1", "0.300 ms"), ("p2, d1", "-"))
