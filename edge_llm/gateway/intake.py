"""From a parsed request to a job: what the caller may do, a place in the queue, token ids, room in the context.

Owns the order of these checks, the cheapest first: a request that is refused has cost no worker anything. Refuses to
know HTTP and what becomes of a job.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from edge_llm.cluster.slo import Slo
from edge_llm.cluster.view import ClusterView, Node
from edge_llm.config import GatewayConfig
from edge_llm.errors import (
    ContextTooLong,
    DeadlinePassed,
    InvalidRequest,
    ModelNotAllowed,
    Overloaded,
    ShuttingDown,
    UnknownModel,
)
from edge_llm.gateway.dispatch import Dispatcher
from edge_llm.gateway.keys import ANYBODY, ApiKey
from edge_llm.gateway.limits import Limits
from edge_llm.gateway.openai import Ask
from edge_llm.gateway.queue import Demand, Place
from edge_llm.gateway.running import Job, Running
from edge_llm.gateway.tokenizing import Tokenizers
from edge_llm.worker.messages import ChatMessage, TokenizeReply, TokenizeRequest

# Before a prompt is tokenized it is taken for short: real text has 3 to 5 bytes a token, and a refusal on an estimate
# must not hit who would be let in.
_BYTES_PER_TOKEN: Final = 8
# Most answers are no longer than so many times the mean.
_MOST_ANSWERS: Final = 4
# A list of ids as it waits: a pointer and a number object each.
_BYTES_PER_ID: Final = 36
# Where nobody waits, a request is on its way to its worker before its client's headers are made, which take longer: a
# turn of the loop for its task, one for the HTTP client's writer.
HANDING_TURNS: Final = 2


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, by which name its request goes, and the trace it belongs to (W3C traceparent, or empty)."""

    key: ApiKey = ANYBODY
    request_id: str = ""
    trace: str = ""


class Intake:
    """What new requests of this gateway have to pass."""

    def __init__(
        self, config: GatewayConfig, dispatcher: Dispatcher, tokenizers: Tokenizers, clock: Callable[[], float]
    ) -> None:
        self._config, self._dispatcher, self._tokenizers, self._clock = config, dispatcher, tokenizers, clock
        self._limits = Limits()
        self._closes_s: float | None = None

    @property
    def is_open(self) -> bool:
        return self._closes_s is None

    def close(self, within_s: float) -> None:
        """Refuse everything new: the gateway ends `within_s` from now."""
        self._closes_s = self._clock() + within_s

    def models(self, key: ApiKey) -> tuple[str, ...]:
        """The models that `key` may use, of those that are served."""
        return tuple(model for model in self._dispatcher.view.models if key.may_use(model))

    def check_open(self) -> None:
        """Raises ShuttingDown when nothing new is taken."""
        if self._closes_s is not None:
            left_s = max(1.0, self._closes_s - self._clock())
            raise ShuttingDown("this gateway is stopping", retry_after_s=math.ceil(left_s))

    def arrive(
        self, caller: Caller, ask: Ask, job_id: str, body_bytes: int, arrived_s: float, *, is_new: bool = True
    ) -> Arrival:
        """Let a request in, or raise what refuses it. `job_id` is new; `arrived_s` on the clock. `is_new`: not one more
        prompt of a request that was let in."""
        now_s = self._clock()
        if is_new:
            self.check_open()
        wanted_s = ask.deadline_s or self._config.default_deadline_s
        deadline_s = arrived_s + wanted_s if wanted_s else None
        if deadline_s is not None and deadline_s <= now_s:
            raise DeadlinePassed("the request's time was over before it was read")
        model = self._model(ask.model, caller.key)
        wanted_tokens = ask.max_tokens or self._config.default_max_tokens
        demand = Demand(
            request_id=job_id,
            key=caller.key.id,
            model=model,
            prompt_tokens=len(ask.ids) if ask.ids is not None else body_bytes // _BYTES_PER_TOKEN,
            max_tokens=min([wanted_tokens, *_contexts(self._dispatcher.view, model)[-1:]]),
            mode=ask.mode,
            held_bytes=body_bytes,
            deadline_s=deadline_s,
        )
        self._limits.arrive(caller.key, job_id, now_s)
        try:
            place = self._dispatcher.enter(demand)
        except Overloaded:
            self._limits.leave(caller.key, job_id, 0)
            raise
        slo = ask.slo.or_else(Slo(self._config.slo_ttft_s, self._config.slo_tpot_s))
        return Arrival(self._dispatcher, self._tokenizers, self._limits, self._clock, caller, ask, demand, place, slo)

    def _model(self, wanted: str | None, key: ApiKey) -> str:
        """The model asked for; none named means the only one."""
        models = self._dispatcher.view.models
        if not models:
            raise Overloaded("no worker answers: models are still loading, or all workers are gone", retry_after_s=2.0)
        if wanted is not None and not key.may_use(wanted):
            raise ModelNotAllowed(f"the API key {key.id} may not use the model {wanted!r}", param="model")
        allowed = self.models(key)
        if wanted is None:
            if not allowed:
                raise ModelNotAllowed(f"the API key {key.id} may use none of the models here", param="model")
            if len(allowed) > 1:
                raise InvalidRequest(f"several models are served, name one of {', '.join(allowed)}", param="model")
            return allowed[0]
        if wanted not in models:
            known = ", ".join(allowed) or "none that this key may use"
            raise UnknownModel(f"no worker serves the model {wanted!r}; served are: {known}", param="model")
        return wanted


