"""`edge-llm bench claims`: everything that this project claims, tried on your own boards, one verdict for each claim.

Owns the options and the printing. The claims are data (bench/claims.py), their commands are run as children
(bench/claims_runs.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from edge_llm.commands.endpoint import Address
from edge_llm.commands.measuring import (
    THRESHOLD_FAILED,
    check_option,
    command_line,
    finish,
    json_option,
    output_option,
    steps,
    until_interrupted,
)
from edge_llm.config import DEFAULT_MODEL

FORMATS: Final = ("list", "md")
_HERE: Final = "this machine"
_FILE: Final = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command(context_settings={"max_content_width": 120})
@click.option("--only", metavar="NAMES", help="Claims (exact.theorem), topics (exact) or steps, with commas between.")
@click.option("--budget-minutes", type=click.FloatRange(1, 10_000), help="Small runs where there is no time for whole.")
@click.option("--quick", is_flag=True, help="Small runs of everything: a look, not a measurement.")
@click.option(
    "--plan", "is_plan", is_flag=True, help="Show what would run, about how long, for which claims; and stop."
)
@click.option(
    "--from",
    "sources",
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    help="Run nothing: judge the records in this folder, or this record; several times.",
)
@click.option("--resume", type=_FILE, help="Lines (.cases.jsonl) of a run that was cut: go on from there.")
@click.option("--model", help=f"Name in models.yaml or path of a .gguf file.  [default: {DEFAULT_MODEL}]")
@click.option(
    "--url",
    type=Address(),
    help="A gateway that runs: the theorem and the paper's table are of it, the rest is of this machine.",
)
@click.option("--api-key-file", type=_FILE, help="A key for --url.")
@click.option("--boards", is_flag=True, help="Watch the boards of the workers that --url knows, for the paper's table.")
@click.option(
    "--workers-file", type=_FILE, help="Workers that run: the paper's table is of them, their boards watched."
)
@click.option("--key-file", type=_FILE, help="The cluster key of the workers of --workers-file, without --url.")
@click.option("-o", "--output-format", type=click.Choice(FORMATS), help="[default: list; md with --from]")
@check_option
@output_option
@json_option
def claims(
    sources: tuple[Path, ...],
    is_plan: bool,
    check: bool,
    output: Path,
    output_format: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Does it hold here? Exactness, hand-off, stalls, failover, gateway, goodput, the paper's table: each claim of
    README holds, does not hold, or was not tested here, with the figures and the reason.

    Runs the project's own benches one after another (hours; --plan says how many), each with a record of its own;
    `verify` among them records the level that workers publish. --check exits with 3 when a claim does not hold. Ctrl-C
    keeps what is done; --resume goes on. Exit code 1: something that was asked for could not be measured.

    Of a Kubernetes cluster: `bench theorem --cluster` and `bench cluster --cluster --boards` measure inside and leave
    their records here; then `bench claims --from bench_results` judges them.
    """
    chosen = _chosen(given["only"])
    if sources:
        _refuse_to_run({**given, "plan": is_plan})
        _judge(sources, chosen, output_format or "md", as_json, check)
        return
    _check(given)
    plan, machine = _plan(chosen, given)
    if is_plan:
        _show_plan(plan, chosen, given, as_json)
        return
    _check_gateway(plan, given)
    _run(chosen, plan, machine, given, output, output_format or "list", as_json, check)


def _refuse_to_run(given: Mapping[str, Any]) -> None:
    """Of options for runs nothing would be heeded."""
    if meant := [name for name, value in given.items() if value and name != "only"]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in meant)
        raise click.UsageError(f"--from runs nothing: leave out {options}, or --from")


def _check(given: Mapping[str, Any]) -> None:
    if given["api_key_file"] and not given["url"]:
        raise click.UsageError("--api-key-file is for the gateway at --url")
    if given["boards"] and not given["url"]:
        raise click.UsageError("--boards is for the workers of the gateway at --url")
    if given["workers_file"] and not given["url"] and not given["key_file"]:
        raise click.UsageError("workers ask for a ticket: add --key-file, or ask their gateway with --url")
    if given["key_file"] and (given["url"] or not given["workers_file"]):
        raise click.UsageError("--key-file is for workers of --workers-file, without --url")


