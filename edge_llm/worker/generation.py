"""The engine's words for a message of the gateway.

Owns the translation, and the errors of what the message type cannot say.
"""

from __future__ import annotations

from edge_llm.errors import InvalidRequest
from edge_llm.request import Generation, SamplingParams
from edge_llm.worker.messages import DecodeRequest


def generation_of(request: DecodeRequest) -> Generation:
    """Raises InvalidRequest; bounds that the message type cannot say are checked by the classes it becomes."""
    s = request.sampling
    try:
        bias = {int(token): value for token, value in s.logit_bias.items()}
    except ValueError as error:
        raise InvalidRequest("logit_bias keys are token ids", param="logit_bias") from error
    sampling = SamplingParams(
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        repeat_penalty=s.repeat_penalty,
        frequency_penalty=s.frequency_penalty,
        presence_penalty=s.presence_penalty,
        penalty_last_n=s.penalty_last_n,
        seed=int(s.seed),
        logit_bias=bias,
    )
    return Generation(
        request_id=request.request_id,
        epoch=request.epoch,
        prompt_ids=tuple(request.prompt_ids),
        max_tokens=request.max_tokens,
        sampling=sampling,
        stop=tuple(request.stop),
        stop_ids=frozenset(request.stop_ids),
        delivered_ids=tuple(request.delivered_ids),
        tpot_s=request.tpot_s or None,
        age_s=request.age_s,
    )
