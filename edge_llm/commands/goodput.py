"""`edge-llm bench goodput`: split, local, auto and two llama-server under the same recorded traffic, side by side."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from edge_llm.commands.formats import check_formats
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

# The beginnings of the two Azure traces of 2023; the folder's README says whose they are.
SHIPPED: Final = Path(__file__).parent.parent / "bench" / "data"
# llama-server reads prompts in batches of 2,048 tokens unless told otherwise, and its streams wait for each: smaller
# ones are the flag to tune for what is measured here. The last are used when there is no time to try them.
SERVER_FLAGS: Final[Mapping[str, tuple[str, ...]]] = {
    "its defaults": (),
    "-b 256 -ub 256": ("-b", "256", "-ub", "256"),
    "-b 64 -ub 64": ("-b", "64", "-ub", "64"),
}
# Of simulated workers, and the worker's option that each becomes: steps as where weights take longer to be read than to
# be computed with, so that another stream costs little.
_SPEED: Final[Mapping[str, tuple[str, float]]] = {
    "prompt_tokens_per_s": ("--simulated-prompt-tokens-per-s", 250.0),
    "step_s": ("--simulated-step-s", 0.030),
    "row_s": ("--simulated-row-s", 0.003),
}
_Command = TypeVar("_Command", bound=Callable[..., Any])
_QUICK_SHARES: Final = (0.3, 0.8)
_QUICK_S: Final = 10.0


def _speed(name: str, meaning: str) -> Callable[[_Command], _Command]:
    """An option of simulated workers; None: not given."""
    default = f"  [default: {_SPEED[name][1]:g}]"
    return click.option(
        f"--{name.replace('_', '-')}", type=click.FloatRange(min=0, min_open=name != "row_s"), help=meaning + default
    )


@click.command()
@click.option("--engine", type=click.Choice(["simulated", "llama"]), default="llama", show_default=True)
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Name in models.yaml or path of a .gguf file.")
@click.option("--requantize", metavar="TYPE", help="The same weights in another type, for everybody: Q4_0.")
@click.option(
    "--trace",
    "traces",
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    help="CSV in the Azure format, or a folder of them; several times (default: the two that come with this program).",
)
@click.option("--seconds-per-point", type=click.FloatRange(5, 3600), default=75.0, show_default=True)
@click.option("--budget-minutes", type=click.FloatRange(1, 1440), default=80.0, show_default=True)
@click.option("--scale", type=click.FloatRange(0.001, 1), default=0.25, show_default=True, help="Of all lengths.")
@click.option("--n-ctx", type=click.IntRange(256, 1 << 20), default=2048, show_default=True, help="Context per slot.")
@click.option("--llama-server/--no-llama-server", "with_server", default=True, help="Measure two llama-server beside.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed, other requests of the traces.")
@_speed("prompt_tokens_per_s", "Tokens of a prompt that a simulated worker reads in a second.")
@_speed("step_s", "What a step takes a simulated worker, whatever the number of streams.")
@_speed("row_s", "What each stream adds to it.")
@quick_option
@check_option
@output_option
@json_option
def goodput(
    engine: str,
    model: str,
    requantize: str | None,
    traces: tuple[Path, ...],
    seconds_per_point: float,
    budget_minutes: float,
    scale: float,
    n_ctx: int,
    with_server: bool,
    seed: int,
    quick: bool,
    check: bool,
    output: Path,
    as_json: bool,
    **speed: float | None,
) -> None:
    """The highest rate at which 90 % (99 %) of the requests keep their limits of TTFT and TPOT.

    Two nodes of one core each: one that reads and one that writes, two that do both, two that help each other where it
    is predicted to pay, and two stock llama-server. All get requests of the same lengths at the same times.
    """
    from edge_llm.bench.comparison import RATE_SHARES, Plan, measure, workload
    from edge_llm.bench.replayed import Tally
    from edge_llm.bench.run import Run
    from edge_llm.bench.verdicts import figures, missed

    check_formats([requantize.upper()] if requantize else [])
    is_simulated = engine == "simulated"
    given = {name: value for name, value in speed.items() if value is not None}
    if given and not is_simulated:
        raise click.UsageError("speeds are of simulated workers: add --engine simulated")
    speeds = {name: given.get(name, default) for name, (_, default) in _SPEED.items()}
    cores = _two_cores()
    found_traces = [_read(path) for path in _files(traces)]
    config = {"engine": engine, "traces": [trace.name for trace in found_traces], "cores": cores}
    run = Run("goodput", command_line(), config | (speeds if is_simulated else {}), folder=output)
    run.notes.append(_who_runs_where(len(os.sched_getaffinity(0))))
    tally = Tally()
    with steps() as report:
        served = _simulated(speeds) if is_simulated else _real(model, requantize, run, report)
        plan = Plan(
            seconds_per_point=min(_QUICK_S, seconds_per_point) if quick else seconds_per_point,
            budget_s=60 * budget_minutes,
            vocab_size=served.vocab_size,
            n_ctx=n_ctx,
            scale=scale,
            seed=seed,
            rate_shares=_QUICK_SHARES if quick else RATE_SHARES,
            passes=1 if quick else 2,
        )
        run.config.update(asdict(plan))
        servers = None if is_simulated or not with_server else _servers(served.path, plan, cores, quick, run)
        workloads = [workload(plan, trace) for trace in (found_traces[:1] if quick else found_traces)]

        def measured() -> dict[str, Any]:
            asyncio.run(measure(plan, workloads, served.launch, servers, run, tally, report))
            return figures(tally)

        found, is_complete = until_interrupted(measured, lambda: figures(tally))
    finish(run, found, is_complete, output, as_json, missed(found) if check else [], _show)


# -- what is measured


@dataclass(frozen=True, slots=True)
class _Served:
    launch: Any
    path: Path
    vocab_size: int


def _simulated(speeds: Mapping[str, float]) -> _Served:
    from edge_llm.commands.local_cluster import local_cluster
    from edge_llm.commands.supervisor import SIMULATED_MODEL
    from edge_llm.engine.simulated import VOCAB_SIZE

    options = [word for name, (option, _) in _SPEED.items() for word in (option, str(speeds[name]))]
    return _Served(
        lambda layout: local_cluster(replace(layout, options=(*layout.options, *options)), SIMULATED_MODEL),
        Path(),
        VOCAB_SIZE,
    )


def _real(model: str, requantize: str | None, run: Any, report: Any) -> _Served:
    from edge_llm.bench.models import local_model, requantized
    from edge_llm.catalogue.gguf import read_card
    from edge_llm.commands.local_cluster import local_cluster

    found = local_model(model, report)
    if requantize is not None:
        found = requantized(found, requantize.upper(), report)
    run.models.append(found.facts)
    # a name stays a name: workers then find the file that was verified already
    wanted = str(found.path) if requantize is not None or model.endswith(".gguf") else model
    return _Served(lambda layout: local_cluster(layout, wanted), found.path, read_card(found.path).vocab_size)


def _servers(model: Path, plan: Any, cores: Sequence[int], quick: bool, run: Any) -> Any:
    """Two llama-server of the tree that llama.cpp builds by itself, a core each."""
    from edge_llm.bench.contestants import Servers
    from edge_llm.bench.reference_tools import require

    tree = require("default")
    run.engine("llama-server", tree.facts)
    start = partial(_llama_server, tree.tool("llama-server"), model, plan)
    trials = dict(list(SERVER_FLAGS.items())[:1]) if quick else SERVER_FLAGS
    return Servers({name: tuple(start(flags, core) for core in cores) for name, flags in trials.items()})


def _llama_server(tool: Path, model: Path, plan: Any, flags: Sequence[str], core: int) -> Any:
    from edge_llm.commands.local_cluster import llama_server

    return lambda _layout: llama_server(tool, model, core, plan.slots, plan.n_ctx, flags)


def _two_cores() -> list[int]:
    from edge_llm.bench.processes import MeasureFailed

    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise MeasureFailed("two nodes need a core each, and this process may use one only")
    return cores[:2]


def _who_runs_where(cores: int) -> str:
    rest = "have the others" if cores > 2 else "are not pinned and run on the same two"
    return f"each worker and each llama-server has one thread, pinned to one of two cores; gateway and client {rest}"


def _files(given: Sequence[Path]) -> list[Path]:
    """Folders stand for their .csv files. Raises BadTrace for a folder without any."""
    from edge_llm.bench.traces import BadTrace

    files: list[Path] = []
    for path in given or [SHIPPED]:
        inside = sorted(path.glob("*.csv"), reverse=True) if path.is_dir() else [path]
        if not inside:
            raise BadTrace(f"no .csv file in the folder {path.name}")
        files += inside
    return files


def _read(path: Path) -> Any:
    from edge_llm.bench.traces import BadTrace, parse

    try:
        return parse(path.read_text(), path.stem)
    except (OSError, UnicodeDecodeError) as error:
        raise BadTrace(f"{path.name} cannot be read as a trace: {error}") from error


# -- what is shown


def _show(found: Mapping[str, Any]) -> None:
    """A table for each trace and regime, then the sentences."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name, trace in found["traces"].items():
        for regime, result in trace["regimes"].items():
            limits = result["limits"]
            title = f"{name}, {regime}: TTFT <= {limits['ttft_s']:.2f} s, TPOT <= {1e3 * limits['tpot_s']:.1f} ms"
            table = Table(title=title, title_justify="left")
            for column in ("", "requests/s at 90 %", "a node", "at 99 %", "attainment by rate"):
                table.add_column(column, overflow="fold")
            for arrangement, row in result["arrangements"].items():
                most, nearly_all = row["goodput_90"], row["goodput_99"]
                table.add_row(
                    arrangement,
                    f"{most['per_s']:.3f} ({most['low']:.3f} to {most['high']:.3f})",
                    f"{most['per_node_per_s']:.3f}",
                    f"{nearly_all['per_s']:.3f}",
                    "  ".join(f"{point['rate_per_s']:.2f}: {point['attainment']:.0%}" for point in row["curve"]),
                )
            console.print(table)
    for line in found["verdicts"]:
        click.echo(line)
