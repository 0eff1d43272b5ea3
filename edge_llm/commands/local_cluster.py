"""Servers that a bench measures: a cluster of ours, or llama-server, started for it and stopped after it.

Owns turning a `Layout` into processes. Refuses to know what is measured.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import aiohttp
import click

from edge_llm.bench.layout import Layout, LocalProcess, Started
from edge_llm.bench.processes import MeasureFailed, pinned
from edge_llm.commands.supervisor import LOOPBACK, SIMULATED_MODEL, Supervisor, free_port
from edge_llm.config import UpConfig, load_settings

_READY_S: Final = 300.0
_POLL_S: Final = 0.1
_END_S: Final = 10.0
_OUR_KERNELS: Final = ("-fa", "off", "--no-kv-unified")


@asynccontextmanager
async def local_cluster(
    layout: Layout,
    model: str,
    place: Callable[[str, int], str] | None = None,
    key: bytes | None = None,
    neighbours: Sequence[tuple[str, str]] = (),
    threads: int = 1,
) -> AsyncIterator[Started]:
    """Workers with so many threads each (0: the cores are shared out), pinned to cores of their own; simulated ones for
    the model `simulated`. Of the user's settings of `up` only `show_logs` counts.

    `place`: where the gateway finds a worker, given its name and port. `key`: of clusters that trust each other.
    `neighbours`: workers of other clusters that the gateway knows too. Raises WorkerError when one cannot start.
    """
    settings = UpConfig(
        prefill=layout.prefill,
        decode=layout.decode,
        mixed=layout.mixed,
        simulated=layout.prefill + layout.decode + layout.mixed if model == SIMULATED_MODEL else 0,
        model=model,
        port=free_port(),
        threads=threads,
        pin=True,
        show_logs=load_settings(UpConfig, {}).show_logs,
    )
    supervisor = Supervisor(
        settings, model, layout.options, _say, place, key, neighbours, gateway_arguments=layout.gateway_options
    )
    for child in supervisor.workers:
        child.program = ("env", *layout.environ, *child.program) if layout.environ else child.program
    ready, stop = asyncio.Event(), asyncio.Event()
    began_s = asyncio.get_running_loop().time()
    running = asyncio.create_task(supervisor.run(stop, ready.set), name="cluster")
    waiting = asyncio.create_task(ready.wait())
    try:
        await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running
        processes = tuple(
            LocalProcess(child.name, child.process.pid, child.cores, child.port, child.ready_s - began_s)
            for child in supervisor.children
            if child.process is not None
        )
        yield Started(f"http://{LOOPBACK}:{settings.port}", processes)
    finally:
        waiting.cancel()
        stop.set()
        await running


@asynccontextmanager
async def llama_server(
    tool: Path, model: Path, core: int, slots: int, n_ctx: int, stock_options: Sequence[str] | None = None
) -> AsyncIterator[Started]:
    """llama-server on one core with our kernel settings, or a stock one with all its defaults but `stock_options`.
    Raises MeasureFailed when it does not become ready."""
    port = free_port()
    command = [str(tool), "-m", str(model), "--host", LOOPBACK, "--port", str(port), "-t", "1", "-tb", "1"]
    command += ["-np", str(slots), "-c", str(slots * n_ctx)]
    command += _OUR_KERNELS if stock_options is None else stock_options
    with tempfile.TemporaryFile() as log:
        with pinned([core]):
            child = await asyncio.create_subprocess_exec(
                *command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment() if stock_options is None else None,
            )
        try:
            url = f"http://{LOOPBACK}:{port}"
            await _until_healthy(url, child, command)
            yield Started(url, (LocalProcess("llama-server", child.pid, (core,)),))
        finally:
            await _end(child)


def _say(line: str) -> None:
    click.echo(line, err=True)


async def _until_healthy(url: str, child: Process, command: Sequence[str]) -> None:
    async with asyncio.timeout(_READY_S), aiohttp.ClientSession(url) as session:
        while True:
            if child.returncode is not None:
                raise MeasureFailed(f"{Path(command[0]).name} ended with status {child.returncode} while starting")
            try:
                async with session.get("/health") as reply:
                    if reply.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(_POLL_S)


async def _end(child: Process) -> None:
    if child.returncode is not None:
        return
    child.terminate()
    try:
        async with asyncio.timeout(_END_S):
            await child.wait()
    except TimeoutError:
        child.kill()
        await child.wait()


def _environment() -> dict[str, str]:
    return {**os.environ, "GGML_CPU_TILED_MM": "0"}
