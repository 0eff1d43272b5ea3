"""How many tokens a prompt or an answer has: a number, or a distribution that numbers are drawn from. Pure.

Owns how distributions are written (`128`, `uniform:64-256`, `normal:128,32`, `lognormal:128,0.5`) and drawing from
them. Refuses to know prompts. A drawn length is at least `LEAST`: a time per token needs two tokens.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final, Literal

LEAST: Final = 2
MOST: Final = 1 << 20
Kind = Literal["fixed", "uniform", "normal", "lognormal"]
SYNTAX: Final = "128, uniform:64-256, normal:MEAN,DEVIATION or lognormal:MEDIAN,SIGMA"


@dataclass(frozen=True, slots=True)
class Lengths:
    """`a` and `b` mean: fixed a; uniform from a to b; normal with mean a and deviation b; lognormal with median a and
    b as the deviation of its logarithm."""

    kind: Kind
    a: float
    b: float = 0.0

    def draw(self, rng: random.Random) -> int:
        match self.kind:
            case "fixed":
                drawn = self.a
            case "uniform":
                drawn = rng.randint(round(self.a), round(self.b))
            case "normal":
                drawn = rng.gauss(self.a, self.b)
            case "lognormal":
                drawn = math.exp(rng.gauss(math.log(self.a), self.b))
        return min(MOST, max(LEAST, round(drawn)))

    def __str__(self) -> str:
        match self.kind:
            case "fixed":
                return f"{self.a:g}"
            case "uniform":
                return f"uniform:{self.a:g}-{self.b:g}"
            case _:
                return f"{self.kind}:{self.a:g},{self.b:g}"


def parse(text: str) -> Lengths:
    """Raises ValueError that says how it is written."""
    kind, _, numbers = text.strip().rpartition(":")
    separator = "-" if kind == "uniform" else ","
    try:
        values = [float(number) for number in numbers.split(separator)]
    except ValueError:
        raise ValueError(f"{text!r} is no number of tokens: write {SYNTAX}") from None
    match kind, values:
        case "", [a] if _is_length(a):
            return Lengths("fixed", a)
        case "uniform", [a, b] if _is_length(a) and _is_length(b) and a <= b:
            return Lengths("uniform", a, b)
        case "normal" | "lognormal" as known, [a, b] if _is_length(a) and 0 <= b < math.inf:
            return Lengths(known, a, b)
    raise ValueError(f"{text!r} is no number of tokens: write {SYNTAX}")


def _is_length(value: float) -> bool:
    return 1 <= value <= MOST
