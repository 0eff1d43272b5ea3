"""This board: cores, memory, temperature, frequency, and what a process uses. The one door to psutil.

Owns reading /proc, /sys and cgroup files (watts: power.py), under a root that is a parameter so that a Pi's files can
be tested anywhere. Refuses to know models and networks. Every reading that a board does not have is None, never
invented.
"""

from __future__ import annotations

import hashlib
import os
import platform
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

_UNLIMITED = 1 << 60
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_AT_HWCAP = 16
# Bits of AT_HWCAP on ARM (Linux, asm/hwcap.h): the ones that a build may need.
_ARM_FEATURES = {"asimd": 1, "atomics": 8, "fphp": 9, "asimdhp": 10, "asimddp": 20, "sve": 22}
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
class CoreTime:
    """Of one core since the boot, in seconds: when it was busy, and all of it."""

    busy_s: float
    all_s: float


@dataclass(frozen=True, slots=True)
class NetworkBytes:
    """Since the boot: over this board's network cards, and between processes of this board."""

    received: int
    sent: int
    loopback: int


@dataclass(frozen=True, slots=True)
class ProcessReading:
    """One process now. `began` tells two processes apart that had the same id."""

    cpu_s: float
    rss_bytes: int
    began: str


@dataclass(frozen=True, slots=True)
class ProcessUsage:
    """CPU seconds since the process began and resident bytes now."""

    cpu_s: float
    rss_bytes: int


def node_facts(root: Path = Path("/")) -> NodeFacts:
    """Read this board now."""
    cpu = root / "sys/devices/system/cpu/cpu0/cpufreq"
    frequency = file_number(cpu / "scaling_cur_freq")
    temperature = file_number(root / "sys/class/thermal/thermal_zone0/temp")
    return NodeFacts(
        cpu=_cpu_name(root),
        machine=platform.machine(),
        cores=psutil.cpu_count() or 1,
        usable_cores=tuple(sorted(os.sched_getaffinity(0))),
        ram_bytes=psutil.virtual_memory().total,
        kernel=platform.release(),
        board=_board(root),
        governor=file_text(cpu / "scaling_governor"),
        frequency_mhz=None if frequency is None else frequency / 1000,
        temperature_c=None if temperature is None else temperature / 1000,
        page_bytes=os.sysconf("SC_PAGE_SIZE"),
        load_1m=os.getloadavg()[0],
    )


