"""Whether a described cluster fits: boards and a model in, roles and limits out, or the sum that does not.

Pure. Owns the choice among ways to share out roles (roles.py has them, what is preferred first), the refusal, and what
is worth knowing. What a worker takes is boards.py's, what would fit instead alternatives.py's. Refuses to know files,
YAML and Kubernetes objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from edge_llm.config import WorkerRole
from edge_llm.errors import ConfigError
from edge_llm.plan.alternatives import Wanted, alternatives
from edge_llm.plan.boards import (
    MIB,
    VERIFY_HEAD_ROOM,
    VERIFY_N_CTX,
    VERIFY_SLOTS,
    Board,
    Group,
    Settings,
    SizesOf,
    left_bytes,
    limit_of,
)
from edge_llm.plan.processors import nearest
from edge_llm.words import counted

# An update starts the new gateway before it stops the old one.
_GATEWAYS_IN_AN_UPDATE: Final = 2


@dataclass(frozen=True, slots=True)
class Fitted:
    """A cluster that fits. `notes`: what is worth knowing, for people. `gateways`: how many have room beside the
    workers."""

    groups: tuple[Group, ...]
    notes: tuple[str, ...]
    gateways: int

    def group(self, role: WorkerRole) -> Group | None:
        return next((group for group in self.groups if group.role == role), None)


def fitted(
    boards: Sequence[Board],
    settings: Settings,
    sizes: SizesOf,
    *,
    splits: bool,
    gateway_bytes: int,
    earlier: Mapping[str, WorkerRole] | None = None,
) -> Fitted:
    """Roles, sums and limits: the first way to share out roles that fits. `splits`: whether the model's KV can travel.
    `gateway_bytes`: what the gateway's pod asks for. `earlier`: roles of boards that are there already. Raises
    ConfigError that has the sum and what would fit."""
    wanted = Wanted(boards, settings, cache(sizes), splits, gateway_bytes, earlier or {})
    placed = min(wanted.placements(), key=wanted.shortage_bytes)
    groups = wanted.groups(placed)
    if wanted.shortage_bytes(placed):
        raise ConfigError(_refusal(wanted, groups))
    gateways = sum(left // gateway_bytes for left in left_bytes(groups))
    return Fitted(groups, (*_unverified(groups), *_notes(placed, settings, gateways, gateway_bytes)), gateways)


# -- what does not fit


def _refusal(wanted: Wanted, groups: Sequence[Group]) -> str:
    small = next((group for group in groups if group.limit_bytes > group.smallest.room_bytes), None)
    lines = [_no_gateway(groups, wanted.gateway_bytes)] if small is None else _too_small(small)
    instead = alternatives(wanted, groups)
    lines += ["What would fit:", *(f"  - {line}" for line in instead or [_nothing(groups)])]
    if small is not None and _stays(small, wanted):
        lines.append(
            f"{small.smallest.name} keeps the role that it was rendered with before; `role:` in the description gives "
            "it another."
        )
    return "\n".join(lines)


def _too_small(group: Group) -> list[str]:
    board = group.smallest
    head_room = group.limit_bytes - group.sum.total_bytes
    return [
        f"role {group.role} does not fit on {board.name}: its pod needs {_mib(group.limit_bytes)} (the sum and "
        f"{_mib(head_room)} of head room), the board has {_mib(board.room_bytes)} of {_mib(board.ram_bytes)} for it.",
        group.sum.table(),
    ]


def _no_gateway(groups: Iterable[Group], gateway_bytes: int) -> str:
    return (
        f"the workers fit, the gateway does not: it asks for {_mib(gateway_bytes)}, and the most that any board has "
        f"left is {_mib(max(left_bytes(groups)))}. One board more would do."
    )


def _nothing(groups: Sequence[Group]) -> str:
    weights = max(group.sum.parts["weights"] + group.sum.parts["repacked weights"] for group in groups)
    return f"nothing with these settings (the weights alone take {_mib(weights)}): use a board with more memory"


def _stays(group: Group, wanted: Wanted) -> bool:
    """Whether the board that is too small has its role from before: another is a matter of saying so."""
    given = next(board.role for board in wanted.boards if board.name == group.smallest.name)
    return wanted.splits and given is None and wanted.earlier.get(group.smallest.name) == group.role


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
    if gateways < _GATEWAYS_IN_AN_UPDATE:
        yield (
            f"there is room for one gateway only ({_mib(gateway_bytes)}): an update of it waits until a board has room "
            "for a second one; free memory, or let it be replaced (strategy Recreate)"
        )
    yield from _unknown_processors(boards)
    few = sorted(board.name for board in boards if board.cores < 2)
    if few:
        yield (
            f"{', '.join(few)}: a worker asks for a whole core, so with one core its pod may find no place beside the "
            "system's, and everything waits for everything"
        )
    if settings.spare_slots and settings.spare_slots < settings.slots and any(b.role == "prefill" for b in boards):
        yield (
            f"a prefill worker has {counted(settings.spare_slots, 'slot')} for the time that it decodes (`cluster "
            f"role`, or when the others are full); spare_slots: {settings.slots} gives it all, and counts"
        )


def _unknown_processors(boards: Sequence[Board]) -> Iterable[str]:
    """On ARM alone something hangs on it."""
    for word in sorted({board.cpu for board in boards if board.arch == "arm64"}):
        if (meant := nearest(word)) is not None:
            names = ", ".join(board.name for board in boards if board.cpu == word)
            yield (
                f"{names}: cpu {word} is not known{f', did you mean {meant}?' if meant else ''} Nothing is set for it, "
                "and whether the image runs there (ARMv8.2 with dotprod and fp16) is not known"
            )


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB"
