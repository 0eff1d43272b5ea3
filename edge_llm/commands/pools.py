"""`edge-llm bench pools`: the pools of eight simulated workers under a trace that turns."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import get_args

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
from edge_llm.config import PolicyName


@click.command()
@click.option("--policies", multiple=True, type=click.Choice(get_args(PolicyName)), help="Default: all.")
@click.option("--seed", type=int, default=7, show_default=True, help="Of lengths and times.")
@click.option("--wait-bound-s", type=click.FloatRange(0.5, 300), default=30.0, show_default=True)
@click.option("--one-by-one", is_flag=True, help="A cluster at a time: more CPU for each, as often as long.")
@quick_option
@check_option
@output_option
@json_option
def pools(
    policies: tuple[str, ...],
    seed: int,
    wait_bound_s: float,
    one_by_one: bool,
    quick: bool,
    check: bool,
    output: Path,
    as_json: bool,
) -> None:
    """Spill, re-purposing and return when traffic turns from conversation to code and back; policies compared.

    With --quick the phases are too short for a node to change sides.
    """
    from edge_llm.bench.pools import PHASES, Phase, Plan, Seen, figures, measure, missed
    from edge_llm.bench.run import Run
    from edge_llm.commands.local_cluster import local_cluster
    from edge_llm.commands.supervisor import SIMULATED_MODEL

    phases = tuple(Phase(phase.kind, phase.until_s / 12, phase.per_s) for phase in PHASES) if quick else PHASES
    chosen = policies or Plan().policies
    plan = Plan(policies=chosen, phases=phases, seed=seed, wait_bound_s=wait_bound_s, one_by_one=one_by_one)
    launch = partial(local_cluster, model=SIMULATED_MODEL)
    run, seen = Run("pools", command_line(), plan.config, folder=output), Seen()
    with steps() as report:
        found, is_complete = until_interrupted(
            lambda: on_fast_loop(measure(plan, launch, seen, run, report)),
            lambda: figures(plan, seen, run),
        )
    finish(run, found, is_complete, output, as_json, missed(found) if check else [])
