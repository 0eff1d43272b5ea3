"""This board: cores, memory, temperature, frequency, and what a process uses. The one door to psutil.

Owns reading /proc, /sys and cgroup files, under a root that is a parameter so that a Pi's files can be tested
anywhere. Refuses to know models and networks. Every reading that a board does not have is None, never invented.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

_UNLIMITED = 1 << 60
_TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = "glibc.malloc.hugetlb"
# Bits of the Raspberry Pi firmware's get_throttled that say what happens now; from bit 16 on: what happened since boot.
_THROTTLE_BITS = {"under_voltage": 0, "frequency_capped": 1, "throttled": 2, "soft_temperature_limit": 3}


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a record needs to know about a board. Bytes, MHz, degrees Celsius."""

    cpu: str
    machine: str
    cores: int
    usable_cores: tuple[int, ...]
    ram_bytes: int
    kernel: str
    board: str | None
    governor: str | None
    frequency_mhz: float | None
    temperature_c: float | None
    page_bytes: int
    load_1m: float


@dataclass(frozen=True, slots=True)
class BoardState:
    """What changes on a board while it works: degrees Celsius, Hz, and what holds it back now, by kind."""

    temperature_c: float | None
    frequency_hz: float | None
    throttled: Mapping[str, bool]


@dataclass(frozen=True, slots=True)
class ProcessUsage:
    """CPU seconds since the process began and resident bytes now."""

    cpu_s: float
    rss_bytes: int


def node_facts(root: Path = Path("/")) -> NodeFacts:
    """Read this board now."""
    cpu = root / "sys/devices/system/cpu/cpu0/cpufreq"
    frequency = _number(cpu / "scaling_cur_freq")
    temperature = _number(root / "sys/class/thermal/thermal_zone0/temp")
    return NodeFacts(
        cpu=_cpu_name(root),
        machine=platform.machine(),
        cores=psutil.cpu_count() or 1,
        usable_cores=tuple(sorted(os.sched_getaffinity(0))),
        ram_bytes=psutil.virtual_memory().total,
        kernel=platform.release(),
        board=_text(root / "proc/device-tree/model"),
        governor=_text(cpu / "scaling_governor"),
        frequency_mhz=None if frequency is None else frequency / 1000,
        temperature_c=None if temperature is None else temperature / 1000,
        page_bytes=os.sysconf("SC_PAGE_SIZE"),
        load_1m=os.getloadavg()[0],
    )


