"""Discovery at scale: hundreds of nodes and pods that kwok makes up, and real workers beside them.

Owns the made-up part of the cluster. The made-up pods run nothing: this tests the watch, and that a gateway bears
hundreds of addresses that do not answer. Refuses to know what the gateway does with them.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp

from tests.kubernetes import cgroups
from tests.kubernetes.build import SIMULATOR, built
from tests.kubernetes.deploy import NAMESPACE, ROLE
from tests.kubernetes.shell import Broken
from tests.kubernetes.stage import Scenario, Stage

NODES: Final = 200
PODS: Final = 400
REAL: Final = 20
FAKE, SIM = "edge-llm-madeup", "edge-llm-simulated"
_VIEW_S: Final = 5.0
_ROLLOUT_S: Final = 600.0
_STAGES: Final = (
    "node/fast/node-initialize.yaml",
    "node/heartbeat-with-lease/node-heartbeat-with-lease.yaml",
    "pod/fast/pod-*.yaml",
)


async def discovers_hundreds(stage: Stage) -> str:
    """After a full rolling restart of all of them the gateway's view is right within 5 s of the last event."""
    folder = await asyncio.to_thread(built, SIMULATOR, stage.ledger.say)
    _start_kwok(stage, folder)
    try:
        made_s = await asyncio.to_thread(_make_nodes, stage)
        await asyncio.to_thread(stage.edge.k, "apply", "-f", "-", stdin=json.dumps(_workers(stage)))
        await asyncio.to_thread(stage.edge.rolled_out, f"deployment/{FAKE}", f"deployment/{SIM}", deadline_s=_ROLLOUT_S)
        first = await _view_is_right(stage, lambda: True)
        before = _gateway_usage(stage)
        began_s = time.monotonic()
        is_over = asyncio.Event()
        watching = asyncio.create_task(_view_is_right(stage, is_over.is_set))  # it has to see the last event come
        try:
            await stage.do("rollout", "restart", f"deployment/{FAKE}", f"deployment/{SIM}")
            deployments = (f"deployment/{FAKE}", f"deployment/{SIM}")
            await asyncio.to_thread(stage.edge.rolled_out, *deployments, deadline_s=_ROLLOUT_S)
        finally:
            is_over.set()
        late_s = await watching
        took_s, after = time.monotonic() - began_s, _gateway_usage(stage)
        answer = await stage.outside.ask(stage.body(9000, prompt=64, answer=8, mode="auto"))
    finally:
        await _remove(stage)
    cpu_share = (after["cpu_s"] - before["cpu_s"]) / took_s
    stage.measured["discovery at scale"] = {
        "nodes": NODES,
        "made_up_pods": PODS,
        "real_workers": REAL,
        "view_right_after_s": round(late_s, 2),
        "restart_took_s": round(took_s, 1),
        "gateway_cpu_share": round(cpu_share, 3),
        "gateway_memory_bytes": after["memory_bytes"],
    }
    if late_s > _VIEW_S:
        raise Broken(f"the gateway's view was right only {late_s:.1f} s after the last event")
    return (
        f"{NODES} nodes in {made_s:.0f} s, {PODS} made-up pods, {REAL} workers: view right after {first:.1f} s, "
        f"{late_s:.1f} s after a full restart of {took_s:.0f} s; gateway: {100 * cpu_share:.0f} % of a core, "
        f"{after['memory_bytes'] / 1e6:.0f} MB; {answer.own['decode_node']} answered"
    )


def _start_kwok(stage: Stage, folder: Path) -> None:
    configs = [str(path) for pattern in _STAGES for path in sorted((folder / "stage").glob(pattern))]
    site = stage.cluster.site
    stage.cluster.daemons.start(
        "kwok",
        site.control.namespace,
        folder / "kwok",
        *(f"--config={path}" for path in configs),
        f"--kubeconfig={site.admin}",
        "--manage-all-nodes=false",
        "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
        "--node-lease-duration-seconds=40",
        f"--node-ip={site.control.ip}",
    )


def _make_nodes(stage: Stage) -> float:
    """Seconds until all are Ready."""
    began_s = time.monotonic()
    size = {"cpu": "4", "memory": "8Gi", "pods": "110"}
    nodes = [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": f"madeup-{number}",
                "annotations": {"kwok.x-k8s.io/node": "fake"},
                "labels": {"type": "madeup", "kubernetes.io/hostname": f"madeup-{number}"},
            },
            "spec": {"taints": [{"key": "madeup", "effect": "NoSchedule"}]},
            "status": {"capacity": size, "allocatable": size},
        }
        for number in range(NODES)
    ]
    stage.cluster.kubectl("create", "-f", "-", stdin=json.dumps(_listed(nodes)), deadline_s=120)

    def are_ready() -> bool:
        found = stage.cluster.items("nodes", "-l", "type=madeup")
        return sum(map(_node_is_ready, found)) == NODES

    stage.cluster.until(f"{NODES} made-up nodes Ready", are_ready, 180)
    return time.monotonic() - began_s


def _node_is_ready(node: dict[str, Any]) -> bool:
    return any(one["type"] == "Ready" and one["status"] == "True" for one in node["status"].get("conditions", ()))


def _listed(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "List", "items": list(items)}


