"""`edge-llm bench accuracy`: tasks asked of models in child processes, item by item; every finished item is a case.

Owns the order of work and what a case says. Refuses to know llama.cpp (a child scores: edge_llm/engine/score.py), what
an answer is worth (grading.py) and what figures mean (figures.py).

A case that was measured before under the same model, prompt, setup, data and build is taken over, not measured again
(`known`). An item that fails is a case that says so; a model whose process is gone is a failure of the run, and the
next one follows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Protocol

from edge_llm.bench.accuracy import grading
from edge_llm.bench.accuracy.datasets import SOURCES, TEXTS, content, read, wiki_text
from edge_llm.bench.accuracy.figures import Cosines, figures
from edge_llm.bench.accuracy.items import Item, drawn, examples_of
from edge_llm.bench.accuracy.tasks import OWN, Pool, Task, asked, pairs
from edge_llm.bench.engine import BenchModel
from edge_llm.bench.processes import MeasureFailed, Measurer
from edge_llm.bench.record import Process
from edge_llm.bench.run import Run
from edge_llm.errors import ConfigError, EdgeLLMError

SCORE: Final = "edge_llm.engine.score"
OWN_DATA: Final = Path(__file__).parent.parent / "data" / "accuracy"
# An answer of 512 tokens at a token a second, and as long again.
_DEADLINE_S: Final = 1200.0
# Items are known by their place in a file, and a build computes in its own way: another file or build, another thing.
_KEY: Final = (
    *("model_sha256", "task", "item", "prompt_sha256", "setup", "reference_sha256"),
    *("data_sha256", "build_sha256"),
)

Facts = dict[str, Any]
Progress = Callable[[str, int, int], None]
Key = tuple[str, ...]


class Child(Protocol):
    """A process that scores (bench/processes.py: Measurer)."""

    facts: dict[str, Any]

    @property
    def pid(self) -> int: ...

    def ask(self, operation: str, deadline_s: float = ..., **arguments: object) -> dict[str, Any]: ...

    def usage(self) -> Process | None: ...


Start = Callable[[BenchModel], AbstractContextManager[Child]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to ask, and how. `window` tokens each, `windows` of them (0: all); `limit` items of a task (0: all)."""

    tasks: tuple[Task, ...]
    data: Path | None = None
    limit: int = 100
    shots: int = 0
    seed: int = 0
    window: int = 512
    windows: int = 20
    n_ctx: int = 2048
    slots: int = 4
    threads: int = 1
    policy: str = "exact"
    k_type: str = "f16"
    is_chat: bool = True
    cores: tuple[int, ...] = ()

    def setup(self, task: Task, is_chat: bool) -> str:
        """What a case depends on beside model, prompt and item."""
        engine = f"policy {self.policy}, K {self.k_type}"
        if task.kind == "text":
            return f"{engine}, windows of {self.window_of(task)}"
        words = f"{engine}, {self.shots} shots"
        if self.shots:
            words += f" of seed {self.seed}"
        if task.is_generated:
            words += f", {'chat' if is_chat else 'plain'}, {task.max_tokens} tokens"
        return words

    @property
    def batch(self) -> int:
        """Answers at once: in policy `exact` they do not depend on each other, elsewhere each is written alone."""
        return self.slots if self.policy == "exact" else 1

    def window_of(self, task: Task) -> int:
        """Our own page has three windows of 256."""
        return min(self.window, 256) if task.name in OWN else self.window


@dataclass(slots=True)
class Measured:
    """What is known so far. `facts`: what each model's process said of itself, by the model's name."""

    run: Run
    known: Mapping[Key, Facts] = field(default_factory=dict)
    cases: list[Facts] = field(default_factory=list)
    facts: dict[str, Facts] = field(default_factory=dict)

    def add(self, case: Facts) -> None:
        self.cases.append(case)
        self.run.case(case)

    def taken_over(self, head: Mapping[str, Any]) -> bool:
        """Whether this was measured before; it is a case of this run then, too."""
        if (known := self.known.get(key_of(head))) is None:
            return False
        self.add({**known, **head})
        return True


@dataclass(frozen=True, slots=True)
class _Asked:
    """One model, one task. `data_sha256`: of its files, `build_sha256`: of what the child says of its llama.cpp."""

    plan: Plan
    model: BenchModel
    task: Task
    child: Child
    data_sha256: str
    build_sha256: str

    @property
    def is_chat(self) -> bool:
        return self.plan.is_chat and bool(self.child.facts.get("has_chat_template"))

    def head(self, item: str) -> Facts:
        """The beginning of a case."""
        name, task = self.model.facts.name, self.task
        return {
            "case": f"{name}/{task.name}/{item}",
            "model": name,
            "model_sha256": self.model.facts.sha256,
            "task": task.name,
            "item": item,
            "prompt_sha256": task.prompt.sha256,
            "setup": self.plan.setup(task, self.is_chat),
            "data_sha256": self.data_sha256,
            "build_sha256": self.build_sha256,
        }


