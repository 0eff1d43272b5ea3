"""The steps by which a board gets a worker of another role for good, on Kubernetes.

Pure. Owns the order and why: a StatefulSet's volume holds its pod on its board, and a smaller StatefulSet gives up its
last pod, wherever that is. So the board gets its new label first (labels move nobody), then the workloads their new
sizes, and then the pod on this board is deleted, with its claim where that binds it, unless it was the last one and
went by itself. What its StatefulSet makes again finds the board that the last pod left; the new role's pod finds this
one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_llm.errors import ConfigError

POD: Final = re.compile(r"edge-llm-(prefill|decode|mixed)-([0-9]+)")


@dataclass(frozen=True, slots=True)
class Moves:
    """Words of kubectl, in order, and the workers that they stop: the one on the board, and one that takes its place in
    the smaller workload. `replicas`: of the two workloads then, for the overlay that made them."""

    steps: tuple[tuple[str, ...], ...]
    stopped: tuple[str, ...]
    replicas: Mapping[str, int]


def commands(steps: Iterable[tuple[str, ...]], kubeconfig: Path | None, namespace: str) -> list[str]:
    """Steps as a shell takes them."""
    file = ["--kubeconfig", str(kubeconfig)] if kubeconfig else []
    return [shlex.join(["kubectl", *file, "-n", namespace, *words]) for words in steps]


def moves(pod: str, role: str, board: str, replicas: Mapping[str, int], *, is_bound: bool = True) -> Moves:
    """`replicas`: of each StatefulSet now. `is_bound`: whether the pod's volume is on this board alone. Raises
    ConfigError for what is no worker's pod of these manifests, or stands in the role already."""
    matched = POD.fullmatch(pod)
    if matched is None:
        raise ConfigError(f"{pod} is no pod of edge-llm's manifests (edge-llm-ROLE-NUMBER): move it as it was made")
    was, ordinal = matched[1], int(matched[2])
    if was == role:
        raise ConfigError(f"{pod} is a worker of role {role} by its workload already")
    old, new = f"edge-llm-{was}", f"edge-llm-{role}"
    missing = [name for name in (old, new) if name not in replicas]
    if missing:
        raise ConfigError(
            f"there is no StatefulSet {missing[0]} in this namespace: render the cluster with a board of that role "
            "(`edge-llm cluster render`) and apply it"
        )
    left = replicas[old] - 1
    then = {old: left, new: replicas[new] + 1}
    steps: list[tuple[str, ...]] = [
        ("label", "node", board, "--overwrite", f"edge-llm/role={role}"),
        *(("scale", "statefulset", name, f"--replicas={count}") for name, count in then.items()),
    ]
    if ordinal >= left:
        return Moves(tuple(steps), (pod,), then)
    if is_bound:
        steps.append(("delete", "pvc", f"data-{pod}", "--wait=false"))
    steps.append(("delete", "pod", pod, "--wait=false"))
    return Moves(tuple(steps), (pod, f"{old}-{left}"), then)
