"""What the measuring commands share: options, progress, Ctrl-C, and the end of a run: record, print, exit code.

Owns none of the measuring. Exit codes: 1 something could not be measured, 3 a bar was missed, 130 interrupted.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

THRESHOLD_FAILED: Final = 3
INTERRUPTED: Final = 130
Report = Callable[[str, int, int], None]

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
quick_option = click.option("--quick", is_flag=True, help="Fewer repetitions: a look, not a measurement.")
check_option = click.option("--check", is_flag=True, help="Exit with 3 when a figure misses its bar.")
output_option = click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("bench_results"),
    show_default=True,
    help="Folder of the record.",
)


def command_line() -> list[str]:
    return ["edge-llm", *sys.argv[1:]]


@contextmanager
def steps() -> Iterator[Report]:
    """Progress of several things after another: a line on a terminal, sparse lines elsewhere."""
    if not sys.stderr.isatty():
        yield _Sparse()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None)


class _Sparse:
    """A line whenever the work changes its name, or a fifth of it is done."""

    def __init__(self) -> None:
        self._last: tuple[str, int] = ("", -1)

    def __call__(self, what: str, done: int, total: int) -> None:
        now = (what, 5 * done // total if total else 0)
        if now != self._last:
            self._last = now
            click.echo(f"{what}: {done} of {total}" if total else what, err=True)


def on_fast_loop(work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """Run on the faster event loop where there is one: the client must not be what is measured."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)


def until_interrupted(work: Callable[[], dict[str, Any]], partial: Callable[[], dict[str, Any]]) -> tuple[Any, bool]:
    """Figures, and whether all of them were measured; Ctrl-C gives those of what is there."""
    try:
        return work(), True
    except KeyboardInterrupt:
        click.echo("interrupted: keeping what was measured", err=True)
        return partial(), False


def finish(
    run: Any,
    figures: dict[str, Any],
    is_complete: bool,
    output: Path,
    as_json: bool,
    misses: list[str],
    show: Callable[[dict[str, Any]], None] | None = None,
    is_data: bool = False,
) -> None:
    """Record, print (`show`: for people, instead of a tree of all numbers), and the exit code. `is_data`: standard
    output belongs to rows for programs, so nothing else goes there."""
    from edge_llm.bench.record import write

    path = write(run.record(figures, is_complete), output)
    if as_json:
        click.echo(json.dumps({**figures, "record": str(path)}))
    else:
        (show or _print)(figures)
        click.echo(f"record: {path}", err=is_data)
    for failure in run.failures:
        click.echo(f"not measured: {failure.what}: {failure.why}", err=True)
    for line in misses:
        click.echo(f"bar missed: {line}", err=True)
    if not is_complete:
        sys.exit(INTERRUPTED)
    if run.failures:
        sys.exit(1)
    if misses:
        sys.exit(THRESHOLD_FAILED)


def _print(figures: dict[str, Any], indent: str = "") -> None:
    """A tree of numbers as aligned lines."""
    for name, value in figures.items():
        if isinstance(value, dict):
            click.echo(f"{indent}{name}")
            _print(value, indent + "  ")
        else:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            click.echo(f"{indent}{name:<{44 - len(indent)}} {text}")
