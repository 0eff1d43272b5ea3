"""`edge-llm bench cluster`: the Edge paper's table: models under placements: speed, cost, accuracy, verdicts."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import click

from edge_llm.commands.cluster_places import check, subjects
from edge_llm.commands.endpoint import Address
from edge_llm.commands.in_cluster import InCluster
from edge_llm.commands.measuring import (
    command_line,
    finish,
    json_option,
    output_option,
    quick_option,
    steps,
    until_interrupted,
)
from edge_llm.config import cache_dir

FORMATS: Final = ("md", "csv", "json", "jsonl")
_TASKS: Final = (("arc_easy", "own_choice"), ("wikitext", "own_prose"))


class _Names(click.ParamType[tuple[str, ...]]):
    """`a,b`."""

    name = "NAMES"

    def convert(self, value: object, param: click.Parameter | None, context: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(name.strip() for name in str(value).split(",") if name.strip())


def _check(given: Mapping[str, Any]) -> None:
    """Raises UsageError before anything starts."""
    if given["as_json"] and given["output_format"]:
        raise click.UsageError("--json prints the whole run as one object: leave out -o")
    check(given)


def _check_inside(given: Mapping[str, Any]) -> None:
    """The Job is told where the gateway beside it is."""
    _check({**given, "url": "http://edge-llm:8080"})


@click.command("cluster", cls=InCluster, check_inside=_check_inside, context_settings={"max_content_width": 120})
@click.option(
    "--models", type=_Names(), default=(), help="Names in models.yaml or paths of .gguf files, commas between."
)
@click.option("--requantize", "kinds", type=_Names(), default=(), help="Each of them in these formats too: Q4_0,Q8_0.")
@click.option(
    "--placement", "placements", type=_Names(), default=(), metavar="NAMES", help="Default: mixed,split,auto."
)
@click.option("--url", type=Address(), help="A gateway that runs already, instead of clusters started here.")
@click.option("--workers-file", type=click.Path(path_type=Path), help="Workers that run already: the gateway's file.")
@click.option("--key-file", type=click.Path(path_type=Path), help="Their cluster key: a gateway for them starts here.")
@click.option("--api-key-file", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="A key for --url.")
@click.option("--boards", "watches_boards", is_flag=True, help="Watch the boards of all workers that --url knows.")
@click.option(
    "--requests", type=click.IntRange(1, 100_000), help="Of each row, one after another (default 10, quick 3)."
)
@click.option("--prompt-tokens", help="128 (default), uniform:64-256, normal:128,32, lognormal:128,1.")
@click.option("--answer-tokens", help="The same for answers (default 64, quick 16).")
@click.option("--tasks", type=_Names(), help="Of accuracy; `none`: none (default: arc_easy, wikitext, or our own).")
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Folder of data sets.")
@click.option("--limit", type=click.IntRange(0), help="Items of each task; 0: all (default 100, quick 10).")
@click.option("--windows", type=click.IntRange(0), help="Windows of a text; 0: all (default 8, quick 1).")
@click.option(
    "--threads", type=click.IntRange(0, 512), default=0, help="Of each worker started here; 0: cores shared out."
)
@click.option("--n-ctx", type=click.IntRange(64, 1 << 20), default=2048, show_default=True, help="Context per slot.")
@click.option("--slots", type=click.IntRange(1, 64), default=1, show_default=True, help="Of each worker started here.")
@click.option("--policy", type=click.Choice(["exact", "fast"]), default="exact", show_default=True)
@click.option("--timeout", "timeout_s", type=click.FloatRange(0.1, 86_400), default=600.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-o", "--output-format", type=click.Choice(FORMATS), help="The table on standard output.  [default: md]")
@quick_option
@output_option
@json_option
def cluster(output: Path, output_format: str | None, as_json: bool, **given: Any) -> None:
    """A row for each model, placement and board: tokens/s, latency and its parts, CPU and RAM (raw and above idle),
    heat, accuracy, perplexity, tokens per joule; and whether 5 to 12 tokens/s with less than half of CPU and RAM hold.

    \b
    Clusters started here:   --placement mixed,split,local,auto
    A gateway that runs:     --url http://HOST:8080 --placement auto,split,local [--boards to watch them]
    Workers that run:        --workers-file FILE --key-file KEY --placement node,auto,split,local  (node: each alone)
    """
    from edge_llm.bench.cluster_runs import Children, Found, facts_of, measure
    from edge_llm.bench.run import Run

    _check({**given, "as_json": as_json, "output_format": output_format})
    plan, files = _plan(given)
    run = Run("cluster", command_line(), _config(given), folder=output)
    found = Found(run)
    cache_dir().mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="cluster-", dir=cache_dir()))
    try:
        with steps() as report:

            def measured() -> dict[str, Any]:
                chosen = subjects(given, run, report)
                run.workload |= facts_of(plan, chosen) | _accuracy_facts(plan.accuracy, files)
                measure(plan, chosen, Children.of(plan, scratch), found, report)
                return _builtins(found)

            figures, is_complete = until_interrupted(measured, lambda: _builtins(found))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    kind = output_format or "md"
    finish(run, figures, is_complete, output, as_json, [], partial(show, kind=kind), kind != "md")


def show(figures: Mapping[str, Any], kind: str) -> None:
    """The table; for people with what follows from it and what its words mean."""
    import msgspec

    from edge_llm.bench.edge_table import Row
    from edge_llm.bench.edge_table_text import csv_text, markdown

    if kind == "json":
        click.echo(json.dumps(figures["rows"]))
        return
    if kind == "jsonl":
        for row in figures["rows"]:
            click.echo(json.dumps(row))
        return
    rows = msgspec.convert(figures["rows"], list[Row])
    if kind == "csv":
        click.echo(csv_text(rows), nl=False)
        return
    click.echo(markdown(rows))
    click.echo("")
    for line in figures["sentences"]:
        click.echo(line)
    click.echo("")
    for word, meaning in figures["definitions"].items():
        click.echo(f"{word}: {meaning}")


def _builtins(found: Any) -> dict[str, Any]:
    import msgspec

    figures = found.figures()
    found.run.notes += [line for line in figures.sentences if line not in found.run.notes]
    tree: dict[str, Any] = msgspec.to_builtins(figures)
    tree.pop("record", None)
    return tree


# -- what is asked for


def _config(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, without the key."""
    shown = {name: value for name, value in given.items() if name != "api_key_file" and value not in (None, ())}
    return {name: str(value) if isinstance(value, Path) else value for name, value in shown.items()}


