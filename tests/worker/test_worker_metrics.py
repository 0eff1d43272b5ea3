"""What a worker counts is what happened there: over real sockets, read as Prometheus reads it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from edge_llm.engine.engine import EngineFacts
from edge_llm.engine.simulated import SimulatedBackend
from edge_llm.exposition import VLLM_NAMES, Exposition
from edge_llm.worker.messages import Board, CancelRequest
from edge_llm.worker.metrics import Readings, WorkerMetrics
from edge_llm.worker.pull import Patience
from edge_llm.worker.readings import about_node, consumed
from tests import scrapes
from tests.loopback import CHUNK, Cluster, HeldBackend, Node, prompt_of, running_cluster, settings_of, until
from tests.scrapes import Families, families_of, value

pytestmark = pytest.mark.anyio
PROMPT = prompt_of(3 * CHUNK + 5)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with running_cluster() as made:
        yield made


async def scrape(cluster: Cluster, node: Node) -> Families:
    return await scrapes.scrape(cluster.session, f"http://{node.peer.address}/metrics")


async def test_a_hand_off_is_counted_where_it_leaves_and_where_it_arrives(cluster: Cluster) -> None:
    prefill, decode = await cluster.start("prefill", "p1"), await cluster.start("decode", "d1")
    answer = await (await cluster.gateway.ask(decode.peer, PROMPT, [prefill.peer], max_tokens=6)).over()
    at_p, at_d = await scrape(cluster, prefill), await scrape(cluster, decode)
    computed = len(PROMPT) - 1
    assert value(at_p, "prompt_tokens_total", role="prefill", node="p1", model_name="simulated") == computed
    assert value(at_d, "prompt_tokens_total") == 0
    assert value(at_p, "generation_tokens_total") == 0
    assert value(at_d, "generation_tokens_total", role="decode", node="d1") == len(answer.ids) == 6
    assert value(at_d, "decode_rows_total") == value(at_d, "decode_steps_total") == 6
    arrived = value(at_d, "handoff_bytes_total", direction="in")
    assert arrived == answer.report.handoff_bytes > 0
    assert value(at_p, "handoff_bytes_total", direction="out") > arrived, "frames carry more than KV"
    assert value(at_d, "handoffs_total", outcome="ok") == value(at_d, "handoff_seconds_count") == 1
    assert value(at_d, "link_round_trip_seconds", peer="p1", node="d1") > 0
    assert value(at_d, "handoff_seconds_sum") == pytest.approx(answer.report.handoff_ms / 1e3)


async def test_a_prompt_that_nobody_could_give_counts_as_a_fallback(cluster: Cluster) -> None:
    prefill, decode = await cluster.start("prefill", "p1"), await cluster.start("decode", "d1")
    prefill.server.die()
    await (await cluster.gateway.ask(decode.peer, PROMPT, [prefill.peer])).over()
    at_d = await scrape(cluster, decode)
    assert value(at_d, "handoffs_total", outcome="fallback") == 1
    assert value(at_d, "handoffs_total", outcome="ok") == value(at_d, "handoff_bytes_total") == 0
    assert value(at_d, "prompt_tokens_total") == len(PROMPT) - 1


class OtherModel(SimulatedBackend):
    """A worker whose KV fits no other's."""

    @property
    def facts(self) -> EngineFacts:
        facts = super().facts
        return replace(facts, identity=replace(facts.identity, compatibility="c" * 64))


async def test_why_a_prefill_worker_did_not_give_a_prompt_is_counted_where_it_is_known(cluster: Cluster) -> None:
    held = HeldBackend(settings_of("prefill"))
    silent = await cluster.start("prefill", "p1", backend=held)
    other = await cluster.start("prefill", "p2", backend=OtherModel(settings_of("prefill")))
    patience = Patience(stall_s=5.0, advance_s=0.2)
    decode = await cluster.start("decode", "d1", patience=patience)
    timeout = await (await cluster.gateway.ask(decode.peer, PROMPT, [silent.peer])).over()
    held.go_on.set()
    mismatch = await (await cluster.gateway.ask(decode.peer, prompt_of(3 * CHUNK, 1), [other.peer])).over()
    assert (timeout.report.mode, timeout.report.trouble) == ("local", "timeout")
    assert (mismatch.report.mode, mismatch.report.trouble) == ("local", "mismatch")
    at_d = await scrape(cluster, decode)
    assert value(at_d, "handoffs_total", outcome="timeout") == value(at_d, "handoffs_total", outcome="mismatch") == 1
    assert value(at_d, "handoffs_total", outcome="fallback") == 0


async def test_a_prompt_of_its_own_is_no_hand_off(cluster: Cluster) -> None:
    node = await cluster.start("mixed", "m1")
    await (await cluster.gateway.ask(node.peer, PROMPT)).over()
    families = await scrape(cluster, node)
    assert "edge_llm_handoffs" not in families or not families["edge_llm_handoffs"].samples
    assert value(families, "prompt_tokens_total", role="mixed") == len(PROMPT) - 1


