"""What would fit instead: other roles, a board less, and changes of settings, for people.

Pure. Whatever is said here is rendered when it is written into the description: it is tried as fit.py tries, gateway
and all. Refuses to say what does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from edge_llm.catalogue.memory import ModelSizes
from edge_llm.config import WorkerRole
from edge_llm.errors import ConfigError
from edge_llm.plan.boards import MIB, ROLES, Board, Group, Settings, SizesOf, groups_of, shortage_bytes
from edge_llm.plan.roles import Boards, kept, placements
from edge_llm.words import counted

N_CTX_STEP: Final = 256
LEAST_N_CTX: Final = 512
_SMALL_CACHE_BYTES: Final = 64 * MIB


@dataclass(frozen=True, slots=True)
class Wanted:
    """A cluster that is to be fitted. `splits`: whether the model's KV can travel. `gateway_bytes`: what the gateway's
    pod asks for. `earlier`: roles of boards that are there already."""

    boards: Sequence[Board]
    settings: Settings
    sizes: SizesOf
    splits: bool
    gateway_bytes: int
    earlier: Mapping[str, WorkerRole]

    def placements(self) -> Iterable[Boards]:
        return placements(self.boards, splits=self.splits, earlier=self.earlier)

    def groups(self, placed: Boards) -> tuple[Group, ...]:
        return groups_of(placed, self.settings, self.sizes)

    def shortage_bytes(self, placed: Boards) -> int:
        return shortage_bytes(self.groups(placed), self.gateway_bytes)

    def fits(self) -> bool:
        """In one way at least."""
        try:
            return any(not self.shortage_bytes(placed) for placed in self.placements())
        except ConfigError:
            return False


def alternatives(wanted: Wanted, groups: Iterable[Group]) -> list[str]:
    """`groups`: what was tried and does not fit."""
    found = [*_other_roles(wanted), *_without(wanted, groups), *_settings(wanted)]
    if (weights := _most_weights_mib(wanted)) is not None:
        now = max(group.sum.parts["weights"] for group in groups) / MIB
        found.append(f"a smaller quantization or model: weights of {weights:,} MiB at most (these take {now:,.0f} MiB)")
    return found


def _other_roles(wanted: Wanted) -> Iterable[str]:
    """Where roles were given or kept and others fit: those that are nearest to what there is."""
    now = [board.role for board in kept(wanted.boards, wanted.earlier)]
    if not wanted.splits or not any(now):
        return
    free = replace(wanted, boards=[replace(board, role=None) for board in wanted.boards], earlier={})
    fitting = [placed for placed in free.placements() if not free.shortage_bytes(placed)]
    if fitting:
        nearest = min(
            fitting, key=lambda placed: sum(board.role != was for board, was in zip(placed, now, strict=True))
        )
        names = {role: ", ".join(board.name for board in nearest if board.role == role) for role in ROLES}
        yield "; ".join(f"role: {role} for {who}" for role, who in names.items() if who)


def _without(wanted: Wanted, groups: Iterable[Group]) -> Iterable[str]:
    """A cluster without the boards that are too small."""
    small = {board.name for group in groups for board in group.boards if board.room_bytes < group.limit_bytes}
    others = [board for board in wanted.boards if board.name not in small]
    if small and others and replace(wanted, boards=others).fits():
        yield f"leave out {', '.join(sorted(small))}: the other {counted(len(others), 'board')} will do"


def _settings(wanted: Wanted) -> Iterable[str]:
    """Changes of one setting, or of several where fewer slots alone are not enough."""
    settings = wanted.settings

    def fits(changed: Settings) -> bool:
        return replace(wanted, settings=changed).fits()

    cache = min(settings.prefix_cache_bytes, _SMALL_CACHE_BYTES) // MIB * MIB
    tries: list[tuple[str, Settings]] = [
        (f"prefix_cache: {cache // MIB}MiB", replace(settings, prefix_cache_bytes=cache)),
        ("spare_slots: 0", replace(settings, spare_slots=0)),
        ("spare_prompts: false", replace(settings, spare_prompts=False)),
    ]
    if settings.k_type in ("f16", "bf16", "f32"):
        tries.append(("k_type: q8_0", replace(settings, k_type="q8_0")))
    yield from (words for words, changed in tries if changed != settings and fits(changed))
    slots = _most(1, settings.slots - 1, lambda n: fits(replace(settings, slots=n)))
    if slots is not None:
        yield f"slots: {slots}"
    if (n_ctx := _most_n_ctx(settings, fits)) is not None:
        yield f"n_ctx: {n_ctx}"
    if slots is not None:
        return
    for slots in sorted({min(most, settings.slots) for most in (4, 2, 1)}, reverse=True):
        spare = min(1, settings.spare_slots)
        fewer = replace(settings, slots=slots, prefix_cache_bytes=cache, spare_slots=spare)
        if (n_ctx := settings.n_ctx if fits(fewer) else _most_n_ctx(fewer, fits)) is not None:
            yield f"slots: {slots}, spare_slots: {spare}, n_ctx: {n_ctx}, prefix_cache: {cache // MIB}MiB"


def _most_n_ctx(settings: Settings, fits: Callable[[Settings], bool]) -> int | None:
    least, most = LEAST_N_CTX // N_CTX_STEP, (settings.n_ctx - 1) // N_CTX_STEP
    steps = _most(least, most, lambda n: fits(replace(settings, n_ctx=n * N_CTX_STEP)))
    return None if steps is None else steps * N_CTX_STEP


def _most_weights_mib(wanted: Wanted) -> int | None:
    """How heavy the weights may be with everything else as it is, and as much of them copied."""

    def lighter(mib: int) -> SizesOf:
        def sizes(machine: str, k_type: str, v_type: str) -> ModelSizes:
            found = wanted.sizes(machine, k_type, v_type)
            copied = int(mib * MIB * found.repacked_bytes / found.weights_bytes) if found.weights_bytes else 0
            return replace(found, weights_bytes=mib * MIB, repacked_bytes=copied)

        return sizes

    machine_weights = max(group.sum.parts["weights"] for group in wanted.groups(next(iter(wanted.placements()))))
    return _most(1, machine_weights // MIB - 1, lambda mib: replace(wanted, sizes=lighter(mib)).fits())


def _most(least: int, most: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number that fits, where every smaller one does, too."""
    if most < least or not fits(least):
        return None
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least
