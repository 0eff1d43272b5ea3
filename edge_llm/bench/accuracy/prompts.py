"""Prompts as modules: system, task, examples, format; each named, hashed, and to be swapped. Pure.

Owns how modules and items become the text that a model reads. Refuses to know tasks, files and models.
A format names fields of an item in braces ({question}, {choices}); what it says is all that an item may show, so that
the answer is never in it. The record keeps every module's text with the hash, so that a figure can be made again.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

from edge_llm.bench.accuracy.items import Item
from edge_llm.errors import ConfigError

ModuleKind = Literal["system", "task", "examples", "format"]
KINDS: Final[tuple[ModuleKind, ...]] = get_args(ModuleKind)
LETTERS: Final = string.ascii_uppercase
_BETWEEN: Final = "\n\n"


@dataclass(frozen=True, slots=True)
class Module:
    """One part of a prompt. `sha256` is of its text alone: two names of the same text have the same hash."""

    kind: ModuleKind
    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name, "sha256": self.sha256, "text": self.text}


@dataclass(frozen=True, slots=True)
class Prompt:
    """The modules of one task. Absent ones are empty texts; without a format the item's own question is shown."""

    modules: tuple[Module, ...] = ()

    def text(self, kind: ModuleKind) -> str:
        return next((module.text for module in self.modules if module.kind == kind), "")

    def swapped(self, module: Module) -> Prompt:
        rest = tuple(known for known in self.modules if known.kind != module.kind)
        return replace(self, modules=(*rest, module))

    @property
    def sha256(self) -> str:
        """Of all modules, in the order of KINDS."""
        return hashlib.sha256("\0".join(self.text(kind) for kind in KINDS).encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "modules": [module.facts() for module in self.modules]}


def shown(item: Item, layout: str) -> str:
    """One item without its answer. Raises ConfigError when the layout names a field that this item does not have."""
    fields = {**item.fields, "choices": lettered(item.choices)}
    try:
        return (layout or "{question}").format_map(fields)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"the format {layout!r} does not fit item {item.id}: {error}; its fields are {', '.join(sorted(fields))}"
        ) from error


def context(prompt: Prompt, item: Item, examples: Sequence[tuple[Item, str]], *, with_system: bool = True) -> str:
    """Everything before the answer. `examples` are items with their answers as they would be said, blank first."""
    layout = prompt.text("format")
    parts = [prompt.text("system") if with_system else "", _filled(prompt.text("task"), item), prompt.text("examples")]
    parts += [shown(example, layout) + answer for example, answer in examples]
    parts.append(shown(item, layout))
    return _BETWEEN.join(part for part in parts if part)


def lettered(choices: Sequence[str]) -> str:
    """`A. ...` one a line."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def _filled(text: str, item: Item) -> str:
    """A task's words may name the item's subject."""
    return text.replace("{subject}", item.fields.get("subject", "").replace("_", " "))


def module_facts(prompts: Mapping[str, Prompt]) -> dict[str, Any]:
    """For the record's configuration."""
    return {task: prompt.facts() for task, prompt in prompts.items()}
