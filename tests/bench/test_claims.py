"""Claims against the records that this repository keeps: every path leads somewhere, every miss is said to be one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click
import msgspec
import pytest

from edge_llm.bench import engine, gateway_load, handoff, overload, pools, turns, verdicts
from edge_llm.bench.claims import CLAIMS, TOPICS, Bar, Claim, Need
from edge_llm.bench.claims_judged import (
    HOLDS,
    MISSED,
    UNTESTED,
    Evidence,
    Verdict,
    bar_words,
    board_words,
    figures_at,
    judged,
    keeps,
    shown,
)
from edge_llm.bench.claims_plan import STEPS
from edge_llm.bench.claims_text import figures_words, listed, markdown, missed_lines, table_between_marks
from edge_llm.bench.record import Failure, Record, load

RESULTS: Final = Path(__file__).parents[2] / "bench_results"
RECORDS: Final = [Evidence(path.name, load(path)) for path in sorted(RESULTS.glob("*.json"))]


def each_claim() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)


def left_by(claim: Claim) -> list[Evidence]:
    """Complete records of its step, newest first."""
    ours = [one for one in RECORDS if STEPS[claim.step].left(one.record) and one.record.is_complete]
    return sorted(ours, key=lambda one: one.record.started_at, reverse=True)


def changed(one: Evidence, path: str, value: object) -> Evidence:
    """The same record with another value wherever `path` leads; `#` makes a list so long."""
    figures = json.loads(json.dumps(one.record.figures))
    for where, _ in list(figures_at(figures, path)):
        _set(figures, where.split("/"), path.endswith("#"), value)
    return Evidence(one.file, msgspec.structs.replace(one.record, figures=figures))


def _set(tree: Any, path: Sequence[str], is_length: bool, value: Any) -> None:
    *way, last = path
    for name in way:
        tree = tree[int(name)] if isinstance(tree, list) else tree[name]
    key: Any = int(last) if isinstance(tree, list) else last
    tree[key] = ["something"] * int(value) if is_length else value


def beyond(bar: Bar) -> object:
    """A value that misses it."""
    if bar.direction == "is":
        return not bar.limit if isinstance(bar.limit, bool) else "another"
    assert isinstance(bar.limit, float | int)
    return bar.limit + 1 if bar.direction == "at most" else bar.limit - 1 if bar.direction == "at least" else bar.limit


def within(need: Need) -> object:
    return need.bar.limit


def decided(claim: Claim) -> Evidence:
    """A real record that decides the claim; what it needs is made so where no run had the occasion."""
    found = left_by(claim)
    if claim.id == "edge.paper":
        return changed(found[0], "rows/*/above_idle_cpu_share", found[0].record.figures["rows"][0]["cpu_share"])
    assert found, f"no record of `{STEPS[claim.step].command_words}` is kept: the claim has no evidence"
    one = found[0]
    for need in claim.needs if judged(claim, [one]).verdict == UNTESTED else ():
        one = changed(one, need.bar.path, within(need))
    for bar in claim.bars:
        for end in ("low", "high") if bar.has_interval else ():  # on one side of the bar
            one = changed(one, f"{bar.path.rpartition('/')[0]}/{end}", bar.limit)
    return one


# -- the list


def test_every_claim_has_its_own_name_a_known_topic_and_a_step() -> None:
    ids = [claim.id for claim in CLAIMS]
    assert len(set(ids)) == len(ids)
    assert {claim.topic for claim in CLAIMS} == set(TOPICS)
    assert {claim.step for claim in CLAIMS} == set(STEPS)
    assert all(claim.bars and claim.sentence and claim.source for claim in CLAIMS)


# A claim of what happens where something else does, which did not
NOTHING_TO_DECIDE_BY: Final = {"always splitting did not beat never splitting there"}


@each_claim()
def test_every_figure_that_decides_is_in_a_real_record(claim: Claim) -> None:
    one = decided(claim)
    for bar in (*claim.bars, *claim.counted, *(need.bar for need in claim.needs)):
        assert list(figures_at(one.record.figures, bar.path)), f"{one.file} has no {bar.path}"


@each_claim()
def test_the_records_that_are_kept_decide_every_claim_or_have_nothing_to_decide_it_by(claim: Claim) -> None:
    verdict = judged(claim, RECORDS)
    is_open = verdict.reason in NOTHING_TO_DECIDE_BY or verdict.reason.startswith("too few requests to tell: ")
    assert verdict.verdict in {HOLDS, MISSED} or is_open, verdict.reason


def test_the_bars_are_those_of_the_benches() -> None:
    bars = {(claim.step, bar.path.rpartition("/")[2]): bar.limit for claim in CLAIMS for bar in claim.bars}
    for name, limit in gateway_load.BARS.items():
        assert bars["gateway", name] == limit
    for name, limit in overload.BARS.items():
        assert bars["overload", name] == limit
    of_handoff = {name: limit for name, (_, limit) in handoff.BARS.items()}
    assert bars["handoff", "export_share"] == of_handoff["export_share"]
    assert bars["handoff", "overlap_share"] == of_handoff["overlap_share"]
    stalls = {claim.id: claim.bars[0].limit for claim in CLAIMS if claim.topic == "stall"}
    split, mixed = of_handoff["decode_stall_ratio"], of_handoff["mixed_stall_ratio"]
    assert stalls == {"stall.prompt": split, "stall.answer": split, "stall.mixed": mixed}
    assert bars["turns", "second_turn_ttft_share"] == turns.SHARE_BAR
    assert {bars["engine", name] for name in engine.RATIOS} == {engine.RATIO_BAR}
    assert bars["engine", "sampler_share_full"] == engine.SAMPLER_BAR
    assert bars["goodput", "ratio"] == verdicts.AUTO_BAR
    assert bars["goodput-simulated", "ratio"] == verdicts.AUTO_BAR
    assert bars["goodput-simulated", "share"] == verdicts.MOSTLY
    assert bars["pools", "longest_wait_s"] == pools.Plan().wait_bound_s


@pytest.mark.parametrize("step", STEPS.values(), ids=lambda step: step.name)
def test_the_command_line_understands_every_step(step: Any) -> None:
    from edge_llm.cli import cli

    for more in ((), step.small, step.without_tools or ()):
        arguments = [*step.arguments, *more, *((step.model, "a-model") if step.model else ()), "--json"]
        command: click.Command = cli
        context = click.Context(cli)
        while isinstance(command, click.Group):
            name, found, arguments = command.resolve_command(context, arguments)
            assert found is not None
            command = found
        command.make_context(name, arguments)  # raises UsageError for an option that is not there


# -- verdicts


@pytest.mark.parametrize(
    ("claim", "number"),
    [(claim, number) for claim in CLAIMS for number in range(len(claim.bars))],
    ids=lambda value: value.id if isinstance(value, Claim) else str(value),
)
def test_a_claim_that_is_missed_is_said_to_be_missed(claim: Claim, number: int) -> None:
    bar = claim.bars[number]
    missed = changed(decided(claim), bar.path, beyond(bar))
    verdict = judged(claim, [missed])
    assert verdict.verdict == MISSED
    assert verdict.records == [missed.file]
    assert any(figure.keeps is False for figure in verdict.figures)
    (line,) = missed_lines([verdict])
    assert line.startswith(f"{claim.id}: ")
    assert f"**{MISSED}**" in markdown({"a board": [verdict]})


@each_claim()
def test_a_claim_whose_figures_all_keep_their_bars_holds(claim: Claim) -> None:
    one = decided(claim)
    for bar in claim.bars:
        kept = 0.0 if bar.direction == "below" else bar.limit
        one = changed(one, bar.path, kept)
    assert judged(claim, [one]).verdict == HOLDS


@each_claim()
def test_what_cannot_be_read_or_is_not_there_is_not_tested(claim: Claim) -> None:
    one = decided(claim)
    others = [bar for bar in claim.bars[1:] if not bar.path.endswith("#")]
    for bar in others:
        one = changed(one, bar.path, 0.0 if bar.direction == "below" else bar.limit)
    if not claim.bars[0].path.endswith("#"):
        unread = changed(one, claim.bars[0].path, None)
        assert judged(claim, [unread]).verdict == UNTESTED
        assert "could not be read" in judged(claim, [unread]).reason
    empty = Evidence(one.file, msgspec.structs.replace(one.record, figures={}))
    assert judged(claim, [empty]).verdict == UNTESTED
    assert "the record has no" in judged(claim, [empty]).reason


@each_claim()
def test_without_a_record_of_its_command_a_claim_is_not_tested_and_the_command_is_named(claim: Claim) -> None:
    step = STEPS[claim.step]
    others = [one for one in RECORDS if not step.left(one.record)]
    verdict = judged(claim, others)
    assert (verdict.verdict, verdict.records) == (UNTESTED, [])
    assert step.command_words in verdict.reason
    assert judged(claim, others, "left out: no time").reason == "left out: no time"


@each_claim()
def test_a_run_that_was_cut_confirms_nothing(claim: Claim) -> None:
    one = decided(claim)
    for bar in claim.bars:
        one = changed(one, bar.path, 0.0 if bar.direction == "below" else bar.limit)
    cut = Evidence(one.file, msgspec.structs.replace(one.record, is_complete=False))
    assert judged(claim, [cut]).verdict == UNTESTED
    assert "cut short" in judged(claim, [cut]).reason


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if claim.one_refutes], ids=lambda claim: claim.id)
def test_one_counterexample_refutes_even_when_the_run_was_cut_or_an_older_one_holds(claim: Claim) -> None:
    whole = decided(claim)
    bad = changed(whole, claim.bars[0].path, beyond(claim.bars[0]))
    later = whole.record.finished_at
    cut = Evidence("cut.json", msgspec.structs.replace(bad.record, is_complete=False, started_at=later))
    assert judged(claim, [whole, cut]).verdict == MISSED
    older = Evidence(
        "cut.json", msgspec.structs.replace(cut.record, started_at=whole.record.started_at.replace(year=2000))
    )
    assert judged(claim, [whole, older]).verdict == judged(claim, [whole]).verdict


def test_a_run_in_which_something_failed_confirms_nothing_and_says_what() -> None:
    claim = by_id("exact.theorem")
    one = decided(claim)
    failed = Evidence(one.file, msgspec.structs.replace(one.record, failures=[Failure("theorem", "no route to host")]))
    verdict = judged(claim, [failed])
    assert verdict.verdict == UNTESTED
    assert "no route to host" in verdict.reason


def test_of_the_papers_table_the_rows_count_that_are_there() -> None:
    claim = by_id("edge.paper")
    one = decided(claim)
    failed = Evidence(one.file, msgspec.structs.replace(one.record, failures=[Failure("bad.gguf", "is no model")]))
    assert judged(claim, [failed]).verdict == judged(claim, [one]).verdict != UNTESTED


@pytest.mark.parametrize("idle", [0.3, None])
def test_a_board_that_others_used_or_that_nobody_watched_says_nothing_of_the_papers_claim(idle: float | None) -> None:
    claim = by_id("edge.paper")
    loads = {"cpu_share": 0.4, "above_idle_cpu_share": None if idle is None else 0.4 - idle}
    one = decided(claim)
    for name, value in loads.items():
        one = changed(one, f"rows/*/{name}", value)
    verdict = judged(claim, [one])
    assert verdict.verdict == UNTESTED
    assert "busy before" in verdict.reason


def test_what_a_quick_run_cannot_tell_is_not_tested() -> None:
    claim = by_id("pools.moves")
    one = decided(claim)
    quick = Evidence(one.file, msgspec.structs.replace(one.record, command=[*one.record.command, "--quick"]))
    assert judged(claim, [one]).verdict == HOLDS
    assert judged(claim, [quick]).verdict == UNTESTED


def test_a_full_run_beats_a_newer_quick_one_and_a_quick_one_says_that_it_is() -> None:
    claim = by_id("gateway.cpu")
    full = changed(decided(claim), "cpu_us_per_token", 50.0)
    slow = changed(full, "cpu_us_per_token", 999.0)
    quick = msgspec.structs.replace(
        slow.record, command=["edge-llm", "bench", "gateway", "--quick"], started_at=full.record.finished_at
    )
    assert judged(claim, [Evidence("quick.json", quick), full]).verdict == HOLDS
    alone = judged(claim, [Evidence("quick.json", quick)])
    assert (alone.verdict, alone.is_quick) == (MISSED, True)
    few = changed(decided(by_id("exact.theorem")), "comparisons", 48)
    record = msgspec.structs.replace(few.record, config={**few.record.config, "prompts": 24})
    assert judged(by_id("exact.theorem"), [Evidence("few.json", record)]).is_quick


def test_kinds_of_faults_that_several_runs_struck_are_read_together_each_from_its_newest_run() -> None:
    claim = by_id("failover.simulated")
    parts = [one for one in left_by(claim) if "-part" in one.file]  # of a campaign that was run in pieces
    assert len(parts) > 1
    kinds = {kind for one in parts for kind in one.record.figures["per_kind"]}
    verdict = judged(claim, parts)
    assert {figure.where.split("/")[1] for figure in verdict.figures} == kinds
    assert set(verdict.records) == {one.file for one in parts}
    newest = parts[0]
    (kind, *_) = newest.record.figures["per_kind"]
    bad = changed(newest, f"per_kind/{kind}/bad_streams", 1)
    assert judged(claim, [bad, *parts[1:]]).verdict == MISSED
    again = msgspec.structs.replace(newest.record, started_at=newest.record.finished_at)
    assert judged(claim, [bad, *parts[1:], Evidence("again.json", again)]).verdict == HOLDS


def test_runs_of_the_real_model_say_nothing_of_simulated_ones() -> None:
    of_model, simulated = by_id("failover.model"), by_id("failover.simulated")
    assert not {one.file for one in left_by(of_model)} & {one.file for one in left_by(simulated)}


# -- paths and words


def test_paths_go_by_name_by_wildcard_through_lists_and_to_lengths() -> None:
    tree = {"a, 1 b": {"x": 1}, "a, 2 b": {"y": None, "x": 2.5}, "rows": [{"x": True}, {"x": "s"}], "odd/*": 3}
    assert list(figures_at(tree, "a, * b/x")) == [("a, 1 b/x", 1), ("a, 2 b/x", 2.5)]
    assert list(figures_at(tree, "a, 2 b/y")) == [("a, 2 b/y", None)]
    assert list(figures_at(tree, "rows/*/x")) == [("rows/0/x", True), ("rows/1/x", "s")]
    assert list(figures_at(tree, "rows/1/x")) == [("rows/1/x", "s")]
    assert list(figures_at(tree, "rows/#")) == [("rows", 2)]
    assert list(figures_at(tree, "rows")) == []
    assert list(figures_at(tree, "a, 1 b/x/z")) == []


@pytest.mark.parametrize(
    ("value", "direction", "limit", "expected"),
    [
        (1.0, "at most", 1.0, True),
        (1.1, "at most", 1.0, False),
        (1.0, "at least", 1.0, True),
        (0.9, "at least", 1.0, False),
        (1.0, "below", 1.0, False),
        (0.9, "below", 1.0, True),
        ("exact", "is", "exact", True),
        ("none", "is", "exact", False),
        (True, "is", True, True),
        (None, "at most", 1.0, None),
        ("much", "at most", 1.0, None),
        (True, "at least", 1.0, None),
    ],
)
def test_bars(value: object, direction: Any, limit: Any, expected: bool | None) -> None:
    assert keeps(value, Bar("x", direction, limit)) is expected


def test_figures_are_written_for_people() -> None:
    assert [shown(value) for value in (None, True, "exact", 8296, 0.946029, 44.918, 727.95, 0.0)] == [
        *("unknown", "yes", "exact", "8,296", "0.946", "44.9", "728", "0")
    ]
    assert shown(0.97939, "%") == "97.9 %"
    assert shown(7.341, "ms") == "7.34 ms"
    assert bar_words(by_id("stall.prompt")) == "at most 2"
    assert bar_words(by_id("exact.verify")) == "level exact"


def test_boards_are_named_as_the_columns_are() -> None:
    node = RECORDS[0].record.nodes[0]
    assert board_words(node) == "x86-64, 2 cores"
    pi = msgspec.structs.replace(node, machine="aarch64", cores=4, board="Raspberry Pi 5 Model B Rev 1.0")
    assert board_words(pi) == "Raspberry Pi 5"
    zero = msgspec.structs.replace(pi, board="Raspberry Pi Zero 2 W Rev 1.0")
    assert board_words(zero) == "Raspberry Pi Zero 2 W"
    assert board_words(msgspec.structs.replace(pi, board=None)) == "arm64, 4 cores"


def test_many_figures_become_a_range_and_the_one_that_misses_stays_bold() -> None:
    claim = by_id("stall.prompt")
    one = decided(claim)
    streams = {f"split, {n} streams": {"prompt_stall_ratio": float(n) / 4} for n in range(1, 10)}
    many = Evidence(one.file, msgspec.structs.replace(one.record, figures={"arrivals": streams}))
    assert figures_words(judged(claim, [many]), "**") == "0.25 to **2.25**"


def test_a_terminal_sees_every_claim_under_its_topic_and_what_is_missed_in_capitals() -> None:
    made = [judged(claim, RECORDS) for claim in CLAIMS]
    lines = list(listed(made))
    assert [line for line in lines if not line.startswith(" ")] == list(dict.fromkeys(TOPICS[c.topic] for c in CLAIMS))
    for verdict in made:
        (line,) = (line for line in lines if f" {verdict.id} " in line)
        assert (MISSED.upper() in line) == (verdict.verdict == MISSED)


def test_the_table_in_readme_is_the_one_that_the_records_give() -> None:
    readme = (RESULTS.parent / "README.md").read_text()
    table = table_between_marks(readme)
    if table is None:
        pytest.fail("README has no table between <!-- claims --> and <!-- /claims -->")
    linked = [Evidence(f"bench_results/{one.file}", one.record) for one in RECORDS]
    boards: Mapping[str, list[Verdict]] = {"x86-64, 2 cores": [judged(claim, linked) for claim in CLAIMS]}
    assert table == markdown(boards), "run `edge-llm bench claims --from bench_results` and paste it"


def by_id(name: str) -> Claim:
    return next(claim for claim in CLAIMS if claim.id == name)


def test_records_of_this_repository_are_there() -> None:
    assert all(isinstance(one.record, Record) for one in RECORDS)
    assert {one.record.kind for one in RECORDS} >= {"theorem", "handoff", "faults", "goodput", "engine"}


def of_one_trace(one: Evidence) -> Evidence:
    """A record of goodput as if only its first trace had been replayed."""
    name, first = next(iter(one.record.figures["traces"].items()))
    return Evidence(
        one.file, msgspec.structs.replace(one.record, figures={**one.record.figures, "traces": {name: first}})
    )


@pytest.mark.parametrize(
    ("ratio", "low", "high", "word"),
    [
        (1.2, 0.96, 1.5, HOLDS),
        (0.6, 0.4, 0.94, MISSED),
        (0.6, 0.4, 1.0, MISSED),
        (1.2, 0.9, 1.5, UNTESTED),
    ],
)
def test_a_comparison_confirms_nothing_while_its_interval_reaches_below_the_bar(
    ratio: float, low: float, high: float, word: str
) -> None:
    claim = by_id("goodput.strict_ttft")
    one = of_one_trace(next(one for one in RECORDS if one.record.kind == "goodput"))
    figures = json.loads(json.dumps(one.record.figures))
    (name,) = figures["traces"]
    compared = figures["traces"][name]["regimes"]["strict_ttft_loose_tpot"]["auto_to_better"]
    compared |= {"is_decided": True, "ratio": ratio, "low": low, "high": high}
    verdict = judged(claim, [Evidence(one.file, msgspec.structs.replace(one.record, figures=figures))])
    assert verdict.verdict == word
    if word == UNTESTED:
        assert verdict.reason == f"too few requests to tell: {ratio} ({low} to {high:g})"
        assert f"{verdict.reason} ([record]({one.file}))" in markdown({"here": [verdict]})


def test_a_trace_that_cannot_decide_leaves_it_to_the_others_and_is_named() -> None:
    claim = by_id("goodput.strict_ttft")
    one = of_one_trace(decided(claim))
    (name,) = one.record.figures["traces"]
    undecided = json.loads(json.dumps(one.record.figures["traces"][name]))
    undecided["regimes"]["strict_ttft_loose_tpot"]["auto_to_better"] |= {"is_decided": False, "ratio": 0.1}
    figures = {**one.record.figures, "traces": {name: one.record.figures["traces"][name], "other": undecided}}
    verdict = judged(claim, [Evidence(one.file, msgspec.structs.replace(one.record, figures=figures))])
    assert (verdict.verdict, len(verdict.figures)) == (judged(claim, [one]).verdict, 1)
    assert verdict.reason == "other: the rates measured do not decide it"
    assert verdict.reason in markdown({"here": [verdict]})
    assert verdict.reason in "".join(listed([verdict]))
    figures["traces"] = {"other": undecided}
    alone = judged(claim, [Evidence(one.file, msgspec.structs.replace(one.record, figures=figures))])
    assert (alone.verdict, alone.reason) == (UNTESTED, "the rates measured do not decide it")
