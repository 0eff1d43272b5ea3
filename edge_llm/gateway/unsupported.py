"""What clients may ask for and this server cannot do: an answer without it would look like one with it.

Pure. Owns the list, of OpenAI's names and of those that llama-server and vLLM give to a form of the answer. Fields that
change nothing about the answer's meaning are passed over elsewhere (openai.py).

Tools that the model may call or leave alone are between both: an answer in words is one that was asked for, and chat
programs send tools with every request. They are passed over, and the answer says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from edge_llm.errors import InvalidRequest

_Asks = Callable[[Any, Mapping[str, Any]], bool]
_TOOLS: Final = ("tools", "functions")


def refuse_unsupported(body: Mapping[str, Any]) -> None:
    """Raises InvalidRequest that names the first field of `body` that cannot be served."""
    if (n := body.get("n")) not in (None, 1):
        raise InvalidRequest(f"n must be 1, got {n}: send the request again for another answer", param="n")
    for name, is_asked in _UNSUPPORTED.items():
        if (value := body.get(name)) is not None and is_asked(value, body):
            raise InvalidRequest(f"{name} is not supported: leave it out", param=name)


def passed_over(body: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of what was offered to the model and is not shown to it."""
    return tuple(name for name in _TOOLS if body.get(name) and _choice(body) != "none")


def _asks_for_a_call(value: Any, body: Mapping[str, Any]) -> bool:
    return bool(value) and _choice(body) not in (None, "auto", "none")


def _choice(body: Mapping[str, Any]) -> Any:
    choice = body.get("tool_choice")
    return body.get("function_call") if choice is None else choice


def _asks_for_a_form(value: Any, _body: Mapping[str, Any]) -> bool:
    return value != {} and not (isinstance(value, dict) and value.get("type") == "text")


def _asks_for_more_than_text(value: Any, _body: Mapping[str, Any]) -> bool:
    return value not in ([], ["text"])


def _asks_for_a_length(value: Any, body: Mapping[str, Any]) -> bool:
    """Load generators send it beside `ignore_eos`, which answers it: nothing but max_tokens ends those."""
    return value != 0 and not (body.get("ignore_eos") is True and not body.get("stop"))


def _asks_for_sigma(value: Any, _body: Mapping[str, Any]) -> bool:
    """llama.cpp's: off at zero and below."""
    return not isinstance(value, int | float) or value > 0


def _asks_for_a_template(value: Any, body: Mapping[str, Any]) -> bool:
    """Of a text, which goes through none."""
    return bool(value) and "messages" not in body


def _is_given(value: Any, _body: Mapping[str, Any]) -> bool:
    return value is not False and value not in ("", [], {})


def _is_not(harmless: int) -> _Asks:
    return lambda value, _body: bool(value != harmless)


_UNSUPPORTED: Final[Mapping[str, _Asks]] = {
    **dict.fromkeys(_TOOLS, _asks_for_a_call),
    "response_format": _asks_for_a_form,
    "logprobs": _is_given,
    "top_logprobs": _is_not(0),
    "best_of": _is_not(1),
    **dict.fromkeys(("echo", "suffix", "audio", "grammar", "json_schema", "structured_outputs"), _is_given),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), _is_given),
    "modalities": _asks_for_more_than_text,
    **dict.fromkeys(("prompt_logprobs", "web_search_options", "chat_template"), _is_given),
    **dict.fromkeys(("stop_token_ids", "bad_words", "allowed_token_ids", "use_beam_search"), _is_given),
    "min_tokens": _asks_for_a_length,
    **dict.fromkeys(("mirostat", "dry_multiplier", "xtc_probability", "dynatemp_range"), _is_not(0)),
    "chat_template_kwargs": _asks_for_a_template,
    **dict.fromkeys(("continue_final_message", "truncate_prompt_tokens"), _is_given),
    **dict.fromkeys(("include_stop_str_in_output", "samplers"), _is_given),
    **dict.fromkeys(("typical_p", "typ_p", "tfs_z"), _is_not(1)),
    "top_n_sigma": _asks_for_sigma,
    "top_a": _is_not(0),
}
