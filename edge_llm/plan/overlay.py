"""A cluster that fits, as a kustomize overlay on the shipped manifests.

Pure. Owns what differs from k3s_manifests/overlays: replicas, settings and sizes, and the labels of nodes. Refuses to
read and write files (manifests.py) and to render what kubectl renders.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import yaml

from edge_llm.errors import ConfigError
from edge_llm.plan.boards import MIB, Group
from edge_llm.plan.changes import Earlier
from edge_llm.plan.description import Description
from edge_llm.plan.fit import Fitted
from edge_llm.plan.listed import OWN_LIST
from edge_llm.plan.processors import PI5
from edge_llm.words import counted

OVERLAY: Final = "kustomization.yaml"
# The copy of the shipped manifests, beside the overlay.
SHIPPED: Final = "edge-llm"
# The container that measures a worker's level before it starts.
VERIFY: Final = "verify"
HEADER: Final = "# Rendered by `edge-llm cluster render`"
_GIB: Final = 1 << 30
_DOWNLOAD: Final = "model-download"
ON_BOARD: Final = "model-on-board"
# With these the model comes from elsewhere; else a worker's volume must hold it.
_NO_DOWNLOAD: Final = frozenset({"model-image-volume", ON_BOARD})
_SOURCES: Final = frozenset({_DOWNLOAD, *_NO_DOWNLOAD})
_POLICY: Final = "network-policy"
# What is lost with a component that was not named, where its name does not say it.
_LOST: Final = {_POLICY: " (default deny: without it any pod of the cluster reaches workers, and they reach anything)"}
# More volumes than components/model-on-board has, and a list of models of one's own, in the copy of the manifests.
_VOLUMES: Final = f"{SHIPPED}/volumes.yaml"
_MODELS: Final = f"{SHIPPED}/components/{OWN_LIST}/models.yaml"
# What components/pi5 takes for granted: its workers ask for three of them.
_PI5_CORES: Final = 4
# Of components/high-availability, and one more that an update starts before it stops another.
_GATEWAYS_UPDATING: Final = 3


@dataclass(frozen=True, slots=True)
class Shipped:
    """What is read of the shipped manifests. `verifies`: whether `edge-llm verify` runs before a worker;
    `storage_bytes`: of a worker's volume, 0 where it has none. `volumes`: those of components/model-on-board."""

    components: frozenset[str]
    gateway_bytes: int
    verifies: bool
    storage_bytes: int
    volumes: tuple[Mapping[str, Any], ...] = ()


def files(described: Description, fit: Fitted, shipped: Shipped, file_bytes: int, models: str) -> dict[str, str]:
    """The overlay, and what it lays over the copy of the manifests, by place in the folder. `models`: the list of
    models of this machine. Raises ConfigError for a component that is not shipped."""
    components = _components(described, fit, shipped)
    volumes = _more_volumes(fit, shipped) if ON_BOARD in components else []
    found = {OVERLAY: kustomization(described, fit, shipped, file_bytes)}
    if volumes:
        found[_VOLUMES] = yaml.dump_all(volumes, Dumper=_Dumper, sort_keys=False, width=120)
    if OWN_LIST in components:
        found[_MODELS] = models
    return found


def kustomization(described: Description, fit: Fitted, shipped: Shipped, file_bytes: int) -> str:
    """The overlay's own file. Raises ConfigError for a component that is not shipped."""
    components = _components(described, fit, shipped)
    more = [_VOLUMES] if ON_BOARD in components and _more_volumes(fit, shipped) else []
    storage = _storage(components, shipped, file_bytes)
    content: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"{SHIPPED}/base", *(f"{SHIPPED}/workers/{group.role}" for group in fit.groups), *more],
        "replicas": [{"name": f"edge-llm-{group.role}", "count": len(group.boards)} for group in fit.groups],
        "configMapGenerator": [
            {
                "name": "edge-llm-worker",
                "namespace": "edge-llm",
                "behavior": "merge",
                "literals": [f"{key}={value}" for key, value in settings(described).items()],
            }
        ],
        "components": [f"{SHIPPED}/components/{name}" for name in components],
        "patches": [patch for group in fit.groups for patch in _patches(group, shipped, storage, described)],
    }
    if described.image:
        content["images"] = [_image(described.image)]
    return "\n".join([*_comment(described, fit), _text(content)])


