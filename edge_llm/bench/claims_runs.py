"""The commands behind the claims, run one after another as children, and the record of what came of them.

Owns the children: their progress, their end at the budget's end or at Ctrl-C (they keep what they measured), and what
an interrupted run need not do again. Refuses to know what a claim is about (claims.py) and how verdicts are made.

Invariants: a child is never left behind; each finished step is a line beside the record at once; what a step measured
is in a record of its own, as if a user had typed its command.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from edge_llm.bench.cases import lines_of
from edge_llm.bench.claims import Claim
from edge_llm.bench.claims_judged import Evidence, Verdict, board_words, counts, judged
from edge_llm.bench.claims_plan import STEPS, Machine, Planned, fitted
from edge_llm.bench.record import BadRecord, ModelFacts, load, node_of, write
from edge_llm.bench.run import Run
from edge_llm.errors import ConfigError

INTERRUPTED: Final = 130
# Records are written, workers are stopped: a bench that was told to end may take so long.
_END_S: Final = 180.0
_TAIL_LINES: Final = 20
_DONE_OF: Final = re.compile(r"(.*): (\d+) of (\d+)( MiB)?")
# What edge-llm and click say before the reason.
_TOLD: Final = re.compile(r"^(?:edge-llm|Error): ")
_VERIFY: Final = "verify"
_CUT: Final = "cut off: the time of --budget-minutes was over"
_INTERRUPTED: Final = "interrupted"
Progress = Callable[[str, int, int], None]
PROGRAM: Final = (sys.executable, "-m", "edge_llm")


class StepRun(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a command. `measures`: which cluster, by its address or file; empty: one of this machine.
    `record`: the file it left. `error`: why it measured nothing, or not all."""

    step: str
    arguments: list[str]
    measures: str = ""
    exit_code: int | None = None
    took_s: float = 0.0
    record: str | None = None
    error: str = ""
    is_reused: bool = False


class ClaimsFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What `edge-llm bench claims --json` prints, `figures` of its record."""

    board: str
    counts: dict[str, int]
    claims: list[Verdict]
    steps: list[StepRun]
    record: str | None = None


def schema() -> dict[str, Any]:
    """JSON schema of what `edge-llm bench claims --json` prints."""
    return msgspec.json.schema(ClaimsFigures)


@dataclass(frozen=True, slots=True)
class Settings:
    """`where`: arguments of a step that say on which cluster it runs; `there`: that cluster, for people. `model_facts`:
    of the model, for what leaves no record of its own."""

    folder: Path
    machine: Machine
    model: str | None = None
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)
    there: str = ""
    model_facts: ModelFacts | None = None
    budget_minutes: float | None = None
    program: Sequence[str] = PROGRAM
    clock: Callable[[], float] = time.monotonic

    def measures(self, step: str) -> str:
        return self.there if step in self.where else ""


@dataclass(slots=True)
class Found:
    """What is known so far: steps in the order in which they were over, and why others were left out."""

    claims: Sequence[Claim]
    run: Run
    steps: list[StepRun] = field(default_factory=list)
    evidence: list[Evidence] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, done: StepRun, folder: Path) -> None:
        self.steps.append(done)
        if done.record is not None:
            record = load(folder / done.record)
            self.evidence.append(Evidence(done.record, record))
            self.run.models += [model for model in record.models if model not in self.run.models]
        self.run.case({"case": done.step, **{k: v for k, v in msgspec.to_builtins(done).items() if k != "step"}})
        if done.error:
            failed = "" if done.error in (_CUT, _INTERRUPTED) else f"`{STEPS[done.step].command_words}` failed: "
            self.reasons[done.step] = f"{failed}{done.error}"

    def figures(self) -> ClaimsFigures:
        verdicts = [judged(claim, self.evidence, self.reasons.get(claim.step, "")) for claim in self.claims]
        board = board_words(node_of(self.run.before, self.run.before))
        return ClaimsFigures(board=board, counts=counts(verdicts), claims=verdicts, steps=self.steps)


def measure(
    plan: Sequence[Planned], settings: Settings, known: Mapping[str, StepRun], found: Found, report: Progress
) -> None:
    """Run every planned step that is not `known` from an earlier run. Raises KeyboardInterrupt, with what was
    measured until then in `found`."""
    began_s, spent_s, planned_s = settings.clock(), 0.0, 0.0
    for number, wished in enumerate(plan, 1):
        left_s = None
        one = wished
        if settings.budget_minutes is not None:
            left_s = 60 * settings.budget_minutes - (settings.clock() - began_s)
            one = fitted(wished, plan[number:], left_s / 60, max(1.0, spent_s / planned_s) if planned_s else 1.0)
        if one.why_not:
            found.reasons[one.step.name] = one.why_not
            continue
        arguments, whole = (
            this.arguments(settings.machine, settings.model, settings.where) for this in (one, Planned(one.step))
        )
        earlier = known.get(one.step.name)
        if earlier is not None and tuple(earlier.arguments) in (arguments, whole):
            found.add(msgspec.structs.replace(earlier, is_reused=True), settings.folder)
            continue
        at_s = settings.clock()
        head = f"{number}/{len(plan)} {one.step.name}"
        measures = settings.measures(one.step.name)
        of = f" of {measures}" if measures else ""
        report(f"{head}{of}, about {one.minutes:g} minutes", 0, 0)
        if left_s is not None:  # one that takes far longer than planned must not use up the time of all others
            kept_s = 60 * sum(later.step.small_minutes for later in plan[number:] if not later.why_not)
            left_s = max(left_s - kept_s, min(left_s, 60 * one.minutes))
        _one(one, arguments, settings, found, left_s, _under(head, report))
        spent_s += settings.clock() - at_s
        planned_s += 60 * one.minutes


def _under(head: str, report: Progress) -> Progress:
    return lambda what, done, of: report(f"{head}: {what}", done, of)


def _one(
    one: Planned,
    arguments: Sequence[str],
    settings: Settings,
    found: Found,
    left_s: float | None,
    progress: Progress,
) -> None:
    """Run a step and keep what came of it. Ctrl-C is passed on after that."""
    name, began_s = one.step.name, settings.clock()
    makes_record = name != _VERIFY
    command = [*settings.program, *arguments, "--json"]
    command += ["--output", str(settings.folder)] if makes_record else []
    shadow = Run(name, ["edge-llm", *arguments, "--json"], {"model": settings.model}, idle_s=0.0)
    ended = _ended(command, left_s, lambda line: _relay(line, progress))
    answer = _answer(ended.output)
    record = None
    if makes_record and answer is not None and isinstance(answer.get("record"), str):
        record = Path(answer["record"]).name
    elif not makes_record and answer is not None:
        shadow.models += [settings.model_facts] if settings.model_facts else []
        record = write(shadow.record(answer, is_complete=True), settings.folder).name
    error = _error(ended, record) or _not_measured(settings.folder, record)
    if error and not ended.is_interrupted and not ended.is_cut and ended.exit_code != 3:
        found.run.fail(name, error)
    found.add(
        StepRun(
            step=name,
            arguments=list(arguments),
            measures=settings.measures(name),
            exit_code=ended.exit_code,
            took_s=round(settings.clock() - began_s, 1),
            record=record,
            error=error,
        ),
        settings.folder,
    )
    if ended.is_interrupted:
        raise KeyboardInterrupt


def _error(ended: _Ended, record: str | None) -> str:
    """Why it is not what was asked for; empty when it is. A bar that was missed (3) is."""
    if ended.is_cut:
        return _CUT
    if ended.is_interrupted:
        return _INTERRUPTED
    if record is not None and ended.exit_code in (0, 1, 3):
        return ""
    return next((_TOLD.sub("", line) for line in reversed(ended.last_lines) if line.strip()), "it said nothing")


def _not_measured(folder: Path, record: str | None) -> str:
    """What a bench says in its record that it could not measure: its first failure."""
    failures = load(folder / record).failures if record is not None else ()
    return f"{failures[0].what}: {failures[0].why}" if failures else ""


def _answer(output: bytes) -> dict[str, Any] | None:
    """What it printed with --json: the last line that is an object."""
    for line in reversed(output.splitlines()):
        with suppress(msgspec.DecodeError):
            found = msgspec.json.decode(line)
            if isinstance(found, dict):
                return found
    return None


def _relay(line: str, progress: Progress) -> None:
    """A child's sparse progress, as our own."""
    if match := _DONE_OF.fullmatch(line):
        progress(match[1], int(match[2]), int(match[3]))
    elif line.strip():
        progress(line.strip(), 0, 0)


