"""Which models `edge-llm bench cluster` measures, and where: clusters started here, or one that runs already.

Owns turning options into subjects (bench/cluster_runs.py), and a gateway for workers elsewhere. Refuses to know what is
measured.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final
from urllib.request import Request

import click

from edge_llm.commands.formats import check_formats
from edge_llm.commands.measuring import Report
from edge_llm.config import DEFAULT_MODEL
from edge_llm.errors import ConfigError, EdgeLLMError, WorkerError

# Of a cluster that is started here: workers (prefill, decode, mixed), and what each request says of how to be served.
HERE: Final[Mapping[str, tuple[int, int, int, str]]] = {
    "mixed": (0, 0, 1, "local"),
    "split": (1, 1, 0, "split"),
    "local": (0, 0, 2, "local"),
    "auto": (0, 0, 2, "auto"),
}
USUAL: Final = ("mixed", "split", "auto")
MODES: Final = ("auto", "split", "local")
ALONE: Final = "node"
_KNOWN_S: Final = 20.0
_LOOK_S: Final = 0.2
_DRAIN_S: Final = 3.0


def check(given: Mapping[str, Any]) -> None:
    """Raises UsageError before anything starts."""
    check_formats(given["kinds"])
    is_elsewhere = bool(given["url"] or given["workers_file"])
    known = MODES if given["url"] else (ALONE, *MODES) if is_elsewhere else tuple(HERE)
    if unknown := [name for name in given["placements"] if name not in known]:
        raise click.UsageError(f"--placement has no {', '.join(unknown)} there: it has {', '.join(known)}")
    if given["workers_file"] and not given["url"] and not given["key_file"]:
        raise click.UsageError("workers ask for a ticket: add --key-file, or ask their gateway with --url")
    if given["key_file"] and (given["url"] or not given["workers_file"]):
        raise click.UsageError("--key-file is for workers of --workers-file, without --url")
    if given["api_key_file"] and not given["url"]:
        raise click.UsageError("--api-key-file is for the gateway at --url")
    if given["watches_boards"] and (not given["url"] or given["workers_file"]):
        raise click.UsageError("--boards is for the gateway at --url, without --workers-file")
    if is_elsewhere and (len(given["models"]) > 1 or given["kinds"]):
        raise click.UsageError(
            "a cluster that runs has one model: name its file with --models for accuracy, or nothing"
        )


def subjects(given: Mapping[str, Any], run: Any, report: Report) -> list[Any]:
    if given["url"] or given["workers_file"]:
        return [_elsewhere(given, report)]
    return _started_here(given, run, report)


def _started_here(given: Mapping[str, Any], run: Any, report: Report) -> list[Any]:
    """Each model, and it in each other format. One that is not to be had is a failure, the others go on."""
    from edge_llm.bench.cluster_runs import Subject
    from edge_llm.bench.models import local_model, requantized
    from edge_llm.catalogue.resolve import is_path
    from edge_llm.commands.supervisor import SIMULATED_MODEL

    found: list[Any] = []

    def add(what: str, make: Callable[[], Any], wanted: str = "") -> Any:
        try:
            model = make()
        except (EdgeLLMError, OSError) as error:
            run.fail(what, str(error))
            return None
        found.append(Subject(model.facts.name, _placements(given, wanted or str(model.path)), model))
        return model

    for name in dict.fromkeys(given["models"] or (DEFAULT_MODEL,)):
        if name == SIMULATED_MODEL:
            found.append(Subject(name, _placements(given, name)))
            continue
        # a name stays a name: workers then find the file that was verified already
        model = add(name, partial(local_model, name, report), "" if is_path(name) else name)
        for kind in dict.fromkeys(given["kinds"] if model is not None else ()):
            add(f"{name} as {kind}", partial(requantized, model, kind, report))
    names = [subject.name for subject in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two models are called {', '.join(sorted(twice))}: rows are told apart by it, so rename one")
    return found


def _placements(given: Mapping[str, Any], model: str) -> tuple[Any, ...]:
    from edge_llm.bench.cluster_runs import Placement
    from edge_llm.bench.layout import Layout
    from edge_llm.commands.local_cluster import local_cluster

    options = ("--n-ctx", str(given["n_ctx"]), "--slots", str(given["slots"]), "--policy", given["policy"])
    found = []
    for name in dict.fromkeys(given["placements"] or USUAL):
        prefill, decode, mixed, mode = HERE[name]
        layout = Layout(name, prefill, decode, mixed, options)
        launch = partial(local_cluster, layout, model, threads=given["threads"])
        found.append(Placement(name, mode, launch))
    return tuple(found)


def _elsewhere(given: Mapping[str, Any], report: Report) -> Any:
    """A cluster that runs already: its gateway, or a gateway that is started here for its workers."""
    from edge_llm.bench.cluster_runs import Placement, Subject
    from edge_llm.bench.layout import Started
    from edge_llm.bench.models import local_model
    from edge_llm.cluster.static import StaticFile

    file = local_model(given["models"][0], report) if given["models"] else None
    workers = {p.worker: p.address for p in StaticFile(given["workers_file"]).places()} if given["workers_file"] else {}
    nodes = {name: f"http://{address}/metrics" for name, address in workers.items()}
    found = []
    if given["url"]:
        url = given["url"]
        keys = {"authorization": f"Bearer {given['api_key_file'].read_text().strip()}"} if given["api_key_file"] else {}
        nodes = _boards(url, keys) if given["watches_boards"] else nodes
        for mode in dict.fromkeys(given["placements"] or ("auto",)):
            found.append(Placement(mode, mode, partial(_running, Started(url, ())), nodes, keys))
        return Subject(file.facts.name if file else url, tuple(found), file, is_here=False)
    key = _key(given["key_file"])
    for name in dict.fromkeys(given["placements"] or (ALONE, "split", "auto")):
        if name == ALONE:
            for worker, address in workers.items():
                launch = partial(gateway_for, {worker: address}, key)
                found.append(Placement(worker, "local", launch, {worker: nodes[worker]}))
        else:
            found.append(Placement(name, name, partial(gateway_for, workers, key), nodes))
    return Subject(file.facts.name if file else given["workers_file"].stem, tuple(found), file, is_here=False)


def _boards(url: str, keys: Mapping[str, str]) -> dict[str, str]:
    """Where the boards of a gateway's workers can be read. Raises WorkerError when it does not say."""
    from edge_llm.commands.endpoint import open_url

    try:
        with open_url(Request(f"{url}/cluster", headers=dict(keys)), _KNOWN_S) as reply:
            nodes = json.loads(reply.read())["nodes"]
            return {node["worker"]: f"http://{node['address']}/metrics" for node in nodes}
    except (OSError, ValueError, KeyError, TypeError, HTTPException) as error:
        raise WorkerError(f"{url} does not tell which boards it has: {error}") from error


