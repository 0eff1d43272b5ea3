"""`edge-llm bench ... --cluster` against an API server over a socket, and what its Job does in a pod."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import click
import pytest
import yaml
from click.testing import CliRunner

from edge_llm.bench.log_files import LogReader, lines_of_file
from edge_llm.bench.record import Failure, encode, load
from edge_llm.commands.bench_cluster import cluster
from edge_llm.commands.bench_serve import serve
from edge_llm.commands.theorem import theorem
from tests.cluster.job_server import JobServer
from tests.report.conftest import a_record

DEADLINE_S: Final = 60.0
MANIFESTS: Final = Path(__file__).parents[2] / "k3s_manifests" / "bench"
RECORD: Final = encode(a_record(kind="theorem", figures={"holds": True, "comparisons": 400}))
FULL_LOG: Final = ["answers: 1 of 2", *lines_of_file("a.json", RECORD), *lines_of_file("a.cases.jsonl", b"{}\n")]


@contextmanager
def in_background(server: JobServer, folder: Path) -> Iterator[tuple[Path, Callable[..., Any]]]:
    """Its kubeconfig, and a way to wait for something inside."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def ask(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(DEADLINE_S)

    @asynccontextmanager
    async def entered() -> AsyncIterator[Path]:
        async with server.running(folder) as kubeconfig:
            yield kubeconfig

    context = entered()
    try:
        yield ask(context.__aenter__()), ask
    finally:
        ask(context.__aexit__(None, None, None))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "edge_llm", "bench", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, timeout=DEADLINE_S)


# -- from outside


