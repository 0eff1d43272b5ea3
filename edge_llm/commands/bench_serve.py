"""`edge-llm bench serve`: load over HTTP on any OpenAI-style server: latencies, throughput, goodput."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Final

import click

from edge_llm.commands.endpoint import Address, address_of
from edge_llm.commands.in_cluster import InCluster
from edge_llm.commands.measuring import (
    check_option,
    command_line,
    finish,
    json_option,
    output_option,
    steps,
    until_interrupted,
)
from edge_llm.commands.serve import SloOption
from edge_llm.machine import process_life

# The beginnings of the two Azure traces of 2023; the folder's README says whose they are.
SHIPPED: Final = Path(__file__).parent.parent / "bench" / "data"
TRACES: Final[Mapping[str, str]] = {"conv": "azure_2023_conv.csv", "code": "azure_2023_code.csv"}
_MODES: Final = ("auto", "split", "local")
_REQUESTS: Final = 32
_SEARCH_S: Final = 30.0
_TRACE_S: Final = 60.0
# The board is watched so long before the first load: what a load takes is above that.
_IDLE_S: Final = 3.0


class _Numbers(click.ParamType[tuple[float, ...]]):
    """`0.5,1,2`: numbers above 0."""

    name = "NUMBERS"

    def convert(self, value: object, param: click.Parameter | None, context: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not like 0.5,1,2", param, context)
        if not all(0 < number < float("inf") for number in found):
            self.fail(f"{value!r}: each is more than 0 and finite", param, context)
        return found


class _Json(click.ParamType[Mapping[str, Any]]):
    """A JSON object."""

    name = "JSON"

    def convert(self, value: object, param: click.Parameter | None, context: click.Context | None) -> Mapping[str, Any]:
        if isinstance(value, Mapping):
            return value
        try:
            found = json.loads(str(value))
        except ValueError as error:
            self.fail(f"{value!r} is not JSON: {error}", param, context)
        if not isinstance(found, dict):
            self.fail(f"{value!r} is no JSON object", param, context)
        return found


@click.command("serve", cls=InCluster)
@click.option("--url", "urls", type=Address(), multiple=True, help="Server to ask; several: the least busy is asked.")
@click.option("--beside", multiple=True, metavar="NAME=URL[,URL]", help="Another server under the same load, by turns.")
@click.option("--mode", "modes", metavar="auto,split,local", help="Of our gateway; several: the same load on each.")
@click.option(
    "--api-key-file", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="A key, for --url only."
)
@click.option("--model", default="", help="Default: the first one that the server names.")
@click.option("--endpoint", type=click.Choice(["completions", "chat"]), default="completions", show_default=True)
@click.option(
    "--profile",
    type=click.Choice(["closed", "poisson", "constant", "burst", "trace"]),
    help="Default: trace for recorded traffic, poisson with a rate, closed else.",
)
@click.option("--concurrency", type=_Numbers(), help="Clients of a closed loop; several: one load each (default 1).")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Requests/s of an open loop.")
@click.option("--rate-sweep", type=_Numbers(), help="Several rates, one load each.")
@click.option("--requests", type=click.IntRange(1, 1_000_000), help=f"Of each load and pass (default {_REQUESTS}).")
@click.option(
    "--duration",
    "seconds",
    type=click.FloatRange(0, 86_400, min_open=True),
    help=f"Seconds of each load (default: {_TRACE_S:g} of recorded traffic, {_SEARCH_S:g} at each rate of a search).",
)
@click.option("--burst-size", type=click.IntRange(1, 10_000), default=8, show_default=True, help="Requests at once.")
@click.option(
    "--workload",
    default="chat",
    show_default=True,
    metavar="NAME",
    help="chat, code, summarization, generation, trace:conv, trace:code, trace:FILE.csv (Azure format), or a file of "
    "JSON lines (prompt, messages or prompt_tokens; max_tokens; at_s).",
)
@click.option("--prompt-tokens", help="Instead of the workload's: 128, uniform:64-256, normal:128,32, lognormal:128,1.")
@click.option("--answer-tokens", help="The same for answers.")
@click.option("--scale", type=click.FloatRange(0.001, 10), default=1.0, show_default=True, help="Of a trace's lengths.")
@click.option("--n-ctx", type=click.IntRange(16, 1 << 20), help="Clip to this context (default: what the server says).")
@click.option("--prompts", type=click.Choice(["auto", "ids", "text"]), default="auto", show_default=True)
@click.option("--vocab-size", type=click.IntRange(64), help="Token ids are below it, where the server does not say.")
@click.option("--ignore-eos/--no-ignore-eos", default=True, help="Force the length of answers (default), or not.")
@click.option("--stream/--no-stream", default=True)
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True)
@click.option("--body", "extra", type=_Json(), default="{}", help='Fields for every request: {"top_k": 1}.')
@click.option("--slo", type=SloOption(), help="Limits that requests are judged by, in seconds: ttft=2.5,tpot=0.1.")
@click.option("--tell-slo", is_flag=True, help="Name the limits in requests: our gateway plans by them.")
@click.option("--slo-scale", "scales", type=_Numbers(), default=(), help="Judge by the limits times these as well.")
@click.option("--goodput", "is_search", is_flag=True, help="Search the highest rate at which 90 % and 99 % keep --slo.")
@click.option("--max-rates", type=click.IntRange(2, 100), default=12, show_default=True, help="Of a search.")
@click.option("--nodes", type=click.IntRange(1), help="Of --url, for figures per node (--beside has one a URL).")
@click.option("--slowdown", type=click.IntRange(1), metavar="N", help="Send N requests alone too: Splitwise's table.")
@click.option("--passes", type=click.IntRange(1, 100), help="Default 1; 2 when several are compared.")
@click.option("--warm-up", type=click.IntRange(0, 1000), default=4, show_default=True, help="Requests, not counted.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(0.1, 86_400), default=600.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--watch", multiple=True, metavar="NAME=PID|URL", help="Sample a process here, or a worker's /metrics.")
@check_option
@output_option
@json_option
def serve(output: Path, as_json: bool, check: bool, **given: Any) -> None:
    """Load on --url: TTFT, ITL, TPOT, E2E, throughput; with --slo attainment and goodput.

    A closed loop keeps --concurrency requests under way; an open one sends at --rate, whatever becomes of them. What
    fails is counted by kind. All that are compared (--mode, --beside) get the same requests at the same times.

    --check exits with 3 when a request failed; with --slo when fewer than 90 % keep it (of several rates: at the
    lowest one); with --slowdown when one of the nine limits does not hold.
    """
    from edge_llm.bench.run import Run
    from edge_llm.bench.serve.experiment import measure
    from edge_llm.bench.serve.results import Tally

    contenders = _contenders(given["urls"], given["modes"], given["beside"], given["api_key_file"])
    plan = _plan(given, len(contenders))
    source_of = _source(given)
    shown = {name: value for name, value in given.items() if name != "api_key_file" and value not in (None, (), {})}
    run = Run("serve", command_line(), shown, folder=output, idle_s=_IDLE_S)
    tally = Tally(
        plan.limits,
        plan.scales,
        given["nodes"],
        wants_slowdown=given["slowdown"] is not None,
        own_nodes={one.name: len(one.urls) for one in contenders[len(contenders) - len(given["beside"]) :]},
    )
    with steps() as report:
        work = partial(measure, plan, contenders, source_of, run, tally, report, _watching(run, given["watch"]))

        def measured() -> dict[str, Any]:
            asyncio.run(work())
            return _found(tally, run)

        found, is_complete = until_interrupted(measured, lambda: _found(tally, run))
    finish(run, found, is_complete, output, as_json, _missed(tally) if check else [], _show)


def _found(tally: Any, run: Any) -> dict[str, Any]:
    from msgspec import to_builtins

    figures = tally.found()
    run.notes += [line for line in figures.sentences if line not in run.notes]
    found: dict[str, Any] = to_builtins(figures)
    return found


def _missed(tally: Any) -> list[str]:
    """With limits 90 % must keep them (a request that failed keeps none), at each load, or at the lowest of several
    rates: the higher ones are there to be too high. Without limits every request must be answered whole. And where
    requests were sent alone, Splitwise's nine must hold."""
    from edge_llm.bench.goodput import GOALS

    found = []
    for name, one in tally.found().contenders.items():
        for load in one.loads:
            figures, attained, where = load.figures, load.figures.attained, f"{name}, {load.label}"
            if attained is None and figures.completed < figures.requests:
                found.append(f"{where}: {figures.requests - figures.completed} of {figures.requests} requests failed")
            if attained is not None and attained.attainment < GOALS[0] and not one.goodput:
                found.append(f"{where}: {attained.attainment:.0%} keep the limits, not {GOALS[0]:.0%}")
            if load.slowdown is not None and not load.slowdown.holds:
                found.append(f"{where}: not all of the nine limits of slowdown hold")
        at = one.goodput.get(f"goodput_{100 * GOALS[0]:.0f}")
        if at is not None and at.bound == "at_most":
            found.append(f"{name}: at no rate that was measured {GOALS[0]:.0%} keep the limits")
    return found


