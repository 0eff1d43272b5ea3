"""From nothing to a streamed answer, what the link carries, and what streams feel when pods and nodes go and come."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

from tests.kubernetes import net
from tests.kubernetes.deploy import (
    DECODE,
    GATEWAY,
    OVERLAYS,
    PATCH_LINES,
    PREFILL,
    patch_lines,
)
from tests.kubernetes.outside import differences, proven
from tests.kubernetes.shell import Broken, inside, run
from tests.kubernetes.site import OUTSIDE, Node
from tests.kubernetes.stage import Scenario, Stage

WIDE: Final = OVERLAYS / "wide-kv"
_DETECTED_S: Final = 6.0
_KIB_PER_TOKEN: Final = 384
# All nodes share the cores of one machine, so what is handed over at 1 Gbit/s is told and not judged.
_OF_FAST_ETHERNET: Final = 0.70


async def waits_for_the_secret(stage: Stage) -> str:
    """No manifest has a key in it: pods wait, and say for what; with the Secret they start."""
    lines = patch_lines(stage.edge.overlay)
    if lines > PATCH_LINES:
        raise Broken(f"the test overlay has {lines} lines, more than {PATCH_LINES}: what ships is not what is tested")
    await asyncio.to_thread(stage.edge.apply)

    def refused() -> bool:
        said = [line for pod in stage.edge.pods() for line in stage.edge.events(pod["metadata"]["name"])]
        return any("edge-llm-keys" in line and "not found" in line for line in said)

    waited_s = await asyncio.to_thread(stage.cluster.until, "an event that names the missing Secret", refused)
    running = [pod["metadata"]["name"] for pod in stage.edge.pods() if pod["status"]["phase"] == "Running"]
    if running:
        raise Broken(f"pods run without keys: {', '.join(running)}")
    if (found := await _bad(stage)) != {"cluster.boards", "cluster.keys", "cluster.pods"}:
        raise Broken(f"doctor without the Secret: {found}")
    await asyncio.to_thread(stage.edge.make_secret)
    began_s = time.monotonic()
    await stage.rolled_out(PREFILL, DECODE, GATEWAY)
    if (found := await _bad(stage)) != {"cluster.boards"}:  # a decode node has nothing to do yet
        raise Broken(f"doctor when all are ready: {found}")
    return (
        f"an event says so after {waited_s:.1f} s; {time.monotonic() - began_s:.0f} s after the Secret all are ready; "
        f"{lines} lines beside the shipped overlay"
    )


async def _bad(stage: Stage) -> set[str]:
    return {check for check, one in (await stage.doctor()).items() if one["status"] != "ok"}


async def splits_across_nodes(stage: Stage) -> str:
    """A streamed answer for a client outside, by two pods on two nodes, the same as one worker's alone."""
    stray = [
        line for name in _namespaces(stage) for line in net.routes(name).splitlines() if line.startswith("default")
    ]
    if stray:
        raise Broken(f"there is a way to another network: {stray}")
    stage.vocab_size = int((await stage.outside.model())["meta"]["vocab_size"])
    split = await stage.outside.ask(stage.body(1, prompt=400))
    own = split.own
    places = {role: stage.edge.node_of(own[f"{role}_node"]) for role in ("prefill", "decode")}
    if own["mode"] != "split" or own["fallback"] or places["prefill"] == places["decode"]:
        raise Broken(f"not split across two nodes: {own['mode']}, {own['fallback']}, {places}")
    whole = await stage.outside.ask(stage.body(1, prompt=400, mode="local"))
    if wrong := differences(split, whole):
        raise Broken(f"split is not what one worker answers: {wrong}")
    stage.measured["first_answer"] = {key: own[key] for key in ("level", "handoff_bytes", "handoff_ms", "prefill_ms")}
    return (
        f"prefill on {places['prefill']}, decode on {places['decode']}, {own['handoff_bytes'] / 1e6:.1f} MB of KV, "
        f"level {own['level']}, {len(split.ids)} tokens in {len(split.arrivals_s)} pieces, equal to one worker's"
    )


