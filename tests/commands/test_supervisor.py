"""What `edge-llm up` starts, and that one child that cannot start again takes nobody with it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_llm.commands.child import Child
from edge_llm.commands.supervisor import (
    BESIDE_DRAIN_S,
    GATEWAY_DRAIN_S,
    SIMULATED_MODEL,
    WORKER_DRAIN_S,
    Supervisor,
    free_port,
)
from edge_llm.config import UpConfig
from edge_llm.errors import WorkerError

GIB = 1 << 30


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def planned(config: UpConfig, *options: str, say: Callable[[str], None] = print) -> Supervisor:
    return Supervisor(config, "a-model", options, say, available_bytes=lambda: 6 * GIB)


def limits(supervisor: Supervisor) -> list[list[str]]:
    """The values of --memory-limit-bytes that each worker gets, in order; the last one counts."""
    found = []
    for worker in supervisor.workers:
        pairs = zip(worker.arguments, worker.arguments[1:], strict=False)
        found.append([value for name, value in pairs if name == "--memory-limit-bytes"])
    return found


@pytest.mark.usefixtures("tmp_cache")
def test_workers_of_one_board_share_its_memory_out() -> None:
    assert limits(planned(UpConfig(prefill=1, decode=2))) == [[str(2 * GIB)]] * 3


@pytest.mark.usefixtures("tmp_cache")
def test_a_limit_of_the_user_counts_and_simulated_workers_get_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [values[-1] for values in limits(planned(UpConfig(), "--memory-limit-bytes", "77"))] == ["77"] * 2
    assert limits(planned(UpConfig(simulated=2))) == [[], []]
    monkeypatch.setenv("EDGE_LLM_WORKER_MEMORY_LIMIT_BYTES", "88")
    assert limits(planned(UpConfig())) == [[], []]


@pytest.mark.usefixtures("tmp_cache")
def test_a_worker_may_take_as_long_to_stop_as_its_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {worker.stop_s for worker in planned(UpConfig()).workers} == {WORKER_DRAIN_S + BESIDE_DRAIN_S}
    monkeypatch.setenv("EDGE_LLM_WORKER_DRAIN_S", "100")
    supervisor = planned(UpConfig())
    assert {worker.stop_s for worker in supervisor.workers} == {100.0 + BESIDE_DRAIN_S}
    assert supervisor.stop_s == 100.0 + GATEWAY_DRAIN_S + 2 * BESIDE_DRAIN_S


@pytest.mark.anyio
@pytest.mark.timeout(120)
async def test_settings_of_a_real_cluster_do_not_open_a_local_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file for both: addresses to be reached from outside, and who may come in."""
    file = tmp_path / "both.yaml"
    file.write_text(
        f"worker: {{host: 0.0.0.0}}\ngateway: {{host: 0.0.0.0, api_keys_file: {tmp_path}/none-here.yaml}}\n"
    )
    monkeypatch.setenv("EDGE_LLM_CONFIG", str(file))
    supervisor = Supervisor(UpConfig(simulated=2, prefill=1, decode=1, port=0), SIMULATED_MODEL, (), print)
    stop = asyncio.Event()
    async with asyncio.timeout(60):
        await supervisor.run(stop, stop.set)
    addresses = [child.ready["address"] for child in supervisor.children if child.ready]
    assert [address.rpartition(":")[0] for address in addresses] == ["127.0.0.1"] * 3


@pytest.mark.anyio
@pytest.mark.timeout(120)
async def test_a_worker_whose_program_is_gone_for_a_while_comes_back_and_the_others_stay(tmp_path: Path) -> None:
    """Started again it fails twice: with a program that cannot be run, then with one that says nonsense."""
    said: list[str] = []
    config = UpConfig(simulated=2, prefill=1, decode=1, port=0)
    supervisor = Supervisor(config, SIMULATED_MODEL, (), said.append)
    program = tmp_path / "python"
    runs(program, f'exec "{sys.executable}" "$@"')
    prefill, decode = supervisor.workers
    decode.program = (str(program), "-m", "edge_llm")
    stop, ready = asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(supervisor.run(stop, ready.set))
    try:
        async with asyncio.timeout(60):
            await ready.wait()
            first, other = pid_of(decode), pid_of(prefill)
            program.unlink()
            os.kill(first, signal.SIGKILL)
            await until(lambda: any("could not be started" in line for line in said))
            runs(program, "echo nonsense")
            await until(lambda: any("could not start" in line for line in said))
            runs(program, f'exec "{sys.executable}" "$@"')
            await until(lambda: sum(line.startswith("decode-1 ready") for line in said) == 2)
        assert not running.done()
        assert pid_of(decode) != first
        assert pid_of(prefill) == other
        pauses = [line.rpartition(" ")[0].rpartition(" ")[2] for line in said if line.startswith("starting decode-1")]
        assert pauses == ["0.5", "1.0", "2.0"], "each failure makes the next pause longer"
    finally:
        stop.set()
        await running


@pytest.mark.anyio
@pytest.mark.timeout(120)
async def test_a_worker_that_cannot_start_is_told_at_once_and_the_others_are_stopped(tmp_path: Path) -> None:
    supervisor = Supervisor(UpConfig(simulated=2, prefill=1, decode=1, port=0), SIMULATED_MODEL, (), print)
    broken, slow = tmp_path / "broken", tmp_path / "slow"
    runs(broken, "echo 'no such model' >&2; sleep 0.5; exit 3")
    runs(slow, "exec sleep 300")  # a large model, being loaded
    prefill, decode = supervisor.workers
    prefill.program, decode.program = (str(slow),), (str(broken),)
    async with asyncio.timeout(20):
        with pytest.raises(WorkerError, match=r"decode-1 could not start: exit code 3\nno such model"):
            await supervisor.run(asyncio.Event(), lambda: pytest.fail("it was said to be ready"))
    assert prefill.process is not None
    assert prefill.process.returncode == -signal.SIGKILL
    assert supervisor.gateway.process is None


def runs(program: Path, line: str) -> None:
    """Another program at once in the place of the one that is there."""
    draft = program.with_suffix(".new")
    draft.write_text(f"#!/bin/sh\n{line}\n")
    draft.chmod(0o755)
    draft.replace(program)


def pid_of(child: Child) -> int:
    assert child.process is not None
    return child.process.pid


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - it happens in other processes
        await asyncio.sleep(0.02)


def test_a_port_that_nobody_listens_on_yet_is_not_given_twice() -> None:
    """Four clusters at once ask for 36 of 12,000: by chance alone two would be the same once in twenty times."""
    ports = [free_port() for _ in range(900)]
    assert len(set(ports)) == len(ports)
