"""A board's files under a root of the test's own: a Pi 5, containers of both cgroup versions, silent boards."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from edge_llm.machine import (
    anonymous_bytes,
    available_memory_bytes,
    board_state,
    core_times,
    cpu_kind,
    group_memory_bytes,
    memory_bytes,
    network_bytes,
    node_facts,
    peak_memory_bytes,
    process_life,
    process_reading,
    process_usage,
    pss_bytes,
    reset_peak_memory,
    throttled_since_boot,
    usable_cores,
)

MIB = 1 << 20
CPUINFO = """\
processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd0b

Revision\t: d04170
Serial\t\t: 0123456789abcdef
Model\t\t: Raspberry Pi 5 Model B Rev 1.0
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.fixture
def pi(tmp_path: Path) -> Path:
    """What a Raspberry Pi 5 says of itself."""
    frequency = "sys/devices/system/cpu/cpu0/cpufreq"
    return write(
        tmp_path,
        {
            "proc/cpuinfo": CPUINFO,
            "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
            f"{frequency}/scaling_cur_freq": "2400000\n",
            f"{frequency}/scaling_governor": "ondemand\n",
            "sys/class/thermal/thermal_zone0/temp": "61450\n",
        },
    )


def test_a_pi_says_what_it_is_and_how_it_feels(pi: Path) -> None:
    facts = node_facts(pi)
    assert facts.board == facts.cpu == "Raspberry Pi 5 Model B Rev 1.0"
    assert (facts.governor, facts.frequency_mhz, facts.temperature_c) == ("ondemand", 2400.0, 61.45)


def test_a_pi_says_what_it_is_in_a_container_too(pi: Path) -> None:
    (pi / "proc/device-tree/model").unlink()
    assert node_facts(pi).board == "Raspberry Pi 5 Model B Rev 1.0"


def test_what_a_board_does_not_have_is_none_and_the_rest_is_there(tmp_path: Path) -> None:
    facts = node_facts(tmp_path)
    assert (facts.board, facts.governor, facts.frequency_mhz, facts.temperature_c) == (None, None, None, None)
    assert facts.cpu
    assert facts.machine == platform.machine()
    assert facts.ram_bytes == psutil.virtual_memory().total
    assert facts.usable_cores == tuple(sorted(os.sched_getaffinity(0)))
    assert facts.cores >= len(facts.usable_cores) > 0


def test_a_sensor_that_speaks_nonsense_is_none(pi: Path) -> None:
    write(pi, {"sys/class/thermal/thermal_zone0/temp": "hot\n", "proc/device-tree/model": "\xff\0"})
    facts = node_facts(pi)
    assert facts.temperature_c is None
    assert facts.board == "\xff"


FIRMWARE = "sys/devices/platform/soc/soc:firmware/get_throttled"


def test_a_pi_says_what_holds_it_back_now_not_what_did_since_boot(pi: Path) -> None:
    write(pi, {FIRMWARE: "d0006\n"})
    state = board_state(pi)
    assert (state.temperature_c, state.frequency_hz) == (61.45, 2.4e9)
    assert state.throttled == {
        "under_voltage": False,
        "frequency_capped": True,
        "throttled": True,
        "soft_temperature_limit": False,
    }


def test_what_held_a_pi_back_since_its_start_is_told_apart_from_now(pi: Path) -> None:
    assert throttled_since_boot(pi) == {}, "not known is not never"
    write(pi, {FIRMWARE: "50000\n"})
    assert board_state(pi).throttled == dict.fromkeys(
        ("under_voltage", "frequency_capped", "throttled", "soft_temperature_limit"), False
    )
    assert throttled_since_boot(pi) == {
        "under_voltage": True,
        "frequency_capped": False,
        "throttled": True,
        "soft_temperature_limit": False,
    }


def test_the_firmwares_folder_may_have_an_address_in_its_name(pi: Path) -> None:
    write(pi, {"sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled": "8\n"})
    assert board_state(pi).throttled["soft_temperature_limit"]


