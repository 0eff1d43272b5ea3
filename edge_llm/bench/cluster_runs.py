"""`edge-llm bench cluster`: models under placements, one after another, each with speed, cost and accuracy.

Owns the order of things: the board at rest, then for each model a first load (whether it can be, and how fast it
samples), each placement with its requests, and accuracy at the end. Refuses to know how clusters are started
(`Placement.launch`), what figures mean (edge_table.py) and llama.cpp (child processes).

Rules: requests come one after another, the same for all placements of a model. A model that cannot be loaded, a
placement that cannot be started or answers nothing is a failure of the run, and the next one follows. Boards are
sampled during the requests that count only; idle is what they were before the first cluster was started here, or, where
one runs already, before its first request. A row is there as soon as its placement is measured, and where it is
interrupted as far as it came: with the requests that were answered, and how many there were to be.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import msgspec

from edge_llm.bench.accuracy import measure as scoring
from edge_llm.bench.accuracy.figures import figures as accuracy_figures
from edge_llm.bench.accuracy.table import sentences_of
from edge_llm.bench.edge_board import GATEWAY, Board, board_of
from edge_llm.bench.edge_table import ClusterFigures, Row, Trial, rows_of, samples_of
from edge_llm.bench.edge_table_text import DEFINITIONS, sentences
from edge_llm.bench.engine import BenchModel
from edge_llm.bench.layout import LocalProcess, Started
from edge_llm.bench.least_busy import LeastBusy
from edge_llm.bench.node_metrics import values_of
from edge_llm.bench.processes import MeasureFailed, Measurer
from edge_llm.bench.record import ModelFacts, Process
from edge_llm.bench.resources import LOCAL
from edge_llm.bench.run import Run
from edge_llm.bench.serve.answers import UNFINISHED, Answer, Call
from edge_llm.bench.serve.driver import circulate, sending
from edge_llm.bench.serve.experiment import case_of
from edge_llm.bench.serve.lengths import Lengths
from edge_llm.bench.serve.prompts import Options, body
from edge_llm.bench.serve.target import Target, look
from edge_llm.bench.serve.workloads import Request, drawn
from edge_llm.errors import EdgeLLMError
from edge_llm.machine import peak_memory_bytes, process_usage

MEASURE: Final = "edge_llm.engine.measure"
IDLE: Final = "idle"
_DEFAULT_CONTEXT: Final = 4096
_PROMPT, _ANSWER = Lengths("fixed", 128), Lengths("fixed", 64)
_DRAWS: Final = 30
_SAMPLER_S: Final = 120.0
_METRICS_S: Final = 5.0
_ROUND: Final = 6
_SAID_EVERY_S: Final = 5.0
# What a worker counts of each phase: tokens, and seconds of its engine.
_PHASES: Final = {
    "prompt": ("edge_llm_prompt_tokens_total", "edge_llm_prompt_seconds_total"),
    "generation": ("edge_llm_generation_tokens_total", "edge_llm_decode_seconds_total"),
}
Counts = Mapping[str, tuple[float, float]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Placement:
    """A way to use nodes. `mode`: what every request says of it. `launch`: the cluster, for a block. `nodes`: workers
    on boards of their own, by name the URL of their /metrics. `headers`: for the server that is asked, nobody else."""

    name: str
    mode: str
    launch: Callable[[], AbstractAsyncContextManager[Started]]
    nodes: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to measure. `file`: None where nothing but its server is known. `is_here`: its workers run on this board,
    so this board says whether it can be loaded, and how fast it samples."""

    name: str
    placements: tuple[Placement, ...]
    file: BenchModel | None = None
    is_here: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """`requests` that count for each placement, after `warm_up`. `accuracy`: None to measure none."""

    requests: int = 10
    prompt: Lengths = _PROMPT
    answer: Lengths = _ANSWER
    warm_up: int = 1
    timeout_s: float = 600.0
    seed: int = 0
    policy: str = "exact"
    accuracy: scoring.Plan | None = None


@dataclass(frozen=True, slots=True)
class Children:
    """Processes that load a model: `engine` draws samples (edge_llm/engine/measure.py), `scorer` scores texts.
    `scratch`: a folder for what scoring lays down."""

    engine: scoring.Start
    scorer: scoring.Start
    scratch: Path

    @classmethod
    def of(cls, plan: Plan, scratch: Path) -> Children:
        """Real ones."""

        def engine(model: BenchModel) -> Measurer:
            arguments = ["--model", str(model.path), "--n-ctx", "256", "--slots", "1", "--policy", plan.policy]
            return Measurer(f"engine {model.facts.name}", MEASURE, arguments, ())

        return cls(engine, scoring.scorer(plan.accuracy or scoring.Plan(())), scratch)


