"""The public endpoint over a real socket, with a prefill and a decode worker behind it that only simulate the model.

All tests share one gateway: what one request leaves behind would be seen by the next test.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any, Final

import openai
import pytest

from edge_llm.engine.simulated import SimulatedSettings
from tests.gateway.conftest import CHAT, COMPLETIONS, HELLO, Reply, Service, asking, serving
from tests.loopback import CHUNK, Node, prompt_of, running_cluster, settings_of, undisturbed, until

pytestmark = pytest.mark.anyio
N_CTX: Final = settings_of("decode").n_ctx
MAX_BODY: Final = 64 << 10
LONG: Final = prompt_of(3 * CHUNK + 5)
WHOLE: Final = undisturbed(LONG, 8)
# what the simulated vocabulary makes of HELLO: "user: hello\nassistant:"
HELLO_TOKENS: Final = 22
OWN: Final[dict[str, type | tuple[type, ...]]] = {
    "mode": str,
    "prefill_node": str,
    "decode_node": str,
    "level": str,
    "queue_ms": float,
    "wait_ms": float,
    "prefill_ms": float,
    "handoff_ms": float,
    "adopt_ms": float,
    "handoff_bytes": int,
    "overlapped_bytes": int,
    "cached_tokens": int,
    "prefill_cached_tokens": int,
    "first_decode_ms": float,
    "ttft_ms": float,
    "fallback": (str, type(None)),
    "replanned": int,
}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One event loop for all tests here: they share one gateway."""
    return "asyncio"


@pytest.fixture(scope="module")
async def shared() -> AsyncIterator[tuple[Service, Node]]:
    async with running_cluster() as cluster, serving(cluster, max_body_bytes=MAX_BODY) as service:
        await service.start("prefill", "p1")
        yield service, await service.start("decode", "d1")


@pytest.fixture
def service(shared: tuple[Service, Node]) -> Iterator[Service]:
    yield shared[0]
    assert shared[0].gateway.dispatcher.requests == {}, "a request was left behind"
    decode = shared[1]
    assert decode.slots_free == decode.worker.facts.slots, "a slot was left behind"


# -- answers


async def test_a_chat_is_answered_whole(service: Service) -> None:
    reply = await service.post(CHAT, HELLO)
    assert reply.status == 200
    assert (reply.body["object"], reply.body["model"]) == ("chat.completion", "simulated")
    (choice,) = reply.body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] == "length"
    usage = reply.body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (HELLO_TOKENS, 8, 30)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_streamed_answer_says_the_same_as_a_whole_one(service: Service, path: str) -> None:
    body = HELLO if path == CHAT else asking(LONG)
    whole, streamed = await service.post(path, body), await service.stream(path, body)
    choice = whole.body["choices"][0]
    assert streamed.text == (choice["message"]["content"] if path == CHAT else choice["text"])
    assert streamed.finish_reasons == ["length"]
    assert streamed.is_done
    assert len({chunk["id"] for chunk in streamed.chunks}) == 1
    assert {chunk["model"] for chunk in streamed.chunks} == {"simulated"}
    assert all(choice["index"] == 0 for choice in streamed.choices)


async def test_a_streamed_chat_begins_with_the_role_and_says_it_once(service: Service) -> None:
    streamed = await service.stream(CHAT, HELLO)
    assert streamed.choices[0] == {"index": 0, "finish_reason": None, "delta": {"role": "assistant", "content": ""}}
    assert [choice for choice in streamed.choices if "role" in choice["delta"]] == streamed.choices[:1]
    assert streamed.choices[-1] == {"index": 0, "finish_reason": "length", "delta": {}}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_nothing_but_empty_lines_comes_before_the_first_token_and_the_headers_do_not_wait(path: str) -> None:
    """Load generators take the first chunk for the first token."""
    async with running_cluster() as cluster, serving(cluster, keep_alive_s=0.02) as service:
        await service.start("decode", "d1", SimulatedSettings(n_ctx=512, slots=1, decode_run_s=0.02))
        endless = asking(LONG, max_tokens=400, temperature=0)
        async with service.streaming(COMPLETIONS, endless) as running:
            await running.heard(lambda one: bool(one.text))
            async with service.streaming(path, HELLO if path == CHAT else asking(LONG)) as waiting:
                await waiting.heard(lambda one: one.keep_alives >= 2)
                assert (waiting.reply.status, waiting.chunks) == (200, [])
                running.reply.close()
                await waiting.heard(lambda one: bool(one.chunks))
                await waiting.whole()
    assert waiting.text


