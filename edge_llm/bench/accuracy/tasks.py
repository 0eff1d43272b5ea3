"""The tasks: what each is asked with, and how an item of it becomes a request. Pure.

Owns the table of tasks with their default prompts, and the layout of requests. Prompts follow lm-eval's where it has
the task; what differs is said in `note`, and the record keeps every text. Refuses to know files, processes and scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from edge_llm.bench.accuracy.items import Item, examples_of
from edge_llm.bench.accuracy.prompts import LETTERS, Module, Prompt, context
from edge_llm.errors import ConfigError

TaskKind = Literal["choice", "letter", "partial", "truth", "last_word", "number", "instructions", "text"]
GENERATED: Final[tuple[TaskKind, ...]] = ("number", "instructions")
NO_PROMPT: Final = Prompt()


@dataclass(frozen=True, slots=True)
class Task:
    """One task. `source` names its data; `max_tokens` and `stop` are of answers that are generated."""

    name: str
    kind: TaskKind
    prompt: Prompt = NO_PROMPT
    source: str = ""
    max_tokens: int = 0
    stop: tuple[str, ...] = ()
    note: str = ""

    @property
    def is_generated(self) -> bool:
        return self.kind in GENERATED


@dataclass(frozen=True, slots=True)
class Pool:
    """Items to show with their answers, of all subjects."""

    items: tuple[Item, ...]
    shots: int
    seed: int

    def examples(self, item: Item) -> list[Item]:
        """The same ones for every item, or for every item of a subject: what begins alike is computed once."""
        subject = item.fields.get("subject")
        if subject is None:
            return examples_of(self.items, self.shots, self.seed)
        return [one for one in self.items if one.fields.get("subject") == subject][: self.shots]


def _prompt(**texts: str) -> Prompt:
    """Modules by kind; their names are the task's own."""
    return Prompt(tuple(Module(kind, "default", text) for kind, text in texts.items()))  # type: ignore[arg-type]


_QUESTION: Final = "Question: {question}\nAnswer:"
# No number in it: small models would answer with that.
_STEPS: Final = "Solve the problem step by step. On the last line write #### and then the result as a number."
# The examples that the authors of TruthfulQA show before every question (Lin et al. 2022, Apache-2.0).
_TRUTHFUL: Final = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain."""
_STOP: Final = ("Question:", "\n\n\n")

_ALL: Final = (
    Task("own_choice", "choice", _prompt(format=_QUESTION), note="40 questions of our own: ranks nothing"),
    Task("own_prose", "text", note="a page of our own: compare quantizations of one model only"),
    Task("own_arithmetic", "number", _prompt(task=_STEPS, format=_QUESTION), max_tokens=160, stop=_STOP),
    Task("own_instructions", "instructions", _prompt(format="{question}"), max_tokens=160),
    Task("wikitext", "text", note="wikitext-2 raw, test split; llama-perplexity's windows"),
    Task("arc_easy", "choice", _prompt(format=_QUESTION), note="examples come from the same split"),
    Task("arc_challenge", "choice", _prompt(format=_QUESTION), note="examples come from the same split"),
    Task("hellaswag", "choice", _prompt(format="{question}"), note="1,000 rows, without the activity's label"),
    Task("piqa", "choice", _prompt(format=_QUESTION)),
    Task("winogrande", "partial", _prompt(format="{question}"), note="partial scoring: the end behind either name"),
    Task(
        "mmlu",
        "letter",
        _prompt(
            task="The following are multiple choice questions (with answers) about {subject}.",
            format="{question}\n{choices}\nAnswer:",
        ),
        note="the snapshot of 2020-09-08",
    ),
    Task(
        "truthfulqa",
        "truth",
        _prompt(examples=_TRUTHFUL, format="Q: {question}\nA:"),
        note="choices made of the lists in the CSV, not the authors' mc_task.json",
    ),
    Task("boolq", "choice", _prompt(format="{question}\nAnswer:"), note="62 % of the answers are yes"),
    Task("lambada", "last_word", _prompt(format="{question}")),
    Task("gsm8k", "number", _prompt(task=_STEPS, format=_QUESTION), max_tokens=256, stop=_STOP),
    Task(
        "ifeval",
        "instructions",
        _prompt(format="{question}"),
        max_tokens=512,
        note="answers of at most 512 tokens; the language of an answer is not checked",
    ),
)
TASKS: Final[Mapping[str, Task]] = {task.name: replace(task, source=task.name) for task in _ALL}
OWN: Final = tuple(name for name in TASKS if name.startswith("own_"))


def chosen(names: Sequence[str]) -> list[Task]:
    """Raises ConfigError with the known names."""
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ConfigError(f"unknown task {unknown[0]!r}: known are {', '.join(TASKS)}")
    return [TASKS[name] for name in dict.fromkeys(names)]


def pairs(task: Task, item: Item, examples: Sequence[Item]) -> list[list[str]]:
    """[context, continuation] of everything whose log-likelihood is asked for."""
    shown = [(example, _said(task, example)) for example in examples]
    if task.kind == "partial":
        texts = [replace(item, fields={**item.fields, "question": text}) for text in item.contexts]
        return [[context(task.prompt, one, shown), f" {end}"] for one, end in zip(texts, item.choices, strict=True)]
    before = context(task.prompt, item, shown)
    if task.kind == "letter":
        return [[before, f" {LETTERS[index]}"] for index in range(len(item.choices))]
    if task.kind == "last_word":
        return [[before, f" {item.answer}"]]
    return [[before, f" {choice}"] for choice in item.choices]


def asked(task: Task, item: Item, examples: Sequence[Item]) -> tuple[str, str]:
    """System text and prompt of an answer that is generated."""
    shown = [(example, _said(task, example)) for example in examples]
    return task.prompt.text("system"), context(task.prompt, item, shown, with_system=False)


def _said(task: Task, item: Item) -> str:
    """The right answer as it stands behind an example."""
    match task.kind:
        case "letter":
            return f" {LETTERS[item.gold[0]]}"
        case "number" | "last_word":
            return f" {item.answer}"
        case "partial":
            return f"{item.contexts[item.gold[0]]} {item.choices[0]}"
        case "choice" | "truth":
            return f" {item.choices[item.gold[0]]}"
        case _:
            raise ConfigError(f"{task.name} has no examples with answers: use --shots 0 for it")
