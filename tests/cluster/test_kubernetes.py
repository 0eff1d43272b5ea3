"""Places from an API server that is slow, wrong, away, and back again."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog
from aiohttp import web

from edge_llm.cluster.kubernetes import Kubernetes, Patience, client_of, pause_s
from edge_llm.cluster.view import Place
from edge_llm.errors import ConfigError
from tests.cluster.fake_apiserver import (
    NAMESPACE,
    USER,
    FakeApiServer,
    Object,
    endpoint,
    endpoint_slice,
    kubeconfig,
    serving_api,
)
from tests.loopback import until

pytestmark = pytest.mark.anyio

# As short as may be: what a test waits for is an event, never one of these.
SHORT = Patience(list_s=5, watch_s=1, grace_s=5, resync_s=300, backoff_s=(0.01, 0.05), first_s=5)


def decode(*pods: Object, name: str = "decode-1", **more: Any) -> Object:
    return endpoint_slice(name, pods, **more)


@dataclass
class Scene:
    """A server, and discovery that looks at it with what it told."""

    server: FakeApiServer
    config: Path
    stack: AsyncExitStack
    news: list[str] = field(default_factory=list)
    logged: list[Any] = field(default_factory=list)

    async def watch(self, patience: Patience = SHORT, namespace: str = NAMESPACE) -> Kubernetes:
        made = Kubernetes(partial(client_of, self.config), namespace, patience)
        await self.stack.enter_async_context(made.watching(self._on_news))
        return made

    def _on_news(self, workers: Collection[str]) -> None:
        self.news += sorted(workers)

    def said(self, text: str) -> list[Any]:
        """Log lines with this in them."""
        return [line for line in self.logged if text in json.dumps(line, default=str)]

    def asked(self, verb: str) -> int:
        return sum(asked.verb == verb for asked in self.server.asked)

    async def is_watched(self) -> None:
        await until(lambda: self.server.watches > 0)


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as lines:
        yield lines


@pytest.fixture
async def scene(tmp_path: Path, logged: list[Any]) -> AsyncIterator[Scene]:
    async with serving_api() as server, AsyncExitStack() as stack:
        yield Scene(server, kubeconfig(tmp_path / "config", server), stack, logged=logged)


def workers(of: Kubernetes) -> list[str]:
    return [place.worker for place in of.places()]


def are(of: Kubernetes, *names: str) -> Callable[[], bool]:
    return lambda: workers(of) == list(names)


# -- all is well


async def test_the_places_are_there_when_the_gateway_starts(scene: Scene) -> None:
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7"), endpoint("d-1", "10.42.1.8")))
    await scene.server.put(decode(endpoint("p-0", "10.42.2.7"), name="prefill-1", role="prefill"))
    cluster = await scene.watch()
    assert cluster.places() == (
        Place("d-0", "10.42.1.7:9001"),
        Place("d-1", "10.42.1.8:9001"),
        Place("p-0", "10.42.2.7:9001"),
    )
    assert not cluster.heard().problem


async def test_a_pod_that_comes_becomes_ready_or_goes_is_news(scene: Scene) -> None:
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7")))
    cluster = await scene.watch()
    assert scene.news == ["d-0"]
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7"), endpoint("d-1", "10.42.1.8", ready=False)))
    await until(are(cluster, "d-0", "d-1"))
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7"), endpoint("d-1", "10.42.1.8")))
    await until(lambda: len(scene.news) == 3)
    await scene.server.put(decode(endpoint("d-1", "10.42.1.8")))
    await until(are(cluster, "d-1"))
    await scene.server.delete("decode-1")
    await until(are(cluster))
    assert scene.news == ["d-0", "d-1", "d-1", "d-0", "d-1"]
    assert scene.asked("list") == 1, "the watch told it all"


async def test_a_worker_that_drains_is_a_place_until_its_pod_is_gone(scene: Scene) -> None:
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7"), endpoint("d-1", "10.42.1.8")))
    cluster = await scene.watch()
    draining = endpoint("d-0", "10.42.1.7", ready=False, serving=True, terminating=True)
    await scene.server.put(decode(draining, endpoint("d-1", "10.42.1.8")))
    await until(lambda: len(scene.news) == 3)
    assert workers(cluster) == ["d-0", "d-1"]
    await scene.server.put(decode(endpoint("d-1", "10.42.1.8")))
    await until(are(cluster, "d-1"))


async def test_what_is_not_a_worker_of_ours_is_not_looked_at(scene: Scene) -> None:
    mine = endpoint("d-0", "10.42.1.7")
    await scene.server.put(decode(mine, name="theirs", labels={"app.kubernetes.io/part-of": "other"}))
    await scene.server.put(decode(mine, name="no-role", labels={"app.kubernetes.io/part-of": "edge-llm"}))
    await scene.server.put(decode(endpoint("gateway-0", "10.42.1.9"), name="gateway", role="gateway"))
    cluster = await scene.watch()
    assert cluster.places() == ()
    assert scene.said("no Service of workers")
    assert not scene.said("unknown role")


async def test_a_service_that_gets_its_labels_later_is_found_and_one_that_loses_them_is_left(scene: Scene) -> None:
    bare = decode(endpoint("d-0", "10.42.1.7"), labels={"app.kubernetes.io/part-of": "edge-llm"})
    await scene.server.put(bare)
    cluster = await scene.watch()
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7")))
    await until(are(cluster, "d-0"))
    await scene.server.put(bare)
    await until(are(cluster))


async def test_a_role_label_that_means_nothing_is_named_in_the_log_once(scene: Scene) -> None:
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7"), role="decod"))
    cluster = await scene.watch()
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7"), endpoint("d-1", "10.42.1.8"), role="decod"))
    await scene.server.put(decode(endpoint("d-2", "10.42.1.9"), name="decode-2"))
    await until(are(cluster, "d-2"))
    (line,) = scene.said("unknown role")
    assert (line["endpoint_slice"], line["role"], line["known"]) == ("decode-1", "decod", "prefill, decode, mixed")


async def test_a_watch_goes_on_where_it_ended_and_a_bookmark_says_where_that_is(scene: Scene) -> None:
    cluster = await scene.watch()
    await scene.is_watched()
    await scene.server.bookmark()
    version = str(scene.server.version)
    await until(lambda: scene.asked("watch") == 2)
    assert scene.server.asked[-1].query["resourceVersion"] == version
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7")))
    await until(are(cluster, "d-0"))
    assert scene.asked("list") == 1


async def test_a_watch_asks_for_little_and_for_an_end(scene: Scene) -> None:
    await scene.watch()
    await until(lambda: scene.asked("watch") == 1)
    watched = scene.server.asked[-1].query
    assert watched["labelSelector"] == "app.kubernetes.io/part-of=edge-llm,edge-llm/role,edge-llm/role!=gateway"
    assert watched["allowWatchBookmarks"].lower() == "true"
    assert int(watched["timeoutSeconds"]) >= 1


async def test_nothing_is_left_open_when_the_gateway_ends(scene: Scene) -> None:
    await scene.watch()
    await scene.is_watched()
    await scene.stack.aclose()
    await until(lambda: scene.server.watches == 0)


# -- what goes wrong and comes right


@pytest.mark.parametrize("in_stream", [False, True])
async def test_a_version_that_is_forgotten_is_listed_anew_and_is_no_problem(scene: Scene, in_stream: bool) -> None:
    scene.server.tells_410_in_stream = in_stream
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7")))
    cluster = await scene.watch()
    await scene.is_watched()
    scene.server.lose("decode-1")
    await scene.server.forget()
    await scene.server.put(decode(endpoint("d-1", "10.42.1.8"), name="decode-2"))
    await until(are(cluster, "d-1"))
    assert scene.asked("list") == 2
    assert not scene.said("no word")
    assert not cluster.heard().problem


@pytest.mark.parametrize(
    "raw",
    [
        b"<html>an error of a proxy</html>\n",
        b'{"type": "ADDED"}\n',
        b'{"type": "ADDED", "object": {"kind": "Pod"}}\n',
        b'{"type": "ERROR", "object": {"code": 500, "message": "etcd is gone"}}\n',
        b'{"type": "ERROR", "object": "?"}\n',
        b'["ADDED"]\n',
        b"\xff\xfe\x00\n",
    ],
    ids=lambda raw: raw[:36].decode(errors="replace"),
)
async def test_garbage_in_a_watch_ends_it_and_everything_is_listed_anew(scene: Scene, raw: bytes) -> None:
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7")))
    cluster = await scene.watch()
    await scene.is_watched()
    await scene.server.say(raw)
    await until(lambda: scene.asked("list") == 2)
    assert scene.said("no word")
    await scene.is_watched()
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7"), endpoint("d-1", "10.42.1.8")))
    await until(are(cluster, "d-0", "d-1"))
    await until(lambda: not cluster.heard().problem)


async def test_events_of_a_kind_that_is_not_known_yet_change_nothing(scene: Scene) -> None:
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7")))
    cluster = await scene.watch()
    await scene.is_watched()
    await scene.server.say(b'\n{"type": "LATER", "object": {"metadata": {"name": "decode-1"}}}\n')
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7"), endpoint("d-1", "10.42.1.8")))
    await until(are(cluster, "d-0", "d-1"))
    assert scene.asked("list") == 1


async def test_a_watch_that_is_cut_in_the_middle_of_a_line_loses_nothing(scene: Scene) -> None:
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7")))
    cluster = await scene.watch()
    await scene.is_watched()
    await scene.server.say(b'{"type": "MODIFIED", "object": {"metadata": {"na')
    await scene.server.down()
    scene.server.lose("decode-1")
    await scene.server.up()
    await until(are(cluster))


async def test_an_api_server_that_is_away_leaves_the_last_places_and_says_so(scene: Scene) -> None:
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7")))
    cluster = await scene.watch()
    await scene.is_watched()
    await scene.server.down()
    await until(lambda: "cannot list" in cluster.heard().problem)
    assert workers(cluster) == ["d-0"]
    first = scene.said("the last known places are kept")[0]
    assert (first["places"], first["log_level"]) == (1, "warning")
    age_s = cluster.heard().age_s
    await until(lambda: (cluster.heard().age_s or 0) > (age_s or 0))
    scene.server.lose("decode-1")
    await scene.server.put(decode(endpoint("d-1", "10.42.1.8")))
    await scene.server.up()
    await until(are(cluster, "d-1"))
    await until(lambda: not cluster.heard().problem)
    assert scene.said("answers again")


async def test_a_failure_that_lasts_is_not_said_at_every_try(scene: Scene) -> None:
    await scene.watch()
    scene.server.refusal = web.Response(status=503, text="busy")
    await scene.server.down()
    await scene.server.up()
    lists = scene.asked("list")
    await until(lambda: scene.asked("list") > lists + 5)
    said = [line["message"] for line in scene.said("503")]
    assert said
    assert len(said) == len(set(said))


async def test_a_gateway_starts_without_places_while_the_api_server_is_away(scene: Scene) -> None:
    await scene.server.down()
    cluster = await scene.watch()
    assert cluster.places() == ()
    assert "cannot list EndpointSlices" in cluster.heard().problem
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7")))
    await scene.server.up()
    await until(are(cluster, "d-0"))


async def test_a_start_does_not_wait_long_for_an_api_server_that_says_nothing(scene: Scene) -> None:
    scene.server.is_hanging = True
    cluster = await scene.watch(Patience(list_s=30, first_s=0.05))
    assert cluster.places() == ()


async def test_a_list_that_hangs_is_given_up_and_asked_for_again(scene: Scene) -> None:
    scene.server.is_hanging = True
    cluster = await scene.watch(replace(SHORT, list_s=0.2))
    assert "did not come to its end within" in cluster.heard().problem
    scene.server.is_hanging = False
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7")))
    await until(are(cluster, "d-0"))


async def test_a_watch_that_died_without_a_word_is_given_up(scene: Scene) -> None:
    cluster = await scene.watch(replace(SHORT, grace_s=0.1))
    scene.server.is_deaf = True
    await scene.is_watched()
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7")))
    await until(are(cluster, "d-0"))
    assert scene.asked("list") >= 2


async def test_an_event_that_got_lost_is_made_up_for_by_the_next_list(scene: Scene) -> None:
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7")))
    cluster = await scene.watch(Patience(watch_s=1, resync_s=0.5))
    await scene.is_watched()
    scene.server.lose("decode-1")
    await until(are(cluster))
    assert not scene.said("no word")


async def test_a_server_that_ends_every_watch_at_once_is_asked_with_pauses_and_still_seen(scene: Scene) -> None:
    scene.server.is_short = True
    cluster = await scene.watch()
    await until(lambda: scene.asked("watch") > 2)
    assert scene.asked("list") >= scene.asked("watch") - 1, "a watch was opened again without a pause"
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7")))
    await until(are(cluster, "d-0"))
    assert "as soon as it is open" in json.dumps(scene.logged, default=str)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (web.Response(status=500, text="<html>"), "500 Internal Server Error"),
        (web.Response(status=200, text="<html>"), "is not the API's JSON"),
        (web.Response(status=200, text='{"kind": "EndpointSliceList"}'), "is not the API's JSON"),
        (web.Response(status=200, text='{"metadata": {}, "items": [{}]}'), "is not the API's JSON"),
        (web.Response(status=404, text="nothing here"), "no discovery.k8s.io/v1"),
        (web.Response(status=429, headers={"retry-after": "0"}, text='{"message": "slow down"}'), "429 slow down"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.status),
)
async def test_an_answer_that_is_none_keeps_the_places_and_is_told(
    scene: Scene, answer: web.Response, said: str
) -> None:
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7")))
    cluster = await scene.watch()
    await scene.is_watched()
    scene.server.refusal = answer
    await scene.server.down()
    await scene.server.up()
    await until(lambda: said in cluster.heard().problem)
    assert workers(cluster) == ["d-0"]
    scene.server.refusal = None
    await until(lambda: not cluster.heard().problem)


# -- who may


async def test_a_missing_right_is_named_with_verb_resource_group_and_account(scene: Scene) -> None:
    scene.server.forbidden = {"list", "watch"}
    cluster = await scene.watch()
    problem = cluster.heard().problem
    for part in ("list", "namespace edge-llm", "[discovery.k8s.io]", "[endpointslices]", "get, list, watch", USER):
        assert part in problem
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7")))
    scene.server.forbidden = set()
    await until(are(cluster, "d-0"))


async def test_who_may_list_but_not_watch_sees_changes_all_the_same_and_is_told(scene: Scene) -> None:
    scene.server.forbidden = {"watch"}
    cluster = await scene.watch()
    await until(lambda: "lacks watch" in cluster.heard().problem)
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7")))
    await until(are(cluster, "d-0"))


async def test_a_token_that_was_replaced_is_read_again(scene: Scene) -> None:
    scene.server.token = "a-token"
    cluster = await scene.watch()
    assert not cluster.heard().problem
    scene.server.token = "another"
    await until(lambda: "does not know this identity" in cluster.heard().problem)
    kubeconfig(scene.config, scene.server, "another")
    await until(lambda: not cluster.heard().problem)


async def test_a_namespace_without_workers_is_no_error_and_says_what_was_looked_for(scene: Scene) -> None:
    await scene.server.put(decode(endpoint("d-0", "10.42.1.7")))
    cluster = await scene.watch(namespace="edge-lm")
    assert cluster.places() == ()
    (line,) = scene.said("no Service of workers")
    assert (line["namespace"], line["log_level"]) == ("edge-lm", "warning")
    assert "edge-llm/role" in line["selector"]


async def test_a_kubeconfig_that_cannot_be_used_is_an_error_that_names_it(tmp_path: Path) -> None:
    bad = tmp_path / "config"
    for text in ("{", "[]", "", "current-context: x\nclusters: []\ncontexts: []\nusers: []\n"):
        bad.write_text(text)
        with pytest.raises(ConfigError, match="config"):
            await client_of(bad)
    with pytest.raises(ConfigError, match=r"nowhere"):
        await client_of(tmp_path / "nowhere")


@pytest.mark.parametrize("named", [None, "", "nowhere", "nowhere:elsewhere"])
def test_where_there_is_neither_pod_nor_kubeconfig_one_line_says_what_to_type(
    tmp_path: Path, named: str | None
) -> None:
    """In a process of its own: the library looks at KUBECONFIG once."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    if named is not None:
        environment["KUBECONFIG"] = named
    for words in (
        ("bench", "cluster", "--cluster"),
        ("serve", "gateway", "--kubernetes-namespace", "edge-llm", "--no-auth", "--key-file", str(tmp_path / "key")),
    ):
        (tmp_path / "key").write_text(f"k1:{'ab' * 32}\n")
        (tmp_path / "key").chmod(0o600)
        done = subprocess.run(
            [sys.executable, "-m", "edge_llm", *words],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        where = " or ".join((named or "").split(":")) if named else str(tmp_path / ".kube/config")
        assert (where if named != "" else "that KUBECONFIG names") in line
        assert "`export KUBECONFIG=FILE` or --kubeconfig FILE" in line


async def test_what_is_wrong_with_a_kubeconfig_that_is_there_is_said_of_that_file(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("{}")
    with pytest.raises(ConfigError, match=rf"{tmp_path}/config: Invalid kube-config file"):
        await client_of(tmp_path / "config")


def self_signed(folder: Path, name: str) -> tuple[Path, Path]:
    """A new certificate for loopback, and its key."""
    certificate, key = folder / name, folder / "tls.key"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=api"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    return certificate, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate by openssl")
async def test_in_a_pod_the_service_account_is_used_and_its_server_must_be_the_right_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[Any]
) -> None:
    certificate, key = await asyncio.to_thread(self_signed, tmp_path, "ca.crt")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    (tmp_path / "token").write_text("of-the-pod")
    async with serving_api(tls) as server:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
        server.token = "of-the-pod"
        await server.put(decode(endpoint("d-0", "10.42.1.7")))
        cluster = Kubernetes(partial(client_of, None, tmp_path), NAMESPACE, SHORT)
        async with cluster.watching(lambda _: None):
            assert workers(cluster) == ["d-0"]
        await asyncio.to_thread(self_signed, tmp_path, "ca.crt")
        stranger = Kubernetes(partial(client_of, None, tmp_path), NAMESPACE, SHORT)
        async with stranger.watching(lambda _: None):
            assert stranger.places() == ()
            assert "ertificate" in stranger.heard().problem


# -- patience


def test_pauses_grow_to_a_bound_and_chance_takes_off_up_to_half() -> None:
    patience = Patience(backoff_s=(0.5, 15.0))
    assert [pause_s(patience, failures, 0.0) for failures in (1, 2, 3, 6, 1000)] == [0.5, 1.0, 2.0, 15.0, 15.0]
    assert pause_s(patience, 3, 1.0) == 1.0


def test_a_server_that_says_when_to_come_back_is_believed_within_a_minute() -> None:
    patience = Patience(backoff_s=(0.5, 15.0))
    assert pause_s(patience, 1, 0.5, retry_after_s=7.0) == 7.0
    assert pause_s(patience, 1, 0.5, retry_after_s=86_400.0) == 60.0
