"""`edge-llm bench gateway`: the cost of one gateway process under many streams."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from edge_llm.commands.measuring import (
    check_option,
    command_line,
    finish,
    json_option,
    on_fast_loop,
    output_option,
    quick_option,
    steps,
    until_interrupted,
)


@click.command("gateway")
@click.option("--streams", type=click.IntRange(1, 4000), default=1000, show_default=True, help="Streams at once.")
@click.option(
    "--tokens-per-s", type=click.FloatRange(0.1, 1000), default=8.0, show_default=True, help="Of each stream."
)
@quick_option
@check_option
@output_option
@json_option
def gateway_load(streams: int, tokens_per_s: float, quick: bool, check: bool, output: Path, as_json: bool) -> None:
    """Added time to first token, CPU per token and memory of the gateway, on a core of its own.

    Workers are simulated and share another core with the client, so two cores are needed.
    """
    from edge_llm.bench.gateway_load import Plan, figures, measure, missed
    from edge_llm.bench.processes import MeasureFailed, pinned
    from edge_llm.bench.run import Run
    from edge_llm.commands.supervisor import new_key
    from edge_llm.worker.tickets import KeyRing

    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise MeasureFailed("the gateway needs a core of its own, and its load another: this process may use one only")
    plan = Plan(streams, tokens_per_s, 8.0 if quick else 30.0, gateway_core=cores[-1], load_core=cores[0])
    config = {"streams": streams, "tokens_per_s": tokens_per_s, "workers": plan.workers}
    run = Run("gateway", command_line(), config, folder=output)
    key = new_key()
    keys = KeyRing.parse(key.decode(), "the bench's key")
    with steps() as report, pinned([plan.load_core]):
        found, is_complete = until_interrupted(
            lambda: on_fast_loop(measure(plan, _launcher(key), keys, run, report)), lambda: figures(run)
        )
    finish(run, found, is_complete, output, as_json, missed(found) if check else [])


def _launcher(key: bytes) -> Any:
    from edge_llm.commands.local_cluster import local_cluster
    from edge_llm.commands.supervisor import SIMULATED_MODEL

    return lambda layout, neighbours: local_cluster(layout, SIMULATED_MODEL, key=key, neighbours=neighbours)