def _check_gateway(plan: Sequence[Any], given: Mapping[str, Any]) -> None:
    """Before any step: whether the gateway is there and takes the key. Raises WorkerUnreachable, InvalidRequest."""
    from edge_llm.commands.cluster_gateway import Gateway

    where = _where(given)
    if given["url"] and any(one.step.name in where and not one.why_not for one in plan):
        Gateway.of(given["url"], given["api_key_file"]).overview()


def _chosen(names: str | None) -> list[Any]:
    """Claims by name, topic or step; all without any."""
    from edge_llm.bench.claims import CLAIMS

    if names is None:
        return list(CLAIMS)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {name for claim in CLAIMS for name in (claim.id, claim.topic, claim.step)}
    if unknown := [name for name in wanted if name not in known]:
        raise click.UsageError(
            f"--only has no {', '.join(unknown)}: it has {', '.join(dict.fromkeys(claim.id for claim in CLAIMS))}, and "
            f"topics and steps: {', '.join(sorted(known - {claim.id for claim in CLAIMS}))}"
        )
    return [claim for claim in CLAIMS if {claim.id, claim.topic, claim.step} & set(wanted)]


# -- records that are there


def _judge(sources: Sequence[Path], chosen: Sequence[Any], kind: str, as_json: bool, check: bool) -> None:
    """A column of verdicts for each sort of board that there are records of."""
    import msgspec

    from edge_llm.bench.claims_judged import Evidence, board_words, counts, judged
    from edge_llm.bench.claims_text import listed, markdown, missed_lines
    from edge_llm.report.evidence import gather

    found = gather(sources, Path())
    boards: dict[str, list[Evidence]] = {}
    for one in found.evidence:
        boards.setdefault(board_words(one.record.nodes[0]), []).append(Evidence(one.file, one.record))
    columns = {board: [judged(claim, boards[board]) for claim in chosen] for board in sorted(boards)}
    if as_json:
        tree = [{"board": board, "counts": counts(made), "claims": made} for board, made in columns.items()]
        click.echo(json.dumps(msgspec.to_builtins({"boards": tree})))
    elif kind == "md":
        click.echo(markdown(columns))
    else:
        for board, made in columns.items():
            click.echo("\n".join((board, *listed(made))))
    for name, why in found.unreadable:
        click.echo(f"not read: {name}: {why}", err=True)
    misses = [f"{board}: {line}" for board, made in columns.items() for line in missed_lines(made)]
    if check:
        for line in misses:
            click.echo(f"does not hold: {line}", err=True)
    if found.unreadable:
        sys.exit(1)
    if check and misses:
        sys.exit(THRESHOLD_FAILED)


# -- runs


def _plan(chosen: Sequence[Any], given: Mapping[str, Any]) -> tuple[Any, Any]:
    from edge_llm.bench.claims_plan import Machine, planned
    from edge_llm.bench.reference_tools import TREES, find
    from edge_llm.machine import usable_cores

    machine = Machine(usable_cores(), all(find(tree) is not None for tree in TREES))
    return planned({claim.step for claim in chosen}, machine, given["budget_minutes"], given["quick"]), machine


def _show_plan(plan: Sequence[Any], chosen: Sequence[Any], given: Mapping[str, Any], as_json: bool) -> None:
    where, there = _where(given), _there(given)
    rows = [
        {
            "step": one.step.name,
            "command": " ".join((one.step.command_words, *(one.step.small if one.is_small else ()))),
            "minutes": one.minutes,
            "why_not": one.why_not,
            "measures": there if one.step.name in where else "",
            "claims": [claim.id for claim in chosen if claim.step == one.step.name],
        }
        for one in plan
    ]
    if as_json:
        click.echo(json.dumps({"steps": rows, "minutes": sum(row["minutes"] for row in rows)}))
        return
    for row in rows:
        time = row["why_not"] or f"{row['minutes']:g} minutes"
        of = f", of {row['measures'] or _HERE}" if there else ""
        click.echo(f"{row['command']}  ({time}{of}): {', '.join(row['claims'])}")
    click.echo(f"together about {sum(row['minutes'] for row in rows):g} minutes on two cores of a small server")