def board_state(root: Path = Path("/")) -> BoardState:
    """Read this board now; a few small files, cheap enough for every scrape."""
    frequency_khz = _number(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
    temperature = _number(root / "sys/class/thermal/thermal_zone0/temp")
    return BoardState(
        temperature_c=None if temperature is None else temperature / 1000,
        frequency_hz=None if frequency_khz is None else frequency_khz * 1000,
        throttled=_throttled(root),
    )


def cpu_share() -> float:
    """Busy share of all cores since this was asked the last time in this process, 0 to 1; 0 at the first time."""
    return psutil.cpu_percent() / 100


def ram_share() -> float:
    """Share of the memory that is not available to a new process, 0 to 1."""
    return psutil.virtual_memory().percent / 100


def _throttled(root: Path) -> dict[str, bool]:
    """By the firmware's bits where the kernel shows them, else the under-voltage alarm alone; empty: not known."""
    text = _text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    try:
        if text is not None:
            bits = int(text, 16)
            return {kind: bool(bits >> bit & 1) for kind, bit in _THROTTLE_BITS.items()}
    except ValueError:
        pass
    for monitor in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        alarm = _number(monitor / "in0_lcrit_alarm")
        if _text(monitor / "name") == "rpi_volt" and alarm is not None:
            return {"under_voltage": bool(alarm)}
    return {}


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Memory a new process may fill: MemAvailable, or less when a cgroup (v2 or v1) allows less.

    Files that were read count as used in a cgroup, but the kernel drops them first: a model just downloaded must not
    keep itself from being loaded.
    """
    free = int(psutil.virtual_memory().available)
    v2, v1 = root / "sys/fs/cgroup", root / "sys/fs/cgroup/memory"
    groups = (
        (v2 / "memory.max", v2 / "memory.current", v2 / "memory.stat", "inactive_file"),
        (v1 / "memory.limit_in_bytes", v1 / "memory.usage_in_bytes", v1 / "memory.stat", "total_inactive_file"),
    )
    for limit_file, used_file, stat, reclaimable in groups:
        limit, used = _number(limit_file), _number(used_file) or 0
        if limit is not None and limit < _UNLIMITED:
            free = min(free, max(0, int(limit - max(0, used - _line(stat, reclaimable)))))
    return free


def usable_cores(root: Path = Path("/")) -> int:
    """Cores this process may keep busy: its affinity, or less when a cgroup's CPU quota allows less.

    More threads than the quota allows make every decode step wait for the scheduler's next period.
    """
    cores = len(os.sched_getaffinity(0))
    quota, period = _cpu_quota(root)
    return max(1, min(cores, int(quota / period))) if quota and period else cores


def huge_page_environment(environ: Mapping[str, str], root: Path = Path("/")) -> dict[str, str]:
    """What to add to a process's environment before it starts, so that glibc asks for huge pages for large buffers.

    The KV cache of 4,096 cells is walked in strides: on 4 KiB pages a decode step of 4 or 8 sequences spent a tenth of
    its time in page walks. glibc reads the tunable (glibc.malloc.hugetlb, since 2.35) at exec only. Empty where the
    kernel never gives huge pages, or where whoever started us has set the tunable.
    """
    tunables = environ.get(_TUNABLES, "")
    if _HUGE_PAGES in tunables or "[never]" in (
        _text(root / "sys/kernel/mm/transparent_hugepage/enabled") or "[never]"
    ):
        return {}
    return {_TUNABLES: ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))}


def process_usage(pid: int) -> ProcessUsage | None:
    """None when the process is gone."""
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        return ProcessUsage(times.user + times.system, process.memory_info().rss)
    except psutil.Error:
        return None


def process_life(pid: int, root: Path = Path("/")) -> str | None:
    """Names one life of a process id: this boot, and when in it the process began. None when nobody has the id.

    Ids are given out again, soon after a boot above all. In clock ticks since the boot: a clock that is set changes
    nothing.
    """
    words = (_text(root / f"proc/{pid}/stat") or "").rpartition(")")[2].split()
    if len(words) < 20 or words[0] == "Z":
        return None
    return f"{_text(root / 'proc/sys/kernel/random/boot_id')}:{words[19]}"


def peak_memory_bytes(pid: int, root: Path = Path("/")) -> int | None:
    """The most resident bytes a process ever had, or had since `reset_peak_memory`. None when it is gone."""
    for line in (_text(root / f"proc/{pid}/status") or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def reset_peak_memory(pid: int, root: Path = Path("/")) -> bool:
    """Let `peak_memory_bytes` of a process of ours start again from now. False where the kernel does not allow it."""
    try:
        (root / f"proc/{pid}/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@cache
def cpu_kind(root: Path = Path("/")) -> str:
    """`<architecture>/<digest of CPU features>`: machines of one kind choose the same kernels."""
    flags = ""
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        if line.lower().startswith(("flags", "features")):
            flags = " ".join(sorted(line.partition(":")[2].split()))
            break
    return f"{platform.machine()}/{hashlib.sha256(flags.encode()).hexdigest()[:16]}"


def _cpu_quota(root: Path) -> tuple[float | None, float | None]:
    """Microseconds of CPU per period (cgroup v2, then v1); None when there is no quota."""
    words = (_text(root / "sys/fs/cgroup/cpu.max") or "").split()
    if len(words) == 2:
        return (float(words[0]), float(words[1])) if words[0].isdigit() and words[1].isdigit() else (None, None)
    quota = _number(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    return (quota if quota and quota > 0 else None), _number(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us")


def _cpu_name(root: Path) -> str:
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return None


def _line(path: Path, name: str) -> int:
    """The number in the line `<name> <number>`; 0 when there is none."""
    for line in (_text(path) or "").splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0


def _number(path: Path) -> float | None:
    text = _text(path)
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
