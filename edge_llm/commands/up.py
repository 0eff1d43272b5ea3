"""`edge-llm up|down|status`: a whole cluster on this machine."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_llm.commands.cluster_state import ClusterState, forget_state, need_state, read_state, state_path, write_state
from edge_llm.commands.endpoint import open_url
from edge_llm.commands.greeting import greeting, own_command
from edge_llm.commands.serve import SLO_SETTINGS, config_option, slo_option
from edge_llm.commands.supervisor import SIMULATED_MODEL, Supervisor, check_port_free
from edge_llm.config import DEFAULT_MODEL, GatewayConfig, UpConfig, WorkerConfig, load_settings
from edge_llm.errors import ConfigError, WorkerUnreachable
from edge_llm.reasons import reason_of

if TYPE_CHECKING:
    from edge_llm.catalogue.resolve import LocalModel

_PORTS = click.IntRange(1, 65535)
_port = click.option("--port", type=_PORTS, help="Port of the endpoint; needed where several clusters run.")
STATUS_S = 5.0
_INTERRUPTED = 130


@click.command(context_settings={"ignore_unknown_options": False})
@config_option
@click.option("--prefill", type=int, help="Prefill workers (default 1).")
@click.option("--decode", type=int, help="Decode workers (default 1).")
@click.option("--mixed", type=int, help="Workers that do both (default 0).")
@click.option("--simulated", type=int, help="So many simulated workers, no model: for load and fault tests.")
@click.option("--model", help="Name in models.yaml or path of a .gguf file.")
@click.option("--port", type=_PORTS, help="Port of the endpoint (default 8080).")
@click.option("--threads", type=int, help="Threads per worker; 0 shares the cores out.")
@click.option("--pin/--no-pin", default=None, help="Give each worker cores of its own.")
@click.option("--show-logs/--no-show-logs", default=None, help="Pass the logs of gateway and workers on to stderr.")
@slo_option
@click.option("--detach", is_flag=True, help="Return when the cluster is ready; stop it with `edge-llm down`.")
@click.option("--detached", is_flag=True, hidden=True, help="What --detach starts: Ctrl-C does not reach it.")
@click.argument("worker_options", nargs=-1, type=click.UNPROCESSED)
def up(
    config: Path | None,
    slo: Mapping[str, float] | None,
    detach: bool,
    detached: bool,
    worker_options: tuple[str, ...],
    **flags: Any,
) -> None:
    """Start a local cluster: gateway, prefill and decode workers, default model.

    Options after `--` go to every worker, e.g. `edge-llm up -- --policy fast --slots 4`, or
    `edge-llm up --simulated 8 -- --simulated-prompt-tokens-per-s 1000 --simulated-step-s 0.01 --simulated-row-s 0.001`.
    """
    if worker_options and not worker_options[0].startswith("-"):
        raise click.UsageError(f"{worker_options[0]!r} is no option, of `up` or of workers")
    settings = _with_shared(load_settings(UpConfig, flags, config), config)
    running = read_state(settings.port)
    if running is not None:
        raise ConfigError(
            f"a cluster already runs on port {settings.port} (pid {running.pid}); "
            f"`edge-llm down --port {settings.port}` stops it"
        )
    if detach:
        _detach(settings.port)
    else:
        stop = f"`{own_command()} down --port {settings.port}`" if detached else "Ctrl-C"
        _run(settings, worker_options, slo_arguments(slo), stop)


def _with_shared(settings: UpConfig, config: Path | None) -> UpConfig:
    """Port and model as the gateway's and the workers' own sections have them, where nothing says so of `up`."""
    given = {"port": load_settings(GatewayConfig, {}, config), "model": load_settings(WorkerConfig, {}, config)}
    found = {name: getattr(other, name) for name, other in given.items() if name in other.model_fields_set}
    return settings.model_copy(update={name: found[name] for name in found.keys() - settings.model_fields_set})


@click.command()
@_port
def down(port: int | None) -> None:
    """Stop the cluster of `edge-llm up`."""
    state = need_state(port)
    try:
        os.kill(state.pid, signal.SIGTERM)
    except OSError as error:
        raise ConfigError(f"the cluster on port {state.port} (pid {state.pid}) cannot be told: {error}") from error
    deadline_s = time.monotonic() + state.stop_s
    while state.is_running and time.monotonic() < deadline_s:
        time.sleep(0.1)
    which = f"the cluster on port {state.port} ({state.model})"
    click.echo(f"{which} is still stopping (pid {state.pid})" if state.is_running else f"stopped {which}")


@click.command()
@_port
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(port: int | None, as_json: bool) -> None:
    """What the cluster of `edge-llm up` is doing."""
    state = need_state(port)
    cluster = _asked(state)
    if as_json:
        click.echo(json.dumps({"pid": state.pid, "url": state.url, "model": state.model, **cluster}))
        return
    click.echo(f"{state.url}  model {state.model}  (pid {state.pid})")
    for node in cluster["nodes"]:
        load = node["load"]
        click.echo(
            f"  {node['worker']:<12} {node['role']:<8} {node['address']:<21} level {node['level']:<10} "
            f"running {load['sequences_running']}/{node['slots']}  waiting tokens {load['pending_prompt_tokens']}"
        )


def _asked(state: ClusterState) -> Any:
    """What its gateway says of the cluster."""
    try:
        with open_url(urllib.request.Request(f"{state.url}/cluster"), STATUS_S) as reply:
            return json.load(reply)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise WorkerUnreachable(
            f"the cluster on port {state.port} runs (pid {state.pid}), but its gateway does not answer: "
            f"{reason_of(error)}"
        ) from error


def slo_arguments(slo: Mapping[str, float] | None) -> Sequence[str]:
    """The gateway's options that say the same."""
    limits = ",".join(f"{name}={slo[key]!r}" for name, key in SLO_SETTINGS.items() if key in slo) if slo else ""
    return ("--slo", limits) if limits else ()


