"""What a run of `edge-llm bench serve` has measured so far, and the figures that follow from it.

Owns the tally (who was asked under which load, and all answers), the shape of the figures (msgspec structs: their JSON
schema is published), goodput and the scale of limits, and the sentences about them. Refuses to know how it was
measured.
What was interrupted counts with what had ended by then, and is marked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from edge_llm.bench.goodput import GOALS, Limits, Point, goodput, interval
from edge_llm.bench.serve.answers import UNFINISHED, Answer
from edge_llm.bench.serve.metrics import DEFINITIONS, Figures, Spread, figures, spread
from edge_llm.bench.serve.ratios import RatioFigure, ratios, words
from edge_llm.bench.serve.schedule import Load
from edge_llm.bench.serve.slowdown import Slowdown, alone_of, slowdown

# Fewer requests at a rate say nothing about such a share: where all or none keep the limits, so do all draws of the
# bootstrap, and its interval is a point.
_LEAST_REQUESTS: Final[Mapping[float, int]] = {0.90: 30, 0.99: 100}
# Servers withhold half a character now and then: that is not yet a stream in lumps.
_TOKENS_PER_EVENT: Final = 1.5
_MUCH_KEPT: Final = 0.05


@dataclass(slots=True)
class Replayed:
    """One pass of one load. `answers` fills while it runs; `is_done`: it ran to its end."""

    contender: str
    load: Load
    scale: float | None
    number: int
    answers: list[Answer] = field(default_factory=list)
    is_done: bool = False

    @property
    def counted(self) -> list[Answer]:
        """By time. Of a pass that was interrupted, what had ended."""
        kept = [answer for answer in self.answers if self.is_done or answer.kind != UNFINISHED]
        return sorted(kept, key=lambda answer: answer.at_s)


@dataclass(slots=True)
class Tally:
    """What is known so far. `servers`: facts by contender. `nodes`: how many a contender has, None: nobody said, and
    there is no figure per node; `own_nodes`: by contender, of those for whom it is another number."""

    limits: Limits | None = None
    scales: tuple[float, ...] = ()
    nodes: int | None = None
    workload: dict[str, Any] = field(default_factory=dict)
    servers: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    alone: dict[str, list[Answer]] = field(default_factory=dict)
    wants_slowdown: bool = False
    replays: list[Replayed] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    own_nodes: Mapping[str, int] = field(default_factory=dict)

    def begin(self, contender: str, load: Load, scale: float | None, number: int) -> Replayed:
        self.replays.append(Replayed(contender, load, scale, number))
        return self.replays[-1]

    def points(self, contender: str, scale: float | None = None) -> list[Point]:
        """Rates of an open loop, and which requests kept the limits there. Passes that were interrupted are left out:
        what had ended by then are the quick ones."""
        if self.limits is None:
            return []
        limits = scaled(self.limits, scale or 1.0)
        found = []
        for (load, at), passes in self._by_load(contender):
            met = [answer.timing.meets(limits) for one in passes if one.is_done for answer in one.counted]
            if met and load.is_open and load.rate_per_s is not None and at == scale:
                found.append(Point(load.rate_per_s, tuple(met)))
        return found

    def without_modes(self) -> dict[str, str]:
        """Contenders that are a mode of our gateway, and of whose answers none says how it came to be: a comparison of
        them would be one of a server with itself."""
        asked = {name: facts.get("extra", {}).get("edge_llm", {}).get("mode") for name, facts in self.servers.items()}
        found = {}
        for name, mode in asked.items():
            done = [answer for one in self.replays if one.contender == name for answer in one.counted]
            done = [answer for answer in done if answer.is_complete]
            if mode and done and not any(answer.own.get("mode") for answer in done):
                found[name] = (
                    f"asked for mode {mode}, and no answer named its mode: this server does not know modes, rows of "
                    "several modes are the same thing"
                )
        return found

    def _by_load(self, contender: str) -> list[tuple[tuple[Load, float | None], list[Replayed]]]:
        found: dict[tuple[Load, float | None], list[Replayed]] = {}
        for replayed in self.replays:
            if replayed.contender == contender:
                found.setdefault((replayed.load, replayed.scale), []).append(replayed)
        return list(found.items())

    def found(self) -> ServeFigures:
        """Everything so far."""
        names = [name for name in self.servers if self._by_load(name) or name in self.alone]
        contenders = {name: self._of(name) for name in names}
        lines = [f"{name}: {why}" for name, why in self.without_modes().items()]
        lines += [line for name, one in contenders.items() for line in _sentences(name, one)]
        lines += [
            f"{name}: no slowdown, because no answer to a request alone came in more than one piece"
            for name in names
            if self.wants_slowdown and self.alone.get(name) and alone_of(self.alone[name]) is None
        ]
        beside = ratios({name: self.points(name) for name in names})
        lines += [f"{key} of {who}: {words(one)}" for who, goals in beside.items() for key, one in goals.items()]
        return ServeFigures(dict(DEFINITIONS), self.workload, contenders, [*lines, *self.notes], ratios=beside)

    def _of(self, name: str) -> ContenderFigures:
        alone = self.alone.get(name, [])
        measured = [self._point(name, load, scale, passes) for (load, scale), passes in self._by_load(name)]
        return ContenderFigures(
            server=dict(self.servers[name]),
            loads=measured,
            goodput=self._goodput(name),
            alone=_alone(alone) if alone else None,
        )

    def _point(self, name: str, load: Load, scale: float | None, passes: Sequence[Replayed]) -> LoadFigures:
        counted = [one.counted for one in passes]
        limits = None if self.limits is None else scaled(self.limits, scale or 1.0)
        answers = [answer for one in counted for answer in one]
        alone = alone_of(self.alone.get(name, [])) if self.wants_slowdown else None
        return LoadFigures(
            label=load.label if scale is None else f"{load.label}, limits times {scale:g}",
            profile=load.profile,
            rate_per_s=load.rate_per_s,
            clients=load.clients,
            passes=len(passes),
            is_whole=all(one.is_done for one in passes),
            figures=figures(counted, load.is_open, limits),
            slo_scales=self._scales(answers) if scale is None else None,
            slowdown=slowdown(answers, alone, len(self.alone[name])) if alone is not None else None,
        )

    def _scales(self, answers: Sequence[Answer]) -> ScaleFigures | None:
        """Of servers that were not told their limits: one replay serves all scales."""
        if self.limits is None or not self.scales or not answers:
            return None
        attained = {
            scale: sum(answer.timing.meets(scaled(self.limits, scale)) for answer in answers) / len(answers)
            for scale in sorted(self.scales)
        }
        tightest = {
            f"tightest_{100 * goal:.0f}": next((scale for scale, share in attained.items() if share >= goal), None)
            for goal in GOALS
        }
        return ScaleFigures({f"{scale:g}": share for scale, share in attained.items()}, tightest)

    def _goodput(self, name: str) -> dict[str, GoodputFigure]:
        points = self.points(name)
        if len({point.rate_per_s for point in points}) < 2:
            return {}
        found, nodes = {}, self.own_nodes.get(name, self.nodes)
        for goal in GOALS:
            at = goodput(points, goal)
            low, high = interval(points, goal)
            found[f"goodput_{100 * goal:.0f}"] = GoodputFigure(
                goal=goal,
                per_s=at.rate_per_s,
                per_node_per_s=None if nodes is None else at.rate_per_s / nodes,
                low=low,
                high=high,
                bound=at.bound,
                requests_per_rate=min(len(point.met) for point in points),
            )
        return found


def scaled(limits: Limits, factor: float) -> Limits:
    """DistServe's SLO scale: both limits times one factor."""
    return Limits(limits.ttft_s * factor, limits.tpot_s * factor)