# -- what is asked for


def _contenders(urls: Sequence[str], modes: str | None, beside: Sequence[str], key_file: Path | None) -> list[Any]:
    from edge_llm.bench.serve.experiment import Contender

    named = [mode.strip() for mode in modes.split(",")] if modes else []
    if unknown := set(named) - set(_MODES):
        raise click.UsageError(f"--mode has no {', '.join(sorted(unknown))}: it has {', '.join(_MODES)}")
    if named and not urls:
        raise click.UsageError("--mode is for the server at --url")
    key = {"authorization": f"Bearer {key_file.read_text().strip()}"} if key_file else {}
    found = [Contender(mode, tuple(urls), {"edge_llm": {"mode": mode}}, key) for mode in named]
    if urls and not named:
        found.append(Contender("server", tuple(urls), headers=key))
    for other in beside:
        name, _, rest = other.partition("=")
        if not name or not rest:
            raise click.UsageError(f"--beside {other}: write NAME=URL, or NAME=URL,URL")
        try:
            found.append(Contender(name, tuple(address_of(url) for url in rest.split(","))))
        except ValueError as error:
            raise click.UsageError(f"--beside {other}: {error}") from error
    if not found:
        raise click.UsageError("give the server to ask: --url http://HOST:PORT")
    if len({one.name for one in found}) < len(found):
        raise click.UsageError("each contender needs a name of its own")
    return found