def key_of(case: Mapping[str, Any]) -> Key:
    """What two measurements of the same thing have in common."""
    return tuple(str(case.get(name, "")) for name in _KEY)


def scorer(plan: Plan) -> Start:
    """Children as this plan wants them."""

    def start(model: BenchModel) -> Measurer:
        arguments = ["--model", str(model.path), "--n-ctx", str(plan.n_ctx), "--slots", str(plan.slots)]
        arguments += ["--threads", str(plan.threads), "--policy", plan.policy, "--k-type", plan.k_type]
        return Measurer(f"score {model.facts.name}", SCORE, arguments, plan.cores)

    return start


def measure(
    plan: Plan,
    models: Sequence[BenchModel],
    reference: BenchModel | None,
    start: Start,
    found: Measured,
    progress: Progress,
    scratch: Path,
    cosines: Cosines | None = None,
) -> Facts:
    """All tasks of all models, the reference first. `scratch`: a folder for one window's logits."""
    order = sorted(models, key=lambda model: model is not reference)
    found.run.models += [model.facts for model in order]
    for model in order:
        try:
            _model(plan, model, reference if reference is not model else None, start, found, progress, scratch)
        except (EdgeLLMError, OSError) as error:
            found.run.fail(f"accuracy of {model.facts.name}", str(error))
    return figures(found.cases, reference.facts.name if reference else None, cosines)


def check_data(plan: Plan) -> dict[str, Path]:
    """Files of all tasks, by name of the task. Raises ConfigError before anything long starts."""
    found = {task.name: _path(plan, task.name, _file(task)) for task in plan.tasks}
    for task in plan.tasks:
        if plan.shots and task.kind == "instructions":
            raise ConfigError(f"{task.name} has no examples with answers: leave it out, or use --shots 0")
        if task.kind != "text":
            items_of(plan, task)
        elif plan.window_of(task) > plan.n_ctx:
            raise ConfigError(f"a window of {plan.window_of(task)} tokens does not fit into a context of {plan.n_ctx}")
    return found


def items_of(plan: Plan, task: Task) -> tuple[list[Item], Pool]:
    """Items to ask, and those to show. Where a set has no others to show, they are drawn first and not asked."""
    source = SOURCES[task.source]
    items = read(_path(plan, task.name, source.file), source.read)
    if not plan.shots:
        return drawn(items, plan.limit, plan.seed), Pool((), 0, plan.seed)
    if source.examples:
        pool = tuple(read(_path(plan, task.name, source.examples), source.read))
    else:
        pool = tuple(examples_of(items, plan.shots, plan.seed))
        shown = {item.id for item in pool}
        count, items = len(items), [item for item in items if item.id not in shown]
        if not items:
            raise ConfigError(
                f"--shots {plan.shots} leaves nothing to ask of {task.name}: it has {count} items, "
                "and those that are shown are not asked"
            )
    return drawn(items, plan.limit, plan.seed), Pool(pool, plan.shots, plan.seed)


def _data_sha256(plan: Plan, task: Task) -> str:
    """Of the items, and of the examples where some are shown."""
    files = [_file(task)]
    if plan.shots and task.kind != "text" and (examples := SOURCES[task.source].examples):
        files.append(examples)
    digests = [sha256(content(_path(plan, task.name, file))).hexdigest() for file in files]
    return digests[0] if len(digests) == 1 else sha256(" ".join(digests).encode()).hexdigest()


def _build_sha256(build: Mapping[str, str]) -> str:
    return sha256(json.dumps(build, sort_keys=True).encode()).hexdigest()


def _file(task: Task) -> str:
    return TEXTS[task.source] if task.kind == "text" else SOURCES[task.source].file


def _path(plan: Plan, task: str, file: str) -> Path:
    folder = OWN_DATA if task in OWN else plan.data
    if folder is None:
        raise ConfigError(f"{task} needs data: give the folder of data sets with --data (it holds {file})")
    if not (folder / file).is_file():
        raise ConfigError(f"{task} needs {file} in {folder}: there is no such file")
    return folder / file


def _model(
    plan: Plan,
    model: BenchModel,
    reference: BenchModel | None,
    start: Start,
    found: Measured,
    progress: Progress,
    scratch: Path,
) -> None:
    progress(f"{model.facts.name}: loading", 0, 0)
    with start(model) as child:
        build = child.facts.get("build", {})
        found.facts[model.facts.name] = child.facts
        found.run.engine(f"edge_llm on {model.facts.name}", build | {"policy": plan.policy})
        try:
            with found.run.watching({f"score {model.facts.name}": child.pid}, part=model.facts.name):
                for task in plan.tasks:
                    try:
                        one = _Asked(plan, model, task, child, _data_sha256(plan, task), _build_sha256(build))
                        _task(one, reference, start, found, progress, scratch)
                    except EdgeLLMError as error:
                        if child.usage() is None:
                            raise
                        found.run.fail(f"{task.name} of {model.facts.name}", error.message)
        finally:
            found.run.used(child.usage())


