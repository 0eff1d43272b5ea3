"""The OpenAI dialect, as it is asked: the JSON of /v1 -> our own words.

Pure. Owns every field name of a request. Unknown fields are ignored, wrong ones are 400s that name the field, and those
that would change the answer are refused by name (unsupported.py). What is answered: shape.py. Refuses to know workers
and sessions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from edge_llm.cluster.slo import NO_LIMITS, Slo
from edge_llm.errors import InvalidRequest
from edge_llm.gateway.unsupported import passed_over, refuse_unsupported
from edge_llm.request import NO_OPTIONS, SamplingParams, TemplateOption, check_stop

# Far beyond what contexts hold, and checked in a moment: a list is left at its first wrong item (fail_fast). Otherwise
# one body of 7 MiB kept the whole gateway for 28 s, making error messages.
MAX_PROMPT_IDS: Final = 1 << 20
MAX_MESSAGES: Final = 8192
MAX_PROMPTS: Final = 128
MAX_OUR_FIELDS: Final = 32
MAX_BIASES: Final = 4096
MAX_TEMPLATE_OPTIONS: Final = 16
MAX_DEADLINE_S: Final = 86_400.0
ROLES: Final = ("system", "user", "assistant", "tool", "developer")
# What a chat template is given whatever the request says.
_TEMPLATES_OWN: Final = frozenset(
    "messages tools functions tool_choice function_call bos_token eos_token add_generation_prompt raise_exception "
    "strftime_now".split()
)
_MAX_SEED: Final = (1 << 63) - 1
_SECONDS: Final = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
# what pydantic puts into the path of an error for the branch of a union; no field of ours has such a name
_BRANCH: Final = re.compile(r"str|list\[.*\]|\[key\]")


def _whole(value: object) -> object:
    """8.0 is 8: languages with one kind of number write it so."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53 else value


