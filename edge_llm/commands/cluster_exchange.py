"""Who can exchange KV with whom, and why others cannot: what `cluster status` reads out of GET /cluster.

Pure. Owns the words. KV goes between workers that decode it and read prompts for others, of one model whose KV means
the same on both sides (model file, cache types, geometry: `compatibility`). Within an exactness class an answer is what
the level of the worker that decodes it promises: the same token for token at `exact`, nothing while nobody measured.
Across classes KV is used where that is faster (the gateway's cross_class) and promises nothing. Builds of different
versions, while a cluster is being upgraded, are told by what they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, Final

Node = Mapping[str, Any]
SHORT: Final = 8
_PROMISES: Final = {
    "exact": "token for token",
    "same-plan": "token for token for the same chunk borders and batch width (level same-plan)",
    "none": "with level none: nothing is promised",
    "unverified": "with level unverified: nothing is promised until it is measured",
}


def serves(nodes: Iterable[Node]) -> bool:
    """Whether anybody would answer a request now."""
    return any(node["is_ready"] and node["slots"] for node in nodes)


def exchange(nodes: Sequence[Node]) -> list[dict[str, Any]]:
    """One entry per set of workers whose KV means the same; `classes` are those that replace each other bit for bit.
    `alone`: why a set exchanges nothing, empty where it does."""
    sets: dict[tuple[str, str], list[Node]] = {}
    for node in nodes:
        sets.setdefault((node["model"], node.get("compatibility") or f"unknown {node['worker']}"), []).append(node)
    return [
        {
            "model": model,
            "workers": [node["worker"] for node in members],
            "classes": _classes(members),
            "alone": _alone(members),
        }
        for (model, _), members in sorted(sets.items())
    ]


def sentences(nodes: Sequence[Node]) -> list[str]:
    """The same for people, with the reasons between sets and classes, and versions where there are several."""
    lines: list[str] = []
    found = exchange(nodes)
    by_name = {node["worker"]: node for node in nodes}
    for one in found:
        lines += _of_set(one, by_name)
    for first, second in combinations(found, 2):
        left, right = by_name[first["workers"][0]], by_name[second["workers"][0]]
        if first["model"] == second["model"] and "compatibility" in left.keys() & right.keys():
            lines.append(f"{_names(first['workers'])} and {_names(second['workers'])} do not: {_apart(left, right)}")
    lines += _versions(nodes)
    return lines


def _of_set(one: Mapping[str, Any], nodes: Mapping[str, Node]) -> Iterable[str]:
    if one["alone"]:
        yield f"{_names(one['workers'])}: no KV goes anywhere: {one['alone']}"
        return
    classes = one["classes"]
    if len(classes) == 1:
        promised = _promised(one["workers"], nodes)
        yield f"{_names(one['workers'])} exchange KV of {one['model']}, {promised} (class {_short(classes[0])})"
        return
    yield f"{_names(one['workers'])} exchange KV of {one['model']}, in {len(classes)} exactness classes:"
    for group in classes:
        words = f"among themselves {_promised(group['workers'], nodes)}, " if len(group["workers"]) > 1 else ""
        yield f"  {_names(group['workers'])}: {words}class {_short(group)}"
    for first, second in combinations(classes, 2):
        why = _classes_apart(nodes[first["workers"][0]], nodes[second["workers"][0]])
        yield (
            f"  {_short(first)} and {_short(second)}: only where that is faster, and the answer then has level none; "
            f"they differ: {why}"
        )


def _promised(workers: Sequence[str], nodes: Mapping[str, Node]) -> str:
    """What holds for an answer that goes on among them: that of who decodes it."""
    levels: dict[str, list[str]] = {}
    for worker in workers:
        levels.setdefault(nodes[worker]["level"], []).append(worker)
    words = {level: _PROMISES.get(level, f"with level {level}") for level in levels}
    if len(levels) == 1:
        return next(iter(words.values()))
    return "; ".join(f"where {' or '.join(members)} decodes {words[level]}" for level, members in levels.items())


def _classes(members: Iterable[Node]) -> list[dict[str, Any]]:
    classes: dict[str, list[str]] = {}
    for node in members:
        classes.setdefault(node["exactness_class"], []).append(node["worker"])
    return [{"exactness_class": name, "workers": workers} for name, workers in sorted(classes.items())]


def _alone(members: Sequence[Node]) -> str:
    """Why these workers exchange nothing among themselves."""
    whole = [node for node in members if not node["splits"]]
    if len(whole) == len(members):
        return str(members[0].get("split_reason") or "the model does not split")
    if not members[0].get("compatibility"):
        return "the gateway does not say whose KV means the same: it is of an older version"
    if len(members) == 1:
        return "nobody else has this model with KV that means the same"
    if not any(node["serves_prompts"] for node in members):
        return "none of them reads prompts for others"
    if not any(node["slots"] for node in members):
        return "none of them decodes"
    return ""


def _apart(left: Node, right: Node) -> str:
    """Why KV of one model does not mean the same on two workers."""
    if left.get("model_sha256") != right.get("model_sha256"):
        return "their files of this model differ"
    if left.get("kv_bytes_per_token") != right.get("kv_bytes_per_token"):
        return (
            f"their KV has {left.get('kv_bytes_per_token')} and {right.get('kv_bytes_per_token')} bytes a token "
            "(k_type, v_type)"
        )
    return f"their KV is laid out differently ({_builds_apart(left, right) or 'flash attention, or cache types'})"


def _classes_apart(left: Node, right: Node) -> str:
    found = [f"policy {left['policy']}, {right['policy']}"] if left["policy"] != right["policy"] else []
    if builds := _builds_apart(left, right):
        found.append(builds)
    return "; ".join(found) or "the CPU, or the results of its kernels"


def _builds_apart(left: Node, right: Node) -> str:
    """What of the build of llama.cpp is not the same; long values are not shown."""
    words = []
    for key in sorted(left["build"].keys() | right["build"].keys()):
        mine, other = left["build"].get(key), right["build"].get(key)
        if mine != other:
            words.append(f"{key} {mine}, {other}" if len(f"{mine}{other}") <= 40 else key)
    return "build: " + "; ".join(words) if words else ""


def _versions(nodes: Sequence[Node]) -> Iterable[str]:
    versions: dict[str, list[str]] = {}
    for node in nodes:
        versions.setdefault(node["version"], []).append(node["worker"])
    if len(versions) > 1:
        yield "versions of edge-llm: " + "; ".join(
            f"{version} on {_names(workers)}" for version, workers in sorted(versions.items())
        )


def _names(workers: Sequence[str]) -> str:
    return ", ".join(workers)


def _short(group: Mapping[str, Any]) -> str:
    return str(group["exactness_class"])[:SHORT]
