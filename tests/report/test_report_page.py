"""The report of a folder: every record is in it, and so is everything that went wrong."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from edge_llm.bench.cases import Cases
from edge_llm.bench.record import Failure, ModelFacts, Record, encode
from edge_llm.report.chapters import report_of
from edge_llm.report.document import Part, Report
from edge_llm.report.evidence import Evidence, Found, NothingToReport, gather, only
from edge_llm.report.kinds import KINDS
from edge_llm.report.markdown import markdown
from edge_llm.report.page import page
from tests.report.conftest import PI, a_record

RESULTS = Path(__file__).parents[2] / "bench_results"
VOID = {"meta", "br", "hr", "img", "link", "input", "path", "circle", "rect"}


class Page(HTMLParser):
    """Nesting, links, texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.links += [value for name in ("href", "src") if (value := given.get(name))]
        self.ids += [value for value in (given.get("id"),) if value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def made_of(*records: Record) -> Report:
    evidence = tuple(Evidence(f"bench_results/{n}.json", record) for n, record in enumerate(records))
    return report_of(Found(evidence, ()), "A report")


def the_part(record: Record) -> Part:
    ((part,),) = [chapter.parts for chapter in made_of(record).chapters]
    return part


@pytest.fixture(scope="module")
def repository() -> Report:
    return report_of(gather([RESULTS], RESULTS.parent), "Benchmarks")


def test_every_record_of_the_repository_has_a_part_and_a_line(repository: Report) -> None:
    files = {f"bench_results/{path.name}" for path in RESULTS.glob("*.json")}
    assert {part.file for chapter in repository.chapters for part in chapter.parts} == files
    assert {row[-1] for row in repository.overview.rows} == files
    assert repository.unreadable == ()


def test_the_page_is_whole_and_asks_nobody_for_anything(repository: Report) -> None:
    text = page(repository)
    found = Page(text)
    assert found.open == []
    assert not found.tags & {"script", "link", "iframe", "img", "object", "embed"}
    outside = [link for link in found.links if not link.startswith(("#", "bench_results/"))]
    assert outside == []
    assert "@import" not in text
    assert not re.search(r"url\(", text)
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_markdown_rows_are_as_wide_as_their_heading(repository: Report) -> None:
    width = None
    for line in markdown(repository).splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert width is None or cells is None or cells == width, line
        width = cells


def test_links_of_markdown_lead_to_the_records(repository: Report) -> None:
    links = re.findall(r"\]\(([^)]+)\)", markdown(repository))
    assert links
    assert all((RESULTS.parent / link).exists() for link in links)


@pytest.mark.parametrize("kind", [*KINDS, "tomorrows_kind"])
def test_a_record_of_any_kind_is_told_by_its_figures_whatever_they_are(kind: str) -> None:
    part = the_part(a_record(kind=kind, figures={"strange": {"x_s": 1.25}}, samples={"odd name": [1.0], "none": []}))
    assert any("1.25 s" in row for table in (*part.tables, *part.all_figures) for row in table.rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_cut_short_before_its_first_figure_is_a_part_too(kind: str) -> None:
    report = made_of(a_record(kind=kind, is_complete=False, figures={}, samples={}, models=[], nodes=[]))
    assert "cut short" in markdown(report)
    assert Page(page(report)).open == []


def test_failures_are_at_the_top_of_their_part_and_in_the_overview() -> None:
    report = made_of(a_record(failures=[Failure("batch 8", "llama-batched-bench is not there")]))
    for text in (markdown(report), page(report)):
        assert "not measured: batch 8: llama-batched-bench is not there" in text
        assert "1 failures" in text


def test_many_failures_are_counted_and_some_shown() -> None:
    alarms = the_part(a_record(failures=[Failure(f"request {n}", "reset") for n in range(500)])).alarms
    assert len(alarms) < 20
    assert "488 failures more" in alarms[-1]


def test_a_busy_machine_and_uncommitted_code_are_alarms() -> None:
    busy = msgspec.structs.replace(PI, load_before=9.0)
    record = a_record(nodes=[busy], source=msgspec.structs.replace(a_record().source, is_dirty=True))
    alarms = " ".join(the_part(record).alarms)
    assert "load 9.0" in alarms
    assert "not committed" in alarms


def test_machine_commit_and_model_are_named_beside_the_figures() -> None:
    text = markdown(made_of(a_record()))
    for said in ("Raspberry Pi 5", "0123456789", "sha256 ffffffffffff", "edge-llm bench engine"):
        assert said in text


def test_definitions_of_the_words_in_a_record_stand_beside_it() -> None:
    report = made_of(a_record(kind="serve", figures={"ttft_s": {"p50": 1.0}, "tpot_s": {"p50": 0.1}}))
    for text in (markdown(report), page(report)):
        assert "(E2E - TTFT) / (tokens - 1)" in text


def test_what_a_server_said_cannot_become_markup() -> None:
    evil = "<script>alert(1)</script> | [x](http://evil) `"
    record = a_record(
        kind="evil<b>",
        failures=[Failure(evil, evil)],
        figures={evil: {"verdicts": [evil]}},
        notes=[evil],
        samples={f"{evil}.ttft_s": [float(n) for n in range(20)]},
    )
    report = made_of(record)
    found = Page(page(report))
    assert "script" not in found.tags
    assert found.open == []
    assert "<script" not in markdown(report)
    assert not re.search(r"(?<!\\)\]\(http", markdown(report))


# -- reading


def test_a_file_that_is_no_record_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(encode(a_record()))
    (tmp_path / "b.json").write_text('{"not": "a record"}')
    found = gather([tmp_path], tmp_path)
    assert [one.file for one in found.evidence] == ["a.json"]
    ((name, why),) = found.unreadable
    assert name == "b.json"
    assert "not a bench record" in why
    assert "b.json" in page(report_of(found, "r"))


def test_lines_of_a_run_that_left_no_record_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(encode(a_record()))
    (tmp_path / "killed.cases.jsonl").write_text('{"case":"x","at":"2026-11-23T10:15:02Z"}\n{"case":"y"')
    ((name, why),) = gather([tmp_path], tmp_path).unreadable
    assert name == "killed.cases.jsonl"
    assert "1 finished cases" in why


def test_a_run_that_was_killed_has_its_first_record_and_says_how_far_it_came(tmp_path: Path) -> None:
    begun = a_record(is_complete=False, figures={}, samples={}, cases=Cases("a.cases.jsonl", 0, ""))
    (tmp_path / "a.json").write_bytes(encode(begun))
    line = '{"case":"poisson, 1/s","at":"2026-11-23T10:15:02Z","sent_s":0,"first_s":1,"last_s":2,"answer_tokens":9}\n'
    (tmp_path / "a.cases.jsonl").write_text(line * 10 + line[:20])
    report = report_of(gather([tmp_path], tmp_path), "r")
    assert report.unreadable == ()
    (part,) = report.chapters[0].parts
    assert "10 finished cases are in a.cases.jsonl" in part.alarms[0]
    assert any("killed, 10 finished cases in its lines" in cell for cell in report.overview.rows[0])
    assert any("stages of requests" in plot.title for plot in part.plots)


def test_lines_that_are_not_those_of_their_record_are_an_alarm(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(encode(a_record(cases=Cases("a.cases.jsonl", 1, "0" * 64))))
    (tmp_path / "a.cases.jsonl").write_text("{}\n")
    (one,) = gather([tmp_path], tmp_path).evidence
    assert "digest" in one.trouble
    assert one.lines == ()
    (tmp_path / "a.cases.jsonl").unlink()
    (one,) = gather([tmp_path], tmp_path).evidence
    assert "cannot be read" in one.trouble


def test_an_empty_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(NothingToReport, match="bench"):
        gather([tmp_path], tmp_path)


def test_only_some_kinds_or_what_there_is(tmp_path: Path) -> None:
    found = Found((Evidence("a", a_record()), Evidence("b", a_record(kind="faults"))), ())
    assert [one.file for one in only(found, ["faults"]).evidence] == ["b"]
    assert only(found, []) == found
    with pytest.raises(NothingToReport, match="engine, faults"):
        only(found, ["serve"])


def test_a_link_to_a_record_far_away_is_its_name(tmp_path: Path) -> None:
    far, near = tmp_path / "x" / "y", tmp_path / "reports"
    far.mkdir(parents=True)
    near.mkdir()
    (far / "a.json").write_bytes(encode(a_record()))
    assert gather([far], tmp_path).evidence[0].file == "x/y/a.json"
    assert gather([far], near).evidence[0].file == "../x/y/a.json"
    assert gather([far], near / "deep").evidence[0].file == "a.json"


@pytest.mark.parametrize(
    ("kind", "figures", "words"),
    [
        (
            "node",
            {"rows": [{"test": "pp512", "model_type": "m", "n_prompt": 512, "avg_ts": 40.0}]},
            "pp512 40 tokens/s",
        ),
        ("accuracy", {"models": {"m": {"arc_easy": {"n": 4, "acc": {"value": 0.5}}}}}, "arc_easy 50 %"),
        ("accuracy", {"models": {"m": {"text": {"n": 1, "failed": 0, "perplexity": 20.5}}}}, "text perplexity 20.5"),
        (
            "serve",
            {"contenders": {"auto": {"loads": [{"label": "closed", "figures": {"request_throughput": 1.5}}]}}},
            "auto: 1.50 requests/s (closed)",
        ),
        (
            "goodput",
            {"traces": {"conv": {"regimes": {"a_b": {"arrangements": {"auto": {"goodput_90": {"per_s": 0.5}}}}}}}},
            "conv, a b: auto 0.500/s",
        ),
    ],
)
def test_the_overview_has_a_main_figure_of_every_kind(kind: str, figures: dict[str, object], words: str) -> None:
    assert KINDS[kind].main(a_record(kind=kind, figures=figures, samples={})) == words


def test_of_a_model_only_what_is_known_is_said() -> None:
    stranger = ModelFacts(name="m", file="", sha256="", size_bytes=0, quantization="")
    record = a_record(models=[stranger])
    facts = dict(report_of(Found((Evidence("a.json", record),), ()), "x").chapters[0].parts[0].facts)
    assert facts["model"] == "m"
