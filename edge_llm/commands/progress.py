"""Progress for people: a rich bar on a terminal, sparse plain lines elsewhere. stdout stays data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

Advance = Callable[[int, int | None], None]


@contextmanager
def progress(label: str, *, is_bytes: bool = False) -> Iterator[Advance]:
    """Gives a function (done, total) to call as work goes on."""
    if not sys.stderr.isatty():
        yield _plain(label, is_bytes)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    counter = DownloadColumn() if is_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), counter, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain(label: str, is_bytes: bool) -> Advance:
    """A line at the start and at every tenth; where the total is not known, whenever what is there has doubled."""
    last = -1

    def advance(done: int, total: int | None) -> None:
        nonlocal last
        shift, unit = (20, " MiB") if is_bytes else (0, "")
        step = 10 * done // total if total else (done >> shift).bit_length()
        if step != last:
            last = step
            of = f" of {total >> shift}" if total else ""
            click.echo(f"{label}: {done >> shift}{of}{unit}", err=True)

    return advance
