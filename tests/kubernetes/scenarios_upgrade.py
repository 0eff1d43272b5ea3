"""Old and new builds side by side, as they are during an upgrade: what can exchange KV does, the rest runs alone.

Owns the upgrade: later versions are applied as their checkouts come, and held (a StatefulSet's partition) where one
decode worker is new and everybody else is old. Refuses to know how a build is made: builds.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import edge_llm
from edge_llm.bench.followed import Followed
from tests.kubernetes.builds import Build, checkout, later, write_images
from tests.kubernetes.deploy import DECODE, GATEWAY, PREFILL
from tests.kubernetes.outside import Load, differences
from tests.kubernetes.shell import Broken
from tests.kubernetes.stage import Scenario, Stage

_OLD: Final = ("edge-llm-decode-0", "edge-llm-prefill-0")
_NEW: Final = "edge-llm-decode-1"
_ENOUGH: Final = 2
_PATIENCE: Final = 80
# What a new identity may promise is measured once, for minutes: not what is tried here.
_AT_ONCE: Final = {"EDGE_LLM_VERIFY_FIRST": "no"}

SAME: Final = Build(later(1))
OTHER_CLASS: Final = Build(later(2), {"EDGE_LLM_WORKER_POLICY": "fast", **_AT_ONCE})
OTHER_KV: Final = Build(later(3), {"EDGE_LLM_WORKER_K_TYPE": "q8_0", **_AT_ONCE})


@dataclass(frozen=True, slots=True)
class Side:
    """The stage while a build is beside the old one: answers since then, and what `cluster status` says."""

    stage: Stage
    load: Load
    since_s: float
    status: str

    @property
    def good(self) -> list[Followed]:
        """Answers that were asked for since then."""
        return [one for one in self.load.finished if not one.failure and one.sent_s >= self.since_s]

    def answers(self, worker: str) -> list[Followed]:
        """Those that this worker wrote."""
        return [one for one in self.good if one.own["decode_node"] == worker]

    def split(self, worker: str) -> list[Followed]:
        """Those for which KV came to this worker, or from it."""
        own = ((one, one.own) for one in self.good)
        return [one for one, by in own if by["mode"] == "split" and worker in (by["prefill_node"], by["decode_node"])]

    async def until(self, what: str, found: Callable[[], list[Followed]]) -> list[Followed]:
        """Answers, once there are enough of them. Raises Broken."""
        already = len(self.load.streams)
        while len(found()) < _ENOUGH:
            if len(self.load.streams) > already + _PATIENCE:
                raise Broken(f"{what}: {len(found())} of {_PATIENCE} requests; cluster status: {self.status}")
            await asyncio.sleep(0.2)
        return found()

    def must_say(self, *words: str) -> None:
        if missing := [one for one in words if one not in self.status]:
            raise Broken(f"cluster status does not say {missing}: {self.status}")


async def upgrades_side_by_side(stage: Stage) -> str:
    """Three upgrades, each held half-way, under load; the last one is brought to its end. No request fails."""
    builds = (SAME, OTHER_CLASS, OTHER_KV)
    await asyncio.to_thread(_bring, stage, builds)
    stage.edge.scale(DECODE, 2)
    await stage.outside.until("a second decode worker", lambda ready: _NEW in ready, 300)
    said = []
    try:
        await asyncio.to_thread(_hold, stage, 1)
        async with stage.outside.load(lambda number: _body(stage, number), 4) as load:
            for build, look in zip(builds, (_same, _other_class, _other_kv), strict=True):
                said.append(await look(await _beside(stage, load, build)))
                stage.say(said[-1])
            await asyncio.to_thread(_hold, stage, 0)
            await stage.rolled_out(DECODE, PREFILL)
            said.append(await _all_new(stage))
    finally:
        await asyncio.to_thread(_hold, stage, 0)
    stage.measured["side by side"] = {"requests": len(load.finished), "failed": len(load.failed), "seen": said}
    if load.failed:
        raise Broken(f"{len(load.failed)} of {len(load.finished)} requests failed: {load.failed[0].failure}")
    return f"{'; '.join(said)}; {len(load.finished)} requests, 0 failed"


def _bring(stage: Stage, builds: tuple[Build, ...]) -> None:
    """The images onto every board, as README's updates begin."""
    archive = stage.cluster.site.run / "builds.oci.tar"
    write_images(archive, stage.cluster.images["edge-llm"], builds)
    for board in stage.cluster.boards:
        board.load(archive)
    archive.unlink()


