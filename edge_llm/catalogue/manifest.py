"""models.yaml -> model entries, with the hashes a user has pinned laid over it.

Owns the file format and its errors. Refuses to fetch anything. The file is closed: unknown keys are errors, names and
file names are plain, hashes are 64 hex digits; an entry without a hash is valid but cannot be pulled, only pinned.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edge_llm.config import data_dir
from edge_llm.errors import CatalogueError

_PLAIN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HuggingFace(_Closed):
    """A file of a public repository on the Hugging Face hub."""

    repo: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")]
    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")]


class Wheel(_Closed):
    """A member of a published wheel, downloaded without installing it."""

    package: Annotated[str, Field(pattern=_PLAIN)]
    version: Annotated[str, Field(pattern=_PLAIN)]
    member: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._/-]*$")]


class Source(_Closed):
    """Exactly one of the four kinds."""

    hf: HuggingFace | None = None
    url: Annotated[str, Field(pattern=r"^https://")] | None = None
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
    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.gguf$")]
    size: Annotated[int, Field(gt=0)] | None = None
    sha256: Sha256 | None = None
    licence: str = ""
    sources: tuple[Source, ...] = ()
    note: str = ""


def manifest_path(environ: Mapping[str, str] = os.environ) -> Path:
    """EDGE_LLM_MODELS, the checkout's models.yaml, or the copy inside the installed package."""
    if "EDGE_LLM_MODELS" in environ:
        return Path(environ["EDGE_LLM_MODELS"])
    package = Path(__file__).parent.parent
    checkout = package.parent / "models.yaml"
    return checkout if checkout.is_file() else package / "models.yaml"


def pins_path() -> Path:
    """Where `models pin` records what it saw."""
    return data_dir() / "pins.yaml"


def load_manifest(path: Path | None = None, pins: Path | None = None) -> dict[str, ModelEntry]:
    """All entries by name. Raises CatalogueError naming file, entry and key."""
    path = path or manifest_path()
    entries = {name: _entry(path, name, values) for name, values in _mapping(path, "models").items()}
    pinned = pins or pins_path()
    if pinned.is_file():
        for name, values in _mapping(pinned, "pins").items():
            if name in entries and entries[name].sha256 is None:
                entries[name] = _entry(pinned, name, entries[name].model_dump(exclude={"name"}) | values)
    return entries


def record_pin(name: str, size: int, sha256: str, pins: Path | None = None) -> Path:
    """Lay `size` and `sha256` over the entry `name` from now on."""
    path = pins or pins_path()
    values = _mapping(path, "pins") if path.is_file() else {}
    values[name] = {"size": size, "sha256": sha256}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(yaml.safe_dump({"pins": values}))
    draft.replace(path)
    return path


def _mapping(path: Path, key: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise CatalogueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict) or content.keys() != {key} or not isinstance(content[key], dict):
        raise CatalogueError(f"{path} must hold one mapping `{key}:`")
    return dict(content[key])


def _entry(path: Path, name: str, values: object) -> ModelEntry:
    try:
        return ModelEntry.model_validate({"name": name, **(values if isinstance(values, dict) else {})})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise CatalogueError(f"{path}, model {name}, {where}: {problem['msg']}") from error
