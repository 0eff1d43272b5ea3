"""What share of the machine's CPU a run took, by group of processes: whether sleeping workers were late for want of it.

Owns two readings and their difference. Refuses to know what the processes do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edge_llm.bench.layout import LocalProcess
from edge_llm.machine import process_usage, usable_cores


@dataclass(frozen=True, slots=True)
class CpuReading:
    """CPU seconds used so far: by group, and in it by process. `at_s` monotonic."""

    at_s: float
    used_s: Mapping[str, Mapping[int, float]]


def read_cpu(processes: Sequence[LocalProcess]) -> CpuReading:
    """The gateways, all workers together, and this process, which is the client. Who is gone is left out."""
    used: dict[str, dict[int, float]] = {"gateway": {}, "workers": {}, "client": {os.getpid(): time.process_time()}}
    for process in processes:
        usage = process_usage(process.pid)
        if usage is not None:
            used["gateway" if process.name == "gateway" else "workers"][process.pid] = usage.cpu_s
    return CpuReading(time.monotonic(), used)


def cpu_shares(before: CpuReading, after: CpuReading) -> dict[str, float]:
    """Of all cores that may be used, in 0..1: each group, and `all`. Counts who lived through both readings."""
    available_s = max(1e-9, (after.at_s - before.at_s) * usable_cores())
    shares = {
        group: round(
            sum(max(0.0, after.used_s[group].get(pid, used) - used) for pid, used in known.items()) / available_s, 3
        )
        for group, known in before.used_s.items()
    }
    return {**shares, "all": round(sum(shares.values()), 3)}
