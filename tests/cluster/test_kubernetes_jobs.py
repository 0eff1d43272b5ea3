"""Jobs on an API server over a real socket: what is created, a log heard to its end, what goes wrong in words."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from edge_llm.cluster.kubernetes import client_of
from edge_llm.cluster.kubernetes_jobs import Ended, Jobs, JobTrouble, Patience, job_of
from edge_llm.errors import ConfigError
from tests.cluster.job_server import JobServer, template

FAST = Patience(ask_s=5.0, look_s=0.02, start_s=0.2, silent_s=0.1, lost_s=0.5)


def with_jobs(
    server: JobServer, folder: Path, work: Callable[[Jobs], Awaitable[Any]], patience: Patience = FAST
) -> Any:
    async def run() -> Any:
        async with server.running(folder) as kubeconfig, await client_of(kubeconfig) as client:
            return await work(Jobs(client, "edge-llm", patience))

    return asyncio.run(run())


async def followed(jobs: Jobs) -> tuple[Ended, list[str], list[str]]:
    said: list[str] = []
    lines: list[str] = []
    ended = await jobs.follow("edge-llm-bench-1", said.append, lines.append)
    return ended, lines, said


def test_a_job_is_the_template_with_other_arguments_after_the_dashes() -> None:
    made = job_of(template(), ["serve", "--rate", "2"])
    assert made["metadata"]["generateName"] == "edge-llm-bench-"
    assert made["metadata"]["labels"] == {"app.kubernetes.io/component": "bench"}
    (container,) = made["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["bench", "job", "--output=/r", "--", "serve", "--rate", "2"]
    assert template()["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["args"][-1] == "cluster"


def test_a_cron_job_that_is_no_template_is_refused() -> None:
    with pytest.raises(ConfigError, match="no template"):
        job_of(template(args=["serve", "gateway"]), ["cluster"])


def test_a_job_is_created_and_its_name_is_the_servers(tmp_path: Path) -> None:
    server = JobServer()
    assert with_jobs(server, tmp_path, lambda jobs: jobs.start(["theorem"])) == "edge-llm-bench-1"
    (body,) = server.created
    assert body["spec"]["template"]["spec"]["containers"][0]["args"][-1] == "theorem"


def test_without_the_template_one_is_told_how_it_comes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kubectl apply -k k3s_manifests/bench"):
        with_jobs(JobServer(template=None), tmp_path, lambda jobs: jobs.start(["cluster"]))


def test_a_server_that_refuses_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(JobTrouble, match="403 cronjobs is forbidden"):
        with_jobs(JobServer(refuses=403), tmp_path, lambda jobs: jobs.start(["cluster"]))


def test_a_server_that_is_not_there_is_said_to_be(tmp_path: Path) -> None:
    async def run() -> None:
        async with JobServer().running(tmp_path) as kubeconfig:
            pass
        async with await client_of(kubeconfig) as client:
            await Jobs(client, "edge-llm", FAST).start(["cluster"])

    with pytest.raises(JobTrouble, match="cannot read the CronJob"):
        asyncio.run(run())


@pytest.mark.parametrize("code", [0, 1, 3, 130])
def test_the_log_is_heard_and_the_exit_code_is_the_containers(tmp_path: Path, code: int) -> None:
    server = JobServer(log=["a", "", "c"], exit_code=code)
    ended, lines, _ = with_jobs(server, tmp_path, followed)
    assert lines == ["a", "", "c"]
    assert ended == Ended(code, "Completed")


def test_a_connection_that_breaks_costs_no_line_and_repeats_none(tmp_path: Path) -> None:
    server = JobServer(log=[f"line {n}" for n in range(50)], breaks_after=20)
    _, lines, _ = with_jobs(server, tmp_path, followed)
    assert lines == server.log
    assert server.log_reads >= 2


def test_a_pod_that_is_taken_away_when_it_has_ended_costs_nothing_that_was_heard(tmp_path: Path) -> None:
    server = JobServer(log=["a", "b"], exit_code=3, takes_pod_away=True)
    ended, lines, _ = with_jobs(server, tmp_path, followed)
    assert (ended.exit_code, lines) == (3, ["a", "b"])


def test_a_log_that_is_silent_for_long_is_asked_for_again(tmp_path: Path) -> None:
    server = JobServer(log=["a"], endless=True, last_words=["b"])

    async def until_asked_again(jobs: Jobs) -> Any:
        following = asyncio.create_task(followed(jobs))
        await server.asked_again.wait()
        await jobs.stop("edge-llm-bench-1")
        return await following

    _, lines, _ = with_jobs(server, tmp_path, until_asked_again)
    assert lines == ["a", "b"]


def test_what_a_pod_waits_for_is_said_once(tmp_path: Path) -> None:
    waiting = {"reason": "ErrImageNeverPull", "message": "the image is not on this board"}
    _, _, said = with_jobs(JobServer(log=["a"], waits=4, waiting=waiting), tmp_path, followed)
    assert said == ["edge-llm-bench-1: ErrImageNeverPull: the image is not on this board"]


def test_a_pod_that_never_starts_is_given_up_with_the_reason_and_taken_away(tmp_path: Path) -> None:
    events = [{"reason": "FailedMount", "message": 'secret "edge-llm-bench-key" not found', "lastTimestamp": "2"}]
    server = JobServer(waits=-1, waiting={"reason": "ContainerCreating"}, events=events)
    with pytest.raises(JobTrouble, match='FailedMount: secret "edge-llm-bench-key" not found'):
        with_jobs(server, tmp_path, followed)
    assert server.deleted == ["edge-llm-bench-1"]


def test_a_server_that_is_away_for_a_moment_before_the_pod_starts_ends_nothing(tmp_path: Path) -> None:
    ended, lines, said = with_jobs(JobServer(log=["a"], away=3), tmp_path, followed)
    assert (ended.exit_code, lines) == (0, ["a"])
    assert said == ["edge-llm-bench-1: trying again: the API server refuses to list pods: 503 etcd has no leader"]


def test_a_server_that_stays_away_is_given_up_and_the_job_is_left_to_run(tmp_path: Path) -> None:
    server = JobServer(away=10_000)
    patience = Patience(ask_s=5.0, look_s=0.02, start_s=60.0, silent_s=0.1, lost_s=0.2)
    with pytest.raises(JobTrouble, match="503 etcd has no leader"):
        with_jobs(server, tmp_path, followed, patience)
    assert server.deleted == []


def test_a_job_without_a_pod_is_waited_for_while_it_is_there(tmp_path: Path) -> None:
    _, lines, said = with_jobs(JobServer(log=["a"], waits=3, waiting=None), tmp_path, followed)
    assert lines == ["a"]
    assert said == ["edge-llm-bench-1: waiting for a board that takes it"]


def test_a_job_that_is_deleted_before_it_starts_is_not_waited_for(tmp_path: Path) -> None:
    """By Ctrl-C, or somebody else."""
    server = JobServer(waits=-1, waiting=None)

    async def stopped(jobs: Jobs) -> Any:
        await jobs.stop("edge-llm-bench-1")
        return await followed(jobs)

    with pytest.raises(ConfigError, match="no Job edge-llm-bench-1 in namespace edge-llm: it was deleted"):
        with_jobs(server, tmp_path, stopped)


def test_a_job_that_never_was_is_not_waited_for(tmp_path: Path) -> None:
    async def of_another_name(jobs: Jobs) -> Any:
        return await jobs.follow("edge-llm-bench-typo", lambda _: None, lambda _: None)

    with pytest.raises(ConfigError, match="no Job edge-llm-bench-typo"):
        with_jobs(JobServer(waits=-1, waiting=None), tmp_path, of_another_name)


def test_a_container_that_was_killed_says_why(tmp_path: Path) -> None:
    ended, _, _ = with_jobs(JobServer(log=["a"], exit_code=137, reason="OOMKilled"), tmp_path, followed)
    assert ended == Ended(137, "OOMKilled")


def test_a_job_that_is_gone_already_can_be_stopped(tmp_path: Path) -> None:
    async def twice(jobs: Jobs) -> None:
        await jobs.stop("x")
        await jobs.stop("x")

    server = JobServer()
    with_jobs(server, tmp_path, twice)
    assert server.deleted == ["x"]
