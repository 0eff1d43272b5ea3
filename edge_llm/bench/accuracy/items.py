"""What is asked: items of all kinds of tasks in one shape, and drawing some of them. Pure.

Owns the words. Refuses to know files (datasets.py), prompts and what an answer is worth (grading.py).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Instruction:
    """Something an answer must keep to: IFEval's id and its arguments."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Item:
    """One item. `fields` are what a format may show. `gold` are the indexes of right choices; `answer` is what a
    generated answer is compared with; `contexts` replace the shown text, one for each choice (WinoGrande)."""

    id: str
    fields: Mapping[str, str]
    choices: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()
    answer: str = ""
    contexts: tuple[str, ...] = ()
    instructions: tuple[Instruction, ...] = ()


def drawn(items: Sequence[Item], limit: int, seed: int) -> list[Item]:
    """At most `limit` items (0: all), the same for the same seed, in the order of the file."""
    if not limit or limit >= len(items):
        return list(items)
    kept = sorted(random.Random(seed).sample(range(len(items)), limit))
    return [items[index] for index in kept]


def examples_of(pool: Sequence[Item], shots: int, seed: int) -> list[Item]:
    """Items to show with their answers, drawn apart from those that are asked."""
    return random.Random(f"{seed} examples").sample(list(pool), min(shots, len(pool)))
