"""`edge-llm bench net`: what lies between nodes: of a running cluster, or two boards and a cable."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from edge_llm.commands.measuring import (
    command_line,
    finish,
    json_option,
    output_option,
    print_tree,
    quick_option,
    steps,
    until_interrupted,
)
from edge_llm.commands.net_tables import FORMATS, show

_PORT = 9009


class _Address(click.ParamType[tuple[str, int]]):
    """`HOST:PORT`, `[IPv6]:PORT`, or a host, or (to listen at all addresses) a port alone."""

    name = "HOST:PORT"

    def convert(self, value: object, param: click.Parameter | None, context: click.Context | None) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        text = str(value)
        host, colon, port = text.rpartition(":")
        if (text.count(":") > 1 and not text.startswith("[")) or text.endswith("]") or not colon:
            host, port = text, str(_PORT)
        if not host or not port.isdigit() or not 0 <= int(port) < 1 << 16:
            self.fail(f"{value!r} is not like 10.0.0.11:{_PORT}", param, context)
        return host.strip("[]"), int(port)


@click.command()
@click.option("--workers-file", type=click.Path(path_type=Path), help="Who the workers are: the gateway's file.")
@click.option("--key-file", type=click.Path(path_type=Path), help="The cluster's key.")
@click.option("--port", type=click.IntRange(1, 65535), help="Of `edge-llm up`, where several of its clusters run.")
@click.option("--listen", type=_Address(), help="Answer on this board, until Ctrl-C; no cluster is needed.")
@click.option("--to", "peer", type=_Address(), help="Measure the link to the board that listens.")
@click.option("--prompt-tokens", type=click.IntRange(16, 1 << 20), default=1024, show_default=True)
@click.option("--repetitions", type=click.IntRange(1, 100), help="Prompts of each kind and pair (default 3, quick 1).")
@click.option("--seconds", type=click.FloatRange(0.1, 60), help="Of each direction of a link (default 5, quick 1).")
@click.option("--burst-bytes", type=click.IntRange(1024, 1 << 30), default=16 << 20, show_default=True)
@click.option("--kv-bytes-per-token", type=click.IntRange(1), help="Of a model, for tokens/s over a link.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(1, 3600), default=300.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-o", "--output-format", type=click.Choice(FORMATS), help="Pairs on standard output.  [default: md]")
@quick_option
@output_option
@json_option
def net(
    workers_file: Path | None,
    key_file: Path | None,
    port: int | None,
    listen: tuple[str, int] | None,
    peer: tuple[str, int] | None,
    output: Path,
    as_json: bool,
    **given: Any,
) -> None:
    """Round trip, bandwidth and hand-off rate between nodes.

    \b
    Of `edge-llm up` here:   edge-llm bench net
    Of a running cluster:    edge-llm bench net --workers-file workers.yaml --key-file cluster.key
    Of two boards without:   edge-llm bench net --listen 10.0.0.11:9009     (on one)
                             edge-llm bench net --to 10.0.0.11:9009         (on the other)
    """
    ways = sum(way is not None for way in (workers_file, listen, peer))
    if ways > 1 or (ways and port is not None):
        raise click.UsageError("give one of --workers-file (with --key-file), --listen and --to, or none for `up`")
    if as_json and given["output_format"]:
        raise click.UsageError("--json prints the whole run as one object: leave out -o")
    if listen is not None:
        _listen(*listen)
    elif peer is not None:
        if given["output_format"]:
            raise click.UsageError("-o is for pairs of workers: of a bare link there is --json")
        _link(*peer, output, as_json, given)
    elif workers_file is None and key_file is None:
        _cluster(*_of_up(port), output, as_json, given)
    elif workers_file is not None and key_file is not None:
        _cluster(_places(workers_file), key_file, output, as_json, given)
    else:
        raise click.UsageError("give both --workers-file and --key-file: workers ask for a ticket made with their key")


def _places(workers_file: Path) -> list[tuple[str, str]]:
    from edge_llm.cluster.static import StaticFile

    return [(place.worker, place.address) for place in StaticFile(workers_file).places()]


def _of_up(port: int | None) -> tuple[list[tuple[str, str]], Path]:
    """Workers and key file of the local cluster that runs. Raises ConfigError where none does."""
    from edge_llm.commands.cluster_state import key_path, need_state
    from edge_llm.errors import ConfigError

    try:
        state = need_state(port)
    except ConfigError as error:
        others = "of others name --workers-file and --key-file, of a bare link --listen or --to"
        raise ConfigError(f"{error.message}; {others}") from error
    return list(state.workers.items()), key_path(state.port)


def _listen(host: str, port: int) -> None:
    from edge_llm.bench.tcp_link import Listener

    listener = Listener(host, port)
    click.echo(f"listening at {host}:{listener.port}; Ctrl-C ends it", err=True)
    try:
        listener.serve(lambda peer, what: click.echo(f"{peer}: {what}", err=True))
    except KeyboardInterrupt:
        click.echo(f"answered {listener.answered} questions", err=True)
    finally:
        listener.close()


def _link(host: str, port: int, output: Path, as_json: bool, given: Mapping[str, Any]) -> None:
    from edge_llm.bench.net import LinkPlan, link_figures, measure_link
    from edge_llm.bench.run import Run
    from edge_llm.bench.tcp_link import Link

    quick = given["quick"]
    plan = LinkPlan(
        seconds=given["seconds"] or (1.0 if quick else 5.0),
        pings=50 if quick else 200,
        burst_bytes=given["burst_bytes"],
        bursts=3 if quick else 10,
        kv_bytes_per_token=given["kv_bytes_per_token"] or 0,
    )
    run = Run("net", command_line(), {"to": f"{host}:{port}", "seconds": plan.seconds}, folder=output)
    with steps() as report:
        found, is_complete = until_interrupted(
            lambda: measure_link(Link(host, port), plan, run, report), lambda: link_figures(plan, run)
        )
    finish(run, found, is_complete, output, as_json, [], _show_link)


def _show_link(found: dict[str, Any]) -> None:
    """Without what this run was not told: tokens/s need --kv-bytes-per-token."""
    known = {name: value for name, value in found.get("handoff", {}).items() if value is not None}
    print_tree({**found, **({"handoff": known} if known else {})})


def _cluster(
    workers: Sequence[tuple[str, str]], key_file: Path, output: Path, as_json: bool, given: Mapping[str, Any]
) -> None:
    from edge_llm.bench.net import Places, Plan, Tally, measure
    from edge_llm.bench.run import Run
    from edge_llm.errors import ConfigError
    from edge_llm.worker.client import Peer
    from edge_llm.worker.tickets import KeyRing

    try:
        keys = KeyRing.parse(key_file.read_text(), str(key_file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the key file {key_file}: {error}") from error
    peers = tuple(Peer(name, address) for name, address in workers)
    plan = Plan(
        given["prompt_tokens"],
        given["repetitions"] or (1 if given["quick"] else 3),
        given["seed"],
        given["timeout_s"],
    )
    places = Places(peers, keys, f"bench-net-{secrets.token_hex(4)}")
    config = {"workers": [peer.worker for peer in peers], "prompt_tokens": plan.prompt_tokens, "seed": plan.seed}
    run, tally = Run("net", command_line(), config, folder=output), Tally()
    with steps() as report:
        work = partial(measure, places, plan, run, tally, report)

        def measured() -> dict[str, Any]:
            asyncio.run(work())
            return tally.figures(run)

        found, is_complete = until_interrupted(measured, lambda: tally.figures(run))
    run.notes += tally.notes
    kind = given["output_format"] or "md"
    finish(run, found, is_complete, output, as_json, [], partial(show, kind=kind), kind != "md")
