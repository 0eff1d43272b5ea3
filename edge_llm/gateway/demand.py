"""What a model's requests are like: how often they come, how long prompts and answers are, which pace they ask for.

Pure: time is an argument. Owns running means of requests that come to this gateway. Refuses to know nodes and plans.

Two kinds: what is expected of the next request (`prompt_tokens`, `answer_tokens`), and what those that may be split are
like on average (`typical`), which is what nodes are arranged for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp, log
from typing import Final

from edge_llm.cluster.cost import TYPICAL_ANSWER_TOKENS
from edge_llm.cluster.slo import Slo

# About the last twenty requests of a model say how the next ones will be.
SMOOTHING: Final = 0.05
# Arrivals are counted over about so long: what came before a pause says nothing of what comes after it.
WINDOW_S: Final = 30.0
# What is assumed of answers before any came counts as much as so many of them: one is not typical of others.
_ASSUMED_ANSWERS: Final = 4
# After a pause in which nearly all were forgotten, counting begins anew.
_NEARLY_NONE: Final = 0.5
# Fewer arrivals in the window say nothing of how often requests come.
_LEAST_ARRIVALS: Final = 3.0
# A limit moves the mean no further than one of so many times, or that part of, what others ask for; outside these
# bounds all are the same, kept by any node or by none.
_ODD: Final = 4.0
_LEAST_S: Final = 1e-3
_MOST_TPOT_S: Final = 60.0
_MOST_TTFT_S: Final = 3600.0
# What is true of so many requests is typical.
_MOST: Final = 0.5


@dataclass(frozen=True, slots=True)
class Typical:
    """Requests that may be split: so many a second, each with a prompt of which so much has to be computed and so many
    tokens to answer. Of those that have a limit of time per token, `limited_share` of all, it is `tpot_s` on average;
    where most have one of the time to the first token it is `ttft_s`.
    """

    rate_per_s: float
    prompt_tokens: float
    answer_tokens: float
    tpot_s: float
    computed_tokens: float
    limited_share: float = 1.0
    ttft_s: float | None = None


@dataclass(slots=True)
class _Mean:
    """Of about the last twenty; the first ones count alike, and what is assumed before them as so many `samples`."""

    value: float = 0.0
    samples: int = 0

    def add(self, sample: float) -> None:
        self.samples += 1
        self.value += max(SMOOTHING, 1 / self.samples) * (sample - self.value)


@dataclass(slots=True)
class _Splittable:
    """Requests of one model that may be split. arrivals: of the window, older ones count less; log_tpot, log_ttft:
    means of logarithms."""

    prompt: _Mean = field(default_factory=_Mean)
    computed: _Mean = field(default_factory=_Mean)
    answer: _Mean = field(default_factory=_Mean)
    limited: _Mean = field(default_factory=_Mean)
    log_tpot: _Mean = field(default_factory=_Mean)
    hurried: _Mean = field(default_factory=_Mean)
    log_ttft: _Mean = field(default_factory=_Mean)
    arrivals: float = 0.0
    arrived_s: float = 0.0
    since_s: float | None = None

    def arrived(self, now_s: float) -> None:
        before = self.arrivals_at(now_s)
        if self.since_s is None or before < _NEARLY_NONE:  # a window that begins
            self.since_s, before = now_s, 0.0
        self.arrivals = before + 1.0
        self.arrived_s = now_s

    def arrivals_at(self, now_s: float) -> float:
        return self.arrivals * exp(-(now_s - self.arrived_s) / WINDOW_S) if self.arrivals else 0.0

    def rate_per_s(self, now_s: float) -> float | None:
        """None: too few came."""
        arrivals = self.arrivals_at(now_s)
        if self.since_s is None or arrivals < _LEAST_ARRIVALS:
            return None
        # of a window that is not full yet as much as there is of it
        return arrivals / (WINDOW_S * (1 - exp(-max(1.0, now_s - self.since_s) / WINDOW_S)))


def _limited(mean: _Mean, limit_s: float | None, most_s: float) -> None:
    """The limit of one. Once others are known odd ones hardly move the mean, however odd."""
    if not limit_s:
        return
    sample = log(min(max(limit_s, _LEAST_S), most_s))
    if mean.samples * SMOOTHING >= 1.0:
        sample = min(max(sample, mean.value - log(_ODD)), mean.value + log(_ODD))
    mean.add(sample)


@dataclass(slots=True)
class Demand:
    """All models' requests."""

    _prompts: dict[str, _Mean] = field(default_factory=dict)
    _answers: dict[str, _Mean] = field(default_factory=dict)
    _splittable: dict[str, _Splittable] = field(default_factory=dict)

    # -- what is expected

    def prompt_tokens(self, model: str) -> float | None:
        """How long the next prompt is expected to be; None before the first."""
        return self._prompts[model].value if model in self._prompts else None

    def answer_tokens(self, model: str) -> float:
        """How long an answer is expected to be, as far as its limit allows."""
        return self._of_answers(model).value

    # -- what happens

    def arrived(self, model: str, slo: Slo, now_s: float) -> None:
        """A request came that may be split, with these limits."""
        known = self._of(model)
        known.arrived(now_s)
        known.limited.add(float(slo.tpot_s is not None))
        known.hurried.add(float(slo.ttft_s is not None))
        _limited(known.log_tpot, slo.tpot_s, _MOST_TPOT_S)
        _limited(known.log_ttft, slo.ttft_s, _MOST_TTFT_S)

    def planned(self, model: str, prompt_tokens: int, held_tokens: int, *, may_split: bool) -> None:
        """A prompt is given to a worker that is believed to hold so many of its positions."""
        self._prompts.setdefault(model, _Mean()).add(prompt_tokens)
        if may_split:
            known = self._of(model)
            known.prompt.add(prompt_tokens)
            known.computed.add(prompt_tokens - held_tokens)

    def answered(self, model: str, tokens: int, *, is_cut: bool, may_split: bool) -> None:
        """How long an answer was. Of what is to be expected, one says nothing that was cut by its own limit before it
        was as long as others; what nodes had to do is what they did."""
        if may_split:
            self._of(model).answer.add(tokens)
        mean = self._of_answers(model)
        if not (is_cut and tokens < mean.value):
            mean.add(tokens)

    # -- what it is like

    def typical(self, model: str, now_s: float) -> Typical | None:
        """None before enough is known."""
        known = self._splittable.get(model)
        rate_per_s = known.rate_per_s(now_s) if known else None
        if known is None or rate_per_s is None:
            return None
        if not (known.prompt.samples and known.answer.samples and known.log_tpot.samples):
            return None
        return Typical(
            rate_per_s,
            known.prompt.value,
            max(1.0, known.answer.value),
            exp(known.log_tpot.value),
            max(1.0, known.computed.value),
            known.limited.value,
            exp(known.log_ttft.value) if known.hurried.value >= _MOST else None,
        )

    def _of(self, model: str) -> _Splittable:
        return self._splittable.setdefault(model, _Splittable())

    def _of_answers(self, model: str) -> _Mean:
        return self._answers.setdefault(model, _Mean(float(TYPICAL_ANSWER_TOKENS), _ASSUMED_ANSWERS))
