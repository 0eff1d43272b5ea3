"""Board, kernel and limits: each reading and what follows from it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from edge_llm.doctor.board import check_board, read_board
from edge_llm.doctor.files import Files
from edge_llm.doctor.finding import Finding
from edge_llm.doctor.kernel import check_kernel, read_kernel
from edge_llm.doctor.limits import check_limits, read_limits
from tests.doctor.boards import (
    BOOT_WORDS,
    CPUFREQ,
    FIRMWARE_WORDS,
    K3S_WORDS,
    THROTTLED,
    changed,
    fitting_pi5,
    write,
)
from tests.doctor.examined import mute

Changes = Mapping[str, str | None]
CMDLINE, BOOT_FILE, CONTROLLERS = "proc/cmdline", "boot/firmware/cmdline.txt", "sys/fs/cgroup/cgroup.controllers"


def board(root: Path, changes: Changes, says: Mapping[str, str] | None = None) -> dict[str, Finding]:
    """What is found on a fitting Pi 5 with `changes`; `says`: programs and their output."""

    def ask(command: Sequence[str]) -> str | None:
        return (says or {}).get(command[0])

    files = Files(write(root, changed(fitting_pi5(), changes)))
    return {found.check.removeprefix("board."): found for found in check_board(read_board(files, ask))}


def kernel(root: Path, changes: Changes, *, has_k3s: bool = True) -> dict[str, Finding]:
    facts = read_kernel(Files(write(root, changed(fitting_pi5(), changes))), None)
    found = check_kernel(facts, is_pi=True, is_pi5=True, has_k3s=has_k3s)
    return {finding.check.removeprefix("kernel."): finding for finding in found}


# --- the board ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "status", "words"),
    [
        ("0", "ok", "nothing holds it back"),
        ("50000", "warn", "since boot: under-voltage, throttled"),
        ("50005", "fail", "now: under-voltage, throttled"),
        ("80008", "fail", "now: soft temperature limit"),
        ("e0000", "warn", "since boot: frequency capped, throttled, soft temperature limit"),
    ],
)
def test_throttle_bits_now_are_a_failure_and_since_boot_a_warning(
    tmp_path: Path, bits: str, status: str, words: str
) -> None:
    found = board(tmp_path, {THROTTLED: f"{bits}\n"})["throttling"]
    assert (found.status, found.found) == (status, words)
    assert ("supply" in found.do) == ("under-voltage" in words)


def test_throttling_is_asked_of_the_firmware_where_the_kernel_does_not_say(tmp_path: Path) -> None:
    """The kernel's file is deprecated; on some kernels the node has an address in its name."""
    gone: Changes = {THROTTLED: None}
    asked = board(tmp_path / "asked", gone, {"vcgencmd": "throttled=0x50000\n"})["throttling"]
    assert (asked.status, asked.found) == ("warn", "since boot: under-voltage, throttled")
    moved = {**gone, "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled": "4\n"}
    assert board(tmp_path / "moved", moved)["throttling"].found == "now: throttled"
    silent = board(tmp_path / "silent", gone, {"vcgencmd": "VCHI initialization failed\n"})["throttling"]
    assert (silent.status, silent.commands[-1]) == ("unknown", "vcgencmd get_throttled")
    alarm = {**gone, "sys/class/hwmon/hwmon1/name": "rpi_volt\n", "sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1\n"}
    assert board(tmp_path / "alarm", alarm)["throttling"].found == "now: under-voltage"


@pytest.mark.parametrize(
    ("millidegrees", "status"), [(69_900, "ok"), (70_000, "warn"), (79_900, "warn"), (80_000, "fail")]
)
def test_heat_is_judged_by_where_the_cores_are_slowed(tmp_path: Path, millidegrees: int, status: str) -> None:
    found = board(tmp_path, {"sys/class/thermal/thermal_zone0/temp": f"{millidegrees}\n"})
    assert found["temperature"].status == status


