"""Boards beside a run: idle first, nulls for what is not there, and nothing that a sensor says ends the run."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime

import msgspec
import pytest

from edge_llm.bench.node_metrics import NoNode
from edge_llm.bench.record import encode, parse
from edge_llm.bench.resources import (
    LOCAL,
    POINTS,
    CannotWatch,
    Row,
    Sampler,
    Span,
    Watch,
    Watched,
    summary_of,
    thinned,
    watched,
)
from edge_llm.bench.run import Run

STARTED = datetime(2026, 11, 28, tzinfo=UTC)


class FakeBoard:
    """Says what it is given, again and again; when there is nothing it breaks."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def read(self, now_s: float) -> Row:
        return self.rows[0]

    def facts(self) -> Mapping[str, str]:
        return {"power_source": "a test"}


def of_rows(rows: list[tuple[float, Row]], idle: int = 0) -> Watched:
    sampler = Sampler("pi-1", lambda now_s: {}, rows=rows, idle=idle)
    return watched(sampler, Span("run", STARTED, 1.0, begin_s=100.0, end_s=rows[-1][0]), {})


def test_loads_are_given_raw_and_above_what_the_board_did_before() -> None:
    found = of_rows(
        [
            (98.0, {"cpu_share": 0.1}),
            (100.01, {"cpu_share": 0.2}),
            (101.0, {"cpu_share": 0.5}),
            (102.0, {"cpu_share": 0.9}),
        ],
        idle=2,
    )
    assert found.at_s == [-2.0, 0.01, 1.0, 2.0]
    assert found.series["cpu_share"] == [0.1, 0.2, 0.5, 0.9]
    load = found.summaries["cpu_share"]
    assert (load.n, load.missing, load.mean, load.maximum) == (2, 0, 0.7, 0.9)
    assert (load.idle, load.above_idle) == (0.15, 0.55)


def test_a_reading_that_is_not_there_is_null_and_counted_and_no_figure_hides_it() -> None:
    found = of_rows([(101.0, {"power_w": 4.0, "temperature_c": None}), (102.0, {"temperature_c": None})])
    assert found.series == {"power_w": [4.0, None], "temperature_c": [None, None]}
    assert (found.summaries["power_w"].n, found.summaries["power_w"].missing) == (1, 1)
    heat = found.summaries["temperature_c"]
    assert (heat.n, heat.missing, heat.mean, heat.maximum, heat.p95, heat.idle) == (0, 2, None, None, None, None)


def test_without_a_time_before_there_is_nothing_to_be_above() -> None:
    assert summary_of([1.0], []).above_idle is None
    assert (summary_of([None], [2.0]).idle, summary_of([None], [2.0]).above_idle) == (2.0, None)


def test_what_is_no_number_is_no_reading() -> None:
    found = of_rows([(101.0, {"x": float("nan")}), (102.0, {"x": float("inf")}), (103.0, {"x": 1.0})])
    assert found.series["x"] == [None, None, 1.0]


def test_a_long_watch_is_thinned_to_means_and_its_figures_are_of_all_samples() -> None:
    count = 3 * POINTS
    found = of_rows([(100.5 + at, {"cpu_share": 1.0 if at == 7 else 0.0}) for at in range(count)])
    assert (found.samples_per_point, len(found.at_s), len(found.series["cpu_share"])) == (3, POINTS, POINTS)
    assert found.series["cpu_share"][2] == pytest.approx(1 / 3, abs=1e-5)
    assert found.summaries["cpu_share"].maximum == 1.0
    assert found.sampler.samples == found.summaries["cpu_share"].n == count
    assert found.at_s[2] == pytest.approx(8.5), "a point is at the end of what it is of, as each sample is"


@pytest.mark.parametrize("count", [1, 5, POINTS, POINTS + 1, 7 * POINTS - 1])
def test_series_and_times_stay_together_however_long_it_was(count: int) -> None:
    found = of_rows([(100.5 + at, {"x": float(at)}) for at in range(count)])
    assert 0 < len(found.at_s) == len(found.series["x"]) <= POINTS


