"""edge-llm on the test cluster: an overlay applied, the Secret made, workers looked at, as a user does it.

Owns the user's commands (README has the same ones) and what is asked of Kubernetes about our pods. Refuses to know what
a scenario wants of them.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.kubernetes.cluster import Cluster
from tests.kubernetes.shell import Broken, run

NAMESPACE: Final = "edge-llm"
SECRET: Final = "edge-llm-keys"
GATEWAY: Final = "deployment/edge-llm-gateway"
PREFILL: Final = "statefulset/edge-llm-prefill"
DECODE: Final = "statefulset/edge-llm-decode"
MIXED: Final = "statefulset/edge-llm-mixed"
OVERLAYS: Final = Path(__file__).parent / "overlays"
SHIPPED: Final = Path(__file__).parents[2] / "k3s_manifests"
ROLE: Final = "edge-llm/role"
# Of lines in a kustomization that are no comment.
PATCH_LINES: Final = 30
_ROLLOUT_S: Final = 420.0


@dataclass(frozen=True, slots=True)
class Keys:
    """As `edge-llm serve key` and `edge-llm serve api-key` make them."""

    cluster_key: Path
    api_keys: Path
    api_key: Path


def make_keys(folder: Path) -> Keys:
    folder.mkdir(parents=True, exist_ok=True)
    edge_llm = (sys.executable, "-m", "edge_llm", "serve")
    keys = Keys(folder / "cluster.key", folder / "api-keys.yaml", folder / "api-key")
    keys.cluster_key.write_text(run(*edge_llm, "key"))
    # the key itself comes on stderr, once
    both = run("sh", "-c", '"$@" 2>&1', "sh", *edge_llm, "api-key", "--name", "test")
    found = re.search(r"shown this once: (\S+)", both)
    if found is None:
        raise Broken(f"edge-llm serve api-key showed no key: {both}")
    line = next(line for line in both.splitlines() if line.startswith("- {"))
    keys.api_keys.write_text(f"{line.rstrip().removesuffix('}')}, operator: true}}\n")
    keys.api_key.write_text(found[1])
    for path in (keys.cluster_key, keys.api_keys, keys.api_key):
        path.chmod(0o600)
    return keys


@dataclass(slots=True)
class Deployed:
    """Our namespace of the cluster."""

    cluster: Cluster
    keys: Keys
    overlay: Path = field(default=OVERLAYS / "chat")

    def k(self, *words: str | Path, stdin: str | None = None, deadline_s: float = 60.0) -> str:
        """kubectl in our namespace."""
        return self.cluster.kubectl("-n", NAMESPACE, *words, stdin=stdin, deadline_s=deadline_s)

    def items(self, *words: str) -> list[dict[str, Any]]:
        return self.cluster.items("-n", NAMESPACE, *words)

    def get(self, *words: str) -> dict[str, Any]:
        return self.cluster.get("-n", NAMESPACE, *words)

    def apply(self, overlay: Path | None = None) -> str:
        """`kubectl apply -k`: nothing else installs edge-llm here."""
        return self.cluster.kubectl("apply", "-k", overlay or self.overlay, deadline_s=300)

    def make_secret(self) -> None:
        """README's command."""
        files = (f"--from-file={self.keys.cluster_key}", f"--from-file={self.keys.api_keys}")
        self.k("create", "secret", "generic", SECRET, *files)

    def workloads(self) -> list[str]:
        found = self.items("deployments,statefulsets", "-l", "app.kubernetes.io/part-of=edge-llm")
        return [f"{item['kind'].lower()}/{item['metadata']['name']}" for item in found]

    def rolled_out(self, *workloads: str, deadline_s: float = _ROLLOUT_S) -> None:
        """Wait until they are as they are wanted. Raises Broken with what their pods say."""
        for workload in workloads or self.workloads():
            try:
                self.k("rollout", "status", workload, f"--timeout={deadline_s:.0f}s", deadline_s=deadline_s + 20)
            except Broken as error:
                raise Broken(f"{error.message}; {self.why_not()}") from error

    def set_env(self, workloads: Sequence[str], values: Mapping[str, str | None]) -> None:
        """None: as the overlay has it."""
        words = [f"{name}-" if value is None else f"{name}={value}" for name, value in values.items()]
        self.k("set", "env", *workloads, *words)

    def scale(self, workload: str, replicas: int) -> None:
        self.k("scale", workload, f"--replicas={replicas}")

    def pods(self, role: str | None = None) -> list[dict[str, Any]]:
        """Those that are not being deleted."""
        selector = "app.kubernetes.io/part-of=edge-llm" + (f",{ROLE}={role}" if role else "")
        return [pod for pod in self.items("pods", "-l", selector) if "deletionTimestamp" not in pod["metadata"]]

    def node_of(self, pod: str) -> str:
        return str(self.get("pod", pod)["spec"]["nodeName"])

    def restarts(self) -> dict[str, tuple[str, int]]:
        """Of each pod: its id, and how often its containers were started again. Equal before and after: it ran on."""
        found = {}
        for pod in self.pods():
            statuses = pod["status"].get("containerStatuses", [])
            found[pod["metadata"]["name"]] = (pod["metadata"]["uid"], sum(one["restartCount"] for one in statuses))
        return found

    def events(self, about: str) -> list[str]:
        """What Kubernetes says of a pod or another thing, newest last."""
        found = self.items("events", "--field-selector", f"involvedObject.name={about}")
        return [f"{event['reason']}: {event['message']}" for event in found]

    def logs(self, pod: str, *more: str) -> str:
        return self.k("logs", pod, "--all-containers", "--tail=200", *more)

    def label_node(self, node: str, role: str | None) -> None:
        """The first value of a worker's role. None: nothing of ours runs there."""
        word = f"{ROLE}-" if role is None else f"{ROLE}={role}"
        self.cluster.kubectl("label", "node", node, word, "--overwrite")

    def why_not(self) -> str:
        """Pods that are not ready, with what is known of the reason."""
        said = []
        for pod in self.items("pods"):
            name, status = pod["metadata"]["name"], pod["status"]
            conditions = {one["type"]: one for one in status.get("conditions", [])}
            if conditions.get("Ready", {}).get("status") == "True" or status.get("phase") == "Succeeded":
                continue
            states = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
            waits = [json.dumps(one["state"]) for one in states if "running" not in one["state"]]
            last = self.events(name)[-1:]
            said.append(f"{name} is {status.get('phase')} {' '.join(waits)} {' '.join(last)}")
        return "; ".join(said) or "all pods are ready"

    def keep_logs(self, folder: Path) -> None:
        """Everything that helps to find out what went wrong."""
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "pods").mkdir(parents=True)
        for name, words in {"pods": ("pods", "-o", "wide"), "events": ("events", "--sort-by=.lastTimestamp")}.items():
            (folder / f"{name}.txt").write_text(_or_error(self, "get", *words))
        for pod in self.items("pods"):
            name = pod["metadata"]["name"]
            (folder / "pods" / f"{name}.log").write_text(_or_error(self, "logs", name, "--all-containers"))
            (folder / "pods" / f"{name}.txt").write_text(_or_error(self, "describe", "pod", name))
        shutil.copytree(self.cluster.site.run / "log", folder / "daemons")


def _or_error(deployed: Deployed, *words: str) -> str:
    try:
        return deployed.k(*words)
    except Broken as error:
        return error.message


def patch_lines(overlay: Path) -> int:
    """What a test overlay adds to the shipped one."""
    lines = [line.strip() for path in overlay.rglob("*") if path.is_file() for line in path.read_text().splitlines()]
    return sum(1 for line in lines if line and not line.startswith("#"))
