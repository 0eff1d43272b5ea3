"""One measured run as one JSON file in bench_results/: what was asked, on what, what happened, what it means.

Owns the schema, its version, reading every file that was ever written, writing atomically, and keeping this
machine's paths out. Refuses to know how anything was measured.

Invariants: raw samples are kept, statistics can be computed again from them; a reading that does not exist is null;
a file is complete or absent; fields are only ever added, with a default, so that old files load.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec

import edge_llm
from edge_llm.bench.cases import SUFFIX, CaseLine, Cases, stems
from edge_llm.bench.compiled import compiled_facts
from edge_llm.bench.resources import Watched
from edge_llm.bench.stats import Summary
from edge_llm.board import BoardFacts
from edge_llm.errors import ConfigError, EdgeLLMError
from edge_llm.machine import NodeFacts

SCHEMA_VERSION: Final = 1
RESULTS_DIR: Final = "bench_results"
_GIT_S: Final = 10.0
# A run before this one left its record there: that is no change of what measures.
_CODE: Final = (":(top)", f":(top,exclude){RESULTS_DIR}")
# A word that starts with / or ~/ and has at least two parts: a path, not a fraction, a unit or an URL's middle.
_PATH: Final = re.compile(r"(?<![\w./])(?:~|\.{1,2})?(?:/[\w.@+-]+){2,}/?")
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]+")


class BadRecord(EdgeLLMError):
    """A file in bench_results/ is not a record of a schema this version knows."""

    code = "bad_record"


class Source(msgspec.Struct, frozen=True):
    """The code that measured. None: not run from a git checkout. `compiled`: the llama-cpp-python beside it, with the
    flags it was compiled with (bench/compiled.py); what other processes computed with is in `engines`."""

    commit: str | None = None
    is_dirty: bool | None = None
    compiled: dict[str, str] = {}


class ModelFacts(msgspec.Struct, frozen=True):
    """A model file; `file` is its name without folders."""

    name: str
    file: str
    sha256: str
    size_bytes: int
    quantization: str
    architecture: str = ""
    kv_bytes_per_token: int = 0
    n_params: int = 0
    n_ctx_train: int = 0


class EngineBuild(msgspec.Struct, frozen=True):
    """What computed: `name` says which engine or tool of the run, `facts` its versions, flags and features."""

    name: str
    facts: dict[str, str]


class Node(msgspec.Struct, frozen=True):
    """The board; load is read before and after, to show who else was there. disk: the kernel's name of what records
    are written to (board.py)."""

    name: str
    cpu: str
    machine: str
    cores: int
    usable_cores: tuple[int, ...]
    ram_bytes: int
    kernel: str
    page_bytes: int
    board: str | None = None
    governor: str | None = None
    frequency_mhz: float | None = None
    temperature_c: float | None = None
    temperature_after_c: float | None = None
    load_before: float | None = None
    load_after: float | None = None
    os: str | None = None
    boot_parameters: tuple[str, ...] = ()
    disk: str | None = None
    network_mbit_per_s: dict[str, int] = {}


class Process(msgspec.Struct, frozen=True):
    """CPU and memory of one process over the run. Empty `cores`: not pinned."""

    name: str
    cores: tuple[int, ...]
    wall_s: float
    cpu_s: float
    rss_before_bytes: int
    rss_after_bytes: int
    rss_peak_bytes: int
    readings: int = 0


class Failure(msgspec.Struct, frozen=True):
    """Something that was asked for and did not happen. Counted, never hidden."""

    what: str
    why: str


class Printed(msgspec.Struct, frozen=True):
    """What every measuring command prints with --json: its figures, and where the record is."""

    record: str


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """The file. `figures` is what the command printed; `samples` what it was computed from, by name.

    `workload`: what was asked of the system, before anything was measured. `resources`: nodes beside the run. `cases`:
    the lines kept beside this file, one per finished case.
    """

    schema_version: int
    run_id: str
    kind: str
    is_complete: bool
    started_at: datetime
    finished_at: datetime
    tool_version: str
    command: list[str]
    config: dict[str, Any]
    source: Source
    models: list[ModelFacts]
    engines: list[EngineBuild]
    nodes: list[Node]
    processes: list[Process]
    figures: dict[str, Any]
    samples: dict[str, list[float]]
    statistics: dict[str, dict[str, float]]
    failures: list[Failure]
    notes: list[str] = []
    workload: dict[str, Any] = {}
    resources: list[Watched] = []
    cases: Cases | None = None


def run_id(now: datetime, random_bits: int) -> str:
    """UUID version 7: sorts by time. `random_bits` are 74 bits of randomness."""
    milliseconds = int(now.timestamp() * 1000) & ((1 << 48) - 1)
    value = (
        milliseconds << 80 | 0x7 << 76 | (random_bits >> 62 & 0xFFF) << 64 | 0b10 << 62 | random_bits & (1 << 62) - 1
    )
    text = f"{value:032x}"
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def new_run_id() -> str:
    return run_id(datetime.now(UTC), int.from_bytes(os.urandom(10)) & (1 << 74) - 1)


def read_source(folder: Path = Path(edge_llm.__file__).parent) -> Source:
    """The git commit of the running code, if it is a checkout."""
    commit, status = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--", *_CODE)
    return Source(commit, None if status is None else bool(status), compiled_facts())


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=_GIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def node_of(before: NodeFacts, after: NodeFacts, board: BoardFacts | None = None, name: str = "local") -> Node:
    """The board as read before and after the run; `board`: what does not change meanwhile."""
    return Node(
        name=name,
        cpu=before.cpu,
        machine=before.machine,
        cores=before.cores,
        usable_cores=before.usable_cores,
        ram_bytes=before.ram_bytes,
        kernel=before.kernel,
        page_bytes=before.page_bytes,
        board=before.board,
        governor=before.governor,
        frequency_mhz=before.frequency_mhz,
        temperature_c=before.temperature_c,
        temperature_after_c=after.temperature_c,
        load_before=before.load_1m,
        load_after=after.load_1m,
        **({} if board is None else asdict(board)),
    )


def statistics_of(summaries: Mapping[str, Summary]) -> dict[str, dict[str, float]]:
    """Summaries as JSON."""
    return {name: {key: float(value) for key, value in asdict(one).items()} for name, one in summaries.items()}


def without_paths(text: str, folders: Sequence[str] = ()) -> str:
    """`text` with every path cut to its last part. `folders` are known ones, which may contain spaces."""
    for folder in sorted((name for name in folders if len(name) > 1), key=len, reverse=True):
        text = re.sub(rf"{re.escape(folder.rstrip('/'))}(?![\w.-])", "/-", text)
    return _PATH.sub(lambda found: found.group().rstrip("/").rpartition("/")[2], text)


def stem_of(started_at: datetime, kind: str, models: Sequence[ModelFacts]) -> str:
    """`<date>-<kind>-<model>`, UTC."""
    model = _UNSAFE.sub("-", models[0].name if models else "none").strip("-.")
    return f"{started_at.astimezone(UTC):%Y%m%dT%H%M%SZ}-{kind}-{model}"


def file_name(record: Record) -> str:
    """As its lines are called, or `<date>-<kind>-<model>.json`."""
    if record.cases is not None and record.cases.file is not None:
        return f"{record.cases.file.removesuffix(SUFFIX)}.json"
    return f"{stem_of(record.started_at, record.kind, record.models)}.json"


def try_folder(folder: Path) -> None:
    """Make it, and write to it. Raises ConfigError: hours of measuring are no time to find out."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"no record can be written to {folder} ({error.strerror or error}): name another folder with --output"
        ) from error