def test_a_gap_within_a_thinned_point_does_not_count_as_zero() -> None:
    assert thinned([1.0, None, 3.0, None, None, None, 5.0], 3) == [2.0, None]


def test_nobody_may_sample_more_often_than_once_a_second() -> None:
    for period_s in (0.5, 0.0, -1.0, float("nan")):
        with pytest.raises(CannotWatch, match="every 1 s"):
            Watch({}, period_s)


def test_what_is_no_url_is_refused_before_anything_runs() -> None:
    for url in ("pi-1:8001", "ftp://pi-1/metrics", "http://", "", "http://pi-1:99999", "http://[pi-1"):
        with pytest.raises(NoNode, match="pi-1"):
            Watch({}, nodes={"pi-1": url})
    with pytest.raises(CannotWatch, match="another name"):
        Watch({}, nodes={LOCAL: "http://pi-1"})


def test_even_the_shortest_load_has_a_sample_and_the_boards_own_words() -> None:
    watch = Watch({}, board=FakeBoard([{"cpu_share": 0.5}]))
    with watch.running(0.0):
        threading.Event().wait(0.05)
    (found,) = watch.watched()
    assert (found.node, found.part, found.facts) == (LOCAL, "run", {"power_source": "a test"})
    assert found.series == {"cpu_share": [0.5]}
    assert found.summaries["cpu_share"].idle is None
    assert found.sampler.wall_s > 0, "what one sample costs has a time to be a share of"


def test_a_sensor_that_nobody_foresaw_ends_no_run() -> None:
    watch = Watch({}, board=FakeBoard([]))
    with watch.running(0.0):
        pass
    (found,) = watch.watched()
    assert (found.series, found.sampler.samples) == ({}, 1)
    assert "IndexError" in found.facts["trouble"]


def test_real_boards_are_watched_idle_and_then_under_load() -> None:
    """Real time: two samples a second apart."""
    run = Run("cluster", ["test"], {}, idle_s=1.0)
    with run.watching({"me": os.getpid()}, part="first"):
        threading.Event().wait(1.1)
    with run.watching({"me": os.getpid(), "nobody": 1 << 22}, part="second"):
        pass
    first, second = run.resources
    assert (first.part, second.part, first.node) == ("first", "second", LOCAL)
    assert first.at_s[0] < 0.25 < first.at_s[-1]
    assert first.summaries["cpu_share"].n > 0
    assert 0 <= (first.summaries["cpu_share"].mean or 0.0) <= 1
    assert (first.summaries["me/rss_bytes"].mean or 0) > 1e6
    assert first.summaries["me/rss_bytes"].idle is not None
    assert first.sampler.cpu_s > 0
    assert second.summaries["cpu_share"].idle == first.summaries["cpu_share"].idle is not None
    assert second.summaries["me/rss_bytes"].idle is None, "a process that idles late is not what it was"
    assert second.series["nobody/rss_bytes"] == [None]
    record = parse(encode(run.record({}, is_complete=True)), "x")
    assert record.resources == run.resources


def test_a_load_that_fails_is_still_watched_to_its_end() -> None:
    run = Run("cluster", ["test"], {}, idle_s=0.0)
    with pytest.raises(KeyboardInterrupt):
        with run.watching({}):
            raise KeyboardInterrupt
    assert [watched.node for watched in run.resources] == [LOCAL]
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("watch ")] == []


@contextmanager
def silent_node() -> Iterator[str]:
    """Takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/metrics"


def test_a_node_that_hangs_has_no_readings_and_holds_up_nobody() -> None:
    run = Run("cluster", ["test"], {}, idle_s=0.0)
    with silent_node() as url, run.watching({}, nodes={"pi-1": url}):
        pass
    here, there = run.resources
    assert (here.node, there.node) == (LOCAL, "pi-1")
    assert here.sampler.samples == 1
    assert all(summary.n == 0 for summary in there.summaries.values())


def test_the_schema_of_a_record_has_the_series() -> None:
    fields = msgspec.json.schema(Watched)["$defs"]["Watched"]["properties"]
    assert {"node", "part", "at_s", "series", "summaries", "sampler"} <= set(fields)