def _plan(given: Mapping[str, Any]) -> tuple[Any, dict[str, Path]]:
    """The plan, and the files of its tasks."""
    from edge_llm.bench.accuracy.measure import check_data
    from edge_llm.bench.cluster_runs import Plan

    quick = given["quick"]
    accuracy = _accuracy(given)
    plan = Plan(
        requests=given["requests"] or (3 if quick else 10),
        prompt=_lengths("--prompt-tokens", given["prompt_tokens"] or "128"),
        answer=_lengths("--answer-tokens", given["answer_tokens"] or ("16" if quick else "64")),
        timeout_s=given["timeout_s"],
        seed=given["seed"],
        policy=given["policy"],
        accuracy=accuracy,
    )
    return plan, check_data(accuracy) if accuracy else {}


def _accuracy(given: Mapping[str, Any]) -> Any:
    """A small set: items with choices, and a text. None where none is wanted."""
    from edge_llm.bench.accuracy.datasets import SOURCES, TEXTS
    from edge_llm.bench.accuracy.measure import Plan
    from edge_llm.bench.accuracy.tasks import chosen
    from edge_llm.machine import usable_cores

    folder, quick = given["data"] or cache_dir() / "datasets", given["quick"]
    names = given["tasks"]
    if names is None:
        files = {**TEXTS, **{name: source.file for name, source in SOURCES.items()}}
        names = tuple(theirs if (folder / files[theirs]).is_file() else own for theirs, own in _TASKS)
    if names in ((), ("none",)):
        return None
    return Plan(
        tasks=tuple(chosen(names)),
        data=folder,
        limit=(10 if quick else 100) if given["limit"] is None else given["limit"],
        windows=(1 if quick else 8) if given["windows"] is None else given["windows"],
        seed=given["seed"],
        threads=usable_cores(),
        policy=given["policy"],
    )


def _accuracy_facts(plan: Any, files: Mapping[str, Path]) -> dict[str, Any]:
    """Items, prompts with their texts, files with their hashes."""
    from edge_llm.bench.accuracy.prompts import module_facts
    from edge_llm.catalogue.fetch import known_sha256

    if plan is None:
        return {"tasks": []}
    return {
        "tasks": [task.name for task in plan.tasks],
        **{key: getattr(plan, key) for key in ("limit", "windows", "window")},
        "prompts": module_facts({task.name: task.prompt for task in plan.tasks}),
        "data": {name: {"file": path.name, "sha256": known_sha256(path)} for name, path in files.items()},
    }


def _lengths(option: str, text: str) -> Any:
    from edge_llm.bench.serve.lengths import parse

    try:
        return parse(text)
    except ValueError as error:
        raise click.UsageError(f"{option}: {error}") from error
