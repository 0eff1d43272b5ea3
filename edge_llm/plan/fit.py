"""Which board does what, and whether its memory is enough: boards and a model in, roles and limits out.

Pure. Owns the roles of boards that were given none, what of a board is left for a worker, a container's limit, and what
would fit instead. The sum itself is the worker's own (catalogue/memory.py): what fits here is what starts there.
Refuses to know files, YAML and Kubernetes objects.

Rules. All workers of a role are one workload with one limit, so it must fit the smallest board of the role; of two
kinds of machine the larger sum counts (other weights are repacked). A board has one worker. Boards with more memory
decode, because KV of all slots lies there; a board that runs the control plane reads prompts if there is a choice (its
database writes while streams would wait). A board that has a worker already goes on with what it does: another role
means another worker (changes.py). A model whose state cannot be cut by position runs on mixed workers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from edge_llm.catalogue.memory import MemoryPlan, ModelSizes, plan_memory
from edge_llm.config import WorkerRole
from edge_llm.errors import ConfigError

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
# One board in so many reads prompts; more of them are for long prompts and short answers.
BOARDS_PER_READER: Final = 4
_N_CTX_STEP: Final = 256
_LEAST_N_CTX: Final = 512
_SMALL_CACHE_BYTES: Final = 64 * MIB


@dataclass(frozen=True, slots=True)
class Board:
    """One machine. `role` None: chosen here. `reserve_bytes` None: what K3s and the system usually take."""

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


@dataclass(frozen=True, slots=True)
class Fitted:
    """A cluster that fits. `notes`: what is worth knowing, for people. `gateways`: how many have room beside the
    workers."""

    groups: tuple[Group, ...]
    notes: tuple[str, ...]
    gateways: int

    def group(self, role: WorkerRole) -> Group | None:
        return next((group for group in self.groups if group.role == role), None)


def limit_of(needs: MemoryPlan, head_room: float = HEAD_ROOM) -> int:
    """A container's memory limit for a process that needs so much."""
    own = needs.total_bytes - needs.parts["weights"]
    return math.ceil((needs.total_bytes + own * head_room) / STEP_BYTES) * STEP_BYTES