def test_a_pi_4_lacks_the_fast_instructions(tmp_path: Path) -> None:
    cpu = "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU part\t: 0xd08\n"
    name = "Raspberry Pi 4 Model B Rev 1.5\0"
    found = board(tmp_path, {"proc/cpuinfo": cpu, "proc/device-tree/model": name})
    assert (found["cpu_features"].status, found["cpu_features"].found) == ("warn", "no dotprod, fp16")
    assert "cooling" in found, "its fan is shown as well"


def test_a_governor_that_follows_the_load_is_told_how_to_be_switched(tmp_path: Path) -> None:
    found = board(tmp_path / "slow", {f"{CPUFREQ}/scaling_governor": "ondemand\n"})["governor"]
    assert (found.status, found.found) == ("warn", "ondemand, up to 2400 MHz")
    assert found.commands[0].endswith("scaling_governor")
    only = {f"{CPUFREQ}/scaling_governor": "ondemand\n", f"{CPUFREQ}/scaling_available_governors": "ondemand\n"}
    assert board(tmp_path / "only", only)["governor"].status == "ok", "there is no other"


def test_a_busy_board_is_noticed(tmp_path: Path) -> None:
    assert board(tmp_path / "idle", {"proc/loadavg": "1.90 0 0 1/2 3\n"})["load"].status == "ok"
    assert board(tmp_path / "busy", {"proc/loadavg": "2.10 0 0 1/2 3\n"})["load"].status == "warn"


def test_a_pi_without_a_fan_is_warned_and_another_board_is_not(tmp_path: Path) -> None:
    fan = "sys/class/thermal/cooling_device0/type"
    assert board(tmp_path / "bare", {fan: None})["cooling"].status == "warn"
    other = {fan: "Processor\n", "proc/device-tree/model": "Radxa ROCK 5B\0"}
    assert "cooling" not in board(tmp_path / "other", other)


def test_no_program_is_run_that_nobody_gave(tmp_path: Path) -> None:
    files = Files(write(tmp_path, changed(fitting_pi5(), {THROTTLED: None})))
    assert read_board(files, mute).throttled is None


# --- memory cgroups -----------------------------------------------------------------------------------------------

WITHOUT = "cpuset cpu io pids\n"


@pytest.mark.parametrize(
    ("running", "on_disk", "words", "command"),
    [
        ("", BOOT_WORDS, "does not say otherwise", "1 s/$/ cgroup_memory=1 cgroup_enable=memory/"),
        ("", f"{BOOT_WORDS}\n{K3S_WORDS}", "only the first line is read", "sed -i ':a;N;$!ba;"),
        ("", f"{BOOT_WORDS} {K3S_WORDS}", "the running kernel has not", "sudo reboot"),
        (f" {K3S_WORDS} cgroup_disable=memory", BOOT_WORDS, "the last word counts", "s/ *cgroup_disable=memory//g"),
        (f" {K3S_WORDS}", f"{BOOT_WORDS} {K3S_WORDS}", "although cgroup_enable=memory", "full-upgrade"),
    ],
)
def test_each_way_to_be_without_memory_cgroups_has_its_own_remedy(
    tmp_path: Path, running: str, on_disk: str, words: str, command: str
) -> None:
    changes = {CONTROLLERS: WITHOUT, CMDLINE: FIRMWARE_WORDS + BOOT_WORDS + running, BOOT_FILE: on_disk}
    found = kernel(tmp_path, changes)["memory_cgroup"]
    assert found.status == "fail"
    assert words in found.found
    assert command in found.commands[0]


@pytest.mark.parametrize("before", [f"{BOOT_WORDS}\n", f"{BOOT_WORDS}\n{K3S_WORDS}\n", f"{BOOT_WORDS}\n\n{K3S_WORDS}"])
def test_the_lines_to_type_repair_the_file(tmp_path: Path, before: str) -> None:
    broken = {CONTROLLERS: WITHOUT, CMDLINE: FIRMWARE_WORDS + BOOT_WORDS, BOOT_FILE: before}
    (command,) = kernel(tmp_path, broken)["memory_cgroup"].commands
    typed(command, f"/{BOOT_FILE}", tmp_path / BOOT_FILE)
    first, *rest = (tmp_path / BOOT_FILE).read_text().splitlines()
    assert (first.split(), rest) == ([*BOOT_WORDS.split(), *K3S_WORDS.split()], [])