def _namespaces(stage: Stage) -> list[str]:
    return [OUTSIDE, *(node.namespace for node in stage.cluster.site.nodes)]


async def hands_wide_kv_over(stage: Stage) -> str:
    """384 KiB of KV per token over 1 Gbit/s and over 100 Mbit/s: what arrives a second, of what the link carries."""
    await asyncio.to_thread(stage.edge.apply, WIDE)
    await stage.rolled_out(PREFILL, DECODE)
    await stage.outside.until("workers of the wide model", lambda ready: len(ready) == 2 and _is_wide(ready))
    meta = (await stage.outside.model())["meta"]
    if meta["kv_bytes_per_token"] != _KIB_PER_TOKEN * 1024:
        raise Broken(f"the model keeps {meta['kv_bytes_per_token']} bytes a token, not {_KIB_PER_TOKEN} KiB")
    said = []
    try:
        for rate, bits, tokens in ((net.GIGABIT, 1e9, 512), (net.FAST_ETHERNET, 1e8, 256)):
            net.shape(stage.cluster.site, rate)
            found = await _wide_handoff(stage, rate, bits, tokens)
            stage.measured[f"wide KV over {rate}"] = found
            said.append(
                f"{rate}: {found['handoff_rate_mb_per_s']:.1f} MB/s, {100 * found['share_of_link']:.0f} % of the link"
            )
            if rate == net.FAST_ETHERNET and found["share_of_link"] < _OF_FAST_ETHERNET:
                raise Broken(f"{said[-1]}: less than {100 * _OF_FAST_ETHERNET:.0f} %")
    finally:
        net.shape(stage.cluster.site, net.GIGABIT)
    return "; ".join(said)


def _is_wide(ready: dict[str, dict[str, Any]]) -> bool:
    return all("wide" in node["model"] for node in ready.values())


async def _wide_handoff(stage: Stage, rate: str, bits: float, tokens: int) -> dict[str, Any]:
    """A streamed answer over the gateway, then `edge-llm bench net` from the first node."""
    vocab = int((await stage.outside.model())["meta"]["vocab_size"])
    stage.vocab_size, before = vocab, stage.vocab_size
    try:
        answer = await stage.outside.ask(stage.body(7, prompt=tokens, answer=4))
    finally:
        stage.vocab_size = before
    own = answer.own
    if own["mode"] != "split" or own["fallback"]:
        raise Broken(f"over {rate} the prompt did not split: {own['mode']}, {own['fallback']}")
    if own["handoff_bytes"] < (tokens - 1) * _KIB_PER_TOKEN * 1024:
        raise Broken(f"{own['handoff_bytes']} bytes came over, less than {tokens - 1} tokens of {_KIB_PER_TOKEN} KiB")
    pair = await asyncio.to_thread(_bench_net, stage, tokens)
    return {
        "prompt_tokens": tokens,
        "handoff_bytes": own["handoff_bytes"],
        "ttft_s": round(answer.arrivals_s[0] - answer.sent_s, 3),
        **{key: own[key] for key in ("prefill_ms", "handoff_ms", "adopt_ms")},
        "handoff_rate_mb_per_s": pair["handoff_rate_mb_per_s"],
        "share_of_link": round(pair["handoff_rate_mb_per_s"] * 8e6 / bits, 3),
        "bench_net": pair,
    }


def _bench_net(stage: Stage, tokens: int) -> dict[str, Any]:
    """The pair that hands over from the prefill to the decode worker."""
    places = [{"name": pod["metadata"]["name"], "address": f"{pod['status']['podIP']}:9001"} for pod in _workers(stage)]
    folder = stage.cluster.site.run / "bench-net"
    folder.mkdir(exist_ok=True)
    (folder / "workers.yaml").write_text(json.dumps(places))
    command = [sys.executable, "-m", "edge_llm", "bench", "net", "--json", "--output", str(folder)]
    command += ["--workers-file", str(folder / "workers.yaml"), "--key-file", str(stage.edge.keys.cluster_key)]
    command += ["--prompt-tokens", str(tokens), "--repetitions", "2"]
    said = run(*inside(stage.cluster.site.control.namespace), *command, deadline_s=300)
    pairs: list[dict[str, Any]] = json.loads(said)["pairs"]
    return next(one for one in pairs if one["from"].startswith("edge-llm-prefill"))


