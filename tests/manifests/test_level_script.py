"""What the container does that measures a level before a worker starts: its script, run by a real shell; `edge-llm` is
a program that writes down what it is told."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

from edge_llm.commands.verify import verify
from tests.manifests.rendering import containers_of, named, overlay

DEADLINE_S: Final = 30.0
TOLD: Final = """\
#!/bin/sh
trap 'echo told to end >> {log}; exit 143' TERM
echo "$@" >> {log}
[ -z "$TELLS" ] || kill -TERM "$PPID"
echo begun
[ -z "$STAYS" ] || while :; do sleep 0.05; done
exit "$FAILS"
"""


class Container:
    """The one that measures, with its settings."""

    def __init__(self, folder: Path) -> None:
        items = overlay("pi5-1p3d")
        worker = named(items, "StatefulSet", "edge-llm-decode")
        (found,) = (one for one in containers_of(worker) if one["name"] == "verify")
        self.command = [*found["command"], *found["args"]]
        self.environment: dict[str, str] = dict(named(items, "ConfigMap", "edge-llm-worker")["data"])
        self._folder, self._log = folder, folder / "log"
        program = folder / "edge-llm"
        program.write_text(TOLD.format(log=self._log))
        program.chmod(0o755)

    @contextmanager
    def start(self, **changes: str) -> Iterator[subprocess.Popen[str]]:
        path = {"PATH": f"{self._folder}:/usr/bin:/bin", "FAILS": "0", "STAYS": "", "TELLS": ""}
        with subprocess.Popen(
            self.command,
            env=self.environment | path | changes,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                yield process
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what does not end as it should holds nothing up

    def run(self, **changes: str) -> tuple[int, str]:
        """Exit code, and standard error."""
        with self.start(**changes) as process:
            _, said = process.communicate(timeout=DEADLINE_S)
        return process.returncode, said

    def told(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []


@pytest.fixture
def container(tmp_path: Path) -> Container:
    return Container(tmp_path)


def test_it_measures_what_the_worker_will_load(container: Container) -> None:
    assert container.run() == (0, "")
    (words,) = container.told()
    assert words.startswith("verify --if-unknown ")
    asked = verify.make_context("verify", shlex.split(words)[1:]).params
    settings = container.environment
    assert asked["model"] == settings["EDGE_LLM_WORKER_MODEL"]
    assert asked["policy"] == settings["EDGE_LLM_WORKER_POLICY"]
    assert asked["k_type"] == settings["EDGE_LLM_WORKER_K_TYPE"]
    assert asked["chunk_tokens"] == int(settings["EDGE_LLM_WORKER_CHUNK_TOKENS"])
    assert asked["v_type"] == "f16"


def test_another_type_of_v_is_measured_where_the_settings_name_one(container: Container) -> None:
    assert container.run(EDGE_LLM_WORKER_V_TYPE="bf16")[0] == 0
    (words,) = container.told()
    assert verify.make_context("verify", shlex.split(words)[1:]).params["v_type"] == "bf16"


def test_it_can_be_switched_off(container: Container) -> None:
    assert container.run(EDGE_LLM_VERIFY_FIRST="no") == (0, "")
    assert container.told() == []


def test_the_worker_starts_whatever_comes_of_it(container: Container) -> None:
    code, said = container.run(FAILS="1")
    assert code == 0
    assert "edge-llm verify ended with 1: the worker starts all the same" in said


def test_a_pod_that_is_deleted_does_not_wait_for_the_end_of_it(container: Container) -> None:
    with container.start(STAYS="yes") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
        process.stdout.read()  # until the program that it had started is gone, too
    assert container.told()[1:] == ["told to end"]


def test_nor_does_one_that_is_deleted_in_the_moment_in_which_it_begins(container: Container) -> None:
    """The shell may hear of it before it has noted down whom it has just started."""
    line = '"$EDGE_LLM_WORKER_V_TYPE"} &\n'
    assert container.command[-1].count(line) == 1
    container.command[-1] = container.command[-1].replace(line, f"{line}sleep 0.3\n")  # a shell that is slow to go on
    with container.start(STAYS="yes", TELLS="yes") as process:
        assert process.wait(DEADLINE_S) == 0