async def test_a_client_that_strips_each_piece_it_reads_hears_every_event() -> None:
    """As vLLM's bench reads streams (vllm/benchmarks/lib/endpoint_request_func.py): it glued a comment to what followed
    it, and dropped both."""
    async with running_cluster() as cluster, serving(cluster, keep_alive_s=0.01) as service:
        await service.start("decode", "d1", SimulatedSettings(n_ctx=512, slots=1, decode_run_s=0.03))
        body = {**asking(LONG), "stream": True}
        events, buffer, pieces = [], "", 0
        async with service.client.post(COMPLETIONS, json=body) as reply:
            async for piece in reply.content.iter_any():
                pieces += 1
                buffer += piece.strip().decode()
                *whole, buffer = buffer.split("\n\n")
                events += whole
                if buffer.startswith("data: ") and (buffer.endswith("}") or buffer == "data: [DONE]"):
                    events, buffer = [*events, buffer], ""
    assert (buffer, events[-1]) == ("", "data: [DONE]")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert len([chunk for chunk in chunks if chunk["choices"][0]["text"]]) > 1
    assert pieces > len(events), "it was kept alive meanwhile"
    assert chunks[-1]["timings"]["edge_llm"]["token_ids"] == WHOLE


async def test_several_prompts_are_answered_in_one_body_each_as_it_is_alone(service: Service) -> None:
    prompts = [LONG, LONG[:7], LONG[:3]]
    alone = [(await service.post(COMPLETIONS, asking(prompt))).body for prompt in prompts]
    body = (await service.post(COMPLETIONS, asking(prompts))).body
    assert [one["index"] for one in body["choices"]] == [0, 1, 2]
    assert [one["text"] for one in body["choices"]] == [one["choices"][0]["text"] for one in alone]
    assert body["usage"]["total_tokens"] == sum(one["usage"]["total_tokens"] for one in alone)
    assert [one["timings"]["prompt_n"] for one in body["choices"]] == [len(prompt) for prompt in prompts]


async def test_one_bad_prompt_of_several_refuses_the_request_and_leaves_nothing_running() -> None:
    async with running_cluster() as cluster, serving(cluster) as service:
        slow = SimulatedSettings(n_ctx=N_CTX, slots=2, decode_run_s=0.1)  # alone it would write for half a minute
        decode = await service.start("decode", "d1", slow)
        refused = await service.post(COMPLETIONS, asking([LONG, prompt_of(N_CTX)], max_tokens=N_CTX - len(LONG)))
        assert assert_refused(refused, 400, "prompt", "context_length_exceeded")["message"].startswith("prompt[1]: ")
        await until(lambda: service.gateway.dispatcher.is_idle and decode.slots_free == slow.slots)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_stream_tells_usage_only_when_asked(service: Service, path: str) -> None:
    body = HELLO if path == CHAT else asking(LONG)
    without = await service.stream(path, body)
    assert not [chunk for chunk in without.chunks if "usage" in chunk]
    asked = await service.stream(path, {**body, "stream_options": {"include_usage": True}})
    last = asked.chunks[-1]
    assert last["choices"] == []
    n = HELLO_TOKENS if path == CHAT else len(LONG)
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (n, 8)
    assert [chunk for chunk in asked.chunks if "usage" in chunk] == [last]
    assert asked.is_done