def test_a_bench_runs_in_the_cluster_and_its_record_is_here(tmp_path: Path) -> None:
    server, out = JobServer(log=FULL_LOG), tmp_path / "out"
    with in_background(server, tmp_path) as (kubeconfig, _):
        where = ("--cluster", "--kubeconfig", str(kubeconfig), "--output", str(out))
        done = run("theorem", "--prompts", "24", *where, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"holds": True, "comparisons": 400, "record": str(out / "a.json")}
    assert load(out / "a.json").figures["comparisons"] == 400
    assert (out / "a.cases.jsonl").read_bytes() == b"{}\n"
    assert "answers: 1 of 2" in done.stderr
    (body,) = server.created
    arguments = body["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments == ["bench", "job", "--output=/r", "--", "theorem", "--prompts", "24"]


def test_people_see_a_report(tmp_path: Path) -> None:
    with in_background(JobServer(log=FULL_LOG), tmp_path) as (kubeconfig, _):
        done = run("theorem", "--cluster", "--kubeconfig", str(kubeconfig), "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "every token id is the same" in done.stdout
    assert "record: " in done.stdout


@pytest.mark.parametrize("code", [1, 3, 130])
def test_the_exit_code_is_that_of_the_bench_inside(tmp_path: Path, code: int) -> None:
    record = encode(a_record(kind="theorem", figures={"holds": False}, failures=[Failure("theorem", "no route")]))
    server = JobServer(log=list(lines_of_file("a.json", record)), exit_code=code, reason="Error")
    with in_background(server, tmp_path) as (kubeconfig, _):
        done = run("theorem", "--cluster", "--kubeconfig", str(kubeconfig), "--output", str(tmp_path / "out"))
    assert done.returncode == code
    assert "not measured: theorem: no route" in done.stderr


def test_a_job_that_leaves_no_record_says_so_with_its_reason(tmp_path: Path) -> None:
    cut = list(lines_of_file("a.json", RECORD))[:-1]
    server = JobServer(log=cut, exit_code=137, reason="OOMKilled")
    with in_background(server, tmp_path) as (kubeconfig, _):
        done = run("theorem", "--cluster", "--kubeconfig", str(kubeconfig), "--output", str(tmp_path / "out"))
    assert done.returncode == 137
    assert "OOMKilled" in done.stderr
    assert "a.json is cut off" in done.stderr
    assert done.stdout == ""


def test_ctrl_c_stops_the_job_and_keeps_what_it_then_says(tmp_path: Path) -> None:
    server = JobServer(log=["answers: 1 of 2"], endless=True, last_words=list(lines_of_file("a.json", RECORD)))
    with in_background(server, tmp_path) as (kubeconfig, ask):
        child = subprocess.Popen(
            command("theorem", "--cluster", "--kubeconfig", str(kubeconfig), "--output", str(tmp_path / "o"), "--json"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        ask(server.reading.wait())
        child.send_signal(signal.SIGINT)
        output, errors = child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 130, errors
    assert server.deleted == ["edge-llm-bench-1"]
    assert json.loads(output)["comparisons"] == 400


def test_ctrl_c_before_the_pod_started_waits_for_nothing(tmp_path: Path) -> None:
    server = JobServer(waits=-1, waiting=None)
    with in_background(server, tmp_path) as (kubeconfig, _):
        where = ("--cluster", "--kubeconfig", str(kubeconfig), "--output", str(tmp_path / "out"))
        child = subprocess.Popen(command("theorem", *where), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert child.stderr is not None
        assert any("waiting for a board" in line for line in child.stderr)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 130, errors
    assert server.deleted == ["edge-llm-bench-1"]
    assert "Traceback" not in errors


def test_a_job_that_was_left_can_be_followed_again_without_starting_another(tmp_path: Path) -> None:
    server = JobServer(log=FULL_LOG)
    with in_background(server, tmp_path) as (kubeconfig, _):
        where = ("--cluster", "--kubeconfig", str(kubeconfig), "--output", str(tmp_path / "out"))
        first = run("theorem", *where, "--job", "edge-llm-bench-1")
        again = run("theorem", *where, "--job", "edge-llm-bench-1")
        (tmp_path / "out" / "a.json").write_text("another")
        clash = run("theorem", *where, "--job", "edge-llm-bench-1")
    assert (first.returncode, again.returncode) == (0, 0), again.stderr
    assert server.created == []
    assert clash.returncode == 1
    assert "another file" in clash.stderr
    assert (tmp_path / "out" / "a.json").read_text() == "another"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--cluster", "--workers-file", __file__), "a file of this machine"),
        (("--kubeconfig", __file__), "--cluster"),
        (("--job", "x"), "--cluster"),
        (("--cluster", "--requests", "none"), "--requests"),
        (("--cluster", "--url", "http://x:1"), "--cluster measures the gateway beside its Job, --url another one"),
        (("--cluster", "--json", "-o", "csv"), "leave out -o"),
        (("--cluster", "--placement", "mixed"), "it has auto, split, local"),
        (("--cluster", "--models", "a,b"), "has one model"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_job_is_made(arguments: tuple[str, ...], words: str) -> None:
    done = CliRunner().invoke(cluster, arguments)
    assert done.exit_code == 2
    assert words in done.stderr


@pytest.mark.parametrize(
    ("bench", "given", "expected"),
    [
        (theorem, ["--prompts=24", "--seed", "3", "--json", "--output", "x"], ["--prompts", "24", "--seed", "3"]),
        (cluster, ["-o", "csv", "--placement", "auto,split", "--quick"], ["--placement", "auto,split", "--quick"]),
        (serve, ["--mode", "auto", "--no-stream", "--rate", "2"], ["--mode", "auto", "--no-stream", "--rate", "2"]),
        (serve, ["--beside", "a=b", "--beside", "c=d"], ["--beside", "a=b", "--beside", "c=d"]),
        (serve, ["--namespace", "edge-llm", "--body", '{"top_k": 1}'], ["--body", '{"top_k": 1}']),
    ],
)
def test_options_go_to_the_job_as_they_were_typed(
    bench: click.Command, given: list[str], expected: list[str], tmp_path: Path
) -> None:
    server = JobServer(log=FULL_LOG)
    with in_background(server, tmp_path) as (kubeconfig, _):
        where = ["--cluster", "--kubeconfig", str(kubeconfig), "--output", str(tmp_path / "out")]
        done = CliRunner().invoke(bench, [*given, *where])
    assert server.created, done.output
    (body,) = server.created
    arguments = body["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[arguments.index("--") + 1 :] == [bench.name, *expected]


# -- in the pod


STAND_IN: Final = """
import json, signal, sys, time
from pathlib import Path
told = []
signal.signal(signal.SIGINT, lambda *_: told.append(True))
arguments = sys.argv[1:]
folder = Path(arguments[arguments.index("--output") + 1])
folder.mkdir(parents=True, exist_ok=True)
print("working", file=sys.stderr, flush=True)
while "endless" in arguments and not told:
    time.sleep(0.02)
(folder / "x.json").write_text(json.dumps(arguments))
sys.exit(130 if told else 3)
"""


def in_pod(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`edge-llm bench job` with a stand-in for the bench: a package that its child finds first."""
    package = folder / "edge_llm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(STAND_IN)
    return subprocess.Popen(
        [sys.executable, "-P", "-c", "from edge_llm.commands.bench_job import job; job()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


def files_of(log: str) -> dict[str, bytes]:
    reader = LogReader()
    for line in log.splitlines():
        reader.take(line)
    reader.end()
    return reader.files


def test_the_job_tells_the_bench_where_the_gateway_is_and_puts_its_record_into_the_log(tmp_path: Path) -> None:
    key = tmp_path / "key"
    options = ("--url", "http://edge-llm:8080", "--api-key-file", str(key), "--output", str(tmp_path / "volume"))
    child = in_pod(tmp_path, *options, "--", "cluster", "--quick")
    log, errors = child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 3, errors
    folder = tmp_path / "volume" / socket.gethostname()
    told = ["--url", "http://edge-llm:8080", "--api-key-file", str(key), "--output", str(folder)]
    assert json.loads(files_of(log)["x.json"]) == ["bench", "cluster", "--quick", *told]
    assert (folder / "x.json").exists()


def test_a_bench_that_is_told_another_server_gets_no_key_of_ours(tmp_path: Path) -> None:
    options = ("--url", "http://edge-llm:8080", "--api-key-file", "key", "--output", str(tmp_path / "volume"))
    child = in_pod(tmp_path, *options, "--", "serve", "--url=http://other")
    log, _ = child.communicate(timeout=DEADLINE_S)
    arguments = json.loads(files_of(log)["x.json"])
    assert "--url=http://other" in arguments
    assert "--api-key-file" not in arguments


def test_a_pod_that_is_told_to_end_lets_the_bench_keep_what_it_has(tmp_path: Path) -> None:
    child = in_pod(tmp_path, "--output", str(tmp_path / "volume"), "--", "cluster", "endless")
    assert child.stderr is not None
    assert child.stderr.readline() == "working\n"
    child.send_signal(signal.SIGTERM)
    log, _ = child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 130
    assert "x.json" in files_of(log)


# -- the manifest


def test_the_manifests_template_is_understood_by_the_command_line_and_says_no_key() -> None:
    objects = {one["kind"]: one for one in yaml.safe_load_all((MANIFESTS / "job.yaml").read_text())}
    (container,) = objects["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["args"][:2] == ["bench", "job"]
    from edge_llm.commands.bench_job import job

    context = job.make_context("job", list(container["args"][2:]))
    name, *options = context.params["arguments"]
    assert name == "cluster"
    cluster.make_context("cluster", ["--url", "http://edge-llm:8080", *options])
    assert objects["CronJob"]["spec"]["suspend"] is True
    volumes = objects["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["volumes"]
    claim = next(one["persistentVolumeClaim"] for one in volumes if "persistentVolumeClaim" in one)
    assert claim["claimName"] == objects["PersistentVolumeClaim"]["metadata"]["name"]