# -- the figures


class GoodputFigure(msgspec.Struct, frozen=True, kw_only=True):
    """The highest rate with such an attainment. `bound` at_most: the lowest rate measured was too high already;
    at_least: the highest was not yet. `low`, `high`: 95 % bootstrap interval over requests. `per_node_per_s` None: how
    many nodes there are is not known."""

    goal: float
    per_s: float
    per_node_per_s: float | None
    low: float
    high: float
    bound: str
    requests_per_rate: int


class ScaleFigures(msgspec.Struct, frozen=True):
    """Attainment by the factor that both limits are multiplied by, and the tightest factor that is still attained."""

    attainment: dict[str, float]
    tightest: dict[str, float | None]


class AloneFigures(msgspec.Struct, frozen=True):
    """Requests sent one after another to an idle server."""

    requests: int
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    e2el_ms: Spread | None


class LoadFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One load. `is_whole`: no pass of it was interrupted."""

    label: str
    profile: str
    rate_per_s: float | None
    clients: int | None
    passes: int
    is_whole: bool
    figures: Figures
    slo_scales: ScaleFigures | None = None
    slowdown: Slowdown | None = None


class ContenderFigures(msgspec.Struct, frozen=True, kw_only=True):
    server: dict[str, Any]
    loads: list[LoadFigures]
    goodput: dict[str, GoodputFigure]
    alone: AloneFigures | None = None


class ServeFigures(msgspec.Struct, frozen=True):
    """What `edge-llm bench serve --json` prints, and `figures` of its record. `ratios`: of goodputs, by "a over b" and
    goal."""

    definitions: dict[str, str]
    workload: dict[str, Any]
    contenders: dict[str, ContenderFigures]
    sentences: list[str]
    record: str | None = None
    ratios: dict[str, dict[str, RatioFigure]] = {}


def schema() -> dict[str, Any]:
    """JSON schema of what `edge-llm bench serve --json` prints."""
    return msgspec.json.schema(ServeFigures)


def _alone(answers: Sequence[Answer]) -> AloneFigures:
    done = [answer for answer in answers if answer.is_complete]
    return AloneFigures(
        requests=len(answers),
        ttft_ms=spread([1e3 * answer.ttft_s for answer in done if answer.ttft_s is not None]),
        tpot_ms=spread([1e3 * answer.tpot_s for answer in done if answer.tpot_s is not None]),
        e2el_ms=spread([1e3 * answer.e2e_s for answer in done if answer.e2e_s is not None]),
    )


def _sentences(name: str, one: ContenderFigures) -> Iterator[str]:
    """What must not be overlooked."""
    for load in one.loads:
        yield from (f"{name}, {load.label}: {line}" for line in _of_load(load))
    for key, found in one.goodput.items():
        if found.bound != "between":
            where = "lower than the lowest" if found.bound == "at_most" else "at least the highest"
            yield f"{name}: {key} is {where} rate that was measured, {found.per_s:.3g}/s"
    for found in one.goodput.values():
        if found.requests_per_rate < (least := _LEAST_REQUESTS[found.goal]):
            few = f"{found.requests_per_rate} requests at a rate are too few for {100 * found.goal:.0f} %"
            yield f"{name}: {few}: give --requests {least}"


def _of_load(load: LoadFigures) -> Iterator[str]:
    found = load.figures
    if not load.is_whole:
        yield "interrupted: what had ended by then is counted"
    if found.failed:
        kinds = ", ".join(f"{count} {kind}" for kind, count in found.failed.items())
        yield f"{sum(found.failed.values())} of {found.requests} requests failed: {kinds}"
    if found.cut_short:
        yield f"{found.cut_short} answers ended before they had all tokens that were asked for"
    if found.events and found.answer_tokens > _TOKENS_PER_EVENT * found.events:
        yield (
            f"{found.answer_tokens} answer tokens came in {found.events} events: tokens that come together have no "
            "time between them, so TPOT (and a limit of it) says little"
        )
    if found.reconnected:
        yield f"{found.reconnected} requests met a connection that the server had closed, and were sent again at once"
    if found.saturation is not None and found.saturation.is_saturated:
        yield f"over-saturated, its latencies depend on how long is measured: {found.saturation.why}"
    if found.generator is not None and found.generator.is_fault:
        yield f"this side was late ({found.generator.late_ms_p99:.1f} ms at p99): its own figure is in these"
    if found.cached_tokens and found.cached_tokens > _MUCH_KEPT * found.prompt_tokens:
        yield (
            f"{found.cached_tokens} of {found.prompt_tokens} prompt tokens were kept from earlier requests: "
            """--body '{"cache_prompt": false}' switches that off where a server knows it"""
        )
    if set(found.counted_by) - {"usage"}:
        yield "the server counts no tokens in `usage`: " + ", ".join(
            f"{count} answers by {how}" for how, count in found.counted_by.items()
        )
    if found.prompt_tokens_asked and abs(found.prompt_tokens / found.prompt_tokens_asked - 1) > 0.1:
        yield (
            f"prompts had {found.prompt_tokens} tokens as the server counts, {found.prompt_tokens_asked} were asked for"
        )