def _hold(stage: Stage, partition: int) -> None:
    """Pods below this number stay what they are, whatever is applied."""
    for workload in (DECODE, PREFILL):
        patch = f'{{"spec":{{"updateStrategy":{{"rollingUpdate":{{"partition":{partition}}}}}}}}}'
        stage.edge.k("patch", workload, "--type=merge", "-p", patch)


def _body(stage: Stage, number: int) -> dict[str, Any]:
    """By turns: must be split if that can be, and as the gateway likes."""
    return stage.body(10_000 + number, prompt=96, answer=32, mode="auto" if number % 2 else "split")


async def _beside(stage: Stage, load: Load, build: Build) -> Side:
    """Apply the build; back when the second decode worker runs it, beside old ones."""
    folder = stage.cluster.site.run / build.version
    overlay = await asyncio.to_thread(checkout, folder, build, 2)
    await asyncio.to_thread(stage.edge.apply, overlay)
    await stage.rolled_out(DECODE, PREFILL, GATEWAY)

    def is_beside(ready: dict[str, dict[str, Any]]) -> bool:
        versions = {name: node["version"] for name, node in ready.items()}
        return versions == {_NEW: build.version} | dict.fromkeys(_OLD, edge_llm.__version__)

    await stage.outside.until(f"{_NEW} of {build.version} beside old ones", is_beside, 300)
    since_s, status = time.monotonic(), await stage.edge_llm("cluster", "status")
    side = Side(stage, load, since_s, status)
    side.must_say(f"versions of edge-llm: {edge_llm.__version__} on {', '.join(_OLD)}; {build.version} on {_NEW}")
    return side


async def _same(side: Side) -> str:
    """Another version with the same llama.cpp and settings: one class, KV goes between old and new, token for token."""
    side.must_say(f"{', '.join((_OLD[0], _NEW, _OLD[1]))} exchange KV of", "token for token (class ")
    split = await side.until("split answers of the new build", lambda: side.split(_NEW))
    tokens = 0
    for answer in split[:_ENOUGH]:
        body = _body(side.stage, side.load.streams.index(answer))
        whole = await side.stage.outside.ask(body | {"edge_llm": {"mode": "local", "return_token_ids": True}})
        if wrong := differences(answer, whole):
            raise Broken(f"split between two versions is not what one worker answers: {wrong}")
        tokens += len(answer.ids)
    return f"KV goes between {SAME.version} and {edge_llm.__version__}, {tokens} tokens equal to one worker's"


async def _other_class(side: Side) -> str:
    """Other kernels: KV means the same, its bits do not. Used where that is faster, and never promised for."""
    side.must_say("in 2 exactness classes:", "the answer then has level none; they differ: policy ")
    answers = await side.until("answers of the other class", lambda: side.answers(_NEW))
    promised = [one.request_id for one in side.split(_NEW) if one.own["level"] != "none"]
    if promised:
        raise Broken(f"split across classes, and level is not none: {promised}")
    return (
        f"{OTHER_CLASS.version} with other kernels: {len(answers)} answers, {len(side.split(_NEW))} split, level none"
    )


async def _other_kv(side: Side) -> str:
    """Another type of KV: it goes to nobody, who is old goes on splitting, the new one runs alone."""
    side.must_say(
        f"{_NEW}: no KV goes anywhere: nobody else has this model with KV that means the same",
        f"{', '.join(_OLD)} and {_NEW} do not: their KV has ",
        "bytes a token (k_type, v_type)",
    )
    alone = await side.until("answers of the other KV", lambda: side.answers(_NEW))
    split = await side.until("split answers of the old build", lambda: side.split(_OLD[0]))
    if wrong := side.split(_NEW):
        raise Broken(f"split between KV that does not mean the same: {wrong[0].own}")
    return (
        f"{OTHER_KV.version} with other KV: {len(alone)} answers, all local, meanwhile {len(split)} split of old ones"
    )


async def _all_new(stage: Stage) -> str:
    """The upgrade has come to its end: one build, and it splits."""
    names = {_NEW, *_OLD}
    await stage.outside.until(
        f"everybody of {OTHER_KV.version}",
        lambda ready: {name: node["version"] for name, node in ready.items()} == dict.fromkeys(names, OTHER_KV.version),
    )
    answer = await stage.outside.ask(stage.body(19_999))
    if answer.own["mode"] != "split" or answer.own["fallback"]:
        raise Broken(f"after the upgrade nothing is split: {answer.own['mode']}, {answer.own['fallback']}")
    status = await stage.edge_llm("cluster", "status")
    if "versions of edge-llm" in status:
        raise Broken(f"after the upgrade cluster status names several versions: {status}")
    return f"then all of {OTHER_KV.version}, split again"


SCENARIOS: Final = (Scenario("old and new builds side by side", upgrades_side_by_side),)
