"""Which board does what: the roles of boards that were given none, what is preferred first.

Pure. Refuses to know sums: whoever asks takes the first of these ways that fits (fit.py).

Rules. Boards with more memory decode, because KV of all slots lies there; a board that runs the control plane reads
prompts if there is a choice (its database writes while streams would wait). A board that has a worker already goes on
with what it does: another role means another worker (changes.py). A model whose state cannot be cut by position runs on
mixed workers only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Final

from edge_llm.config import WorkerRole
from edge_llm.errors import ConfigError
from edge_llm.plan.boards import Board

Boards = tuple[Board, ...]

# One board in so many reads prompts; more of them are for long prompts and short answers.
BOARDS_PER_READER: Final = 4
# For so many boards every way is tried. Of more only those in which the smallest read: what could fit and is not found
# then needs a large board that reads beside small ones that decode.
_ALL_WAYS_BOARDS: Final = 8
_NUMBERS_TRIED: Final = 32


def placements(
    boards: Sequence[Board], *, splits: bool, earlier: Mapping[str, WorkerRole] | None = None
) -> Iterator[Boards]:
    """The same boards, each with a role, in every way that keeps what was given; of those that were given none, those
    in `earlier` keep theirs. Raises ConfigError, before the first, where nobody would decode or read."""
    if not splits:
        return iter((_all_mixed(boards),))
    boards = kept(boards, earlier or {})
    roles = {board.role for board in boards}
    if None not in roles and not roles & {"decode", "mixed"}:
        raise ConfigError("nobody would decode: give at least one board role decode, mixed or auto")
    if None not in roles and not roles & {"prefill", "mixed"}:
        raise ConfigError("nobody would read prompts for others: give a board role prefill or mixed")
    if len(boards) == 1:
        return iter((tuple(replace(board, role=board.role or "mixed") for board in boards),))
    return (_placed(boards, readers) for readers in _readers(boards))


def kept(boards: Sequence[Board], earlier: Mapping[str, WorkerRole]) -> Sequence[Board]:
    """What boards do already is given, unless something would be done by nobody then and no board is left to choose
    for."""
    same = tuple(
        replace(board, role=earlier[board.name]) if board.role is None and board.name in earlier else board
        for board in boards
    )
    roles = {board.role for board in same}
    is_whole = None in roles or bool(roles & {"decode", "mixed"} and roles & {"prefill", "mixed"})
    return same if is_whole else boards


def _all_mixed(boards: Iterable[Board]) -> Boards:
    foreign = [board.name for board in boards if board.role in ("prefill", "decode")]
    if foreign:
        raise ConfigError(
            "this model's state cannot be cut by position, so every request runs whole on one worker: give "
            f"{', '.join(foreign)} role mixed"
        )
    return tuple(replace(board, role="mixed") for board in boards)


def _placed(boards: Iterable[Board], readers: Iterable[Board]) -> Boards:
    names = {board.name for board in readers}
    return tuple(
        board if board.role else replace(board, role="prefill" if board.name in names else "decode") for board in boards
    )


def _readers(boards: Sequence[Board]) -> Iterator[Sequence[Board]]:
    """Those of the boards without a role that read prompts: as many as there should be, then other numbers; of each
    number first those that should, then the smallest, then whoever else could."""
    free = [board for board in boards if board.role is None]
    by_choice = sorted(free, key=lambda board: (not board.is_server, board.ram_bytes, board.name))
    by_room = sorted(free, key=lambda board: (board.room_bytes, board.name))
    for number in _numbers(boards, len(free)):
        yield by_choice[:number]
        yield by_room[:number]
        if len(free) <= _ALL_WAYS_BOARDS:
            yield from combinations(by_room, number)


def _numbers(boards: Sequence[Board], free: int) -> Sequence[int]:
    """How many of the boards without a role may read prompts, the best number first."""
    given = [board.role for board in boards if board.role]
    most = free if {"decode", "mixed"} & set(given) else free - 1
    least = 0 if {"prefill", "mixed"} & set(given) or not free else 1
    wanted = 0 if "mixed" in given else round(len(boards) / BOARDS_PER_READER) - given.count("prefill")
    best = min(max(wanted, least), most)
    step = max(1, free // _NUMBERS_TRIED)
    more, fewer = {*range(best + 1, most + 1, step), most} - {best}, {*range(least, best, step)}
    return [best, *sorted(more), *sorted(fewer, reverse=True)]
