"""Boards as folders: a Raspberry Pi 5 as it should be, the same with every mistake, and a mini PC.

Where the files' shapes come from (all public, all of real boards):
- /proc/cpuinfo of a Pi 5: hrw/arm-socs-table#96; of a Pi 4: fastfetch-cli/fastfetch#1529
- /proc/cmdline and /proc/cgroups of Pi 5 nodes of Kubernetes, working and not: raspberrypi/linux#6980, #5933;
  of Ubuntu: raspberrypi/firmware#2007
- cmdline.txt and K3s's words: K3s documentation, requirements
- thermal zone, trip points and cooling device of the fan: MichaIng/DietPi#6676; get_throttled: raspberrypi/linux#2397
- the Ethernet of the RP1 (macb, 1f00100000.ethernet): raspberrypi/linux#6065
- mountinfo, swaps, net/tcp, net/route: proc(5); cgroup files: linux/Documentation/admin-guide/cgroup-v2.rst
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

Tree = dict[str, str]
"""Names below the root -> content; `-> target` makes a symbolic link, a name that ends in / a folder."""

_CORE: Final = """\
processor\t: {number}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1
"""
CPUINFO_PI5: Final = (
    "\n".join(_CORE.format(number=number) for number in range(4))
    + "\nRevision\t: d04170\nSerial\t\t: 0123456789abcdef\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n"
)
FIRMWARE_WORDS: Final = (
    "reboot=w coherent_pool=1M 8250.nr_uarts=1 pci=pcie_bus_safe cgroup_disable=memory numa_policy=interleave "
    "nvme.max_host_mem_size_mb=0  numa=fake=8 system_heap.max_order=0 smsc95xx.macaddr=2C:CF:67:00:00:01 "
    "vc_mem.mem_base=0x3fc00000 vc_mem.mem_size=0x40000000  "
)
BOOT_WORDS: Final = (
    "console=serial0,115200 console=tty1 root=PARTUUID=4d8097e2-02 rootfstype=ext4 fsck.repair=yes rootwait"
)
K3S_WORDS: Final = "cgroup_memory=1 cgroup_enable=memory"
THROTTLED: Final = "sys/devices/platform/soc/soc:firmware/get_throttled"
CPUFREQ: Final = "sys/devices/system/cpu/cpu0/cpufreq"
K3S_VERSION: Final = "k3s version v1.35.3+k3s1 (148243c4)\ngo version go1.25.5\n"

_TCP_HEAD: Final = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
_ROUTE_HEAD: Final = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"


def tcp(*ports: int) -> str:
    """/proc/net/tcp with programs that listen on all addresses, and one connection that does not listen."""
    rows = [
        f"   {number}: 00000000:{port:04X} 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1\n"
        for number, port in enumerate(ports)
    ]
    talk = "   9: 0B00000A:1F90 0C00000A:D431 01 00000000:00000000 00:00000000 00000000  1000        0 2 1\n"
    return _TCP_HEAD + "".join(rows) + talk


def route(*rows: tuple[str, str, int]) -> str:
    """/proc/net/route: interface, destination in hexadecimal, metric."""
    lines = [f"{name}\t{where}\t0100000A\t0003\t0\t0\t{metric}\t00000000\t0\t0\t0\n" for name, where, metric in rows]
    return _ROUTE_HEAD + "".join(lines)


def mounts(source: str, number: str, *more: str) -> str:
    """/proc/self/mountinfo with `source` as root."""
    return (
        f"22 1 {number} / / rw,noatime shared:1 - ext4 {source} rw\n"
        "23 22 0:21 / /proc rw,nosuid,nodev,noexec,relatime shared:12 - proc proc rw\n"
        "25 22 0:5 / /dev rw,nosuid,relatime shared:2 - devtmpfs udev rw,size=3900000k\n" + "".join(more)
    )


def link(name: str, **values: object) -> Tree:
    """A wired interface of an RP1."""
    given = {"operstate": "up", "speed": 1000, "duplex": "full", "mtu": 1500, "carrier_changes": 2, **values}
    files = {f"sys/class/net/{name}/{leaf}": f"{value}\n" for leaf, value in given.items()}
    return {**files, f"sys/class/net/{name}/device": "-> ../../../1f00100000.ethernet"}


def fitting_pi5() -> Tree:
    """Pi OS bookworm on an NVMe disk, agent of a K3s cluster, everything as it should be."""
    return {
        "proc/cpuinfo": CPUINFO_PI5,
        "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "proc/meminfo": "MemTotal:        8255488 kB\nMemFree:         6100000 kB\nMemAvailable:    7300000 kB\n",
        "proc/loadavg": "0.08 0.03 0.01 1/190 1234\n",
        "proc/uptime": "86400.00 340000.00\n",
        "proc/sys/kernel/osrelease": "6.12.47+rpt-rpi-2712\n",
        "proc/sys/kernel/hostname": "pi-a\n",
        "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nNAME="Debian GNU/Linux"\n',
        "proc/cmdline": f"{FIRMWARE_WORDS}{BOOT_WORDS} {K3S_WORDS}\n",
        "proc/cgroups": "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpuset\t0\t70\t1\npids\t0\t70\t1\n",
        "proc/self/cgroup": "0::/user.slice/user-1000.slice/session-3.scope\n",
        "proc/self/smaps": "5555a0000000-5555a0010000 r-xp 00000000 103:02 1 /bin/cat\nKernelPageSize:       16 kB\n",
        "proc/self/mountinfo": mounts("/dev/nvme0n1p2", "259:2"),
        "proc/swaps": "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n",
        "proc/net/route": route(("wlan0", "00000000", 600), ("eth0", "00000000", 100), ("eth0", "0000000A", 100)),
        "proc/net/tcp": tcp(22, 10248, 10250),
        "proc/net/tcp6": _TCP_HEAD,
        "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        "sys/class/thermal/thermal_zone0/temp": "52350\n",
        "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
        "sys/class/nvme/nvme0/model": "WD PC SN740\n",
        "sys/block/nvme0n1/device/model": "WD PC SN740\n",
        f"{CPUFREQ}/scaling_governor": "performance\n",
        f"{CPUFREQ}/scaling_available_governors": "conservative ondemand userspace powersave performance schedutil\n",
        f"{CPUFREQ}/scaling_max_freq": "2400000\n",
        THROTTLED: "0\n",
        "boot/firmware/cmdline.txt": f"{BOOT_WORDS} {K3S_WORDS}\n",
        "run/systemd/timesync/synchronized": "",
        "usr/local/bin/k3s": "",
        "etc/systemd/system/k3s-agent.service": "[Service]\nExecStart=/usr/local/bin/k3s agent\n",
        "etc/rancher/k3s/config.yaml": "node-label:\n  - edge-llm.dev/role=decode\n",
        **{f"sys/devices/system/node/node{number}/": "" for number in range(8)},
        **link("eth0"),
    }


def unfit_pi5() -> Tree:
    """The same board with every mistake that people report, as server of a K3s cluster."""
    changes: dict[str, str | None] = {
        "proc/meminfo": "MemTotal:        2021588 kB\nMemAvailable:     300000 kB\n",
        "proc/loadavg": "3.90 3.80 3.70 6/190 1234\n",
        "proc/sys/kernel/hostname": "raspberrypi\n",
        "proc/cmdline": f"{FIRMWARE_WORDS}{BOOT_WORDS} numa=fake=1\n",
        "proc/self/mountinfo": mounts("/dev/root", "179:2"),
        "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n/var/swap         file\t524272\t130000\t-2\n",
        "proc/net/tcp": tcp(22, 8080),
        "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io pids\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
        "sys/class/thermal/thermal_zone0/temp": "84100\n",
        "sys/class/thermal/cooling_device0/type": None,
        "sys/dev/block/179:2": "-> ../../devices/platform/axi/1000fff000.mmc/mmc_host/mmc0/block/mmcblk0/mmcblk0p2",
        "sys/block/mmcblk0/device/type": "SD\n",
        f"{CPUFREQ}/scaling_governor": "ondemand\n",
        THROTTLED: "50005\n",
        "boot/firmware/cmdline.txt": f"{BOOT_WORDS}\n{K3S_WORDS}\n",
        "run/systemd/timesync/synchronized": None,
        "etc/systemd/system/k3s-agent.service": None,
        "etc/systemd/system/k3s.service": "[Service]\nExecStart=/usr/local/bin/k3s server\n",
        "etc/rancher/k3s/config.yaml": "node-label:\n- a=b\n  node-taint: [\n",
        "etc/rancher/k3s/k3s.yaml": "apiVersion: v1\n",
        "etc/ufw/ufw.conf": "# /etc/ufw/ufw.conf\nENABLED=yes\nLOGLEVEL=low\n",
        "proc/self/cgroup": "0::/system.slice/edge-llm.service\n",
        "sys/fs/cgroup/system.slice/edge-llm.service/memory.max": f"{256 << 20}\n",
        "sys/fs/cgroup/system.slice/edge-llm.service/memory.events": "low 0\nhigh 0\nmax 12\noom 3\noom_kill 3\n",
        "sys/fs/cgroup/system.slice/edge-llm.service/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/system.slice/edge-llm.service/cpu.stat": "usage_usec 5\nnr_periods 200\nnr_throttled 60\n",
        **link("eth0", speed=100, duplex="half", carrier_changes=400),
    }
    return changed(fitting_pi5(), changes)


def mini_pc() -> Tree:
    """An N100 with Debian and no K3s: nothing of a Pi may be asked of it."""
    return {
        "proc/cpuinfo": "".join(
            f"processor\t: {number}\nmodel name\t: Intel(R) N100\nflags\t\t: fpu sse2 fma f16c avx2 avx_vnni\n\n"
            for number in range(4)
        ),
        "proc/meminfo": "MemTotal:       16179200 kB\nMemAvailable:   15000000 kB\n",
        "proc/loadavg": "0.00 0.00 0.00 1/190 1234\n",
        "proc/cmdline": "BOOT_IMAGE=/boot/vmlinuz-6.12.48-amd64 root=UUID=1 ro quiet\n",
        "proc/sys/kernel/osrelease": "6.12.48-amd64\n",
        "proc/self/mountinfo": mounts("/dev/sda2", "8:2"),
        "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n/dev/zram0  partition\t4194304\t0\t100\n",
        "proc/net/route": route(("enp1s0", "00000000", 0)),
        "proc/net/tcp": tcp(22),
        "sys/class/dmi/id/sys_vendor": "Beelink\n",
        "sys/class/dmi/id/product_name": "EQ12\n",
        "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory hugetlb pids rdma misc\n",
        f"{CPUFREQ}/scaling_driver": "intel_pstate\n",
        f"{CPUFREQ}/scaling_governor": "powersave\n",
        f"{CPUFREQ}/scaling_available_governors": "performance powersave\n",
        **link("enp1s0", speed=2500),
    }


def changed(tree: Mapping[str, str], changes: Mapping[str, str | None]) -> Tree:
    """`tree` with other files; None: not there."""
    return {name: content for name, content in {**tree, **changes}.items() if content is not None}


def write(root: Path, tree: Mapping[str, str]) -> Path:
    for name, content in tree.items():
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if content.startswith("-> "):
            path.symlink_to(content.removeprefix("-> "))
        else:
            path.write_text(content)
    return root
