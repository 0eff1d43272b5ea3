"""What rendering into the same folder again changes for boards that have a worker, and how they get there.

Pure. Owns what is read of an earlier rendering, and the steps and words for a board whose role changes. Refuses to
choose roles (fit.py) and to know where a rendering lies (manifests.py).

A label alone moves nobody, and strands: the worker runs on and keeps the new role's worker off its board (one worker a
board); started again it waits for ever, because its volume is on this board and its workload wants another label. So a
board that changes gets `edge-llm cluster role`, which replaces its worker, before labels and `kubectl apply`: both
workloads have their new sizes then, and nothing that is applied gives up a pod of another board.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from edge_llm.config import WorkerRole
from edge_llm.plan.boards import ROLES
from edge_llm.plan.fit import Fitted

# As overlay.py writes them; earlier versions said --overwrite.
_LABELLED: Final = r"^#   kubectl label node (?:--overwrite )?(.+) edge-llm/role={role}$"
_VOLUME_PATCH: Final = "/spec/volumeClaimTemplates/"


@dataclass(frozen=True, slots=True)
class Earlier:
    """What a folder was rendered with before; empty: nothing. `roles` by board; `sizes_volumes`: whether workers'
    volumes were of another size than the shipped one."""

    roles: Mapping[str, WorkerRole] = field(default_factory=dict)
    sizes_volumes: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """A board that is there already gets another role."""

    board: str
    was: WorkerRole
    role: WorkerRole


def earlier_of(text: str) -> Earlier:
    """Of an overlay that was rendered before."""
    return Earlier(
        roles={
            name: role
            for role in ROLES
            for names in re.findall(_LABELLED.format(role=role), text, re.MULTILINE)
            for name in names.split()
        },
        sizes_volumes=_VOLUME_PATCH in text,
    )


def changes(earlier: Earlier, fit: Fitted) -> tuple[Change, ...]:
    return tuple(
        Change(board.name, was, group.role)
        for group in fit.groups
        for board in group.boards
        if (was := earlier.roles.get(board.name, group.role)) != group.role
    )


def moves(changed: Sequence[Change], earlier: Earlier, folder: str) -> list[str]:
    """The commands that replace the workers of these boards, in order. `folder`: what was rendered, as a shell takes
    it."""
    new = [role for role in ROLES if role in {change.role for change in changed} - set(earlier.roles.values())]
    return [
        *(line for role in new for line in _workload_without_pods(role, folder)),
        *(
            f"edge-llm cluster role POD {change.role} --kubeconfig FILE --url URL --api-key-file KEY   "
            f"# POD: the edge-llm-{change.was}-N on {change.board}"
            for change in changed
        ),
    ]


def remarks(changed: Sequence[Change], *, is_labelled: bool) -> Iterable[str]:
    """Why a label is not enough, for people; and where labels are given, what a refused one means: what was changed by
    an earlier rendering, or by hand, is not known here, and the label says it."""
    if is_labelled:
        yield (
            "a label that kubectl refuses (`already has a value`) means that the board does something else so far: its "
            "worker is moved first, by `edge-llm cluster role POD ROLE --kubeconfig FILE`, before `kubectl apply`. "
            "`kubectl get nodes -L edge-llm/role` shows what is still to do (no worker there yet: --overwrite)"
        )
    if not changed:
        return
    boards = ", ".join(f"{change.board} ({change.was} -> {change.role})" for change in changed)
    instead = "; ".join(
        f"kubectl label node --overwrite {change.board} edge-llm/role={change.role}" for change in changed
    )
    yield (
        f"another role than this folder was rendered with before: {boards}. A label alone would move nobody: the "
        "worker runs on and keeps the new one off its board, and started again it waits for ever, because its volume "
        "is on this board and its workload wants another label. `edge-llm cluster role` replaces it; do that first "
        "(`kubectl -n edge-llm get pods -o wide` says which pod is where). Where nothing is installed yet, a label is "
        f"enough: {instead}"
    )


def _workload_without_pods(role: WorkerRole, folder: str) -> tuple[str, str]:
    """`cluster role` adds a worker to a workload, so there must be one, of none so far."""
    return (
        f"kubectl apply -k {folder} -l edge-llm/role={role}",
        f"kubectl -n edge-llm scale statefulset edge-llm-{role} --replicas=0",
    )
