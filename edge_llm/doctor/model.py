"""The configured model: there, whole, verified, and small enough for this board.

Owns finding it without fetching, without hashing gigabytes and without llama.cpp, and judging what is found. The sum of
memory is the worker's own (edge_llm/catalogue/memory.py): what is said to fit here is what will start.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from edge_llm.catalogue.fetch import installed_path, models_dir, noted_sha256
from edge_llm.catalogue.gguf import ModelCard, read_card
from edge_llm.catalogue.manifest import ModelEntry
from edge_llm.catalogue.memory import repacked_tensors
from edge_llm.catalogue.resolve import find, is_path
from edge_llm.config import WorkerConfig, cache_dir
from edge_llm.doctor.files import gib
from edge_llm.doctor.finding import Finding, fail, ok, unknown, warn
from edge_llm.errors import CatalogueError, EdgeLLMError
from edge_llm.kv.snapshot import UNSPLIT
from edge_llm.words import counted

State = Literal[
    "verified", "not verified", "not fetched", "wrong size", "wrong hash", "unreadable", "unknown name", "gone"
]
# Of the memory there is: the rest is the system's.
_OWN_SHARE: Final = 0.85
_USABLE: Final = frozenset({"verified", "not verified"})


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """`problem`: in the catalogue's own words. `needs_bytes`: what a fetch will write."""

    name: str
    state: State
    file: str
    problem: str = ""
    needs_bytes: int = 0
    card: ModelCard | None = None


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """Bytes. `whole`: with what is kept to help out in the other role; `own`: without, what a worker falls back to;
    `available`: None where nobody says; `most`: what would be available if nothing else ran, None when not known."""

    whole_bytes: int
    own_bytes: int
    table: str
    available_bytes: int | None
    most_bytes: int | None
    limit_is_set: bool


def read_model(word: str) -> ModelFacts:
    """`word`: a name of the catalogue or a path, as in settings."""
    try:
        if is_path(word):
            path = Path(word).expanduser()
            if not path.is_file():
                return ModelFacts(word, "gone", str(path), f"there is no file {path}")
            return _with_card(ModelFacts(path.stem, "verified", str(path)))
        entry = find(word)
        return _with_card(_installed(entry, installed_path(entry)))
    except (EdgeLLMError, RuntimeError) as error:  # RuntimeError: what expanduser says of an unknown user
        return ModelFacts(word, "unknown name", "", str(error))


def models_folder(word: str) -> Path:
    """Where the configured model lies or will lie; with settings that cannot be read, where it usually does."""
    try:
        return Path(word).expanduser().absolute().parent if is_path(word) else models_dir().absolute()
    except (EdgeLLMError, RuntimeError):
        return cache_dir() / "models"


def _installed(entry: ModelEntry, path: Path) -> ModelFacts:
    if not path.is_file():
        copies = 2 if any(source.pypi for source in entry.sources) else 1  # a wheel and its member
        return ModelFacts(entry.name, "not fetched", str(path), needs_bytes=(entry.size or 0) * copies)
    size, noted = path.stat().st_size, noted_sha256(path)
    if entry.size is not None and size != entry.size:
        return ModelFacts(entry.name, "wrong size", str(path), f"it has {size} bytes, models.yaml says {entry.size}")
    if noted is None or entry.sha256 is None:
        return ModelFacts(entry.name, "not verified", str(path))
    if noted != entry.sha256:
        return ModelFacts(
            entry.name, "wrong hash", str(path), f"its sha256 is {noted}, models.yaml says {entry.sha256}"
        )
    return ModelFacts(entry.name, "verified", str(path))


def _with_card(facts: ModelFacts) -> ModelFacts:
    if facts.state not in _USABLE:
        return facts
    try:
        card = read_card(Path(facts.file))
    except CatalogueError as error:
        return ModelFacts(facts.name, "unreadable", facts.file, error.message)
    return ModelFacts(facts.name, facts.state, facts.file, facts.problem, 0, card)


def check_model(facts: ModelFacts, check: str = "model.file") -> Finding:
    name = facts.name
    pull = [f"edge-llm models pull {name}"]
    if facts.state == "verified":
        return ok(check, f"{name}, {facts.file}" + (f", {facts.card.quantization}" if facts.card else ""))
    if facts.state == "not verified":
        return warn(
            check,
            f"{name} is there, but its hash was never compared (or the file has changed since)",
            why="a damaged file gives wrong answers; a worker hashes it at its start, half a minute for 4 GB",
            do="compare it now",
            commands=[f"edge-llm models verify {name}"],
        )
    if facts.state == "not fetched":
        need = f" ({gib(facts.needs_bytes)} with what it is unpacked from)" if facts.needs_bytes else ""
        why = "a worker fetches it at its start: that takes long, and needs the internet"
        return warn(check, f"{name} is not here{need}", why=why, do="fetch it now", commands=pull)
    if facts.state in ("wrong size", "wrong hash"):
        why = "this is not the model that its name says"
        return fail(check, f"{name}: {facts.problem}", why=why, do="get it again", commands=pull)
    if facts.state == "unreadable":
        return fail(check, facts.problem, why="no worker can load it", do="get it again, or name another file")
    return fail(
        check,
        facts.problem,
        why="no worker can start with these settings",
        do="name another model, or the path of a .gguf file, in the settings (worker.model)",
        commands=["edge-llm models list"],
    )