def test_without_the_firmware_file_the_voltage_alarm_is_what_is_known(pi: Path) -> None:
    write(pi, {"sys/class/hwmon/hwmon0/name": "nvme\n", "sys/class/hwmon/hwmon0/in0_lcrit_alarm": "0\n"})
    assert board_state(pi).throttled == {}
    write(pi, {"sys/class/hwmon/hwmon2/name": "rpi_volt\n", "sys/class/hwmon/hwmon2/in0_lcrit_alarm": "1\n"})
    assert board_state(pi).throttled == {"under_voltage": True}
    write(pi, {FIRMWARE: "none\n"})
    assert board_state(pi).throttled == {"under_voltage": True}


def test_a_board_without_sensors_has_nothing_invented(tmp_path: Path) -> None:
    state = board_state(tmp_path)
    assert (state.temperature_c, state.frequency_hz, state.throttled) == (None, None, {})


def test_an_x86_cpu_is_named_by_its_model_name_not_its_number(tmp_path: Path) -> None:
    write(tmp_path, {"proc/cpuinfo": "model\t\t: 85\nmodel name\t: Intel(R) N100\nflags\t\t: sse2 avx2\n"})
    assert node_facts(tmp_path).cpu == "Intel(R) N100"


def test_kinds_of_cpu_are_told_apart_by_features_not_by_their_order(tmp_path: Path) -> None:
    lines = {
        "a": "flags\t: avx2 fma\n",
        "b": "flags\t: fma avx2\n",
        "c": "flags\t: avx2\n",
        "d": "Features : avx2 fma\n",
    }
    kinds = {name: cpu_kind(write(tmp_path / name, {"proc/cpuinfo": line})) for name, line in lines.items()}
    assert kinds["a"] == kinds["b"] == kinds["d"] != kinds["c"]
    assert kinds["a"].startswith(f"{platform.machine()}/")
    assert cpu_kind(tmp_path / "nothing").startswith(f"{platform.machine()}/")


# --- containers ---------------------------------------------------------------------------------------------------

V1 = "sys/fs/cgroup/memory/memory"


def memory(limit: str, used: str, *, v1: bool = False, stat: str = "") -> dict[str, str]:
    if v1:
        return {f"{V1}.limit_in_bytes": limit, f"{V1}.usage_in_bytes": used, f"{V1}.stat": stat}
    folder = "sys/fs/cgroup/memory"
    return {f"{folder}.max": limit, f"{folder}.current": used, f"{folder}.stat": stat}


def test_without_a_limit_memory_is_what_the_machine_has_free(tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    unlimited = memory("max\n", f"{5 * MIB}\n"), memory(f"{(1 << 63) - 4096}\n", f"{5 * MIB}\n", v1=True)
    for number, files in enumerate(({}, *unlimited)):
        assert 64 * MIB < available_memory_bytes(write(tmp_path / str(number), files)) <= total


@pytest.mark.parametrize("v1", [False, True])
def test_a_control_group_allows_its_limit_less_what_is_used(tmp_path: Path, v1: bool) -> None:
    write(tmp_path, memory(f"{48 * MIB}\n", f"{8 * MIB}\n", v1=v1))
    assert available_memory_bytes(tmp_path) == 40 * MIB


@pytest.mark.parametrize("v1", [False, True])
def test_a_file_that_was_read_does_not_count_as_used(tmp_path: Path, v1: bool) -> None:
    """A model just downloaded fills the group's page cache; the kernel drops it when memory is asked for."""
    stat = f"cache {30 * MIB}\n{'total_' * v1}inactive_file {30 * MIB}\nactive_file {2 * MIB}\n"
    write(tmp_path, memory(f"{48 * MIB}\n", f"{40 * MIB}\n", v1=v1, stat=stat))
    assert available_memory_bytes(tmp_path) == 38 * MIB


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    assert available_memory_bytes(write(tmp_path, memory(f"{8 * MIB}\n", f"{9 * MIB}\n"))) == 0


CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("quota", "period", "cores"),
    [("max", 100_000, CORES), (100_000, 100_000, 1), (50_000, 100_000, 1), (150_000, 100_000, 1), (99 << 20, 1, CORES)],
)
def test_cores_are_what_the_quota_lets_run(tmp_path: Path, quota: int | str, period: int, cores: int) -> None:
    v2 = write(tmp_path / "v2", {"sys/fs/cgroup/cpu.max": f"{quota} {period}\n"})
    folder = "sys/fs/cgroup/cpu/cpu"
    old = {f"{folder}.cfs_quota_us": f"{-1 if quota == 'max' else quota}\n", f"{folder}.cfs_period_us": f"{period}\n"}
    assert usable_cores(v2) == usable_cores(write(tmp_path / "v1", old)) == cores


