"""Whether workers take the model: what the list of models says of its name, against what is known of its file.

Pure. Owns the refusal of sizes that are another file's, and what is said of a name that workers would refuse. A worker
looks its model up in the list of its image, or in one of your own (components/own-models-yaml), and its first container
refuses an entry without a hash. Refuses to read lists.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Final

from edge_llm.catalogue.manifest import ModelEntry
from edge_llm.catalogue.resolve import is_path
from edge_llm.errors import ConfigError
from edge_llm.plan.sizes import KnownModel

OWN_LIST: Final = "own-models-yaml"
_OR: Final = (
    f"make the image from that list and import it on every board, or name {OWN_LIST} among the components, which puts "
    "that list into what is rendered"
)


def check_same(name: str, known: Mapping[str, ModelEntry], model: KnownModel, where: str) -> None:
    """Raises ConfigError where what is known of the model, `where` it was read, is of another file than the list's."""
    entry = known.get(name)
    if entry is None:
        return
    is_other_size = entry.size is not None and entry.size != model.file_bytes
    if is_other_size or (entry.sha256 and model.sha256 and entry.sha256 != model.sha256):
        size = "" if entry.size is None else f" of {entry.size:,} bytes"
        sha256 = f" (sha256 {model.sha256})" if not is_other_size else ""
        raise ConfigError(
            f"{where} is of another model than {name}: of {model.file or 'a file'} with {model.file_bytes:,} bytes"
            f"{sha256}, where the list of models has {entry.file}{size}. Give that of {name}, or name the model that "
            "you mean"
        )


def remarks(
    name: str, listed: Mapping[str, ModelEntry], list_file: str, model: KnownModel, where: str
) -> Iterable[str]:
    """What stands between a rendering and workers that start, for people. `listed`: what `list_file` has, without what
    was pinned on this machine only."""
    if is_path(name):
        if model.file and model.file != PurePath(name).name:
            yield f"sizes are of {model.file} ({where}), workers load {name}: they are right if that is the same file"
        return
    entry = listed.get(name)
    if entry is None:
        near = difflib.get_close_matches(name.lower(), listed, n=1, cutoff=0.5)
        yield (
            f"workers would refuse to start: {name} is not in {list_file}"
            f"{f', did you mean {near[0]}?' if near else '.'} Write an entry there, with its hash, then {_OR}; or name "
            "the path of the file on the boards"
        )
        return
    if entry.sha256 is None:
        yield (
            f"workers would refuse to start: {name} has no sha256 in {list_file}. Before `kubectl apply`: "
            f"`edge-llm models pin {name} --write {shlex.quote(list_file)}`, then {_OR}"
        )
    if entry.size is None and model.file and model.file != entry.file:
        yield f"sizes are of {model.file} ({where}), workers load {entry.file}: they are right if that is the same file"
