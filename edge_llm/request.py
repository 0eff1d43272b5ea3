"""What a generation is: prompt ids, sampling, limits, and the token events that answer it.

Owns the words every part shares. Stdlib only; knows neither engine nor network.
Invariant: everything here is frozen, and a request plus the tokens delivered so far
determine every later token (at level `exact`), wherever it runs.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

from edge_llm.errors import InvalidRequest

FinishReason = Literal["stop", "length", "cancelled", "error"]
MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARS: Final = 256
SEED_BITS: Final = 64
TemplateOption = bool | int | str
"""What a chat template is told beside the messages."""
NO_OPTIONS: Final[Mapping[str, TemplateOption]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one token is drawn. Order: bias, penalties, then top-k, top-p, min-p, temperature, one draw.

    `temperature` 0 means greedy. `top_k` 0, `top_p` 1, `min_p` 0, `repeat_penalty` 1 and penalties 0 are off.
    `penalty_last_n` is the number of latest tokens (prompt included) that penalties look at; -1 = all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    # the same, 64-bit ids and 32-bit floats, laid out once: it is added at every token
    bias_ids: array[int] = field(init=False, repr=False, compare=False)
    biases: array[float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_k", self.top_k, 0, 1 << 30)
        _within("top_p", self.top_p, 0.0, 1.0)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repeat_penalty", self.repeat_penalty, 0.01, 100.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("penalty_last_n", self.penalty_last_n, -1, 1 << 30)
        _within("seed", self.seed, 0, (1 << SEED_BITS) - 1)
        for token, bias in self.logit_bias.items():
            _within(f"logit_bias[{token}]", bias, -100.0, 100.0)
        object.__setattr__(self, "bias_ids", array("q", self.logit_bias))
        object.__setattr__(self, "biases", array("f", self.logit_bias.values()))


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer to produce: `prompt_ids`, then up to `max_tokens` generated tokens.

    `delivered_ids` are generated tokens the client already has (a resumed request): they are part of the
    context, never emitted again; events continue at index `len(delivered_ids)`.
    `stop_ids` end the answer without being part of its text (end-of-generation tokens).
    `tpot_s` is a limit that prompts read beside it leave room for; None: there is none. `age_s`: for how long the
    client has had the first of the delivered tokens, where it has a limit. Neither changes a token.
    """

    request_id: str
    epoch: int
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    delivered_ids: tuple[int, ...] = ()
    tpot_s: float | None = None
    age_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise InvalidRequest("the prompt is empty: send at least one token", param="prompt")
        if self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, got {self.max_tokens}", param="max_tokens")
        if len(self.delivered_ids) >= self.max_tokens:
            raise InvalidRequest("nothing left to generate: max_tokens were already delivered", param="max_tokens")
        check_stop(self.stop)

    @property
    def context_ids(self) -> tuple[int, ...]:
        """All ids whose KV must exist before the next token can be drawn."""
        return self.prompt_ids + self.delivered_ids

    @property
    def cells(self) -> int:
        """KV cells this answer can need: prompt + max_tokens."""
        return len(self.prompt_ids) + self.max_tokens


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Token `index` of a request's answer. Every token makes an event, also while its text is withheld.

    `text` is the text that became certain with this token (stop prefixes and cut UTF-8 are held back);
    `finish_reason` is set on the last event. A stop token or the token that completes a stop string is
    still an event (its id counts as generated), with the text before the stop.
    """

    request_id: str
    epoch: int
    index: int
    token_id: int
    text: str
    finish_reason: FinishReason | None = None


def check_stop(stop: Sequence[str]) -> None:
    """Raise InvalidRequest unless `stop` is a short list of short, non-empty strings."""
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"at most {MAX_STOP_STRINGS} stop strings, got {len(stop)}", param="stop")
    for text in stop:
        if not 0 < len(text) <= MAX_STOP_CHARS:
            raise InvalidRequest(f"a stop string has 1 to {MAX_STOP_CHARS} characters, got {len(text)}", param="stop")


def _within(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not math.isfinite(value) or not low <= value <= high:
        raise InvalidRequest(f"{name} must be between {low} and {high}, got {value}", param=name)