def _run(settings: UpConfig, worker_options: Sequence[str], gateway_options: Sequence[str], stop: str) -> None:
    check_port_free(settings.port)
    name, wanted = SIMULATED_MODEL, SIMULATED_MODEL
    if not settings.simulated:
        model, wanted = _fetched(settings.model)
        name, settings = model.name, _with_roles_for(settings, model)
    supervisor = Supervisor(
        settings,
        wanted,
        worker_options,
        lambda line: click.echo(line, err=True),
        gateway_arguments=gateway_options,
    )
    workers = {child.name: f"127.0.0.1:{child.port}" for child in supervisor.workers}

    def on_ready() -> None:
        state = ClusterState.of_this_process(settings.port, name, workers, supervisor.stop_s)
        write_state(state, supervisor.key)
        can_split = {"prefill", "decode"} <= set(settings.roles)
        which = "" if settings.model == DEFAULT_MODEL else f" --model {shlex.quote(settings.model)}"
        click.echo(greeting(state.url, name, _levels(supervisor), can_split, stop, which))

    try:
        if not asyncio.run(_until_signal(supervisor, on_ready)):
            click.echo("stopped before the cluster was ready", err=True)
            sys.exit(_INTERRUPTED)
    except BaseExceptionGroup as group:
        raise _root_of(group) from None
    finally:
        forget_state(settings.port)


def _fetched(wanted: str) -> tuple[LocalModel, str]:
    """The model, and what workers are told. They get the name, not the path, of a known model: it stays its name, and
    they find the same verified file."""
    from edge_llm.catalogue.resolve import find, is_path, resolve
    from edge_llm.commands.progress import progress

    is_file = is_path(wanted)
    with progress(f"model {wanted if is_file else find(wanted).file}", is_bytes=True) as report:
        model = resolve(wanted, report)
    return model, str(model.path) if is_file else wanted


def _with_roles_for(settings: UpConfig, model: LocalModel) -> UpConfig:
    """The same roles, or mixed workers for a model whose state cannot travel, unless the roles were asked for."""
    from edge_llm.catalogue.gguf import read_card
    from edge_llm.kv.snapshot import UNSPLIT

    memory = read_card(model.path).memory
    if memory not in UNSPLIT or not settings.prefill:
        return settings
    why = f"{model.name} is a {memory} model: its state is no KV cache that could travel, so it runs unsplit"
    if "prefill" in settings.model_fields_set:
        raise ConfigError(f"{why}, and no worker can have role prefill: use `--prefill 0 --decode 0 --mixed 1`")
    mixed = settings.decode + settings.mixed or 1
    click.echo(f"{why}, on {mixed} mixed worker{'s' * (mixed > 1)}", err=True)
    return settings.model_copy(update={"prefill": 0, "decode": 0, "mixed": mixed})


async def _until_signal(supervisor: Any, on_ready: Any) -> bool:
    """Whether the cluster was ready before it was told to stop."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    running = asyncio.create_task(supervisor.run(stop, on_ready))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not running.done() and not supervisor.gateway.ready:
        running.cancel()  # stopped while it was starting
    try:
        await running
    except asyncio.CancelledError:
        return False
    return True


def _root_of(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


def _detach(port: int) -> None:
    """The same command in the background, until its state file says that it is ready. Interrupted, it is stopped."""
    log = state_path(port).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = ["--detached" if argument == "--detach" else argument for argument in sys.argv[1:]]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "edge_llm", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        while read_state(port) is None:
            if process.poll() is not None:
                words = log.read_text()[-2000:].strip().removeprefix("edge-llm: ")
                raise ConfigError(f"the cluster could not start: {words}")
            time.sleep(0.1)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        click.echo("stopped before the cluster was ready", err=True)
        raise
    click.echo(log.read_text(), nl=False)


def _levels(supervisor: Any) -> set[str]:
    """What the workers promise of their exactness."""
    return {child.ready["level"] for child in supervisor.workers if child.ready}
