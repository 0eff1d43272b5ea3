"""`edge-llm bench report`: what is in bench_results/, as Markdown and as one page with drawings."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path, exists=True), metavar="[FOLDER|FILE]...")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write one HTML page; it needs no other file and no network.",
)
@click.option("--markdown", "as_markdown", is_flag=True, help="Print Markdown, beside a page, too.")
@click.option("--kind", "kinds", multiple=True, help="Only records of this kind (engine, serve, ...); several times.")
@click.option("--title", default="Benchmarks of edge_llm", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the report's tables as JSON.")
def report(
    paths: tuple[Path, ...], output: Path | None, as_markdown: bool, kinds: tuple[str, ...], title: str, as_json: bool
) -> None:
    """Tables (Markdown, on standard output) and one page with drawings (-o report.html) out of records.

    Without arguments: of bench_results/. Exits with 1 when a file there could not be read; the report names it.
    """
    from edge_llm.bench.record import RESULTS_DIR
    from edge_llm.report.chapters import report_of
    from edge_llm.report.evidence import gather, only
    from edge_llm.report.markdown import markdown

    found = only(gather(paths or (Path(RESULTS_DIR),), output.parent if output else Path()), kinds)
    made = report_of(found, title)
    if output is not None:
        from edge_llm.report.page import page

        written = page(made)
        try:
            output.write_text(written, encoding="utf-8")
        except OSError as error:
            raise click.UsageError(f"{output} cannot be written: {error.strerror}") from error
        click.echo(f"{output}: {len(found.evidence)} records, {len(written) // 1024} KiB", err=True)
    if as_json:
        click.echo(json.dumps(_tables(made)))
    elif as_markdown or output is None:
        click.echo(markdown(made), nl=False)
    for name, why in found.unreadable:
        click.echo(f"not read: {name}: {why}", err=True)
    if found.unreadable:
        sys.exit(1)


def _tables(made: Any) -> dict[str, Any]:
    """Without the drawings, which are made of the records' samples."""
    from dataclasses import asdict

    tree = asdict(made)
    for part in (part for chapter in tree["chapters"] for part in chapter["parts"]):
        for name in ("plots", "more_plots"):
            part[name] = [plot["title"] for plot in part[name]]
    tree["across"] = [plot["title"] for plot in tree["across"]]
    return tree
