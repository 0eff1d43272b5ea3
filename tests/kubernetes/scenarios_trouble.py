"""Bad input and bad days: each one has a message that says what is wrong, and service continues with what is left."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

from tests.kubernetes.deploy import DECODE, NAMESPACE, ROLE
from tests.kubernetes.outside import Load
from tests.kubernetes.shell import Broken
from tests.kubernetes.stage import ROLES, Scenario, Stage

DECODE_0: Final = "edge-llm-decode-0"
_AWAY_S: Final = 60.0
_HEARD_S: Final = 240.0
_TOLD_S: Final = 30.0
_AT_ONCE_S: Final = 20.0
_STALE_IP: Final = "10.78.2.250"


async def _heard(stage: Stage, what: str, said: Callable[[], str], pattern: str) -> str:
    """The line that matches, once there is one. Raises Broken."""
    found = ""

    def is_said() -> bool:
        nonlocal found
        lines = said().splitlines()
        found = next((line for line in reversed(lines) if re.search(pattern, line, re.IGNORECASE)), "")
        return bool(found)

    await asyncio.to_thread(stage.cluster.until, what, is_said, _HEARD_S)
    return found.strip()[:300]


async def _still_serves(stage: Stage, seed: int) -> str:
    """Who answers now. Raises Broken when nobody does."""
    answer = await stage.outside.ask(stage.body(seed, prompt=64, answer=16, mode="auto"))
    return str(answer.own["decode_node"])


async def _worker_says(stage: Stage, values: Mapping[str, str | None], pattern: str, seed: int) -> str:
    """Give the decode worker settings that it cannot work with; what it says; and who answers meanwhile."""
    stage.edge.set_env([DECODE], values)
    try:
        line = await _heard(stage, f"a message like {pattern}", lambda: _log_of(stage, DECODE_0), pattern)
        answered = await _still_serves(stage, seed)
        if answered == DECODE_0:
            raise Broken("the worker that should not work answers")
    finally:
        stage.edge.set_env([DECODE], dict.fromkeys(values))
        await stage.do("delete", "pod", DECODE_0, "--ignore-not-found", "--wait=false")
    return f"{answered} answers meanwhile; it says: {line}"


def _log_of(stage: Stage, pod: str) -> str:
    """Of each container: of what runs now and of what ran before it. One that has not begun has none."""
    said = []
    for container in ("model", "verify", "worker"):
        for more in ((), ("--previous",)):
            with suppress(Broken):
                said.append(stage.edge.k("logs", pod, "-c", container, "--tail=50", *more))
    return "\n".join([*said, *stage.edge.events(pod)])


async def missing_model(stage: Stage) -> str:
    """The volume does not have it, and there is no network to fetch it from."""
    file = await _model_file(stage)
    aside = file.with_suffix(".aside")

    def put_back() -> None:
        file.unlink(missing_ok=True)
        aside.rename(file)

    file.rename(aside)
    return await _spoilt(stage, put_back, r"smollm2.*(fetch|download|reach|source)", 101)


async def wrong_sha256(stage: Stage) -> str:
    """One byte of the model's file is another one."""
    file = await _model_file(stage)
    whole = await asyncio.to_thread(file.read_bytes)
    file.write_bytes(whole[:-100] + bytes([whole[-100] ^ 0x55]) + whole[-99:])
    return await _spoilt(stage, lambda: _write(file, whole), r"has sha256 \w+, models\.yaml says \w+", 102)


def _write(file: Path, data: bytes) -> None:
    file.write_bytes(data)


async def _model_file(stage: Stage) -> Path:
    """On the decode worker's volume. Raises Broken."""
    assert stage.cluster.volumes is not None
    claim = next(name for name in await _claims(stage) if DECODE_0 in name)
    folder = stage.cluster.volumes.folder(NAMESPACE, claim)
    found = sorted(path for path in folder.rglob("*.gguf") if "random" not in path.name) if folder else []
    if not found:
        raise Broken(f"claim {claim} has no folder with a model")
    return found[0]


async def _spoilt(stage: Stage, mend: Callable[[], None], pattern: str, seed: int) -> str:
    """The decode worker starts again with a model that is not well; what it says; and who answers meanwhile."""
    try:
        await stage.do("delete", "pod", DECODE_0, "--wait=false")
        line = await _heard(stage, f"a message like {pattern}", lambda: _log_of(stage, DECODE_0), pattern)
        answered = await _still_serves(stage, seed)
        if answered == DECODE_0:
            raise Broken("a worker answers with a model that is not the right one")
    finally:
        await asyncio.to_thread(mend)
        await stage.do("delete", "pod", DECODE_0, "--ignore-not-found", "--wait=false")
    return f"{answered} answers meanwhile; it says: {line}"