def _run(
    chosen: Sequence[Any],
    plan: Sequence[Any],
    machine: Any,
    given: Mapping[str, Any],
    output: Path,
    kind: str,
    as_json: bool,
    check: bool,
) -> None:
    import msgspec

    from edge_llm.bench.claims_plan import cannot
    from edge_llm.bench.claims_runs import Found, Settings, finished, measure
    from edge_llm.bench.claims_text import missed_lines
    from edge_llm.bench.models import local_model
    from edge_llm.bench.run import Run

    run = Run("claims", command_line(), _config(given), folder=output, idle_s=0.0)
    found = Found(chosen, run)

    def figures() -> dict[str, Any]:
        tree: dict[str, Any] = msgspec.to_builtins(found.figures())
        tree.pop("record", None)
        return tree

    for one in plan if given["only"] else ():  # asked for by name: not to be passed over in silence
        if reason := cannot(one.step, machine):
            run.fail(one.step.name, reason)
    with steps() as report:
        known = finished(given["resume"], run, output) if given["resume"] else {}

        def measured() -> dict[str, Any]:
            # fetched before anything is measured; the simulated steps need none
            is_needed = any(one.step.model and not one.why_not for one in plan)
            model = local_model(given["model"] or DEFAULT_MODEL, report) if is_needed else None
            settings = Settings(
                folder=output,
                machine=machine,
                model=given["model"],
                where=_where(given),
                there=_there(given),
                model_facts=model.facts if model else None,
                budget_minutes=given["budget_minutes"],
            )
            measure(plan, settings, known, found, report)
            return figures()

        made, is_complete = until_interrupted(measured, figures)
    misses = missed_lines(found.figures().claims) if check else []
    finish(run, made, is_complete, output, as_json, misses, lambda tree: _show(tree, kind))


def _config(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, without keys."""
    shown = {name: value for name, value in given.items() if not name.endswith("key_file") and value is not None}
    return {name: str(value) if isinstance(value, Path) else value for name, value in shown.items()}


def _where(given: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """What says to a step that it is to be run on a cluster that is there."""

    def option(name: str) -> tuple[str, ...]:
        value = given[name.replace("-", "_")]
        return (f"--{name}", str(value)) if value else ()

    gateway = (*option("url"), *option("api-key-file"))
    boards = ("--boards",) if given["boards"] else ()
    there = {"cluster": (*gateway, *boards, *option("workers-file"), *option("key-file"))}
    return {name: one for name, one in {**there, "theorem": gateway}.items() if one}


def _there(given: Mapping[str, Any]) -> str:
    """The cluster that is there, for people; empty: none was named."""
    return str(given["url"] or given["workers_file"] or "")


def _show(tree: Mapping[str, Any], kind: str) -> None:
    import msgspec

    from edge_llm.bench.claims_judged import Verdict
    from edge_llm.bench.claims_text import listed, markdown

    verdicts = msgspec.convert(tree["claims"], list[Verdict])
    if kind == "md":
        click.echo(markdown({tree["board"]: verdicts}))
        return
    for line in listed(verdicts):
        click.echo(line)
    places: dict[str, list[str]] = {}
    for one in tree["steps"]:
        places.setdefault(one.get("measures") or _HERE, []).append(one["step"])
    if places.keys() - {_HERE}:
        click.echo("measured: " + "; ".join(f"{place}: {', '.join(names)}" for place, names in places.items()))
    counted = tree["counts"]
    click.echo(
        f"{tree['board']}: " + ", ".join(f"{number} {word.replace('_', ' ')}" for word, number in counted.items())
    )
