"""The figures of `edge-llm bench serve` for people: tables, then sentences, then what the words mean.

Owns the layout. Refuses to know how anything was measured: it reads what `--json` prints.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import click

_TIMES: Final = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2el_ms": "E2E"}
# As Splitwise's table has them; its TBT is what is TPOT everywhere else here.
_SLOWED: Final = {"ttft": "TTFT", "tbt": "TPOT (TBT)", "e2e": "E2E"}
# Of tables that go into a file.
_WIDTH: Final = 130
# More loads than these have a line each, and no table of their own.
_IN_FULL: Final = 3
_SPREAD: Final = ("mean", "p50", "p90", "p95", "p99")


def show(found: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    click.echo("workload  " + ", ".join(f"{name}: {_word(value)}" for name, value in found["workload"].items()))
    for name, one in found["contenders"].items():
        server = one["server"]
        click.echo(f"\n{name}  {', '.join(server['urls'])}  {server['model']}  ({server['prompts']})")
        if alone := one["alone"]:
            spreads = [(word, alone[key]) for key, word in _TIMES.items() if alone.get(key)]
            times = ", ".join(f"{word} {spread['p50']:.1f}" for word, spread in spreads)
            click.echo(f"  one request at a time (ms, p50 of {alone['requests']}): {times}")
        loads = one["loads"]
        for load in loads if len(loads) <= _IN_FULL else ():
            console.print(_times(load))
            for line in _rates(load):
                click.echo(f"  {line}")
        if len(loads) > 1:
            console.print(_curve(f"{name}, all loads", loads, [load["label"] for load in loads]))
        for line in _goodput(one["goodput"]):
            click.echo(f"  {line}")
        for load in loads:
            if load["slowdown"]:
                console.print(_slowdown(load["slowdown"]))
                click.echo(f"  {_compared(load['slowdown'])}")
    for label, rows in _together(found["contenders"]).items():
        console.print(_curve(label, list(rows.values()), list(rows)))
    for line in found["sentences"]:
        click.echo(line)
    click.echo("")
    for word, meaning in found["definitions"].items():
        click.echo(f"{word:<12}{meaning}")


def _together(contenders: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Loads that several were under, by label: who was, and what came of it."""
    found: dict[str, dict[str, Any]] = {}
    for name, one in contenders.items():
        for load in one["loads"]:
            found.setdefault(load["label"], {})[name] = load
    return {label: rows for label, rows in found.items() if len(rows) > 1}


def _goodput(found: Mapping[str, Any]) -> Iterator[str]:
    for key, at in found.items():
        bound = {"at_most": " (the lowest rate measured was too high)", "at_least": " or more"}.get(at["bound"], "")
        per_node = "" if at["per_node_per_s"] is None else f", {at['per_node_per_s']:.4g} a node"
        yield (
            f"{key}: {at['per_s']:.4g} requests/s{bound}, 95 % interval {at['low']:.4g} to {at['high']:.4g}{per_node}"
        )


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
    if found["generator"]:
        yield f"requests left late by {found['generator']['late_ms_p99']:.2f} ms at p99"
    if found["stages_ms"]:
        stages = ", ".join(f"{name} {one['p50']:.1f}" for name, one in found["stages_ms"].items())
        yield f"stages (ms, p50): {stages}"
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
        tried = [float(scale) for scale in scales["attainment"]]
        best = ", ".join(f"{name} {_tightest(scale, tried)}" for name, scale in scales["tightest"].items())
        yield f"limits times: {shares}; {best}"


def _tightest(scale: float | None, tried: Sequence[float]) -> str:
    """What was not tried may be tighter still, or attained where nothing that was tried is."""
    if scale is None:
        return f"> {max(tried):g}"
    return f"<= {scale:g}" if scale == min(tried) else f"{scale:g}"


def _curve(title: str, loads: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Any:
    """A line for each load, in order of load."""
    from rich.table import Table

    table = Table(title=f"{title} (ms)", title_justify="left")
    for column in ("", "complete", "requests/s", "tokens/s", "TTFT p50", "p99", "TPOT p50", "p99", "E2E p50", "kept"):
        table.add_column(column, justify="right" if column else "left")
    rows = zip(labels, loads, strict=True)
    for label, load in sorted(rows, key=lambda row: row[1]["rate_per_s"] or row[1]["clients"] or 0):
        found = load["figures"]
        cells = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("tpot_ms", "p50"), ("tpot_ms", "p99"), ("e2el_ms", "p50"))
        spreads = [found[key][at] if found[key] else None for key, at in cells]
        attained = found["attained"]
        table.add_row(
            label,
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

    title = f"times slower than alone: {'all nine hold' if found['holds'] else 'not all hold'}"
    table = Table(title=title, title_justify="left")
    for column in ("", "P50", "P90", "P99"):
        table.add_column(column)
    for metric, row in found["table"].items():
        cells = (
            f"{cell['slowdown']:.2f} {'<=' if cell['is_kept'] else '>'} {cell['limit']:g}" for cell in row.values()
        )
        table.add_row(_SLOWED[metric], *cells)
    return table


def _compared(found: Mapping[str, Any]) -> str:
    return (
        f"{found['requests']} of {found['of']} requests, {found['alone']} sent alone; other lengths are compared with "
        "what lies between these (see slowdown below)"
    )


def _word(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_word(one)}" for name, one in value.items() if one) + "}"
    return str(value)
