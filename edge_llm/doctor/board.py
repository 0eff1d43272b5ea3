"""The board itself: which it is, memory, CPU features, clock speed, heat and power.

Owns reading these under a root and judging them; the judging functions are pure. Refuses to know the operating system
(kernel.py) and what is served.

Sources. Heat: the ARM cores of every Raspberry Pi are slowed from 80 degrees on, all is at 85 (Raspberry Pi
documentation, frequency management). Throttle bits: raspberrypi/linux#2367. The speed that a Pi 5's fan reports is
wrong (raspberrypi/linux#7556), so that only its presence counts. Cortex-A76 has dotprod and fp16, Cortex-A72 neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from edge_llm.doctor.files import Files, gib, size_bytes
from edge_llm.doctor.finding import Finding, fail, ok, unknown, warn

Ask = Callable[[Sequence[str]], str | None]
"""Runs a program; its output, or None when it is not there, fails or takes too long."""

WARM_C: Final = 70.0
HOT_C: Final = 80.0
_LITTLE_RAM_BYTES: Final = 3 << 30
_NOW: Final = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
_SINCE_BOOT: Final = 16
_OWN_CLOCK: Final = frozenset({"intel_pstate", "amd-pstate-epp"})
_CPU: Final = "sys/devices/system/cpu/cpu0/cpufreq"
# What the kernel calls what llama.cpp's fast kernels need, by architecture.
_WANTED: Final = {
    "aarch64": {"asimddp": "dotprod", "asimdhp": "fp16"},
    "x86_64": {"avx2": "AVX2", "fma": "FMA", "f16c": "F16C"},
}


@dataclass(frozen=True, slots=True)
class BoardFacts:
    """None or empty: the board does not say. Bytes, MHz, degrees Celsius; `throttled` as the firmware's bits;
    `sets_own_clock`: the CPU does, and the governor is only a hint to it."""

    name: str | None
    architecture: str
    ram_bytes: int | None
    features: frozenset[str]
    cores: int
    temperature_c: float | None
    fans: tuple[str, ...]
    throttled: int | None
    has_under_voltage: bool | None
    governor: str | None
    governors: tuple[str, ...]
    sets_own_clock: bool
    frequency_mhz: float | None
    load_1m: float | None

    @property
    def is_pi(self) -> bool:
        return "Raspberry Pi" in (self.name or "")

    @property
    def is_pi5(self) -> bool:
        """A board with a BCM2712."""
        return self.is_pi and any(word in (self.name or "") for word in ("Pi 5", "Compute Module 5"))


def read_board(files: Files, ask: Ask) -> BoardFacts:
    cpu = files.fields("proc/cpuinfo")
    features = frozenset((cpu.get("Features") or cpu.get("flags") or "").split())
    name = files.text("proc/device-tree/model") or _dmi_name(files) or cpu.get("model name")
    temperature = files.number("sys/class/thermal/thermal_zone0/temp")
    frequency = files.number(f"{_CPU}/scaling_max_freq")
    load = (files.text("proc/loadavg") or "").split()
    return BoardFacts(
        name=name,
        architecture="aarch64" if "Features" in cpu else "x86_64" if "flags" in cpu else "unknown",
        ram_bytes=size_bytes(files.fields("proc/meminfo").get("MemTotal")),
        features=features,
        cores=sum(line[:1] == ["processor"] for line in files.rows("proc/cpuinfo")),
        temperature_c=None if temperature is None else temperature / 1000,
        fans=tuple(_fans(files)),
        throttled=_throttled(files, ask),
        has_under_voltage=_under_voltage(files),
        governor=files.text(f"{_CPU}/scaling_governor"),
        governors=tuple((files.text(f"{_CPU}/scaling_available_governors") or "").split()),
        sets_own_clock=(files.text(f"{_CPU}/scaling_driver") or "") in _OWN_CLOCK,
        frequency_mhz=None if frequency is None else frequency / 1000,
        load_1m=float(load[0]) if load and load[0].replace(".", "").isdigit() else None,
    )


def check_board(facts: BoardFacts) -> list[Finding]:
    """All about the board, in the order they are shown."""
    checks = (model, ram, cpu_features, throttling, temperature, cooling, governor, load)
    return [found for check in checks if (found := check(facts)) is not None]


def model(facts: BoardFacts) -> Finding:
    if facts.name is None:
        if facts.architecture == "unknown":
            return unknown("board.model", "neither its name nor its architecture can be read")
        return unknown("board.model", f"{facts.architecture}; it does not say its name")
    return ok("board.model", f"{facts.name}, {facts.cores} cores, {facts.architecture}")


def ram(facts: BoardFacts) -> Finding:
    if facts.ram_bytes is None:
        return unknown("board.ram", "/proc/meminfo cannot be read")
    if facts.ram_bytes < _LITTLE_RAM_BYTES:
        return warn(
            "board.ram",
            gib(facts.ram_bytes),
            why="every node holds the whole model, its KV cache and a Python process; K3s takes 0.5 GiB more",
            do="serve the smallest model here, with fewer slots",
            commands=["edge-llm serve worker --slots 2 --n-ctx 2048 --key-file cluster.key"],
        )
    return ok("board.ram", gib(facts.ram_bytes))


def cpu_features(facts: BoardFacts) -> Finding:
    check, wanted = "board.cpu_features", _WANTED.get(facts.architecture)
    if not facts.features or wanted is None:
        return unknown(check, "/proc/cpuinfo names no features")
    missing = [name for flag, name in wanted.items() if flag not in facts.features]
    if missing:
        return warn(
            check,
            f"no {', '.join(missing)}",
            why="llama.cpp's fast kernels for quantized weights need them: without, prompts are read far slower",
            do="use this board for decode only, or not at all; no setting replaces a missing instruction",
        )
    extra = [flag for flag in ("i8mm", "sve", "avx512f", "avx512_vnni", "avx_vnni") if flag in facts.features]
    return ok(check, ", ".join([*wanted.values(), *extra]))


def throttling(facts: BoardFacts) -> Finding | None:
    """What the firmware of a Raspberry Pi says; other boards do not have it."""
    check = "board.throttling"
    bits = facts.throttled
    if bits is None and facts.has_under_voltage is not None:
        bits = int(facts.has_under_voltage)
    if bits is None:
        if not facts.is_pi:
            return None
        return unknown(
            check,
            "neither the kernel nor vcgencmd says",
            why="a board that is throttled gives figures that mean nothing",
            do="look with vcgencmd, as a user of the group video",
            commands=["sudo usermod -aG video $USER", "vcgencmd get_throttled"],
        )
    now = [kind for bit, kind in _NOW.items() if bits >> bit & 1]
    past = [kind for bit, kind in _NOW.items() if bits >> (bit + _SINCE_BOOT) & 1]
    if now:
        return fail(check, f"now: {', '.join(now)}", why=_why_throttled(now), do=_against(now))
    if past:
        return warn(check, f"since boot: {', '.join(past)}", why=_why_throttled(past), do=_against(past))
    return ok(check, "nothing holds it back")


def _why_throttled(kinds: Sequence[str]) -> str:
    if "under-voltage" in kinds:
        return "the CPU is slowed while the voltage is low, and files and SD cards break"
    return "the CPU runs slower than it could, and measurements made meanwhile are worth nothing"


def _against(kinds: Sequence[str]) -> str:
    """What helps. The firmware forgets what was since boot only by a boot."""
    if "under-voltage" in kinds:
        return "use the 27 W USB-C supply and its own cable, fewer USB devices; then boot again and look again"
    return "give the board a fan and air; then boot again and look again"


def temperature(facts: BoardFacts) -> Finding:
    check, now_c = "board.temperature", facts.temperature_c
    if now_c is None:
        return unknown(check, "no sensor")
    words = f"{now_c:.0f} degrees C"
    why = f"from {HOT_C:.0f} degrees C on the cores are slowed"
    if now_c >= HOT_C:
        return fail(check, words, why=why, do="give it a fan (active cooler), or stop what heats it")
    if now_c >= WARM_C:
        return warn(check, words, why=f"{why}; minutes of decoding will get it there", do="give it a fan, or more air")
    return ok(check, words)


def cooling(facts: BoardFacts) -> Finding | None:
    """Whether the kernel drives a fan; only Pi boards tell reliably."""
    if facts.fans:
        return ok("board.cooling", ", ".join(facts.fans))
    if not facts.is_pi5:
        return None
    return warn(
        "board.cooling",
        "the kernel knows no fan",
        why="without one a Pi 5 reaches 80 degrees C within minutes of work on all cores, and is slowed",
        do="plug the active cooler into the fan socket; a fan on the 5 V pins is fine and not seen here",
    )


def governor(facts: BoardFacts) -> Finding:
    check, name = "board.governor", facts.governor
    if name is None:
        return unknown(check, "the kernel shows no frequency control (virtual machines have none)")
    top = "" if facts.frequency_mhz is None else f", up to {facts.frequency_mhz:.0f} MHz"
    if name == "performance" or "performance" not in facts.governors or facts.sets_own_clock:
        return ok(check, f"{name}{top}")
    return warn(
        check,
        f"{name}{top}",
        why="the clock follows the load late: the first tokens after a pause are slow, and measurements scatter",
        do="switch to performance; again after each boot, or with cpufreq.default_governor=performance at the end of "
        "the kernel's command line",
        commands=["echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"],
    )


def load(facts: BoardFacts) -> Finding:
    check, now = "board.load", facts.load_1m
    if now is None:
        return unknown(check, "/proc/loadavg cannot be read")
    words = f"{now:.2f} in the last minute, {facts.cores} cores"
    if facts.cores and now > facts.cores / 2:
        return warn(
            check,
            words,
            why="decode is bound by memory: what else runs costs tokens, and spoils measurements",
            do="see what it is; a cluster that answers is no fault",
            commands=["top -b -n 1 | head -n 15"],
        )
    return ok(check, words)


def _dmi_name(files: Files) -> str | None:
    parts = (files.text(f"sys/class/dmi/id/{name}") for name in ("sys_vendor", "product_name"))
    return " ".join(filter(None, parts)) or None


def _fans(files: Files) -> list[str]:
    folder = "sys/class/thermal"
    devices = [name for name in files.names(folder) if name.startswith("cooling_device")]
    kinds = (files.text(f"{folder}/{name}/type") or "" for name in devices)
    return sorted({kind for kind in kinds if "fan" in kind.lower()})


def _throttled(files: Files, ask: Ask) -> int | None:
    """The firmware's bits: from the kernel (deprecated there, so it may be gone), else from vcgencmd."""
    platform = "sys/devices/platform"
    nodes = [name for name in files.names(platform) if name.startswith("soc")]
    places = [f"{platform}/{node}/{part}" for node in nodes for part in files.names(f"{platform}/{node}")]
    for place in places:
        if place.endswith("firmware"):
            bits = _hexadecimal(files.text(f"{place}/get_throttled"))
            if bits is not None:
                return bits
    return _hexadecimal((ask(["vcgencmd", "get_throttled"]) or "").partition("=")[2].strip())


def _under_voltage(files: Files) -> bool | None:
    """The alarm of raspberrypi-hwmon."""
    folder = "sys/class/hwmon"
    for name in files.names(folder):
        alarm = files.number(f"{folder}/{name}/in0_lcrit_alarm")
        if files.text(f"{folder}/{name}/name") == "rpi_volt" and alarm is not None:
            return bool(alarm)
    return None


def _hexadecimal(text: str | None) -> int | None:
    try:
        return int(text or "", 16)
    except ValueError:
        return None
