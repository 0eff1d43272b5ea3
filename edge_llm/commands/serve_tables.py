"""The figures of `edge-llm bench serve` for people: tables, then sentences, then what the words mean.

Owns the layout. Refuses to know how anything was measured: it reads what `--json` prints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import click

_TIMES: Final = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2el_ms": "E2E"}
_SPREAD: Final = ("mean", "p50", "p90", "p95", "p99")


def show(found: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    click.echo("workload  " + ", ".join(f"{name}: {_word(value)}" for name, value in found["workload"].items()))
    for name, one in found["contenders"].items():
        server = one["server"]
        click.echo(f"\n{name}  {', '.join(server['urls'])}  {server['model']}  ({server['prompts']})")
        for load in one["loads"]:
            console.print(_times(load))
            for line in _rates(load):
                click.echo(f"  {line}")
            if load["slowdown"]:
                console.print(_slowdown(load["slowdown"]))
        if len(one["loads"]) > 1:
            console.print(_curve(one["loads"]))
        for key, at in one["goodput"].items():
            bound = {"at_most": " (the lowest rate measured was too high)", "at_least": " or more"}.get(at["bound"], "")
            click.echo(
                f"  {key}: {at['per_s']:.4g} requests/s{bound}, 95 % interval {at['low']:.4g} to {at['high']:.4g}, "
                f"{at['per_node_per_s']:.4g} a node"
            )
    for line in found["sentences"]:
        click.echo(line)
    click.echo("")
    for word, meaning in found["definitions"].items():
        click.echo(f"{word:<12}{meaning}")


def _times(load: Mapping[str, Any]) -> Any:
    from rich.table import Table

    figures = load["figures"]
    table = Table(title=f"{load['label']} (ms)", title_justify="left")
    for column in ("", *_SPREAD, "n"):
        table.add_column(column, justify="left" if not column else "right")
    for key, word in _TIMES.items():
        if spread := figures[key]:
            table.add_row(word, *(f"{spread[at]:.1f}" for at in _SPREAD), str(spread["n"]))
    return table


def _rates(load: Mapping[str, Any]) -> Iterator[str]:
    found = load["figures"]
    counts = [f"{found['completed']} of {found['requests']} requests complete in {found['duration_s']:.1f} s"]
    counts += [f"{count} {kind}" for kind, count in found["failed"].items()]
    counts += [f"{found['cut_short']} cut short"] if found["cut_short"] else []
    yield ", ".join(counts)
    offered = f" ({found['offered_per_s']:.4g} offered)" if found["offered_per_s"] else ""
    yield (
        f"{found['request_throughput']:.4g} requests/s{offered}, {found['output_throughput']:.4g} answer tokens/s, "
        f"{found['total_token_throughput']:.4g} tokens/s in all"
    )
    cached = f", {found['cached_tokens']} of them cached" if found["cached_tokens"] is not None else ""
    yield (
        f"{found['prompt_tokens']} prompt tokens{cached}, {found['answer_tokens']} answer tokens, counted by "
        + ", ".join(found["counted_by"])
        if found["counted_by"]
        else "no answer was complete"
    )
    if found["modes"]:
        yield "answers by mode: " + ", ".join(f"{count} {mode}" for mode, count in found["modes"].items())
    if limit := found["attained"]:
        limits = [f"{name} <= {limit[f'{name}_s']:g} s" for name in ("ttft", "tpot") if limit[f"{name}_s"] is not None]
        yield (
            f"{limit['attainment']:.1%} keep {' and '.join(limits)} (95 % interval {limit['low']:.1%} to "
            f"{limit['high']:.1%}): {limit['request_goodput']:.4g} requests/s"
        )
    if scales := load["slo_scales"]:
        shares = ", ".join(f"x{scale} {share:.0%}" for scale, share in scales["attainment"].items())
        best = ", ".join(f"{name} {_word(scale)}" for name, scale in scales["tightest"].items())
        yield f"limits times: {shares}; {best}"


def _curve(loads: list[Mapping[str, Any]]) -> Any:
    """A line for each load, in order of load."""
    from rich.table import Table

    table = Table(title="all loads", title_justify="left")
    for column in ("load", "complete", "requests/s", "tokens/s", "TTFT p50", "p99", "TPOT p50", "p99", "keep limits"):
        table.add_column(column, justify="left" if column == "load" else "right")
    for load in sorted(loads, key=lambda load: load["rate_per_s"] or load["clients"] or 0):
        found = load["figures"]
        spreads = [found[key][at] if found[key] else None for key in ("ttft_ms", "tpot_ms") for at in ("p50", "p99")]
        attained = found["attained"]
        table.add_row(
            load["label"],
            f"{found['completed']}/{found['requests']}",
            f"{found['request_throughput']:.3g}",
            f"{found['output_throughput']:.4g}",
            *(f"{value:.1f}" if value is not None else "-" for value in spreads),
            f"{attained['attainment']:.0%}" if attained else "-",
        )
    return table


def _slowdown(found: Mapping[str, Any]) -> Any:
    """Splitwise's nine, and whether each holds."""
    from rich.table import Table

    title = (
        f"times slower than alone ({found['requests']} of {found['of']} requests, {found['alone']} sent alone): "
        f"{'all nine hold' if found['holds'] else 'not all hold'}"
    )
    table = Table(title=title, title_justify="left")
    for column in ("", "P50", "P90", "P99"):
        table.add_column(column)
    for metric, row in found["table"].items():
        cells = (
            f"{cell['slowdown']:.2f} {'<=' if cell['is_kept'] else '>'} {cell['limit']:g}" for cell in row.values()
        )
        table.add_row(metric.upper(), *cells)
    return table


def _word(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_word(one)}" for name, one in value.items() if one) + "}"
    return str(value)