@pytest.mark.parametrize("mode", ["split", "local"])
async def test_the_tokens_are_the_engines_own_and_the_timings_say_how_they_came(service: Service, mode: str) -> None:
    for reply in (
        await service.post(COMPLETIONS, asking(LONG, mode)),
        await service.stream(COMPLETIONS, asking(LONG, mode)),
    ):
        own = reply.own
        assert own["token_ids"] == WHOLE
        assert own.keys() - {"token_ids"} == OWN.keys()
        assert all(isinstance(own[name], kind) for name, kind in OWN.items()), own
        assert (own["mode"], own["decode_node"], own["level"]) == (mode, "d1", "exact")
        assert own["prefill_node"] == ("p1" if mode == "split" else "d1")
        assert (own["handoff_bytes"] > 0) == (mode == "split")
        assert (own["fallback"], own["replanned"]) == (None, 0)
        times = [value for name, value in own.items() if name.endswith("_ms")]
        assert min(times) >= 0
        assert own["queue_ms"] <= own["ttft_ms"]


async def test_timings_count_tokens_in_the_way_of_llama_cpp(service: Service) -> None:
    timings = (await service.post(COMPLETIONS, asking(LONG))).body["timings"]
    assert (timings["prompt_n"], timings["predicted_n"], timings["cache_n"]) == (len(LONG), 8, 0)
    assert timings["prompt_per_second"] == pytest.approx(1e3 * len(LONG) / timings["prompt_ms"], rel=0.01)
    assert timings["predicted_per_second"] == pytest.approx(8e3 / timings["predicted_ms"], rel=0.01)


async def test_auto_decides_by_prediction_and_the_header_beats_the_body(service: Service) -> None:
    own = (await service.post(COMPLETIONS, asking(LONG, "auto"))).own
    (decision,) = (await service.get("/cluster")).body["decisions"][:1]
    assert (decision["mode"], decision["decode_node"]) == (own["mode"], own["decode_node"])
    assert decision["reason"] in ("sooner", "less_harm", "one_node")
    assert decision["predicted"]["ttft_s"] > 0
    assert decision["measured"]["ttft_s"] > 0
    assert decision["ttft_error_ratio"] > 0
    header = {"x-edge-llm-mode": "local"}
    assert (await service.post(COMPLETIONS, asking(LONG, "split"), header)).own["mode"] == "local"


async def test_token_ids_and_progress_come_only_when_asked_for(service: Service) -> None:
    body = {"prompt": LONG, "max_tokens": 4, "temperature": 0}
    plain = await service.stream(COMPLETIONS, body)
    assert "token_ids" not in plain.own
    assert not [chunk for chunk in plain.chunks if "prompt_progress" in chunk]
    asked = await service.stream(COMPLETIONS, {**body, "return_progress": True})
    seen = [chunk["prompt_progress"] for chunk in asked.chunks if "prompt_progress" in chunk]
    done = [progress["processed"] for progress in seen]
    assert done == sorted(done)
    assert {progress["total"] for progress in seen} == {len(LONG) - 1}
    assert asked.text == plain.text


async def test_a_seed_makes_an_answer_repeatable_and_none_makes_it_new(service: Service) -> None:
    body = asking(LONG, max_tokens=16) | {"temperature": 1.5}
    same = [(await service.post(COMPLETIONS, body | {"seed": 7})).own["token_ids"] for _ in range(2)]
    assert same[0] == same[1]
    free = [(await service.post(COMPLETIONS, body)).own["token_ids"] for _ in range(2)]
    assert free[0] != free[1]


async def test_a_stop_string_ends_the_answer_before_itself(service: Service) -> None:
    text = (await service.post(COMPLETIONS, asking(LONG, max_tokens=40))).body["choices"][0]["text"]
    stop = text[10:13]
    cut = text.index(stop)
    for wanted in (stop, ["never in there", stop]):
        reply = await service.post(COMPLETIONS, asking(LONG, max_tokens=40, stop=wanted))
        assert reply.body["choices"][0]["text"] == text[:cut]
        assert reply.body["choices"][0]["finish_reason"] == "stop"
        streamed = await service.stream(COMPLETIONS, asking(LONG, max_tokens=40, stop=wanted))
        assert (streamed.text, streamed.finish_reasons) == (text[:cut], ["stop"])


async def test_parts_of_text_are_read_as_one_message(service: Service) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    reply = await service.post(CHAT, {**HELLO, "messages": [{"role": "user", "content": parts}]})
    whole = await service.post(CHAT, HELLO)
    assert reply.body["choices"] == whole.body["choices"]
    assert reply.body["usage"] == whole.body["usage"]


