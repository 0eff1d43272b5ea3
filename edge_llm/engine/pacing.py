"""How much of a prompt is read between two decode steps, so that running streams keep their pace. Pure arithmetic.

Owns the rule: as much as `PROMPT_STEPS` decode steps take; beside streams with limits of time per token (the mean over
an answer, as TPOT is defined) as much as every one of them can bear after what it has had so far. So a stream that runs
ahead of its limit gives of it, and one that has just begun, or is short, gets its tokens at once. What is too little to
be worth a call is left to the next step, prompts never starve, and nothing is left for a limit that is lost. Refuses to
know engines, requests and clocks.
Invariant: a gap is at most 1 + PROMPT_STEPS steps or, where every stream has a limit and its first token, the share
OF_LIMIT of the strictest one that is not lost.
The scheduler counts on the same rule (cluster/cost.py, `NodeCost.piece`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

# A running stream then sees prompt work of this many decode steps between two of its tokens: gap <= 1 + this.
PROMPT_STEPS: Final = 1.5
# Of a limit of time per token this share is used: steps differ.
OF_LIMIT: Final = 0.9
# So much of what a stream can bear is kept back: a step may take longer than foreseen, and an answer of three tokens
# has no later ones to make it up. Of a long answer it is nothing: kept back once, not for each step.
KEPT_BACK_STEPS: Final = 0.25
# So much prompt work there is for each step in any case: a step's worth after every eighth. More often, and it is the
# short answers that pay, which would have ended before anybody starved (the Azure code trace: three tokens).
LEAST_PROMPT_STEPS: Final = 0.125
# Where every stream has a limit and can bear it: eight ninths of the time are the prompt's then, more brings it little.
MOST_PROMPT_STEPS: Final = 8.0
# Less waits for the next step: a call reads all weights, however few tokens it has.
LEAST_PIECE_STEPS: Final = 1.0
# Repacked GEMM kernels work on four rows at a time (ggml-cpu/repack.cpp, tensor_traits::forward_mul_mat).
ROW_BLOCK: Final = 4


class Pace(NamedTuple):
    """A running stream: its limit of seconds per token (None: it has none), the tokens its client has, for how long it
    has had the first of them, and how many may still come."""

    tpot_s: float | None = None
    tokens: int = 0
    age_s: float = 0.0
    left: int = 1

    def is_lost(self, decode_step_s: float) -> bool:
        """Whether it is behind its limit and stays behind even if all that may come comes at once."""
        if self.tpot_s is None or not self.tokens:
            return False
        next_s, last_s = self.age_s + decode_step_s, self.age_s + self.left * decode_step_s
        return next_s > self.tpot_s * self.tokens and last_s > self.tpot_s * (self.tokens - 1 + self.left)

    def bears_s(self, decode_step_s: float) -> float:
        """How much later than at once its next token may come, less what is kept back: without end where it has no
        limit or has lost it, and before its first token, which no limit of this kind is about."""
        if self.tpot_s is None or not self.tokens or self.is_lost(decode_step_s):
            return math.inf
        return OF_LIMIT * self.tpot_s * self.tokens - self.age_s - (1 + KEPT_BACK_STEPS) * decode_step_s


def room_s(decode_step_s: float, paces: Sequence[Pace], skipped_steps: int = 0) -> float:
    """Seconds of prompt work before the next decode step; 0: none this time. `skipped_steps`: how often that was said
    since there was some."""
    most_s = PROMPT_STEPS * decode_step_s
    # who has no limit, or waits for a first token, is not made to wait longer by what others bear
    if all(pace.tpot_s is not None and pace.tokens for pace in paces):
        limits_s = [pace.tpot_s for pace in paces if pace.tpot_s is not None and not pace.is_lost(decode_step_s)]
        longest_s = OF_LIMIT * min(limits_s, default=0.0) - decode_step_s
        most_s = max(most_s, min(longest_s, MOST_PROMPT_STEPS * decode_step_s))
    bearable_s = min((pace.bears_s(decode_step_s) for pace in paces), default=most_s)
    room = min(most_s, max(bearable_s, LEAST_PROMPT_STEPS * decode_step_s * (1 + skipped_steps)))
    return room if room >= LEAST_PIECE_STEPS * decode_step_s else 0.0


def whole_rows(tokens: float) -> int:
    """So many prompt tokens: at least one, whole row blocks where there is room for one."""
    whole = int(tokens)
    return max(1, whole - whole % ROW_BLOCK if whole >= ROW_BLOCK else whole)