def _workers(stage: Stage) -> list[dict[str, Any]]:
    return [pod for role in ("prefill", "decode") for pod in stage.edge.pods(role)]


async def survives_deletion(stage: Stage) -> str:
    """The only decode pod is deleted in the middle of a stream, with grace and without: same tokens as undisturbed."""
    said = []
    for seed, words in ((11, ()), (12, ("--grace-period=0", "--force"))):
        body = stage.body(seed, answer=160)
        reference = await stage.outside.ask(_alone(body))
        stream, task = stage.outside.stream(body)
        await stage.outside.after_tokens(stream, task, 20)
        struck_s = time.monotonic()
        await stage.do("delete", "pod", "edge-llm-decode-0", "--wait=false", *words)
        before = len(stream.arrivals_s)
        await task
        if wrong := differences(stream, reference):
            raise Broken(f"pod deleted {' '.join(words) or 'with grace'} after {before} tokens: {wrong}")
        if len(stream.arrivals_s) <= before:
            raise Broken("the stream was over before the pod was gone: nothing is proven")
        resumed_s = stream.resumed_after_s(struck_s) or 0.0
        kind = "without grace" if words else "with grace"
        stage.measured[f"decode pod deleted {kind}"] = {
            "tokens_before": before,
            "tokens": len(stream.ids),
            "longest_silence_ended_after_s": round(resumed_s, 3),
            "finished_by": stream.own.get("decode_node"),
        }
        said.append(f"{kind}: {len(stream.ids)} tokens equal, {before} before, went on within {resumed_s:.2f} s")
        await stage.rolled_out(DECODE)
        await stage.outside.until("the decode worker back", lambda ready: "edge-llm-decode-0" in ready)
    return "; ".join(said)


async def restarts_under_load(stage: Stage) -> str:
    """Every workload restarted, one after the other, while streams run all the time."""
    before = stage.edge.restarts()
    async with stage.outside.load(lambda number: stage.body(1000 + number, prompt=64, answer=32), 3) as load:
        await asyncio.sleep(3)
        for workload in (PREFILL, DECODE, GATEWAY):
            await stage.do("rollout", "restart", workload)
            await stage.rolled_out(workload)
            await asyncio.sleep(2)
        await asyncio.sleep(3)
    after = stage.edge.restarts()
    same = [pod for pod, (uid, _) in before.items() if after.get(pod, ("", 0))[0] == uid]
    if same:
        raise Broken(f"not restarted: {', '.join(same)}")
    stage.measured["rolling restart"] = {"requests": len(load.finished), "failed": len(load.failed)}
    if load.failed:
        raise Broken(f"{len(load.failed)} of {len(load.finished)} requests failed: {load.failed[0].failure}")
    return f"{len(load.finished)} requests, 0 failed, meanwhile prefill, decode and gateway were replaced"


async def scales_decode(stage: Stage) -> str:
    """One more decode pod on one more node: it gets requests, and nothing of what runs was restarted."""
    before = stage.edge.restarts()
    async with stage.outside.load(lambda number: stage.body(2000 + number, prompt=64, answer=32), 4) as load:
        stage.edge.scale(DECODE, 2)
        began_s = time.monotonic()
        await stage.outside.until("a second decode worker", lambda ready: "edge-llm-decode-1" in ready, 300)
        ready_s = time.monotonic() - began_s
        already = len(load.streams)
        while load.used("decode_node")["edge-llm-decode-1"] < 2:
            if len(load.streams) > already + 60:
                raise Broken(f"60 requests later it had none: {dict(load.used('decode_node'))}")
            await asyncio.sleep(0.2)
        used_s = time.monotonic() - began_s - ready_s
    if load.failed:
        raise Broken(f"{len(load.failed)} of {len(load.finished)} requests failed: {load.failed[0].failure}")
    after = stage.edge.restarts()
    changed = [pod for pod, life in before.items() if after.get(pod) != life]
    if changed:
        raise Broken(f"restarted: {', '.join(changed)}")
    return (
        f"ready for the gateway after {ready_s:.1f} s, answering {used_s:.1f} s later on "
        f"{stage.edge.node_of('edge-llm-decode-1')}; {len(load.finished)} requests, 0 failed"
    )


