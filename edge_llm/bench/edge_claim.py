"""The Edge paper's claim, and whether a measured row bears it out. Pure.

Owns the claim's numbers and the verdict with its figures. Refuses to know rows and how anything was measured.

"Generative AI on the Edge: Architecture and Performance Evaluation" (arXiv 2411.17712) says in its abstract that
lightweight models generate 5 to 12 tokens per second with less than 50 % of CPU and RAM, on Raspberry Pi 5. Whether
"usage" is raw or above an idle board it does not say there: the verdict is on raw loads, the other stands beside it.
A mapped model is memory that is used, though the kernel calls its pages available: whoever gives a load counts them in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import msgspec

CLAIMED_TOKENS_PER_S: Final = (5.0, 12.0)
CLAIMED_SHARE: Final = 0.5
CLAIMED_BOARD: Final = "Raspberry Pi 5"
# Fewer readings of CPU are a glance at a moment: a mean of them moves by tens of percent from run to run.
LEAST_SAMPLES: Final = 5
Speed = Literal["slower", "within", "faster", "unknown"]


class Claim(msgspec.Struct, frozen=True):
    """The verdict. None: a figure that it needs could not be read, or too seldom, or the board was held back."""

    holds: bool | None
    holds_above_idle: bool | None
    speed: Speed
    is_cpu_below_half: bool | None
    is_ram_below_half: bool | None
    words: str


class Load(msgspec.Struct, frozen=True):
    """Of all cores, or of all memory: raw, and above an idle board. `is_least`: mapped files come to it, unread.
    `samples`: how many readings it is the mean of; None: nobody says."""

    raw: float | None = None
    above_idle: float | None = None
    is_least: bool = False
    samples: int | None = None

    @property
    def is_scarce(self) -> bool:
        """So few readings that no verdict is made of it. Memory's highest reading is one at once."""
        return self.samples is not None and self.samples < LEAST_SAMPLES

    def __str__(self) -> str:
        if self.raw is None:
            return "unknown"
        words = f"at least {self.raw:.0%}" if self.is_least else f"{self.raw:.0%}"
        beside = [] if self.samples is None else [_counted(self.samples)]
        if self.above_idle is not None:
            beside.append(f"{round(self.above_idle, 2) + 0.0:+.0%} above idle")  # adding 0 makes -0 to 0
        return f"{words} ({', '.join(beside)})" if beside else words


def claim_of(tokens_per_s: float | None, cpu: Load, ram: Load, held_back: Sequence[str] = ()) -> Claim:
    """More than 12 tokens/s is more than was claimed: no reason to refuse. `held_back`: by what the board was; then its
    figures are not those of the board that the claim is about, and there is no verdict."""
    speed = _speed(tokens_per_s)
    is_fast = None if speed == "unknown" else speed != "slower"
    is_cpu_below, is_ram_below = _below(cpu, cpu.raw), _below(ram, ram.raw)
    holds = None if held_back else _all((is_fast, is_cpu_below, is_ram_below))
    is_cpu_above_idle, is_ram_above_idle = _below(cpu, cpu.above_idle), _below(ram, ram.above_idle)
    word = {True: "holds", False: "does not hold", None: "cannot be told"}[holds]
    if holds is None and cpu.is_scarce and not held_back:
        word = f"has no verdict ({_counted(cpu.samples or 0)} of CPU, needs {LEAST_SAMPLES})"
    rate = "unknown" if tokens_per_s is None else f"{tokens_per_s:.1f}"
    notes = ["what its workers map was not read"] if ram.raw is not None and is_ram_below is None else []
    notes += [f"the board was held back: {', '.join(held_back)}"] if held_back else []
    claimed = "{:g} to {:g}".format(*CLAIMED_TOKENS_PER_S)
    return Claim(
        holds=holds,
        holds_above_idle=None if held_back else _all((is_fast, is_cpu_above_idle, is_ram_above_idle)),
        speed=speed,
        is_cpu_below_half=is_cpu_below,
        is_ram_below_half=is_ram_below,
        words=f"{word}: {rate} tokens/s ({claimed} claimed), CPU {cpu}, RAM {ram} (less than {CLAIMED_SHARE:.0%} "
        "claimed)" + "".join(f"; {note}" for note in notes),
    )


def _speed(tokens_per_s: float | None) -> Speed:
    least, most = CLAIMED_TOKENS_PER_S
    if tokens_per_s is None:
        return "unknown"
    return "slower" if tokens_per_s < least else "within" if tokens_per_s <= most else "faster"


def _counted(samples: int) -> str:
    return "1 sample" if samples == 1 else f"{samples} samples"


def _below(load: Load, share: float | None) -> bool | None:
    """`share`: the raw one of this load, or the one above idle."""
    if share is None or load.is_scarce or (load.is_least and share < CLAIMED_SHARE):
        return None
    return share < CLAIMED_SHARE


def _all(parts: Sequence[bool | None]) -> bool | None:
    """One that is false decides, whatever the unknown ones are."""
    return False if False in parts else None if None in parts else True
