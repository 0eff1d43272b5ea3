"""Watts from files of boards we have not: sensors on a hat, a counter that starts again, a Pi 5's rails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_llm.power import PowerMeter, ask_pmic, energy_j, monitor_rails_w, pmic_rails_w

# The shape of a Pi 5's answer: rails' currents, then their voltages in another numbering, and inputs without currents.
PMIC = """\
 3V7_WL_SW_A current(0)=0.10000000A
   3V3_SYS_A current(1)=0.05000000A
  VDD_CORE_A current(7)=2.00000000A
   NO_VOLT_A current(9)=9.00000000A
 3V7_WL_SW_V volt(8)=3.70000000V
   3V3_SYS_V volt(9)=3.30000000V
  VDD_CORE_V volt(15)=0.80000000V
     EXT5V_V volt(24)=5.12000000V
"""
PMIC_W = 0.1 * 3.7 + 0.05 * 3.3 + 2.0 * 0.8


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / "sys/class" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def silent() -> str | None:
    return None


def test_a_sensor_on_a_hat_says_watts_itself(tmp_path: Path) -> None:
    sensor = {"hwmon/hwmon3/name": "ina219\n", "hwmon/hwmon3/power1_input": "6250000\n"}
    both = {"hwmon/hwmon3/curr1_input": "1250\n", "hwmon/hwmon3/in1_input": "5000\n"}
    write(tmp_path, sensor | both)
    assert monitor_rails_w(tmp_path) == {"ina219/power1": 6.25}, "once, not by volts and amperes again"


def test_volts_and_amperes_of_one_channel_make_watts_under_its_label(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "hwmon/hwmon0/name": "ina3221\n",
            "hwmon/hwmon0/curr1_input": "1000\n",
            "hwmon/hwmon0/curr1_label": "VDD_IN\n",
            "hwmon/hwmon0/in1_input": "5000\n",
            "hwmon/hwmon0/curr2_input": "200\n",
            "hwmon/hwmon0/curr3_input": "broken\n",
            "hwmon/hwmon0/in3_input": "5000\n",
        },
    )
    assert monitor_rails_w(tmp_path) == {"ina3221/VDD_IN": 5.0}


def test_a_rail_that_feeds_the_others_is_counted_alone_and_never_replaced_by_them(tmp_path: Path) -> None:
    """A Jetson's INA3221: the board's input, and two rails behind it."""
    rails = {"1": ("VDD_IN", 1000), "2": ("VDD_CPU", 400), "3": ("VDD_SOC", 200)}
    write(tmp_path, {"hwmon/hwmon0/name": "ina3221\n"})
    for number, (label, milliamperes) in rails.items():
        files = {f"curr{number}_label": f"{label}\n", f"curr{number}_input": f"{milliamperes}\n"}
        files[f"in{number}_input"] = "5000\n"
        write(tmp_path, {f"hwmon/hwmon0/{name}": text for name, text in files.items()})
    assert monitor_rails_w(tmp_path) == {"ina3221/VDD_IN": 5.0}
    meter = PowerMeter(tmp_path, silent)
    assert meter.watts(1.0) == 5.0
    (tmp_path / "sys/class/hwmon/hwmon0/curr1_input").write_text("broken\n")
    assert meter.watts(2.0) is None


def test_a_counter_is_a_meter_before_it_has_any_watts(tmp_path: Path) -> None:
    assert PowerMeter(write(tmp_path, rapl(100)), silent).is_there()
    assert not PowerMeter(tmp_path / "nothing", silent).is_there()


def test_a_drive_and_the_voltage_alarm_are_not_the_board(tmp_path: Path) -> None:
    alarm = {"hwmon/hwmon1/name": "rpi_volt\n", "hwmon/hwmon1/in0_lcrit_alarm": "0\n"}
    write(tmp_path, alarm | {"hwmon/hwmon0/name": "nvme\n", "hwmon/hwmon0/power1_input": "3000000\n"})
    assert monitor_rails_w(tmp_path) == {}


def test_rails_are_paired_by_name_and_one_without_volts_is_left_out() -> None:
    assert sum(pmic_rails_w(PMIC).values()) == pytest.approx(PMIC_W)
    assert set(pmic_rails_w(PMIC)) == {"3V7_WL_SW", "3V3_SYS", "VDD_CORE"}
    for nonsense in ("", "VCHI initialization failed", "VDD_CORE_A current(7)=A\nVDD_CORE_V volt(1)=1.0V"):
        assert pmic_rails_w(nonsense) == {}


def rapl(joules: float, most: float = 1000.0, package: int = 0) -> dict[str, str]:
    zone = f"powercap/intel-rapl:{package}"
    return {
        f"{zone}/energy_uj": f"{round(joules * 1e6)}\n",
        f"{zone}/max_energy_range_uj": f"{round(most * 1e6)}\n",
        f"{zone}:0/energy_uj": "5\n",  # the cores, a part of the package
        f"{zone}:0/max_energy_range_uj": "9\n",
    }


def test_an_energy_counter_makes_watts_over_the_time_between_and_may_start_again(tmp_path: Path) -> None:
    meter = PowerMeter(write(tmp_path, rapl(100)), silent)
    assert meter.watts(10.0) is None
    assert meter.source == "rapl"
    write(tmp_path, rapl(130))
    assert meter.watts(12.0) == pytest.approx(15.0)
    write(tmp_path, rapl(10))
    assert meter.watts(20.0) == pytest.approx((1000 - 130 + 10) / 8)
    assert meter.watts(20.0) is None, "no time went by"


def test_all_packages_count_and_one_that_disappears_makes_no_figure(tmp_path: Path) -> None:
    meter = PowerMeter(write(tmp_path, rapl(100) | rapl(200, package=1)), silent)
    meter.watts(1.0)
    write(tmp_path, rapl(110) | rapl(230, package=1))
    assert meter.watts(2.0) == pytest.approx(40.0)
    (tmp_path / "sys/class/powercap/intel-rapl:1/energy_uj").write_text("gone\n")
    assert meter.watts(3.0) is None
    assert energy_j(tmp_path / "nothing") == {}


def test_a_source_is_chosen_once_and_never_changes_within_a_run(tmp_path: Path) -> None:
    """A board that asked the firmware and then a sensor would show a step that nothing made."""
    meter = PowerMeter(tmp_path, lambda: PMIC)
    assert meter.watts(1.0) == pytest.approx(PMIC_W)
    write(tmp_path, {"hwmon/hwmon3/name": "ina219\n", "hwmon/hwmon3/power1_input": "6250000\n"})
    assert meter.watts(2.0) == pytest.approx(PMIC_W)
    assert (meter.source, meter.rails) == ("pmic", ("3V7_WL_SW", "3V3_SYS", "VDD_CORE"))


def test_a_board_without_sensors_has_no_watts_and_its_firmware_is_not_asked_for_ever(tmp_path: Path) -> None:
    asked = iter(["VCHI initialization failed"])
    meter = PowerMeter(tmp_path, lambda: next(asked))
    assert [meter.watts(float(second)) for second in range(5)] == [None] * 5
    assert meter.source is None


def test_a_tool_that_fails_or_is_not_there_is_no_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_pmic() is None
    tool = tmp_path / "vcgencmd"
    tool.write_text("#!/bin/sh\necho not permitted >&2\nexit 255\n")
    os.chmod(tool, 0o755)
    assert ask_pmic() is None
    tool.write_text('#!/bin/sh\necho "$1"\n')
    assert ask_pmic() == "pmic_read_adc\n"