def _workers(stage: Stage) -> dict[str, Any]:
    """Two more sets of workers with Services of their own: made up, and simulated by real processes."""
    template = stage.cluster.get("-n", NAMESPACE, "statefulset", "edge-llm-decode")["spec"]["template"]["spec"]
    worker = template["containers"][0]
    real = {
        "securityContext": template["securityContext"],
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 5,
        "containers": [
            {
                **{key: worker[key] for key in ("name", "image", "imagePullPolicy", "args", "envFrom", "ports")},
                "securityContext": worker["securityContext"],
                "env": [*worker["env"], {"name": "EDGE_LLM_WORKER_SIMULATE", "value": "true"}],
                "readinessProbe": worker["readinessProbe"],
                "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "512Mi"}},
                "volumeMounts": [mount for mount in worker["volumeMounts"] if mount["name"] in ("keys", "tmp")],
            }
        ],
        "volumes": [volume for volume in template["volumes"] if volume["name"] in ("keys", "tmp")],
    }
    made_up = {
        "securityContext": template["securityContext"],
        "nodeSelector": {"type": "madeup"},
        "tolerations": [{"key": "madeup", "operator": "Exists"}],
        "containers": [{"name": "none", "image": "none:1", "securityContext": worker["securityContext"]}],
    }
    parts = [*_set(FAKE, PODS, made_up), *_set(SIM, REAL, real)]
    return _listed(parts)


def _set(name: str, replicas: int, spec: dict[str, Any]) -> list[dict[str, Any]]:
    labels = {"app.kubernetes.io/part-of": "edge-llm", ROLE: "decode", "app": name}
    about = {"name": name, "namespace": NAMESPACE, "labels": labels}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": about,
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": about,
        "spec": {"clusterIP": "None", "selector": {"app": name}, "ports": [{"name": "worker", "port": 9001}]},
    }
    return [service, deployment]


async def _view_is_right(stage: Stage, is_over: Callable[[], bool]) -> float:
    """Seconds from the last change of the slices, which comes before or soon after `is_over`, to the view that has all
    of them and no more. A change counts from the look before the one that showed it. Raises Broken."""
    seen: set[tuple[str, str]] = set()
    changed_s = looked_s = time.monotonic()
    over_s: float | None = None
    right_s: float | None = None
    while over_s is None or time.monotonic() < over_s + 60:
        before_s, looked_s = looked_s, time.monotonic()
        names, versions = await asyncio.to_thread(_in_slices, stage)
        if versions != seen:
            seen, changed_s, right_s = versions, before_s, None
        if right_s is None and await _is_right(stage, names):
            right_s = time.monotonic()
        if over_s is None and is_over():
            over_s = time.monotonic()
        if over_s is not None and right_s is not None and time.monotonic() - changed_s > 3:  # nothing more has come
            return right_s - changed_s
        await asyncio.sleep(0.2)
    raise Broken(f"the gateway's view was not that of {len(seen)} slices")


def _in_slices(stage: Stage) -> tuple[set[str], set[tuple[str, str]]]:
    selector = f"app.kubernetes.io/part-of=edge-llm,{ROLE} in (prefill,decode,mixed)"
    found = stage.edge.items("endpointslices", "-l", selector)
    endpoints = [one for item in found for one in item.get("endpoints") or ()]
    names = {one["targetRef"]["name"] for one in endpoints if one["conditions"].get("serving")}
    return names, {(item["metadata"]["name"], item["metadata"]["resourceVersion"]) for item in found}


async def _is_right(stage: Stage, names: set[str]) -> bool:
    """As many places as slices have, and all ready that really run."""
    try:
        overview = await stage.outside.overview()
    except (aiohttp.ClientError, Broken, TimeoutError):
        return False
    ready = {node["worker"] for node in overview["nodes"] if node["is_ready"]}
    return overview["discovery"]["places"] == len(names) and ready == {name for name in names if FAKE not in name}


def _gateway_usage(stage: Stage) -> dict[str, Any]:
    """CPU seconds and memory of the gateway's processes so far."""
    from edge_llm.machine import process_usage

    uids = [pod["metadata"]["uid"] for pod in stage.edge.pods("gateway")]
    pids = {pid for node in stage.cluster.site.nodes for pid in cgroups.processes(node.cgroup, uids)}
    found = [usage for pid in pids if (usage := process_usage(pid)) is not None]
    return {"cpu_s": sum(one.cpu_s for one in found), "memory_bytes": sum(one.rss_bytes for one in found)}


async def _remove(stage: Stage) -> None:
    for name in (FAKE, SIM):
        await stage.do("delete", f"deployment/{name}", f"service/{name}", "--ignore-not-found", "--wait=false")
    await asyncio.to_thread(
        stage.cluster.until, "made-up pods gone", lambda: not stage.edge.items("pods", "-l", f"app={FAKE}"), 180
    )
    await asyncio.to_thread(
        stage.cluster.kubectl, "delete", "nodes", "-l", "type=madeup", "--wait=false", deadline_s=180
    )
    await asyncio.to_thread(stage.cluster.daemons.stop, "kwok")


SCENARIOS: Final = (Scenario("discovery of 420 workers", discovers_hundreds),)
