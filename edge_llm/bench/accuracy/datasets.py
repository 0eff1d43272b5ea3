"""Data sets in a folder -> items. One folder for each set, files as their READMEs describe them.

Owns file names, fields and their caveats; every reader names the file, line and field it stumbles over. Refuses to
know prompts and scores. Texts are used as they are, but for HellaSwag, whose WikiHow marks the usual harness removes.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edge_llm.bench.accuracy.items import Instruction, Item
from edge_llm.errors import ConfigError

Reader = Callable[[Path], list[Item]]


@dataclass(frozen=True, slots=True)
class Source:
    """Files of one set. `examples`: where items to show come from; None: from those that are not asked."""

    file: str
    read: Reader
    examples: str | None = None


def wiki_text(folder: Path, name: str) -> str:
    """A long text, whole. llama-perplexity takes one newline from its end."""
    text = _text(folder / name)
    return text.removesuffix("\n")


def arc(path: Path) -> list[Item]:
    return [
        Item(row["id"], {"question": row["question"]}, tuple(row["choices"]), (row["answer"],)) for row in _rows(path)
    ]


def hellaswag(path: Path) -> list[Item]:
    return [
        Item(
            row["id"],
            {"question": unmarked(row["question"])},
            tuple(unmarked(choice) for choice in row["choices"]),
            (row["answer"],),
        )
        for row in _rows(path)
    ]


def unmarked(text: str) -> str:
    """Without [header], [title] and [step], as lm-eval has it, but for blanks that these leave at the beginning."""
    plain = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return plain.replace("  ", " ").strip()


def piqa(path: Path) -> list[Item]:
    """The query begins with `Question: ` and ends with a newline: the format has both."""
    return [
        Item(
            f"piqa/{number}",
            {"question": row["query"].removeprefix("Question: ").rstrip("\n")},
            tuple(row["choices"]),
            (row["gold"],),
        )
        for number, row in enumerate(_rows(path))
    ]


def boolq(path: Path) -> list[Item]:
    """The query is laid out already, passage and question; copies differ in whether `Answer:` ends it."""
    return [
        Item(
            f"boolq/{number}",
            {"question": row["query"].rstrip().removesuffix("\nAnswer:")},
            tuple(row["choices"]),
            (row["gold"],),
        )
        for number, row in enumerate(_rows(path))
    ]


def winogrande(path: Path) -> list[Item]:
    """One continuation behind two contexts."""
    return [
        Item(
            f"winogrande/{number}",
            {"question": ""},
            (row["continuation"],) * len(row["context_options"]),
            (row["gold"],),
            contexts=tuple(row["context_options"]),
        )
        for number, row in enumerate(_rows(path))
    ]


def mmlu(path: Path) -> list[Item]:
    return [
        Item(
            row["id"],
            {"question": row["question"].strip(), "subject": row["subject"]},
            tuple(map(str, row["choices"])),
            (row["answer"],),
        )
        for row in _rows(path)
    ]


def truthfulqa(path: Path) -> list[Item]:
    """The best answer first, then the other correct ones, then the incorrect ones; `gold` are the correct ones.

    The authors' own choices (mc_task.json) are another file: these are made of the lists in the CSV."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [_truthful(number, row) for number, row in enumerate(csv.DictReader(file))]
    except (OSError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _truthful(number: int, row: Mapping[str, str]) -> Item:
    best = row["Best Answer"].strip()
    right = [best, *(text for text in _listed(row["Correct Answers"]) if text != best)]
    wrong = [text for text in _listed(row["Incorrect Answers"]) if text not in right]
    fields = {"question": row["Question"].strip()}
    return Item(f"truthfulqa/{number}", fields, (*right, *wrong), tuple(range(len(right))))


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(";") if part.strip()))


def lambada(path: Path) -> list[Item]:
    return [
        Item(f"lambada/{number}", {"question": row["context"].rstrip()}, answer=row["continuation"].strip())
        for number, row in enumerate(_rows(path))
    ]


def gsm8k(path: Path) -> list[Item]:
    """`answer` is the whole solution: shown in examples, its last number compared."""
    return [
        Item(f"gsm8k/{number}", {"question": row["question"]}, answer=row["answer"])
        for number, row in enumerate(_rows(path))
    ]


def ifeval(path: Path) -> list[Item]:
    return [
        Item(
            f"ifeval/{row['key']}",
            {"question": row["prompt"]},
            instructions=tuple(
                Instruction(name, {key: value for key, value in arguments.items() if value is not None})
                for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True)
            ),
        )
        for row in _rows(path)
    ]


SOURCES: Final[Mapping[str, Source]] = {
    "arc_easy": Source("arc_easy/arc_easy_test.jsonl", arc),
    "arc_challenge": Source("arc_challenge/arc_challenge_test.jsonl", arc),
    "hellaswag": Source(
        "hellaswag_subset/hellaswag_subset_test.jsonl", hellaswag, "hellaswag_subset/hellaswag_subset_dev.jsonl"
    ),
    "piqa": Source("piqa/piqa.jsonl", piqa),
    "winogrande": Source("winogrande/winogrande.jsonl", winogrande),
    "mmlu": Source("mmlu/mmlu_test.jsonl", mmlu, "mmlu/mmlu_dev.jsonl"),
    "truthfulqa": Source("truthfulqa/TruthfulQA.csv", truthfulqa),
    "boolq": Source("boolq/boolq.jsonl", boolq),
    "lambada": Source("lambada_openai/lambada_openai.jsonl", lambada),
    "gsm8k": Source("gsm8k/test.jsonl", gsm8k, "gsm8k/train_first200.jsonl"),
    "ifeval": Source("ifeval/input_data.jsonl", ifeval),
    "own_choice": Source("choices.jsonl", arc),
    "own_arithmetic": Source("arithmetic.jsonl", gsm8k),
    "own_instructions": Source("instructions.jsonl", ifeval),
}
TEXTS: Final[Mapping[str, str]] = {"wikitext": "wikitext2_raw/wiki.test.raw", "own_prose": "prose.txt"}


def read(path: Path, reader: Reader) -> list[Item]:
    """Raises ConfigError naming the file and what is wrong with it."""
    try:
        items = reader(path)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path} is not laid out as this task needs it: {type(error).__name__} {error}") from error
    if not items:
        raise ConfigError(f"{path} has no items")
    for item in items:
        if any(not 0 <= index < len(item.choices) for index in item.gold):
            raise ConfigError(f"{path}, item {item.id}: the right answer is not one of {len(item.choices)} choices")
    return items


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number} is not a JSON object")
        yield row


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # as it is: no newline is changed
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