def settings(described: Description) -> dict[str, str]:
    """What every worker is told, by environment variable."""
    values: dict[str, object] = {
        "model": described.model,
        "policy": described.policy,
        "slots": described.settings.slots,
        "spare_slots": described.settings.spare_slots,
        "spare_prompts": str(described.settings.spare_prompts).lower(),
        "n_ctx": described.settings.n_ctx,
        "chunk_tokens": described.settings.chunk_tokens,
        "k_type": described.settings.k_type,
        "v_type": described.settings.v_type,
        "prefix_cache_bytes": described.settings.prefix_cache_bytes,
    }
    return {f"EDGE_LLM_WORKER_{key.upper()}": str(value) for key, value in values.items()}


def labels(described: Description, fit: Fitted, moving: Collection[str] = ()) -> list[str]:
    """The commands that say which board does what, but for those that need more than a label (changes.py); none where
    one board does all, unless its volumes ask for it."""
    if len(described.boards) == 1 and ON_BOARD not in (described.components or ()):
        return []
    return _labels(fit, moving)


def volume_notes(
    described: Description, fit: Fitted, shipped: Shipped, file_bytes: int, earlier: Earlier
) -> Iterable[str]:
    """What volumes of another size take, on a cluster that is installed already."""
    storage = _storage(_components(described, fit, shipped), shipped, file_bytes)
    if storage is None and not earlier.sizes_volumes:
        return
    now = f"{storage} instead of the {shipped.storage_bytes / _GIB:g}Gi" if storage else "of the size"
    names = " ".join(f"edge-llm-{group.role}" for group in fit.groups)
    yield (
        f"workers' volumes are {now} that {'are' if storage else 'is'} shipped, and a StatefulSet that is installed "
        "refuses another size: before `kubectl apply -k`, if it was installed with another one, `kubectl -n edge-llm "
        f"delete sts {names} --cascade=orphan --ignore-not-found`. Pods and their volumes stay, and what is applied "
        "takes them over; volumes that exist keep their size (K3s's local-path does not look at it, elsewhere make "
        "them larger)"
    )


def component_notes(described: Description, fit: Fitted, shipped: Shipped) -> Iterable[str]:
    """What is left out because components were named."""
    named = _components(described, fit, shipped)
    has_source = bool(_SOURCES & set(named))
    lost = [
        f"{name}{_LOST.get(name, '')}"
        for name in _chosen(described, fit)
        if name not in named and not (name in _SOURCES and has_source)
    ]
    if lost:
        yield (
            f"`components:` is the whole list, so this cluster is without {', '.join(lost)}, which would have been "
            "chosen: name what you want to keep"
        )


def table(fit: Fitted) -> list[dict[str, object]]:
    """A line for each board: what it does, what its pod gets, and what is left."""
    return [
        {
            "board": board.name,
            "role": group.role,
            "ram_bytes": board.ram_bytes,
            "room_bytes": board.room_bytes,
            "sum_bytes": group.sum.total_bytes,
            "limit_bytes": group.limit_bytes,
            "left_bytes": board.room_bytes - group.limit_bytes,
        }
        for group in fit.groups
        for board in group.boards
    ]


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block, so that people can read it."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _text(content: object) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120)


def _components(described: Description, fit: Fitted, shipped: Shipped) -> Sequence[str]:
    """Those asked for, or those that fit what is described; `release` comes last, it reaches what others add."""
    wanted = _chosen(described, fit)
    if described.components is not None:
        _check_components(set(described.components), shipped)
        wanted = [name for name in dict.fromkeys(described.components) if name != "release"]
    return [name for name in [*wanted, "release"] if name in shipped.components]


def _chosen(described: Description, fit: Fitted) -> list[str]:
    found = [_POLICY, _DOWNLOAD]
    if all(board.cpu == PI5 and board.cores >= _PI5_CORES for board in described.boards):
        found.append("pi5")
    if len(described.boards) > 1 and fit.gateways >= _GATEWAYS_UPDATING:
        found.append("high-availability")
    return found


def _more_volumes(fit: Fitted, shipped: Shipped) -> list[Mapping[str, Any]]:
    """A volume is one worker's, so there are as many: beside the shipped ones, more like the last of them."""
    workers = sum(len(group.boards) for group in fit.groups)
    numbers = range(len(shipped.volumes) + 1, workers + 1)
    if not shipped.volumes:
        return []
    like = shipped.volumes[-1]
    stem = str(like["metadata"]["name"]).rpartition("-")[0]
    return [{**like, "metadata": {**like["metadata"], "name": f"{stem}-{number}"}} for number in numbers]


