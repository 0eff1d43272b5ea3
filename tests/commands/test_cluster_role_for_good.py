"""`edge-llm cluster role --kubeconfig`: real workers and a real gateway; kubectl is a program that writes down what it
is told."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from edge_llm.commands.kubectl import _said as said_by_kubectl
from edge_llm.engine.simulated import SimulatedSettings
from tests.gateway.conftest import COMPLETIONS, Service, asking, serving
from tests.loopback import CHUNK, prompt_of, running_cluster, undisturbed

pytestmark = pytest.mark.anyio
SLOW = SimulatedSettings(n_ctx=512, slots=4, chunk_tokens=CHUNK, decode_run_s=0.01)
PROMPT, TOKENS = prompt_of(3 * CHUNK), 300
KUBECTL = """\
#!{python}
import json, sys
words = sys.argv[1:]
assert words[:4] == ["--kubeconfig", {config!r}, "-n", "edge-llm"], words
open({log!r}, "a").write(" ".join(words[4:]) + chr(10))
policy = {{"persistentVolumeClaimRetentionPolicy": {{"whenScaled": "Delete"}}}}
sets = [{{"metadata": {{"name": "edge-llm-" + role}}, "spec": {{"replicas": count, **policy}}}}
        for role, count in (("prefill", 1), ("decode", {decoders}))]
answers = {{"pod": {{"spec": {{"nodeName": "pi-b"}}}}, "statefulset": {{"items": sets}}}}
if " ".join(words[4:]).startswith({failing!r}):
    sys.exit("the server is currently unable to handle the request")
print(json.dumps(answers[words[5]] if words[4] == "get" else {{}}))
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass(frozen=True, slots=True)
class Kubernetes:
    """A kubectl that answers for a cluster with so many decode workers."""

    folder: Path

    def with_decoders(self, count: int, failing: str = "nothing") -> None:
        """`failing`: how the words begin that it refuses."""
        text = KUBECTL.format(
            python=sys.executable, config=str(self.config), log=str(self.log), decoders=count, failing=failing
        )
        (self.folder / "kubectl").write_text(text)
        (self.folder / "kubectl").chmod(0o755)
        self.config.write_text("")

    @property
    def config(self) -> Path:
        return self.folder / "kubeconfig"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def told(self) -> list[str]:
        """What changes something."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if not line.startswith(("get ", "config view "))]

    async def role(self, gateway: Service | BusyGateway, *words: str) -> tuple[int, str]:
        """Exit code, and standard error."""
        code, _, said = await self.run(gateway, *words)
        return code, said

    async def run(self, gateway: Service | BusyGateway, *words: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "edge_llm", "cluster", "role", *words),
            *("--url", gateway.url, "--kubeconfig", str(self.config)),
            env={"PATH": f"{self.folder}:/usr/bin:/bin", "HOME": str(self.folder)},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        answered, said = await process.communicate()
        assert process.returncode is not None
        return process.returncode, answered.decode(), said.decode()


@dataclass(frozen=True, slots=True)
class BusyGateway:
    """A gateway whose workers never get empty: it answers as ours does, with three sequences on decode-1 for ever."""

    server: ThreadingHTTPServer
    nodes: list[dict[str, Any]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


def decoding(number: int, running: int) -> dict[str, Any]:
    load = {"sequences_running": running, "sequences_waiting": 0, "pending_prompt_tokens": 0}
    about = {"worker": f"edge-llm-decode-{number}", "role": "decode", "model": "m", "slots": 4, "started_at": 1.0}
    return {**about, "is_ready": True, "is_draining": False, "load": load}


@pytest.fixture
def busy() -> Iterator[BusyGateway]:
    nodes = [decoding(0, 0), decoding(1, 3)]

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"nodes": nodes})

        def do_POST(self) -> None:
            order = json.loads(self.rfile.read(int(self.headers["content-length"])))
            (node,) = [node for node in nodes if self.path == f"/cluster/{node['worker']}/drain"]
            node.update(order, is_ready=not order["is_draining"])
            self._answer(node)

        def _answer(self, found: dict[str, Any]) -> None:
            body = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Not into the output of tests."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        answering = threading.Thread(target=server.serve_forever)
        answering.start()
        try:
            yield BusyGateway(server, nodes)
        finally:
            server.shutdown()
            answering.join()


@pytest.fixture
def nobody() -> BusyGateway:
    """Where no gateway is."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.server_close()
    return BusyGateway(server, [])


