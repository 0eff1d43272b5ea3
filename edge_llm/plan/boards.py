"""A board, a worker's settings, and what a worker of a role takes of it: the sum, and its container's limit.

Pure. The sum itself is the worker's own (catalogue/memory.py): what fits here is what starts there. Refuses to choose
roles (roles.py), to judge a whole cluster (fit.py), and to know files, YAML and Kubernetes objects.

Rules. All workers of a role are one workload with one limit, so it must fit the smallest board of the role; of two
kinds of machine the larger sum counts (other weights are repacked). A board has one worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal

from edge_llm.catalogue.memory import MemoryPlan, ModelSizes, plan_memory
from edge_llm.config import WorkerRole

Arch = Literal["arm64", "amd64"]
MACHINES: Final[dict[Arch, str]] = {"arm64": "aarch64", "amd64": "x86_64"}
ROLES: Final[tuple[WorkerRole, ...]] = ("prefill", "decode", "mixed")
MIB: Final = 1 << 20
# Of a board's nominal memory: firmware, the kernel itself and a Pi's graphics take the rest before Linux counts.
SHOWN: Final = 0.96
# What K3s documents as the least for the system and itself without any workload: 512 MB (agent), 2 GB (server); an
# agent's board also runs a few pods of the system, and the kubelet evicts below 100 MiB.
AGENT_BYTES: Final = 768 * MIB
SERVER_BYTES: Final = 2048 * MIB
# A container is killed at its limit: the sum is an estimate from above, but sockets, bodies and the allocator are not
# in it, and a worker compares the sum with what Python has left of the limit. Of weights nothing is added: they are
# pages of a file, which the kernel drops before it kills.
HEAD_ROOM: Final = 0.2
# `edge-llm verify` keeps logits to compare, which are in no sum: with the default model its sum is 790 MiB and it was
# seen to take 820.
VERIFY_HEAD_ROOM: Final = 0.5
STEP_BYTES: Final = 256 * MIB
# What `edge-llm verify` loads, whatever the worker will (commands/verify.py).
VERIFY_SLOTS: Final = 8
VERIFY_N_CTX: Final = 2048


@dataclass(frozen=True, slots=True)
class Board:
    """One machine. `role` None: chosen (roles.py). `reserve_bytes` None: what K3s and the system usually take."""

    name: str
    ram_bytes: int
    arch: Arch = "arm64"
    cpu: str = ""
    cores: int = 4
    role: WorkerRole | None = None
    is_server: bool = False
    reserve_bytes: int | None = None

    @property
    def room_bytes(self) -> int:
        """For pods of ours."""
        reserved = self.reserve_bytes
        if reserved is None:
            reserved = SERVER_BYTES if self.is_server else AGENT_BYTES
        return max(0, int(self.ram_bytes * SHOWN) - reserved)


@dataclass(frozen=True, slots=True)
class Settings:
    """Of all workers, as in edge_llm/config.py."""

    slots: int
    spare_slots: int
    spare_prompts: bool
    n_ctx: int
    chunk_tokens: int
    k_type: str
    v_type: str
    prefix_cache_bytes: int


SizesOf = Callable[[str, str, str], ModelSizes]
"""Of a machine (as `uname -m` says it), and the types of K and V."""


@dataclass(frozen=True, slots=True)
class Group:
    """All workers of one role: who, the sum, and the container's limit (and request: a board's memory is promised
    once). `verify`: the sum of `edge-llm verify`, which runs before the worker."""

    role: WorkerRole
    boards: tuple[Board, ...]
    sum: MemoryPlan
    verify: MemoryPlan

    @property
    def limit_bytes(self) -> int:
        return limit_of(self.sum)

    @property
    def verify_limit_bytes(self) -> int | None:
        """None: it does not fit where the worker does."""
        limit = limit_of(self.verify, VERIFY_HEAD_ROOM)
        return limit if limit <= self.smallest.room_bytes else None

    @property
    def smallest(self) -> Board:
        return min(self.boards, key=lambda board: board.room_bytes)


def limit_of(needs: MemoryPlan, head_room: float = HEAD_ROOM) -> int:
    """A container's memory limit for a process that needs so much."""
    own = needs.total_bytes - needs.parts["weights"]
    return math.ceil((needs.total_bytes + own * head_room) / STEP_BYTES) * STEP_BYTES


def sum_of(role: WorkerRole, machine: str, settings: Settings, sizes: SizesOf) -> MemoryPlan:
    """As a worker of this role adds it up, with what it keeps to help out in the other role."""
    slots = settings.spare_slots if role == "prefill" else settings.slots
    return plan_memory(
        sizes(machine, settings.k_type, settings.v_type),
        n_ctx=settings.n_ctx,
        slots=slots,
        serves_prompts=role != "decode" or settings.spare_prompts,
        rows=max(settings.chunk_tokens, slots),
        prefix_cache_bytes=settings.prefix_cache_bytes,
    )


def groups_of(boards: Iterable[Board], settings: Settings, sizes: SizesOf) -> tuple[Group, ...]:
    """Boards that have a role, by role."""
    members: dict[WorkerRole, list[Board]] = {role: [] for role in ROLES}
    for board in boards:
        assert board.role is not None
        members[board.role].append(board)
    verify = replace(settings, slots=VERIFY_SLOTS, n_ctx=VERIFY_N_CTX, prefix_cache_bytes=0)
    return tuple(
        Group(role, tuple(some), _largest(role, some, settings, sizes), _largest("mixed", some, verify, sizes))
        for role, some in members.items()
        if some
    )


def left_bytes(groups: Iterable[Group]) -> list[int]:
    """What each board has left beside its worker; less than nothing where it does not fit."""
    return [board.room_bytes - group.limit_bytes for group in groups for board in group.boards]


def shortage_bytes(groups: Iterable[Group], gateway_bytes: int) -> int:
    """How much memory is missing: to workers on their smallest boards, else to a gateway. 0: everything fits."""
    groups = tuple(groups)
    missing = sum(max(0, group.limit_bytes - group.smallest.room_bytes) for group in groups)
    return missing or max(0, gateway_bytes - max(left_bytes(groups)))


def _largest(role: WorkerRole, boards: Iterable[Board], settings: Settings, sizes: SizesOf) -> MemoryPlan:
    machines = sorted({MACHINES[board.arch] for board in boards})
    return max((sum_of(role, machine, settings, sizes) for machine in machines), key=lambda plan: plan.total_bytes)
