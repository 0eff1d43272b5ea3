"""`edge-llm doctor`: is this board fit for what it is told to do, and what to do where it is not."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
import time
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final

import click

from edge_llm.commands.measuring import INTERRUPTED, json_option, steps
from edge_llm.commands.serve import config_option

_MARKS: Final = {"ok": "ok     ", "warn": "WARNING", "fail": "FAILED ", "unknown": "unknown"}
_INDENT: Final = " " * 10
_WIDEST: Final = 120


@click.command()
@config_option
@click.option(
    "--load", "loads", is_flag=True, help="Load the configured model too: which level a worker would publish."
)
@click.option("--problems", is_flag=True, help="Show only what is not well.")
@click.option(
    "--ignore", multiple=True, metavar="CHECK", help="A check (board.governor) or a whole area (k3s); repeat it."
)
@click.option(
    "--root",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("/"),
    help="Judge the files of another board: a copy of its /proc, /sys, /etc, /boot and /run in this folder.",
)
@click.option(
    "--cluster", "of_cluster", is_flag=True, help="Examine instead the Kubernetes cluster that kubectl reaches."
)
@click.option(
    "--kubeconfig",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Of --cluster; default: as kubectl finds it.",
)
@click.option("--namespace", default="edge-llm", show_default=True, help="Of --cluster.")
@json_option
@click.option("--schema", is_flag=True, help="Print the JSON schema of --json, and nothing else.")
def doctor(
    config: Path | None,
    loads: bool,
    problems: bool,
    ignore: tuple[str, ...],
    root: Path,
    of_cluster: bool,
    kubeconfig: Path | None,
    namespace: str,
    as_json: bool,
    schema: bool,
) -> None:
    """Examine this board, its system, K3s, network, build, settings, keys and model. Needs no root rights.
    With --cluster: nodes, role labels, the Secret, images and pods of edge-llm on Kubernetes.

    Exits with 0 when all is well (as far as is known), 1 with warnings, 2 with failures, 130 when interrupted.
    """
    from edge_llm import __version__
    from edge_llm.commands.cluster_state import running_clusters
    from edge_llm.doctor.examination import AREAS, Examination, Outside
    from edge_llm.doctor.files import Files
    from edge_llm.doctor.finding import exit_code, report_of
    from edge_llm.doctor.finding import schema as report_schema

    if schema:
        click.echo(json.dumps(report_schema(), indent=1))
        return
    _check_ignored(ignore, (*AREAS, "cluster"))
    if of_cluster:
        if config is not None or loads or root != Path("/"):
            raise click.UsageError("--config, --load and --root are of a board: leave them out with --cluster")
        findings, is_complete = _of_cluster(kubeconfig, namespace), True
    else:
        if kubeconfig is not None:
            raise click.UsageError("--kubeconfig is for --cluster")
        examination = Examination(
            Files(root.absolute()),
            config,
            os.environ,
            time.time,
            cluster_ports=lambda: [state.port for state in running_clusters()],
            outside=Outside(page_bytes=os.sysconf("SC_PAGE_SIZE")),
            loads=loads,
        )
        findings, is_complete = _examined(examination, ignore)
    report = report_of(findings, ignore, datetime.now(UTC), __version__)
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(report).decode())
    else:
        _print(report, problems)
    sys.exit(exit_code(report) if is_complete else INTERRUPTED)


def _of_cluster(kubeconfig: Path | None, namespace: str) -> list[Any]:
    """A cluster that is not found is the first finding."""
    from edge_llm.commands.kubectl import Kubectl
    from edge_llm.doctor.cluster import check_cluster

    @cache
    def kubectl() -> Kubectl:
        return Kubectl(kubeconfig, namespace)

    return check_cluster(lambda *what: kubectl().get(*what), namespace)


def _examined(examination: Any, ignored: tuple[str, ...]) -> tuple[list[Any], bool]:
    """What was found, and whether that is all of it."""
    with steps() as progress:
        try:
            examination.run(ignored, progress)
        except KeyboardInterrupt:
            click.echo("interrupted: showing what was found", err=True)
            return examination.findings, False
    return examination.findings, True


def _check_ignored(ignored: tuple[str, ...], areas: tuple[str, ...]) -> None:
    for name in ignored:
        if name.partition(".")[0] not in areas:
            raise click.BadParameter(f"{name!r}: the areas are {', '.join(areas)}", param_hint="--ignore")


def _print(report: Any, problems_only: bool) -> None:
    shown = [found for found in report.findings if not problems_only or found.status in ("warn", "fail")]
    for found in shown:
        mark = click.style(_MARKS[found.status], fg={"warn": "yellow", "fail": "red"}.get(found.status))
        click.echo(f"{mark}   {found.check:<24} {_folded(found.found, 35)}")
        for name, text in (("why:", found.why), ("do:", found.do)):
            if text:
                click.echo(f"{_INDENT}{name:<5}{_folded(text, len(_INDENT) + 5)}")
        for line in found.commands:
            click.echo(f"{_INDENT}$ {line}")
    counts = report.counts
    click.echo(
        f"{counts['ok']} well, {counts['warn']} warnings, {counts['fail']} failures, {counts['unknown']} not known"
        + (f"; ignored: {', '.join(report.ignored)}" if report.ignored else "")
    )


def _folded(text: str, indent: int) -> str:
    """Long text in lines under its own beginning; lines that text has (the sum of memory) stay."""
    width = max(40, min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns) - indent)
    lines = []
    for line in text.split("\n"):
        whole = (
            [line]
            if line.startswith(" ")
            else textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
        )
        lines += whole or [""]
    return ("\n" + " " * indent).join(lines)
