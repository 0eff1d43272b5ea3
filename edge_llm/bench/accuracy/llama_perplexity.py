"""What llama-perplexity is asked for, and what it says. Pure: command lines and parsing.

Owns the options that make its figures and ours those of one thing: the same windows from the beginning of the same
text, one at a time, cache types, threads, flash attention and repacking as our policy has them. Refuses to know
processes. What it did is read back: another number of windows than asked for is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_llm.bench.llama_tools import Kernels, UnreadableOutput

# `--ppl-output-type 1`: where a window begins, perplexity, its logarithm and that one's error, all of it so far
_WINDOW: Final = re.compile(r"^ *(\d+)  (\d+\.\d+) +(\d+\.\d+) +(\d+\.\d+)$", re.MULTILINE)
_CHUNK: Final = re.compile(r"^ *\d+(?: +-?\d+\.\d+ ± +-?\d+\.\d+(?: %)?){5}$", re.MULTILINE)
_MEANS: Final = {
    "perplexity": re.compile(r"^Mean PPL\(Q\) +: +(\d+\.\d+) ±", re.MULTILINE),
    "base_perplexity": re.compile(r"^Mean PPL\(base\) +: +(\d+\.\d+) ±", re.MULTILINE),
    "kl": re.compile(r"^Mean +KLD: +(-?\d+\.\d+) ±", re.MULTILINE),
    "same_top": re.compile(r"^Same top p: +(\d+\.\d+) ±", re.MULTILINE),
}
LEAST_TOKENS: Final = 100  # of which it makes statistics of divergence


@dataclass(frozen=True, slots=True)
class Asked:
    """Windows of a text. `count` of `tokens` tokens each."""

    tokens: int
    count: int
    threads: int
    kernels: Kernels

    @property
    def scored(self) -> int:
        """Tokens of a window that are scored."""
        return self.tokens - 1 - self.tokens // 2

    def logits_bytes(self, vocab_size: int) -> int:
        """Of the file that it keeps the first model's probabilities in, 16 bits each."""
        return self.count * self.scored * 2 * (2 * ((vocab_size + 1) // 2) + 4)


@dataclass(frozen=True, slots=True)
class Said:
    """Means over all scored tokens. Without another model there is no divergence."""

    perplexity: float
    kl: float | None = None
    same_top: float | None = None
    base_perplexity: float | None = None


def perplexity_command(tool: Path, model: Path, asked: Asked, text: Path, logits: Path | None) -> list[str]:
    """Perplexity of a text. `logits`: a file to keep probabilities in, for the command below."""
    command = [str(tool), "-m", str(model), "-f", str(text), "--chunks", str(asked.count), "--ppl-output-type", "1"]
    if logits is not None:
        command += ["--kl-divergence-base", str(logits)]
    return [*command, *_common(asked)]


def divergence_command(tool: Path, model: Path, asked: Asked, logits: Path) -> list[str]:
    """Perplexity and divergence on the windows that are in the file."""
    return [str(tool), "-m", str(model), "--kl-divergence", "--kl-divergence-base", str(logits), *_common(asked)]


def _common(asked: Asked) -> list[str]:
    kernels, threads = asked.kernels, str(asked.threads)
    options = ["-c", str(asked.tokens), "-b", str(asked.tokens), "-t", threads, "-tb", threads]
    options += ["-ctk", kernels.k_type, "-ctv", kernels.v_type]
    if kernels.is_default:
        return options
    return [*options, "-fa", "off", "--repack" if kernels.is_repacked else "--no-repack"]


def perplexity_said(output: str, asked: Asked) -> Said:
    """Raises UnreadableOutput, also when other windows ran."""
    found = _WINDOW.findall(output)
    if [int(begin) for begin, *_ in found] != [number * asked.tokens for number in range(asked.count)]:
        raise UnreadableOutput(
            f"llama-perplexity printed {len(found)} windows, asked for {asked.count} of {asked.tokens} tokens "
            "(it wants a text of two windows at least)"
        )
    return Said(float(found[-1][1]))


def divergence_said(output: str, asked: Asked) -> Said:
    """Raises UnreadableOutput, also when other windows ran."""
    count = len(_CHUNK.findall(output))
    if count != asked.count:
        raise UnreadableOutput(f"llama-perplexity compared {count} windows, asked for {asked.count}")
    if count * asked.scored < LEAST_TOKENS:
        raise UnreadableOutput(
            f"llama-perplexity makes no statistics of {count * asked.scored} tokens: give it {LEAST_TOKENS} at least "
            "(--window, --windows)"
        )
    means = {name: found[1] for name, pattern in _MEANS.items() if (found := pattern.search(output))}
    if means.keys() != _MEANS.keys():
        raise UnreadableOutput(f"llama-perplexity did not say {', '.join(_MEANS.keys() - means.keys())}")
    values = {name: float(text) for name, text in means.items()}
    return Said(**(values | {"same_top": values["same_top"] / 100}))
