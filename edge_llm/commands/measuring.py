"""What the measuring commands share: options, progress, Ctrl-C, and the end of a run: record, print, exit code.

Owns none of the measuring. Exit codes: 1 something could not be measured, or its record not kept where it was asked
for, 3 a bar was missed, 130 interrupted.

Invariant: a folder that takes no record is an error before anything is measured; one that takes none any more at the
end (a full disk) does not cost what was measured.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

from edge_llm.errors import ConfigError

THRESHOLD_FAILED: Final = 3
INTERRUPTED: Final = 130
Report = Callable[[str, int, int], None]


def _tried(context: click.Context, param: click.Parameter, folder: Path) -> Path:
    """A folder that was named, before the model is fetched, too; the usual one is tried by the `Run` that needs it:
    not all that these commands do leaves a record. One that was made for the trial and is empty at the end goes again,
    so that a wrong option beside it leaves nothing."""
    from edge_llm.bench.record import try_folder

    if context.get_parameter_source(str(param.name)) is ParameterSource.DEFAULT:
        return folder
    # pathlib's own raises where a folder may not be searched
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        try_folder(folder)
    except ConfigError as error:
        raise click.BadParameter(error.message, context, param) from error
    context.call_on_close(lambda: _remove_empty(made))
    return folder


def _remove_empty(folders: Sequence[Path]) -> None:
    """Deepest first."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
quick_option = click.option("--quick", is_flag=True, help="Fewer repetitions: a look, not a measurement.")
check_option = click.option("--check", is_flag=True, help="Exit with 3 when a figure misses its bar.")
output_option = click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("bench_results"),
    show_default=True,
    callback=_tried,
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
    path, is_in_place = _kept(run.record(figures, is_complete), output)
    if as_json:
        click.echo(json.dumps({**figures, "record": str(path or "")}))
    else:
        (show or print_tree)(figures)
        click.echo(f"record: {path or 'none'}", err=is_data)
    for failure in run.failures:
        click.echo(f"not measured: {failure.what}: {failure.why}", err=True)
    for line in misses:
        click.echo(f"bar missed: {line}", err=True)
    if not is_complete:
        sys.exit(INTERRUPTED)
    if run.failures or not is_in_place:
        sys.exit(1)
    if misses:
        sys.exit(THRESHOLD_FAILED)


def _kept(record: Any, folder: Path) -> tuple[Path | None, bool]:
    """Where the record is now, and whether that is where it was asked for. Of a folder that cannot be written any more
    it goes to this system's temporary one; None where that is full, too: the figures are printed all the same."""
    from edge_llm.bench.record import write

    try:
        return write(record, folder), True
    except OSError as error:
        trouble = f"the record cannot be written to {folder} ({error.strerror or error})"
    try:
        path = write(record, Path(tempfile.mkdtemp(prefix="edge-llm-record-")))
    except OSError as error:
        click.echo(f"edge-llm: {trouble}, nor to {tempfile.gettempdir()} ({error.strerror or error})", err=True)
        return None, False
    click.echo(f"edge-llm: {trouble}: it is {path}, move it before this machine starts again", err=True)
    return path, False


def print_tree(figures: dict[str, Any], indent: str = "") -> None:
    """A tree of numbers as aligned lines."""
    for name, value in figures.items():
        if isinstance(value, dict):
            click.echo(f"{indent}{name}")
            print_tree(value, indent + "  ")
        else:
            text = "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
            click.echo(f"{indent}{name:<{44 - len(indent)}} {text}")