def _key(path: Path) -> bytes:
    from edge_llm.worker.tickets import KeyRing

    try:
        data = path.read_bytes()
        KeyRing.parse(data.decode(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the key file {path}: {error}") from error
    return data


@asynccontextmanager
async def _running(started: Any) -> AsyncIterator[Any]:
    """What somebody else started, and will stop."""
    yield started


@asynccontextmanager
async def gateway_for(workers: Mapping[str, str], key: bytes) -> AsyncIterator[Any]:
    """A gateway on this machine for workers elsewhere, for a block. Raises WorkerError when one does not answer it."""
    from edge_llm.bench.layout import LocalProcess, Started
    from edge_llm.cluster.static import text_of
    from edge_llm.commands.child import Child
    from edge_llm.commands.supervisor import BESIDE_DRAIN_S, LOOPBACK, free_port

    with tempfile.TemporaryDirectory(prefix="edge-llm-bench-") as folder:
        file, port = Path(folder) / "workers.yaml", free_port()
        file.write_text(text_of(workers.items()))
        place = ["--host", LOOPBACK, "--port", str(port), "--name", f"bench-cluster-{secrets.token_hex(4)}"]
        arguments = ["serve", "gateway", *place, "--no-auth", "--workers-file", str(file), "--drain-s", str(_DRAIN_S)]
        gateway = Child("gateway", arguments, port, stop_s=_DRAIN_S + BESIDE_DRAIN_S)
        try:
            await gateway.start(key)
            assert gateway.process is not None
            started = Started(f"http://{LOOPBACK}:{port}", (LocalProcess("gateway", gateway.process.pid, (), port),))
            await _until_known(started.url, workers)
            yield started
        finally:
            await gateway.stop()


async def _until_known(url: str, workers: Iterable[str]) -> None:
    """Until the gateway has heard of all `workers`: a placement that lacks one would be measured as another."""
    import aiohttp

    missing = set(workers)
    try:
        async with asyncio.timeout(_KNOWN_S), aiohttp.ClientSession(url) as session:
            while True:
                async with session.get("/cluster") as reply:
                    missing -= {node["worker"] for node in (await reply.json())["nodes"]}
                if not missing:
                    return
                await asyncio.sleep(_LOOK_S)
    except TimeoutError as late:
        raise WorkerError(
            f"no answer within {_KNOWN_S:.0f} s from {', '.join(sorted(missing))}: are they up, is it their key?"
        ) from late
