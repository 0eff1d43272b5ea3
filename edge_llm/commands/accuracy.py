"""`edge-llm bench accuracy`: how good, and how far from a reference: tasks, perplexity, divergence, drift."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click

from edge_llm.commands.formats import check_formats
from edge_llm.commands.measuring import (
    Report,
    check_option,
    command_line,
    finish,
    json_option,
    output_option,
    quick_option,
    steps,
    until_interrupted,
)
from edge_llm.config import DEFAULT_MODEL, cache_dir
from edge_llm.errors import ConfigError

_QUICK_ITEMS: Final = 10
_QUICK_WINDOWS: Final = 2


@click.command()
@click.option("--model", "models", multiple=True, help="Name in models.yaml or path of a .gguf file; again for more.")
@click.option("--requantize", "kinds", multiple=True, help="The first model in this format too (Q4_0, Q8_0, ...).")
@click.option("--reference", help="The model others are compared with (default: the first of several).")
@click.option("--tasks", help="Names with commas between (default: all that have data). --list shows them.")
@click.option(
    "--data", type=click.Path(path_type=Path, file_okay=False), help="Folder of data sets (default: what was fetched)."
)
@click.option("--limit", type=click.IntRange(0), help="Items of each task, drawn with the seed; 0: all (default 100).")
@click.option("--shots", type=click.IntRange(0, 64), default=0, show_default=True, help="Examples before each item.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of drawing items and examples.")
@click.option(
    "--window", type=click.IntRange(16), default=512, show_default=True, help="Tokens of a perplexity window."
)
@click.option("--windows", type=click.IntRange(0), help="Windows of a text, from its beginning; 0: all (default 20).")
@click.option(
    "--module", "swaps", multiple=True, metavar="TASK.KIND=FILE", help="A text for a part of a task's prompt."
)
@click.option("--chat/--no-chat", default=True, help="Answers by the model's chat template, if it has one.")
@click.option(
    "--drift",
    is_flag=True,
    help="Compare answers in meaning (fetches all-MiniLM-L6-v2, 107 MB once): of two models or formats, on tasks that "
    "write answers.",
)
@click.option("--resume", type=click.Path(path_type=Path, dir_okay=False), help="Lines (.cases.jsonl) to take over.")
@click.option("--policy", type=click.Choice(["exact", "fast"]), default="exact", show_default=True)
@click.option("--k-type", type=click.Choice(["f16", "f32", "bf16", "q8_0", "q4_0"]), default="f16", show_default=True)
@click.option("--n-ctx", type=click.IntRange(64, 1 << 20), default=2048, show_default=True, help="Context per slot.")
@click.option("--slots", type=click.IntRange(1, 64), default=4, show_default=True, help="Answers at once.")
@click.option("--threads", type=click.IntRange(0, 512), default=0, help="0 = all cores this process may use.")
@click.option("--list", "is_list", is_flag=True, help="Show the tasks, their data and licences, and stop.")
@click.option("--fetch", help="Fetch data sets by name (commas between) into the folder of --data, and stop.")
@click.option(
    "--against-llama-perplexity",
    "is_beside",
    is_flag=True,
    help="Ask llama-perplexity of the same build for the same windows of each text, too.",
)
@quick_option
@check_option
@output_option
@json_option
def accuracy(
    models: tuple[str, ...],
    kinds: tuple[str, ...],
    reference: str | None,
    swaps: tuple[str, ...],
    drift: bool,
    resume: Path | None,
    is_list: bool,
    fetch: str | None,
    is_beside: bool,
    check: bool,
    output: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Tasks with right answers, perplexity, divergence from a reference. Without data: a small set of our own.

    Every finished item is kept at once (.cases.jsonl); --resume goes on where a run was stopped. With --check,
    perplexity that differs from llama-perplexity's by more than 0.5 %, or divergence by more than 2 %, exits with 3."""
    from edge_llm.bench.accuracy.beside import missed
    from edge_llm.bench.accuracy.measure import Measured, check_data, measure, scorer
    from edge_llm.bench.accuracy.resume import finished
    from edge_llm.bench.run import Run

    folder = options["data"] or cache_dir() / "datasets"
    if is_list:
        _list(folder, as_json)
        return
    if fetch is not None:
        _fetch(_names(fetch), folder)
        return
    check_formats(kinds)
    _check_data_folder(options["data"], folder, options["tasks"])
    plan = _plan(folder, swaps, **options)
    _check_drift(drift, plan, {*(models or (DEFAULT_MODEL,)), *((reference,) if reference else ())}, kinds)
    beside = _beside(plan, is_beside, check)
    files = check_data(plan)
    known = finished(resume) if resume else {}
    run = Run("accuracy", command_line(), _config(plan, resume), folder=output, workload=_workload(plan, files))
    with steps() as report:
        chosen, base = _models(models or (DEFAULT_MODEL,), kinds, reference, report)
        cosines = cosines_of(report) if drift else None
        found = Measured(run, known)
        work = Path(tempfile.mkdtemp(prefix="accuracy-", dir=_cache()))

        def measured() -> dict[str, Any]:
            figures = measure(plan, chosen, base, scorer(plan), found, report, work, cosines)
            if beside is not None:
                beside.measure(chosen, base, found, figures, report, work)
            return figures

        try:
            figures, is_complete = until_interrupted(measured, lambda: _partial(found, base))
        finally:
            _remove(work)
    figures |= beside.figures() if beside is not None else {}
    figures |= _described(figures, plan, run)
    _conclude(run, found)
    finish(run, figures, is_complete, output, as_json, missed(figures) if check else [], show)


