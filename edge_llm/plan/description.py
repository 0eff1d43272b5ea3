"""A described cluster: YAML in, boards, settings and a model's name out.

  model: qwen3-0.6b-q4_0        # name in models.yaml, as workers are told it
  boards:
    - {name: pi-a, ram: 8GB, k3s: server}
    - {name: pi-b, ram: 8GB}                       # role: prefill|decode|mixed|auto (auto: chosen)
    - {name: pi-c, ram: 4GB, role: prefill}        # arch: arm64|amd64, cpu: a word, cores: 4
  slots: 4                      # all from here on: optional, of all workers; without: edge_llm/config.py's own
  n_ctx: 4096
  components: [network-policy, model-on-board]     # of k3s_manifests, instead of those that are chosen

Owns the format, what its keys mean, and its errors: it is closed, unknown and repeated keys are errors that name the
place. Refuses to know whether anything fits (fit.py).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from edge_llm.config import ClosedLoader, WorkerConfig, WorkerRole
from edge_llm.errors import ConfigError
from edge_llm.kv.snapshot import Policy
from edge_llm.plan.boards import MIB, Arch, Board, Settings
from edge_llm.plan.processors import processor

_UNITS: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS_OF_1024: Final = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(|[KMGT]i?)B?")
_LABEL: Final = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
_DIGEST: Final = r"(@sha256:[0-9a-f]{64})?"
_WORKER: Final = WorkerConfig.model_construct()
# Less is a number without its unit.
_LEAST_RAM_BYTES: Final = 64 << 20
# What a key whose text has a form is, for people.
_FORMS: Final = {
    "name": "a node's name as Kubernetes has it (small letters, digits, - and .)",
    "model": "a name in models.yaml, or where its .gguf file lies on the boards",
    "components": "names of folders in k3s_manifests/components",
    "image": "NAME:TAG or NAME@sha256:DIGEST",
}


def bytes_of(value: object) -> int:
    """8GB, 7.8GiB, 512Mi or a number of bytes. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise ValueError("a size is a number of bytes, or like 8GB, 7.8GiB, 512Mi")
    return int(float(found[1]) * (_UNITS | _UNITS_OF_1024)[found[2]])


def _ram(value: object) -> int:
    size = bytes_of(value)
    if size < _LEAST_RAM_BYTES:
        raise ValueError(f"{size} bytes are no board's memory: write its unit, like 8GB")
    return size


Size = Annotated[int, BeforeValidator(bytes_of), Field(ge=0, le=1 << 50)]


def _role(value: object) -> object:
    return None if value == "auto" else value


class _Closed(BaseModel):
    """What a key means stands below it: `--help` prints it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class _Board(_Closed):
    name: Annotated[str, Field(pattern=rf"^{_LABEL}(\.{_LABEL})*$", max_length=253)]
    """The node's name in Kubernetes."""
    ram: Annotated[int, BeforeValidator(_ram), Field(le=1 << 50)]
    """What the board is sold with: 8GB."""
    arch: Arch = "arm64"
    """arm64 or amd64."""
    cpu: Annotated[str, Field(max_length=64), AfterValidator(processor)] = ""
    """The core: cortex-a76 (or pi5) sets what is known of it; boards of two kinds are not exact together."""
    cores: Annotated[int, Field(ge=1, le=1024)] = 4
    """How many."""
    role: Annotated[WorkerRole | None, BeforeValidator(_role)] = None
    """prefill, decode or mixed; without, or auto: chosen."""
    k3s: Literal["server", "agent"] = "agent"
    """server: the control plane runs there, too, and takes more memory."""
    reserve: Size | None = None
    """Memory for everything else there, instead of what K3s and the system usually take."""


