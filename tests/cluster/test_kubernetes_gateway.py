"""A gateway that finds its workers in a namespace: simulated workers on loopback, an API server that names them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fastapi import FastAPI, Request, Response
from prometheus_client.parser import text_string_to_metric_families

from edge_llm.cluster.kubernetes import Kubernetes, Patience, client_of
from edge_llm.config import GatewayConfig, WorkerConfig, load_settings
from edge_llm.doctor.settings import Settings, check_gateway
from edge_llm.engine.engine import EngineFacts
from edge_llm.engine.sequencer import Sequencer
from edge_llm.engine.simulated import SimulatedBackend, SimulatedSettings, SimulatedVocabulary
from edge_llm.errors import ConfigError
from edge_llm.gateway.app import Gateway, create_app
from edge_llm.gateway.keys import NoKeys
from edge_llm.gateway.serve import discovery_of
from edge_llm.kv.snapshot import Identity
from edge_llm.worker.app import create_app as worker_app
from edge_llm.worker.client import Peer
from edge_llm.worker.messages import Role, encode
from edge_llm.worker.tickets import KeyRing
from edge_llm.worker.worker import Worker
from tests.cluster.fake_apiserver import NAMESPACE, FakeApiServer, endpoint, endpoint_slice, kubeconfig, serving_api
from tests.loopback import DEADLINE_S, KEYS, Cluster, Node, listening, running_cluster, settings_of, until
from tests.nodes import node_of

pytestmark = pytest.mark.anyio
ASK = {"prompt": "hello", "max_tokens": 4, "temperature": 0, "edge_llm": {"mode": "split"}}
SHORT = Patience(list_s=5, watch_s=1, grace_s=5, backoff_s=(0.01, 0.05))


@dataclass
class Scene:
    """Pods, the API server that lists them, and a gateway."""

    api: FakeApiServer
    cluster: Cluster
    config: Path
    http: aiohttp.ClientSession = field(init=False)
    gateway: Gateway = field(init=False)

    async def start(self, role: Role, name: str) -> Node:
        """A worker and its pod. On loopback each has a port, and so a slice, of its own."""
        node = await self.cluster.start(role, name)
        await self.name(node, role)
        return node

    async def name(self, node: Node, role: str, pod: str = "") -> None:
        host, _, port = node.peer.address.rpartition(":")
        pod = pod or node.peer.worker
        await self.api.put(endpoint_slice(f"slice-of-{pod}", [endpoint(pod, host)], role=role, port=int(port)))

    async def get(self, path: str) -> Any:
        async with self.http.get(path) as reply:
            return await reply.json()

    async def mode(self) -> str:
        """How an answer came to be."""
        async with self.http.post("/v1/completions", json=ASK) as reply:
            body = await reply.json()
        assert reply.status == 200, body
        return str(body["timings"]["edge_llm"]["mode"])

    async def metric(self, name: str) -> float:
        async with self.http.get("/metrics") as reply:
            text = await reply.text()
        (value,) = (
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        )
        return float(value)

    def knows(self, *workers: str) -> bool:
        return sorted(node.worker for node in self.gateway.dispatcher.view.nodes) == sorted(workers)


class AnotherBuild(SimulatedBackend):
    """Its KV is not what that of other builds is."""

    @property
    def facts(self) -> EngineFacts:
        return replace(super().facts, identity=Identity("d" * 64, "e" * 64))


@asynccontextmanager
async def serving(scene: Scene) -> AsyncIterator[None]:
    """The gateway. It probes seldom, so that what it knows soon it was told by discovery."""
    discovery = Kubernetes(partial(client_of, scene.config), NAMESPACE, SHORT)
    scene.gateway = Gateway(GatewayConfig(name="g", probe_s=60), KEYS, discovery, NoKeys())
    async with listening(create_app(scene.gateway)) as (address, _):
        timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
        async with aiohttp.ClientSession(f"http://{address}", timeout=timeout) as scene.http:
            yield


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(serving_api())
        cluster = await stack.enter_async_context(running_cluster())
        yield Scene(api, cluster, kubeconfig(tmp_path / "config", api))


async def test_workers_of_a_namespace_answer_split_from_the_first_request_on(scene: Scene) -> None:
    await scene.start("prefill", "p-0")
    await scene.start("decode", "d-0")
    async with serving(scene):
        assert await scene.mode() == "split"
        discovery = (await scene.get("/cluster"))["discovery"]
        assert (discovery["places"], discovery["silent"], discovery["problem"]) == (2, 0, "")
        assert await scene.metric("edge_llm_discovery_places") == 2
        assert await scene.metric("edge_llm_discovery_age_seconds") >= 0


async def test_a_worker_that_is_added_is_used_without_a_restart_and_one_whose_pod_is_gone_leaves(scene: Scene) -> None:
    await scene.start("decode", "d-0")
    async with serving(scene):
        assert await scene.mode() == "local"
        await scene.start("prefill", "p-0")
        await until(lambda: scene.knows("d-0", "p-0"))
        assert await scene.mode() == "split"
        await scene.api.delete("slice-of-p-0")
        await until(lambda: scene.knows("d-0"))
        assert await scene.mode() == "local"


async def test_requests_are_served_while_the_api_server_is_away_and_the_figures_say_so(scene: Scene) -> None:
    await scene.start("prefill", "p-0")
    await scene.start("decode", "d-0")
    async with serving(scene):
        await scene.api.down()
        discovery = scene.gateway.dispatcher.prober
        assert discovery is not None
        # first the watch breaks off, then nothing can be listed any more
        await until(lambda: "cannot list" in str(scene.gateway.discovery()["problem"]))
        assert await scene.mode() == "split"
        assert "cannot list" in (await scene.get("/cluster"))["discovery"]["problem"]
        age_s = await scene.metric("edge_llm_discovery_age_seconds")
        await scene.api.up()
        await scene.start("decode", "d-1")
        await until(lambda: scene.knows("d-0", "d-1", "p-0"))
        assert await scene.metric("edge_llm_discovery_age_seconds") < age_s + DEADLINE_S


async def test_a_stale_endpoint_is_named_with_its_reason_and_service_goes_on_with_the_rest(scene: Scene) -> None:
    await scene.start("decode", "d-0")
    dead = await scene.start("decode", "d-1")
    dead.server.die()
    async with serving(scene):
        assert await scene.mode() == "local"
        discovery = (await scene.get("/cluster"))["discovery"]
        assert (discovery["places"], discovery["silent"]) == (2, 1)
        (silent,) = discovery["silent_workers"]
        assert (silent["worker"], silent["address"]) == ("d-1", dead.peer.address)
        assert "d-1" in silent["message"]


async def test_a_worker_that_calls_itself_another_than_its_pod_is_refused_and_told_apart(scene: Scene) -> None:
    await scene.start("decode", "d-0")
    stranger = await scene.cluster.start("decode", "d-9")
    await scene.name(stranger, "decode", pod="d-1")
    async with serving(scene):
        assert scene.knows("d-0")
        (silent,) = (await scene.get("/cluster"))["discovery"]["silent_workers"]
        assert silent["worker"] == "d-1"
        assert "d-9" in silent["message"]


async def test_old_and_new_builds_side_by_side_share_kv_where_it_means_the_same_and_no_request_fails(
    scene: Scene,
) -> None:
    """A rolling update: prefill and one decode worker are of the new build, whose KV means something else."""
    await scene.start("decode", "d-old")
    new = AnotherBuild(settings_of("prefill"))
    await scene.name(await scene.cluster.start("prefill", "p-new", backend=new), "prefill")
    async with serving(scene):
        assert await scene.mode() == "local", "nothing to exchange yet"
        both = await scene.cluster.start("decode", "d-new", backend=AnotherBuild(settings_of("decode")))
        await scene.name(both, "decode")
        await until(lambda: scene.knows("d-old", "d-new", "p-new"))
        assert {await scene.mode() for _ in range(6)} == {"split"}
        await scene.api.delete("slice-of-d-new")
        await until(lambda: scene.knows("d-old", "p-new"))
        assert await scene.mode() == "local"
        nodes = {node["worker"]: node for node in (await scene.get("/cluster"))["nodes"]}
        assert nodes["d-old"]["compatibility"] != nodes["p-new"]["compatibility"]
        assert nodes["d-old"]["version"]


async def test_a_pod_with_another_cluster_key_is_refused_and_told_apart(scene: Scene) -> None:
    await scene.start("decode", "d-0")
    settings = SimulatedSettings(slots=1)
    engine = Sequencer(SimulatedBackend(settings), SimulatedVocabulary())
    config = WorkerConfig(name="d-1", role="decode")
    theirs = Worker(config, engine, SimulatedVocabulary(), KeyRing({"other": b"x" * 32}))
    async with listening(worker_app(theirs)) as (address, server), serving(scene):
        await scene.name(Node(theirs, Peer("d-1", address), server), "decode")
        await until(lambda: "key this worker does not have" in str(scene.gateway.discovery()["silent_workers"]))
        assert scene.knows("d-0")


async def test_a_pod_that_says_what_a_worker_says_without_the_cluster_key_gets_no_prompt(scene: Scene) -> None:
    """It has the labels, the name and the words."""
    await scene.start("decode", "d-0")
    forged, asked = FastAPI(), []

    @forged.middleware("http")
    async def everything(request: Request, _next: object) -> Response:
        asked.append(request.url.path)
        return Response(encode(node_of("d-1", "decode", model="simulated", slots=64).status))

    async with listening(forged) as (address, _), serving(scene):
        host, _, port = address.rpartition(":")
        await scene.api.put(endpoint_slice("forged", [endpoint("d-1", host)], port=int(port)))
        await until(lambda: "does not prove" in str(scene.gateway.discovery()["silent_workers"]))
        assert [await scene.mode() for _ in range(4)] == ["local"] * 4
        assert set(asked) == {"/status"}


def test_a_gateway_is_told_its_workers_in_one_way(tmp_path: Path) -> None:
    workers = tmp_path / "workers.yaml"
    workers.write_text("[]")
    with pytest.raises(ConfigError, match=r"--workers-file FILE .* --kubernetes-namespace NAMESPACE; .* neither"):
        discovery_of(GatewayConfig())
    with pytest.raises(ConfigError, match="not both"):
        discovery_of(GatewayConfig(workers_file=workers, kubernetes_namespace="edge-llm"))
    assert discovery_of(GatewayConfig(workers_file=workers)).places() == ()
    with pytest.raises(ConfigError, match="nowhere"):
        discovery_of(GatewayConfig(kubernetes_namespace="edge-llm", kubeconfig=tmp_path / "nowhere"))


def test_the_namespace_is_a_setting_as_the_downward_api_gives_it(tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path), "EDGE_LLM_GATEWAY_KUBERNETES_NAMESPACE": "edge-llm"}
    assert load_settings(GatewayConfig, {}, None, environ).kubernetes_namespace == "edge-llm"
    with pytest.raises(ConfigError, match=r"EDGE_LLM_GATEWAY_KUBERNETES_NAMESPACE.*Edge LLM"):
        load_settings(GatewayConfig, {}, None, environ | {"EDGE_LLM_GATEWAY_KUBERNETES_NAMESPACE": "Edge LLM"})


def test_the_doctor_looks_at_a_gateway_that_finds_its_workers_in_a_namespace(tmp_path: Path) -> None:
    config = GatewayConfig(kubernetes_namespace="edge-llm", no_auth=True, key_file=tmp_path / "key")
    (finding,) = check_gateway(Settings(gateway=config))
    assert "the namespace edge-llm" in str(finding)