async def test_an_answer_without_a_length_takes_no_more_than_the_room(service: Service) -> None:
    room = 5
    reply = await service.post(COMPLETIONS, {"prompt": prompt_of(N_CTX - room), "temperature": 0, "ignore_eos": True})
    assert reply.body["usage"]["completion_tokens"] == room


async def test_a_request_id_is_the_clients_or_a_new_one_and_answers_carry_it(service: Service) -> None:
    given = await service.post(CHAT, HELLO, {"x-request-id": "my-id.1"})
    assert given.headers["x-request-id"] == "my-id.1"
    assert given.body["id"] == "chatcmpl-my-id.1"
    again = await service.post(CHAT, HELLO, {"x-request-id": "my-id.1"})
    assert again.status == 200, "an id is a name for people, not a key"
    balancer = "Root=1-67891233-abcdef012345678912345678;Parent=53995c3f42cd8ad8"
    assert (await service.post(CHAT, HELLO, {"x-request-id": balancer})).body["id"] == f"chatcmpl-{balancer}"
    longest = "/" * 128
    assert (await service.post(CHAT, HELLO, {"x-request-id": longest})).headers["x-request-id"] == longest
    too_long = await service.post(CHAT, HELLO, {"x-request-id": longest + "/"})
    assert len(too_long.headers["x-request-id"]) == 16
    made = await service.post(CHAT, HELLO, {"x-request-id": "no spaces please"})
    assert len(made.headers["x-request-id"]) == 16
    assert made.body["id"] == f"chatcmpl-{made.headers['x-request-id']}"
    refused = await service.post(CHAT, {}, {"x-request-id": "my-id.2"})
    assert refused.headers["x-request-id"] == "my-id.2"
    async with service.streaming(CHAT, HELLO) as streamed:
        await streamed.whole()
        assert streamed.chunks[0]["id"] == f"chatcmpl-{streamed.reply.headers['x-request-id']}"


# -- refusals


async def good(service: Service) -> None:
    """The next request is answered as if nothing had happened."""
    reply = await service.post(COMPLETIONS, asking(LONG))
    assert reply.own["token_ids"] == WHOLE


