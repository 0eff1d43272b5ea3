"""Records as a report: a chapter for each kind, a part for each record, an overview of all. Pure.

Owns what is said of any record (where it was made, what went wrong) and the order. What is special to a kind is in
kinds.py; a kind that it does not know is told by its figures. Refuses to know files and pages.

Rule: nothing is hidden. A run that was cut short, a failure, code that was not committed, a machine that was busy
before the run are alarms at the top of its part and in the overview.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import edge_llm
from edge_llm.bench.record import EngineBuild, ModelFacts, Node, Record
from edge_llm.report.document import Chapter, Part, Report, Table
from edge_llm.report.evidence import Evidence, Found
from edge_llm.report.frontier import frontier_plots
from edge_llm.report.kinds import KINDS, UNKNOWN, Kind
from edge_llm.report.tables import figure_tables, flat
from edge_llm.report.words import NOT_READ, definitions, shown
from edge_llm.report.words import title as heading

_COMMIT_CHARS: Final = 10
_HASH_CHARS: Final = 12
# Load of others before a run, per core it may use, from which on its figures are doubtful.
_BUSY: Final = 1.0
_SHOWN_ALARMS: Final = 12
# Of figures: what is no table.
_SAID_APART: Final = ("definitions", "sentences", "verdicts", "notes")
Path = tuple[str, ...]


def report_of(found: Found, title: str) -> Report:
    kinds = [kind for kind in KINDS if any(one.record.kind == kind for one in found.evidence)]
    kinds += sorted({one.record.kind for one in found.evidence} - KINDS.keys())
    return Report(
        title=title,
        made_by=f"edge-llm {edge_llm.__version__}, bench report",
        overview=_overview(found.evidence),
        chapters=tuple(_chapter(kind, [one for one in found.evidence if one.record.kind == kind]) for kind in kinds),
        across=tuple(frontier_plots([one.record for one in found.evidence])),
        unreadable=found.unreadable,
    )


def _overview(evidence: Sequence[Evidence]) -> Table:
    columns = ("kind", "when (UTC)", "state", "main figures", "model", "machine", "commit", "record")
    return Table("All records", columns, tuple(_overview_row(one) for one in evidence))


def _overview_row(one: Evidence) -> tuple[str, ...]:
    record = one.record
    kind = KINDS.get(record.kind, UNKNOWN)
    return (
        record.kind,
        f"{record.started_at:%Y-%m-%d %H:%M}",
        _state(record),
        _headline(one, kind),
        _few([model.name for model in record.models]) or NOT_READ,
        "; ".join(_machine(node) for node in record.nodes),
        _commit(record),
        one.file,
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} more"


def _state(record: Record) -> str:
    words = [] if record.is_complete else ["cut short"]
    if record.failures:
        words.append(f"{len(record.failures)} failures")
    return ", ".join(words) or "complete"


def _headline(one: Evidence, kind: Kind) -> str:
    record = one.record
    if _was_killed(one):
        return f"no figures: killed, {len(one.lines)} finished cases in its lines"
    figures = flat(record.figures)
    known = [(path, figures[path]) for path in kind.headline if path in figures]
    words = [f"{' '.join(map(heading, path))} {shown(path, value)}" for path, value in known]
    return "; ".join([*words, *filter(None, [kind.main(record)])]) or NOT_READ


def _chapter(name: str, evidence: Sequence[Evidence]) -> Chapter:
    kind = KINDS.get(name, UNKNOWN)
    words = {part for one in evidence for path in flat(one.record.figures) for part in path}
    own = {
        str(name): str(text)
        for one in evidence
        if isinstance(one.record.figures.get("definitions"), dict)
        for name, text in one.record.figures["definitions"].items()
    }
    words.update(sample for one in evidence for sample in one.record.samples)
    return Chapter(
        kind=name,
        title=kind.title or name,
        what=kind.what,
        definitions=(*_general(words, own), *own.items()),
        parts=tuple(_part(one, kind) for one in evidence),
    )


def _general(words: set[str], own: Mapping[str, str]) -> list[tuple[str, str]]:
    """Definitions of words that the records do not define themselves (theirs may be called `e2el`)."""
    known = {name.casefold() for name in own}
    known |= {name.removesuffix("l") for name in known}
    return [(name, text) for name, text in definitions(words) if name.casefold() not in known]


def _part(one: Evidence, kind: Kind) -> Part:
    record = one.record
    everything = tuple(figure_tables({name: one for name, one in record.figures.items() if name not in _SAID_APART}))
    plots, more = kind.plots(one)
    sentences = tuple(kind.sentences(record))
    return Part(
        file=one.file,
        title=f"{record.started_at:%Y-%m-%d %H:%M} UTC, {', '.join(m.name for m in record.models) or 'no model'}",
        facts=tuple(_facts(record)),
        alarms=tuple(_alarms(one)),
        sentences=sentences,
        tables=tuple(kind.tables(record)) if kind.tables else everything,
        plots=tuple(plots),
        more_plots=tuple(more),
        all_figures=everything if kind.tables else (),
        notes=tuple(note for note in record.notes if note not in sentences),
    )


# -- facts


def _facts(record: Record) -> list[tuple[str, str]]:
    seconds = (record.finished_at - record.started_at).total_seconds()
    facts = [
        ("command", " ".join(record.command)),
        ("took", f"{seconds / 60:.1f} minutes" if seconds >= 120 else f"{seconds:.0f} s"),
        *(("model", _model(model)) for model in record.models),
        *((f"node {node.name}", _node(node)) for node in record.nodes),
        *((f"engine {engine.name}", _engine(engine)) for engine in record.engines),
        ("code", f"edge-llm {record.tool_version}, commit {_commit(record)}"),
    ]
    if record.config:
        facts.append(
            ("settings", "; ".join(f"{name}: {shown((name,), value)}" for name, value in record.config.items()))
        )
    if record.workload:
        facts.append(("workload", "; ".join(f"{name}: {shown((name,), v)}" for name, v in record.workload.items())))
    facts += [(f"process {p.name}", _process(p.cores, p.cpu_s, p.wall_s, p.rss_peak_bytes)) for p in record.processes]
    for watched in record.resources:
        cost = watched.sampler
        share = f"{cost.cpu_s / cost.wall_s:.2%} of a core" if cost.wall_s else "an unknown share of a core"
        facts.append(
            (f"sampled {watched.node}, {watched.part}", f"{cost.samples} times, {cost.gaps} left out; took {share}")
        )
    facts.append(("run", record.run_id))
    return facts


def _model(model: ModelFacts) -> str:
    """Somebody else's server may say no more of it than its name."""
    size = shown(("size_bytes",), model.size_bytes) if model.size_bytes else ""
    sha256 = f"sha256 {model.sha256[:_HASH_CHARS]}" if model.sha256 else ""
    return ", ".join(filter(None, (model.name, model.quantization, size, sha256)))


