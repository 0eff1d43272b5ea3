"""kubectl where it is needed: to render a folder as kubectl would apply it, and to move a workload for good.

Owns finding it (K3s brings its own), running it, and its words when it fails. Refuses to know what it is asked for.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from edge_llm.errors import ConfigError

RENDER_S: Final = 120.0
CALL_S: Final = 60.0


def rendered(folder: Path) -> str:
    """One YAML with all objects of a kustomize folder. Raises ConfigError."""
    kustomize = shutil.which("kustomize")
    command = [kustomize, "build"] if kustomize and not shutil.which("kubectl") else [*_kubectl(), "kustomize"]
    return _run([*command, str(folder)], RENDER_S)


class Kubectl:
    """One cluster's, by a kubeconfig (None: the one that kubectl finds), in one namespace."""

    def __init__(self, kubeconfig: Path | None, namespace: str) -> None:
        self._where = ["-n", namespace, *(["--kubeconfig", str(kubeconfig)] if kubeconfig else [])]

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
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"`{words}` did not end well: {error}") from error
    if done.returncode:
        raise ConfigError(f"`{words}` failed: {done.stderr.strip()[-2000:] or f'exit code {done.returncode}'}")
    return done.stdout