def read_memory(
    card: ModelCard, config: WorkerConfig, machine: str, available_bytes: int | None, most_bytes: int | None
) -> MemoryFacts:
    """`machine`: the architecture that the worker would run on, which decides what is repacked."""
    from edge_llm.engine.load import LlamaSettings, model_memory

    def plan(slots: int, serves_prompts: bool) -> tuple[int, str]:
        settings = LlamaSettings(
            model_path=card.path,
            model_name=config.model,
            model_sha256="",
            n_ctx=config.n_ctx,
            slots=slots,
            serves_prompts=serves_prompts,
            chunk_tokens=config.chunk_tokens,
            k_type=config.k_type,
            v_type=config.v_type,
            policy=config.policy,
            prefix_cache_bytes=config.prefix_cache_bytes,
        )
        repacked = repacked_tensors(card, machine) if config.policy == "exact" else []
        found = model_memory(card, settings, repacked)
        return found.total_bytes, found.table()

    prefills, decodes = config.role != "decode", config.role != "prefill"
    slots = config.slots if decodes else config.spare_slots
    whole, table = plan(slots, prefills or config.spare_prompts)
    own, _ = plan(config.slots if decodes else 0, prefills)
    limit = config.memory_limit_bytes
    return MemoryFacts(whole, own, table, limit or available_bytes, most_bytes, bool(limit))


def check_memory(facts: MemoryFacts, config: WorkerConfig) -> Finding:
    """Whether a worker with these settings starts."""
    check = "model.memory"
    words = (
        f"a worker of role {config.role} needs {gib(facts.whole_bytes)} ({counted(config.slots, 'slot')} of "
        f"{config.n_ctx} tokens)"
    )
    if facts.available_bytes is None:
        return unknown(check, f"{words}; how much is free cannot be read")
    words += f", {gib(facts.available_bytes)} are {'allowed' if facts.limit_is_set else 'free'}"
    if facts.whole_bytes <= facts.available_bytes:
        return ok(check, words)
    if facts.own_bytes <= facts.available_bytes:
        return warn(
            check,
            words,
            why="it starts, but cannot help out in the other role",
            do="lower slots, n_ctx or prefix_cache_bytes",
        )
    smaller = ["edge-llm serve worker --slots 2 --n-ctx 2048 --key-file cluster.key"]
    if not facts.limit_is_set and facts.most_bytes is not None and facts.own_bytes < facts.most_bytes * _OWN_SHARE:
        return warn(
            check,
            words,
            why="one more worker would refuse to start now; it would fit if nothing else ran",
            do="stop what takes the memory, or lower slots and n_ctx",
            commands=["ps -eo pid,rss,args --sort=-rss | head", *smaller],
        )
    return fail(
        check,
        words,
        why=f"a worker refuses to start. The sum:\n{facts.table}",
        do="lower slots, n_ctx or prefix_cache_bytes, or use a smaller quantization",
        commands=smaller,
    )


def check_threads(config: WorkerConfig, usable_cores: int | None, *, is_pi5: bool) -> Finding:
    """`usable_cores`: None where nobody says how many there are."""
    check = "worker.threads"
    if usable_cores is None:
        return unknown(check, "how many cores there are cannot be read")
    most = max(config.threads, config.threads_batch)
    decode, prefill = config.threads or usable_cores, config.threads_batch or usable_cores
    words = f"decode {decode}, prefill {prefill}, of {usable_cores} usable cores"
    if most > usable_cores:
        return warn(
            check,
            words,
            why="threads that share a core wait for each other in every step",
            do="set threads and threads_batch to what there is, or to 0",
        )
    if is_pi5 and decode > 2:
        return ok(check, f"{words}; others found decode on a Pi 5 fastest with 2 (llama.cpp discussion 30069)")
    return ok(check, words)


def check_card(facts: ModelFacts) -> Finding:
    """Whether the model can be split, as far as its header says."""
    check = "model.split"
    card = facts.card
    if card is None:
        return unknown(check, "the model is not here")
    if card.memory in UNSPLIT:
        return warn(
            check,
            f"{card.architecture} keeps {card.memory} state",
            why="it cannot be cut by position: every request runs unsplit on one worker",
            do="use workers of role mixed for it",
        )
    return ok(check, f"{card.architecture}, {card.kv_bytes_per_token() >> 10} KiB of KV a token")