class Arrival:
    """A request that was let in: what it holds of the queue and of its key's limits until the block is left."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        tokenizers: Tokenizers,
        limits: Limits,
        clock: Callable[[], float],
        caller: Caller,
        ask: Ask,
        demand: Demand,
        place: Place,
        slo: Slo,
    ) -> None:
        self._dispatcher, self._tokenizers, self._limits, self._clock = dispatcher, tokenizers, limits, clock
        self._caller, self._ask, self._demand, self._place = caller, ask, demand, place
        self._unused_tokens, self._slo = 0, slo

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dispatcher.leave(self._place)
        self._limits.leave(self._caller.key, self._demand.request_id, self._unused_tokens)

    async def job(self) -> tuple[Job, Node]:
        """Tokenize, check against the model's context and the key's tokens, fill in defaults."""
        ask, model = self._ask, self._demand.model
        if ask.messages is not None:
            chat = [ChatMessage(role=role, content=text) for role, text in ask.messages]  # type: ignore[arg-type]
            request = TokenizeRequest(messages=chat, template_options=dict(ask.template_options))
        else:
            request = TokenizeRequest(text=ask.text or "")
        node, reply = await self._tokenized(request)
        ids = ask.ids if ask.ids is not None else tuple(reply.ids)
        if not ids:
            raise InvalidRequest("the prompt is empty: send at least one token", param="prompt")
        if max(ids) >= node.status.vocab_size:
            raise InvalidRequest(
                f"token id {max(ids)} is outside the vocabulary of {node.status.vocab_size}", param="prompt"
            )
        max_tokens = self._max_tokens(len(ids))
        self._limits.reserve(self._caller.key, self._demand.request_id, len(ids) + max_tokens, self._clock())
        self._unused_tokens = len(ids) + max_tokens
        job = Job(
            request_id=self._demand.request_id,
            model=model,
            prompt_ids=ids,
            max_tokens=max_tokens,
            sampling=ask.sampling,
            stop=ask.stop,
            stop_ids=() if ask.ignores_stop_ids else tuple(reply.stop_ids),
            mode=ask.mode,
            cache_prompt=ask.cache_prompt,
            key=self._caller.key.id,
            tenant=self._caller.key.tenant,
            deadline_s=self._demand.deadline_s,
            trace=self._caller.trace,
            held_bytes=self._demand.held_bytes + _BYTES_PER_ID * len(ids),
            slo=self._slo,
        )
        return job, node

    async def _tokenized(self, request: TokenizeRequest) -> tuple[Node, TokenizeReply]:
        """Within the request's time."""
        deadline_s = self._demand.deadline_s
        left_s = None if deadline_s is None else max(0.0, deadline_s - self._clock())
        try:
            async with asyncio.timeout(left_s):
                return await self._tokenizers.tokenize(self._demand.model, request, self._caller.trace)
        except TimeoutError as late:
            raise DeadlinePassed("the request's time was over before a worker had tokenized its prompt") from late

    @asynccontextmanager
    async def running(self, job: Job, arrived_s: float) -> AsyncIterator[Running]:
        """Run the job from this place on. Raises what refuses it at once."""
        async with self._dispatcher.running(job, self._place, arrived_s) as running:
            try:
                for _ in range(HANDING_TURNS):
                    await asyncio.sleep(0)
                yield running
            finally:
                if running.plan is not None:
                    self._unused_tokens = job.max_tokens - len(running.session.delivered)

    def _max_tokens(self, prompt_tokens: int) -> int:
        ask, model = self._ask, self._demand.model
        contexts = _contexts(self._dispatcher.view, model)
        if not contexts:
            raise Overloaded(f"no worker that decodes {model} is ready", retry_after_s=2.0)
        n_ctx = contexts[-1]
        room = n_ctx - prompt_tokens
        if room < 1:
            raise ContextTooLong(
                # these words are what client libraries know an overflow by
                f"this model's maximum context length is {n_ctx} tokens; the prompt for {model} has {prompt_tokens}",
                param="messages" if ask.is_chat else "prompt",
            )
        if ask.max_tokens and ask.ignores_stop_ids and ask.max_tokens > room:  # who measures wants that length
            raise ContextTooLong(
                f"this model's maximum context length is {n_ctx} tokens; the prompt has {prompt_tokens}, max_tokens is "
                f"{ask.max_tokens}",
                param="max_tokens",
            )
        if ask.max_tokens is None:  # a length that nobody asked for keeps no worker out that has room for most answers
            most = min(self._demand.max_tokens, _MOST_ANSWERS * self._dispatcher.planner.typical_answer(model))
            room = next((one - prompt_tokens for one in contexts if one - prompt_tokens >= most), room)
        return min(self._demand.max_tokens, room)


def _contexts(view: ClusterView, model: str) -> list[int]:
    """Of the workers that decode it now, the longest last."""
    return sorted({node.status.n_ctx for node in view.ready(model) if node.decodes})