async def _claims(stage: Stage) -> list[str]:
    return [item["metadata"]["name"] for item in stage.edge.items("persistentvolumeclaims")]


async def too_little_memory(stage: Stage) -> str:
    """Model and KV do not fit into the pod's memory: it refuses to start, with the sum."""
    values = {"EDGE_LLM_WORKER_N_CTX": "8192", "EDGE_LLM_WORKER_SLOTS": "64"}
    return await _worker_says(stage, values, r"does not fit: it needs", 103)


async def unknown_role_label(stage: Stage) -> str:
    """A typing mistake in a node's label, and one in a pod's."""
    taken = stage.edge.node_of(DECODE_0)
    free = next(node for node, role in ROLES.items() if role == "decode" and node != taken)
    stage.edge.label_node(free, "decod")
    stage.edge.scale(DECODE, 2)

    def events() -> str:
        return "\n".join(stage.edge.events("edge-llm-decode-1"))

    try:
        event = await _heard(stage, "an event of the pod that has no place", events, "FailedScheduling.*node")
        if "decod" not in (label := (await stage.doctor())["cluster.labels"])["found"] or label["status"] != "fail":
            raise Broken(f"doctor says of the label: {label}")
        answered = await _still_serves(stage, 105)
    finally:
        stage.edge.label_node(free, ROLES[free])
        stage.edge.scale(DECODE, 1)
    await stage.settle()
    line = await _worker_says(stage, {"EDGE_LLM_WORKER_ROLE": "decod"}, r"role.*decod\b", 104)
    return f"node: {answered} answers meanwhile; {event}; pod: {line}"


async def deleted_while_measuring(stage: Stage) -> str:
    """A pod that is deleted while it measures its level does not wait for the end of that, nor for its grace period."""
    changed = {"EDGE_LLM_WORKER_K_TYPE": "q8_0"}  # of this nothing is known yet
    stage.edge.set_env([DECODE], changed)

    def measures() -> bool:
        found = stage.edge.get("pod", DECODE_0)["status"].get("initContainerStatuses", [])
        is_running = any(one["name"] == "verify" and "running" in one["state"] for one in found)
        return is_running and bool(stage.edge.k("logs", DECODE_0, "-c", "verify").strip())

    try:
        await asyncio.to_thread(stage.cluster.until, "a pod that measures its level", measures, _HEARD_S)
        line = stage.edge.k("logs", DECODE_0, "-c", "verify").strip().splitlines()[-1]
        answered = await _still_serves(stage, 106)
        began_s = time.monotonic()
        await stage.do("delete", "pod", DECODE_0, deadline_s=_HEARD_S)  # returns when it is gone
        gone_s = time.monotonic() - began_s
    finally:
        stage.edge.set_env([DECODE], dict.fromkeys(changed))
        await stage.do("delete", "pod", DECODE_0, "--ignore-not-found", "--wait=false")
    if gone_s > _AT_ONCE_S:
        raise Broken(f"it was gone only after {gone_s:.0f} s, while it measured: {line}")
    return f"gone after {gone_s:.1f} s; {answered} answers meanwhile; it had said: {line}"


@asynccontextmanager
async def _under_load(stage: Stage, first_seed: int) -> AsyncIterator[Load]:
    """Raises Broken when a request failed."""
    async with stage.outside.load(lambda number: stage.body(first_seed + number, prompt=64, answer=32), 2) as load:
        yield load
    if load.failed:
        raise Broken(f"{len(load.failed)} of {len(load.finished)} requests failed: {load.failed[0].failure}")


async def apiserver_away(stage: Stage) -> str:
    """For a minute nobody can be asked where workers are: those that were known go on; then what is new is seen."""
    async with _under_load(stage, 5000) as load:
        await asyncio.to_thread(stage.cluster.control.apiserver_away)
        began_s = time.monotonic()
        await asyncio.sleep(_AWAY_S / 2)
        known = await stage.outside.ready()
        problem = (await stage.outside.overview())["discovery"]["problem"]
        await asyncio.sleep(max(0.0, _AWAY_S - (time.monotonic() - began_s)))
        await asyncio.to_thread(stage.cluster.control.apiserver_back)
        if len(known) < 2:
            raise Broken(f"half a minute without API server the gateway knew only {sorted(known)}")
    uid = stage.edge.restarts()[DECODE_0][0]
    await stage.do("delete", "pod", DECODE_0, "--wait=false")
    # a kubelet asks again at growing distances: it may hear of the deletion a minute after the API server is back
    await stage.outside.until("the deleted worker out of use", lambda ready: DECODE_0 not in ready, _HEARD_S)
    await stage.outside.until("its successor in use", lambda ready: DECODE_0 in ready, 300)
    if stage.edge.restarts()[DECODE_0][0] == uid:
        raise Broken("the pod was not replaced: nothing is proven")
    return f"{len(load.finished)} requests, 0 failed; /cluster said {problem!r}; a pod replaced afterwards was found"


