"""`edge-llm cluster top`: what every node does now, again and again.

On a terminal a live screen, which `q` ends with 0 and Ctrl-C with 130; elsewhere plain lines; with --json one object a
look. A gateway that does not answer is waited for, with what it said last.

Owns the loop, the keys and the layout. Refuses to compute paces (cluster_pace.py) and to ask (cluster_gateway.py).
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from edge_llm.commands.cluster_gateway import Gateway, gateway_options
from edge_llm.commands.cluster_pace import Pace, Paces
from edge_llm.commands.cluster_status import role_of, share, state_of
from edge_llm.errors import EdgeLLMError, WorkerUnreachable

if TYPE_CHECKING:
    from rich.console import RenderableType

INTERRUPTED: Final = 130
_BAR: Final = 10


@dataclass(slots=True)
class Screen:
    """What was heard last. `problem`: why nothing newer is here."""

    found: Mapping[str, Any] = field(default_factory=dict)
    paces: Mapping[str, Pace] = field(default_factory=dict)
    problem: str = ""

    def rows(self) -> list[dict[str, Any]]:
        nodes = sorted(self.found.get("nodes", ()), key=lambda node: str(node["worker"]))
        return [_row(node, self.paces.get(node["worker"], Pace())) for node in nodes]


@click.command()
@click.option("--interval-s", type=click.FloatRange(min=0.2, max=60), default=1.0, show_default=True)
@click.option("--once", is_flag=True, help="Two looks for the paces, one answer.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per look.")
@gateway_options
def top(interval_s: float, once: bool, as_json: bool, url: str, api_key_file: Path | None) -> None:
    """Live: slots, tokens/s, waiting prompt tokens, CPU, RAM and heat of every node, and requests by state."""
    gateway, paces, screen = Gateway.of(url, api_key_file), Paces(), Screen()
    _look(gateway, paces, screen)
    if screen.problem:
        raise WorkerUnreachable(screen.problem)
    try:
        if once:
            time.sleep(max(1.2, interval_s))  # a node says its counters once a second
            _look(gateway, paces, screen)
            _print(screen, as_json)
        elif as_json or not sys.stdout.isatty():
            _lines(lambda: _look(gateway, paces, screen), screen, interval_s, as_json)
        else:
            _live(lambda: _look(gateway, paces, screen), screen, interval_s)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _look(gateway: Gateway, paces: Paces, screen: Screen) -> None:
    try:
        found = gateway.overview()
    except EdgeLLMError as error:
        screen.problem = error.message
        return
    screen.found, screen.problem = found, ""
    screen.paces = paces.of(found["nodes"], time.monotonic())


# -- plain


def _lines(look: Callable[[], None], screen: Screen, interval_s: float, as_json: bool) -> None:
    while True:
        _print(screen, as_json)
        time.sleep(interval_s)
        look()


def _print(screen: Screen, as_json: bool) -> None:
    if screen.problem:
        click.echo(screen.problem, err=True)
        return
    if as_json:
        click.echo(json.dumps({"requests": screen.found["requests"], "nodes": screen.rows()}))
        return
    click.echo(_requests(screen.found))
    for row in screen.rows():
        click.echo("  " + "  ".join(f"{name} {cell}" if name else cell for name, cell in _cells(row)))


def _requests(found: Mapping[str, Any]) -> str:
    counts = found.get("requests", {})
    return "requests: " + (", ".join(f"{count} {state}" for state, count in counts.items() if count) or "none")


def _row(node: Mapping[str, Any], pace: Pace) -> dict[str, Any]:
    """The figures of one node."""
    load, board = node["load"], node["board"] or {}
    return {
        "worker": node["worker"],
        "role": role_of(node),
        "state": state_of(node),
        "slots": node["slots"],
        "slots_used": node["slots"] - load["slots_free"],
        "generated_tokens_per_s": _rounded(pace.generated),
        "computed_tokens_per_s": _rounded(pace.computed),
        "pending_prompt_tokens": load["pending_prompt_tokens"],
        "cpu_share": board.get("cpu_share"),
        "ram_share": board.get("ram_share"),
        "temperature_c": board.get("temperature_c"),
        "throttled": [kind for kind, is_so in board.get("throttled", {}).items() if is_so],
        "seen_ago_s": node["seen_ago_s"],
    }


def _cells(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """For people: what, and how much."""
    return [
        ("", f"{row['worker']:<20} {row['role']:<9} {row['state']:<9}"),
        ("slots", f"{row['slots_used']}/{row['slots']}"),
        ("decode t/s", _number(row["generated_tokens_per_s"])),
        ("prefill t/s", _number(row["computed_tokens_per_s"])),
        ("waiting", str(row["pending_prompt_tokens"])),
        ("CPU", share(row["cpu_share"])),
        ("RAM", share(row["ram_share"])),
        ("heat", _heat(row)),
    ]


def _heat(row: Mapping[str, Any]) -> str:
    degrees = "-" if row["temperature_c"] is None else f"{row['temperature_c']:.0f} C"
    return " ".join([degrees, *(kind.replace("_", " ") for kind in row["throttled"])])


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


# -- live


def _live(look: Callable[[], None], screen: Screen, interval_s: float) -> None:
    from rich.console import Console
    from rich.live import Live

    with _keys() as pressed, Live(_table(screen), console=Console(), screen=True, auto_refresh=False) as live:
        while "q" not in pressed(interval_s):
            look()
            live.update(_table(screen), refresh=True)


def _table(screen: Screen) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, expand=True)
    for name in ("node", "role", "state", "slots", "", "decode t/s", "prefill t/s", "waiting", "CPU", "RAM", "heat"):
        table.add_column(name, justify="left" if name in ("node", "role", "state", "") else "right")
    rows = screen.rows()
    for row in rows:
        cells = [
            row["worker"],
            row["role"],
            row["state"],
            f"{row['slots_used']}/{row['slots']}",
            _bar(row),
            *(cell for name, cell in _cells(row) if name not in ("", "slots")),
        ]
        table.add_row(*map(Text, cells), style="red" if row["throttled"] else "" if row["state"] == "ready" else "dim")
    made = sum(row["generated_tokens_per_s"] or 0 for row in rows)
    read = sum(row["computed_tokens_per_s"] or 0 for row in rows)
    head = (
        f"{screen.found.get('gateway', '')}  {_requests(screen.found)}  {made:.1f} tokens/s out, {read:.1f} in   q ends"
    )
    parts: list[RenderableType] = [Text(head, style="bold"), table]
    if screen.problem:
        parts.append(Text(screen.problem, style="red"))
    return Group(*parts)


def _bar(row: Mapping[str, Any]) -> str:
    full = round(_BAR * row["slots_used"] / row["slots"]) if row["slots"] else 0
    return "#" * full + "." * (_BAR - full if row["slots"] else 0)


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Gives a function that waits for keys for so long: what was typed. Without a terminal to read from it only
    waits."""
    if not sys.stdin.isatty():

        def slept(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield slept
        return
    import termios
    import tty

    kept = termios.tcgetattr(sys.stdin)

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return os.read(sys.stdin.fileno(), 64).decode(errors="replace") if ready else ""

    try:
        tty.setcbreak(sys.stdin)  # keys at once, Ctrl-C as ever
        yield pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, kept)