def test_cores_without_a_control_group_are_the_affinity(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == CORES
    assert usable_cores(write(tmp_path, {"sys/fs/cgroup/cpu.max": "nonsense\n"})) == CORES


OWN = "sys/fs/cgroup/system.slice/edge-llm.service/memory"


def test_a_service_reads_its_own_group_not_the_machines(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/system.slice/edge-llm.service\n", f"{OWN}.current": "300\n"})
    assert group_memory_bytes(tmp_path) == (300, None), "the peak came with Linux 5.19"
    write(tmp_path, {f"{OWN}.peak": "500\n"})
    assert group_memory_bytes(tmp_path) == (300, 500)


def test_a_container_finds_its_group_at_the_top_whatever_path_the_host_gave_it(tmp_path: Path) -> None:
    path = {"proc/self/cgroup": "0::/kubepods/pod1/abc\n"}
    write(tmp_path / "v2", path | memory("max\n", "300\n") | {"sys/fs/cgroup/memory.peak": "400\n"})
    old = {"proc/self/cgroup": "4:cpu,memory:/docker/abc\n3:pids:/docker/abc\n", f"{V1}.max_usage_in_bytes": "90\n"}
    write(tmp_path / "v1", old | memory("100\n", "80\n", v1=True))
    assert group_memory_bytes(tmp_path / "v2") == (300, 400)
    assert group_memory_bytes(tmp_path / "v1") == (80, 90)
    assert group_memory_bytes(tmp_path / "nothing") == (None, None)


# --- what changes while it works ----------------------------------------------------------------------------------

TICKS = os.sysconf("SC_CLK_TCK")
STAT = """\
cpu  30 0 30 300 40 0 0 0 0 0
cpu0 10 1 12 100 20 3 4 50 7 2
cpu3 20 0 18 200 20 0 0 0 0 0
intr 1 2 3
cpu9 nonsense
"""


def test_a_core_that_waits_for_the_card_is_idle_and_time_of_guests_counts_once(tmp_path: Path) -> None:
    cores = core_times(write(tmp_path, {"proc/stat": STAT}))
    assert sorted(cores) == [0, 3], "cores that are off have no line"
    assert cores[0].busy_s * TICKS == pytest.approx(10 + 1 + 12 + 3 + 4 + 50)
    assert cores[0].all_s * TICKS == pytest.approx(10 + 1 + 12 + 100 + 20 + 3 + 4 + 50)
    assert core_times(tmp_path / "nothing") == {}


def test_memory_that_the_kernel_would_give_back_is_not_used(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": "MemTotal: 8192 kB\nMemFree: 10 kB\nMemAvailable: 6144 kB\nHugePages_Total: 0\n"})
    assert memory_bytes(tmp_path) == (8192 * 1024, 2048 * 1024)
    assert memory_bytes(tmp_path / "nothing") is None


NETWORK = """\
Inter-|   Receive                               |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier
    lo:     700    7    0    0    0     0          0         0      700    7    0    0    0     0       0          0
  eth0:    5000   50    0    0    0     0          0         0      300    3    0    0    0     0       0          0
  cni0:    4000   40    0    0    0     0          0         0      200    2    0    0    0     0       0          0
"""


def test_bytes_that_cross_a_bridge_of_k3s_count_once(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/net/dev": NETWORK})
    inside = network_bytes(root)
    assert inside is not None
    assert (inside.received, inside.sent, inside.loopback) == (9000, 500, 700), "a container sees no cards"
    (root / "sys/class/net/eth0/device").mkdir(parents=True)
    board = network_bytes(root)
    assert board is not None
    assert (board.received, board.sent) == (5000, 300)
    assert network_bytes(tmp_path / "nothing") is None


# --- processes ----------------------------------------------------------------------------------------------------


def test_a_process_is_measured_while_it_lives() -> None:
    usage = process_usage(os.getpid())
    assert usage is not None
    assert usage.cpu_s > 0
    assert usage.rss_bytes > MIB
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert process_usage(ended.pid) is None
    assert peak_memory_bytes(ended.pid) is None
    assert not reset_peak_memory(ended.pid)


def test_memory_that_is_shared_or_mapped_is_told_apart(tmp_path: Path) -> None:
    rollup = "00400000-7fff [rollup]\nRss:  4096 kB\nPss:  1024 kB\nPss_Anon: 1 kB\nAnonymous:  512 kB\n"
    status = "Name:\tpython\nRssAnon:\t     512 kB\nRssFile:\t    3584 kB\n"
    write(tmp_path, {"proc/7/smaps_rollup": rollup, "proc/7/status": status})
    assert (pss_bytes(7, tmp_path), anonymous_bytes(7, tmp_path)) == (MIB, MIB // 2)
    assert pss_bytes(8, tmp_path) is anonymous_bytes(8, tmp_path) is None, "gone, or another user's"
    usage = process_usage(os.getpid())
    assert usage is not None
    assert 0 < (anonymous_bytes(os.getpid()) or 0) <= 2 * usage.rss_bytes
    assert 0 < (pss_bytes(os.getpid()) or 0) <= 2 * usage.rss_bytes


def test_a_reading_agrees_with_psutil_and_ends_with_its_process() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        reading, usage = process_reading(process.pid), process_usage(process.pid)
        assert reading is not None
        assert usage is not None
        assert reading.rss_bytes <= 1.5 * usage.rss_bytes
        assert 0 <= usage.cpu_s - reading.cpu_s < 5
    assert process_reading(process.pid) is None


def test_a_process_that_has_ended_but_was_not_asked_how_has_no_reading(tmp_path: Path) -> None:
    write(tmp_path, stat(7, "Z", 500) | {"proc/8/stat": "8 (short) S 1\n"})
    assert process_reading(7, tmp_path) is None
    assert process_reading(8, tmp_path) is None


def stat(pid: int, state: str, began: int) -> dict[str, str]:
    """What /proc says of a process whose name has a blank and a bracket."""
    return {f"proc/{pid}/stat": f"{pid} (a) b) {state} " + "0 " * 18 + f"{began} 0 0 0\n"}


def test_a_process_id_that_is_given_out_again_is_another_life(tmp_path: Path) -> None:
    boot = {"proc/sys/kernel/random/boot_id": "first\n"}
    life = process_life(7, write(tmp_path, stat(7, "S", 500) | boot))
    assert life == process_life(7, tmp_path)
    assert life != process_life(7, write(tmp_path, stat(7, "S", 501)))
    assert life != process_life(7, write(tmp_path, stat(7, "S", 500) | {"proc/sys/kernel/random/boot_id": "second\n"}))
    assert process_life(7, write(tmp_path, stat(7, "Z", 500))) is None, "ended, and nobody has asked how"
    assert process_life(8, tmp_path) is None


def test_a_real_process_has_one_life() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        life = process_life(process.pid)
        assert life is not None
        assert life != process_life(os.getpid())
    assert process_life(process.pid) is None


def test_the_peak_is_the_kernels_high_water_mark(tmp_path: Path) -> None:
    write(tmp_path, {"proc/7/status": "Name:\tpython\nVmPeak:\t 9000 kB\nVmHWM:\t 1024 kB\nVmRSS:\t 512 kB\n"})
    assert peak_memory_bytes(7, tmp_path) == MIB
    assert peak_memory_bytes(8, tmp_path) is None
    write(tmp_path, {"proc/7/clear_refs": ""})
    assert reset_peak_memory(7, tmp_path)
    assert (tmp_path / "proc/7/clear_refs").read_text() == "5"