@dataclass(slots=True)
class Found:
    """What is known so far."""

    run: Run
    trials: list[Trial] = field(default_factory=list)
    scores: scoring.Measured = field(init=False)

    def __post_init__(self) -> None:
        self.scores = scoring.Measured(self.run)

    def figures(self) -> ClusterFigures:
        rows = [row for trial in self.trials for row in self._rows(trial)]
        board = self.run.before.board or self.run.before.cpu
        models = accuracy_figures(self.scores.cases)["models"]
        own = sentences_of(dict.fromkeys(task for tasks in models.values() for task in tasks))
        said = [*sentences(rows, board), *own]
        return ClusterFigures(definitions=dict(DEFINITIONS), rows=rows, models=models, sentences=said)

    def _rows(self, trial: Trial) -> list[Row]:
        return rows_of(trial, [case for case in self.scores.cases if case["model"] == trial.model.name])

    def add(self, trial: Trial) -> None:
        self.trials.append(trial)
        for row in rows_of(trial):
            self.run.case({"case": f"{_label(trial.model, trial.placement)}: row", **msgspec.to_builtins(row)})

    def knows(self, model: ModelFacts | None = None) -> None:
        """Models of this run, each once: whoever measures one adds it."""
        kept: dict[str, ModelFacts] = {}
        for one in (*self.run.models, *((model,) if model is not None else ())):
            kept.setdefault(one.sha256 or one.name, one)
        self.run.models[:] = kept.values()


def measure(plan: Plan, subjects: Sequence[Subject], children: Children, found: Found, progress: Progress) -> None:
    """Fills `found` as it goes."""
    nodes = {name: url for one in subjects for placement in one.placements for name, url in placement.nodes.items()}
    progress("boards at rest", 0, 0)
    with found.run.watching({}, nodes=nodes, part=IDLE):
        pass
    for subject in subjects:
        try:
            _subject(plan, subject, children, found, progress)
        except (EdgeLLMError, OSError) as error:
            found.run.fail(subject.name, str(error))


def _subject(plan: Plan, subject: Subject, children: Children, found: Found, progress: Progress) -> None:
    sampling: Mapping[str, float] = {}
    if subject.file is not None:
        found.knows(subject.file.facts)
        if subject.is_here:
            progress(f"{subject.name}: a first load", 0, 0)
            sampling = _sampling(plan, subject.file, children, found)
    measured = 0
    for placement in subject.placements:
        try:
            asyncio.run(_trial(plan, subject, placement, sampling, found, progress))
            measured += 1
        except (EdgeLLMError, OSError) as error:
            found.run.fail(f"{subject.name}, {placement.name}", str(error))
    if plan.accuracy is not None and subject.file is not None and measured:
        files, scratch = [subject.file], children.scratch
        try:
            scoring.measure(plan.accuracy, files, None, children.scorer, found.scores, progress, scratch)
        finally:
            found.knows()
        _count_failed(subject.name, found)


def _count_failed(model: str, found: Found) -> None:
    """Items that failed are in the figures of their task; the record says why the first of each task did."""
    seen: dict[str, list[str]] = {}
    for case in found.scores.cases:
        if case["model"] == model and "failed" in case:
            seen.setdefault(case["task"], []).append(f"{case['item']}: {case['failed']}")
    for task, why in seen.items():
        found.run.fail(f"{task} of {model}", f"{len(why)} items failed, the first: {why[0]}")


def _sampling(plan: Plan, file: BenchModel, children: Children, found: Found) -> dict[str, float]:
    """Draws per second by setting. Raises MeasureFailed when the model cannot be loaded."""
    with children.engine(file) as child:
        found.run.engine(f"edge_llm on {file.facts.name}", child.facts.get("build", {}) | {"policy": plan.policy})
        answer = child.ask("sampler", _SAMPLER_S, vocab_size=child.facts["vocab_size"], repeats=_DRAWS)
    seconds = {setting: answer.get(f"{setting}_s") for setting in ("greedy", "full")}
    return {setting: 1 / took_s for setting, took_s in seconds.items() if took_s}


# -- one placement