def _machine(node: Node) -> str:
    return f"{node.board or node.cpu}, {node.machine}, {len(node.usable_cores)} of {_cores(node.cores)}"


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"


def _node(node: Node) -> str:
    words = [_machine(node), f"{shown(('ram_bytes',), node.ram_bytes)} RAM", f"kernel {node.kernel}"]
    words.append(f"pages of {node.page_bytes // 1024} KiB")
    if node.governor:
        words.append(f"governor {node.governor}")
    if node.temperature_c is not None and node.temperature_after_c is not None:
        words.append(f"{node.temperature_c:.0f} to {node.temperature_after_c:.0f} C")
    if node.load_before is not None and node.load_after is not None:
        words.append(f"load {node.load_before:.1f} before, {node.load_after:.1f} after")
    return ", ".join(words)


def _engine(engine: EngineBuild) -> str:
    return "; ".join(f"{name}: {value}" for name, value in engine.facts.items())


def _process(cores: Sequence[int], cpu_s: float, wall_s: float, peak_bytes: int) -> str:
    where = f"on core {', '.join(map(str, cores))}" if cores else "not pinned"
    return f"{where}, {cpu_s:.0f} s of CPU in {wall_s:.0f} s, {shown(('rss_bytes',), peak_bytes)} at most"


def _commit(record: Record) -> str:
    if record.source.commit is None:
        return "unknown"
    return record.source.commit[:_COMMIT_CHARS] + (" and changes" if record.source.is_dirty else "")


# -- alarms


def _alarms(one: Evidence) -> list[str]:
    record = one.record
    alarms = [] if record.is_complete else [_cut_short(one)]
    alarms += [f"not measured: {failure.what}: {failure.why}" for failure in record.failures[:_SHOWN_ALARMS]]
    if len(record.failures) > _SHOWN_ALARMS:
        alarms.append(f"and {len(record.failures) - _SHOWN_ALARMS} failures more: see the record")
    if one.trouble:
        alarms.append(one.trouble)
    if record.cases is not None and record.cases.lost:
        alarms.append(f"{record.cases.lost} lines of finished cases could not be written")
    if record.source.is_dirty:
        alarms.append("measured with changes that were not committed")
    alarms += [found for node in record.nodes if (found := _busy(node))]
    alarms += [found for watched in record.resources for found in _throttled(watched.node, watched.summaries)]
    return alarms


def _cut_short(one: Evidence) -> str:
    """A run that was killed left the record that it began with, and its lines."""
    cases = one.record.cases
    if cases is not None and _was_killed(one):
        return f"killed before it wrote any figure: {len(one.lines)} finished cases are in {cases.file}"
    return "cut short: these are the figures of what was finished"


def _was_killed(one: Evidence) -> bool:
    """There are lines that its record, written when it began, knows nothing of."""
    cases = one.record.cases
    return not one.record.is_complete and cases is not None and len(one.lines) > cases.lines


def _busy(node: Node) -> str:
    cores = max(1, len(node.usable_cores))
    if node.load_before is None or node.load_before <= _BUSY * cores:
        return ""
    return (
        f"{node.name} was busy before the run: load {node.load_before:.1f}, and {_cores(cores)} to use; speeds and "
        "times may be those of a shared machine"
    )


def _throttled(node: str, summaries: object) -> list[str]:
    """A board that was throttled (too hot, too little voltage) measured something else than its speed."""
    if not isinstance(summaries, dict):
        return []
    found = [name for name, one in summaries.items() if name.startswith("throttled/") and one.maximum]
    return [f"{node} was throttled: {', '.join(name.partition('/')[2] for name in found)}"] if found else []