def _described(figures: Mapping[str, Any], plan: Any, run: Any) -> dict[str, Any]:
    """How the tasks were asked, what the measures mean, and what must not be overlooked."""
    from edge_llm.bench.accuracy.table import asked_of, definitions_of, rows_of, sentences_of

    tasks = asked_of(plan)
    sentences = sentences_of(tasks)
    run.notes += sentences
    return {"definitions": definitions_of(rows_of(figures)), "tasks": tasks, "sentences": sentences}


def _check_data_folder(given: Path | None, folder: Path, tasks: str | None) -> None:
    """Raises UsageError: who names a folder of data is not content with our own small set."""
    if given is None:
        return
    if not os.path.isdir(folder):  # pathlib raises where a folder may not be searched
        raise click.UsageError(f"--data {folder}: there is no such folder; --fetch NAMES --data {folder} makes it")
    if tasks is None and not _with_data(folder):
        raise click.UsageError(
            f"--data {folder} has the data of no task: `edge-llm bench accuracy --list --data {folder}` shows the file "
            "that each needs; without --data a small set of our own is asked"
        )


def _check_drift(drift: bool, plan: Any, models: Collection[str], kinds: Sequence[str]) -> None:
    """Raises UsageError where there would be nothing to compare."""
    if not drift:
        return
    if len(models) + len(set(kinds)) < 2:
        raise click.UsageError(
            "--drift compares the answers of two models: add --requantize FORMAT, or a second --model (or --reference)"
        )
    if not any(task.is_generated for task in plan.tasks):
        from edge_llm.bench.accuracy.tasks import TASKS

        written = ", ".join(name for name, task in TASKS.items() if task.is_generated)
        raise click.UsageError(f"--drift compares answers that are written: name a task with answers ({written})")


def _beside(plan: Any, is_beside: bool, check: bool) -> Any | None:
    from edge_llm.bench.accuracy.beside import Beside
    from edge_llm.bench.reference_tools import require

    if check and not is_beside:
        raise click.UsageError("--check judges what --against-llama-perplexity compares: give that, too")
    if not is_beside:
        return None
    if not any(task.kind == "text" for task in plan.tasks):
        raise click.UsageError("llama-perplexity is compared on texts: name one with --tasks (own_prose, wikitext)")
    return Beside(require("ours"), plan)


