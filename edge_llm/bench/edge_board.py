"""A board of the Edge paper's table: what a watch saw of it during the requests of one placement. Pure.

Owns which series a column comes of, and what memory the workers map. Refuses to know rows and what is claimed of them.
What could not be read is None.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from edge_llm.bench.record import Process
from edge_llm.bench.resources import SeriesSummary, Watched

GATEWAY: Final = "gateway"
_CORE: Final = re.compile(r"cpu\d+_share")


class WorkerUse(msgspec.Struct, frozen=True):
    """One process: its share of all cores of its board, and its memory at its most; `idle_rss_bytes`: when ready."""

    cpu_share: float | None = None
    peak_rss_bytes: int | None = None
    idle_rss_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Board:
    """A board during the requests; shares of all cores and of all memory. `workers`: by name. `mapped_share`: what they
    have in memory of mapped files. `kind`: what another node says that it is. `cpu_samples`: how many readings
    `cpu_share` is the mean of. None: not read."""

    node: str
    cpu_share: float | None = None
    above_idle_cpu_share: float | None = None
    ram_share: float | None = None
    above_idle_ram_share: float | None = None
    temperature_c: float | None = None
    throttled: tuple[str, ...] | None = None
    power_w: float | None = None
    above_idle_power_w: float | None = None
    workers: Mapping[str, WorkerUse] = field(default_factory=dict)
    mapped_share: float | None = None
    above_idle_mapped_share: float | None = None
    kind: str | None = None
    cpu_samples: int | None = None


def board_of(
    watched: Watched,
    processes: Mapping[str, Process] | None = None,
    at_rest: Mapping[str, SeriesSummary] | None = None,
) -> Board:
    """`processes`: the placement's, where they run on this board; else the node has one worker, and `at_rest` is what
    it was before the first request."""
    found = watched.summaries
    cores = sum(1 for name in found if _CORE.fullmatch(name))
    if processes is None:
        peak, (idle_rss, idle_mapped) = found.get("worker/rss_bytes", _UNREAD).maximum, _idle_bytes(at_rest or {})
        workers = {watched.node: WorkerUse(_of_cores(found, "worker", cores), _whole(peak), _whole(idle_rss))}
        mapped = _mapped_share(watched, ("worker",))
        above_idle_mapped = _less(mapped, _of_memory(watched, idle_mapped))
    else:
        workers = {
            name: WorkerUse(_of_cores(found, name, cores), one.rss_peak_bytes, one.rss_before_bytes)
            for name, one in processes.items()
        }
        # at rest none of them was there
        mapped = above_idle_mapped = _mapped_share(watched, [name for name in processes if name != GATEWAY])
    cpu, ram, power = (found.get(name, _UNREAD) for name in ("cpu_share", "ram_share", "power_w"))
    return Board(
        node=watched.node,
        cpu_share=cpu.mean,
        above_idle_cpu_share=cpu.above_idle,
        cpu_samples=cpu.n,
        ram_share=ram.maximum,
        above_idle_ram_share=_less(ram.maximum, ram.idle),
        temperature_c=found.get("temperature_c", _UNREAD).maximum,
        throttled=_throttled(watched),
        power_w=power.mean,
        above_idle_power_w=power.above_idle,
        workers=workers,
        mapped_share=mapped,
        above_idle_mapped_share=above_idle_mapped,
        kind=watched.facts.get("board") or watched.facts.get("cpu"),
    )


_UNREAD: Final = SeriesSummary(0, 0)


def _throttled(watched: Watched) -> tuple[str, ...] | None:
    """What was seen, and what the board remembers of the time between two samples: bits that stay, newly set."""
    name = "throttled/"
    seen = {key.removeprefix(name): one for key, one in watched.summaries.items() if key.startswith(name) and one.n}
    kinds = [kind for kind, one in seen.items() if one.maximum]
    before, after = (watched.facts.get(f"throttled_since_boot_{when}") for when in ("before", "after"))
    if before is None or after is None:
        return tuple(kinds) if seen else None
    known = {*before.split(", "), "nothing"}
    return tuple(dict.fromkeys([*kinds, *(kind for kind in after.split(", ") if kind not in known)]))


def _mapped_share(watched: Watched, names: Sequence[str]) -> float | None:
    """At its most, of all memory: file pages that these processes map. The kernel counts them as available."""
    parts = [_most_apart(watched, f"{name}/pss_bytes", f"{name}/anonymous_bytes") for name in names]
    known = [one for one in parts if one is not None]
    if len(known) == len(parts):
        return _of_memory(watched, sum(known) if known else None)
    # Without PSS: workers of one board map the same file, so the largest has what all have together.
    parts = [_most_apart(watched, f"{name}/rss_bytes", f"{name}/anonymous_bytes") for name in names]
    known = [one for one in parts if one is not None]
    return _of_memory(watched, max(known) if len(known) == len(parts) else None)


def _most_apart(watched: Watched, name: str, other: str) -> float | None:
    """The most that the first series is above the other one at any time."""
    pairs = zip(watched.series.get(name, ()), watched.series.get(other, ()), strict=False)
    return max((max(0.0, one - two) for one, two in pairs if one is not None and two is not None), default=None)


def _of_memory(watched: Watched, size: float | None) -> float | None:
    used, ram_share = (watched.summaries.get(name, _UNREAD).maximum for name in ("ram_used_bytes", "ram_share"))
    return size * ram_share / used if size is not None and used and ram_share else None


def _idle_bytes(at_rest: Mapping[str, SeriesSummary]) -> tuple[float | None, float | None]:
    """Of the one worker of a node: resident, and mapped."""
    rss, anonymous = (at_rest.get(f"worker/{name}_bytes", _UNREAD).idle for name in ("rss", "anonymous"))
    return rss, _less(rss, anonymous)


def _of_cores(found: Mapping[str, SeriesSummary], name: str, cores: int) -> float | None:
    busy = found.get(f"{name}/cpu_cores", _UNREAD).mean
    return busy / cores if busy is not None and cores else None


def _less(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else value - base


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