def _slice(name: str, worker: str, ip: str, port: int) -> dict[str, Any]:
    """What a controller would write of a pod, written by hand."""
    labels = {
        "app.kubernetes.io/part-of": "edge-llm",
        ROLE: "decode",
        "kubernetes.io/service-name": "edge-llm-decode",
        "endpointslice.kubernetes.io/managed-by": "edge-llm-test",
    }
    target = {"kind": "Pod", "namespace": NAMESPACE, "name": worker}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels},
        "addressType": "IPv4",
        "ports": [{"name": "worker", "port": port, "protocol": "TCP"}],
        "endpoints": [{"addresses": [ip], "conditions": {"ready": True, "serving": True}, "targetRef": target}],
    }


@asynccontextmanager
async def _endpoint(stage: Stage, name: str, worker: str, ip: str, port: int = 9001) -> AsyncIterator[None]:
    await asyncio.to_thread(stage.edge.k, "create", "-f", "-", stdin=json.dumps(_slice(name, worker, ip, port)))
    try:
        yield
    finally:
        await stage.do("delete", "endpointslice", name)


async def stale_endpoint(stage: Stage) -> str:
    """A slice names a worker that is long gone: nobody is sent there."""
    async with _endpoint(stage, "stale", "edge-llm-decode-9", _STALE_IP), _under_load(stage, 6000) as load:
        line = await _told(stage, "edge-llm-decode-9")
        await asyncio.sleep(5)
        if "edge-llm-decode-9" in await stage.outside.ready():
            raise Broken("a worker that does not exist counts as ready")
    return f"{len(load.finished)} requests, 0 failed; /cluster says: {line}"


async def _told(stage: Stage, worker: str) -> str:
    """What /cluster says of a worker that it does not use, once it does. Raises Broken."""
    for _ in range(int(_TOLD_S / 0.2)):
        if line := await stage.outside.silent(worker):
            return line
        await asyncio.sleep(0.2)
    raise Broken(f"/cluster says nothing of {worker} after {_TOLD_S:.0f} s")


async def _listens(ip: str, port: int) -> None:
    """Raises TimeoutError."""
    async with asyncio.timeout(_TOLD_S):
        while True:
            try:
                _, writer = await asyncio.open_connection(ip, port)
            except OSError:
                await asyncio.sleep(0.1)
            else:
                writer.close()
                return


async def forged_worker(stage: Stage) -> str:
    """Somebody on the network answers as a worker, in a slice with the right labels, without the cluster's key."""
    node = stage.cluster.site.nodes[1]
    key = stage.cluster.site.run / "forged.key"
    key.write_text(f"kf0:{secrets.token_hex(32)}\n")
    key.chmod(0o600)
    command = [sys.executable, "-m", "edge_llm", "serve", "worker", "--simulate", "--role", "decode"]
    command += ["--name", "edge-llm-decode-7", "--host", node.ip, "--port", "9107", "--key-file", str(key)]
    stage.cluster.daemons.start("forged", node.namespace, *command)
    try:
        await _listens(node.ip, 9107)
        async with _endpoint(stage, "forged", "edge-llm-decode-7", node.ip, 9107), _under_load(stage, 7000) as load:
            line = await _told(stage, "edge-llm-decode-7")
            if "connect" in line.lower():
                raise Broken(f"it was not asked: {line}")
            await asyncio.sleep(5)
            ready = await stage.outside.ready()
        if "edge-llm-decode-7" in ready or load.used("decode_node")["edge-llm-decode-7"]:
            raise Broken("a worker without the cluster's key is used")
    finally:
        stage.cluster.daemons.stop("forged")
    return f"{len(load.finished)} requests, 0 failed, none of them there; /cluster says: {line}"


SCENARIOS: Final = (
    Scenario("missing model", missing_model),
    Scenario("wrong sha256", wrong_sha256),
    Scenario("too little memory", too_little_memory),
    Scenario("unknown role label", unknown_role_label),
    Scenario("a pod is deleted while it measures", deleted_while_measuring),
    Scenario("API server away for a minute", apiserver_away),
    Scenario("stale endpoint", stale_endpoint),
    Scenario("forged worker", forged_worker),
)