def show(figures: Mapping[str, Any]) -> None:
    """A row for each model, task and measure; how each task was asked, and what the measures mean."""
    from edge_llm.bench.accuracy.table import HEAD, definitions_of, lines_of, rows_of

    rows = rows_of(figures)
    _table([HEAD, *rows])
    for lines in (lines_of(figures), figures.get("sentences", ())):
        if lines:
            click.echo("")
            click.echo("\n".join(lines))
    click.echo("")
    for name, meaning in definitions_of(rows).items():
        click.echo(f"{name}: {meaning}")


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _plan(folder: Path, swaps: Sequence[str], **options: Any) -> Any:
    from edge_llm.bench.accuracy.measure import Plan

    is_quick = options["quick"]
    given = {key: options[key] for key in ("shots", "seed", "window", "n_ctx", "slots", "policy", "k_type")}
    limit, windows = options["limit"], options["windows"]
    return Plan(
        tasks=tuple(_tasks(options["tasks"], folder, swaps, options["shots"])),
        data=folder,
        limit=limit if limit is not None else (_QUICK_ITEMS if is_quick else 100),
        windows=windows if windows is not None else (_QUICK_WINDOWS if is_quick else 20),
        threads=options["threads"] or len(os.sched_getaffinity(0)),
        is_chat=options["chat"],
        **given,
    )


def _tasks(names: str | None, folder: Path, swaps: Sequence[str], shots: int) -> list[Any]:
    """Those named, or all whose data is there; with other texts for modules where asked for."""
    from edge_llm.bench.accuracy.tasks import chosen

    wanted = _names(names) if names is not None else _available(folder, shots)
    tasks = {task.name: task for task in chosen(wanted)}
    if not tasks:
        raise ConfigError("no task is named: `edge-llm bench accuracy --list` shows them")
    for swap in swaps:
        name, module = _module(swap)
        if name not in tasks:
            raise ConfigError(f"--module {swap}: {name} is not among the tasks of this run ({', '.join(tasks)})")
        tasks[name] = replace(tasks[name], prompt=tasks[name].prompt.swapped(module))
    return list(tasks.values())


def _available(folder: Path, shots: int) -> list[str]:
    from edge_llm.bench.accuracy.tasks import OWN, TASKS

    names = _with_data(folder) or list(OWN)  # where there is real data, ours would only look like more of it
    return [name for name in names if not (shots and TASKS[name].kind == "instructions")]


def _with_data(folder: Path) -> list[str]:
    """Tasks whose data is in this folder."""
    from edge_llm.bench.accuracy.datasets import SOURCES, TEXTS
    from edge_llm.bench.accuracy.tasks import OWN, TASKS

    files = {**TEXTS, **{name: source.file for name, source in SOURCES.items()}}
    return [name for name in TASKS if name not in OWN and (folder / files[name]).is_file()]


