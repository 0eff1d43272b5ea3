"""Drawings as inline SVG: curves, ranges, stages of requests, clouds of labelled dots. Pure: values in, text out.

Why not matplotlib: it is 60 MB and seconds of import on a Pi for a page that anybody with a record wants; its SVG has
fixed colours, where a page has a light and a dark side, and text that neither grows on a phone nor is found by a
search. What is here is less than its style sheet would be.

Owns geometry and labels. Colours are classes (`c0` to `c7`), which the page sets for light, dark and paper; every
series has a dash and a marker of its own beside its colour, so that nobody needs to see colours. Refuses to know
records. A drawing is 460 units wide, so that its 12-unit letters can be read on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from edge_llm.report.axes import Axis, Scale, scale

WIDTH: Final = 460
_HEIGHT: Final = 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 24, 40
_ROW: Final = 22
_MANY_ROWS, _LOW_ROW = 14, 15
_ROWS_TOP: Final = 8  # nothing is written above rows
_LABEL_CHARS: Final = 34
_LETTER: Final = 6.1  # mean width of a letter of 11.5 units; labels that are all capitals are rare
_LEGEND_ROW: Final = 18
_LEGEND_CHARS: Final = 68
COLOURS: Final = 8
_MARKERS: Final = (
    '<circle cx="{x}" cy="{y}" r="3.4"/>',
    '<path d="M{x} {y}m-3.3 -3.3h6.6v6.6h-6.6z"/>',
    '<path d="M{x} {y}m0 -4.2l4 7h-8z"/>',
    '<path d="M{x} {y}m0 -4.4l4.4 4.4l-4.4 4.4l-4.4 -4.4z"/>',
    '<path d="M{x} {y}m0 4.2l4 -7h-8z"/>',
    '<path d="M{x} {y}m-4.2 -1.3h2.9v-2.9h2.6v2.9h2.9v2.6h-2.9v2.9h-2.6v-2.9h-2.9z"/>',
    '<circle cx="{x}" cy="{y}" r="2"/>',
    '<path d="M{x} {y}m-1.5 -4.2h3v8.4h-3z"/>',
)


@dataclass(frozen=True, slots=True)
class Series:
    """`points`: x, y, in order of x; where y is NaN the line has a hole. `band`: x, low, high. `marked`: where markers
    are, None: at every point."""

    label: str
    points: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float, float], ...] = ()
    marked: tuple[tuple[float, float], ...] | None = None
    is_stepped: bool = False


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal line: a goal."""

    value: float
    label: str


@dataclass(frozen=True, slots=True)
class Span:
    stage: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Row:
    label: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """A middle with its ends; `group` chooses the colour."""

    label: str
    low: float
    middle: float
    high: float
    group: str = ""


@dataclass(frozen=True, slots=True)
class Dot:
    """`said`: what a finger on it says."""

    label: str
    x: float
    y: float
    said: str
    group: str = ""
    y_low: float | None = None
    y_high: float | None = None


def curves(label: str, series: Sequence[Series], x: Axis, y: Axis, levels: Sequence[Level] = ()) -> str:
    """Lines over a common axis, a legend below."""
    across = scale(x, (at for one in series for at, _ in one.points), _LEFT, WIDTH - _RIGHT)
    up = scale(y, _heights(series, levels), _TOP + _HEIGHT, _TOP)
    parts = [_frame(across, up, x, y)]
    parts += [f'<path class="goal" d="M{_LEFT} {up.at(one.value):.1f}H{WIDTH - _RIGHT}"/>' for one in levels]
    parts += [_band(one, number, across, up) for number, one in enumerate(series) if one.band]
    parts += [_line(one, number, across, up) for number, one in enumerate(series)]
    parts += [_level(one, up) for one in levels]
    unmarked = {number for number, one in enumerate(series) if one.marked == ()}
    legend, height = _legend([one.label for one in series], _TOP + _HEIGHT + _BOTTOM, unmarked=unmarked)
    return _drawing(label, height, [*parts, legend])


def stages(label: str, rows: Sequence[Row], x: Axis, known: Mapping[str, int]) -> str:
    """A Gantt chart: one line for each row, one colour for each stage. `known`: stages in order of time with their
    colours, the same in every drawing."""
    there = {span.stage for row in rows for span in row.spans if span.end > span.start}
    height = _ROW if len(rows) <= _MANY_ROWS else _LOW_ROW
    left, bottom = _label_width(row.label for row in rows), _ROWS_TOP + height * len(rows)
    ends = [value for row in rows for span in row.spans for value in (span.start, span.end)]
    across = scale(x, ends, left, WIDTH - _RIGHT)
    parts = [_under(across, x, bottom, _ROWS_TOP)]
    for number, row in enumerate(rows):
        middle = _ROWS_TOP + height * (number + 0.5)
        parts.append(_row_label(row.label, left, middle))
        parts += [
            _span(row.label, span, known[span.stage], across, middle, height)
            for span in row.spans
            if span.stage in there
        ]
    names = [name for name in known if name in there]
    legend, end = _legend(names, bottom + _BOTTOM, colours=[known[name] for name in names], is_filled=True)
    return _drawing(label, end, [*parts, legend])


