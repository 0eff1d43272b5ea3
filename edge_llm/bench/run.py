"""One run while it happens: samples, failures and processes gather here; at the end they are a record.

Owns the mutable part between start and record, so that a run that is interrupted or fails half way still leaves what
it measured. Refuses to know what the samples mean.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any, Final

import msgspec

import edge_llm
from edge_llm.bench.cases import CaseLog, Cases, with_name
from edge_llm.bench.record import (
    SCHEMA_VERSION,
    EngineBuild,
    Failure,
    ModelFacts,
    Process,
    Record,
    Source,
    cleaned,
    new_run_id,
    node_of,
    read_source,
    statistics_of,
    stem_of,
    try_folder,
    write,
)
from edge_llm.bench.resources import Watch, Watched, baselines
from edge_llm.bench.stats import median, summary
from edge_llm.board import board_facts
from edge_llm.machine import NodeFacts, node_facts

WHY_CHARS: Final = 2000
CUT_OFF: Final = "this run did not come to its end: what it finished is in its lines"


@dataclass(slots=True)
class Run:
    """What is known so far. Build it when the run starts: the board is read then. Raises ConfigError when no record can
    be written to `folder`.

    `folder`: where its lines are kept while it runs (`case`); without one they are in `cases`. `idle_s`: how long the
    board is watched before the first load, which is what loads are above.
    """

    kind: str
    command: list[str]
    config: dict[str, Any]
    folder: Path | None = None
    idle_s: float = 3.0
    workload: dict[str, Any] = field(default_factory=dict)
    run_id: str = field(default_factory=new_run_id)
    source: Source = field(default_factory=read_source)
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    before: NodeFacts = field(default_factory=node_facts)
    models: list[ModelFacts] = field(default_factory=list)
    engines: list[EngineBuild] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    resources: list[Watched] = field(default_factory=list)
    _log: CaseLog | None = None
    _beginning: Thread | None = None

    def __post_init__(self) -> None:
        if self.folder is not None:
            try_folder(self.folder)

    def add(self, name: str, value: float) -> None:
        self.samples.setdefault(name, []).append(value)

    def median(self, name: str) -> float | None:
        """Median of the samples so far, None without any."""
        samples = self.samples.get(name)
        return median(samples) if samples else None

    def fail(self, what: str, why: str) -> None:
        """Note it. A server's message may be a page: a record keeps its beginning."""
        self.failures.append(Failure(what, why if len(why) <= WHY_CHARS else f"{why[:WHY_CHARS]} ..."))

    def case(self, facts: Mapping[str, Any]) -> None:
        """Keep what was just finished, as one line, at once: whatever happens later, it is there. `facts["case"]` is
        its name (default: this run's kind). Add the model first: the file is named by it, as the record is."""
        if self._log is None:
            self._log = CaseLog(self.folder, stem_of(self.started_at, self.kind, self.models), self.run_id)
            self._begin()
        line = msgspec.to_builtins(with_name(facts, self.kind, datetime.now(UTC)), enc_hook=str)
        self._log.add(cleaned(line))

    def _begin(self) -> None:
        """The record so far, beside the lines: without it nobody could read them after a power cut. In a thread: a
        card that is slow must not hold up what is measured. The whole record takes its place."""
        assert self._log is not None
        if self.folder is not None and (cases := self._log.begun()) is not None:
            record = self._record({}, is_complete=False, cases=cases, notes=[*self.notes, CUT_OFF])
            settled = msgspec.convert(msgspec.to_builtins(record), Record)  # what it was made of goes on changing
            self._beginning = Thread(target=_written, args=(settled, self.folder))
            self._beginning.start()

    @contextmanager
    def one_case(self, name: str, **facts: object) -> Iterator[None]:
        """A case whose figures are the samples that are added meanwhile. One that fails is a line, too, with the
        reason; one that is interrupted is none."""
        before, began_s = {known: len(values) for known, values in self.samples.items()}, time.monotonic()

        def over(**more: object) -> None:
            added = {known: values[before.get(known, 0) :] for known, values in self.samples.items()}
            samples = {known: values for known, values in added.items() if values}
            self.case(
                {"case": name, **facts, "took_s": round(time.monotonic() - began_s, 6), "samples": samples, **more}
            )

        try:
            yield
        except Exception as error:
            over(error=str(error) or type(error).__name__)
            raise
        over()

    @property
    def cases(self) -> list[dict[str, Any]]:
        """The lines that are in no file."""
        return self._log.kept if self._log else []

    @contextmanager
    def watching(
        self,
        processes: Mapping[str, int],
        period_s: float = 1.0,
        nodes: Mapping[str, str] | None = None,
        part: str = "run",
    ) -> Iterator[Watch]:
        """Sample this board and these processes (name: id) meanwhile, and other boards by their workers' /metrics
        (`nodes`, name: URL). `part`: of the run, when there are several. Enter before the load: `idle_s` go by here,
        the first time in a run. Raises CannotWatch, NoNode."""
        watch = Watch(processes, period_s, nodes or {}, part, baselines(self.resources))
        try:
            with watch.running(0.0 if self.resources else self.idle_s):
                yield watch
        finally:
            self.resources += watch.watched()

    def used(self, process: Process | None) -> None:
        """Count a process; runs of the same tool on the same cores become one line."""
        if process is None:
            return
        for index, known in enumerate(self.processes):
            if (known.name, known.cores) == (process.name, process.cores):
                self.processes[index] = _together(known, process)
                return
        self.processes.append(process)

    def engine(self, name: str, facts: Mapping[str, str]) -> None:
        build = EngineBuild(name, dict(facts))
        if build not in self.engines:
            self.engines.append(build)

    def record(self, figures: dict[str, Any], is_complete: bool) -> Record:
        """Everything so far. `figures` is what is printed."""
        cases = None
        if self._log is not None:
            if self._beginning is not None:
                self._beginning.join()
            cases = self._log.facts()
            if self._log.trouble:
                self.fail("cases", self._log.trouble)
        return self._record(figures, is_complete, cases, self.notes)

    def _record(self, figures: dict[str, Any], is_complete: bool, cases: Cases | None, notes: list[str]) -> Record:
        return Record(
            schema_version=SCHEMA_VERSION,
            run_id=self.run_id,
            kind=self.kind,
            is_complete=is_complete,
            started_at=self.started_at,
            finished_at=datetime.now(UTC),
            tool_version=edge_llm.__version__,
            command=self.command,
            config=self.config,
            source=self.source,
            models=self.models,
            engines=self.engines,
            nodes=[node_of(self.before, node_facts(), board_facts(self.folder or Path()))],
            processes=self.processes,
            figures=figures,
            samples=self.samples,
            statistics=statistics_of({name: summary(values) for name, values in self.samples.items() if values}),
            failures=self.failures,
            notes=notes,
            workload=self.workload,
            resources=self.resources,
            cases=cases,
        )


def _written(record: Record, folder: Path) -> None:
    with suppress(OSError):  # the lines that fail for the same reason say so
        write(record, folder)


def _together(one: Process, other: Process) -> Process:
    return Process(
        name=one.name,
        cores=one.cores,
        wall_s=one.wall_s + other.wall_s,
        cpu_s=one.cpu_s + other.cpu_s,
        rss_before_bytes=one.rss_before_bytes,
        rss_after_bytes=other.rss_after_bytes,
        rss_peak_bytes=max(one.rss_peak_bytes, other.rss_peak_bytes),
        readings=one.readings + other.readings,
    )