@pytest.fixture
def kubernetes(tmp_path: Path) -> Kubernetes:
    return Kubernetes(tmp_path)


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with running_cluster() as cluster, serving(cluster) as made:
        yield made


async def test_what_runs_is_handed_over_before_the_workloads_move(service: Service, kubernetes: Kubernetes) -> None:
    kubernetes.with_decoders(2)
    leaving = await service.start("decode", "edge-llm-decode-1", SLOW, prefix_cache_bytes=1 << 20)
    async with service.streaming(COMPLETIONS, asking(PROMPT, max_tokens=TOKENS)) as streamed:
        await streamed.heard(lambda so_far: len(so_far.chunks) >= 2)
        await service.start("decode", "edge-llm-decode-0", SLOW, prefix_cache_bytes=1 << 20)
        reading = asyncio.create_task(streamed.whole())
        code, said = await kubernetes.role(service, "edge-llm-decode-1", "prefill")
        assert code == 0, said
        assert kubernetes.told() == [
            "label node pi-b --overwrite edge-llm/role=prefill",
            "scale statefulset edge-llm-decode --replicas=1",
            "scale statefulset edge-llm-prefill --replicas=2",
        ]
        assert (leaving.worker.is_draining, leaving.slots_free) == (True, 4)
        await reading
    assert streamed.own["token_ids"] == undisturbed(PROMPT, TOKENS)


async def test_nothing_moves_while_nobody_else_would_serve(service: Service, kubernetes: Kubernetes) -> None:
    kubernetes.with_decoders(2)
    first = await service.start("decode", "edge-llm-decode-0")
    await service.start("decode", "edge-llm-decode-1")
    await service.start("prefill", "edge-llm-prefill-0")
    code, said = await kubernetes.role(service, "edge-llm-decode-0", "prefill")
    assert code == 1
    assert "without edge-llm-decode-0 and edge-llm-decode-1 no ready worker decodes" in said, "the last one moves, too"
    assert kubernetes.told() == []
    assert not first.worker.is_draining
    code, said = await kubernetes.role(service, "edge-llm-decode-0", "prefill", "--force")
    assert code == 0, said
    assert kubernetes.told()[-2:] == [
        "delete pvc data-edge-llm-decode-0 --wait=false",
        "delete pod edge-llm-decode-0 --wait=false",
    ]


async def test_what_the_overlay_must_say_from_now_on_is_told(service: Service, kubernetes: Kubernetes) -> None:
    kubernetes.with_decoders(2)
    await service.start("decode", "edge-llm-decode-0")
    await service.start("decode", "edge-llm-decode-1")
    code, told, said = await kubernetes.run(service, "edge-llm-decode-1", "prefill")
    assert code == 0, said
    assert "replicas are now edge-llm-decode 1, edge-llm-prefill 2: say so in your overlay" in told
    await service.start("decode", "edge-llm-decode-2")
    code, told, said = await kubernetes.run(service, "edge-llm-decode-0", "prefill", "--json")
    assert code == 0, said
    assert json.loads(told) == {
        "board": "pi-b",
        "role": "prefill",
        "stopped": ["edge-llm-decode-0", "edge-llm-decode-1"],
        "replicas": {"edge-llm-decode": 1, "edge-llm-prefill": 2},
    }


async def test_a_worker_that_these_manifests_did_not_make_is_left_alone(
    service: Service, kubernetes: Kubernetes
) -> None:
    kubernetes.with_decoders(2)
    node = await service.start("decode", "pi-b")
    code, said = await kubernetes.role(service, "pi-b", "prefill")
    assert (code, kubernetes.told()) == (1, [])
    assert "no pod of edge-llm's manifests" in said
    assert not node.worker.is_draining


NOWHERE = """\
apiVersion: v1
kind: Config
current-context: x
clusters: [{name: x, cluster: {server: "https://127.0.0.1:1"}}]
contexts: [{name: x, context: {cluster: x, user: x}}]
users: [{name: x, user: {token: t}}]
"""