def _check_components(wanted: set[str], shipped: Shipped) -> None:
    """Raises ConfigError for what is not there, and for what would leave workers without their model."""
    if unknown := wanted - shipped.components:
        raise ConfigError(
            f"components: {', '.join(sorted(unknown))}: not shipped; there are {', '.join(sorted(shipped.components))}"
        )
    sources = sorted(wanted & _SOURCES)
    if len(sources) > 1:
        raise ConfigError(f"components: {' and '.join(sources)}: a model comes from one place, keep one of them")
    if _POLICY in wanted and not sources:
        raise ConfigError(
            f"components: {_POLICY} lets workers out to each other only, so they cannot fetch their model: add one of "
            f"{', '.join(sorted(_SOURCES))}"
        )


def _storage(components: Iterable[str], shipped: Shipped, file_bytes: int) -> str | None:
    """Of a worker's volume, where the model is downloaded and the shipped size does not hold it."""
    # a wheel or a partial download lies beside the file for a while; the rest is what `verify` leaves
    needed = 2 * file_bytes + _GIB
    is_enough = not shipped.storage_bytes or needed <= shipped.storage_bytes
    return None if is_enough or _NO_DOWNLOAD & set(components) else f"{math.ceil(needed / _GIB)}Gi"


def _patches(
    group: Group, shipped: Shipped, storage: str | None, described: Description
) -> Iterable[Mapping[str, Any]]:
    name = f"edge-llm-{group.role}"
    spec: dict[str, Any] = {"containers": [{"name": "worker", "resources": _memory(group.limit_bytes)}]}
    if shipped.verifies:
        spec["initContainers"] = [_verify(group)]
    if len(described.boards) == 1:
        spec["nodeSelector"] = None  # one board needs no label
    whole = {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name},
        "spec": {"template": {"spec": spec}},
    }
    target = {"kind": "StatefulSet", "name": name}
    yield {"target": target, "patch": _text(whole)}
    if storage is not None:
        path = "/spec/volumeClaimTemplates/0/spec/resources/requests/storage"
        change = [{"op": "replace", "path": path, "value": storage}]
        yield {"target": target, "patch": _text(change)}


def _labels(fit: Fitted, moving: Collection[str] = ()) -> list[str]:
    """Without --overwrite: a board that has another role by now (`cluster role`) is refused, not stranded."""
    boards = {group.role: [board.name for board in group.boards if board.name not in moving] for group in fit.groups}
    return [f"kubectl label node {' '.join(names)} edge-llm/role={role}" for role, names in boards.items() if names]


def _memory(size: int) -> dict[str, dict[str, str]]:
    """Request and limit are the same: a board's memory is promised once."""
    memory = {"memory": f"{size // MIB}Mi"}
    return {"requests": memory, "limits": dict(memory)}


def _verify(group: Group) -> dict[str, Any]:
    """It runs before the worker, never beside it."""
    limit = group.verify_limit_bytes
    if limit is None:
        return {"name": VERIFY, "env": [{"name": "EDGE_LLM_VERIFY_FIRST", "value": "no"}]}
    return {"name": VERIFY, "resources": _memory(limit)}


def _image(image: str) -> dict[str, str]:
    """NAME[:TAG] or NAME@DIGEST in the words of kustomize."""
    name, _, digest = image.partition("@")
    if digest:
        return {"name": "localhost/edge-llm", "newName": name, "digest": digest}
    head, _, last = name.rpartition("/")
    short, _, tag = last.partition(":")
    new = {"name": "localhost/edge-llm", "newName": f"{head}/{short}" if head else short}
    return new | ({"newTag": tag} if tag else {})


def _comment(described: Description, fit: Fitted) -> Iterable[str]:
    slots = counted(described.settings.slots, "slot")
    yield f"{HEADER}: {described.model}, {slots} of {described.settings.n_ctx} tokens."
    yield "# Rendering again replaces this folder. Put changes of your own into an overlay that has it as a resource."
    yield "# Boards keep their roles then, by these lines (one board alone needs no label):"
    for line in _labels(fit):
        yield f"#   {line}"
    for group in fit.groups:
        parts = ", ".join(f"{name} {size / MIB:,.0f}" for name, size in group.sum.parts.items() if size)
        limit = f"with head room {group.limit_bytes // MIB:,}"
        yield f"# {group.role}: {group.sum.total_bytes / MIB:,.0f} MiB ({parts}), {limit}"
