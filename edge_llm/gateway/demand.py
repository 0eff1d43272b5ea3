"""What a model's requests are like: how often they come, how long prompts and answers are, which pace they ask for.

Pure: time is an argument. Owns running means over about the last twenty requests of each model, of the whole cluster.
Refuses to know nodes and plans.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from edge_llm.cluster.cost import TYPICAL_ANSWER_TOKENS

# About the last twenty prompts and answers of a model say how long the next ones will be.
SMOOTHING: Final = 0.05
# What is assumed of answers before any came counts as much as so many of them: one is not typical of others.
_ASSUMED_ANSWERS: Final = 4
# Fewer gaps between arrivals say nothing of how often requests come.
_LEAST_GAPS: Final = 5


@dataclass(frozen=True, slots=True)
class Typical:
    """A model's requests: so many a second, each with so many prompt tokens to compute and tokens to answer, at most
    `tpot_s` apart on average (None: most ask for no pace)."""

    rate_per_s: float
    prompt_tokens: float
    answer_tokens: float
    tpot_s: float | None


@dataclass(slots=True)
class _Means:
    """Of one model. limited: the share of requests that ask for a pace, `tpot_s` on average. gap_s: between two
    arrivals, of which the last was at `arrived_s`; computed: tokens of a prompt that no worker was believed to hold."""

    prompt_tokens: float | None = None
    computed: float = 0.0
    answer_tokens: float = float(TYPICAL_ANSWER_TOKENS)
    answers: int = 0
    limited: float = 0.0
    tpot_s: float = 0.0
    gap_s: float = 0.0
    gaps: int = 0
    arrived_s: float | None = None


@dataclass(slots=True)
class Demand:
    """All models' requests."""

    _means: dict[str, _Means] = field(default_factory=dict)

    def arrived(self, model: str, tpot_s: float | None, now_s: float) -> None:
        """A request came for which the cluster may choose how it is served; tpot_s: its limit, if any."""
        means = self._of(model)
        if means.arrived_s is not None:
            means.gap_s = _mean(means.gap_s, now_s - means.arrived_s, means.gaps)
            means.gaps += 1
        means.limited = _mean(means.limited, float(tpot_s is not None), means.gaps)
        if tpot_s is not None:
            means.tpot_s += (tpot_s - means.tpot_s) * (SMOOTHING if means.tpot_s else 1.0)
        means.arrived_s = now_s

    def planned(self, model: str, prompt_tokens: int, held_tokens: int) -> None:
        """A prompt is given to a worker that is believed to hold so many of its positions."""
        means, computed = self._of(model), float(prompt_tokens - held_tokens)
        if means.prompt_tokens is None:
            means.prompt_tokens, means.computed = float(prompt_tokens), computed
        means.prompt_tokens += SMOOTHING * (prompt_tokens - means.prompt_tokens)
        means.computed += SMOOTHING * (computed - means.computed)

    def answered(self, model: str, tokens: int, *, is_cut: bool) -> None:
        """How long an answer was. One that was cut by its own limit before it was as long as others says nothing."""
        means = self._of(model)
        if is_cut and tokens < means.answer_tokens:
            return
        share = max(SMOOTHING, 1 / (_ASSUMED_ANSWERS + means.answers + 1))
        means.answer_tokens += share * (tokens - means.answer_tokens)
        means.answers += 1

    def answer_tokens(self, model: str) -> float:
        """How long an answer is expected to be, as far as its limit allows."""
        return self._means[model].answer_tokens if model in self._means else float(TYPICAL_ANSWER_TOKENS)

    def prompt_tokens(self, model: str) -> float | None:
        """How long the next prompt is expected to be; None before the first."""
        return self._means[model].prompt_tokens if model in self._means else None

    def typical(self, model: str, now_s: float) -> Typical | None:
        """All of it; None before enough came."""
        means = self._means.get(model)
        if means is None or means.arrived_s is None or means.prompt_tokens is None or means.gaps < _LEAST_GAPS:
            return None
        gap_s = means.gap_s + SMOOTHING * max(0.0, now_s - means.arrived_s - means.gap_s)  # nobody has come since
        tpot_s = means.tpot_s if means.limited > 0.5 else None
        return Typical(1 / max(gap_s, 1e-6), max(1.0, means.computed), means.answer_tokens, tpot_s)

    def _of(self, model: str) -> _Means:
        return self._means.setdefault(model, _Means())


def _mean(mean: float, sample: float, samples: int) -> float:
    """A running mean that counts its first samples alike."""
    return mean + max(SMOOTHING, 1 / (samples + 1)) * (sample - mean)