@pytest.mark.parametrize("text", ["nonsense", "{}", "- a\n", "a: [", "clusters: []\ncurrent-context: x\n"])
async def test_a_file_that_is_no_kubeconfig_is_said_before_the_gateway_is_asked(
    nobody: BusyGateway, kubernetes: Kubernetes, text: str
) -> None:
    kubernetes.config.write_text(text)
    code, said = await kubernetes.role(nobody, "edge-llm-decode-1", "prefill")
    assert code == 1
    (line,) = said.splitlines()
    assert line.startswith(f"edge-llm: {kubernetes.config} is no kubeconfig that leads to a cluster: ")


async def test_an_api_server_that_does_not_answer_is_one_line_before_the_gateway_is_asked(
    nobody: BusyGateway, kubernetes: Kubernetes
) -> None:
    kubernetes.config.write_text(NOWHERE)
    code, said = await kubernetes.role(nobody, "edge-llm-decode-1", "prefill")
    assert code == 1
    (line,) = said.splitlines()
    assert "`kubectl --kubeconfig" in line
    assert line.endswith(
        "The connection to the server 127.0.0.1:1 was refused - did you specify the right host or port?"
    )


async def test_what_kubectl_logs_for_itself_is_left_out_unless_it_says_nothing_else() -> None:
    logged = 'E1129 08:35:54.9 1140 memcache.go:265] "Unhandled Error" err="refused"'
    assert said_by_kubectl(f"{logged}\n{logged}\nThe server is away\n") == "The server is away"
    assert said_by_kubectl(f"{logged}\n{logged}\n") == logged
    assert said_by_kubectl("") == ""


async def test_nothing_moves_while_something_still_runs_there(busy: BusyGateway, kubernetes: Kubernetes) -> None:
    kubernetes.with_decoders(2)
    code, said = await kubernetes.role(busy, "edge-llm-decode-1", "prefill", "--timeout-s", "0")
    assert (code, kubernetes.told()) == (1, [])
    assert "nothing was moved" in said
    assert "(edge-llm-decode-1: 3 sequences)" in said
    assert "--force" in said
    assert f"edge-llm cluster drain edge-llm-decode-1 --undo --url {busy.url}" in said
    assert busy.nodes[1]["is_draining"], "what was ordered stays until it is taken back"
    code, said = await kubernetes.role(busy, "edge-llm-decode-1", "prefill", "--timeout-s", "0", "--force")
    assert code == 0, said
    assert len(kubernetes.told()) == 3


async def test_a_move_that_breaks_off_says_what_is_left_to_do_and_how_its_workers_serve_again(
    service: Service, kubernetes: Kubernetes
) -> None:
    kubernetes.with_decoders(2, failing="scale statefulset edge-llm-prefill")
    await service.start("decode", "edge-llm-decode-0")
    leaving = await service.start("decode", "edge-llm-decode-1")
    code, said = await kubernetes.role(service, "edge-llm-decode-1", "prefill")
    assert code == 1
    assert "unable to handle the request" in said
    left = [line.strip() for line in said.partition("these steps were not done")[2].splitlines()]
    config = kubernetes.config
    assert [line for line in left if line.startswith("kubectl")] == [
        f"kubectl --kubeconfig {config} -n edge-llm scale statefulset edge-llm-prefill --replicas=2"
    ]
    assert f"edge-llm cluster drain edge-llm-decode-1 --undo --url {service.url}" in left
    assert leaving.worker.is_draining


async def test_a_move_that_cannot_begin_leaves_all_of_its_steps(service: Service, kubernetes: Kubernetes) -> None:
    kubernetes.with_decoders(2, failing="label node")
    for number in (0, 1):
        await service.start("decode", f"edge-llm-decode-{number}")
    await service.start("prefill", "edge-llm-prefill-0")
    code, said = await kubernetes.role(service, "edge-llm-decode-0", "prefill", "--force")
    assert code == 1
    left = said.partition("these steps were not done")[2]
    assert (left.count("  kubectl "), left.count("cluster drain edge-llm-decode-")) == (5, 2)