async def survives_a_cut_link(stage: Stage) -> str:
    """A node's cable is pulled: the gateway stops using it within 6 s, its streams go on elsewhere, token for token."""
    stage.edge.scale(DECODE, 2)
    await stage.outside.until("a second decode worker", lambda ready: "edge-llm-decode-1" in ready, 300)
    worker, node = await asyncio.to_thread(_without_gateway, stage)
    bodies = [stage.body(31 + at, answer=200) for at in range(4)]
    references = [await stage.outside.ask(_alone(body)) for body in bodies]
    started = [stage.outside.stream(body) for body in bodies]
    for stream, task in started:
        await stage.outside.after_tokens(stream, task, 10)
    struck_s = time.monotonic()
    net.cut(node)
    try:
        gone_s = await stage.outside.until("the cut node's worker out of use", lambda ready: worker not in ready, 30)
        await asyncio.gather(*(task for _, task in started))
        tokens = proven([stream for stream, _ in started], references)
        resumed_s = max(stream.resumed_after_s(struck_s) or 0.0 for stream, _ in started)
        during = await stage.outside.ask(stage.body(39))
    finally:
        net.mend(node)
    stage.measured["cut link"] = {
        "out_of_use_s": round(gone_s, 3),
        "longest_silence_ended_after_s": round(resumed_s, 3),
    }
    if gone_s > _DETECTED_S:
        raise Broken(f"the gateway used the cut node for {gone_s:.1f} s, more than {_DETECTED_S:.0f} s")
    back_s = await stage.outside.until("the mended node's worker back", lambda ready: worker in ready, 120)
    return (
        f"{worker} out of use after {gone_s:.1f} s; 4 streams, {tokens} tokens equal, all on within {resumed_s:.1f} s; "
        f"meanwhile {during.own['decode_node']} answered; used again {back_s:.1f} s after it was mended"
    )


def _without_gateway(stage: Stage) -> tuple[str, Node]:
    """A decode worker, and its node, which has no gateway: a gateway that is cut off takes its clients with it. Where
    the scheduler put one beside each worker, the last one's moves, as an administrator would have it move."""
    workers = ("edge-llm-decode-0", "edge-llm-decode-1")
    nodes = [stage.edge.node_of(worker) for worker in workers]
    beside = {pod["metadata"]["name"]: pod["spec"]["nodeName"] for pod in stage.edge.pods("gateway")}
    worker, name = next((pair for pair in zip(workers, nodes, strict=True) if pair[1] not in beside.values()), ("", ""))
    if not worker:
        worker, name = workers[-1], nodes[-1]
        stage.cluster.kubectl("cordon", name)
        try:
            stage.edge.k("delete", "pod", *(pod for pod, at in beside.items() if at == name), deadline_s=120)
            stage.edge.rolled_out(GATEWAY)
        finally:
            stage.cluster.kubectl("uncordon", name)
    return worker, next(node for node in stage.cluster.site.nodes if node.name == name)


def _alone(body: Mapping[str, Any]) -> dict[str, Any]:
    """The same request on one worker alone."""
    return {**body, "edge_llm": {"mode": "local", "return_token_ids": True}}


SCENARIOS: Final = (
    Scenario("pods wait for the Secret", waits_for_the_secret, settles=False),
    Scenario("a streamed answer, split", splits_across_nodes, settles=False),
    Scenario("hand-off of wide KV", hands_wide_kv_over),
    Scenario("the only decode pod is deleted", survives_deletion),
    Scenario("rolling restart under load", restarts_under_load),
    Scenario("decode from 1 to 2", scales_decode),
    Scenario("a node's link is cut", survives_a_cut_link),
)
