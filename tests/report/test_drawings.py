"""Drawings are well-formed, labelled, inside their frame, and honest about holes."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from edge_llm.report.axes import Axis, scale, spans_decades
from edge_llm.report.svg import (
    WIDTH,
    Dot,
    Level,
    Range,
    Row,
    Series,
    Span,
    cloud,
    curves,
    ranges,
    stages,
)

X, Y = Axis("seconds"), Axis("share", low=0.0, high=1.0, is_share=True)
LINE = Series("a < b & c", ((0.0, 0.1), (1.0, 0.5), (2.0, 0.9)), band=((0.0, 0.0, 0.2), (2.0, 0.8, 1.0)))
STAGES = {"queue": 0, "prefill": 1, "decode": 2}
DRAWINGS = {
    "curves": curves(
        "curves", [LINE, Series("steps", ((0.0, 0.2), (2.0, 0.4)), is_stepped=True)], X, Y, [Level(0.9, "90 %")]
    ),
    "stages": stages(
        "stages", [Row("split", (Span("queue", 0, 1), Span("prefill", 1, 90))), Row("r", ())], Axis("ms"), STAGES
    ),
    "ranges": ranges(
        "ranges", [Range("kill -9", 0.1, 0.2, 6.0, "a"), Range("<stop>", 6.0, 6.1, 6.2, "b")], Axis("s", is_log=True)
    ),
    "cloud": cloud(
        "cloud", [Dot("m1", 1, 0.5, "m1", y_low=0.4, y_high=0.6), Dot("m2", 9, 0.4, "m2")], X, Y, [(1, 0.5), (9, 0.4)]
    ),
}


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_is_well_formed_and_says_what_it_is(name: str) -> None:
    root = ElementTree.fromstring(DRAWINGS[name])
    assert root.attrib["aria-label"] == name
    assert root.attrib["role"] == "img"


@pytest.mark.parametrize("name", DRAWINGS)
def test_nothing_lies_outside_of_the_drawing(name: str) -> None:
    root = ElementTree.fromstring(DRAWINGS[name])
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert width == WIDTH
    for element in root.iter():
        if "x" in element.attrib:
            assert 0 <= float(element.attrib["x"]) <= width
            assert 0 <= float(element.attrib["y"]) <= height
        for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", element.attrib.get("d", "")):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height


@pytest.mark.parametrize("name", DRAWINGS)
def test_no_word_is_cut_off_at_the_edge(name: str) -> None:
    for element in ElementTree.fromstring(DRAWINGS[name]).iter():
        if not element.tag.endswith("text"):
            continue
        width, x, kind = 5.6 * len(element.text or ""), float(element.attrib["x"]), element.attrib["class"].split()
        left = x - width if "e" in kind else x - width / 2 if "m" in kind else x
        assert left >= -1
        assert left + width <= WIDTH + 1


def test_a_long_label_of_an_axis_is_moved_into_the_drawing() -> None:
    svg = ranges("r", [Range("a long label of a row", 1.0, 2.0, 3.0)], Axis("x" * 60))
    (at,) = [float(e.attrib["x"]) for e in ElementTree.fromstring(svg).iter() if (e.text or "").startswith("xxx")]
    assert at + 60 * 5.6 / 2 <= WIDTH


def test_many_rows_are_lower_and_all_of_them_are_there() -> None:
    def height(count: int) -> float:
        svg = stages("s", [Row(f"r{n}", (Span("queue", n, n + 1),)) for n in range(count)], X, STAGES)
        assert {f"r{n}" for n in range(count)} <= set(texts(svg))
        return float(ElementTree.fromstring(svg).attrib["viewBox"].split()[3])

    assert height(30) < 2.5 * height(10)


def test_a_stage_has_one_colour_in_all_drawings() -> None:
    one = stages("a", [Row("r", (Span("queue", 0, 1), Span("decode", 1, 2)))], X, STAGES)
    other = stages("b", [Row("r", (Span("decode", 0, 2),))], X, STAGES)
    assert '<rect class="f c2"' in one
    assert '<rect class="f c2"' in other


def test_labels_are_text_and_escaped() -> None:
    found = texts(DRAWINGS["curves"])
    assert {"a < b & c", "steps", "seconds", "share", "90 %"} <= set(found)
    assert {"queue", "prefill", "split", "ms"} <= set(texts(DRAWINGS["stages"]))
    assert {"<stop>", "kill -9"} <= set(texts(DRAWINGS["ranges"]))


def test_a_long_legend_takes_more_rows_and_a_taller_drawing() -> None:
    def height(names: list[str]) -> float:
        svg = curves("x", [Series(name, ((0.0, 0.0), (1.0, 1.0))) for name in names], X, Y)
        return float(ElementTree.fromstring(svg).attrib["viewBox"].split()[3])

    assert height(["a" * 50] * 6) > height(["a", "b", "c", "d", "e", "f"])


def test_a_missing_reading_is_a_hole_in_the_line() -> None:
    svg = curves("x", [Series("s", ((0.0, 0.1), (1.0, math.nan), (2.0, 0.3), (3.0, 0.4)))], X, Y)
    (path,) = [
        e.attrib["d"]
        for e in ElementTree.fromstring(svg).iter()
        if e.attrib.get("class") == "l d0" and "h24" not in e.attrib["d"]
    ]
    assert path.count("M") == 2
    assert path.count("L") == 1
    assert "nan" not in svg


def test_series_differ_without_colours() -> None:
    svg = curves("x", [Series(str(n), ((0.0, n / 8), (1.0, n / 8))) for n in range(8)], X, Y)
    root = ElementTree.fromstring(svg)
    dashes = {e.attrib["class"] for e in root.iter() if e.attrib.get("class", "").startswith("l d")}
    assert len(dashes) == 8


def test_stages_lie_end_to_end_in_proportion() -> None:
    root = ElementTree.fromstring(DRAWINGS["stages"])
    queue, prefill, *_ = [e for e in root.iter() if e.tag.endswith("rect")]
    assert float(queue.attrib["x"]) + float(queue.attrib["width"]) == pytest.approx(float(prefill.attrib["x"]), abs=0.3)
    assert float(prefill.attrib["width"]) == pytest.approx(89 * float(queue.attrib["width"]), rel=0.03)


@pytest.mark.parametrize(
    ("values", "is_log"),
    [
        ([0.0, 1.0], False),
        ([3.0, 3.0], False),
        ([], False),
        ([0.001, 900.0], True),
        ([5.0, 5.0], True),
        ([0.0, -1.0], True),
        ([99.2, 99.9], False),
    ],
)
def test_a_scale_holds_all_values_and_has_ticks_in_order(values: list[float], is_log: bool) -> None:
    found = scale(Axis("x", is_log=is_log), values, 50.0, 450.0)
    places = [found.at(tick) for tick in found.ticks()]
    assert len(places) >= 2
    assert all(earlier < later for earlier, later in pairwise(places))
    assert all(50.0 - 1e-6 <= place <= 450.0 + 1e-6 for place in places)
    assert all(50.0 <= found.at(value) <= 450.0 for value in values)


def test_fixed_ends_stay_where_they_are() -> None:
    found = scale(Axis("x", low=0.0, high=1.0), [0.4, 0.6], 0.0, 100.0)
    assert (found.low, found.high) == (0.0, 1.0)
    assert found.at(0.5) == 50.0


def test_decades_are_what_a_logarithmic_axis_is_for() -> None:
    assert spans_decades([0.1, 6.0])
    assert not spans_decades([0.0, 6.0])
    assert not spans_decades([1.0, 6.0])
    assert not spans_decades([])
