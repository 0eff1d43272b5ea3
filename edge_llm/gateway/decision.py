"""One plan as it was made, what it promised, and how it came out.

Pure. Owns the words for it in GET /cluster and in the log. Refuses to know how plans are made, and clocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from edge_llm.gateway.scheduler import Plan

# Of an entry, what is not known yet when it is logged.
UNTOLD: Final = frozenset({"ago_s", "measured", "ttft_error_ratio", "tpot_error_ratio"})


@dataclass(slots=True)
class Decision:
    """One plan, what it promised, and how it came out. Durations count from the plan; `held_tokens` of the prompt are
    believed to be kept where it is computed."""

    request_id: str
    tenant: str
    model: str
    at_s: float
    plan: Plan
    prompt_tokens: int
    answer_tokens: float
    held_tokens: int
    waited_s: float
    ttft_s: float | None = None
    completion_s: float | None = None
    tokens: int = 0

    @property
    def ttft_error_ratio(self) -> float | None:
        """What came to pass over what was predicted."""
        predicted = self.plan.prediction
        return self.ttft_s / predicted.ttft_s if self.ttft_s and predicted and predicted.ttft_s else None

    @property
    def tpot_error_ratio(self) -> float | None:
        """The same of the time per token after the first, however long the answer became."""
        predicted = self.plan.prediction
        if predicted is None or self.ttft_s is None or self.completion_s is None:
            return None
        promised_s = _per_token_s(predicted.ttft_s, predicted.completion_s, self.answer_tokens)
        measured_s = _per_token_s(self.ttft_s, self.completion_s, self.tokens)
        return measured_s / promised_s if measured_s and promised_s else None

    def entry(self, now_s: float) -> dict[str, Any]:
        """For GET /cluster and the log."""
        plan, predicted = self.plan, self.plan.prediction
        return {
            "request_id": self.request_id,
            "model": self.model,
            "ago_s": round(now_s - self.at_s, 3),
            "mode": plan.mode,
            "reason": plan.reason,
            "decode_node": plan.decode.worker,
            "prefill_node": plan.reader.worker,
            "spills": [node.worker for node, _ in plan.spills],
            "is_cross_class": plan.is_cross_class,
            "prompt_tokens": self.prompt_tokens,
            "held_tokens": self.held_tokens,
            "waited_s": round(self.waited_s, 4),
            "predicted": {
                "ttft_s": round(predicted.ttft_s, 4),
                "completion_s": round(predicted.completion_s, 4),
                "harm_s": round(predicted.harm_s, 4),
                "answer_tokens": round(self.answer_tokens, 1),
            }
            if predicted
            else None,
            "measured": {"ttft_s": _rounded(self.ttft_s), "completion_s": _rounded(self.completion_s)},
            "ttft_error_ratio": _rounded(self.ttft_error_ratio),
            "tpot_error_ratio": _rounded(self.tpot_error_ratio),
        }


def _per_token_s(ttft_s: float, completion_s: float, tokens: float) -> float | None:
    """Between two tokens of an answer; None of one that hardly has two."""
    return (completion_s - ttft_s) / (tokens - 1) if tokens >= 2 else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