def typed(command: str, path: str, instead: Path) -> None:
    """Run what is to be typed on a copy, as far as it is about the file."""
    lines = [part.strip() for part in command.split("&&") if path in part]
    for line in lines:
        subprocess.run(line.removeprefix("sudo ").replace(path, str(instead)), shell=True, check=True)
    assert lines


def test_k3s_needs_two_more_controllers(tmp_path: Path) -> None:
    changes = {CONTROLLERS: "io memory pids\n"}
    found = kernel(tmp_path / "k3s", changes)["memory_cgroup"]
    assert (found.status, found.found) == ("fail", "on (cgroup v2), but without cpu, cpuset")
    assert kernel(tmp_path / "none", changes, has_k3s=False)["memory_cgroup"].status == "ok"


def test_memory_cgroups_matter_less_without_k3s(tmp_path: Path) -> None:
    changes = {CONTROLLERS: WITHOUT, CMDLINE: FIRMWARE_WORDS + BOOT_WORDS, BOOT_FILE: BOOT_WORDS}
    assert kernel(tmp_path, changes, has_k3s=False)["memory_cgroup"].status == "warn"


def test_the_old_place_of_the_boot_file_is_known(tmp_path: Path) -> None:
    changes = {CONTROLLERS: WITHOUT, CMDLINE: BOOT_WORDS, BOOT_FILE: None, "boot/cmdline.txt": BOOT_WORDS}
    assert kernel(tmp_path, changes)["memory_cgroup"].commands[0].split(" && ")[0].endswith(" /boot/cmdline.txt")


def test_the_table_of_cgroup_version_1_is_not_believed(tmp_path: Path) -> None:
    """Kernel 6.12 has no line `memory` there though all is well (raspberrypi/linux#6980): the fitting board's file."""
    assert "memory" not in fitting_pi5()["proc/cgroups"]
    assert kernel(tmp_path, {})["memory_cgroup"].found == "on (cgroup v2)"


def test_cgroup_version_1_is_fine_until_k3s_is_there(tmp_path: Path) -> None:
    changes: Changes = {CONTROLLERS: None, "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n"}
    assert kernel(tmp_path / "k3s", changes)["memory_cgroup"].status == "warn"
    assert kernel(tmp_path / "none", changes, has_k3s=False)["memory_cgroup"].status == "ok"


# --- the rest of the kernel ---------------------------------------------------------------------------------------


def test_emulated_numa_is_missed_where_memory_is_slower_without(tmp_path: Path) -> None:
    old = kernel(tmp_path / "old", {CMDLINE: BOOT_WORDS})["numa"]
    assert (old.status, "rpi-eeprom-update" in old.commands[0]) == ("warn", True)
    off = kernel(tmp_path / "off", {CMDLINE: f"{FIRMWARE_WORDS}{BOOT_WORDS} numa=fake=1"})["numa"]
    assert (off.status, off.found) == ("warn", "off: numa=fake=1")
    one = {f"sys/devices/system/node/node{number}/": None for number in range(1, 8)}
    deaf = kernel(tmp_path / "deaf", one)["numa"]
    assert (deaf.status, deaf.found) == ("warn", "numa=fake=8 is asked for, the kernel made one node")


def test_host_memory_of_an_nvme_is_told_and_no_fault(tmp_path: Path) -> None:
    assert kernel(tmp_path / "none", {})["nvme_host_memory"].status == "ok"
    given = {CMDLINE: f"{FIRMWARE_WORDS}{BOOT_WORDS} nvme.max_host_mem_size_mb=32"}
    assert kernel(tmp_path / "given", given)["nvme_host_memory"].found == "32 MiB at most"
    assert "nvme_host_memory" not in kernel(tmp_path / "card", {"sys/class/nvme/nvme0/model": None})