def assert_refused(reply: Reply, status: int, param: str | None, code: str = "invalid_request") -> dict[str, Any]:
    assert (reply.status, reply.error["param"], reply.error["code"]) == (status, param, code), reply.body
    assert reply.error["type"] == "invalid_request_error"
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]
    return reply.error


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"model": "gpt-4"}, 404, "model", "model_not_found"),
        ({"messages": []}, 400, "messages", "invalid_request"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages", "invalid_request"),
        ({"messages": "hello"}, 400, "messages", "invalid_request"),
        ({"messages": None}, 400, "messages", "invalid_request"),
        ({"max_tokens": -2}, 400, "max_tokens", "invalid_request"),
        ({"max_tokens": "8"}, 400, "max_tokens", "invalid_request"),
        ({"max_tokens": N_CTX, "ignore_eos": True}, 400, "max_tokens", "context_length_exceeded"),
        ({"temperature": "warm"}, 400, "temperature", "invalid_request"),
        ({"temperature": 1000}, 400, "temperature", "invalid_request"),
        ({"n": 2}, 400, "n", "invalid_request"),
        ({"stop": [5]}, 400, "stop", "invalid_request"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", "invalid_request"),
        ({"stream": "yes"}, 400, "stream", "invalid_request"),
        ({"edge_llm": {"mode": "fast"}}, 400, "edge_llm", "invalid_request"),
        ({"messages": [{"role": "user", "content": "x" * N_CTX}]}, 400, "messages", "context_length_exceeded"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
async def test_a_bad_chat_is_refused_with_openais_error_and_the_next_request_is_served(
    service: Service, fields: dict[str, Any], status: int, param: str, code: str, is_stream: bool
) -> None:
    reply = await service.post(CHAT, {**HELLO, "stream": is_stream, **fields})
    assert_refused(reply, status, param, code)
    await good(service)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": None}, "prompt", "invalid_request"),
        ({"prompt": []}, "prompt", "invalid_request"),
        ({"prompt": ["a", "b"], "stream": True}, "stream", "invalid_request"),
        ({"prompt": [5, "a"]}, "prompt", "invalid_request"),
        ({"prompt": [259]}, "prompt", "invalid_request"),
        ({"prompt": [-1]}, "prompt", "invalid_request"),
        ({"prompt": prompt_of(N_CTX)}, "prompt", "context_length_exceeded"),
        ({"prompt": "x" * N_CTX}, "prompt", "context_length_exceeded"),
        ({"echo": True}, "echo", "invalid_request"),
        ({"best_of": 3}, "best_of", "invalid_request"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
async def test_a_bad_completion_is_refused_with_openais_error_and_the_next_request_is_served(
    service: Service, fields: dict[str, Any], param: str, code: str
) -> None:
    assert_refused(await service.post(COMPLETIONS, asking(LONG) | fields), 400, param, code)
    await good(service)


async def test_a_prompt_longer_than_the_context_is_told_both_numbers(service: Service) -> None:
    reply = await service.post(COMPLETIONS, asking(prompt_of(N_CTX + 40)))
    message = assert_refused(reply, 400, "prompt", "context_length_exceeded")["message"]
    assert str(N_CTX + 40) in message
    assert str(N_CTX) in message.replace(str(N_CTX + 40), "")
    reply = await service.post(COMPLETIONS, asking(LONG, max_tokens=N_CTX - len(LONG) + 1, ignore_eos=True))
    message = assert_refused(reply, 400, "max_tokens", "context_length_exceeded")["message"]
    for number in (len(LONG), N_CTX - len(LONG) + 1, N_CTX):
        assert str(number) in message
    fits = await service.post(COMPLETIONS, asking(prompt_of(N_CTX - 8)))
    assert fits.body["usage"]["total_tokens"] == N_CTX


@pytest.mark.parametrize("max_tokens", [None, N_CTX - 7, 1 << 62])
async def test_an_answer_ends_with_the_context_whatever_length_was_asked_for(
    service: Service, max_tokens: int | None
) -> None:
    prompt = prompt_of(N_CTX - 8)
    reply = await service.post(COMPLETIONS, {"prompt": prompt, "temperature": 0, "max_tokens": max_tokens})
    assert (reply.status, reply.body["choices"][0]["finish_reason"]) == (200, "length")
    assert reply.body["usage"]["total_tokens"] == N_CTX


async def test_a_length_that_nobody_asked_for_keeps_no_worker_out_that_has_room_for_an_answer() -> None:
    async with running_cluster() as cluster, serving(cluster) as service:
        for name, n_ctx in (("large", 1536), ("small", 768)):
            await service.start("mixed", name, replace(settings_of("mixed"), n_ctx=n_ctx))
        for prompt_tokens, total in ((20, 768), (300, 1536)):
            body = {"prompt": prompt_of(prompt_tokens), "ignore_eos": True}
            assert (await service.post(COMPLETIONS, body)).body["usage"]["total_tokens"] == total


async def test_tools_that_were_offered_and_not_shown_to_the_model_are_named_in_the_answer(service: Service) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    reply = await service.post(CHAT, {**HELLO, "tools": tools})
    assert reply.body["timings"]["edge_llm"]["passed_over"] == ["tools"]
    assert "passed_over" not in (await service.post(CHAT, HELLO)).body["timings"]["edge_llm"]


async def test_who_asks_for_a_route_that_is_not_here_is_told_those_that_are(service: Service) -> None:
    reply = await service.post("/v1/responses", {"model": "simulated", "input": "hello"})
    assert reply.status == 404
    assert "a client that asks for /v1/responses of itself" in reply.error["message"]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"messages": [}', b"\xff", b"[" * 20_000], ids=repr)
async def test_a_body_that_is_no_json_object_is_refused(service: Service, data: bytes) -> None:
    for path in (CHAT, COMPLETIONS):
        assert_refused(await service.post(path, data), 400, None)
    await good(service)


async def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(service: Service) -> None:
    body = json.dumps({**HELLO, "user": "u" * MAX_BODY}).encode()
    announced = await service.post(CHAT, body)
    error = assert_refused(announced, 413, None, "payload_too_large")
    assert str(MAX_BODY) in error["message"]

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 1000):
            yield body[at : at + 1000]

    async with service.client.post(CHAT, data=pieces(), headers={"content-type": "application/json"}) as reply:
        assert_refused(Reply(reply.status, reply.headers, await reply.json()), 413, None, "payload_too_large")
    await good(service)


async def test_unknown_paths_and_methods_are_refused_in_the_same_form(service: Service) -> None:
    assert "/v1/nothing" in assert_refused(await service.get("/v1/nothing"), 404, None)["message"]
    reply = await service.get(CHAT)
    assert_refused(reply, 405, None)
    assert reply.headers["allow"] == "POST"


# -- about the service


async def test_models_are_listed_with_what_a_client_wants_to_know(service: Service) -> None:
    listed = (await service.get("/v1/models")).body
    assert listed["object"] == "list"
    (entry,) = listed["data"]
    assert (entry["id"], entry["object"], entry["owned_by"]) == ("simulated", "model", "edge-llm")
    assert entry["meta"]["n_ctx"] == entry["max_model_len"] == N_CTX
    assert (entry["root"], entry["parent"]) == ("simulated", None)
    assert (await service.get("/v1/models/simulated")).body == entry
    assert_refused(await service.get("/v1/models/none/such"), 404, "model", "model_not_found")


async def test_the_cluster_is_shown_worker_by_worker(service: Service) -> None:
    await until(lambda: not any(node.status.load.sequences_running for node in service.gateway.dispatcher.view.nodes))
    body = (await service.get("/cluster")).body
    assert body["gateway"] == "gateway"
    assert body["requests"] == {}
    assert {node["worker"]: node["role"] for node in body["nodes"]} == {"p1": "prefill", "d1": "decode"}
    for node in body["nodes"]:
        assert (node["is_ready"], node["model"], node["level"]) == (True, "simulated", "exact")
        assert node["load"]["sequences_running"] == 0
    assert (await service.get("/healthz")).body == {"status": "ok"}
    for path in ("/readyz", "/health"):
        async with service.client.get(path) as reply:
            assert (reply.status, await reply.text()) == (200, "ready")
        async with service.client.head(path) as reply:
            assert reply.status == 200
    assert (await service.get("/v1/models/")).body == (await service.get("/v1/models")).body


# -- OpenAI's own client


@pytest.fixture(scope="module")
async def official(shared: tuple[Service, Node]) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{shared[0].url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_openais_client_reads_whole_answers(service: Service, official: openai.AsyncOpenAI) -> None:
    chat = await official.chat.completions.create(
        model="simulated", messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=0
    )
    ours = await service.post(CHAT, HELLO)
    assert chat.choices[0].message.content == ours.body["choices"][0]["message"]["content"]
    assert chat.choices[0].finish_reason == "length"
    assert chat.usage is not None
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (HELLO_TOKENS, 8)
    text = await official.completions.create(model="simulated", prompt=LONG, max_tokens=8, temperature=0)
    assert text.choices[0].text == (await service.post(COMPLETIONS, asking(LONG))).body["choices"][0]["text"]


async def test_openais_client_reads_streams(service: Service, official: openai.AsyncOpenAI) -> None:
    stream = await official.chat.completions.create(
        model="simulated",
        messages=[{"role": "user", "content": "hello"}],
        max_completion_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == (await service.stream(CHAT, HELLO)).text
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    pieces = await official.completions.create(
        model="simulated", prompt=LONG, max_tokens=8, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    parts = [piece.choices[0].text async for piece in pieces]
    assert "".join(parts) == (await service.stream(COMPLETIONS, asking(LONG))).text


async def test_openais_client_raises_its_own_errors(service: Service, official: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await official.completions.create(model="gpt-4", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as wrong:
        await official.completions.create(model="simulated", prompt="x", temperature=1000)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    assert [model.id async for model in official.models.list()] == ["simulated"]
    await good(service)
