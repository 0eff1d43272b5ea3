"""`edge-llm bench ... --cluster`: the same command as a Job inside the Kubernetes cluster, and its record fetched.

Owns the options that say so, what of a command line goes to the Job, and the keeping of what comes back. The requests
are cluster/kubernetes_jobs.py's; the Job runs commands/bench_job.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from edge_llm.commands.measuring import INTERRUPTED
from edge_llm.errors import ConfigError

_RAW: Final = "edge_llm.commands.in_cluster"
# Of this machine: where the record goes, and how it is shown.
_VOLUME: Final = (
    "which board, and which folder of it (K3s's local-path): kubectl get pv "
    "$(kubectl -n {namespace} get pvc edge-llm-bench -o jsonpath='{{.spec.volumeName}}') -o jsonpath="
    "'{{..nodeSelectorTerms[0].matchExpressions[0].values[0]}}:{{.spec.hostPath.path}}{{.spec.local.path}}'"
)
_HERE: Final = ("output", "as_json", "output_format")
_OWN: Final = ("in_cluster", "namespace", "kubeconfig", "job")


class InCluster(click.Command):
    """A bench that asks a server at --url: with --cluster it runs beside that server."""

    def __init__(
        self, *arguments: Any, check_inside: Callable[[Mapping[str, Any]], None] | None = None, **named: Any
    ) -> None:
        """`check_inside`: raises UsageError for what the bench would refuse in the cluster."""
        super().__init__(*arguments, **named)
        self._check_inside = check_inside
        self.params += [
            click.Option(
                ["--cluster", "in_cluster"],
                is_flag=True,
                help="Run it as a Job in the Kubernetes cluster, fetch the record.",
            ),
            click.Option(["--namespace"], default="edge-llm", show_default=True, help="Of --cluster."),
            click.Option(
                ["--kubeconfig"], type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Of --cluster."
            ),
            click.Option(
                ["--job"], metavar="NAME", help="With --cluster: go on following a Job that was started before."
            ),
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_RAW] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        own = {name: ctx.params.pop(name) for name in _OWN}
        if not own["in_cluster"]:
            for name in ("kubeconfig", "job"):
                if own[name] is not None:
                    raise click.UsageError(f"--{name} is for --cluster")
            return super().invoke(ctx)
        if ctx.params.get("url"):  # `bench serve` may be sent to another server: it says `urls`
            raise click.UsageError(
                "--cluster measures the gateway beside its Job, --url another one from this machine: leave out one of "
                "them (another cluster: --namespace, --kubeconfig)"
            )
        asked = Asked(
            arguments=(self.name or "", *_forwarded(self, ctx)),
            namespace=own["namespace"],
            kubeconfig=own["kubeconfig"],
            job=own["job"],
            output=ctx.params["output"],
        )
        if self._check_inside is not None:
            self._check_inside(ctx.params)
        return _run(asked, ctx.params)


@dataclass(frozen=True, slots=True)
class Asked:
    """`arguments` of `edge-llm bench`, in the pod. `job`: one that runs already."""

    arguments: tuple[str, ...]
    namespace: str
    kubeconfig: Path | None
    job: str | None
    output: Path


def _forwarded(command: click.Command, ctx: click.Context) -> list[str]:
    """The options as they were typed, without those that are about this machine. Raises UsageError for a file of this
    machine, which the Job has not."""
    values, _, order = command.make_parser(ctx).parse_args(args=list(ctx.meta[_RAW]))
    words: list[str] = []
    for param in dict.fromkeys(order):
        if param.name in (*_HERE, *_OWN) or not isinstance(param, click.Option):
            continue
        name, value = param.opts[-1], values[str(param.name)]
        if isinstance(param.type, click.Path):
            raise click.UsageError(f"{name} names a file of this machine: a Job in the cluster cannot read it")
        if param.is_flag:
            words.append(name if value or not param.secondary_opts else param.secondary_opts[-1])
            continue
        for one in value if param.multiple else (value,):
            words += [name, *([str(part) for part in one] if isinstance(one, tuple) else [str(one)])]
    return words


def _run(asked: Asked, params: Mapping[str, Any]) -> None:
    """Start, follow, keep, show; exits as the bench in the cluster did."""
    from edge_llm.bench.log_files import BadFile, LogReader
    from edge_llm.cluster.kubernetes_jobs import JobTrouble

    reader = LogReader()
    trouble = ""
    ended, was_stopped = None, False
    try:
        ended, was_stopped = asyncio.run(_followed(asked, reader))
    except JobTrouble as error:
        if not reader.files:
            raise
        trouble = error.message  # what came until then is kept
    try:
        reader.end()
    except BadFile as error:
        trouble = trouble or error.message
    records = _kept(reader.files, asked.output)
    for path in records:
        _show(path, params)
    if not records:
        trouble = trouble or "it left no record in its log"
    if trouble:
        click.echo(f"edge-llm: {trouble}; what it measured is on the volume of the Job, if it came that far", err=True)
        click.echo(_VOLUME.format(namespace=asked.namespace), err=True)
    if was_stopped:
        sys.exit(INTERRUPTED)
    if ended is None:
        sys.exit(1)
    if ended.exit_code is None or (ended.reason and ended.reason not in ("Completed", "Error")):
        click.echo(f"edge-llm: the Job ended: {ended.reason}", err=True)
    sys.exit(ended.exit_code if ended.exit_code is not None else 1)


async def _followed(asked: Asked, reader: Any) -> tuple[Any, bool]:
    """How it ended, and whether we stopped it. The first Ctrl-C lets it keep what it has, a second leaves it."""
    from edge_llm.cluster.kubernetes import client_of
    from edge_llm.cluster.kubernetes_jobs import Ended, Jobs

    async with await client_of(asked.kubeconfig) as client:
        jobs = Jobs(client, asked.namespace)
        name = asked.job or await jobs.start(asked.arguments)
        if asked.job is None:
            click.echo(f"started Job {name} in namespace {asked.namespace}: {' '.join(asked.arguments)}", err=True)
        following = asyncio.create_task(jobs.follow(name, _say, lambda line: _take(reader, line)), name="follow")
        stopping: list[asyncio.Task[None]] = []

        def interrupted() -> None:
            if stopping:
                following.cancel()
                return
            _say(f"stopping {name}; once more to leave it (then: --cluster --job {name})")
            stopping.append(asyncio.create_task(jobs.stop(name), name="stop"))

        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, interrupted)
        try:
            ended = await following
        except asyncio.CancelledError:
            ended = Ended(None, "left")
        except ConfigError as error:  # it is gone before it started
            if not stopping:
                raise
            ended = Ended(None, error.message)
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            await asyncio.gather(*stopping)
        return ended, bool(stopping)


def _say(line: str) -> None:
    click.echo(line, err=True)


def _take(reader: Any, line: str) -> None:
    if (text := reader.take(line)) is not None:
        click.echo(text, err=True)


# -- what came back


def _kept(files: Mapping[str, bytes], folder: Path) -> Sequence[Path]:
    """Write them; the records among them. Raises ConfigError when a file of that name is another one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        path = folder / name
        if path.exists():
            if path.read_bytes() != data:
                raise ConfigError(f"{path} is another file: name another folder with --output, and --job")
            continue
        descriptor, part = tempfile.mkstemp(dir=folder, prefix=".", suffix=".part")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.chmod(part, 0o644)
        os.replace(part, path)
    return [folder / name for name in files if name.endswith(".json")]


def _show(path: Path, params: Mapping[str, Any]) -> None:
    """As if it had been measured here."""
    from edge_llm.bench.record import load

    record = load(path)
    if params["as_json"]:
        click.echo(json.dumps({**record.figures, "record": str(path)}))
        return
    kind = params.get("output_format")
    if record.kind == "cluster":
        from edge_llm.commands.bench_cluster import show

        show(record.figures, kind or "md")
    else:
        from edge_llm.report.chapters import report_of
        from edge_llm.report.evidence import gather
        from edge_llm.report.markdown import markdown

        click.echo(markdown(report_of(gather([path], path.parent), record.kind)), nl=False)
    click.echo(f"record: {path}", err=kind not in (None, "md"))
    for failure in record.failures:
        click.echo(f"not measured: {failure.what}: {failure.why}", err=True)
