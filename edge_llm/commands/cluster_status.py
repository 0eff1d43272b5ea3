"""`edge-llm cluster status`: who is there, what each does, and who can exchange KV with whom.

Owns the layout (a table where the terminal is wide enough, else a few lines a node; nothing is ever cut off) and the
exit code: 0 when somebody serves, else 1. Refuses to judge exchange (cluster_exchange.py).
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from edge_llm.commands.cluster_exchange import SHORT, exchange, sentences, serves
from edge_llm.commands.cluster_gateway import Gateway, gateway_options
from edge_llm.commands.cluster_moves import POD
from edge_llm.words import counted

# Of a table that is measured, or goes into a file: as wide as it needs.
_ANY_WIDTH: Final = 10_000
_NO_BREAK: Final = "\N{NO-BREAK SPACE}"
_SHOWN: Final = {
    "node": "left",
    "role": "left",
    "state": "left",
    "model": "left",
    "level": "left",
    "class": "left",
    "build": "left",
    "slots": "right",
    "KV": "right",
    "prefill t/s": "right",
    "step ms": "right",
    "CPU": "right",
    "RAM": "right",
    "temp": "right",
}


@click.command()
@gateway_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(url: str, api_key_file: Path | None, as_json: bool) -> None:
    """Nodes, their roles, state and load, and who can exchange KV. Exit code 1 when nobody serves."""
    found = Gateway.of(url, api_key_file).overview()
    nodes = sorted(found["nodes"], key=lambda node: str(node["worker"]))
    is_served = serves(nodes)
    if as_json:
        click.echo(json.dumps({"serves": is_served, "exchange": exchange(nodes), **found}))
    else:
        _show(found, nodes, is_served)
    sys.exit(0 if is_served else 1)


def _show(found: Mapping[str, Any], nodes: list[dict[str, Any]], is_served: bool) -> None:
    requests = ", ".join(f"{count} {state}" for state, count in found["requests"].items() if count) or "no requests"
    click.echo(f"{found['gateway']}: {counted(len(nodes), 'node')}, {requests}")
    if nodes:
        _table(nodes)
    for line in (
        *_links(nodes),
        *_limits(nodes),
        *_unmeasured_pods(nodes),
        *sentences(nodes),
        *_unanswered(found.get("discovery") or {}),
    ):
        click.echo(line)
    if not is_served:
        click.echo("nobody serves: no worker that decodes is ready", err=True)


def _table(nodes: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name, justify in _SHOWN.items():
        table.add_column(name, justify="right" if justify == "right" else "left", no_wrap=True)
    for node in nodes:
        # Text, because names of workers and models are not markup
        table.add_row(*(Text(str(cell)) for cell in row_of(node).values()))
    console = Console(width=None if sys.stdout.isatty() else _ANY_WIDTH)
    if Measurement.get(console, console.options.update(width=_ANY_WIDTH), table).maximum <= console.width:
        console.print(table)
        return
    for node in nodes:
        click.echo("\n".join(stacked(row_of(node), console.width)))


def stacked(row: Mapping[str, str], width: int) -> Iterator[str]:
    """The cells of one node in lines of this width: who it is, then what it has and does. What is not known is left
    out."""
    known = {name: cell for name, cell in row.items() if cell != "-"}
    head = [f"{known.pop('node')}  {known.pop('role')}", known.pop("state"), f"level {known.pop('level')}"]
    facts = [f"{name} {known.pop(name)}" for name in ("model", "class", "build")]
    load = [_figure(name, cell) for name, cell in known.items()]
    for parts, indent in ((head, ""), (facts, "  "), (load, "  ")):
        text = ", ".join(part.replace(" ", _NO_BREAK) for part in parts)
        for line in textwrap.wrap(
            text,
            width,
            initial_indent=indent,
            subsequent_indent="    ",
            break_on_hyphens=False,
            break_long_words=False,
        ):
            yield line.replace(_NO_BREAK, " ")


def _figure(name: str, cell: str) -> str:
    """`step 21.0 ms` of a column that has its unit in its head."""
    what, _, unit = name.partition(" ")
    return f"{what} {cell} {unit}".rstrip()


def row_of(node: Mapping[str, Any]) -> dict[str, str]:
    """The cells of one node."""
    load, board = node["load"], node["board"] or {}
    taken = node["slots"] - load["slots_free"]
    cells = node["slots"] * node["n_ctx"]
    return {
        "node": node["worker"],
        "role": role_of(node),
        "state": state_of(node),
        "model": node["model"],
        "level": node["level"],
        "class": node["exactness_class"][:SHORT],
        "build": f"{node['version']}, llama-cpp {node['build'].get('llama_cpp_python', '?')}",
        "slots": f"{taken}/{node['slots']}" if node["slots"] else "-",
        "KV": share(1 - load["kv_cells_free"] / cells if cells else None),
        "prefill t/s": f"{rate:.0f}" if (rate := prefill_rate(load)) else "-",
        "step ms": f"{1e3 * step_s:.1f}" if (step_s := step_of(load)) else "-",
        "CPU": share(board.get("cpu_share")),
        "RAM": share(board.get("ram_share")),
        "temp": f"{degrees:.0f} C" if (degrees := board.get("temperature_c")) is not None else "-",
    }


def role_of(node: Mapping[str, Any]) -> str:
    """Its role, and the pool that it helps out in."""
    home = {"prefill": "prompt", "decode": "token"}.get(node["role"], "mixed")
    pool = node.get("pool", home)
    return str(node["role"]) if pool in (home, node["role"]) else f"{node['role']}, helps {pool}"


def state_of(node: Mapping[str, Any]) -> str:
    if node["is_draining"]:
        left = node["load"]["sequences_running"]
        return f"draining, {left} left" if left else "drained"
    return "ready" if node["is_ready"] else "not ready"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def prefill_rate(load: Mapping[str, Any]) -> float:
    """Prompt tokens a second, as measured on its work; 0: not known."""
    token_s = load["rates"]["token_s"]
    return float(load["prefill_tokens_per_s"] or (1 / token_s if token_s else 0.0))


def step_of(load: Mapping[str, Any]) -> float:
    """Seconds of a decode step; 0: not known."""
    return float(load["decode_step_s"] or load["rates"]["run_s"] + load["rates"]["row_s"])


def _links(nodes: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for node in nodes:
        ways = [
            f"{link['peer']} {_speed(link['bytes_per_s'])}, round trip {1e3 * link['round_trip_s']:.1f} ms"
            for link in sorted(node["load"]["links"], key=lambda link: str(link["peer"]))
        ]
        if ways:
            yield f"KV to {node['worker']} came from {'; '.join(ways)}"


def _speed(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e6:.0f} MB/s" if bytes_per_s else "at a speed not known yet"


def _limits(nodes: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """What holds boards back, and why a level is lower than it could be."""
    for node in nodes:
        held = [kind for kind, is_so in (node["board"] or {}).get("throttled", {}).items() if is_so]
        if held:
            yield f"{node['worker']} is held back: {', '.join(held).replace('_', ' ')}"
        if node["level"] != "exact" and node["level_reason"] and not _is_unmeasured_pod(node):
            yield f"{node['worker']} has level {node['level']}: {node['level_reason']}"


def _unmeasured_pods(nodes: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """A pod measures by its manifest: there is nobody to run `edge-llm verify` by hand, and no second model to load."""
    pods = [str(node["worker"]) for node in nodes if _is_unmeasured_pod(node)]
    if pods:
        yield (
            f"{', '.join(pods)}: level unverified, although a pod measures it before its worker starts "
            f"(EDGE_LLM_VERIFY_FIRST=yes in worker.env): `kubectl -n edge-llm logs {pods[0]} -c verify` says why not, "
            f"`kubectl -n edge-llm delete pod {pods[0]}` has it tried again"
        )


def _is_unmeasured_pod(node: Mapping[str, Any]) -> bool:
    return node["level"] == "unverified" and POD.fullmatch(str(node["worker"])) is not None


def _unanswered(discovery: Mapping[str, Any]) -> Iterable[str]:
    if discovery.get("problem"):
        yield f"where workers are is not known for sure: {discovery['problem']}"
    for silent in discovery.get("silent_workers", ()):
        who = f"{silent['worker']} at {silent['address']}"
        why = str(silent["message"]).removeprefix(f"worker {who}: ")
        yield f"{who} does not answer: {why or 'not asked yet'}"
