"""The model that a description of a cluster means: where its sizes are read, and whether workers will take it.

Owns looking for its file, or for what a board said of it, and reading the list of models. What is said of either is
edge_llm/plan's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edge_llm.errors import CatalogueError, ConfigError

if TYPE_CHECKING:
    from edge_llm.plan.description import Description
    from edge_llm.plan.sizes import KnownModel

_MIB: Final = 1 << 20


def known_model(described: Description) -> tuple[KnownModel, list[str]]:
    """Its sizes, and what is worth knowing. Raises ConfigError for a file of another model than the list's and for a
    context that is longer than the model's; CatalogueError where nothing is known of it."""
    from edge_llm.catalogue.manifest import load_listed, load_manifest, manifest_path
    from edge_llm.plan.listed import check_same, remarks
    from edge_llm.plan.sizes import check_context

    model, where = _sizes(described)
    check_same(described.model, load_manifest(), model, where)
    check_context(described.model, model, described.settings.n_ctx)
    return model, list(remarks(described.model, load_listed(), str(manifest_path()), model, where))


def list_of_models() -> str:
    """The list itself, for components/own-models-yaml."""
    from edge_llm.catalogue.manifest import manifest_path

    return manifest_path().read_text()


def _sizes(described: Description) -> tuple[KnownModel, str]:
    """Of the file named, of what a board said, or of the file in the cache; and which of them it was."""
    from edge_llm.catalogue.fetch import installed_path
    from edge_llm.catalogue.gguf import read_card
    from edge_llm.catalogue.resolve import find, is_path
    from edge_llm.plan.sizes import from_card, from_facts

    if described.gguf is not None:
        return from_card(read_card(described.gguf), described.policy), f"gguf: {described.gguf}"
    if described.facts is not None:
        where = f"facts: {described.facts}"
        return from_facts(_facts(described.facts), described.policy, str(described.facts)), where
    if is_path(described.model):
        raise ConfigError(
            f"{described.model} is where the model lies on the boards: say with gguf: FILE where it lies here, or with "
            f"facts: FILE.json what `edge-llm models show {described.model} --json` says there"
        )
    entry = find(described.model)
    path = installed_path(entry)
    if path.is_file():
        return from_card(read_card(path), described.policy), str(path)
    size = f"Known is its file's size, {entry.size / _MIB:,.0f} MiB. " if entry.size else ""
    get = "pull" if entry.sha256 else "pin"
    raise CatalogueError(
        f"{entry.name} is not on this machine, and how much KV a token takes stands only in the file's header. {size}"
        f"Make it known: `edge-llm models {get} {entry.name}` here; or, where it is already, `edge-llm models show "
        f"{entry.name} --json > model.json`, and facts: model.json in the description"
    )


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the facts {path}: {error}") from error
    if not isinstance(facts, dict):
        raise ConfigError(f"{path} is not what `edge-llm models show MODEL --json` prints")
    return facts