def _span(label: str, span: Span, colour: int, across: Scale, middle: float, height: float) -> str:
    start, end = across.at(span.start), across.at(span.end)
    width = max(end - start, 0.6)
    return (
        f'<rect class="f c{colour}" x="{start:.1f}" y="{middle - 0.32 * height:.1f}" width="{width:.1f}" '
        f'height="{0.64 * height:.1f}">'
        f"<title>{escape(label)}: {escape(span.stage)}, {span.end - span.start:.4g}</title></rect>"
    )


def ranges(label: str, rows: Sequence[Range], x: Axis) -> str:
    """A middle and its ends for each row; groups explained below when there are several."""
    groups = list(dict.fromkeys(row.group for row in rows))
    left = _label_width(row.label for row in rows)
    bottom = _ROWS_TOP + _ROW * len(rows)
    across = scale(x, (value for row in rows for value in (row.low, row.middle, row.high)), left, WIDTH - _RIGHT)
    parts = [_under(across, x, bottom, _ROWS_TOP)]
    for number, row in enumerate(rows):
        middle, colour = _ROWS_TOP + _ROW * (number + 0.5), groups.index(row.group)
        parts.append(_row_label(row.label, left, middle))
        parts.append(
            f'<g class="c{colour % COLOURS}"><path class="l" d="M{across.at(row.low):.1f} {middle:.1f}'
            f'H{across.at(row.high):.1f}"/>{_marker(colour, across.at(row.middle), middle)}'
            f"<title>{escape(row.label)}: {row.middle:.4g} ({row.low:.4g} to {row.high:.4g})</title></g>"
        )
    legend, height = _legend(groups if len(groups) > 1 else [], bottom + _BOTTOM)
    return _drawing(label, height, [*parts, legend])


def cloud(label: str, dots: Sequence[Dot], x: Axis, y: Axis, frontier: Sequence[tuple[float, float]] = ()) -> str:
    """Labelled dots; `frontier` is a line of those that no other beats in everything."""
    groups = list(dict.fromkeys(dot.group for dot in dots))
    across = scale(x, (dot.x for dot in dots), _LEFT, WIDTH - _RIGHT)
    heights = [value for dot in dots for value in (dot.y, dot.y_low, dot.y_high) if value is not None]
    up = scale(y, heights, _TOP + _HEIGHT, _TOP)
    parts = [_frame(across, up, x, y)]
    if len(frontier) > 1:
        parts.append(f'<path class="goal" d="M{_joined(frontier, across, up)}"/>')
    taken: list[tuple[float, float]] = []
    for dot in sorted(dots, key=lambda one: (one.y, one.x)):
        parts.append(_dot(dot, groups.index(dot.group), across, up, taken))
    legend, height = _legend(groups if len(groups) > 1 else [], _TOP + _HEIGHT + _BOTTOM)
    return _drawing(label, height, [*parts, legend])


# -- pieces


def _drawing(label: str, height: float, parts: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label, quote=True)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _heights(series: Sequence[Series], levels: Sequence[Level]) -> Iterator[float]:
    for one in series:
        yield from (value for _, value in one.points)
        yield from (value for _, low, high in one.band for value in (low, high))
    yield from (level.value for level in levels)


def _frame(across: Scale, up: Scale, x: Axis, y: Axis) -> str:
    """Grid, ticks, and the label of y above its axis: nobody has to turn a phone to read it."""
    lines = [f'<text class="t" x="4" y="12">{escape(y.label)}</text>']
    for tick in up.ticks():
        at = up.at(tick)
        lines.append(f'<path class="g" d="M{_LEFT} {at:.1f}H{WIDTH - _RIGHT}"/>')
        lines.append(f'<text class="t e" x="{_LEFT - 6}" y="{at + 4:.1f}">{up.word(tick)}</text>')
    return "".join(lines) + _under(across, x, _TOP + _HEIGHT, _TOP)


def _under(across: Scale, x: Axis, bottom: float, top: float) -> str:
    """The axis below, its lines up to `top`, and its label: in the middle, unless it is too long for that."""
    lines = [f'<path class="a" d="M{across.start:.1f} {bottom:.1f}H{across.end:.1f}"/>']
    last = -1e9
    for tick in across.ticks():
        at, word = across.at(tick), across.word(tick)
        lines.append(f'<path class="g" d="M{at:.1f} {bottom + 4:.1f}V{top:.1f}"/>')
        half = _LETTER * len(word) / 2
        if at - half > last:
            lines.append(f'<text class="t m" x="{min(at, WIDTH - 2 - half):.1f}" y="{bottom + 15:.1f}">{word}</text>')
            last = at + half + 4
    half = _LETTER * len(x.label) / 2
    middle = max(half + 2, min((across.start + across.end) / 2, WIDTH - half - 2))
    lines.append(f'<text class="t m" x="{middle:.1f}" y="{bottom + 31:.1f}">{escape(x.label)}</text>')
    return "".join(lines)


def _level(level: Level, up: Scale) -> str:
    at = up.at(level.value) - 4
    return f'<text class="t e halo" x="{WIDTH - _RIGHT - 2}" y="{at:.1f}">{escape(level.label)}</text>'


