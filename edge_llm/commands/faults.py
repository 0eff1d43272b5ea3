"""`edge-llm bench faults`: break a cluster from outside while it answers, and compare what the clients got."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

import click

from edge_llm.commands.measuring import command_line, finish, json_option, output_option, steps, until_interrupted
from edge_llm.config import DEFAULT_MODEL

# Slow enough that a blow can be aimed at any moment of a stream, fast enough for hundreds of them.
_SPEED: Final = ("--simulated-prompt-tokens-per-s", "1500", "--simulated-step-s", "0.015")
_FAST: Final = ("--simulated-prompt-tokens-per-s", "0", "--simulated-step-s", "0")
_SIZE: Final = ("--n-ctx", "1280", "--slots", "8")


@click.command()
@click.option("--engine", type=click.Choice(["simulated", "llama"]), default="simulated", show_default=True)
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="For --engine llama.")
@click.option("--per-kind", type=click.IntRange(1, 1000), default=20, show_default=True, help="Faults of each kind.")
@click.option("--kinds", multiple=True, help="Only these kinds (default: all); give it once for each.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed, other prompts and moments.")
@output_option
@json_option
def faults(
    engine: str, model: str, per_kind: int, kinds: tuple[str, ...], seed: int, output: Path, as_json: bool
) -> None:
    """Kill, stop, cut and corrupt: no stream may be lost, no token missing, repeated or different.

    Exits 3 when one is, when a fault is not proven to have met a stream, or when the disturbed streams of a kind went
    on too late in the median.
    """
    from edge_llm.bench.fault_figures import Plan, Tally, broken, figures
    from edge_llm.bench.faults import chosen, measure
    from edge_llm.bench.run import Run

    is_simulated = engine == "simulated"
    config = {"engine": engine, "per_kind": per_kind, "kinds": list(kinds), "seed": seed}
    run = Run("faults", command_line(), config, folder=output)
    plan = Plan(kinds=chosen(kinds), per_kind=per_kind, seed=seed, **_setting(is_simulated))
    with steps() as report:
        served = "simulated" if is_simulated else _real(model, run, report)
        tally = Tally()
        found, is_complete = until_interrupted(
            lambda: asyncio.run(measure(plan, _launcher(served), tally, run, report)),
            lambda: figures(tally, plan, run),
        )
    finish(run, found, is_complete, output, as_json, broken(found))


def _setting(is_simulated: bool) -> dict[str, Any]:
    """Workers, their speeds and the sizes of streams."""
    if is_simulated:
        return {
            "options": (*_SIZE, *_SPEED, "--chunk-tokens", "32"),
            "reference_options": (*_SIZE, *_FAST, "--chunk-tokens", "32"),
            "stranger_options": (*_SIZE, "--chunk-tokens", "32", "--model", "another"),
            "prompt_tokens": 480,
            "answer_tokens": 64,
            "long_answer_tokens": 300,
            "allowance_s": 4.0,
        }
    return {
        "options": (*_SIZE, "--chunk-tokens", "64"),
        "reference_options": (*_SIZE, "--chunk-tokens", "64"),
        "stranger_options": (*_SIZE, "--chunk-tokens", "64", "--k-type", "q8_0"),
        "prompt_tokens": 320,
        "answer_tokens": 48,
        "long_answer_tokens": 300,
        "allowance_s": 12.0,  # a prompt of 320 tokens again, beside a worker that loads the model again
        "streams": 2,
    }


def _launcher(model: str) -> Any:
    from edge_llm.commands.local_cluster import local_cluster
    from edge_llm.commands.supervisor import new_key

    key = new_key()  # one for all: a worker of another model is still of this cluster
    return lambda layout, place: local_cluster(layout, model, place, key)


def _real(model: str, run: Any, report: Any) -> str:
    from edge_llm.bench.models import local_model

    found = local_model(model, report)
    run.models.append(found.facts)
    return str(found.path) if model.endswith(".gguf") else model