class _Cluster(_Closed):
    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9./_-]{1,256}$")]
    """Its name in models.yaml, or the path of its .gguf file on the boards."""
    gguf: str | None = None
    """Its file on this machine, where its size is read; without: in the cache."""
    facts: str | None = None
    """Instead: a file of what `edge-llm models show MODEL --json` prints where the model is."""
    boards: Annotated[tuple[_Board, ...], Field(min_length=1, max_length=1000)]
    """A list, each with the keys of a board."""
    policy: Policy = _WORKER.policy
    """exact or fast: whether answers come out the same wherever they run."""
    slots: Annotated[int, Field(ge=1, le=64)] = _WORKER.slots
    """Answers at once on a worker that decodes."""
    spare_slots: Annotated[int, Field(ge=0, le=64)] = _WORKER.spare_slots
    """The same on one of role prefill, for when it helps out."""
    spare_prompts: bool = _WORKER.spare_prompts
    """Whether a decode worker may read prompts for others."""
    n_ctx: Annotated[int, Field(ge=64, le=1 << 20)] = _WORKER.n_ctx
    """Tokens of one answer and its prompt together."""
    chunk_tokens: Annotated[int, Field(ge=8, le=1024)] = _WORKER.chunk_tokens  # as wide as `verify` can measure
    """Prompt tokens that are read at once."""
    k_type: Literal["f16", "f32", "bf16", "q8_0", "q4_0"] = _WORKER.k_type
    """Type of the K cache; q8_0 takes half of f16."""
    v_type: Literal["f16", "f32", "bf16"] = "f16"
    """Type of the V cache."""
    prefix_cache: Size = _WORKER.prefix_cache_bytes
    """Memory for what prompts begin with."""
    components: tuple[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")], ...] = ()
    """Of k3s_manifests/components, instead of those that are chosen; name network-policy, too."""
    image: Annotated[str, Field(pattern=rf"^[a-z0-9]([A-Za-z0-9._/:-]*[A-Za-z0-9])?{_DIGEST}$")] | None = None
    """NAME:TAG or NAME@sha256:DIGEST instead of localhost/edge-llm and this version."""

    @model_validator(mode="after")
    def _sizes_come_from_one_place(self) -> Self:
        if self.gguf and self.facts:
            raise ValueError("gguf and facts both say how large the model is: give one of them")
        return self


@dataclass(frozen=True, slots=True)
class Description:
    """What was described. `gguf`: the model's file on this machine; `facts`: what `models show --json` printed where it
    lies; None: to be looked for in the cache. `components`: None: those that fit what is described."""

    model: str
    gguf: Path | None
    facts: Path | None
    boards: tuple[Board, ...]
    policy: Policy
    settings: Settings
    components: tuple[str, ...] | None
    image: str | None


def keys() -> list[tuple[str, str]]:
    """Every key with what it means; those of a board as `boards.name`. What must be there says so."""
    return [
        (f"{'boards.' * (kind is _Board)}{key}", f"{_needed_or_default(key, field)} {field.description}".strip())
        for kind in (_Cluster, _Board)
        for key, field in kind.model_fields.items()
    ]


def _needed_or_default(key: str, field: FieldInfo) -> str:
    if field.is_required():
        return "Needed."
    if key == "prefix_cache":
        return f"[{field.default // MIB}MiB]"
    return "" if field.default in (None, "", ()) else f"[{str(field.default).replace('True', 'true')}]"


def read_description(path: Path) -> Description:
    """Raises ConfigError that names file, place and what is allowed there. Paths in it are relative to it."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    return parse_description(text, str(path), path.parent)


def parse_description(text: str, where: str, folder: Path = Path()) -> Description:
    content: Any = None
    try:
        content = yaml.load(text, Loader=ClosedLoader)
        cluster = _Cluster.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_complaint(error, content)}") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{where} is not YAML: {line}{error.problem or error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where} is not YAML: {error}") from None
    names = [board.name for board in cluster.boards]
    if len(names) != len(set(names)):
        raise ConfigError(f"{where}: boards: {max(names, key=names.count)} is there twice")
    return Description(
        model=cluster.model,
        gguf=_path(cluster.gguf, folder, where),
        facts=_path(cluster.facts, folder, where),
        boards=tuple(map(_board, cluster.boards)),
        policy=cluster.policy,
        settings=Settings(
            slots=cluster.slots,
            spare_slots=cluster.spare_slots,
            spare_prompts=cluster.spare_prompts,
            n_ctx=cluster.n_ctx,
            chunk_tokens=cluster.chunk_tokens,
            k_type=cluster.k_type,
            v_type=cluster.v_type,
            prefix_cache_bytes=cluster.prefix_cache,
        ),
        components=cluster.components if "components" in cluster.model_fields_set else None,
        image=cluster.image,
    )


def _board(board: _Board) -> Board:
    return Board(
        name=board.name,
        ram_bytes=board.ram,
        arch=board.arch,
        cpu=board.cpu,
        cores=board.cores,
        role=board.role,
        is_server=board.k3s == "server",
        reserve_bytes=board.reserve,
    )


def _path(name: str | None, folder: Path, where: str) -> Path | None:
    try:
        return folder / Path(name).expanduser() if name else None
    except RuntimeError:
        raise ConfigError(f"{where}: {name}: there is no such user on this machine") from None


def _complaint(error: ValidationError, content: object) -> str:
    """The first thing that is wrong, a key that is none before all: where it is, and what is allowed there."""
    problems = error.errors(include_url=False, include_input=False)
    problem = next((one for one in problems if one["type"] == "extra_forbidden"), problems[0])
    place = problem["loc"]
    kind: type[_Closed] = _Board if len(place) > 1 and place[0] == "boards" else _Cluster
    known = f"the keys are {', '.join(kind.model_fields)}"
    match problem["type"]:
        case "missing":
            words = f"is missing; {known}"
        case "extra_forbidden":
            missing = [
                str(one["loc"][-1]) for one in problems if one["type"] == "missing" and one["loc"][:-1] == place[:-1]
            ]
            words = f"is not known{_meant(str(place[-1]), kind, missing)}; {known}"
        case "model_type":
            words = f"must be keys and values; {known}"
        case "tuple_type":
            words = "must be a list"
        case "too_short":
            words = "there must be at least one"
        case "string_type":
            words = "must be text; a number, yes, no, on and off need quotes to be that"
        case "string_pattern_mismatch":
            words = f"must be {_FORMS[_key(place)]}"
        case "value_error":
            words = str(problem["ctx"]["error"])
        case _:
            words = problem["msg"].replace("Input should", "must", 1)
    return ": ".join([*_place(place, content), words])


def _meant(key: str, kind: type[_Closed], missing: Sequence[str]) -> str:
    """The nearest key, and what is missing besides."""
    near = difflib.get_close_matches(key.lower(), [*missing, *kind.model_fields], n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    others = [name for name in missing if name not in near]
    return f"{hint}, and {' and '.join(others)} {'is' if len(others) == 1 else 'are'} missing" if others else hint


def _key(place: tuple[int | str, ...]) -> str:
    return next(str(part) for part in reversed(place) if isinstance(part, str))


def _place(place: tuple[int | str, ...], content: object) -> list[str]:
    """A board by its name where it has one, else by its number."""
    if len(place) < 2 or place[0] != "boards" or not isinstance(place[1], int) or not isinstance(content, dict):
        return [".".join(map(str, place))] if place else []
    board = content["boards"][place[1]]
    name = board.get("name") if isinstance(board, dict) else None
    which = f"board {name}" if isinstance(name, str) and name.isprintable() else f"board number {place[1] + 1}"
    return [which, *map(str, place[2:])]
