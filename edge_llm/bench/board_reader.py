"""One reading of this board and of some processes on it, with what changed since the reading before.

Owns turning counters into rates. Refuses to know when it is asked, and by whom; names are those of resources.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from edge_llm.machine import (
    anonymous_bytes,
    board_state,
    core_times,
    group_memory_bytes,
    memory_bytes,
    network_bytes,
    process_reading,
    pss_bytes,
    throttled_since_boot,
)
from edge_llm.power import PowerMeter

# Counting a process's pages holds its memory map: never for more than this share of the time.
_PSS_SHARE: Final = 0.005


class Rates:
    """Per second, of counters that only grow; None at first, and when one began again."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, float]] = {}

    def of(self, name: str, value: float | None, now_s: float) -> float | None:
        last = self._last.pop(name, None)
        if value is None:
            return None
        self._last[name] = now_s, value
        if last is None or now_s <= last[0] or value < last[1]:
            return None
        return (value - last[1]) / (now_s - last[0])


def core_shares(rates: Rates, cores: Mapping[int, tuple[float, float]], now_s: float) -> dict[str, float | None]:
    """Of each core, and of all: seconds busy by seconds passed, both as the core counts them. Its own clock is the
    divisor: ours may have been read a little later."""
    row: dict[str, float | None] = {"cpu_share": None}
    busy, spent = 0.0, 0.0
    for core, (busy_s, all_s) in sorted(cores.items()):
        used = rates.of(f"core{core}", busy_s, now_s)
        passed = rates.of(f"core{core} clock", all_s, now_s)
        row[f"cpu{core}_share"] = None
        if used is not None and passed:
            row[f"cpu{core}_share"] = min(1.0, used / passed)
            busy, spent = busy + used, spent + passed
    if spent:
        row["cpu_share"] = min(1.0, busy / spent)
    return row


class BoardReader:
    """This board, or files under `root`."""

    def __init__(self, processes: Mapping[str, int], root: Path = Path("/"), power: PowerMeter | None = None) -> None:
        self._processes, self._root = dict(processes), root
        self._power = power or PowerMeter(root)
        self._rates = Rates()
        self._began: dict[str, str] = {}
        self._pss_due_s: dict[str, float] = {}
        self._throttled_before = throttled_since_boot(root)

    def read(self, now_s: float) -> dict[str, float | None]:
        """`now_s`: monotonic."""
        times = core_times(self._root)
        row = core_shares(self._rates, {core: (one.busy_s, one.all_s) for core, one in times.items()}, now_s)
        all_bytes, used_bytes = memory_bytes(self._root) or (None, None)
        row["ram_share"] = used_bytes / all_bytes if used_bytes is not None and all_bytes else None
        row["ram_used_bytes"] = used_bytes
        row["group_bytes"], row["group_peak_bytes"] = group_memory_bytes(self._root)
        row |= self._network(now_s)
        state = board_state(self._root)
        row["temperature_c"], row["frequency_hz"] = state.temperature_c, state.frequency_hz
        row |= {f"throttled/{kind}": float(is_so) for kind, is_so in state.throttled.items()}
        row["power_w"] = self._power.watts(now_s)
        for name, pid in self._processes.items():
            row |= {f"{name}/{what}": value for what, value in self._process(name, pid, now_s).items()}
        return row

    def facts(self) -> dict[str, str]:
        """What held the board back at any time since its start, before this run and after it; where watts are from."""
        facts = {}
        if self._power.source:
            facts["power_source"] = f"{self._power.source}: {', '.join(self._power.rails)}"
        if self._throttled_before:
            facts["throttled_since_boot_before"] = _kinds(self._throttled_before)
            facts["throttled_since_boot_after"] = _kinds(throttled_since_boot(self._root))
        return facts

    def _network(self, now_s: float) -> dict[str, float | None]:
        found = network_bytes(self._root)
        counted = (found.received, found.sent, found.loopback) if found else (None, None, None)
        names = ("net_in_bytes_per_s", "net_out_bytes_per_s", "loopback_bytes_per_s")
        return {name: self._rates.of(name, value, now_s) for name, value in zip(names, counted, strict=True)}

    def _process(self, name: str, pid: int, now_s: float) -> dict[str, float | None]:
        """One that has ended has nothing more, also when somebody else was given its id."""
        reading = process_reading(pid, self._root)
        if reading is None or self._began.setdefault(name, reading.began) != reading.began:
            return {"cpu_cores": None, "rss_bytes": None, "pss_bytes": None, "anonymous_bytes": None}
        return {
            "cpu_cores": self._rates.of(name, reading.cpu_s, now_s),
            "rss_bytes": reading.rss_bytes,
            "pss_bytes": self._pss_bytes(name, pid, now_s),
            "anonymous_bytes": anonymous_bytes(pid, self._root),
        }

    def _pss_bytes(self, name: str, pid: int, now_s: float) -> int | None:
        """As often as it may be, by how long it took."""
        if now_s < self._pss_due_s.get(name, now_s):
            return None
        before_s = time.thread_time()
        found = pss_bytes(pid, self._root)
        self._pss_due_s[name] = now_s + (time.thread_time() - before_s) / _PSS_SHARE - 0.1
        return found


def _kinds(bits: Mapping[str, bool]) -> str:
    return ", ".join(kind for kind, is_so in bits.items() if is_so) or "nothing"