async def test_gauges_say_what_runs_now(cluster: Cluster) -> None:
    node = await cluster.start("decode", "d1", replace(settings_of("decode"), decode_run_s=0.005))
    answer = await cluster.gateway.ask(node.peer, PROMPT, max_tokens=400)
    await answer.first_token()
    busy = await scrape(cluster, node)
    slots = node.worker.facts.slots
    assert (value(busy, "num_requests_running"), value(busy, "slots_used"), value(busy, "slots")) == (1, 1, slots)
    assert value(busy, "kv_cache_usage_ratio") == pytest.approx(1 / slots)
    assert value(busy, "decode_step_seconds") > 0
    assert (value(busy, "ready"), value(busy, "draining")) == (1, 0)
    await cluster.gateway.client.cancel(node.peer, CancelRequest(request_id=answer.request_id, epoch=0))
    await until(lambda: node.slots_free == slots)
    idle = await scrape(cluster, node)
    assert (value(idle, "num_requests_running"), value(idle, "kv_cache_usage_ratio")) == (0, 0)


async def test_a_worker_says_which_board_it_runs_on(cluster: Cluster) -> None:
    node = await cluster.start("decode", "d1")
    (info,) = (await scrape(cluster, node))["edge_llm_node_info"].samples
    assert (info.value, info.labels["node"]) == (1.0, "d1")
    assert {name: info.labels[name] for name in about_node()} == about_node()
    assert int(info.labels["cores"]) >= 1
    assert int(info.labels["page_bytes"]) in (4096, 16384, 65536)


async def test_a_prefix_met_again_is_a_hit(cluster: Cluster) -> None:
    node = await cluster.start("mixed", "m1", prefix_cache_bytes=1 << 20)
    await (await cluster.gateway.ask(node.peer, PROMPT)).over()
    assert value(await scrape(cluster, node), "prefix_cache_hits_total") == 0
    await until(lambda: node.worker.prefixes.used_bytes > 0)
    again = await (await cluster.gateway.ask(node.peer, PROMPT)).over()
    families = await scrape(cluster, node)
    assert value(families, "prefix_cache_hits_total") == again.report.cached_tokens > 0
    assert value(families, "prefix_cache_queries_total") == 2 * (len(PROMPT) - 1)
    assert value(families, "prefix_cache_bytes") == node.worker.prefixes.used_bytes


async def test_every_family_has_the_type_that_its_meaning_needs(cluster: Cluster) -> None:
    node = await cluster.start("mixed", "m1")
    await (await cluster.gateway.ask(node.peer, PROMPT)).over()
    families = {name: family for name, family in (await scrape(cluster, node)).items() if name.startswith("edge_llm_")}
    for name, family in families.items():
        assert family.documentation, name
        # the text format has no type for counters without `_total`, and none for infos
        kinds = {sample.name.removeprefix(name) for sample in family.samples}
        expected = {"counter": {"_total"}, "gauge": {""}, "histogram": {"_bucket", "_count", "_sum"}}[family.type]
        assert kinds <= expected, name
    types = {name.removeprefix("edge_llm_"): family.type for name, family in families.items()}
    assert types["num_requests_running"] == types["kv_cache_usage_ratio"] == "gauge"
    assert types["generation_tokens"] == types["prefix_cache_hits"] == "counter"
    assert types["handoff_seconds"] == "histogram"
    assert not [name for name in families if name.endswith("_created")]


def readings_of(node: Node, board: Board | None) -> Readings:
    status = msgspec.structs.replace(node.worker.status(), board=board)
    silent = consumed(Path("/nothing/there"))
    return Readings(lambda: ("simulated", "mixed", "m1"), lambda: status, lambda: 0, lambda: silent)


async def test_a_board_shows_its_sensors_and_invents_none(cluster: Cluster) -> None:
    node = await cluster.start("mixed", "m1")
    throttled = {"throttled": True, "under_voltage": False}
    hot = Board(cpu_share=0.5, ram_share=0.25, temperature_c=81.5, frequency_hz=1.5e9, throttled=throttled)
    bare = Board(cpu_share=0.5, ram_share=0.25)
    for board, sensors in ((hot, 4), (bare, 0)):
        exposition = Exposition()
        WorkerMetrics(exposition.registry, readings_of(node, board))
        families = families_of(exposition.text().decode())
        found = [s for family in families.values() for s in family.samples if s.name.startswith("edge_llm_node_")]
        assert len(found) == sensors + 2 + 1, "its shares, and what it is"
        assert value(families, "node_cpu_usage_ratio", node="m1") == 0.5
        assert value(families, "node_memory_usage_ratio", node="m1") == 0.25
        if board is hot:
            assert value(families, "node_temperature_celsius", node="m1") == 81.5
            assert value(families, "node_throttled", kind="throttled") == 1
            assert value(families, "node_throttled", kind="under_voltage") == 0
            assert value(families, "node_cpu_frequency_hertz") == 1.5e9


async def test_the_same_figures_come_under_other_names_only_when_asked(cluster: Cluster) -> None:
    node = await cluster.start("mixed", "m1")
    plain, alias = Exposition(), Exposition("vllm")
    for exposition in (plain, alias):
        WorkerMetrics(exposition.registry, readings_of(node, None))
    assert "vllm:" not in plain.text().decode()
    families = families_of(alias.text().decode())
    theirs = {name for name in families if name.startswith("vllm:")}
    assert theirs == {VLLM_NAMES[name] for name in families.keys() & VLLM_NAMES.keys()}
    assert {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"} <= theirs
    ours = families["edge_llm_kv_cache_usage_ratio"].samples
    assert [(s.labels, s.value) for s in families["vllm:kv_cache_usage_perc"].samples] == [
        (s.labels, s.value) for s in ours
    ]


def test_two_workers_in_one_process_do_not_share_a_registry() -> None:
    first, second = Exposition(), Exposition()
    assert isinstance(first.registry, CollectorRegistry)
    assert first.registry is not second.registry