def fitted(
    boards: Sequence[Board],
    settings: Settings,
    sizes: SizesOf,
    *,
    splits: bool,
    gateway_bytes: int,
    earlier: Mapping[str, WorkerRole] | None = None,
) -> Fitted:
    """Roles, sums and limits. `splits`: whether the model's KV can travel. `gateway_bytes`: what the gateway's pod asks
    for. `earlier`: roles of boards that are there already. Raises ConfigError that has the sum and what would fit."""
    placed = with_roles(boards, splits=splits, earlier=earlier)
    groups = _groups(placed, settings, sizes)
    for group in groups:
        if group.limit_bytes > group.smallest.room_bytes:
            refusal = _refusal(group, groups, settings, sizes)
            raise ConfigError(refusal + _stays(group, boards, earlier or {}) if splits else refusal)
    room = [board.room_bytes - group.limit_bytes for group in groups for board in group.boards]
    if max(room) < gateway_bytes:
        raise ConfigError(
            f"the workers fit, the gateway does not: it asks for {_mib(gateway_bytes)}, and the most that any board "
            f"has left is {_mib(max(room))}. Give a board a smaller role (prefill needs least), fewer slots or a "
            "smaller n_ctx, or add a board"
        )
    gateways = sum(left // gateway_bytes for left in room if left > 0)
    return Fitted(groups, (*_unverified(groups), *_notes(placed, settings, gateways, gateway_bytes)), gateways)


# -- roles


def with_roles(
    boards: Sequence[Board], *, splits: bool, earlier: Mapping[str, WorkerRole] | None = None
) -> tuple[Board, ...]:
    """The same boards, each with a role; of those that were given none, those in `earlier` keep theirs. Raises
    ConfigError where nobody would decode."""
    if not splits:
        foreign = [board.name for board in boards if board.role in ("prefill", "decode")]
        if foreign:
            raise ConfigError(
                f"this model's state cannot be cut by position, so every request runs whole on one worker: give "
                f"{', '.join(foreign)} role mixed"
            )
        return tuple(replace(board, role="mixed") for board in boards)
    boards = _as_before(boards, earlier or {})
    readers = _readers(boards)
    placed = tuple(board if board.role else replace(board, role=_role(board, boards, readers)) for board in boards)
    if not any(board.role in ("decode", "mixed") for board in placed):
        raise ConfigError("nobody would decode: give at least one board role decode, mixed or auto")
    if not any(board.role in ("prefill", "mixed") for board in placed):
        raise ConfigError("nobody would read prompts for others: give a board role prefill or mixed")
    return placed


def _as_before(boards: Sequence[Board], earlier: Mapping[str, WorkerRole]) -> Sequence[Board]:
    """What boards do already is given, unless something would be done by nobody then and no board is left to choose
    for."""
    before = _chosen_before(boards, earlier)
    kept = tuple(replace(board, role=earlier[board.name]) if board.name in before else board for board in boards)
    roles = {board.role for board in kept}
    is_whole = None in roles or bool(roles & {"decode", "mixed"} and roles & {"prefill", "mixed"})
    return kept if is_whole else boards


def _chosen_before(boards: Iterable[Board], earlier: Mapping[str, WorkerRole]) -> frozenset[str]:
    return frozenset(board.name for board in boards if board.role is None and board.name in earlier)


def _stays(group: Group, boards: Iterable[Board], earlier: Mapping[str, WorkerRole]) -> str:
    """That another role is a matter of saying so, where the board that is too small has its role from before."""
    name = group.smallest.name
    if name not in _chosen_before(boards, earlier) or earlier[name] != group.role:
        return ""
    return f"\n{name} keeps the role that it was rendered with before; `role:` in the description gives it another."


def _role(board: Board, boards: Sequence[Board], readers: frozenset[str]) -> WorkerRole:
    if len(boards) == 1:
        return "mixed"
    return "prefill" if board.name in readers else "decode"


def _readers(boards: Sequence[Board]) -> frozenset[str]:
    """Those of the boards without a role that shall read prompts."""
    free = [board for board in boards if board.role is None]
    given = [board.role for board in boards if board.role]
    wanted = 0 if "mixed" in given else max(1, round(len(boards) / BOARDS_PER_READER)) - given.count("prefill")
    if not {"decode", "mixed"} & set(given):
        wanted = min(wanted, len(free) - 1)
    order = sorted(free, key=lambda board: (not board.is_server, board.ram_bytes, board.name))
    return frozenset(board.name for board in order[: max(0, wanted)])


# -- sums


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


def _groups(boards: Iterable[Board], settings: Settings, sizes: SizesOf) -> tuple[Group, ...]:
    members = {role: tuple(board for board in boards if board.role == role) for role in ROLES}
    verify = replace(settings, slots=VERIFY_SLOTS, n_ctx=VERIFY_N_CTX, prefix_cache_bytes=0)
    return tuple(
        Group(role, some, _largest(role, some, settings, sizes), _largest("mixed", some, verify, sizes))
        for role, some in members.items()
        if some
    )


def _largest(role: WorkerRole, boards: Iterable[Board], settings: Settings, sizes: SizesOf) -> MemoryPlan:
    machines = sorted({MACHINES[board.arch] for board in boards})
    return max((sum_of(role, machine, settings, sizes) for machine in machines), key=lambda plan: plan.total_bytes)


# -- what would fit instead


def _refusal(group: Group, groups: Sequence[Group], settings: Settings, sizes: SizesOf) -> str:
    board = group.smallest
    head_room = group.limit_bytes - group.sum.total_bytes
    return "\n".join(
        [
            f"role {group.role} does not fit on {board.name}: its pod needs {_mib(group.limit_bytes)} (the sum and "
            f"{_mib(head_room)} of head room), the board has {_mib(board.room_bytes)} of "
            f"{_mib(board.ram_bytes)} for it.",
            group.sum.table(),
            "What would fit on all boards:",
            *(f"  - {line}" for line in alternatives(groups, settings, sizes) or [_nothing(group)]),
        ]
    )


def alternatives(groups: Sequence[Group], settings: Settings, sizes: SizesOf) -> list[str]:
    """Changes of one setting (of several, where fewer slots alone are not enough) with which every group fits, for
    people."""

    def fits(changed: Settings) -> bool:
        return all(
            limit_of(_largest(group.role, group.boards, changed, sizes)) <= group.smallest.room_bytes
            for group in groups
        )

    small_cache = min(settings.prefix_cache_bytes, _SMALL_CACHE_BYTES)
    tries: list[tuple[str, Settings | None]] = [
        (
            f"prefix_cache: {small_cache // MIB}MiB",
            replace(settings, prefix_cache_bytes=small_cache) if small_cache < settings.prefix_cache_bytes else None,
        ),
        ("spare_slots: 0", replace(settings, spare_slots=0) if settings.spare_slots else None),
        ("spare_prompts: false", replace(settings, spare_prompts=False) if settings.spare_prompts else None),
        ("k_type: q8_0", replace(settings, k_type="q8_0") if settings.k_type in ("f16", "bf16", "f32") else None),
    ]
    found = [words for words, changed in tries if changed is not None and fits(changed)]
    if (slots := _most_slots(settings, fits)) is not None:
        found.append(f"slots: {slots}")
    if (n_ctx := _most_n_ctx(settings, fits)) is not None:
        found.append(f"n_ctx: {n_ctx}")
    if not any(line.startswith("slots") for line in found):
        for slots in (4, 2, 1):
            fewer = replace(settings, slots=min(slots, settings.slots), prefix_cache_bytes=small_cache)
            fewer = replace(fewer, spare_slots=min(1, settings.spare_slots))
            if (n_ctx := settings.n_ctx if fits(fewer) else _most_n_ctx(fewer, fits)) is not None:
                cache, spare = small_cache // MIB, fewer.spare_slots
                found.append(f"slots: {fewer.slots}, spare_slots: {spare}, n_ctx: {n_ctx}, prefix_cache: {cache}MiB")
    most = min(map(_most_weights, groups))
    if most > 0:
        now = _mib(groups[0].sum.parts["weights"])
        found.append(f"a smaller quantization or model: weights of {_mib(most)} at most (these take {now})")
    return found


def _most_slots(settings: Settings, fits: Callable[[Settings], bool]) -> int | None:
    return next((n for n in range(settings.slots - 1, 0, -1) if fits(replace(settings, slots=n))), None)


def _most_n_ctx(settings: Settings, fits: Callable[[Settings], bool]) -> int | None:
    most = (settings.n_ctx - 1) // _N_CTX_STEP * _N_CTX_STEP
    return next((n for n in range(most, _LEAST_N_CTX - 1, -_N_CTX_STEP) if fits(replace(settings, n_ctx=n))), None)


def _most_weights(group: Group) -> int:
    """How heavy the weights may be with everything else as it is, and as much of them copied."""
    weights, copied = group.sum.parts["weights"], group.sum.parts["repacked weights"]
    rest = (group.sum.total_bytes - weights - copied) * (1 + HEAD_ROOM)
    room = group.smallest.room_bytes // STEP_BYTES * STEP_BYTES
    return int((room - rest) / (1 + (1 + HEAD_ROOM) * copied / weights)) if weights else 0


def _nothing(group: Group) -> str:
    weights = group.sum.parts["weights"] + group.sum.parts["repacked weights"]
    return f"nothing with these settings (the weights alone take {_mib(weights)}): use a board with more memory"


# -- what is worth knowing


def _unverified(groups: Iterable[Group]) -> Iterable[str]:
    for group in groups:
        if group.verify_limit_bytes is None:
            needed = _mib(limit_of(group.verify, VERIFY_HEAD_ROOM))
            yield (
                f"role {group.role}: `edge-llm verify` ({VERIFY_SLOTS} sequences of {VERIFY_N_CTX} tokens) needs "
                f"{needed} and does not fit on {group.smallest.name}: it is left out, and these workers' level is "
                "unverified"
            )


def _notes(boards: Sequence[Board], settings: Settings, gateways: int, gateway_bytes: int) -> Iterable[str]:
    kinds = sorted({(board.arch, board.cpu) for board in boards})
    if len(kinds) > 1:
        words = ", ".join(" ".join(filter(None, kind)) for kind in kinds)
        yield (
            f"boards of {len(kinds)} kinds ({words}) are of different exactness classes: KV goes between them only "
            "where that is faster, and such answers have level none"
        )
    # an update starts the new gateway before it stops the old one
    if gateways < 2:
        yield (
            f"there is room for one gateway only ({_mib(gateway_bytes)}): an update of it waits until a board has room "
            "for a second one; free memory, or let it be replaced (strategy Recreate)"
        )
    few = sorted(board.name for board in boards if board.cores < 2)
    if few:
        yield (
            f"{', '.join(few)}: a worker asks for a whole core, so with one core its pod may find no place beside the "
            "system's, and everything waits for everything"
        )
    if settings.spare_slots and settings.spare_slots < settings.slots and any(b.role == "prefill" for b in boards):
        yield (
            f"a prefill worker has {settings.spare_slots} slots for the time that it decodes (`cluster role`, or when "
            f"the others are full); spare_slots: {settings.slots} gives it all, and counts"
        )


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB"
