"""Data sets in a folder -> items. One folder for each set, files as their READMEs describe them.

Owns file names, fields and their caveats; every reader names the file, line and field it stumbles over. Refuses to
know prompts and scores. Texts are used as they are, but for HellaSwag, whose WikiHow marks the usual harness removes.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edge_llm.bench.accuracy.items import Instruction, Item
from edge_llm.errors import ConfigError

Row = Mapping[str, Any]
Reader = Callable[[int, Row], Item]  # of a row and its number in the file, from 0


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


def arc(_number: int, row: Row) -> Item:
    return Item(row["id"], {"question": row["question"]}, tuple(row["choices"]), (row["answer"],))


def hellaswag(_number: int, row: Row) -> Item:
    choices = tuple(unmarked(choice) for choice in row["choices"])
    return Item(row["id"], {"question": unmarked(row["question"])}, choices, (row["answer"],))


def unmarked(text: str) -> str:
    """Without [header], [title] and [step], as lm-eval has it, but for blanks that these leave at the beginning."""
    plain = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return plain.replace("  ", " ").strip()


def piqa(number: int, row: Row) -> Item:
    """The query begins with `Question: ` and ends with a newline: the format has both."""
    question = row["query"].removeprefix("Question: ").rstrip("\n")
    return Item(f"piqa/{number}", {"question": question}, tuple(row["choices"]), (row["gold"],))


def boolq(number: int, row: Row) -> Item:
    """The query is laid out already, passage and question; copies differ in whether `Answer:` ends it."""
    question = row["query"].rstrip().removesuffix("\nAnswer:")
    return Item(f"boolq/{number}", {"question": question}, tuple(row["choices"]), (row["gold"],))


def winogrande(number: int, row: Row) -> Item:
    """One continuation behind two contexts."""
    contexts = tuple(row["context_options"])
    choices = (row["continuation"],) * len(contexts)
    return Item(f"winogrande/{number}", {"question": ""}, choices, (row["gold"],), contexts=contexts)


def mmlu(_number: int, row: Row) -> Item:
    fields = {"question": row["question"].strip(), "subject": row["subject"]}
    return Item(row["id"], fields, tuple(map(str, row["choices"])), (row["answer"],))


def truthfulqa(number: int, row: Row) -> Item:
    """The best answer first, then the other correct ones, then the incorrect ones; `gold` are the correct ones.

    The authors' own choices (mc_task.json) are another file: these are made of the lists in the CSV."""
    best = row["Best Answer"].strip()
    right = [best, *(text for text in _listed(row["Correct Answers"]) if text != best)]
    wrong = [text for text in _listed(row["Incorrect Answers"]) if text not in right]
    fields = {"question": row["Question"].strip()}
    return Item(f"truthfulqa/{number}", fields, (*right, *wrong), tuple(range(len(right))))


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(";") if part.strip()))


def lambada(number: int, row: Row) -> Item:
    return Item(f"lambada/{number}", {"question": row["context"].rstrip()}, answer=row["continuation"].strip())


def gsm8k(number: int, row: Row) -> Item:
    """`answer` is the whole solution: shown in examples, its last number compared."""
    return Item(f"gsm8k/{number}", {"question": row["question"]}, answer=row["answer"])


def ifeval(_number: int, row: Row) -> Item:
    instructions = tuple(
        Instruction(name, {key: value for key, value in arguments.items() if value is not None})
        for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True)
    )
    return Item(f"ifeval/{row['key']}", {"question": row["prompt"]}, instructions=instructions)


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
    """Raises ConfigError naming the file, the line and what is wrong there."""
    rows = _csv_rows(path) if path.suffix == ".csv" else _json_rows(path)
    items = [_item(f"{path}, line {line}", reader, number, row) for number, (line, row) in enumerate(rows)]
    if not items:
        raise ConfigError(f"{path} has no items")
    return items


def _item(place: str, reader: Reader, number: int, row: Row) -> Item:
    try:
        item = reader(number, row)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{place} is not laid out as this task needs it: {type(error).__name__} {error}") from error
    for index in item.gold:
        if not isinstance(index, int):
            raise ConfigError(f"{place}, item {item.id}: the right answer is {index!r}, not the index of a choice")
        if not 0 <= index < len(item.choices):
            raise ConfigError(f"{place}, item {item.id}: the right answer is not one of {len(item.choices)} choices")
    return item


def _json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows and their lines."""
    for line, text in enumerate(_text(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{path}, line {line} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {line} is not a JSON object")
        yield line, row


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows and their last lines: a cell may have several."""
    rows = csv.DictReader(io.StringIO(_text(path), newline=""))
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise ConfigError(f"{path} is not CSV after line {rows.line_num}: {error}") from error


def content(path: Path) -> bytes:
    """Raises ConfigError when there is none."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _text(path: Path) -> str:
    try:
        return content(path).decode("utf-8")  # as it is: no newline is changed
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
