"""`edge-llm bench node`: llama-bench's rows for this engine on this board.

Owns the options (llama-bench's spellings), where rows are printed as they come, and the exit code. Rows are data: with
`-o csv|json|jsonl|sql` nothing else is on standard output.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import click

from edge_llm.commands.measuring import (
    Report,
    check_option,
    command_line,
    finish,
    json_option,
    output_option,
    quick_option,
    steps,
    until_interrupted,
)
from edge_llm.config import DEFAULT_MODEL

FORMATS: Final = ("md", "csv", "json", "jsonl", "sql")
KV_TYPES: Final = ("f32", "f16", "bf16", "q8_0", "q4_0")
_CURVE: Final = "512,1024,2048,4096"
_REPETITIONS, _QUICK_REPETITIONS = 5, 2


def _list(*names: str, default: str, help: str) -> Callable[[Any], Any]:
    return click.option(*names, multiple=True, default=(default,), show_default=True, metavar="LIST", help=help)


@click.command(context_settings={"max_content_width": 120})
@click.option(
    "-m",
    "--model",
    "models",
    multiple=True,
    default=(DEFAULT_MODEL,),
    show_default=True,
    metavar="LIST",
    help="Names in models.yaml or paths of .gguf files.",
)
@_list("-p", "--n-prompt", default="512", help="Tokens of prompt tests (`pp512`); 0: none.")
@_list("-n", "--n-gen", default="128", help="Tokens of decode tests (`tg128`); 0: none.")
@click.option(
    "-pg", "n_pg", multiple=True, metavar="PP,TG", help="A prompt and decode steps behind it (`pp512+tg128`)."
)
@_list("-d", "--n-depth", default="0", help="Tokens that lie before a test (`@ d2048`).")
@_list("-b", "--batch-size", default="2048", help="Rows of a batch.")
@_list("-ub", "--ubatch-size", default="512", help="Rows of one call; workers use 128 (their chunk).")
@_list("-ctk", "--cache-type-k", default="f16", help=f"Types of K: {', '.join(KV_TYPES)}.")
@_list("-ctv", "--cache-type-v", default="f16", help="Types of V; quantized ones need flash attention.")
@_list("-fa", "--flash-attn", default="auto", help="on|off|auto or 1|0; auto is off under policy exact.")
@click.option("-t", "--threads", multiple=True, metavar="LIST", help="Threads of both phases (default: all cores).")
@click.option("--threads-prefill", multiple=True, metavar="LIST", help="Threads of prompts, instead of -t.")
@click.option("--threads-decode", multiple=True, metavar="LIST", help="Threads of decode steps, instead of -t.")
@_list("--policy", default="exact", help="Kernels: exact, fast.")
@_list("--batch", default="1", help="Sequences that decode together (`tg128 x 4`).")
@click.option("-r", "--repetitions", type=click.IntRange(1, 1000), help="Of each test (default 5, quick 2).")
@click.option("-o", "--output-format", type=click.Choice(FORMATS), help="Rows on standard output.  [default: md]")
@click.option("-oe", "--output-err", type=click.Choice(FORMATS), help="Rows on standard error as well.")
@click.option("--delay", type=click.FloatRange(0, 3600), default=0.0, help="Seconds to cool off before each test.")
@click.option("--no-warmup", is_flag=True, help="No untimed run before a test.")
@click.option("--progress", "has_progress", is_flag=True, help="Say what runs on standard error, with -oe too.")
@click.option(
    "--core",
    "--cores",
    "cores",
    multiple=True,
    metavar="LIST",
    help="Cores to pin to (default: none; beside llama-bench the last ones).",
)
@click.option(
    "--memory-curve",
    is_flag=False,
    flag_value=_CURVE,
    metavar="[LIST]",
    help=f"Peak memory against context, with and without flash attention (contexts: {_CURVE}).",
)
@click.option("--against-llama-bench", is_flag=True, help="Measure llama-bench beside, in turns, on the same cores.")
@quick_option
@check_option
@output_option
@json_option
def node(output: Path, output_format: str | None, output_err: str | None, as_json: bool, **options: Any) -> None:
    """Prompt and decode speed of this board in llama-bench's rows, with memory, CPU and the share of the roofline.

    Lists: 1,2,4, a-b, a-b+step, a-b*factor; every combination is a row. With --check a row that differs from
    llama-bench by more than 3 % exits with 3.
    """
    from edge_llm.bench.models import local_model
    from edge_llm.bench.node import NodeBench
    from edge_llm.bench.node_figures import missed
    from edge_llm.bench.node_rows import BadList
    from edge_llm.bench.run import Run

    if as_json and output_format:
        raise click.UsageError("--json prints the whole run as one object: leave out -o")
    if options["check"] and not options["against_llama_bench"]:
        raise click.UsageError("--check judges what --against-llama-bench compares: give that, too")
    try:
        sweep = _sweep(options)
        plan, tests = _plan(options, sweep), sweep.tests()
    except BadList as error:
        raise click.UsageError(error.message) from error
    if not tests and not plan.curve:
        raise click.UsageError("there is nothing to measure: -p, -n and -pg are all empty or 0")
    _warn_of_threads(tests, plan.cores)
    names = [name for text in options["models"] for name in text.split(",") if name]
    run = Run("node", command_line(), _config(options, names), folder=output)
    printers = _printers(as_json, output_format or "md", output_err, tests, plan)
    with _progress(options["has_progress"] or output_err is None) as report:
        chosen = [local_model(name, report) for name in names]
        bench = NodeBench(plan, chosen, tests, run, report, lambda row: _each(printers, lambda one: one.line(row)))
        _each(printers, lambda one: one.head())
        found, is_complete = until_interrupted(bench.measure, bench.figures)
    _each(printers, lambda one: one.foot())
    misses = missed(found["rows"]) if options["check"] else []
    is_data = (output_format or "md") != "md"
    finish(run, found, is_complete, output, as_json, misses, lambda figures: _show_rest(figures, is_data), is_data)


class _Printer:
    """A table on one of the standard streams. Taken before a progress bar redirects them: to a terminal rows go
    through the bar, which makes room for them; a file or a pipe gets them as they are."""

    def __init__(self, table: Any, stream: IO[str], is_error: bool) -> None:
        self._table, self._stream, self._is_error = table, stream, is_error

    def head(self) -> None:
        self._write(self._table.head())

    def line(self, row: dict[str, Any]) -> None:
        self._write(self._table.line(row))

    def foot(self) -> None:
        self._write(self._table.foot())

    def _write(self, text: str) -> None:
        if self._stream.isatty():
            click.echo(text, nl=False, err=self._is_error)
        else:
            self._stream.write(text)
            self._stream.flush()


def _each(printers: Sequence[_Printer], act: Callable[[_Printer], None]) -> None:
    for printer in printers:
        act(printer)


def _printers(
    as_json: bool, output_format: str, output_err: str | None, tests: Sequence[Any], plan: Any
) -> list[_Printer]:
    from edge_llm.bench.node_figures import DEFINITIONS
    from edge_llm.bench.node_rows import Table
    from edge_llm.bench.reference_tools import package_version

    varying = _varying(tests, plan)
    shown = {"t/s", "roofline", "peak MiB", "CPU", "level"}
    shown |= {title for column, title in (("ratio", "ratio"), ("power_w", "power W")) if column in varying}
    notes = [f"{name}: {text}" for name, text in DEFINITIONS.items() if name in shown]
    notes += ["", f"build: llama-cpp-python {package_version()}"]
    printers = [] if as_json else [_Printer(Table(output_format, varying, notes), sys.stdout, False)]
    if output_err:
        printers.append(_Printer(Table(output_err, varying, notes), sys.stderr, True))
    return printers


def _varying(tests: Sequence[Any], plan: Any) -> set[str]:
    """Columns for people, as llama-bench chooses them: what is not its default, or differs between tests."""
    usual = {"n_batch": 2048, "n_ubatch": 512, "type_k": "f16", "type_v": "f16"}
    found = {name for name, value in usual.items() if any(getattr(test, name) != value for test in tests)}
    if any(test.flash_attention != "auto" for test in tests):
        found.add("flash_attn")
    if plan.tree is not None:
        return found | {"llama_bench_ts", "ratio"}
    return found | {"power_w"} if _has_power() else found


def _has_power() -> bool:
    from edge_llm.power import PowerMeter

    return PowerMeter().is_there()


def _plan(options: dict[str, Any], sweep: Any) -> Any:
    from edge_llm.bench.node import Plan
    from edge_llm.bench.node_rows import numbers
    from edge_llm.bench.reference_tools import require
    from edge_llm.config import levels_dir

    curve = options["memory_curve"]
    return Plan(
        repetitions=options["repetitions"] or (_QUICK_REPETITIONS if options["quick"] else _REPETITIONS),
        cores=_cores(options, max(*sweep.threads_decode, *sweep.threads_prefill)),
        is_warm=not options["no_warmup"],
        delay_s=options["delay"],
        tree=require("ours") if options["against_llama_bench"] else None,
        curve=tuple(sweep.curve(numbers([curve], "--memory-curve", least=64))) if curve else (),
        levels_dir=levels_dir(),
    )


def _cores(options: dict[str, Any], threads: int) -> tuple[int, ...]:
    """Those asked for; beside llama-bench always some, the last ones, so that both sides have the same."""
    from edge_llm.bench.node_rows import numbers

    if options["cores"]:
        return numbers(options["cores"], "--cores")
    return tuple(sorted(os.sched_getaffinity(0))[-threads:]) if options["against_llama_bench"] else ()


def _sweep(options: dict[str, Any]) -> Any:
    from edge_llm.bench.node_rows import Sweep, flash_attentions, numbers, pairs, words
    from edge_llm.machine import usable_cores

    pinned = numbers(options["cores"], "--cores") if options["cores"] else ()
    threads = options["threads"] or (str(len(pinned) or usable_cores()),)
    policies: Any = words(options["policy"], "--policy", ("exact", "fast"))
    return Sweep(
        n_prompt=numbers(options["n_prompt"], "-p"),
        n_gen=numbers(options["n_gen"], "-n"),
        n_pg=pairs(options["n_pg"], "-pg"),
        n_depth=numbers(options["n_depth"], "-d"),
        n_batch=numbers(options["batch_size"], "-b", least=1),
        n_ubatch=numbers(options["ubatch_size"], "-ub", least=1),
        type_k=words(options["cache_type_k"], "-ctk", KV_TYPES),
        type_v=words(options["cache_type_v"], "-ctv", KV_TYPES),
        flash_attention=flash_attentions(options["flash_attn"], "-fa"),
        threads_decode=_phase_threads(options, "decode", threads),
        threads_prefill=_phase_threads(options, "prefill", threads),
        policies=policies,
        n_parallel=numbers(options["batch"], "--batch", least=1),
    )


def _phase_threads(options: dict[str, Any], phase: str, both: Sequence[str]) -> tuple[int, ...]:
    """What is wrong is said of the option that was typed."""
    from edge_llm.bench.node_rows import numbers

    own = options[f"threads_{phase}"]
    return numbers(own or both, f"--threads-{phase}" if own else "-t", least=1)


def _config(options: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    kept = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    return {**kept, "models": list(names)}


def _warn_of_threads(tests: Sequence[Any], cores: Sequence[int]) -> None:
    from edge_llm.machine import usable_cores

    there = len(cores) or usable_cores()
    most = max((max(test.n_threads, test.n_threads_batch) for test in tests), default=0)
    if most > there:
        click.echo(f"{most} threads on {there} core(s): they wait for each other, figures will be low", err=True)


@contextmanager
def _progress(is_shown: bool) -> Iterator[Report]:
    if is_shown:
        with steps() as report:
            yield report
    else:
        yield lambda _what, _done, _total: None


def _show_rest(figures: dict[str, Any], is_data: bool) -> None:
    """What is no row: the memory curve, for people."""
    if not figures["memory_curve"]:
        return
    lines = ["", "| model | context | fa | prefill peak MiB | decode peak MiB |", "| --- | ---: | --- | ---: | ---: |"]
    for point in figures["memory_curve"]:
        peaks = " | ".join(
            "" if point[name] is None else f"{point[name] / (1 << 20):.0f}"
            for name in ("prefill_peak_bytes", "decode_peak_bytes")
        )
        lines.append(f"| {point['model']} | {point['n_ctx']} | {point['flash_attention']} | {peaks} |")
    click.echo("\n".join(lines), err=is_data)