def _plan(given: Mapping[str, Any], contenders: int) -> Any:
    from edge_llm.bench.goodput import Limits
    from edge_llm.bench.serve.experiment import Plan
    from edge_llm.bench.serve.prompts import Options

    slo = given["slo"] or {}
    if not slo and (given["is_search"] or given["scales"] or given["tell_slo"]):
        raise click.UsageError("limits are missing: --slo ttft=2.5,tpot=0.1")
    limits = Limits(slo.get("slo_ttft_s", float("inf")), slo.get("slo_tpot_s", float("inf"))) if slo else None
    if given["is_search"] and (given["rate_sweep"] or given["concurrency"]):
        raise click.UsageError("--goodput searches the rates by itself: leave out --rate-sweep and --concurrency")
    if not given["stream"] and (slo or given["slowdown"]):
        raise click.UsageError("without a stream there is no first token: leave out --slo and --slowdown")
    return Plan(
        loads=_loads(given),
        options=Options(
            endpoint=given["endpoint"],
            model=given["model"],
            is_stream=given["stream"],
            ignores_eos=given["ignore_eos"],
            temperature=given["temperature"],
            extra=given["extra"],
        ),
        prompts=given["prompts"],
        vocab_size=given["vocab_size"],
        passes=given["passes"] or (2 if contenders > 1 and not given["is_search"] else 1),
        seed=given["seed"],
        warm_up=given["warm_up"],
        timeout_s=given["timeout_s"],
        limits=limits,
        tells_limits=given["tell_slo"],
        scales=given["scales"],
        alone=given["slowdown"] or 0,
        is_search=given["is_search"],
        most_rates=given["max_rates"],
    )