def board_state(root: Path = Path("/")) -> BoardState:
    """Read this board now; a few small files, cheap enough for every scrape."""
    frequency_khz = file_number(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
    temperature = file_number(root / "sys/class/thermal/thermal_zone0/temp")
    return BoardState(
        temperature_c=None if temperature is None else temperature / 1000,
        frequency_hz=None if frequency_khz is None else frequency_khz * 1000,
        throttled=_throttled(root),
    )


def throttled_since_boot(root: Path = Path("/")) -> dict[str, bool]:
    """What held the board back at any time since it started, by kind; empty: not known."""
    bits = _throttle_bits(root)
    return {} if bits is None else {kind: bool(bits >> bit + 16 & 1) for kind, bit in _THROTTLE_BITS.items()}


def core_times(root: Path = Path("/")) -> dict[int, CoreTime]:
    """Every core that is on. Waiting for a disk is not busy; what a host took from a virtual machine is."""
    cores = {}
    for line in (file_text(root / "proc/stat") or "").splitlines():
        name, *words = line.split()
        if not name.removeprefix("cpu").isdigit() or not name.startswith("cpu"):
            continue
        ticks = [int(word) for word in words[:8] if word.isdigit()]  # the rest is counted in these already
        if len(ticks) >= 4:
            waiting = ticks[3] + sum(ticks[4:5])
            cores[int(name.removeprefix("cpu"))] = CoreTime((sum(ticks) - waiting) / _TICKS, sum(ticks) / _TICKS)
    return cores


def memory_bytes(root: Path = Path("/")) -> tuple[int, int] | None:
    """All memory, and what is not available to a new process."""
    facts = _kilobytes(root / "proc/meminfo")
    if "MemTotal" not in facts or "MemAvailable" not in facts:
        return None
    return facts["MemTotal"], facts["MemTotal"] - facts["MemAvailable"]


def group_memory_bytes(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """What our control group (v2, then v1) uses, and the most it ever used; files that were read count."""
    v2, v1 = root / "sys/fs/cgroup", root / "sys/fs/cgroup/memory"
    paths = {}
    for line in (file_text(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" or "memory" in controllers.split(","):
            paths["v2" if number == "0" else "v1"] = path.strip("/")
    tries = (
        (v2 / paths.get("v2", ""), "memory.current", "memory.peak"),
        (v2, "memory.current", "memory.peak"),  # a container may see its group's files at the top, under no path
        (v1 / paths.get("v1", ""), "memory.usage_in_bytes", "memory.max_usage_in_bytes"),
        (v1, "memory.usage_in_bytes", "memory.max_usage_in_bytes"),
    )
    for folder, current, peak in tries:
        used, most = file_number(folder / current), file_number(folder / peak)
        if used is not None:
            return int(used), None if most is None else int(most)
    return None, None


def network_bytes(root: Path = Path("/")) -> NetworkBytes | None:
    """Network cards only, where there are any: bridges and tunnels of K3s carry the same bytes once more."""
    counted: dict[str, tuple[int, int]] = {}
    for line in (file_text(root / "proc/net/dev") or "").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) >= 9 and words[0].isdigit() and words[8].isdigit():
            counted[name.strip()] = int(words[0]), int(words[8])
    if not counted:
        return None
    loopback, _ = counted.pop("lo", (0, 0))
    cards = [both for name, both in counted.items() if (root / "sys/class/net" / name / "device").exists()]
    chosen = cards or list(counted.values())
    return NetworkBytes(sum(received for received, _ in chosen), sum(sent for _, sent in chosen), loopback)


def process_reading(pid: int, root: Path = Path("/")) -> ProcessReading | None:
    """None when nobody has the id, or who had it has ended."""
    words = (file_text(root / f"proc/{pid}/stat") or "").rpartition(")")[2].split()
    if len(words) < 22 or words[0] == "Z":
        return None
    return ProcessReading(
        cpu_s=(int(words[11]) + int(words[12])) / _TICKS, rss_bytes=int(words[21]) * _PAGE_BYTES, began=words[19]
    )


def pss_bytes(pid: int, root: Path = Path("/")) -> int | None:
    """Resident memory of a process, pages that others have, too, divided among them. The kernel walks every page for
    it: some milliseconds per GB. None: not allowed, or gone."""
    return _kilobytes(root / f"proc/{pid}/smaps_rollup").get("Pss")


def anonymous_bytes(pid: int, root: Path = Path("/")) -> int | None:
    """Resident memory of a process without mapped files, by the kernel's own count, which costs nothing."""
    return _kilobytes(root / f"proc/{pid}/status").get("RssAnon")


def cpu_share() -> float:
    """Busy share of all cores since this was asked the last time in this process, 0 to 1; 0 at the first time."""
    return psutil.cpu_percent() / 100


def ram_share() -> float:
    """Share of the memory that is not available to a new process, 0 to 1."""
    return psutil.virtual_memory().percent / 100


def _throttled(root: Path) -> dict[str, bool]:
    """By the firmware's bits where the kernel shows them, else the under-voltage alarm alone; empty: not known."""
    bits = _throttle_bits(root)
    if bits is not None:
        return {kind: bool(bits >> bit & 1) for kind, bit in _THROTTLE_BITS.items()}
    for monitor in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        alarm = file_number(monitor / "in0_lcrit_alarm")
        if file_text(monitor / "name") == "rpi_volt" and alarm is not None:
            return {"under_voltage": bool(alarm)}
    return {}


def _throttle_bits(root: Path) -> int | None:
    """The firmware's word. Its folder is called by the system's bus, whose name has an address on some kernels."""
    devices = root / "sys/devices/platform"
    named = devices / "soc/soc:firmware/get_throttled"
    for path in (named, *sorted(devices.glob("soc*/soc*:firmware/get_throttled"))):
        try:
            return int(file_text(path) or "", 16)
        except ValueError:
            continue
    return None


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
        limit, used = file_number(limit_file), file_number(used_file) or 0
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
    words = (file_text(root / f"proc/{pid}/stat") or "").rpartition(")")[2].split()
    if len(words) < 20 or words[0] == "Z":
        return None
    return f"{file_text(root / 'proc/sys/kernel/random/boot_id')}:{words[19]}"


def peak_memory_bytes(pid: int, root: Path = Path("/")) -> int | None:
    """The most resident bytes a process ever had, or had since `reset_peak_memory`. None when it is gone."""
    for line in (file_text(root / f"proc/{pid}/status") or "").splitlines():
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


def _kilobytes(path: Path) -> dict[str, int]:
    """Lines `<name>: <number> kB`, as bytes."""
    found = {}
    for line in (file_text(path) or "").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
            found[name] = int(words[0]) * 1024
    return found


def cpu_features(root: Path = Path("/"), machine: str | None = None) -> frozenset[str]:
    """As the kernel names them in /proc/cpuinfo. On ARM out of the bits that it gives to every process: those are right
    for this process under an emulator too, where /proc/cpuinfo is the host's."""
    if (machine or platform.machine()) == "aarch64" and (bits := _hardware_bits(root)):
        return frozenset(name for name, bit in _ARM_FEATURES.items() if bits >> bit & 1)
    for line in (file_text(root / "proc/cpuinfo") or "").splitlines():
        if line.lower().startswith(("flags", "features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def _hardware_bits(root: Path) -> int:
    """AT_HWCAP of this process's auxiliary vector; 0 when it cannot be read."""
    try:
        pairs = struct.iter_unpack("@LL", (root / "proc/self/auxv").read_bytes())
        return next((value for kind, value in pairs if kind == _AT_HWCAP), 0)
    except (OSError, struct.error):
        return 0


@cache
def cpu_kind(root: Path = Path("/")) -> str:
    """`<architecture>/<digest of CPU features>`: machines of one kind choose the same kernels."""
    flags = ""
    for line in (file_text(root / "proc/cpuinfo") or "").splitlines():
        if line.lower().startswith(("flags", "features")):
            flags = " ".join(sorted(line.partition(":")[2].split()))
            break
    return f"{platform.machine()}/{hashlib.sha256(flags.encode()).hexdigest()[:16]}"


def _cpu_quota(root: Path) -> tuple[float | None, float | None]:
    """Microseconds of CPU per period (cgroup v2, then v1); None when there is no quota."""
    words = (file_text(root / "sys/fs/cgroup/cpu.max") or "").split()
    if len(words) == 2:
        return (float(words[0]), float(words[1])) if words[0].isdigit() and words[1].isdigit() else (None, None)
    quota = file_number(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    return (quota if quota and quota > 0 else None), file_number(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us")


def _board(root: Path) -> str | None:
    """Container runtimes hide what /proc/device-tree links to; the kernels of Raspberry Pis say it in cpuinfo, too."""
    lines = (file_text(root / "proc/cpuinfo") or "").splitlines()
    said = [value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == "Model"]
    return file_text(root / "proc/device-tree/model") or next(iter(said), None)


def _cpu_name(root: Path) -> str:
    for line in (file_text(root / "proc/cpuinfo") or "").splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def file_text(path: Path) -> str | None:
    """What a small file of the kernel says; None when it cannot be read."""
    try:
        return path.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return None


def _line(path: Path, name: str) -> int:
    """The number in the line `<name> <number>`; 0 when there is none."""
    for line in (file_text(path) or "").splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0


def file_number(path: Path) -> float | None:
    """The number in a file; None when there is none."""
    text = file_text(path)
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