def write(record: Record, folder: Path) -> Path:
    """Write atomically under a name nobody has yet, or in the place of what the same run wrote when it began; returns
    the path."""
    folder.mkdir(parents=True, exist_ok=True)
    data = msgspec.json.format(encode(record), indent=1) + b"\n"
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        names = _names(folder / file_name(record), record.run_id)
        return next(path for path in names if _is_given(temporary, path, record))
    finally:
        Path(temporary).unlink(missing_ok=True)


def _names(path: Path, run: str) -> Iterator[Path]:
    """The plain name, then with the run's id, then numbered."""
    return (path.with_name(f"{stem}.json") for stem in stems(path.stem, run))


def _is_given(temporary: str, path: Path, record: Record) -> bool:
    """Give the file this name, too, unless somebody else has it: a link fails then, a rename would replace."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        if record.cases is None or not _is_of(path, record.run_id):
            return False
        os.replace(temporary, path)
    return True


def _is_of(path: Path, run: str) -> bool:
    try:
        return load(path).run_id == run
    except (BadRecord, OSError):
        return False


def encode(record: Record) -> bytes:
    """JSON bytes without paths of this machine."""
    return msgspec.json.encode(cleaned(msgspec.to_builtins(record)))


def cleaned(tree: Any) -> Any:
    """The same JSON without paths of this machine, in names, too."""
    return _cleaned(tree, [str(Path.home()), str(Path.cwd()), tempfile.gettempdir()])


def _cleaned(tree: Any, folders: Sequence[str]) -> Any:
    if isinstance(tree, str):
        return without_paths(tree, folders)
    if isinstance(tree, dict):
        return {without_paths(key, folders): _cleaned(value, folders) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_cleaned(value, folders) for value in tree]
    return tree


def parse(data: bytes, name: str) -> Record:
    """Raises BadRecord; `name` is for its message."""
    try:
        record = msgspec.json.decode(data, type=Record)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRecord(f"{name} is not a bench record: {error}") from error
    if not 1 <= record.schema_version <= SCHEMA_VERSION:
        raise BadRecord(
            f"{name} has schema version {record.schema_version}, this edge-llm reads 1 to {SCHEMA_VERSION}: update it"
        )
    return record


def load(path: Path) -> Record:
    """Raises BadRecord, OSError."""
    return parse(path.read_bytes(), path.name)


SCHEMAS: Final = ("record", "case", "printed")


def schema(of: str = "record") -> dict[str, Any]:
    """JSON schema of a record, of a line of its cases, or of what a command prints with --json. Each may have more
    fields than are named."""
    types: dict[str, type[msgspec.Struct]] = {"record": Record, "case": CaseLine, "printed": Printed}
    return msgspec.json.schema(types[of])