def _loads(given: Mapping[str, Any]) -> tuple[Any, ...]:
    from edge_llm.bench.serve.schedule import Load, Profile

    rates, clients = given["rate_sweep"] or ((given["rate"],) if given["rate"] else ()), given["concurrency"]
    is_trace = given["workload"].startswith("trace:")
    is_open = bool(rates or given["is_search"])
    usual: Profile = "closed" if clients else "trace" if is_trace else "poisson" if is_open else "closed"
    profile: Profile = given["profile"] or usual
    if profile == "closed" and (rates or given["is_search"]):
        raise click.UsageError("a closed loop has clients (--concurrency), no rate: choose another --profile")
    if profile != "closed" and clients:
        raise click.UsageError(f"--concurrency is for closed loops, not for {profile}")
    requests, seconds = given["requests"], given["seconds"]
    if requests is None and seconds is None:
        if given["is_search"]:
            seconds = _SEARCH_S
        elif profile == "trace" and not rates:
            seconds = _TRACE_S
        else:
            requests = _REQUESTS
    if profile == "closed":
        if any(number != round(number) for number in clients or ()):
            raise click.UsageError("--concurrency is a number of clients")
        return tuple(Load(profile, None, round(number), requests, seconds) for number in clients or (1,))
    if not rates and profile != "trace" and not given["is_search"]:
        raise click.UsageError(f"--profile {profile} needs --rate or --rate-sweep")
    return tuple(Load(profile, rate, None, requests, seconds, given["burst_size"]) for rate in rates or (None,))


def _source(given: Mapping[str, Any]) -> Callable[[int], Any]:
    """The workload, read now (a file that is none shall say so before anything is asked), made when the context is
    known."""
    from edge_llm.bench.serve.lengths import parse
    from edge_llm.bench.serve.schedule import Source
    from edge_llm.bench.serve.workloads import NAMED, drawn, of_trace, parse_file

    def lengths(option: str, default: Any) -> Any:
        try:
            return default if given[option] is None else parse(given[option])
        except ValueError as error:
            raise click.UsageError(f"--{option.replace('_', '-')}: {error}") from error

    name, seed = given["workload"], given["seed"]
    usual = NAMED.get(name, NAMED["chat"])
    prompt, answer = lengths("prompt_tokens", usual[0]), lengths("answer_tokens", usual[1])
    if name.startswith("trace:"):
        if given["prompt_tokens"] or given["answer_tokens"]:
            raise click.UsageError("a trace has lengths of its own: see --scale")
        trace = _trace(name.removeprefix("trace:"))

        def recorded(n_ctx: int) -> Any:
            n_ctx = given["n_ctx"] or n_ctx
            return Source(of_trace(trace, given["scale"], n_ctx, seed, None, None, None), trace, given["scale"], n_ctx)

        return recorded
    if name in NAMED:
        return lambda n_ctx: Source(drawn(name, prompt, answer, given["n_ctx"] or n_ctx, seed))
    text = _text(Path(name), f"--workload {name} is none of {', '.join(NAMED)}, trace:conv, trace:code, nor a file")
    if '"messages"' in text and given["endpoint"] != "chat":
        raise click.UsageError(f"{name} has messages: add --endpoint chat")
    return lambda n_ctx: Source(parse_file(text, Path(name).name, answer, given["n_ctx"] or n_ctx, seed))


def _trace(name: str) -> Any:
    from edge_llm.bench.traces import parse

    path = SHIPPED / TRACES[name] if name in TRACES else Path(name)
    return parse(_text(path, f"--workload trace:{name}: no such file, and not conv or code"), path.stem)


def _text(path: Path, otherwise: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{otherwise} ({error})") from error


def _watching(run: Any, watched: Sequence[str]) -> Callable[[], AbstractContextManager[Any]]:
    """Around all loads: this board always, and what was named."""
    processes: dict[str, int] = {}
    nodes: dict[str, str] = {}
    for one in watched:
        name, _, value = one.partition("=")
        if name and value.isdigit():
            if process_life(int(value)) is None:
                raise click.UsageError(f"--watch {one}: no process here has the id {value}")
            processes[name] = int(value)
        elif name and value.startswith(("http://", "https://")):
            nodes[name] = value
        else:
            raise click.UsageError(f"--watch {one}: write NAME=PID, or NAME=http://HOST:PORT of a worker")
    return lambda: run.watching(processes, nodes=nodes)


# -- what is shown


def _show(found: Mapping[str, Any]) -> None:
    """The tables name the loads themselves."""
    from edge_llm.commands.serve_tables import show

    workload = {name: value for name, value in found["workload"].items() if name != "loads"}
    show({**found, "workload": workload})