def _module(swap: str) -> tuple[str, Any]:
    """`TASK.KIND=FILE`."""
    from edge_llm.bench.accuracy.prompts import KINDS, Module

    where, _, file = swap.partition("=")
    task, _, kind = where.rpartition(".")
    if not file or kind not in KINDS:
        raise ConfigError(f"--module {swap}: write TASK.KIND=FILE, KIND one of {', '.join(KINDS)}")
    path = Path(file).expanduser()
    try:
        return task, Module(kind, path.stem, path.read_text(encoding="utf-8").removesuffix("\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--module {swap}: cannot read the file: {error}") from error


def _models(
    names: Sequence[str], kinds: Sequence[str], reference: str | None, report: Report
) -> tuple[list[Any], Any | None]:
    """All models, and the one that the others are compared with, if any."""
    from edge_llm.bench.models import local_model, requantized

    found = [local_model(name, report) for name in dict.fromkeys(names)]
    found += [requantized(found[0], kind, report) for kind in dict.fromkeys(kinds)]
    base = found[0] if reference is None else local_model(reference, report)
    same = next((model for model in found if model.facts.sha256 == base.facts.sha256), None)
    if same is None:
        found, same = [base, *found], base
    by_name = {model.facts.name: model for model in found}
    if len(by_name) < len(found):
        raise ConfigError("two of these files have the same name: figures are kept by it, so rename one")
    return found, same if len(found) > 1 else None


def _partial(found: Any, base: Any | None) -> dict[str, Any]:
    from edge_llm.bench.accuracy.figures import figures

    return figures(found.cases, base.facts.name if base else None)


def _conclude(run: Any, found: Any) -> None:
    """Items that failed are counted in their figures; the record says why the first of each task did."""
    seen: dict[str, list[str]] = {}
    for case in found.cases:
        if "failed" in case:
            seen.setdefault(f"{case['model']}/{case['task']}", []).append(f"{case['item']}: {case['failed']}")
    for what, why in seen.items():
        run.fail(what, f"{len(why)} items failed, the first: {why[0]}")


def _config(plan: Any, resume: Path | None) -> dict[str, Any]:
    """How it is computed."""
    keys = ("n_ctx", "slots", "threads", "policy", "k_type", "is_chat")
    return {**{key: getattr(plan, key) for key in keys}, "resumed_from": resume.name if resume else None}


def _workload(plan: Any, files: Mapping[str, Path]) -> dict[str, Any]:
    """What is asked: items, prompts with their texts, files with their hashes."""
    from edge_llm.bench.accuracy.prompts import module_facts
    from edge_llm.catalogue.fetch import known_sha256

    return {
        **{key: getattr(plan, key) for key in ("limit", "shots", "seed", "window", "windows")},
        "tasks": [task.name for task in plan.tasks],
        "notes": {task.name: task.note for task in plan.tasks if task.note},
        "prompts": module_facts({task.name: task.prompt for task in plan.tasks}),
        "data": {name: {"file": path.name, "sha256": known_sha256(path)} for name, path in files.items()},
    }


def cosines_of(report: Report) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
    from edge_llm.bench.accuracy import similarity
    from edge_llm.catalogue.fetch import fetch
    from edge_llm.catalogue.resolve import find

    def fetched(name: str) -> Path:
        return fetch(find(name), lambda done, total: report(f"fetching {name}", done, total or 0))

    return similarity.load(fetched(similarity.MODEL), fetched(similarity.TOKENIZER)).cosines


def _fetch(names: Sequence[str], folder: Path) -> None:
    from edge_llm.bench.accuracy.sources import wanted
    from edge_llm.catalogue.fetch import fetch_to
    from edge_llm.commands.progress import progress

    for entry, path in wanted(names, folder):
        with progress(entry.name, is_bytes=True) as report:
            fetch_to(entry, path, report)
        click.echo(f"{entry.name}  {path}  ({entry.licence})")


def _list(folder: Path, as_json: bool) -> None:
    from edge_llm.bench.accuracy.datasets import SOURCES, TEXTS
    from edge_llm.bench.accuracy.sources import ELSEWHERE, PUBLISHED, licence_of
    from edge_llm.bench.accuracy.tasks import OWN, TASKS

    files = {**TEXTS, **{name: source.file for name, source in SOURCES.items()}}
    rows = []
    for name, task in TASKS.items():
        is_there = name in OWN or (folder / files[name]).is_file()
        state = "ships" if name in OWN else "there" if is_there else "fetchable" if name in PUBLISHED else "missing"
        origin = ELSEWHERE[name].origin if name in ELSEWHERE else None
        row = {"task": name, "kind": task.kind, "data": state, "file": files[name], "licence": licence_of(name)}
        rows.append({**row, "note": task.note, "origin": origin})
    if as_json:
        click.echo(json.dumps(rows))
        return
    heads = ("task", "kind", "data", "file", "licence", "note", "origin")
    _table([heads, *(tuple(str(row[head] or "") for head in heads) for row in rows)])


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _cache() -> Path:
    """Not the folder for temporary files: that may be memory, and a window's logits are up to 160 MB."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    return cache_dir()


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
