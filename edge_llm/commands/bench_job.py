"""`edge-llm bench job`: what a Job of the cluster runs: one bench, and its record at the end of the log.

Owns the child and what it is told. Refuses to know what it measures. The record stays on the volume, in a folder of
this pod's name, whoever reads the log or does not.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Final

import click

from edge_llm.commands.endpoint import Address

# Lines of requests may be large: those stay on the volume.
MAX_LINES_BYTES: Final = 32 << 20


@click.command("job", context_settings={"ignore_unknown_options": True})
@click.option("--url", type=Address(), help="The gateway, for benches that are not told another one.")
@click.option("--api-key-file", type=click.Path(path_type=Path, dir_okay=False), help="A key for it.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder on the volume.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, required=True, metavar="-- BENCH [OPTIONS]...")
def job(url: str | None, api_key_file: Path | None, output: Path, arguments: tuple[str, ...]) -> None:
    """Inside a pod: run a bench and put its record at the end of the log. SIGTERM: keep what is measured."""
    folder = output / socket.gethostname()
    given = ["--url", url] if url and not _has(arguments, "--url") else []
    if given and api_key_file is not None and not _has(arguments, "--api-key-file"):
        given += ["--api-key-file", str(api_key_file)]
    command = [sys.executable, "-m", "edge_llm", "bench", *arguments, *given, "--output", str(folder)]
    status = _run(command)
    for line in _files(folder):
        click.echo(line)
    sys.exit(status)


def _has(arguments: tuple[str, ...], option: str) -> bool:
    return any(one == option or one.startswith(f"{option}=") for one in arguments)


def _run(command: list[str]) -> int:
    """Its exit code. Whoever stops us stops it, by Ctrl-C."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def tell(_signal: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            child.send_signal(signal.SIGINT)

    # the first process of a container has no default: it must ask for its signals
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, tell)
    status = child.wait()
    return status if status >= 0 else 128 - status


def _files(folder: Path) -> Iterator[str]:
    """Everything that this pod left on the volume, lines of its log."""
    from edge_llm.bench.cases import SUFFIX
    from edge_llm.bench.log_files import lines_of_file

    for path in sorted(folder.glob("*.json*") if folder.is_dir() else ()):
        size = path.stat().st_size
        if path.name.endswith(SUFFIX) and size > MAX_LINES_BYTES:
            yield f"{path.name}: {size >> 20} MiB, on the volume only"
            continue
        yield from lines_of_file(path.name, path.read_bytes())
