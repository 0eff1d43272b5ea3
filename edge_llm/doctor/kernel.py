"""The kernel: command line, memory cgroups, emulated NUMA, page size, huge pages, swap and limits on this process.

Owns reading these under a root and judging them; the judging functions are pure. Refuses to know K3s beyond whether it
is there: it needs memory cgroups, everything else can do without.

Sources. Memory cgroups: the firmware of a Pi adds cgroup_disable=memory, what stands in cmdline.txt comes behind it and
wins (raspberrypi/linux#6980); kernel 6.12 has no line `memory` in /proc/cgroups even when all is well, so that only
cgroup.controllers counts. NUMA: raspberrypi/linux#6273 (+6 % with one core, +18 % with four, Geekbench 6), and
raspberrypi/rpi-eeprom#733 (without it, half the speed under a bootloader of 2025). NVMe: raspberrypi/linux#6844, #7445.
Controllers that K3s looks for: k3s-io/k3s pkg/cgroups. cgroup v1: KEP-5573.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from edge_llm.doctor.files import Files, gib
from edge_llm.doctor.finding import Finding, fail, ok, unknown, warn

BOOT_FILES: Final = ("boot/firmware/cmdline.txt", "boot/cmdline.txt")
_ENABLE: Final = "cgroup_enable=memory"
_DISABLE: Final = "cgroup_disable=memory"
_K3S_CONTROLLERS: Final = ("cpu", "cpuset", "memory")
_NUMA: Final = re.compile(r"(?:^|\s)numa=fake=(\d+)")
_HMB: Final = re.compile(r"(?:^|\s)nvme\.max_host_mem_size_mb=(\d+)")
_COMMON_PAGE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Swap:
    """One line of /proc/swaps. Bytes."""

    device: str
    size_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class KernelFacts:
    """None: not known. `controllers`: of cgroup v2; `has_v1_memory`: the memory hierarchy of cgroup v1 is mounted."""

    release: str | None
    system: str | None
    cmdline: str | None
    boot_file: str | None
    boot_text: str | None
    controllers: tuple[str, ...] | None
    has_v1_memory: bool
    page_bytes: int | None
    numa_nodes: int
    has_nvme: bool
    huge_pages: str | None
    tells_pages: bool
    swaps: tuple[Swap, ...] | None


def read_kernel(files: Files, page_bytes: int | None) -> KernelFacts:
    """`page_bytes`: of the running kernel, where that is the one the files are of."""
    controllers = files.text("sys/fs/cgroup/cgroup.controllers")
    boot_file = next((name for name in BOOT_FILES if files.exists(name)), None)
    huge = re.search(r"\[(\w+)\]", files.text("sys/kernel/mm/transparent_hugepage/enabled") or "")
    return KernelFacts(
        release=files.text("proc/sys/kernel/osrelease"),
        system=(files.fields("etc/os-release", "=").get("PRETTY_NAME") or "").strip("\"'") or None,
        cmdline=files.text("proc/cmdline"),
        boot_file=boot_file and f"/{boot_file}",
        boot_text=files.text(boot_file) if boot_file else None,
        controllers=None if controllers is None else tuple(controllers.split()),
        has_v1_memory=files.exists("sys/fs/cgroup/memory/memory.usage_in_bytes"),
        page_bytes=page_bytes or _page_bytes(files),
        numa_nodes=sum(re.fullmatch(r"node\d+", name) is not None for name in files.names("sys/devices/system/node")),
        has_nvme=any(name.startswith("nvme") for name in files.names("sys/class/nvme")),
        huge_pages=huge[1] if huge else None,
        tells_pages=bool(files.names("sys/kernel/mm") or files.names("sys/kernel")),
        swaps=_swaps(files),
    )


def check_kernel(facts: KernelFacts, *, is_pi: bool, is_pi5: bool, has_k3s: bool) -> list[Finding]:
    """All about the kernel, in the order they are shown."""
    found = [
        release(facts),
        memory_cgroup(facts, is_pi=is_pi, has_k3s=has_k3s),
        numa(facts) if is_pi5 else None,
        nvme_host_memory(facts) if facts.has_nvme else None,
        page_size(facts),
        huge_pages(facts),
        swap(facts),
    ]
    return [finding for finding in found if finding is not None]


def release(facts: KernelFacts) -> Finding:
    words = ", ".join(filter(None, (facts.release, facts.system)))
    return ok("kernel.release", words) if words else unknown("kernel.release", "not known")


# --- memory cgroups -----------------------------------------------------------------------------------------------


def memory_cgroup(facts: KernelFacts, *, is_pi: bool, has_k3s: bool) -> Finding:
    """K3s does not start without; elsewhere it is what a memory limit needs."""
    check = "kernel.memory_cgroup"
    if facts.controllers is not None and "memory" in facts.controllers:
        others = [name for name in _K3S_CONTROLLERS if name not in facts.controllers]
        return _without(check, others) if others and has_k3s else ok(check, "on (cgroup v2)")
    if facts.has_v1_memory:
        return _version_1(check) if has_k3s else ok(check, "on (cgroup v1)")
    if facts.controllers is None and facts.cmdline is None:
        return unknown(check, "neither /sys/fs/cgroup nor /proc/cmdline can be read")
    found, do, commands = _missing(facts, is_pi)
    why = "K3s needs it: it says `failed to find memory cgroup` and ends. No pod can have a memory limit without"
    if has_k3s:
        return fail(check, found, why=why, do=do, commands=commands)
    return warn(check, found, why=why, do=f"only if this board is to run K3s: {do}", commands=commands)


def _without(check: str, controllers: list[str]) -> Finding:
    return fail(
        check,
        f"on (cgroup v2), but without {', '.join(controllers)}",
        why="K3s does not start without cpu, cpuset and memory",
        do="remove cgroup_disable= for them from the kernel's command line, and boot again",
    )


def _version_1(check: str) -> Finding:
    return warn(
        check,
        "on, but as cgroup v1",
        why="kubelet 1.35 and newer does not start on cgroup v1",
        do="boot with systemd.unified_cgroup_hierarchy=1 at the end of the kernel's command line",
    )


def _missing(facts: KernelFacts, is_pi: bool) -> tuple[str, str, list[str]]:
    """What is found, what to do, and the lines for it. Each way in which this goes wrong has its own remedy."""
    words = (facts.cmdline or "").split()
    if not is_pi:
        place = "off by cgroup_disable=memory" if _DISABLE in words else "not there"
        return place, f"remove {_DISABLE} from the kernel's command line, or add {_ENABLE}, and boot again", []
    if _is_enabled(words):
        return (
            f"off, although {_ENABLE} is on the kernel's command line",
            "some kernels 6.12 do not obey: update and boot again",
            ["sudo apt update && sudo apt full-upgrade -y && sudo reboot"],
        )
    lines = (facts.boot_text or "").splitlines()
    file = facts.boot_file or f"/{BOOT_FILES[0]}"
    if _ENABLE in words:
        return (
            f"off: {_DISABLE} comes behind {_ENABLE}, and the last word counts",
            f"remove {_DISABLE} from {file} and boot again",
            [f"sudo sed -i 's/ *{_DISABLE}//g' {file} && sudo reboot"],
        )
    if lines and _ENABLE in lines[0].split():
        return f"off: {file} has {_ENABLE}, the running kernel has not", "boot again", ["sudo reboot"]
    if any(_ENABLE in line.split() for line in lines[1:]):
        return (
            f"off: {_ENABLE} stands on a line of its own in {file}; only the first line is read",
            "join the lines and boot again",
            [f"sudo sed -i ':a;N;$!ba;s/\\n\\+/ /g' {file} && sudo reboot"],
        )
    return (
        f"off: the firmware says {_DISABLE}, and {file} does not say otherwise",
        f"add two words to the one line of {file} and boot again",
        [f"sudo sed -i '1 s/$/ cgroup_memory=1 {_ENABLE}/' {file} && sudo reboot"],
    )


def _is_enabled(words: list[str]) -> bool:
    """The kernel takes them in order."""
    last = [word for word in words if word in (_ENABLE, _DISABLE)][-1:]
    return last == [_ENABLE]


# --- memory -------------------------------------------------------------------------------------------------------


def numa(facts: KernelFacts) -> Finding:
    """Only for a BCM2712: its memory is faster when the kernel spreads pages over emulated nodes."""
    check = "kernel.numa"
    if facts.cmdline is None:
        return unknown(check, "/proc/cmdline cannot be read")
    given = [int(count) for count in _NUMA.findall(facts.cmdline)]
    why = "decode is bound by memory: others measured 6 to 18 % less without, and half with a bootloader of 2025"
    upgrade = ["sudo apt update && sudo apt full-upgrade -y && sudo rpi-eeprom-update -a && sudo reboot"]
    if not given:
        do = "kernel and bootloader are older than November 2024: update both"
        return warn(check, "off: numa=fake is not on the kernel's command line", why=why, do=do, commands=upgrade)
    if given[-1] < 2:
        do = f"remove numa=fake={given[-1]} from {facts.boot_file or '/boot/firmware/cmdline.txt'} and boot again"
        return warn(check, f"off: numa=fake={given[-1]}", why=why, do=do)
    if facts.numa_nodes == 1:
        found = f"numa=fake={given[-1]} is asked for, the kernel made one node"
        do = "this kernel cannot do it: use the one that comes with Raspberry Pi OS for the Pi 5 (rpi-2712)"
        return warn(check, found, why=why, do=do, commands=upgrade)
    spread = "spread over" if "numa_policy=interleave" in facts.cmdline.split() else "with numa=fake; policy not set,"
    return ok(check, f"{spread} {facts.numa_nodes or given[-1]} nodes")


def nvme_host_memory(facts: KernelFacts) -> Finding:
    """No fault: a drive must work without. It is told because a drive without memory of its own is slower then."""
    given = _HMB.findall(facts.cmdline or "")
    if given and int(given[-1]) == 0:
        return ok(
            "kernel.nvme_host_memory",
            "0 MiB, as the firmware says; for an SSD without DRAM 32 is faster (nvme.max_host_mem_size_mb=32)",
        )
    return ok("kernel.nvme_host_memory", f"{given[-1]} MiB at most" if given else "the drive's own wish")


def page_size(facts: KernelFacts) -> Finding:
    """16 KiB is fine for us; it is said because other programs and images on the board may not bear it."""
    check, size = "kernel.page_size", facts.page_bytes
    if size is None:
        return unknown(check, "not known")
    if size == _COMMON_PAGE_BYTES:
        return ok(check, "4 KiB")
    return ok(
        check,
        f"{size >> 10} KiB; programs with a jemalloc built for 4 KiB abort here (`Unsupported system page size`), "
        "kernel=kernel8.img in config.txt is the way out",
    )


def huge_pages(facts: KernelFacts) -> Finding:
    check = "kernel.huge_pages"
    if facts.huge_pages is None:
        return (
            ok(check, "this kernel has none") if facts.tells_pages else unknown(check, "/sys/kernel/mm cannot be read")
        )
    if facts.huge_pages == "never":
        return warn(
            check,
            "never",
            why="decode of several sequences spends up to a tenth of its time in page walks without",
            do="allow them to programs that ask; again after each boot, or with transparent_hugepage=madvise at the "
            "end of the kernel's command line",
            commands=["echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"],
        )
    return ok(check, facts.huge_pages)


def swap(facts: KernelFacts) -> Finding:
    check = "kernel.swap"
    if facts.swaps is None:
        return unknown(check, "/proc/swaps cannot be read")
    on_disk = [item for item in facts.swaps if "zram" not in item.device]
    words = ", ".join(f"{item.device} {gib(item.size_bytes)}, {gib(item.used_bytes)} used" for item in facts.swaps)
    if not on_disk:
        return ok(check, words or "none")
    return warn(
        check,
        words,
        why="weights or KV that go there make a token take seconds, and an SD card wears out; a worker that does not "
        "fit should say so at its start",
        do="switch it off, or use zram",
        commands=_swap_off(on_disk),
    )


def _swap_off(swaps: list[Swap]) -> list[str]:
    """Raspberry Pi OS up to bookworm makes /var/swap by a service that would make it again."""
    if any(item.device == "/var/swap" for item in swaps):
        return ["sudo dphys-swapfile swapoff && sudo systemctl disable --now dphys-swapfile"]
    return ["sudo swapoff -a && sudo sed -i '/\\sswap\\s/ s/^#*/#/' /etc/fstab"]


def _swaps(files: Files) -> tuple[Swap, ...] | None:
    if files.text("proc/swaps") is None:
        return None
    rows = [row for row in files.rows("proc/swaps", skip=1) if len(row) >= 4 and row[2].isdigit() and row[3].isdigit()]
    return tuple(Swap(row[0], int(row[2]) * 1024, int(row[3]) * 1024) for row in rows)


def _page_bytes(files: Files) -> int | None:
    """From a process's own map, where the kernel that runs is not the one that is asked about."""
    found = re.search(r"^KernelPageSize:\s+(\d+) kB", files.text("proc/self/smaps") or "", re.MULTILINE)
    return int(found[1]) * 1024 if found else None
