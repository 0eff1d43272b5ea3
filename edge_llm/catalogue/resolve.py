"""A name of the catalogue or the path of a .gguf file -> a file that is there, and what it is.

Owns the rule which of the two a word is: what ends in .gguf or names a folder is a path. Knows no network.
"""

from __future__ import annotations

import difflib
import os
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
    if not is_path(name_or_path):
        entry = find(name_or_path)
        if not is_path(entry.file):
            raise CatalogueError(f"{entry.name} is {entry.file}, no .gguf file: the benches use it, it answers nothing")
        return LocalModel(entry.name, fetch(entry, report), entry.sha256 or "")
    try:
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise CatalogueError(f"there is no file {path}")
        return LocalModel(path.stem, path.resolve(), known_sha256(path))
    except OSError as error:
        raise CatalogueError(f"cannot read {name_or_path}: {error.strerror}") from error
    except RuntimeError as error:  # what expanduser says of an unknown user
        raise CatalogueError(f"cannot read {name_or_path}: {error}") from error


def is_path(word: str) -> bool:
    """Else it is a name of the catalogue."""
    return word.endswith(".gguf") or os.sep in word


def find(name: str) -> ModelEntry:
    """An entry by name, with the nearest names when there is none."""
    if is_path(name):
        raise CatalogueError(f"{name} is a path: a file of yours is used as it is, and has no entry in models.yaml")
    entries = load_manifest()
    if name in entries:
        return entries[name]
    near = difflib.get_close_matches(name.lower(), entries, n=3, cutoff=0.5)
    known = (
        f"did you mean {', '.join(near)}?"
        if near
        else f"known are {', '.join(sorted(n for n, e in entries.items() if is_path(e.file)))}."
    )
    raise CatalogueError(f"unknown model {name!r}: {known} The path of a .gguf file works too.")
