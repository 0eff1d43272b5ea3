"""`edge-llm bench ...`: measure, print, and leave a record in bench_results/."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from edge_llm.commands.accuracy import accuracy
from edge_llm.commands.bench_cluster import cluster
from edge_llm.commands.bench_job import job
from edge_llm.commands.bench_serve import serve
from edge_llm.commands.claims import claims
from edge_llm.commands.compare import compare
from edge_llm.commands.faults import faults
from edge_llm.commands.gateway_load import gateway_load
from edge_llm.commands.goodput import goodput
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
from edge_llm.commands.net import net
from edge_llm.commands.node import node
from edge_llm.commands.overload import overload
from edge_llm.commands.pools import pools
from edge_llm.commands.report import report as report_of_records
from edge_llm.commands.theorem import theorem
from edge_llm.commands.turns import turns
from edge_llm.config import DEFAULT_MODEL

_PRINTED = ("record", "case", "printed")
_OWN = ("node", "net", "serve", "accuracy", "goodput", "cluster", "compare", "claims", "report")


@click.group()
def bench() -> None:
    """Measure: boards, servers, models, and what this project claims; every run leaves a record."""


@bench.command("reference-tools")
def reference_tools() -> None:
    """Build llama.cpp's own tools from the source that llama-cpp-python ships, into the cache."""
    from edge_llm.bench.reference_tools import build

    with steps() as report:
        trees = build(report)
    for tree in trees:
        click.echo(tree.folder)


@bench.command()
@click.option("--models", multiple=True, help="Models to measure (default: the default model, and it in Q4_0).")
@click.option("--core", type=int, help="Core everything is pinned to (default: the last one).")
@click.option("--repetitions", type=click.IntRange(1, 100), help="Interleaved repetitions (default 5, quick 2).")
@quick_option
@check_option
@output_option
@json_option
def engine(
    models: tuple[str, ...],
    core: int | None,
    repetitions: int | None,
    quick: bool,
    check: bool,
    output: Path,
    as_json: bool,
) -> None:
    """Prompt and decode speed as ratios to llama-bench and llama-batched-bench of the same source."""
    from edge_llm.bench.engine import Plan, figures, measure_models, missed
    from edge_llm.bench.reference_tools import TREES, require
    from edge_llm.bench.run import Run

    trees = {tree: require(tree) for tree in TREES}
    plan = Plan(core=_last_core() if core is None else core, repetitions=repetitions or (2 if quick else 5))
    config = {"core": plan.core, "repetitions": plan.repetitions, "models": list(models)}
    run = Run("engine", command_line(), config, folder=output)
    with steps() as report:
        chosen = _engine_models(models, report)
        found, is_complete = until_interrupted(
            lambda: measure_models(plan, chosen, trees, run, report),
            lambda: figures(run, [model.facts.name for model in chosen]),
        )
    finish(run, found, is_complete, output, as_json, missed(found) if check else [])


@bench.command()
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Name in models.yaml or path of a .gguf file.")
@click.option("--repetitions", type=click.IntRange(1, 100), help="Repetitions (default 5, quick 1).")
@click.option("--prompt-tokens", type=click.IntRange(256, 100_000), default=1700, show_default=True)
@click.option("--n-ctx", type=click.IntRange(1024, 1 << 20), default=4096, show_default=True, help="Context per slot.")
@click.option("--llama-server/--no-llama-server", "with_server", default=True, help="Measure llama-server beside.")
@quick_option
@check_option
@output_option
@json_option
def handoff(
    model: str,
    repetitions: int | None,
    prompt_tokens: int,
    n_ctx: int,
    with_server: bool,
    quick: bool,
    check: bool,
    output: Path,
    as_json: bool,
) -> None:
    """KV hand-off and stalls: a long prompt arrives while other streams run, on clusters started for it."""
    from edge_llm.bench.handoff import Plan, figures, measure, missed
    from edge_llm.bench.models import local_model
    from edge_llm.bench.reference_tools import require
    from edge_llm.bench.run import Run
    from edge_llm.catalogue.gguf import read_card
    from edge_llm.commands.local_cluster import llama_server, local_cluster
    from edge_llm.config import WorkerConfig

    core, tools = _last_core(), require("ours") if with_server else None
    config = {"repetitions": repetitions or (1 if quick else 5), "prompt_tokens": prompt_tokens}
    run = Run("handoff", command_line(), config, folder=output)
    if tools:
        run.engine("llama.cpp tools, tree ours", tools.facts)
    with steps() as report:
        chosen = local_model(model, report)
        plan = Plan(
            core=core,
            repetitions=repetitions or (1 if quick else 5),
            vocab_size=read_card(chosen.path).vocab_size,
            chunk_tokens=WorkerConfig().chunk_tokens,
            n_ctx=n_ctx,
            prompt_tokens=prompt_tokens,
        )
        # a name stays a name: workers then find the file that was verified already
        wanted = str(chosen.path) if model.endswith(".gguf") else model
        server = (
            (lambda _layout: llama_server(tools.tool("llama-server"), chosen.path, core, 9, n_ctx)) if tools else None
        )
        found, is_complete = until_interrupted(
            lambda: asyncio.run(
                measure(plan, chosen, lambda layout: local_cluster(layout, wanted), server, run, report)
            ),
            lambda: figures(run, plan),
        )
    finish(run, found, is_complete, output, as_json, missed(found) if check else [])


@bench.command()
@click.argument("of", type=click.Choice([*_PRINTED, *_OWN]), default="record")
def schema(of: str) -> None:
    """JSON schema of the files in bench_results/: of a record (default), of a line of the cases beside it, or of what
    a measuring command prints with --json (`printed`: what any of them does; a command's name: all that this one
    does)."""
    from edge_llm.bench.claims_runs import schema as of_claims
    from edge_llm.bench.edge_table import schema as of_cluster
    from edge_llm.bench.record import schema as published
    from edge_llm.bench.schemas import PRINTED
    from edge_llm.bench.schemas import schema as of_command
    from edge_llm.bench.serve.results import schema as of_serve
    from edge_llm.report.compare import schema as of_compare
    from edge_llm.report.document import schema as of_report

    own: dict[str, Callable[[], dict[str, Any]]] = {
        "serve": of_serve,
        "cluster": of_cluster,
        "compare": of_compare,
        "claims": of_claims,
        "report": of_report,
        **{name: partial(of_command, name) for name in PRINTED},
    }
    click.echo(json.dumps(own[of]() if of in own else published(of), indent=1))


def _engine_models(names: tuple[str, ...], report: Report) -> list[Any]:
    """The models asked for, or the default model and the same weights in Q4_0."""
    from edge_llm.bench.models import local_model, requantized

    if names:
        return [local_model(name, report) for name in names]
    default = local_model(DEFAULT_MODEL, report)
    return [default, requantized(default, "Q4_0", report)]


def _last_core() -> int:
    return max(os.sched_getaffinity(0))


_SPEED = (node, net, serve, goodput, cluster)
_CLAIMS = (claims, theorem, faults, gateway_load, turns, pools, overload)
_RECORDS = (report_of_records, compare)
for command in (*_SPEED, accuracy, *_CLAIMS, *_RECORDS, job):
    bench.add_command(command)
