"""`edge-llm cluster render`: a described cluster as manifests with sizes that fit, or the sum that does not.

Owns the output: a folder for `kubectl apply -k`, or one YAML on stdout for `kubectl apply -f -`. A folder that holds a
rendering says which board has which role already. The model is cluster_model.py's; what fits, what differs from the
shipped manifests and what a change of roles takes is edge_llm/plan's.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from edge_llm.errors import ConfigError
from edge_llm.words import counted

if TYPE_CHECKING:
    from edge_llm.plan.description import Description
    from edge_llm.plan.fit import Fitted
    from edge_llm.plan.sizes import KnownModel

_MIB: Final = 1 << 20
_SHOWN: Final = ("sum_bytes", "limit_bytes", "room_bytes", "left_bytes")


class _WithKeys(click.Command):
    """Its help ends with the keys of a description, read where they are defined and only when asked."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from edge_llm.plan.description import keys

        with formatter.section("Keys of DESCRIPTION"):
            formatter.write_dl(keys())


@click.command(cls=_WithKeys)
@click.argument("description", type=click.Path(path_type=Path, dir_okay=False, exists=True, allow_dash=True))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for `kubectl apply -k`, with all it needs (rendered again: boards keep their roles); without: one "
    "YAML on stdout (needs kubectl).",
)
@click.option("--check", is_flag=True, help="Only say what fits; render nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --check or -o: print JSON.")
def render(description: Path, output: Path | None, check: bool, as_json: bool) -> None:
    """Manifests for the boards and the model in DESCRIPTION (YAML; -: standard input).

    \b
    model: smollm2-135m-instruct-q4_1
    boards:
      - {name: pi-a, ram: 8GB, k3s: server, cpu: cortex-a76}
      - {name: pi-b, ram: 8GB, cpu: cortex-a76}
    """
    from edge_llm.commands.cluster_model import known_model, list_of_models
    from edge_llm.plan.changes import Earlier, changes, moves, remarks
    from edge_llm.plan.fit import fitted
    from edge_llm.plan.manifests import manifests_folder, read_earlier, read_shipped, write_overlay
    from edge_llm.plan.overlay import component_notes, files, labels, volume_notes

    if as_json and not check and output is None:
        raise click.UsageError("--json goes with --check or -o: without them manifests are printed")
    described = _described(description)
    folder = manifests_folder()
    shipped = read_shipped(folder)
    earlier = Earlier() if output is None else read_earlier(output)
    model, doubts = known_model(described)
    fit = fitted(
        described.boards,
        described.settings,
        model.sizes,
        splits=model.splits,
        gateway_bytes=shipped.gateway_bytes,
        earlier=earlier.roles,
    )
    overlay = files(described, fit, shipped, model.file_bytes, list_of_models())
    changed = changes(earlier, fit)
    moved = moves(changed, earlier, shlex.quote(str(output)))
    labelled = labels(described, fit, [change.board for change in changed])
    notes = [
        *doubts,
        *component_notes(described, fit, shipped),
        *fit.notes,
        *remarks(changed, is_labelled=bool(labelled)),
        *volume_notes(described, fit, shipped, model.file_bytes, earlier),
    ]
    fit = replace(fit, notes=tuple(notes))
    if check or output is not None:
        if output is not None and not check:
            write_overlay(output, overlay, folder)
        _tell(described, fit, model, None if check else output, moved, labelled, as_json)
        return
    from edge_llm.commands.kubectl import rendered

    with tempfile.TemporaryDirectory(prefix="edge-llm-render-") as scratch:
        target = Path(scratch) / "cluster"
        write_overlay(target, overlay, folder)
        click.echo(rendered(target), nl=False)
    _summary(described, fit, model, to_stderr=True)


def _described(description: Path) -> Description:
    from edge_llm.plan.description import parse_description, read_description

    if str(description) == "-":
        try:
            return parse_description(sys.stdin.read(), "standard input")
        except UnicodeDecodeError as error:
            raise ConfigError(f"standard input is no text: {error}") from error
    return read_description(description)


def _tell(
    described: Description,
    fit: Fitted,
    model: KnownModel,
    output: Path | None,
    moved: list[str],
    labelled: list[str],
    as_json: bool,
) -> None:
    """`moved` and `labelled`: the commands that come before what is applied, in this order."""
    from edge_llm.plan.overlay import table

    if as_json:
        found = {
            "model": described.model,
            "kv_bytes_per_token": model.kv_bytes_per_token,
            "boards": table(fit),
            "sums": {group.role: group.sum.parts for group in fit.groups},
            "moves": moved,
            "labels": labelled,
            "notes": list(fit.notes),
            "output": None if output is None else str(output),
        }
        click.echo(json.dumps(found))
        return
    _summary(described, fit, model)
    if output is not None:
        for line in (*moved, *labelled, f"kubectl apply -k {shlex.quote(str(output))}"):
            click.echo(f"  {line}")


def _summary(described: Description, fit: Fitted, model: KnownModel, to_stderr: bool = False) -> None:
    """Who does what with how much memory, and what is worth knowing."""
    from edge_llm.plan.overlay import labels, table

    settings = described.settings
    slots = counted(settings.slots, "slot")
    head = f"{described.model}: {model.kv_bytes_per_token / 1024:,.1f} KiB of KV a token, {slots} of"
    click.echo(f"{head} {settings.n_ctx:,} tokens", err=to_stderr)
    for row in table(fit):
        sizes = {key: round(int(str(row[key])) / _MIB) for key in _SHOWN}
        gets = f"gets {sizes['limit_bytes']:>6,} of {sizes['room_bytes']:>6,}; {sizes['left_bytes']:>6,} left"
        click.echo(f"  {row['board']:<20} {row['role']:<8} needs {sizes['sum_bytes']:>6,} MiB, {gets}", err=to_stderr)
    for note in fit.notes:
        click.echo(f"note: {note}", err=to_stderr)
    if to_stderr and sys.stderr.isatty():
        for line in labels(described, fit):
            click.echo(f"  {line}", err=True)