def test_the_page_size_of_the_running_kernel_beats_the_file(tmp_path: Path) -> None:
    files = Files(write(tmp_path, fitting_pi5()))
    assert (read_kernel(files, None).page_bytes, read_kernel(files, 4096).page_bytes) == (16_384, 4096)


@pytest.mark.parametrize(
    ("rows", "status", "command"),
    [
        ("", "ok", ""),
        ("/dev/zram0 partition 4194304 1000 100\n", "ok", ""),
        ("/var/swap file 524272 0 -2\n", "warn", "dphys-swapfile"),
        ("/dev/sda3 partition 524272 0 -2\n/dev/zram0 partition 4194304 1000 100\n", "warn", "swapoff -a"),
    ],
)
def test_swap_is_a_fault_on_a_disk_only(tmp_path: Path, rows: str, status: str, command: str) -> None:
    found = kernel(tmp_path, {"proc/swaps": f"Filename Type Size Used Priority\n{rows}"})["swap"]
    assert found.status == status
    assert command in " ".join(found.commands)


def test_the_line_to_type_against_swap_leaves_the_other_disks(tmp_path: Path) -> None:
    swaps = "Filename Type Size Used Priority\n/dev/sda3 partition 524272 0 -2\n"
    (command,) = kernel(tmp_path, {"proc/swaps": swaps})["swap"].commands
    (tmp_path / "fstab").write_text("UUID=1 / ext4 defaults 0 1\nUUID=2 none swap sw 0 0\n")
    typed(command, "/etc/fstab", tmp_path / "fstab")
    assert (tmp_path / "fstab").read_text() == "UUID=1 / ext4 defaults 0 1\n#UUID=2 none swap sw 0 0\n"


# --- limits -------------------------------------------------------------------------------------------------------

OWN = "sys/fs/cgroup/user.slice/user-1000.slice"


def limits(root: Path, changes: Changes) -> dict[str, Finding]:
    files = Files(write(root, changed(fitting_pi5(), changes)))
    return {finding.check.removeprefix("limits."): finding for finding in check_limits(read_limits(files), 4)}


def test_the_tightest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    scope = f"{OWN}/session-3.scope/memory.max"
    found = limits(
        tmp_path, {scope: "max\n", f"{OWN}/memory.max": f"{2 << 30}\n", "sys/fs/cgroup/memory.max": f"{3 << 30}\n"}
    )
    assert found["memory"].found == "2.0 GiB"


def test_cgroup_version_1_limits_count_too(tmp_path: Path) -> None:
    changes = {
        "proc/self/cgroup": "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{1 << 30}\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    found = limits(tmp_path, changes)
    assert found["memory"].found == "1.0 GiB"
    assert (found["cpu"].status, found["cpu"].found) == ("warn", "2.5 of 4 cores")


@pytest.mark.parametrize(
    ("quota", "throttled", "status"),
    [("max 100000", 0, "ok"), ("400000 100000", 99, "ok"), ("200000 100000", 1, "ok"), ("200000 100000", 50, "warn")],
)
def test_a_cpu_quota_is_a_fault_when_it_stops_steps(tmp_path: Path, quota: str, throttled: int, status: str) -> None:
    stat = f"usage_usec 5\nnr_periods 100\nnr_throttled {throttled}\n"
    found = limits(tmp_path, {f"{OWN}/cpu.max": f"{quota}\n", f"{OWN}/cpu.stat": stat})["cpu"]
    assert found.status == status


def test_kills_for_memory_are_told(tmp_path: Path) -> None:
    found = limits(tmp_path, {f"{OWN}/memory.events": "oom 2\noom_kill 2\n"})["memory"]
    assert (found.status, "2 processes" in found.found) == ("warn", True)