async def _trial(
    plan: Plan,
    subject: Subject,
    placement: Placement,
    sampling: Mapping[str, float],
    found: Found,
    progress: Progress,
) -> None:
    """Raises MeasureFailed when no request was answered."""
    progress(f"{subject.name}, {placement.name}: starting", 0, 0)
    async with placement.launch() as started, sending(placement.headers) as session:
        model, target = await _learnt(plan, subject, placement, started, session)
        found.knows(model)
        label, at_rest = _label(model, placement.name), _at_rest(started)
        await _warmed_up(plan, target, session, label, progress)
        workers = [process for process in started.processes if process.name != GATEWAY]
        metrics = _metrics(started, workers, placement)
        before, parts = await _counted(metrics), len(found.run.resources)
        answers: list[Answer] = []
        after, is_whole = None, False
        try:
            pids = {one.name: one.pid for one in started.processes}
            with found.run.watching(pids, nodes=placement.nodes, part=label):
                await _asked(plan, target, session, label, found, progress, answers)
            after = await _counted(metrics)
            is_whole = True
        finally:
            used = {process.name: _used(process, *at_rest[process.name]) for process in started.processes}
            for name, process in used.items():
                found.run.used(msgspec.structs.replace(process, name=f"{label}: {name}"))
            if _has_samples(label, answers, found.run):
                found.add(
                    Trial(
                        model=model,
                        placement=placement.name,
                        answers=tuple(answers),
                        boards=_boards(found.run, parts, placement, used if workers else None),
                        load_s=max((one.ready_s for one in workers if one.ready_s is not None), default=None),
                        sampling=sampling,
                        engine=rates_of(before, after),
                        planned=None if is_whole else plan.requests,
                    )
                )


def _label(model: ModelFacts, placement: str) -> str:
    return f"{model.name}, {placement}"


async def _learnt(
    plan: Plan, subject: Subject, placement: Placement, started: Started, session: aiohttp.ClientSession
) -> tuple[ModelFacts, Target]:
    """What is served there. Raises MeasureFailed when that is another file than the one that is at hand."""
    options = Options(
        model="" if subject.file is None else subject.file.facts.name,
        extra={"cache_prompt": False, "edge_llm": {"mode": placement.mode}},
    )
    target, trouble = await look(session, subject.name, (started.url,), options, "auto", None, plan.timeout_s)
    if trouble is not None:
        raise trouble
    if subject.file is None:
        return target.model, target
    theirs, ours = target.model.sha256, subject.file.facts.sha256
    if theirs and ours and theirs != ours:
        raise MeasureFailed(
            f"{started.url} serves another file of the name {target.model.name} (sha256 {theirs[:12]}) than the one "
            f"here ({ours[:12]}): its accuracy would be another model's"
        )
    return subject.file.facts, target


async def _warmed_up(
    plan: Plan, target: Target, session: aiohttp.ClientSession, label: str, progress: Progress
) -> None:
    progress(f"{label}: warming up", 0, plan.warm_up)
    calls = _calls(plan, target, "warm-up", plan.warm_up)
    servers = LeastBusy(target.urls)
    await circulate(calls, 1, session, servers, path=target.options.path, timeout_s=plan.timeout_s)


async def _asked(
    plan: Plan,
    target: Target,
    session: aiohttp.ClientSession,
    label: str,
    found: Found,
    progress: Progress,
    answers: list[Answer],
) -> None:
    """Fills `answers` with what ends. Raises MeasureFailed when no request was answered."""
    began_at = round(time.time(), _ROUND)
    say = Counted(label, plan.requests, progress)

    def keep(answer: Answer) -> None:
        found.run.case({"case": label, "began_at_s": began_at, **case_of(answer)})
        if answer.kind != UNFINISHED:
            answers.append(answer)
            say(len(answers))

    say(0)
    await circulate(
        _calls(plan, target, "requests", plan.requests),
        1,
        session,
        LeastBusy(target.urls),
        path=target.options.path,
        on_end=keep,
        timeout_s=plan.timeout_s,
    )
    if not any(answer.is_complete for answer in answers):
        why = next((answer.error for answer in answers if answer.error), "answers had too few tokens")
        raise MeasureFailed(f"none of {len(answers)} requests was answered: {why}")


@dataclass(slots=True)
class Counted:
    """Says how many requests of a row are over, the first ones, the last ones, and in between every few seconds: hours
    of a slow board need a count, and a log no line for each request. The count is in the name of the work, since
    progress that is no terminal says only fifths of it."""

    label: str
    total: int
    progress: Progress
    clock: Callable[[], float] = time.monotonic
    _said_s: float | None = None

    def __call__(self, done: int) -> None:
        now_s = self.clock()
        if self._said_s is None or done >= self.total or now_s - self._said_s >= _SAID_EVERY_S:
            self._said_s = now_s
            self.progress(f"{self.label}: {done} of {self.total}", 0, 0)


