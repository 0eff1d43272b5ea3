"""Watts of this board, where it can be asked: sensors of the kernel, a processor's energy counter, a Pi 5's power chip.

Owns where they are found and which of them are counted. Refuses to know who asks and how often. A board without any has
None. What is measured differs by board, so a reading has its source: none of them is the power at the plug.

- `hwmon`: watts or volts and amperes that a driver shows under /sys/class/hwmon (an INA2xx on a hat, some boards).
- `rapl`: the energy counter of x86 processors: all packages, without memory and board; only root may read it mostly.
- `pmic`: the rails of a Pi 5, asked of its firmware by `vcgencmd pmic_read_adc`: without USB and without the power
  chip's own losses, so less than the plug's.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from edge_llm.machine import file_number, file_text

_PMIC: Final = re.compile(r"^\s*(\w+)_([AV])\s+(?:current|volt)\(\d+\)=(\d+(?:\.\d+)?)[AV]\s*$", re.MULTILINE)
_TOOL_S: Final = 2.0
# Where the board's power comes in (Jetsons): what else their sensors measure comes after it, and is in it.
_TOTAL_RAILS: Final = ("VDD_IN", "POM_5V_IN")
# A battery and a drive are not the board; a fan's driver and the voltage alarm have no watts.
_NOT_THE_BOARD: Final = ("bat", "nvme", "hidpp", "ucsi", "amdgpu", "nouveau", "xe", "i915")


def monitor_rails_w(root: Path = Path("/")) -> dict[str, float]:
    """Watts by `<sensor>/<rail>`: what the driver says in watts, else volts times amperes of channels that belong
    together by number. They add up: where one rail feeds the others it is the only one."""
    rails = {}
    for monitor in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        name = file_text(monitor / "name") or monitor.name
        if not name.lower().startswith(_NOT_THE_BOARD):
            rails.update({f"{name}/{label}": watts for label, watts in _rails_of(monitor).items()})
    total = {name: watts for name, watts in rails.items() if name.rpartition("/")[2].upper() in _TOTAL_RAILS}
    return total or rails


def _rails_of(monitor: Path) -> dict[str, float]:
    powers = sorted([*monitor.glob("power*_input"), *monitor.glob("power*_average")])
    if powers:
        return {_label(path): watts / 1e6 for path in powers if (watts := file_number(path)) is not None}
    rails = {}
    for path in sorted(monitor.glob("curr*_input")):
        number = path.name.removeprefix("curr").removesuffix("_input")
        milliamperes, millivolts = file_number(path), file_number(monitor / f"in{number}_input")
        if milliamperes is not None and millivolts is not None:
            rails[_label(path)] = milliamperes * millivolts / 1e6
    return rails


def _label(path: Path) -> str:
    channel = path.name.rpartition("_")[0]
    return file_text(path.with_name(f"{channel}_label")) or channel


def energy_j(root: Path = Path("/")) -> dict[str, tuple[float, float]]:
    """By package: joules on its counter, and where that starts again from 0."""
    found = {}
    for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]*")):
        if zone.name.count(":") > 1:  # a part of a package, counted in it
            continue
        now, most = file_number(zone / "energy_uj"), file_number(zone / "max_energy_range_uj")
        if now is not None and most:
            found[zone.name] = now / 1e6, most / 1e6
    return found


def pmic_rails_w(text: str) -> dict[str, float]:
    """From what `vcgencmd pmic_read_adc` prints: rails with both an amperes and a volts line."""
    readings = {(rail, unit): float(value) for rail, unit, value in _PMIC.findall(text)}
    return {
        rail: amperes * readings[rail, "V"]
        for (rail, unit), amperes in readings.items()
        if unit == "A" and (rail, "V") in readings
    }


def ask_pmic() -> str | None:
    """What the firmware's tool prints; None where there is no such tool, or it may not ask."""
    tool = shutil.which("vcgencmd")
    if tool is None:
        return None
    try:
        done = subprocess.run([tool, "pmic_read_adc"], capture_output=True, text=True, timeout=_TOOL_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


@dataclass(slots=True)
class PowerMeter:
    """Chooses a source once, by what answers, and asks that from then on. An energy counter needs two questions."""

    root: Path = Path("/")
    ask: Callable[[], str | None] = ask_pmic
    source: str | None = None
    rails: tuple[str, ...] = ()
    _last: tuple[float, dict[str, tuple[float, float]]] = (0.0, {})
    _is_chosen: bool = field(default=False)

    def is_there(self) -> bool:
        """Whether anything answers here, even if it has no watts yet."""
        if not self._is_chosen:
            self._choose()
        return self.source is not None

    def watts(self, now_s: float) -> float | None:
        """Now, or the mean since the last question; None: not known."""
        if not self._is_chosen:
            self._choose()
        if self.source == "rapl":
            return self._since_last(now_s)
        rails = self._rails_w()
        # one that does not answer now leaves a sum of something else
        return sum(rails.values()) if rails and rails.keys() == set(self.rails) else None

    def _choose(self) -> None:
        self._is_chosen = True
        for source in ("hwmon", "rapl", "pmic"):
            self.source = source
            found = energy_j(self.root) if source == "rapl" else self._rails_w()
            if found:
                self.rails = tuple(found)
                return
        self.source = None

    def _rails_w(self) -> dict[str, float]:
        if self.source == "hwmon":
            return monitor_rails_w(self.root)
        return pmic_rails_w(self.ask() or "") if self.source == "pmic" else {}

    def _since_last(self, now_s: float) -> float | None:
        (last_s, before), now = self._last, energy_j(self.root)
        self._last = now_s, now
        if now_s <= last_s or not now or before.keys() != now.keys():
            return None
        used_j = sum((joules - before[name][0]) % most for name, (joules, most) in now.items())
        return used_j / (now_s - last_s)