Whole = Annotated[StrictInt, BeforeValidator(_whole)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
TokenKey = Annotated[StrictStr, Field(pattern=r"^[0-9]{1,10}$")]
Bias = Annotated[float, Field(strict=True, ge=-100, le=100)]


class _Body(BaseModel):
    """Unknown fields are ignored: clients send many. Null means not given, as in OpenAI's schema."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: object) -> object:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


def _few(value: object) -> object:
    """Bounded before it is looked at: of a large mapping every entry would become an error of its own."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"at most {MAX_BIASES} tokens, got {len(value)}")
    return value


class _Part(_Body):
    type: StrictStr
    text: StrictStr = ""


class _Message(_Body):
    role: StrictStr
    content: StrictStr | Annotated[list[_Part], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = None


class _StreamOptions(_Body):
    include_usage: StrictBool = False


class _Ours(_Body):
    """Fields that no other server has: one that is unknown is a mistake, and would change nothing without a word."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, values: object) -> object:
        if isinstance(values, dict) and len(values) > MAX_OUR_FIELDS:  # every unknown one would become an error
            raise ValueError(f"has {len(values)} fields, and known are {', '.join(cls.model_fields)}")
        return values


class _Limits(_Ours):
    ttft_s: Annotated[Number, Field(gt=0, le=MAX_DEADLINE_S)] | None = None
    tpot_s: Annotated[Number, Field(gt=0, le=MAX_DEADLINE_S)] | None = None


class _Vendor(_Ours):
    mode: Literal["auto", "split", "local"] = "auto"
    return_token_ids: StrictBool = False
    deadline_s: Annotated[Number, Field(gt=0, le=MAX_DEADLINE_S)] | None = None
    slo: _Limits = _Limits()


class _Common(_Body):
    model: StrictStr | None = None
    stream: StrictBool = False
    stream_options: _StreamOptions | None = None
    max_tokens: Whole | None = None
    max_completion_tokens: Whole | None = None
    n_predict: Whole | None = None
    n: Whole | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Whole | None = None
    min_p: Number | None = None
    repeat_penalty: Number | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    repeat_last_n: Annotated[Whole, Field(ge=-1, le=1 << 30)] | None = None
    seed: Whole | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(fail_fast=True)] | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], BeforeValidator(_few)] | None = None
    return_progress: StrictBool = False
    ignore_eos: StrictBool = False
    cache_prompt: StrictBool = True
    edge_llm: _Vendor = _Vendor()


def _few_parts(messages: object) -> object:
    """Bounded over all messages before any is looked at: each part becomes an object of half a kilobyte."""
    given = messages[: MAX_MESSAGES + 1] if isinstance(messages, list) else []
    contents = (message.get("content") for message in given if isinstance(message, dict))
    parts = sum(len(content) for content in contents if isinstance(content, list))
    if parts > MAX_MESSAGES:
        raise ValueError(f"at most {MAX_MESSAGES} parts of content, got {parts}")
    return messages


def _few_options(options: object) -> object:
    """Bounded before any is looked at, and none takes the place of what the template is given by us."""
    if isinstance(options, dict):
        if len(options) > MAX_TEMPLATE_OPTIONS:
            raise ValueError(f"at most {MAX_TEMPLATE_OPTIONS} options, got {len(options)}")
        if taken := sorted(_TEMPLATES_OWN & options.keys()):
            raise ValueError(f"{taken[0]} cannot be set from outside")
    return options


_OptionName = Annotated[StrictStr, Field(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]{0,63}$")]
_Option = (
    StrictBool | Annotated[StrictInt, Field(ge=-(1 << 31), lt=1 << 31)] | Annotated[StrictStr, Field(max_length=1024)]
)


class _Chat(_Common):
    messages: Annotated[list[_Message], Field(max_length=MAX_MESSAGES, fail_fast=True), BeforeValidator(_few_parts)]
    chat_template_kwargs: Annotated[dict[_OptionName, _Option], BeforeValidator(_few_options)] = {}


_Ids = Annotated[list[StrictInt], Field(max_length=MAX_PROMPT_IDS, fail_fast=True)]


class _Completion(_Common):
    prompt: (
        StrictStr
        | _Ids
        | Annotated[list[StrictStr], Field(max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[_Ids], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    )
    echo: StrictBool = False
    best_of: Whole | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """A parsed request: exactly one of `messages`, `text` and `ids` is not None."""

    is_chat: bool
    model: str | None
    messages: tuple[tuple[str, str], ...] | None
    text: str | None
    ids: tuple[int, ...] | None
    max_tokens: int | None
    sampling: SamplingParams
    stop: tuple[str, ...]
    is_stream: bool
    wants_usage: bool
    wants_progress: bool
    wants_token_ids: bool
    ignores_stop_ids: bool
    cache_prompt: bool
    mode: Literal["auto", "split", "local"]
    deadline_s: float | None = None
    """Seconds from its arrival on for the whole answer."""
    slo: Slo = NO_LIMITS
    """Limits of latency that it names itself."""
    template_options: Mapping[str, TemplateOption] = field(default_factory=dict)
    """What the chat template is told beside the messages (`enable_thinking`)."""
    passed_over: tuple[str, ...] = ()
    """What it offers to the model that this server does not show it."""
    others: tuple[Ask, ...] = ()
    """The same of the other prompts of its request."""


def parse(
    data: bytes,
    *,
    is_chat: bool,
    random_seed: Callable[[], int],
    mode_header: str | None = None,
    timeout_header: str | None = None,
) -> Ask:
    """A request body as an Ask. Raises InvalidRequest that names the field.

    The headers are x-edge-llm-mode, which beats the body, and x-request-timeout-s: the shorter time holds.
    """
    try:
        values = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidRequest("the body must be a JSON object")
    try:
        body: _Chat | _Completion = _Chat.model_validate(values) if is_chat else _Completion.model_validate(values)
    except ValidationError as error:
        raise _first_problem(error) from error
    if mode_header is not None and mode_header not in ("auto", "split", "local"):
        raise InvalidRequest(f"x-edge-llm-mode is auto, split or local, not {mode_header!r}", param="x-edge-llm-mode")
    refuse_unsupported(values)
    ask = _ask(body, random_seed, mode_header, _seconds(timeout_header))
    return replace(ask, passed_over=over) if (over := passed_over(values)) else ask


def _seconds(header: str | None) -> float | None:
    """x-request-timeout-s as a number. Raises InvalidRequest."""
    if header is None:
        return None
    value = float(header) if _SECONDS.fullmatch(header) else 0.0
    if not 0 < value <= MAX_DEADLINE_S:
        name = "x-request-timeout-s"
        raise InvalidRequest(f"{name} is a number of seconds up to {MAX_DEADLINE_S:.0f}", param=name)
    return value


def _ask(
    body: _Chat | _Completion, random_seed: Callable[[], int], mode_header: str | None, timeout_s: float | None
) -> Ask:
    (text, ids), *others = _prompts(body) if isinstance(body, _Completion) else [(None, None)]
    mode: Any = mode_header or body.edge_llm.mode
    ask = Ask(
        is_chat=isinstance(body, _Chat),
        model=body.model,
        messages=_messages(body.messages) if isinstance(body, _Chat) else None,
        text=text,
        ids=ids,
        max_tokens=_max_tokens(body),
        sampling=_sampling(body, random_seed),
        stop=_stop(body.stop),
        is_stream=body.stream,
        wants_usage=body.stream_options is not None and body.stream_options.include_usage,
        wants_progress=body.return_progress,
        wants_token_ids=body.edge_llm.return_token_ids,
        ignores_stop_ids=body.ignore_eos,
        cache_prompt=body.cache_prompt,
        mode=mode,
        deadline_s=min((s for s in (timeout_s, body.edge_llm.deadline_s) if s is not None), default=None),
        slo=Slo(body.edge_llm.slo.ttft_s, body.edge_llm.slo.tpot_s),
        template_options=body.chat_template_kwargs if isinstance(body, _Chat) else NO_OPTIONS,
    )
    return replace(ask, others=tuple(replace(ask, text=text, ids=ids) for text, ids in others)) if others else ask


def _messages(messages: Sequence[_Message]) -> tuple[tuple[str, str], ...]:
    if not messages:
        raise InvalidRequest("messages is empty: send at least one message", param="messages")
    return tuple((_role(m.role, i), _content(m, i)) for i, m in enumerate(messages))


def _role(role: str, index: int) -> str:
    if role not in ROLES:
        raise InvalidRequest(
            f"messages[{index}].role is {role!r}; known roles are {', '.join(ROLES)}", param="messages"
        )
    return role


def _content(message: _Message, index: int) -> str:
    content = message.content
    if content is None:
        if message.role != "assistant":  # one that called a tool says nothing
            raise InvalidRequest(f"messages[{index}].content is missing", param="messages")
        return ""
    if isinstance(content, str):
        return content
    for part in content:
        if part.type != "text":
            raise InvalidRequest(
                f"messages[{index}] has a {part.type!r} part; only text is supported", param="messages"
            )
    return "".join(part.text for part in content)


_Prompt = tuple[str | None, tuple[int, ...] | None]


def _prompts(body: _Completion) -> list[_Prompt]:
    """Text or ids of each: a list of integers is one prompt, of anything else several."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [(prompt, None)]
    if not prompt:
        raise InvalidRequest("prompt is empty", param="prompt")
    if all(isinstance(item, int) for item in prompt):
        return [(None, _ids([item for item in prompt if isinstance(item, int)]))]
    if body.stream and len(prompt) > 1:
        raise InvalidRequest("several prompts are answered whole: leave stream out or send one each", param="stream")
    return [(None, _ids(item)) if isinstance(item, list) else (str(item), None) for item in prompt]


def _ids(ids: Sequence[int]) -> tuple[int, ...]:
    if not ids or min(ids) < 0 or max(ids) >= 1 << 31:
        raise InvalidRequest("prompt has no token id, or one out of range", param="prompt")
    return tuple(ids)


def _max_tokens(body: _Common) -> int | None:
    """Of the first of its names that is given; None: not said, or -1 as llama.cpp's clients say it."""
    given = ((name, getattr(body, name)) for name in ("max_completion_tokens", "max_tokens", "n_predict"))
    name, value = next((one for one in given if one[1] is not None), ("max_tokens", None))
    if value is None or value == -1:
        return None
    if value < 1:
        raise InvalidRequest(f"{name} must be at least 1, got {value}", param=name)
    return int(value)


def _sampling(body: _Common, random_seed: Callable[[], int]) -> SamplingParams:
    given = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "repeat_penalty": body.repeat_penalty if body.repeat_penalty is not None else body.repetition_penalty,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "penalty_last_n": body.repeat_last_n,
    }
    values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    # llama.cpp's clients send seed -1 for "choose one", vLLM's top_k -1 for "all"
    if values.get("top_k") == -1:
        values["top_k"] = 0
    seed = body.seed if body.seed is not None and body.seed >= 0 else random_seed()
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    return SamplingParams(**values, seed=seed & _MAX_SEED, logit_bias=bias)


def _stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    words = tuple(word for word in ((stop,) if isinstance(stop, str) else stop or ()) if word)
    check_stop(words)
    return words


_WORDS: Final = {
    "missing": "is missing",
    "extra_forbidden": "is no field of edge_llm",
    "model_type": "must be an object",
    "int_type": "must be an integer of at most 64 bits",
}


def _first_problem(error: ValidationError) -> InvalidRequest:
    """The first wrong field; where it may have several forms, the one that the value comes closest to."""
    problems = error.errors(include_url=False, include_input=False)
    name = str(problems[0]["loc"][0]) if problems[0]["loc"] else "body"
    problem = max((p for p in problems if p["loc"][:1] == problems[0]["loc"][:1]), key=lambda p: len(p["loc"]))
    parts = [part for part in problem["loc"] if not _BRANCH.fullmatch(str(part))]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    what = _WORDS.get(problem["type"], problem["msg"])
    return InvalidRequest(f"{path or name}: {what}", param=name)