def _has_samples(label: str, answers: Sequence[Answer], run: Run) -> bool:
    """Whether anything was answered; what was is in the record's samples then."""
    done = [answer for answer in answers if answer.is_complete]
    for name, values in samples_of(done).items():
        for value in values:
            run.add(f"{label}: {name}", round(value, _ROUND))
    return bool(done)


def _calls(plan: Plan, target: Target, what: str, count: int) -> list[Call]:
    """The same for all placements of a model."""
    workload = drawn(what, plan.prompt, plan.answer, target.n_ctx or _DEFAULT_CONTEXT, plan.seed)
    return [_call(request, target, f"{plan.seed}/{what}") for request in workload.requests[:count]]


def _call(request: Request, target: Target, seed: str) -> Call:
    sent = body(request, target.style, target.options, seed)
    return Call(0.0, sent, request.answer_tokens, number=request.number, prompt_tokens=request.prompt_tokens)


def _boards(run: Run, parts: int, placement: Placement, used: Mapping[str, Process] | None) -> tuple[Board, ...]:
    """What was sampled since there were `parts` of it. This board is one of them where workers run on it."""
    at_rest = {one.node: one.summaries for one in reversed(run.resources)}  # the first time that a node was sampled
    boards = []
    for watched in run.resources[parts:]:
        if watched.node == LOCAL:
            if used is not None:
                boards.append(board_of(watched, used))
        elif watched.node in placement.nodes:
            boards.append(board_of(watched, at_rest=at_rest[watched.node]))
    return tuple(boards)


# -- processes and counters


def _at_rest(started: Started) -> dict[str, tuple[float, float, int]]:
    """When, CPU seconds and memory of each process when it was ready."""
    now_s = time.monotonic()
    usages = {process.name: process_usage(process.pid) for process in started.processes}
    return {name: (now_s, one.cpu_s, one.rss_bytes) if one else (now_s, 0.0, 0) for name, one in usages.items()}


def _used(process: LocalProcess, began_s: float, cpu_s: float, rss_bytes: int) -> Process:
    """Since it was ready. Of one that is gone, nothing more than was known."""
    usage, wall_s = process_usage(process.pid), time.monotonic() - began_s
    if usage is None:
        return Process(process.name, process.cores, wall_s, 0.0, rss_bytes, rss_bytes, rss_bytes, readings=1)
    peak = peak_memory_bytes(process.pid) or usage.rss_bytes
    spent_s = max(0.0, usage.cpu_s - cpu_s)
    return Process(process.name, process.cores, wall_s, spent_s, rss_bytes, usage.rss_bytes, peak, readings=2)


def _metrics(started: Started, workers: Sequence[LocalProcess], placement: Placement) -> list[str]:
    """Where the workers that take part count."""
    host = urlsplit(started.url).hostname
    return [f"http://{host}:{one.port}/metrics" for one in workers if one.port] or list(placement.nodes.values())


async def _counted(urls: Sequence[str]) -> Counts | None:
    """Tokens and seconds of each phase so far, of all workers; None where one of them does not say. Without the key of
    the server that is asked: workers have none of it."""
    totals = {phase: (0.0, 0.0) for phase in _PHASES}
    timeout = aiohttp.ClientTimeout(total=_METRICS_S)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session:
            for url in urls:
                async with session.get(url) as reply:
                    if reply.status != 200:
                        return None
                    values = values_of(await reply.text())
                for phase, names in _PHASES.items():  # a counter that nothing was added to yet is not there
                    tokens, seconds = (values.get((name, ""), 0.0) for name in names)
                    totals[phase] = (totals[phase][0] + tokens, totals[phase][1] + seconds)
    except (aiohttp.ClientError, OSError, ValueError):
        return None
    return totals if urls else None


def rates_of(before: Counts | None, after: Counts | None) -> dict[str, float]:
    """Tokens per second of each phase's own seconds, between two readings; nothing of a worker that began again."""
    if before is None or after is None:
        return {}
    grown = {phase: (after[phase][0] - before[phase][0], after[phase][1] - before[phase][1]) for phase in _PHASES}
    return {phase: tokens / seconds for phase, (tokens, seconds) in grown.items() if tokens > 0 and seconds > 0}


def facts_of(plan: Plan, subjects: Sequence[Subject]) -> dict[str, Any]:
    """What is asked of whom, for the record."""
    return {
        "requests": plan.requests,
        "prompt_tokens": str(plan.prompt),
        "answer_tokens": str(plan.answer),
        "warm_up": plan.warm_up,
        "seed": plan.seed,
        "placements": list(dict.fromkeys(placement.name for one in subjects for placement in one.placements)),
    }
