"""What the gateway counts agrees with what its clients saw; what it logs says which request, and no text of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Final

import pytest
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from edge_llm.exposition import VLLM_NAMES
from edge_llm.worker.messages import encode
from tests.gateway.conftest import CHAT, COMPLETIONS, Service, asking, serving
from tests.gateway.test_hostile_decode import broken, lying, prompted, tokens
from tests.loopback import CHUNK, Cluster, prompt_of, running_cluster, settings_of, undisturbed, until
from tests.scrapes import Families, scrape, value

pytestmark = pytest.mark.anyio
PROMPT: Final = prompt_of(3 * CHUNK + 5)
SLOW: Final = replace(settings_of("decode"), decode_run_s=0.005)
ONE_SLOT: Final = replace(SLOW, slots=1)


async def scraped(service: Service) -> Families:
    return await scrape(service.client, f"{service.url}/metrics")


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with running_cluster() as made:
        yield made


async def test_tokens_and_requests_are_those_that_clients_got(service: Service) -> None:
    await service.start("prefill", "p1")
    await service.start("decode", "d1")
    split = await service.stream(COMPLETIONS, asking(PROMPT, "split"))
    local = await service.post(COMPLETIONS, asking(PROMPT, "local", max_tokens=5))
    delivered = len(split.own["token_ids"]) + len(local.own["token_ids"])
    families = await scraped(service)
    of = {"model_name": "simulated", "role": "gateway", "node": "gateway"}
    assert value(families, "generation_tokens_total", **of) == delivered == 13
    assert value(families, "prompt_tokens_total", **of) == 2 * len(PROMPT)
    assert value(families, "request_success_total", finished_reason="length") == 2
    assert value(families, "time_to_first_token_seconds_count", **of) == 2
    assert value(families, "inter_token_latency_seconds_count", **of) == delivered - 2
    assert value(families, "request_handoff_time_seconds_count") == 1, "only one of them was split"
    for phase in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert value(families, f"{phase}_seconds_count", **of) == 2
    assert value(families, "request_prompt_tokens_sum") == 2 * len(PROMPT)
    assert value(families, "request_generation_tokens_sum") == delivered
    assert value(families, "route_decisions_total", mode="split") == 1
    assert value(families, "route_decisions_total", mode="local") == 1


async def test_durations_are_the_ones_that_the_answers_tell(service: Service) -> None:
    await service.start("prefill", "p1")
    await service.start("decode", "d1", SLOW)
    answer = await service.stream(COMPLETIONS, asking(PROMPT, "split"))
    own, families = answer.own, await scraped(service)
    for name, told_ms in {
        "time_to_first_token_seconds": own["ttft_ms"],
        "request_queue_time_seconds": own["queue_ms"],
        "request_prefill_time_seconds": own["wait_ms"] + own["prefill_ms"],
        "request_handoff_time_seconds": own["handoff_ms"],
    }.items():
        assert value(families, f"{name}_sum") == pytest.approx(told_ms / 1e3, abs=2e-6), name
    whole_s = value(families, "e2e_request_latency_seconds_sum")
    parts_s = value(families, "time_to_first_token_seconds_sum") + value(families, "request_decode_time_seconds_sum")
    assert whole_s == pytest.approx(parts_s)
    assert value(families, "inter_token_latency_seconds_sum") == pytest.approx(
        value(families, "request_decode_time_seconds_sum")
    )


async def test_a_lost_worker_is_one_replan_and_no_token_more(service: Service) -> None:
    nodes = [await service.start("decode", name, SLOW) for name in ("d1", "d2")]
    async with service.streaming(COMPLETIONS, asking(PROMPT, max_tokens=40)) as streamed:
        await streamed.heard(lambda streamed: len(streamed.chunks) >= 6)
        (busy,) = [node for node in nodes if node.slots_free < node.worker.facts.slots]
        busy.server.die()
        await streamed.whole()
    assert streamed.own["token_ids"] == undisturbed(PROMPT, 40)
    families = await scraped(service)
    assert value(families, "replans_total", reason="worker_unreachable") == streamed.own["replanned"] == 1
    assert value(families, "generation_tokens_total") == 40
    assert value(families, "prompt_tokens_total") == len(PROMPT)
    assert value(families, "time_to_first_token_seconds_count") == 1
    assert value(families, "request_success_total", finished_reason="length") == 1
    assert value(families, "cluster_nodes", worker_role="decode", state="ready") == 1


async def test_late_tokens_of_a_worker_that_was_given_up_are_counted_and_dropped(service: Service) -> None:
    async with lying(service, saying=lambda r: [prompted(r), tokens(r, 0), broken(r)]) as liar:
        honest = await service.start("decode", "honest", SLOW)
        async with service.streaming(COMPLETIONS, asking(prompt_of(CHUNK + 3), max_tokens=400)):
            await until(lambda: honest.slots_free < honest.worker.facts.slots)
            late = tokens(liar.requests[0], 1, 2, 3)
            liar.lines.put_nowait(encode(late) + b"\n")
            async with asyncio.timeout(5):
                while value(await scraped(service), "stale_tokens_total") < 3:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
    families = await scraped(service)
    assert value(families, "stale_tokens_total") == 3
    assert value(families, "replans_total", reason="engine_failed") == 1


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "nobody", "prompt": "a"}, 404, "model_not_found"),
        ({"prompt": "a", "max_tokens": 10_000, "ignore_eos": True}, 400, "context_length_exceeded"),
        ({"prompt": 5}, 400, "invalid_request"),
    ],
)
async def test_what_is_refused_is_counted_by_its_code(
    service: Service, body: dict[str, Any], status: int, code: str
) -> None:
    await service.start("decode", "d1")
    reply = await service.post(COMPLETIONS, body)
    assert (reply.status, reply.error["code"]) == (status, code)
    families = await scraped(service)
    assert value(families, "rejected_total", code=code) == 1
    assert not families["edge_llm_requests_failed"].samples
    assert not families["edge_llm_request_success"].samples


async def test_a_request_that_fails_after_it_was_accepted_is_a_failure_and_not_a_rejection(cluster: Cluster) -> None:
    async with serving(cluster, replan_limit=0) as service:
        await service.start("decode", "honest")
        async with lying(service, saying=lambda r: [prompted(r), tokens(r, 0), broken(r)]):
            reply = await service.post(COMPLETIONS, asking(prompt_of(CHUNK + 3)))
        assert reply.status == 503
        families = await scraped(service)
        assert value(families, "requests_failed_total", code="engine_failed") == 1
        assert not families["edge_llm_rejected"].samples


async def test_gauges_follow_requests_that_run_wait_and_leave(service: Service) -> None:
    await service.start("decode", "d1", ONE_SLOT)
    async with service.streaming(COMPLETIONS, asking(PROMPT, max_tokens=400)) as first:
        await first.heard(lambda streamed: len(streamed.chunks) >= 3)
        second = asyncio.create_task(service.post(COMPLETIONS, asking(PROMPT)))
        await until(lambda: service.requests("queued") == 1)
        await until(lambda: service.gateway.dispatcher.view.nodes[0].status.load.slots_free == 0)
        families = await scraped(service)
        assert (value(families, "num_requests_running"), value(families, "num_requests_waiting")) == (1, 1)
        assert value(families, "kv_cache_usage_ratio", model_name="simulated") == 1
    await second
    await until(lambda: service.gateway.dispatcher.view.nodes[0].status.load.slots_free == 1)
    families = await scraped(service)
    assert (value(families, "num_requests_running"), value(families, "num_requests_waiting")) == (0, 0)
    assert value(families, "kv_cache_usage_ratio") == 0
    assert value(families, "request_success_total", finished_reason="abort") == 1
    assert value(families, "request_success_total", finished_reason="length") == 1
    assert value(families, "e2e_request_latency_seconds_count") == 1, "an answer that was cut short has no length"


async def test_what_a_node_kept_is_a_hit(service: Service) -> None:
    node = await service.start("mixed", "m1", prefix_cache_bytes=1 << 20)
    await service.post(COMPLETIONS, asking(PROMPT))
    await until(lambda: node.worker.prefixes.used_bytes > 0)
    again = await service.post(COMPLETIONS, asking(PROMPT))
    families = await scraped(service)
    assert value(families, "prefix_cache_hits_total") == again.own["cached_tokens"] > 0
    assert value(families, "prefix_cache_queries_total") == 2 * (len(PROMPT) - 1)


async def test_types_are_what_their_meaning_needs_and_no_series_names_a_request(service: Service) -> None:
    await service.start("decode", "d1")
    reply = await service.post(COMPLETIONS, asking(PROMPT), {"x-request-id": "find-me"})
    assert reply.headers["x-request-id"] == "find-me"
    async with service.client.get("/metrics") as answer:
        assert "find-me" not in await answer.text()
    families = {name: family for name, family in (await scraped(service)).items() if name.startswith("edge_llm_")}
    for name, family in families.items():
        assert family.documentation, name
        kinds = {sample.name.removeprefix(name) for sample in family.samples}
        assert kinds <= {"counter": {"_total"}, "gauge": {""}, "histogram": {"_bucket", "_count", "_sum"}}[family.type]
        labels = {label for sample in family.samples for label in sample.labels}
        allowed = {"model_name", "role", "node", "le", "finished_reason", "code", "mode", "reason", "kind"}
        assert labels <= allowed | {"worker_role", "state"}, name
    types = {name.removeprefix("edge_llm_"): family.type for name, family in families.items()}
    assert types["num_requests_running"] == types["num_requests_waiting"] == types["kv_cache_usage_ratio"] == "gauge"
    assert types["prompt_tokens"] == types["generation_tokens"] == types["request_success"] == "counter"
    assert types["time_to_first_token_seconds"] == types["inter_token_latency_seconds"] == "histogram"
    widest = max(
        float(s.labels["le"])
        for s in families["edge_llm_time_to_first_token_seconds"].samples
        if "le" in s.labels and s.labels["le"] != "+Inf"
    )
    assert widest == 600, "a Pi reads a long prompt for minutes"


async def test_with_the_alias_a_dashboard_of_another_server_finds_its_names(cluster: Cluster) -> None:
    async with serving(cluster, metrics_alias="vllm") as service:
        await service.start("decode", "d1")
        await service.post(COMPLETIONS, asking(PROMPT))
        families = await scraped(service)
        assert {name for name in families if name.startswith("vllm:")} == set(VLLM_NAMES.values())
        for ours, theirs in VLLM_NAMES.items():
            assert families[theirs].type == families[ours].type
            assert [s.value for s in families[theirs].samples] == [s.value for s in families[ours].samples], theirs


async def test_without_it_there_are_none(service: Service) -> None:
    assert not [name for name in await scraped(service) if name.startswith("vllm:")]


# -- the log


async def test_every_line_of_a_request_says_which_and_none_has_its_text(service: Service) -> None:
    await service.start("prefill", "p1")
    await service.start("decode", "d1")
    secret = "xylophone"
    body = {"messages": [{"role": "user", "content": secret}], "max_tokens": 8, "edge_llm": {"mode": "split"}}
    with capture_logs(processors=[merge_contextvars]) as lines:
        reply = await service.post(CHAT, body, {"x-request-id": "trace-7"})
        await until(lambda: any(line["event"] == "prompt served" for line in lines))
    assert reply.status == 200
    events = {line["event"] for line in lines}
    assert {"accepted", "prompt served", "finished", "request over"} <= events, "gateway and both workers"
    for line in lines:
        assert str(line["request_id"]).startswith("trace-7."), line
        assert secret not in str(line)
    answer = reply.body["choices"][0]["message"]["content"]
    assert answer.strip()
    assert not [line for line in lines if answer in str(line)]
    (over,) = [line for line in lines if line["event"] == "request over"]
    assert (over["state"], over["finish_reason"], over["mode"]) == ("done", "length", "split")
    assert (over["prefill_node"], over["decode_node"], over["tokens"]) == ("p1", "d1", 8)
    assert over["ttft_s"] >= over["queue_s"] >= 0


# -- GET /cluster


async def test_the_cluster_shows_load_rates_boards_and_what_is_booked(service: Service) -> None:
    await service.start("prefill", "p1")
    await service.start("decode", "d1", SLOW)
    async with service.streaming(COMPLETIONS, asking(PROMPT, "split", max_tokens=400)) as streamed:
        await streamed.heard(lambda streamed: len(streamed.chunks) >= 3)
        body = (await service.get("/cluster")).body
    assert body["requests"] == {"decoding": 1}
    nodes = {node["worker"]: node for node in body["nodes"]}
    assert nodes["d1"]["booked"]["sequences"] == 1
    assert not nodes["p1"]["booked"], "its part is done"
    for node in nodes.values():
        assert {"cpu_share", "ram_share", "temperature_c", "throttled"} <= node["board"].keys()
        assert {"run_s", "token_s", "decode_samples"} <= node["load"]["rates"].keys()
        assert node["load"]["links"] == [] or node["worker"] == "d1"
        assert 0 <= node["seen_ago_s"] < 5
    assert "token_ids" not in str(body)


async def test_the_cluster_shows_each_decision_with_what_it_promised_and_what_came(service: Service) -> None:
    await service.start("prefill", "p1")
    await service.start("decode", "d1", SLOW)
    first = await service.post(COMPLETIONS, asking(PROMPT, "split"))
    await service.post(COMPLETIONS, asking(PROMPT, "local"))
    second, decision = (await service.get("/cluster")).body["decisions"]
    assert (second["mode"], second["reason"]) == ("local", "asked"), "the newest comes first"
    assert (decision["mode"], decision["reason"], decision["prompt_tokens"]) == ("split", "asked", len(PROMPT))
    assert (decision["prefill_node"], decision["decode_node"]) == ("p1", "d1")
    assert 0 < decision["measured"]["ttft_s"] <= first.own["ttft_ms"] / 1e3 + 1e-4
    assert decision["measured"]["completion_s"] > decision["measured"]["ttft_s"]
    judged = [entry["ttft_error_ratio"] for entry in (decision, second) if entry["ttft_error_ratio"] is not None]
    families = await scraped(service)
    assert value(families, "prediction_error_ratio_count", kind="ttft") == len(judged) > 0
    assert value(families, "prediction_error_ratio_sum", kind="ttft") == pytest.approx(sum(judged), rel=1e-3, abs=1e-4)
    paces = [entry["tpot_error_ratio"] for entry in (decision, second) if entry["tpot_error_ratio"] is not None]
    assert value(families, "prediction_error_ratio_count", kind="tpot") == len(paces) > 0
    assert value(families, "prediction_error_ratio_sum", kind="tpot") == pytest.approx(sum(paces), rel=1e-3, abs=1e-4)
    assert value(families, "route_decisions_total", mode="split", reason="asked") == 1
    assert value(families, "route_decisions_total", mode="local", reason="asked") == 1


async def test_a_node_that_does_the_other_pools_work_is_a_spill(service: Service) -> None:
    await service.start("prefill", "p1", replace(settings_of("prefill"), slots=1))
    reply = await service.post(COMPLETIONS, asking(PROMPT))
    assert reply.own["decode_node"] == "p1"
    body, families = (await service.get("/cluster")).body, await scraped(service)
    assert body["decisions"][0]["spills"] == ["p1"]
    assert body["pool_events"][0]["worker"] == "p1"
    assert value(families, "spills_total", pool="token") == 1
    assert value(families, "spills_total", pool="prompt") == 0
