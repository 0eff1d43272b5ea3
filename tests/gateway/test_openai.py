"""The dialect: what a body means, which field a bad one names, and the bytes of an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import pytest
from pydantic import ValidationError

from edge_llm.cluster.slo import Slo
from edge_llm.errors import (
    ContextTooLong,
    DeadlinePassed,
    EdgeLLMError,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    RemoteProtocolError,
    UnknownModel,
    WorkerUnreachable,
)
from edge_llm.gateway.openai import MAX_MESSAGES, MAX_PROMPT_IDS, MAX_PROMPTS, ROLES, Ask, parse
from edge_llm.gateway.shape import DONE, KEEP_ALIVE, Shape, Usage, error_body, error_headers, sse, together
from edge_llm.request import MAX_STOP_CHARS, MAX_STOP_STRINGS, SamplingParams

HELLO: Final = [{"role": "user", "content": "hello"}]
DRAWN_SEED: Final = 4711


def chat(mode_header: str | None = None, **fields: Any) -> Ask:
    body = {"messages": HELLO, **fields}
    return parse(json.dumps(body).encode(), is_chat=True, random_seed=lambda: DRAWN_SEED, mode_header=mode_header)


def completion(**fields: Any) -> Ask:
    body = {"prompt": "hello", **fields}
    return parse(json.dumps(body).encode(), is_chat=False, random_seed=lambda: DRAWN_SEED)


def refusal(made: Callable[[], Ask]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        made()
    return caught.value


# -- what a body means


def test_a_body_with_nothing_but_messages_has_the_documented_defaults() -> None:
    ask = chat()
    assert (ask.is_chat, ask.messages, ask.text, ask.ids) == (True, (("user", "hello"),), None, None)
    assert (ask.model, ask.max_tokens, ask.stop, ask.mode) == (None, None, (), "auto")
    assert (ask.is_stream, ask.wants_usage, ask.wants_progress) == (False, False, False)
    assert (ask.wants_token_ids, ask.ignores_stop_ids) == (False, False)
    assert ask.sampling == SamplingParams(seed=DRAWN_SEED)


def test_every_field_reaches_its_place() -> None:
    ask = chat(
        model="m",
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=7,
        n=1,
        temperature=0.5,
        top_p=0.25,
        top_k=40,
        min_p=0.125,
        repeat_penalty=1.5,
        frequency_penalty=-0.5,
        presence_penalty=0.75,
        repeat_last_n=-1,
        seed=12,
        stop=["a", "b"],
        logit_bias={"5": -100, "6": 1.5},
        return_progress=True,
        ignore_eos=True,
        edge_llm={"mode": "split", "return_token_ids": True},
    )
    assert (ask.model, ask.max_tokens, ask.stop, ask.mode) == ("m", 7, ("a", "b"), "split")
    assert ask.is_stream
    assert ask.wants_usage
    assert ask.wants_progress
    assert ask.wants_token_ids
    assert ask.ignores_stop_ids
    assert ask.sampling == SamplingParams(
        temperature=0.5,
        top_k=40,
        top_p=0.25,
        min_p=0.125,
        repeat_penalty=1.5,
        frequency_penalty=-0.5,
        presence_penalty=0.75,
        penalty_last_n=-1,
        seed=12,
        logit_bias={5: -100.0, 6: 1.5},
    )


def test_whole_numbers_are_good_where_numbers_are_wanted() -> None:
    assert chat(temperature=0, top_p=1).sampling == SamplingParams(temperature=0.0, top_p=1.0, seed=DRAWN_SEED)


def test_unknown_fields_are_ignored_and_null_means_not_given() -> None:
    names = (
        "model stream stream_options max_tokens max_completion_tokens n temperature top_p top_k min_p repeat_penalty "
        "frequency_penalty presence_penalty repeat_last_n seed stop logit_bias return_progress ignore_eos edge_llm"
    )
    nothing: dict[str, Any] = dict.fromkeys(names.split())
    assert chat(**nothing, user="u-1", metadata={"a": 1}, store=None) == chat()
    assert chat(stream_options={"include_usage": None}, edge_llm={"mode": None}) == chat()
    assert completion(echo=None, best_of=None) == completion()


def test_max_completion_tokens_is_the_newer_name_and_wins() -> None:
    assert chat(max_tokens=3, max_completion_tokens=5).max_tokens == 5
    assert chat(max_completion_tokens=5).max_tokens == 5


def test_the_header_chooses_the_mode_before_the_body_does() -> None:
    assert chat("local", edge_llm={"mode": "split"}).mode == "local"
    assert chat(None, edge_llm={"mode": "split"}).mode == "split"
    assert refusal(lambda: chat("fast")).param == "x-edge-llm-mode"


@pytest.mark.parametrize(("given", "used"), [(0, 0), (12, 12), ((1 << 63) - 1, (1 << 63) - 1), (-1, DRAWN_SEED)])
def test_a_seed_is_used_and_a_negative_one_asks_for_a_random_one(given: int, used: int) -> None:
    assert chat(seed=given).sampling.seed == used


@pytest.mark.parametrize(
    ("given", "used"), [("END", ("END",)), (["a", "b"], ("a", "b")), ([], ()), (["x"] * MAX_STOP_STRINGS, ("x",) * 16)]
)
def test_stop_is_a_string_or_a_short_list(given: object, used: tuple[str, ...]) -> None:
    assert chat(stop=given).stop == used


@pytest.mark.parametrize("role", ROLES)
def test_every_known_role_is_passed_on(role: str) -> None:
    assert chat(messages=[{"role": role, "content": "x"}]).messages == ((role, "x"),)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("plain", "plain"),
        ([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "one two"),
        ([], ""),
        ("ж\U0001f600", "ж\U0001f600"),
    ],
)
def test_content_is_text_or_parts_of_text(content: object, text: str) -> None:
    assert chat(messages=[{"role": "user", "content": content, "name": "n"}]).messages == (("user", text),)


def test_a_message_may_have_no_content_at_all() -> None:
    assert chat(messages=[{"role": "assistant", "tool_calls": []}]).messages == (("assistant", ""),)
    assert chat(messages=[{"role": "assistant", "content": None}]).messages == (("assistant", ""),)


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "system", "content": None}])
def test_who_says_something_says_it(message: dict[str, object]) -> None:
    error = refusal(lambda: chat(messages=[{"role": "user", "content": "x"}, message]))
    assert error.message == "messages[1].content is missing"
    assert error.param == "messages"


def test_a_field_that_edge_llm_does_not_have_is_a_mistake() -> None:
    error = refusal(lambda: completion(edge_llm={"mood": "split"}))
    assert (error.message, error.param) == ("edge_llm.mood: is no field of edge_llm", "edge_llm")
    assert "slo" in refusal(lambda: completion(edge_llm={"slo": {"ttft": 1}})).message


@pytest.mark.parametrize(
    ("prompt", "text", "ids"),
    [("one", "one", None), (["one"], "one", None), ([5, 6, 7], None, (5, 6, 7)), ("", "", None)],
)
def test_a_prompt_is_a_text_or_token_ids(prompt: object, text: str | None, ids: tuple[int, ...] | None) -> None:
    ask = completion(prompt=prompt)
    assert (ask.is_chat, ask.messages, ask.text, ask.ids) == (False, None, text, ids)


# -- what is refused

BAD_COMMON: Final[dict[str, list[object]]] = {
    "model": [5, ["m"]],
    "stream": ["yes", 1],
    "stream_options": [True, {"include_usage": "yes"}],
    "max_tokens": [0, -2, 1.5, "7", True, 1e300],
    "n_predict": [0, -2, 1.5, "7"],
    "max_completion_tokens": [0, -5, "7"],
    "n": [0, 2, "1"],
    "temperature": [-0.1, 100.5, "0.5", True, []],
    "top_p": [-0.1, 1.1, "1"],
    "top_k": [-2, 1.5, 1 << 31],
    "min_p": [-0.1, 1.1, False],
    "repeat_penalty": [0, 101, "1"],
    "frequency_penalty": [-2.1, 2.1, {}],
    "presence_penalty": [-2.1, 2.1, "0"],
    "repeat_last_n": [-2, 1 << 31, 1.5],
    "seed": [1.5, "1", 1 << 70],
    "repetition_penalty": [0, 101, "1"],
    "stop": [5, [1], ["x"] * (MAX_STOP_STRINGS + 1), "x" * (MAX_STOP_CHARS + 1)],
    "logit_bias": [[1], {"a": 1}, {"-1": 1}, {"5": "1"}, {"5": 101}, {"5": -100.5}, {"1_0": 1}],
    "return_progress": ["yes", 1],
    "ignore_eos": ["yes", 1],
    "edge_llm": ["split", {"mode": "fast"}, {"return_token_ids": 1}],
}
BAD_MESSAGES: Final[list[object]] = [
    [],
    None,
    "hello",
    ["hello"],
    [{}],
    [{"content": "no role"}],
    [{"role": "robot", "content": "x"}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": ["x"]}],
    [{"role": "user", "content": [{"text": "no type"}]}],
    [{"role": "user", "content": [{"type": "text", "text": 5}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
]
BAD_COMPLETION: Final[dict[str, list[object]]] = {
    "prompt": [
        None,
        [],
        5,
        {},
        [1, "a"],
        [1.5],
        [True],
        [-1],
        [1 << 31],
        ["a", 1],
        [[1, 2], []],
        ["a"] * (MAX_PROMPTS + 1),
        [[]],
        [[-1]],
        [[1.5]],
        [[[1]]],
    ],
    "echo": [True, "no"],
    "best_of": [2, "1"],
}


def pairs(*tables: dict[str, list[object]]) -> list[tuple[str, object]]:
    return [(name, value) for table in tables for name, values in table.items() for value in values]


def shown(value: object) -> str:
    return str(value)[:30] if isinstance(value, str | int | float) else json.dumps(value)[:40]


@pytest.mark.parametrize(("name", "value"), pairs(BAD_COMMON, {"messages": BAD_MESSAGES}), ids=shown)
def test_a_bad_field_of_a_chat_is_a_400_that_names_it(name: str, value: Any) -> None:
    error = refusal(lambda: chat(None, **{name: value}))
    assert (error.status, error.code, error.param) == (400, "invalid_request", name)
    assert name in error.message


@pytest.mark.parametrize(("name", "value"), pairs(BAD_COMMON, BAD_COMPLETION), ids=shown)
def test_a_bad_field_of_a_completion_is_a_400_that_names_it(name: str, value: object) -> None:
    error = refusal(lambda: completion(**{name: value}))
    assert (error.status, error.code, error.param) == (400, "invalid_request", name)
    assert name in error.message


def test_a_problem_deep_in_the_messages_is_named_with_its_place() -> None:
    good = {"role": "user", "content": "x"}
    assert "messages[1].role" in refusal(lambda: chat(messages=[good, {"role": "robot"}])).message
    assert "messages[1]" in refusal(lambda: chat(messages=[good, {**good, "content": [{"type": "audio"}]}])).message
    deep = refusal(lambda: chat(messages=[good, {**good, "content": [{"type": "text"}, {"type": 5}]}])).message
    assert deep.startswith("messages[1].content[1].type: ")
    assert refusal(lambda: chat(stop=["a", 5])).message.startswith("stop[1]: ")
    assert refusal(lambda: chat(messages=["hello"])).message == "messages[0]: must be an object"
    assert "64 bits" in refusal(lambda: chat(seed=1e30)).message


UNSUPPORTED: Final[list[tuple[str, object]]] = [
    ("logprobs", True),
    ("logprobs", 0),
    ("top_logprobs", 2),
    ("response_format", {"type": "json_object"}),
    ("response_format", "json"),
    ("suffix", "}"),
    ("grammar", 'root ::= "a"'),
    ("guided_json", {"type": "object"}),
    ("best_of", 2),
    ("echo", True),
    ("modalities", ["text", "audio"]),
    ("min_tokens", 5),
    ("stop_token_ids", [7]),
    ("bad_words", ["no"]),
    ("prompt_logprobs", 0),
    ("mirostat", 2),
    ("typical_p", 0.5),
    ("typ_p", 0.5),
    ("top_n_sigma", 1.0),
    ("chat_template", "{{ messages }}"),
    ("continue_final_message", True),
    ("truncate_prompt_tokens", 2),
    ("include_stop_str_in_output", True),
]


@pytest.mark.parametrize(("name", "value"), UNSUPPORTED)
def test_what_would_change_the_answer_and_cannot_be_had_is_refused_not_passed_over(name: str, value: object) -> None:
    for asked in (lambda: chat(None, **{name: value}), lambda: completion(**{name: value})):
        error = refusal(asked)
        assert error.param == name
        assert error.status == 400


TOOLS: Final = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}, {"name": "f"}, 5])
def test_a_call_of_a_tool_that_must_be_made_is_refused(choice: object) -> None:
    assert refusal(lambda: chat(tools=TOOLS, tool_choice=choice)).param == "tools"
    assert refusal(lambda: chat(functions=[{"name": "f"}], function_call=choice)).param == "functions"


def test_tools_that_the_model_may_leave_alone_are_passed_over_and_the_answer_can_say_so() -> None:
    for offered in ({"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "auto"}):
        assert chat(**offered) == replace(chat(), passed_over=("tools",))
    old = chat(functions=[{"name": "f"}], function_call="auto")
    assert old.passed_over == ("functions",)
    assert chat(tools=TOOLS, tool_choice="none").passed_over == chat(tools=[]).passed_over == ()


def test_a_chat_template_can_be_told_scalars_and_a_text_has_none() -> None:
    options = {"enable_thinking": False, "level": "low", "steps": 3}
    assert chat(chat_template_kwargs=options).template_options == options
    assert chat(chat_template_kwargs={}) == chat(chat_template_kwargs=None) == chat()
    assert refusal(lambda: completion(chat_template_kwargs=options)).param == "chat_template_kwargs"
    assert completion(chat_template_kwargs={}) == completion()


@pytest.mark.parametrize(
    "options",
    [
        {"messages": "x"},
        {"add_generation_prompt": False},
        {"strftime_now": "x"},
        {"a b": 1},
        {"list": [1]},
        {"object": {}},
        {"number": 1.5},
        {"huge": 1 << 40},
        {"long": "x" * 1025},
        {f"n{i}": i for i in range(17)},
        "enable_thinking",
    ],
    ids=str,
)
def test_what_a_chat_template_may_not_be_told_is_refused_by_name(options: object) -> None:
    assert refusal(lambda: chat(chat_template_kwargs=options)).param == "chat_template_kwargs"


def test_what_asks_for_nothing_unusual_is_passed_over() -> None:
    assert chat(tools=TOOLS, tool_choice="none") == chat()
    assert chat(tools=[], logprobs=False, top_logprobs=0, response_format={"type": "text"}) == chat()
    assert chat(response_format={}, top_n_sigma=-1.0, tfs_z=1, top_a=0, continue_final_message=False) == chat()
    assert chat(stop="") == chat(stop=[""]) == chat()
    assert completion(suffix="", best_of=1, echo=False) == completion()
    assert chat(modalities=["text"], min_tokens=0, stop_token_ids=[], typical_p=1.0, mirostat=0) == chat()


def test_a_least_length_is_refused_unless_the_answer_has_its_full_length_anyway() -> None:
    full = completion(ignore_eos=True, max_tokens=20)
    assert completion(ignore_eos=True, max_tokens=20, min_tokens=20) == full
    assert refusal(lambda: completion(ignore_eos=True, min_tokens=5, stop="x")).param == "min_tokens"


def test_a_long_list_of_stop_strings_is_refused_with_the_number_that_may_be() -> None:
    assert "at most 16 stop strings" in refusal(lambda: chat(stop=["a"] * 10_000)).message


def test_ids_in_a_list_of_one_prompt_are_that_prompt() -> None:
    assert completion(prompt=[[1, 2, 3]]).ids == (1, 2, 3)


def test_several_prompts_are_several_asks_that_differ_in_nothing_else() -> None:
    ask = completion(prompt=["a", "b"], max_tokens=3)
    assert (ask.text, [other.text for other in ask.others]) == ("a", ["b"])
    assert ask.others[0] == completion(prompt="b", max_tokens=3)
    assert [one.ids for one in completion(prompt=[[1, 2], [3]]).others] == [(3,)]
    assert refusal(lambda: completion(prompt=["a", "b"], stream=True)).param == "stream"


def test_other_servers_names_for_the_same_thing_are_known() -> None:
    assert chat(repetition_penalty=1.5) == chat(repeat_penalty=1.5)
    assert chat(n_predict=7) == chat(max_tokens=7)
    assert chat(max_tokens=-1) == chat(n_predict=-1) == chat()


def test_a_whole_number_may_be_written_with_a_point() -> None:
    assert chat(max_tokens=8.0, top_k=40.0, seed=1.0) == chat(max_tokens=8, top_k=40, seed=1)


def test_a_negative_top_k_is_off_as_vllms_clients_send_it() -> None:
    assert chat(top_k=-1).sampling.top_k == 0


def test_a_stream_of_two_prompts_and_two_answers_are_refused_with_a_way_out() -> None:
    assert "one each" in refusal(lambda: completion(prompt=["a", "b"], stream=True)).message
    assert "again" in refusal(lambda: chat(n=2)).message


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"nonsense", b'{"messages": NaN}', b"\xff\xfe", b'{"a": "\xff"}', b"[" * 100_000, b'{"a": "\\ud800"}'],
    ids=lambda data: repr(data[:12]),
)
def test_bytes_that_are_not_json_are_refused(data: bytes) -> None:
    error = refusal(lambda: parse(data, is_chat=True, random_seed=lambda: 0))
    assert "JSON" in error.message
    assert error.param is None


@pytest.mark.parametrize("data", [b"[]", b"5", b'"text"', b"null", b"true"])
def test_json_that_is_not_an_object_is_refused(data: bytes) -> None:
    for is_chat in (True, False):
        assert "object" in refusal(lambda: parse(data, is_chat=is_chat, random_seed=lambda: 0)).message  # noqa: B023


def test_messages_never_repeat_what_the_client_wrote_into_its_prompt() -> None:
    secret = {"role": "user", "content": [{"type": "text", "text": ["the secret"]}]}
    assert "secret" not in refusal(lambda: chat(messages=[secret])).message


# -- what an answer looks like

CHAT: Final = Shape("r1", 1_700_000_000, "m", is_chat=True)
TEXT: Final = Shape("r1", 1_700_000_000, "m", is_chat=False)
USAGE: Final = Usage(11, 5)
USAGE_JSON: Final = {
    "prompt_tokens": 11,
    "completion_tokens": 5,
    "total_tokens": 16,
    "prompt_tokens_details": {"cached_tokens": 0},
}


def event(data: bytes) -> dict[str, Any]:
    """The JSON of exactly one server-sent event."""
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    assert data.count(b"\n") == 2, "a line break inside an event would cut it in two"
    value: dict[str, Any] = json.loads(data.removeprefix(b"data: "))
    return value


def test_a_whole_chat_answer_has_openais_shape() -> None:
    assert CHAT.whole("hi", "stop", USAGE, {"prompt_n": 11}) == {
        "id": "chatcmpl-r1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "logprobs": None,
                "message": {"role": "assistant", "content": "hi"},
            }
        ],
        "usage": USAGE_JSON,
        "timings": {"prompt_n": 11},
    }


def test_a_whole_completion_has_openais_shape() -> None:
    whole = TEXT.whole("hi", "length", USAGE, {})
    assert (whole["id"], whole["object"]) == ("cmpl-r1", "text_completion")
    assert whole["choices"] == [{"index": 0, "finish_reason": "length", "logprobs": None, "text": "hi"}]
    assert whole["usage"] == USAGE_JSON


def test_answers_to_several_prompts_are_choices_of_one_body_in_order() -> None:
    bodies = [TEXT.whole("a", "stop", USAGE, {"prompt_n": 1}), TEXT.whole("b", "length", USAGE, {"prompt_n": 2})]
    body = together(bodies)
    assert [(one["index"], one["text"], one["timings"]["prompt_n"]) for one in body["choices"]] == [
        (0, "a", 1),
        (1, "b", 2),
    ]
    assert body["usage"] == (USAGE + USAGE).as_json()
    assert (body["id"], body["object"]) == ("cmpl-r1", "text_completion")


def test_chat_chunks_begin_with_the_role_and_end_with_the_reason() -> None:
    first, text, last = event(CHAT.first()), event(CHAT.text("hi\n\n")), event(CHAT.last("length", {"a": 1}))
    for chunk in (first, text, last):
        assert (chunk["id"], chunk["object"], chunk["model"]) == ("chatcmpl-r1", "chat.completion.chunk", "m")
        assert chunk["created"] == 1_700_000_000
    assert first["choices"] == [{"index": 0, "finish_reason": None, "delta": {"role": "assistant", "content": ""}}]
    assert text["choices"] == [{"index": 0, "finish_reason": None, "delta": {"content": "hi\n\n"}}]
    assert last["choices"] == [{"index": 0, "finish_reason": "length", "delta": {}}]
    assert last["timings"] == {"a": 1}
    assert "timings" not in first | text


def test_completion_chunks_carry_text() -> None:
    text, last = event(TEXT.text("hi")), event(TEXT.last("stop", {}))
    assert TEXT.first() == b"", "a completion has no role to announce"
    assert (text["id"], text["object"]) == ("cmpl-r1", "text_completion")
    assert text["choices"] == [{"index": 0, "finish_reason": None, "text": "hi"}]
    assert last["choices"] == [{"index": 0, "finish_reason": "stop", "text": ""}]


@pytest.mark.parametrize(("shape", "kind"), [(CHAT, "chat.completion.chunk"), (TEXT, "text_completion")])
def test_the_usage_chunk_has_no_choices(shape: Shape, kind: str) -> None:
    chunk = event(shape.usage(USAGE, {"a": 1}))
    assert (chunk["object"], chunk["choices"], chunk["usage"]) == (kind, [], USAGE_JSON)


@pytest.mark.parametrize(("shape", "empty"), [(CHAT, {"delta": {}}), (TEXT, {"text": ""})])
def test_progress_is_a_chunk_without_text(shape: Shape, empty: dict[str, object]) -> None:
    chunk = event(shape.progress(64, 128, 12.6))
    assert chunk["choices"] == [{"index": 0, "finish_reason": None, **empty}]
    assert chunk["prompt_progress"] == {"total": 128, "cache": 0, "processed": 64, "time_ms": 13}


def test_what_keeps_a_stream_alive_is_an_empty_line_which_is_no_event_and_nothing_to_who_strips_it() -> None:
    assert KEEP_ALIVE.strip() == b""
    assert DONE == b"data: [DONE]\n\n"
    assert event(sse({"a": "ж"})) == {"a": "ж"}


@pytest.mark.parametrize(
    ("error", "kind", "code", "param"),
    [
        (InvalidRequest("no", param="n"), "invalid_request_error", "invalid_request", "n"),
        (UnknownModel("no", param="model"), "invalid_request_error", "model_not_found", "model"),
        (ContextTooLong("no", param="messages"), "invalid_request_error", "context_length_exceeded", "messages"),
        (PayloadTooLarge("no"), "invalid_request_error", "payload_too_large", None),
        (Overloaded("no"), "unavailable_error", "overloaded", None),
        (WorkerUnreachable("no"), "unavailable_error", "worker_unreachable", None),
        (RemoteProtocolError("no"), "server_error", "protocol_error", None),
        (EdgeLLMError("no"), "server_error", "internal_error", None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_error_is_openais_error_object(error: EdgeLLMError, kind: str, code: str, param: str | None) -> None:
    assert error_body(error) == {"error": {"message": "no", "type": kind, "code": code, "param": param}}


@pytest.mark.parametrize(("wait_s", "header"), [(0.2, "1"), (1.0, "1"), (10.0, "10"), (2.6, "3")])
def test_who_may_come_back_is_told_when_in_whole_seconds(wait_s: float, header: str) -> None:
    assert error_headers(Overloaded("later", retry_after_s=wait_s)) == {"retry-after": header}


def test_only_what_may_work_later_has_a_time_to_retry() -> None:
    assert error_headers(WorkerUnreachable("gone")) == {"retry-after": "1"}
    assert error_headers(InvalidRequest("never")) == {}
    assert error_headers(EdgeLLMError("a bug")) == {}


def test_who_would_ask_again_for_an_answer_whose_time_is_over_is_told_not_to() -> None:
    assert error_headers(DeadlinePassed("late")) == {"x-should-retry": "false"}


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [1.5] * 200_000},
        {"prompt": [1] * 200_000 + ["a"]},
        {"prompt": [1] * (MAX_PROMPT_IDS + 1)},
        {"prompt": "a", "stop": [1] * 200_000},
        {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(100_000)), "x")},
        {"messages": [{}] * 200_000},
        {"messages": [{"role": "user", "content": [{}] * 200_000}]},
        {"messages": [{"role": "user", "content": "a"}] * (MAX_MESSAGES + 1)},
        {"messages": [{"role": "user", "content": [{"type": "text"}] * 100}] * 100},
        {"prompt": "a", "edge_llm": dict.fromkeys(map(str, range(100_000)), 0)},
        {"prompt": "a", "edge_llm": {"slo": dict.fromkeys(map(str, range(100_000)), 0)}},
    ],
    ids=lambda body: f"{next(iter(body))}-{list(body)[-1]}-{str(body)[:30]}",
)
def test_a_long_wrong_list_costs_one_error_not_one_for_each_item(body: dict[str, Any]) -> None:
    """Counted, not timed: a body of 7 MiB once kept the gateway for 28 s."""
    error = refusal(lambda: chat(**body) if "messages" in body else completion(**body))
    assert isinstance(error.__cause__, ValidationError)
    assert error.__cause__.error_count() <= 4


def test_the_shorter_of_the_two_times_holds_and_none_is_none() -> None:
    def deadline_s(header: str | None, **vendor: float) -> float | None:
        body = json.dumps({"prompt": "x", "edge_llm": vendor}).encode()
        return parse(body, is_chat=False, random_seed=lambda: 0, timeout_header=header).deadline_s

    assert deadline_s(None) is None
    assert deadline_s("2.5") == 2.5
    assert deadline_s(None, deadline_s=3) == 3
    assert deadline_s("5", deadline_s=3) == 3
    assert deadline_s("2", deadline_s=3) == 2


@pytest.mark.parametrize("header", ["", "0", "-1", "1e3", "nan", "inf", "5s", "1 ", "86401", "1" * 400])
def test_a_time_that_is_no_number_of_seconds_is_refused_by_its_name(header: str) -> None:
    error = refusal(lambda: parse(b'{"prompt": "x"}', is_chat=False, random_seed=lambda: 0, timeout_header=header))
    assert error.param == "x-request-timeout-s"


@pytest.mark.parametrize("value", [0, -1, "5", True, 86_401])
def test_a_deadline_out_of_bounds_is_refused(value: object) -> None:
    assert refusal(lambda: completion(edge_llm={"deadline_s": value})).param == "edge_llm"


def test_a_request_may_name_its_limits_of_latency() -> None:
    assert completion().slo == Slo()
    assert completion(edge_llm={"slo": {"ttft_s": 2, "tpot_s": 0.1}}).slo == Slo(2.0, 0.1)
    assert completion(edge_llm={"slo": {"tpot_s": 0.1, "ttft_s": None}}).slo == Slo(None, 0.1)


@pytest.mark.parametrize("value", [0, -0.1, "1", True, 86_401, [1]])
@pytest.mark.parametrize("limit", ["ttft_s", "tpot_s"])
def test_limits_of_latency_out_of_bounds_are_refused(limit: str, value: object) -> None:
    error = refusal(lambda: completion(edge_llm={"slo": {limit: value}}))
    assert error.param == "edge_llm"
    assert f"slo.{limit}" in error.message
