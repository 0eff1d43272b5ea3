"""`edge-llm cluster role --kubeconfig`: real workers and a real gateway; kubectl is a program that writes down what it
is told."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

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
print(json.dumps(answers[words[5]] if words[4] == "get" else {{}}))
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass(frozen=True, slots=True)
class Kubernetes:
    """A kubectl that answers for a cluster with so many decode workers."""

    folder: Path

    def with_decoders(self, count: int) -> None:
        text = KUBECTL.format(python=sys.executable, config=str(self.config), log=str(self.log), decoders=count)
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
        return [line for line in lines if not line.startswith("get ")]

    async def role(self, service: Service, *words: str) -> tuple[int, str]:
        """Exit code, and standard error."""
        code, _, said = await self.run(service, *words)
        return code, said

    async def run(self, service: Service, *words: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "edge_llm", "cluster", "role", *words),
            *("--url", service.url, "--kubeconfig", str(self.config)),
            env={"PATH": f"{self.folder}:/usr/bin:/bin", "HOME": str(self.folder)},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        answered, said = await process.communicate()
        assert process.returncode is not None
        return process.returncode, answered.decode(), said.decode()


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