# -- one child


@dataclass(frozen=True, slots=True)
class _Ended:
    exit_code: int
    output: bytes
    last_lines: Sequence[str]
    is_cut: bool
    is_interrupted: bool


def _ended(command: Sequence[str], deadline_s: float | None, on_line: Callable[[str], None]) -> _Ended:
    """Run it to its end. At the deadline and at Ctrl-C it is told to keep what it has; a second Ctrl-C kills it."""
    is_cut, is_interrupted = threading.Event(), False
    last: deque[str] = deque(maxlen=_TAIL_LINES)
    with tempfile.TemporaryFile() as output, _started(command, output) as child:

        def cut() -> None:
            is_cut.set()
            _tell(child)

        alarm = threading.Timer(deadline_s if deadline_s is not None else 0.0, cut)
        alarm.daemon = True
        if deadline_s is not None:
            alarm.start()
        try:
            while True:
                try:
                    _follow(child, last, on_line)
                    break
                except KeyboardInterrupt:
                    if is_interrupted:
                        raise
                    is_interrupted = True
                    _tell(child)
        finally:
            alarm.cancel()
        output.seek(0)
        return _Ended(child.returncode, output.read(), tuple(last), is_cut.is_set(), is_interrupted)


@contextmanager
def _started(command: Sequence[str], output: IO[bytes]) -> Iterator[subprocess.Popen[str]]:
    """In a session of its own, so that Ctrl-C reaches it through us only; gone with all that it started at the end."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if child.stderr is not None:
            child.stderr.close()


def _follow(child: subprocess.Popen[str], last: deque[str], on_line: Callable[[str], None]) -> None:
    assert child.stderr is not None
    for line in child.stderr:
        last.append(line.rstrip())
        on_line(line.rstrip())
    child.wait()


def _tell(child: subprocess.Popen[str]) -> None:
    """To end with what it has; killed when it does not."""
    with suppress(ProcessLookupError):
        child.send_signal(signal.SIGINT)
    late = threading.Timer(_END_S, child.kill)
    late.daemon = True
    late.start()


# -- what an interrupted run has


def finished(path: Path, run: Run, folder: Path) -> dict[str, StepRun]:
    """Steps of an earlier run that need not be run again: their records are whole, and of this machine. Raises
    ConfigError, BadCases."""
    if path.parent.resolve() != folder.resolve():
        raise ConfigError(f"{path.name} is not in the folder of --output: say --output {path.parent}")
    try:
        lines = list(lines_of(path.read_bytes(), path.name))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    steps = [line for line in lines if {"case", "arguments", "record", "exit_code"} <= line.keys()]
    if not steps:
        raise ConfigError(f"{path} has no finished step of `bench claims`: give the .cases.jsonl beside its record")
    known: dict[str, StepRun] = {}
    for line in steps:
        try:
            done = msgspec.convert({**line, "step": line["case"]}, StepRun, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{path} was not written by `bench claims`: {error}") from None
        if done.record is not None and _is_whole(path.parent / done.record, run):
            known[done.step] = done
    return known


def _is_whole(path: Path, run: Run) -> bool:
    """Raises ConfigError for a record of another machine."""
    try:
        record = load(path)
    except (BadRecord, OSError):
        return False
    if not record.is_complete or record.failures:
        return False
    node, here = record.nodes[0], run.before
    if (node.cpu, node.cores) != (here.cpu, here.cores):
        raise ConfigError(f"{path.name} was measured on another machine ({node.cpu}): a run is of one machine")
    if record.source.commit != run.source.commit:
        run.notes.append(f"{path.name} was measured by commit {record.source.commit}")
    return True