def _line(one: Series, number: int, across: Scale, up: Scale) -> str:
    if not one.points:
        return ""
    path = _stepped(one.points, across, up) if one.is_stepped else _joined(one.points, across, up)
    drawn = f'<path class="l d{number % COLOURS}" d="M{path}"/>'
    drawn += "".join(
        f"<g>{_marker(number, across.at(x), up.at(y))}<title>{escape(one.label)}: {x:.4g}, {y:.4g}</title></g>"
        for x, y in (one.points if one.marked is None else one.marked)
        if not math.isnan(y)
    )
    return f'<g class="c{number % COLOURS}">{drawn}</g>'


def _joined(points: Sequence[tuple[float, float]], across: Scale, up: Scale) -> str:
    """Without the first letter. A hole begins a new line."""
    path, is_open = "", False
    for x, y in points:
        if math.isnan(y):
            is_open = False
            continue
        path += f"{'L' if is_open else 'M'}{across.at(x):.1f} {up.at(y):.1f}"
        is_open = True
    return path.removeprefix("M")


def _stepped(points: Sequence[tuple[float, float]], across: Scale, up: Scale) -> str:
    """From each point level to the next one's x."""
    first, *rest = points
    steps = "".join(f"H{across.at(x):.1f}V{up.at(y):.1f}" for x, y in rest)
    return f"{across.at(first[0]):.1f} {up.at(first[1]):.1f}{steps}"


def _band(one: Series, number: int, across: Scale, up: Scale) -> str:
    above = _joined([(x, high) for x, _, high in one.band], across, up)
    below = _joined([(x, low) for x, low, _ in reversed(one.band)], across, up)
    return f'<path class="b c{number % COLOURS}" d="M{above}L{below}Z"/>'


def _dot(dot: Dot, colour: int, across: Scale, up: Scale, taken: list[tuple[float, float]]) -> str:
    """Its label beside it, on the side with room, moved up until it is on nobody else's."""
    x, y = across.at(dot.x), up.at(dot.y)
    text = _cut(dot.label)
    is_left = x + 8 + _LETTER * len(text) > WIDTH - 4
    label_y = y + 4
    while any(abs(label_y - other_y) < 12 and abs(x - other_x) < 90 for other_x, other_y in taken):
        label_y -= 12
    taken.append((x, label_y))
    whiskers = ""
    if dot.y_low is not None and dot.y_high is not None:
        whiskers = f'<path class="l" d="M{x:.1f} {up.at(dot.y_low):.1f}V{up.at(dot.y_high):.1f}"/>'
    return (
        f'<g class="c{colour % COLOURS}">{whiskers}{_marker(colour, x, y)}<title>{escape(dot.said)}</title></g>'
        f'<text class="t halo{" e" if is_left else ""}" x="{x - 8 if is_left else x + 8:.1f}" y="{label_y:.1f}">'
        f"{escape(text)}</text>"
    )


def _marker(number: int, x: float, y: float) -> str:
    return _MARKERS[number % COLOURS].format(x=f"{x:.1f}", y=f"{y:.1f}")


def _row_label(label: str, left: float, middle: float) -> str:
    return f'<text class="t e" x="{left - 6:.1f}" y="{middle + 4:.1f}">{escape(_cut(label))}</text>'


def _label_width(labels: Iterable[str]) -> float:
    """Room on the left for row labels, at most half of the drawing."""
    return min(WIDTH / 2, 14 + _LETTER * max((len(_cut(label)) for label in labels), default=0))


def _cut(label: str) -> str:
    """Its beginning and its end: names of models differ in either."""
    half = _LABEL_CHARS // 2 - 1
    return label if len(label) <= _LABEL_CHARS else f"{label[:half]}...{label[1 - half :]}"


def _legend(
    labels: Sequence[str],
    top: float,
    *,
    colours: Sequence[int] = (),
    unmarked: Collection[int] = (),
    is_filled: bool = False,
) -> tuple[str, float]:
    """Entries in as many rows as they need, and where the drawing ends. `colours`: when they are not in order."""
    entries, x, y = [], 8.0, top + 12
    for number, label in enumerate(labels):
        text = label if len(label) <= _LEGEND_CHARS else f"{label[: _LEGEND_CHARS - 3]}..."
        width = 34 + _LETTER * len(text)
        if x > 8.0 and x + width > WIDTH:
            x, y = 8.0, y + _LEGEND_ROW
        colour = colours[number] if colours else number % COLOURS
        if is_filled:
            mark = f'<rect class="f" x="{x + 2:.0f}" y="{y - 9:.0f}" width="18" height="10"/>'
        else:
            mark = f'<path class="l d{colour}" d="M{x:.0f} {y - 4:.0f}h24"/>'
            mark += "" if number in unmarked else _marker(number, x + 12, y - 4)
        entries.append(
            f'<g class="c{colour}">{mark}</g><text class="t" x="{x + 29:.0f}" y="{y:.0f}">{escape(text)}</text>'
        )
        x += width + 8
    return "".join(entries), (y + 8 if labels else top)