def _task(
    one: _Asked, reference: BenchModel | None, start: Start, found: Measured, progress: Progress, scratch: Path
) -> None:
    if one.task.kind == "text":
        _windows(one, reference, start, found, progress, scratch)
    elif one.task.is_generated:
        _answers(one, found, progress)
    else:
        _scores(one, found, progress)


def _scores(one: _Asked, found: Measured, progress: Progress) -> None:
    items, pool = items_of(one.plan, one.task)
    for number, item in enumerate(items):
        progress(f"{one.model.facts.name}: {one.task.name}", number, len(items))
        head = one.head(item.id)
        if found.taken_over(head):
            continue
        answer = _ask(one, "score", pairs=pairs(one.task, item, pool.examples(item)))
        found.add(head | (_graded(one.task, item, answer) if "failed" not in answer else answer))


def _graded(task: Task, item: Item, answer: Facts) -> Facts:
    scores = answer["scores"]
    if task.kind == "truth":
        return grading.truth(item, scores)
    if task.kind == "last_word":
        return grading.last_word(scores[0])
    return grading.choice(item, scores)


def _answers(one: _Asked, found: Measured, progress: Progress) -> None:
    items, pool = items_of(one.plan, one.task)
    left = [item for item in items if not found.taken_over(one.head(item.id))]
    done = len(items) - len(left)
    size = one.plan.batch
    for at in range(0, len(left), size):
        batch = left[at : at + size]
        progress(f"{one.model.facts.name}: {one.task.name}", done + at, len(items))
        for item, answer in zip(batch, _generated(one, batch, pool), strict=True):
            found.add(one.head(item.id) | _answered(one.task, item, answer))


def _generated(one: _Asked, batch: Sequence[Item], pool: Pool) -> list[Facts]:
    """Answers of a batch; when it fails, of each alone: one that is too long takes no other with it."""
    requests = [asked(one.task, item, pool.examples(item)) for item in batch]
    answer = _ask(
        one,
        "generate",
        prompts=[prompt for _, prompt in requests],
        system=requests[0][0],
        max_tokens=one.task.max_tokens,
        stop=list(one.task.stop),
        is_chat=one.is_chat,
    )
    if "failed" not in answer:
        return list(answer["answers"])
    return [answer] if len(batch) == 1 else [each for item in batch for each in _generated(one, [item], pool)]


def _answered(task: Task, item: Item, answer: Facts) -> Facts:
    if "failed" in answer:
        return answer
    grade = grading.number if task.kind == "number" else grading.instructions
    return {**answer, **grade(item, answer["text"])}


def _windows(
    one: _Asked,
    reference: BenchModel | None,
    start: Start,
    found: Measured,
    progress: Progress,
    scratch: Path,
) -> None:
    """Windows of a long text; with a reference, its process computes each one first and lays its logits down."""
    tokens = one.plan.window_of(one.task)
    path = _path(one.plan, one.task.name, TEXTS[one.task.source])
    text, logits = wiki_text(path.parent, path.name), scratch / "logits"
    whole = one.child.ask("text", _DEADLINE_S, text=text)
    count = whole["tokens"] // tokens
    if not count:
        raise ConfigError(f"{path.name} has {whole['tokens']} tokens, less than a window of {tokens}")
    count = min(count, one.plan.windows) if one.plan.windows else count
    extra = {"reference_sha256": reference.facts.sha256} if reference else {}
    heads = [one.head(f"window/{index}") | extra for index in range(count)]
    with ExitStack() as stack:
        base: Child | None = None
        for index, head in enumerate(heads):
            progress(f"{one.model.facts.name}: {one.task.name}", index, count)
            if found.taken_over(head):
                continue
            if reference is not None:
                if base is None:
                    base = stack.enter_context(start(reference))
                    if base.ask("text", _DEADLINE_S, text=text)["ids_sha256"] != whole["ids_sha256"]:
                        raise ConfigError(
                            f"{reference.facts.name} reads {path.name} as other tokens: no divergence can be measured"
                        )
                base.ask("window", _DEADLINE_S, index=index, tokens=tokens, save=str(logits))
            against = str(logits) if reference else ""
            answer = _ask(one, "window", index=index, tokens=tokens, against=against)
            found.add(head | {key: value for key, value in answer.items() if key not in ("event", "computed_tokens")})
        if base is not None:
            found.run.used(base.usage())


def _ask(one: _Asked, operation: str, **arguments: object) -> Facts:
    """An answer, or {"failed": why}. Raises MeasureFailed when the process is gone."""
    try:
        return one.child.ask(operation, _DEADLINE_S, **arguments)
    except MeasureFailed as error:
        if one.child.usage() is None:
            raise
        return {"failed": error.message}
