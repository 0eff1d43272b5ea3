"""`edge-llm bench overload`: what becomes of requests when ten times too many come."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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


@click.command()
@click.option("--factor", type=click.FloatRange(1, 100), default=10.0, show_default=True, help="Times its capacity.")
@click.option("--wait-bound-s", type=click.FloatRange(0.05, 300), default=1.0, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True, help="Of sizes and times.")
@quick_option
@check_option
@output_option
@json_option
def overload(
    factor: float, wait_bound_s: float, seed: int, quick: bool, check: bool, output: Path, as_json: bool
) -> None:
    """Rejections at ten times capacity: how fast and with what words; who is accepted, and how it is served.

    Capacity is measured first. --wait-bound-s is the gateway's queue_predicted_wait_s.
    """
    from edge_llm.bench.overload import Plan, figures, measure, missed
    from edge_llm.bench.run import Run
    from edge_llm.commands.local_cluster import local_cluster
    from edge_llm.commands.supervisor import SIMULATED_MODEL

    plan = Plan(factor=factor, wait_bound_s=wait_bound_s, seed=seed)
    if quick:
        plan = replace(plan, saturate_s=4.0, capacity_s=5.0, overload_s=4.0, recovery_s=2.0, settle_s=1.0)
    run = Run("overload", command_line(), plan.config, folder=output)
    with steps() as report:
        found, is_complete = until_interrupted(
            lambda: on_fast_loop(measure(plan, lambda layout: local_cluster(layout, SIMULATED_MODEL), run, report)),
            lambda: figures(plan, run),
        )
    finish(run, found, is_complete, output, as_json, missed(found, plan) if check else [])
