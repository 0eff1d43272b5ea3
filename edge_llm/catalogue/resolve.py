"""A name of the catalogue or the path of a .gguf file -> a file that is there, and what it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_llm.catalogue.fetch import Report, fetch, known_sha256, quiet
from edge_llm.catalogue.manifest import ModelEntry, load_manifest
from edge_llm.errors import CatalogueError


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A file on this machine. `name` is what the API calls it."""

    name: str
    path: Path
    sha256: str


def resolve(name_or_path: str, report: Report = quiet) -> LocalModel:
    """Fetch if needed. Raises CatalogueError with what to do."""
    path = Path(name_or_path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CatalogueError(f"there is no file {path}")
        return LocalModel(path.stem, path.resolve(), known_sha256(path))
    entry = find(name_or_path)
    return LocalModel(entry.name, fetch(entry, report), entry.sha256 or "")


def find(name: str) -> ModelEntry:
    """An entry by name, with the known names when there is none."""
    entries = load_manifest()
    if name not in entries:
        raise CatalogueError(
            f"unknown model {name!r}: known are {', '.join(sorted(entries))}, or the path of a .gguf file"
        )
    return entries[name]
