"""`edge-llm bench turns`: the second turn of a conversation, on KV that was kept."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from edge_llm.commands.local_cluster import local_cluster
from edge_llm.commands.measuring import (
    check_option,
    command_line,
    finish,
    json_option,
    output_option,
    quick_option,
    steps,
    until_interrupted,
)
from edge_llm.config import DEFAULT_MODEL


@click.command()
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Name in models.yaml or path of a .gguf file.")
@click.option("--repetitions", type=click.IntRange(1, 100), help="Conversations (default 5, quick 1).")
@quick_option
@check_option
@output_option
@json_option
def turns(model: str, repetitions: int | None, quick: bool, check: bool, output: Path, as_json: bool) -> None:
    """Time to first token of a second turn (1,000 + 128 + 50 tokens, split), its tokens beside those of a cold run."""
    from edge_llm.bench.models import local_model
    from edge_llm.bench.run import Run
    from edge_llm.bench.turns import Plan, figures, measure, missed
    from edge_llm.catalogue.gguf import read_card

    count = repetitions or (1 if quick else 5)
    run = Run("turns", command_line(), {"repetitions": count}, folder=output)
    with steps() as report:
        chosen = local_model(model, report)
        plan = Plan(count, read_card(chosen.path).vocab_size)
        wanted = str(chosen.path) if model.endswith(".gguf") else model
        found, is_complete = until_interrupted(
            lambda: asyncio.run(measure(plan, chosen, lambda layout: local_cluster(layout, wanted), run, report)),
            lambda: figures(run),
        )
    finish(run, found, is_complete, output, as_json, missed(found) if check else [])
