"""What a run costs its boards: processor, memory, network, heat and power, sampled beside it, at most once a second.

Owns the sampling threads (one for this board, one for each other node), the series and what they come to. Refuses to
know how a reading is taken (machine.py, power.py, node_metrics.py) and what the run does.

Invariants: a reading that does not exist is null, and counted; nothing here ends a run, whatever a sensor or a node
says; the sampling's own cost is measured with it. Before the first load the boards are watched idle: loads are given
raw, and above that.

Names: `cpu_share` (of all cores, 0 to 1), `cpu0_share` ..., `ram_share`, `ram_used_bytes`, `group_bytes` and
`group_peak_bytes` (of our control group), `net_in_bytes_per_s`, `net_out_bytes_per_s`, `loopback_bytes_per_s`,
`temperature_c`, `frequency_hz`, `throttled/<kind>` (0 or 1), `power_w`; of a process `<name>/cpu_cores` (cores kept
busy), `<name>/rss_bytes`, `<name>/pss_bytes` (shared pages divided), `<name>/anonymous_bytes` (without mapped files:
what a mapped model does not count in). Rates are means since the sample before.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Protocol

import msgspec

from edge_llm.bench.board_reader import BoardReader
from edge_llm.bench.node_metrics import NodeMetrics
from edge_llm.bench.stats import mean, percentile
from edge_llm.errors import EdgeLLMError

MIN_PERIOD_S: Final = 1.0  # more often, and the sampling is what is measured
LOCAL: Final = "local"
POINTS: Final = 600  # of a series in a record; longer ones are thinned to it
_END_S: Final = 3.0  # for a node that does not answer


class CannotWatch(EdgeLLMError):
    """A run is to be watched in a way that would say less, or cost more, than not watching it."""

    code = "cannot_watch"


Row = Mapping[str, float | None]
Read = Callable[[float], Row]


class Board(Protocol):
    """A board, as a watch asks it (board_reader.py, node_metrics.py)."""

    def read(self, now_s: float) -> Row: ...

    def facts(self) -> Mapping[str, str]: ...


class SeriesSummary(msgspec.Struct, frozen=True):
    """Of all samples under load, thinned or not. `missing`: readings that there were not. `idle`: mean before the
    load (in later parts of a run a board's is that of the first); `above_idle`: the mean less that."""

    n: int
    missing: int
    mean: float | None = None
    maximum: float | None = None
    p95: float | None = None
    idle: float | None = None
    above_idle: float | None = None


class SamplerCost(msgspec.Struct, frozen=True):
    """What the sampling itself took: CPU, out of the time since it began, before the first sample too; 0 s of time:
    not known. `gaps`: samples that fell out because the one before took too long."""

    cpu_s: float
    wall_s: float
    samples: int
    gaps: int


class Watched(msgspec.Struct, frozen=True, kw_only=True):
    """One node during one part of a run.

    `at_s`: seconds since the load began; below 0 the node was idle. Each of `series` has a value for each of them, or
    null. `samples_per_point` > 1: a long watch was thinned, each point is a mean of so many. `facts`: what the board
    said of itself that is no number.
    """

    node: str
    part: str
    started_at: datetime
    period_s: float
    at_s: list[float]
    series: dict[str, list[float | None]]
    summaries: dict[str, SeriesSummary]
    sampler: SamplerCost
    samples_per_point: int = 1
    facts: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Span:
    """When: the load began and ended (monotonic), in which part of the run."""

    part: str
    started_at: datetime
    period_s: float
    begin_s: float
    end_s: float


@dataclass(slots=True)
class Sampler:
    """One node's samples: when (monotonic), and what was read. One thread calls `prime` and `sample`. `idle`: how many
    of the first are from before the load. `began_s`: when it was primed."""

    node: str
    read: Read
    rows: list[tuple[float, Row]] = field(default_factory=list)
    idle: int = 0
    cpu_s: float = 0.0
    gaps: int = 0
    trouble: str = ""
    began_s: float | None = None

    def prime(self, now_s: float) -> None:
        """Rates begin here, and what the sampling costs."""
        self.began_s = now_s
        self._read(now_s)

    def sample(self, now_s: float) -> None:
        self.rows.append((now_s, self._read(now_s)))

    def _read(self, now_s: float) -> Row:
        before_s = time.thread_time()
        try:
            return self.read(now_s)
        except Exception as error:  # noqa: BLE001 - a sensor that nobody foresaw must not end a run of hours
            self.trouble = self.trouble or repr(error)
            return {}
        finally:
            self.cpu_s += time.thread_time() - before_s


class Watch:
    """Samples this board, these processes (name: id) and these nodes (name: URL of their /metrics) while it runs.

    Raises CannotWatch (more than a sample per second, a name that is taken) and NoNode (no URL).
    """

    def __init__(
        self,
        processes: Mapping[str, int],
        period_s: float = MIN_PERIOD_S,
        nodes: Mapping[str, str] | None = None,
        part: str = "run",
        baselines: Mapping[str, Mapping[str, float]] | None = None,
        board: Board | None = None,
    ) -> None:
        if not period_s >= MIN_PERIOD_S:
            raise CannotWatch(f"boards are read every {MIN_PERIOD_S:g} s or more seldom, not every {period_s} s")
        self._period_s, self._part, self._baselines = period_s, part, baselines or {}
        if LOCAL in (nodes or {}):
            raise CannotWatch(f"{LOCAL} is what this board is called: give the other node another name")
        self._boards: dict[str, Board] = {LOCAL: board or BoardReader(processes)}
        self._boards |= {name: NodeMetrics(url, name) for name, url in (nodes or {}).items()}
        self._samplers = [Sampler(name, one.read) for name, one in self._boards.items()]
        self._started_at, self._begin_s, self._end_s = datetime.now(UTC), 0.0, 0.0
        self._stop = threading.Event()

    @contextmanager
    def running(self, idle_s: float) -> Iterator[None]:
        """The load is what is inside; `idle_s` go by before it."""
        self._begin_s = time.monotonic() + idle_s
        self._started_at = datetime.fromtimestamp(time.time() + idle_s, UTC)
        threads = [
            threading.Thread(target=self._run, args=(one,), name=f"watch {one.node}", daemon=True)
            for one in self._samplers
        ]
        try:
            for thread in threads:
                thread.start()
            time.sleep(idle_s)
            yield
        finally:
            self._end_s = time.monotonic()
            self._stop.set()
            for thread in threads:
                thread.join(_END_S)

    def watched(self) -> list[Watched]:
        """Every node's series, when the run is over."""
        span = Span(self._part, self._started_at, self._period_s, self._begin_s, self._end_s)
        return [
            watched(
                sampler,
                span,
                self._boards[sampler.node].facts(),
                self._baselines.get(sampler.node, {}),
            )
            for sampler in self._samplers
        ]

    def _run(self, sampler: Sampler) -> None:
        """Samples at whole periods before and after the load began, and one when it ends."""
        began_s = time.monotonic()
        sampler.prime(began_s)
        tick = math.floor((began_s - self._begin_s) / self._period_s) + 1
        while not self._stop.wait(max(0.0, self._begin_s + tick * self._period_s - time.monotonic())):
            now_s = time.monotonic()
            sampler.sample(now_s)
            sampler.idle += tick <= 0 and now_s <= self._begin_s + self._period_s / 4
            missed = max(0, math.floor((time.monotonic() - self._begin_s) / self._period_s) - tick)
            sampler.gaps += missed
            tick += 1 + missed
        now_s, last_s = time.monotonic(), sampler.rows[-1][0] if sampler.rows else began_s
        is_unseen = len(sampler.rows) == sampler.idle  # nothing but what was before the load
        if now_s > self._begin_s and (is_unseen or now_s - last_s > self._period_s / 2):
            sampler.sample(now_s)


def baselines(parts: Sequence[Watched]) -> dict[str, dict[str, float]]:
    """By node: what its board did before the first load of a run. A process that idles late is not what it was."""
    first: dict[str, dict[str, float]] = {}
    for one in parts:
        idle = {name: found.idle for name, found in one.summaries.items() if found.idle is not None}
        first.setdefault(one.node, {name: value for name, value in idle.items() if "/" not in name})
    return first


def watched(
    sampler: Sampler, span: Span, facts: Mapping[str, str], baseline: Mapping[str, float] | None = None
) -> Watched:
    """What the samples come to. `baseline`: idle means from earlier, for what has none of its own."""
    rows = list(sampler.rows)  # a thread that hangs in a reading may still add one
    at_s = [round(at - span.begin_s, 3) for at, _ in rows]
    names = dict.fromkeys(name for _, row in rows for name in row)
    series = {name: [_finite(row.get(name)) for _, row in rows] for name in names}
    idle = min(sampler.idle, len(rows))
    step = max(1, math.ceil(len(rows) / POINTS))
    return Watched(
        node=sampler.node,
        part=span.part,
        started_at=span.started_at,
        period_s=span.period_s,
        at_s=at_s[step - 1 :: step],
        series={name: thinned(values, step) for name, values in series.items()},
        summaries={
            name: summary_of(values[idle:], values[:idle] or [(baseline or {}).get(name)])
            for name, values in series.items()
        },
        sampler=SamplerCost(
            cpu_s=round(sampler.cpu_s, 6),
            wall_s=round(_wall_s(sampler, span, rows), 3),
            samples=len(rows),
            gaps=sampler.gaps,
        ),
        samples_per_point=step,
        facts={**facts, **({"trouble": sampler.trouble} if sampler.trouble else {})},
    )


def _wall_s(sampler: Sampler, span: Span, rows: Sequence[tuple[float, Row]]) -> float:
    """From when it was primed to its last reading: one that was taken once, at the end, has a cost, too."""
    if sampler.began_s is None:
        return 0.0
    return max(0.0, max([span.end_s, *(at for at, _ in rows[-1:])]) - sampler.began_s)


def summary_of(load: Sequence[float | None], idle: Sequence[float | None]) -> SeriesSummary:
    there, before = [value for value in load if value is not None], [value for value in idle if value is not None]
    base = mean(before) if before else None
    if not there:
        return SeriesSummary(0, len(load), idle=_short(base))
    middle = mean(there)
    return SeriesSummary(
        n=len(there),
        missing=len(load) - len(there),
        mean=_short(middle),
        maximum=_short(max(there)),
        p95=_short(percentile(there, 0.95)),
        idle=_short(base),
        above_idle=None if base is None else _short(middle - base),
    )


def thinned(values: Sequence[float | None], step: int) -> list[float | None]:
    """Means of `step` values each, without those that are missing; a rest shorter than that is left out."""
    if step == 1:
        return [_short(value) for value in values]
    points: list[float | None] = []
    for start in range(0, len(values) - step + 1, step):
        there = [value for value in values[start : start + step] if value is not None]
        points.append(_short(mean(there)) if there else None)
    return points


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _short(value: float | None) -> float | None:
    """Six digits: no sensor has more, and a record is read by people, too."""
    return None if value is None else float(f"{value:.6g}")
