"""kubectl where it is needed: to render a folder as kubectl would apply it, and to move a workload for good.

Owns finding it (K3s brings its own), running it, its words when it fails, and what it thinks of a kubeconfig.
Refuses to know what it is asked for.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from edge_llm.errors import ConfigError

RENDER_S: Final = 120.0
CALL_S: Final = 60.0
# Its log, which says once per try what its last line says for people.
_LOGGED: Final = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d\.")


def rendered(folder: Path) -> str:
    """One YAML with all objects of a kustomize folder. Raises ConfigError."""
    kustomize = shutil.which("kustomize")
    command = [kustomize, "build"] if kustomize and not shutil.which("kubectl") else [*_kubectl(), "kustomize"]
    return _run([*command, str(folder)], RENDER_S)


class Kubectl:
    """One cluster's, by a kubeconfig (None: the one that kubectl finds), in one namespace."""

    def __init__(self, kubeconfig: Path | None, namespace: str) -> None:
        """Raises ConfigError when the file names no cluster: kubectl would ask a server on this machine then."""
        self.kubeconfig, self.namespace = kubeconfig, namespace
        self._where = [*(["--kubeconfig", str(kubeconfig)] if kubeconfig else []), "-n", namespace]
        _kubectl()  # one that is missing is not the file's fault
        try:
            self.run("config", "view", "--minify", "-o", "json")
        except ConfigError as error:
            what = f"{kubeconfig} is" if kubeconfig else "there is"
            raise ConfigError(f"{what} no kubeconfig that leads to a cluster: {error.message}") from error

    def get(self, *what: str) -> Any:
        """None: nothing, where `--ignore-not-found` was asked for."""
        found = self.run("get", *what, "-o", "json")
        return json.loads(found) if found.strip() else None

    def run(self, *words: str) -> str:
        """Raises ConfigError with what kubectl says."""
        return _run([*_kubectl(), *self._where, *words], CALL_S)


def _kubectl() -> list[str]:
    own = Path(sys.executable).parent / "kubectl"  # of the environment that runs this (PyPI has it)
    for words in (["kubectl"], ["k3s", "kubectl"], [str(own)]):
        if found := shutil.which(words[0]):
            return [found, *words[1:]]
    raise ConfigError("this needs kubectl (K3s brings it as `k3s kubectl`), and neither is in PATH")


def _run(command: Sequence[str], timeout_s: float) -> str:
    words = " ".join([Path(command[0]).name, *command[1:]])
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout_s, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"`{words}` did not end within {timeout_s:.0f} s: does its server answer?") from error
    except OSError as error:
        raise ConfigError(f"`{words}` did not end well: {error}") from error
    if done.returncode:
        raise ConfigError(f"`{words}` failed: {_said(done.stderr) or f'exit code {done.returncode}'}")
    return done.stdout


def _said(errors: str) -> str:
    """What it says to people; its log where it says nothing else."""
    lines = errors.strip().splitlines()
    return "\n".join([line for line in lines if not _LOGGED.match(line)] or lines[-1:])[-2000:]
