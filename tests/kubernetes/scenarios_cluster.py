"""What an operator does: give a node another role, try every overlay on the API server, run a bench in the cluster."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Final

from edge_llm.bench.record import load as load_record
from tests.kubernetes.deploy import DECODE, PREFILL, SHIPPED
from tests.kubernetes.outside import Load
from tests.kubernetes.shell import Broken
from tests.kubernetes.stage import ROLES, NotHere, Scenario, Stage

_INSTALL: Final = SHIPPED / "install.yaml"
_DRY: Final = ("--dry-run=server", "--validate=strict")
_JOB_S: Final = 600.0
_REQUESTS: Final = 6


async def flips_a_role(stage: Stage) -> str:
    """A decode node reads prompts while requests run: at once and without a restart, then for good."""
    stage.edge.scale(DECODE, 2)
    worker = "edge-llm-decode-1"
    await stage.outside.until("a second decode worker", lambda ready: worker in ready, 300)
    node, before = stage.edge.node_of(worker), stage.edge.restarts()
    try:
        async with stage.outside.load(lambda number: stage.body(3000 + number, prompt=300, answer=16), 3) as load:
            began_s = time.monotonic()
            await stage.edge_llm("cluster", "role", worker, "prefill")
            await _reads_prompts(stage, load, worker)
            at_once_s = time.monotonic() - began_s
            if stage.edge.restarts() != before:
                raise Broken("something was restarted for it")
            began_s = time.monotonic()
            for_good = ("cluster", "role", worker, "prefill", "--kubeconfig", str(stage.cluster.site.admin))
            await stage.edge_llm(*for_good)
            names = {"edge-llm-prefill-0", "edge-llm-prefill-1", "edge-llm-decode-0"}
            await stage.outside.until("two prefill workers and one of decode", lambda ready: set(ready) == names, 300)
            await _reads_prompts(stage, load, "edge-llm-prefill-1")
            for_good_s = time.monotonic() - began_s
        where = stage.edge.node_of("edge-llm-prefill-1")
    finally:
        stage.edge.scale(PREFILL, 1)
        stage.edge.label_node(node, ROLES[node])
    if load.failed:
        raise Broken(f"{len(load.failed)} of {len(load.finished)} requests failed: {load.failed[0].failure}")
    if where != node:
        raise Broken(f"the new prefill worker is on {where}, not on {node}")
    return (
        f"{node} read prompts {at_once_s:.1f} s after it was told, no restart; for good after {for_good_s:.0f} s; "
        f"{len(load.finished)} requests, 0 failed"
    )


async def _reads_prompts(stage: Stage, load: Load, worker: str) -> None:
    """Wait until it computed two prompts. Raises Broken."""
    already = len(load.streams)
    while load.used("prefill_node")[worker] < 2:
        if len(load.streams) > already + 80:
            raise Broken(f"80 requests later {worker} had read none: {dict(load.used('prefill_node'))}")
        await asyncio.sleep(0.2)


async def overlays_are_accepted(stage: Stage) -> str:
    """The API server decodes every object of every shipped overlay strictly, with admission, and writes nothing."""
    tried = [
        await _dry_run(stage, "-k", path.parent) for path in sorted((SHIPPED / "overlays").glob("*/kustomization.yaml"))
    ]
    if (SHIPPED / "bench").is_dir():
        tried.append(await _dry_run(stage, "-k", SHIPPED / "bench"))
    if _INSTALL.is_file():
        tried.append(await _dry_run(stage, "-f", _INSTALL))
    if not tried:
        raise NotHere("no overlay ships")
    return ", ".join(tried)


async def _dry_run(stage: Stage, how: str, what: Path) -> str:
    """Its name and how many objects were accepted. Raises Broken with what the API server says."""
    said = await asyncio.to_thread(stage.cluster.kubectl, "apply", how, what, *_DRY, deadline_s=120)
    accepted = [line for line in said.splitlines() if line.endswith("(server dry run)")]
    if not accepted or len(accepted) != len(said.strip().splitlines()):
        raise Broken(f"{what.name}: {said.strip()[-300:]}")
    return f"{what.stem} {len(accepted)} objects"


async def benches_inside(stage: Stage) -> str:
    """`edge-llm bench serve --cluster`: a Job measures in the cluster, its record comes back."""
    if not (SHIPPED / "bench").is_dir():
        raise NotHere("no bench Job ships")
    await stage.do("create", "secret", "generic", "edge-llm-bench-key", f"--from-file={stage.edge.keys.api_key}")
    await asyncio.to_thread(stage.edge.apply, SHIPPED / "bench")
    # instead of the cluster's DNS, which is not here
    address = stage.edge.get("service", "edge-llm")["spec"]["clusterIP"]
    alias = {"hostAliases": [{"ip": address, "hostnames": ["edge-llm"]}]}
    patch = {"spec": {"jobTemplate": {"spec": {"template": {"spec": alias}}}}}
    await stage.do("patch", "cronjob", "edge-llm-bench", "--type=merge", "-p", json.dumps(patch))
    folder = stage.cluster.site.run / "bench"
    words = ["bench", "serve", "--cluster", "--kubeconfig", str(stage.cluster.site.admin), "--output", str(folder)]
    words += ["--requests", str(_REQUESTS), "--concurrency", "2", "--warm-up", "1", "--mode", "split"]
    words += ["--prompt-tokens", "64", "--answer-tokens", "16"]
    await stage.edge_llm(*words, with_gateway=False, deadline_s=_JOB_S)
    records = [load_record(path) for path in folder.glob("*.json")]
    if len(records) != 1 or not records[0].is_complete or records[0].failures:
        raise Broken(f"{len(records)} records came back: {[record.failures for record in records]}")
    stage.measured["bench in the cluster"] = records[0].figures
    node = records[0].nodes[0]
    return f"one complete record of kind {records[0].kind} came back, of a pod with {len(node.usable_cores)} cores"


SCENARIOS: Final = (
    Scenario("a node changes its role", flips_a_role),
    Scenario("the bench as a Job", benches_inside),
    Scenario("every overlay, strict dry run", overlays_are_accepted, settles=False),
)
