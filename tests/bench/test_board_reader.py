"""A board's counters as rates, from files that move between two readings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_llm.bench.board_reader import BoardReader, Rates
from edge_llm.power import PowerMeter

TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
FIRMWARE = "sys/devices/platform/soc/soc:firmware/get_throttled"


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def cores(*busy_and_idle_s: tuple[float, float]) -> dict[str, str]:
    lines = [
        f"cpu{core} {round(busy_s * TICKS)} 0 0 {round(idle_s * TICKS)} 0 0 0 0"
        for core, (busy_s, idle_s) in enumerate(busy_and_idle_s)
    ]
    return {"proc/stat": "cpu  1 2 3 4\n" + "\n".join(lines) + "\n"}


def process(pid: int, cpu_s: float, pages: int, began: int = 500) -> dict[str, str]:
    ticks = round(cpu_s * TICKS)
    return {
        f"proc/{pid}/stat": f"{pid} (edge-llm) S " + "0 " * 10 + f"{ticks} 0 " + "0 " * 6 + f"{began} 0 {pages} 0\n"
    }


def network(received: int, sent: int, loopback: int) -> dict[str, str]:
    lines = [
        f"{name}: {got} 0 0 0 0 0 0 0 {gone} 0" for name, got, gone in (("eth0", received, sent), ("lo", loopback, 0))
    ]
    return {"proc/net/dev": "Inter-|\n face |\n" + "\n".join(lines) + "\n"}


def reader(root: Path, processes: dict[str, int] | None = None) -> BoardReader:
    return BoardReader(processes or {}, root, PowerMeter(root, lambda: None))


def test_a_pi_under_load_is_read_core_by_core(tmp_path: Path) -> None:
    frequency, heat = "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "sys/class/thermal/thermal_zone0/temp"
    write(tmp_path, cores((10, 90), (50, 50)) | network(1000, 500, 70) | {frequency: "2400000\n", heat: "61450\n"})
    write(tmp_path, {"proc/meminfo": "MemTotal: 8000 kB\nMemAvailable: 6000 kB\n", FIRMWARE: "50002\n"})
    board = reader(tmp_path)
    first = board.read(100.0)
    assert (first["cpu_share"], first["cpu0_share"], first["net_in_bytes_per_s"]) == (None, None, None)
    assert (first["ram_share"], first["ram_used_bytes"]) == (0.25, 2000 * 1024)
    assert (first["temperature_c"], first["frequency_hz"]) == (61.45, 2.4e9)
    assert (first["throttled/frequency_capped"], first["throttled/under_voltage"]) == (1.0, 0.0)
    write(tmp_path, cores((12, 90), (50.5, 51.5)) | network(5000, 600, 70))
    second = board.read(102.0)
    assert second["cpu0_share"] == pytest.approx(1.0)
    assert second["cpu1_share"] == pytest.approx(0.25)
    assert second["cpu_share"] == pytest.approx(2.5 / 4)
    assert (second["net_in_bytes_per_s"], second["net_out_bytes_per_s"]) == (2000.0, 50.0)
    assert second["loopback_bytes_per_s"] == 0.0


def test_a_board_that_shows_nothing_has_the_same_names_and_nulls(tmp_path: Path) -> None:
    row = reader(tmp_path, {"worker-1": 7}).read(1.0)
    assert set(row.values()) == {None}
    assert {"cpu_share", "ram_share", "group_bytes", "temperature_c", "frequency_hz", "power_w"} <= set(row)
    assert {"worker-1/cpu_cores", "worker-1/rss_bytes", "worker-1/pss_bytes"} <= set(row)


def test_a_process_is_measured_in_cores_it_keeps_busy(tmp_path: Path) -> None:
    board = reader(tmp_path, {"worker-1": 7})
    write(tmp_path, process(7, cpu_s=10, pages=100))
    assert board.read(1.0)["worker-1/cpu_cores"] is None
    write(tmp_path, process(7, cpu_s=13, pages=200))
    row = board.read(3.0)
    assert row["worker-1/cpu_cores"] == pytest.approx(1.5)
    assert row["worker-1/rss_bytes"] == 200 * PAGE_BYTES
    assert row["worker-1/pss_bytes"] is None, "another user's process"


def test_a_process_that_ended_is_not_mixed_up_with_who_got_its_id(tmp_path: Path) -> None:
    board = reader(tmp_path, {"worker-1": 7})
    write(tmp_path, process(7, cpu_s=10, pages=100, began=500))
    board.read(1.0)
    write(tmp_path, process(7, cpu_s=90, pages=900, began=777))
    assert {value for name, value in board.read(2.0).items() if name.startswith("worker-1/")} == {None}


def test_pages_are_counted_when_they_may_be(tmp_path: Path) -> None:
    board = reader(tmp_path, {"worker-1": 7})
    write(tmp_path, process(7, 1, 100) | {"proc/7/smaps_rollup": "x\nPss: 300 kB\nAnonymous: 90 kB\n"})
    write(tmp_path, {"proc/7/status": "VmRSS: 400 kB\nRssAnon: 100 kB\n"})
    row = board.read(1.0)
    assert (row["worker-1/pss_bytes"], row["worker-1/anonymous_bytes"]) == (300 * 1024, 100 * 1024)


def test_a_core_that_is_switched_off_and_on_again_makes_no_wild_share(tmp_path: Path) -> None:
    board = reader(tmp_path)
    write(tmp_path, cores((10, 90), (50, 50)))
    board.read(1.0)
    write(tmp_path, cores((11, 90)))
    row = board.read(2.0)
    assert row["cpu_share"] == pytest.approx(1.0)
    assert "cpu1_share" not in row
    write(tmp_path, cores((11, 91), (51, 52)))
    assert board.read(3.0)["cpu1_share"] == pytest.approx(1 / 3), "of the time that it was on"


def test_what_held_a_board_back_before_and_after_is_said(tmp_path: Path) -> None:
    write(tmp_path, {FIRMWARE: "0\n"})
    board = reader(tmp_path)
    write(tmp_path, {FIRMWARE: "50000\n"})
    assert board.facts() == {
        "throttled_since_boot_before": "nothing",
        "throttled_since_boot_after": "under_voltage, throttled",
    }
    assert reader(tmp_path / "nothing").facts() == {}


def test_where_watts_come_from_is_said_with_them(tmp_path: Path) -> None:
    write(tmp_path, {"sys/class/hwmon/hwmon0/name": "ina219\n", "sys/class/hwmon/hwmon0/power1_input": "5100000\n"})
    board = reader(tmp_path)
    assert board.read(1.0)["power_w"] == 5.1
    assert board.facts()["power_source"] == "hwmon: ina219/power1"


def test_a_counter_that_began_again_has_no_rate_once() -> None:
    rates = Rates()
    assert [rates.of("x", value, at_s) for at_s, value in enumerate([5.0, 7.0, 1.0, 2.0, None, 3.0, 5.0])] == [
        None,
        2.0,
        None,
        1.0,
        None,
        None,
        2.0,
    ]
    assert rates.of("x", 9.0, 6.0) is None, "no time went by"
