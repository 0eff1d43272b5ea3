"""The Kubernetes cluster that edge-llm was applied to: what a guide's reader forgets, found from where kubectl works.

Owns judging nodes, role labels, the Secret, images and pods; the judging functions are pure, over objects as the API
gives them. Refuses to look at what a Secret holds, to change anything, and to know kubectl: it is given `get`.

Sources: role labels and names are those of k3s_manifests. A node names at most 50 of its images (kubelet,
nodeStatusMaxImages): then nothing follows from one that is not among them. Words of a pod that does not run: its
conditions and container states (Kubernetes, Pod Lifecycle).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from edge_llm.cluster.endpoint_slices import ROLE_LABEL
from edge_llm.doctor.finding import Finding, fail, ok, unknown, warn
from edge_llm.errors import ConfigError

# The words of one `kubectl get`, and what it gives as JSON. Raises ConfigError with kubectl's words.
Get = Callable[..., Any]
Thing = Mapping[str, Any]

_ROLES: Final = ("prefill", "decode", "mixed")
_SECRET: Final = "edge-llm-keys"
_KEYS: Final = frozenset({"cluster.key", "api-keys.yaml"})
_MOST_IMAGES: Final = 50
_MADE_BY: Final = 'README, "On a cluster"'
_NOT_YET: Final = ("ContainerCreating", "PodInitializing")


def check_cluster(get: Get, namespace: str) -> list[Finding]:
    """All of it, in the guide's order; one finding where nothing answers."""
    try:
        nodes = _items(get("nodes"))
    except ConfigError as error:
        return [
            fail(
                "cluster.reached",
                error.message,
                why="everything else is asked of it",
                do=f"give --kubeconfig FILE or set KUBECONFIG ({_MADE_BY}, step 2)",
                commands=["kubectl get nodes"],
            )
        ]
    found = [ok("cluster.reached", f"{len(nodes)} nodes"), nodes_ready(nodes)]
    try:
        sets = _items(get("statefulsets"))
        works = [*_items(get("deployments")), *sets]
        pods, secrets = _items(get("pods")), _secret_keys(get)
    except ConfigError as error:
        return [*found, unknown("cluster.workloads", error.message, why=f"nothing more can be said of {namespace}")]
    found += [role_labels(nodes, sets), keys(secrets, namespace), applied(works, namespace)]
    if works:
        found += [boards(nodes, sets, namespace), images(nodes, works), pods_run(pods, namespace)]
    return found


def nodes_ready(nodes: Sequence[Thing]) -> Finding:
    check = "cluster.nodes"
    bad = sorted(_name(node) for node in nodes if not _is_ready(node))
    if bad:
        return fail(
            check,
            f"not Ready: {', '.join(bad)}",
            why="they take no pods, and what ran there is not reached",
            do="see what K3s says on the board; `edge-llm doctor` there knows more",
            commands=[f"kubectl describe node {bad[0]}", "sudo journalctl -u k3s -u k3s-agent -n 50 --no-pager"],
        )
    away = sorted(_name(node) for node in nodes if node.get("spec", {}).get("unschedulable"))
    if away:
        return warn(
            check,
            f"Ready, but cordoned: {', '.join(away)}",
            why="new pods do not go there",
            do="when its maintenance is over",
            commands=[f"kubectl uncordon {' '.join(away)}"],
        )
    return ok(check, "all Ready")


def role_labels(nodes: Sequence[Thing], sets: Sequence[Thing]) -> Finding:
    check = "cluster.labels"
    roles = {_name(node): role for node in nodes if (role := _role(node)) is not None}
    strange = sorted(name for name, role in roles.items() if role not in _ROLES)
    if strange:
        return fail(
            check,
            ", ".join(f"{name} has {ROLE_LABEL}={roles[name]}" for name in strange),
            why="no worker starts there: the roles are " + ", ".join(_ROLES),
            do="give it one of them",
            commands=[f"kubectl label node --overwrite {strange[0]} {ROLE_LABEL}=decode"],
        )
    if sets and not any(ROLE_LABEL in _selector(one) for one in sets):
        return ok(check, "none is needed: workers may run anywhere")
    if not roles:
        return warn(
            check,
            "no node has a role",
            why="only the overlay single-node needs none: all others wait for boards",
            do=f"{_MADE_BY}, step 4; `edge-llm cluster render` chooses roles",
            commands=[f"kubectl label node NODE {ROLE_LABEL}=decode"],
        )
    counts = Counter(roles.values())
    return ok(check, ", ".join(f"{counts[role]} {role}" for role in _ROLES if counts[role]))


def keys(found: frozenset[str] | None, namespace: str) -> Finding:
    """`found`: names within the Secret; None: it is not there."""
    check, do = "cluster.keys", f"make it: {_MADE_BY}, step 5"
    why = "no key is part of a manifest: pods wait for this Secret and do not start without it"
    if found is None:
        return fail(check, f"no Secret {_SECRET} in namespace {namespace}", why=why, do=do)
    if missing := sorted(_KEYS - found):
        return fail(check, f"Secret {_SECRET} has no {' and no '.join(missing)}", why=why, do=do)
    return ok(check, f"Secret {_SECRET} has {' and '.join(sorted(_KEYS))}")


def applied(works: Sequence[Thing], namespace: str) -> Finding:
    check = "cluster.workloads"
    if not works:
        return fail(
            check,
            f"nothing of edge-llm in namespace {namespace}",
            why="no gateway and no worker is asked for",
            do=f"{_MADE_BY}, step 6, or name the --namespace",
            commands=["kubectl apply -k k3s_manifests/overlays/OVERLAY"],
        )
    return ok(check, ", ".join(f"{_name(work)} {_replicas(work)}" for work in works))


def boards(nodes: Sequence[Thing], sets: Sequence[Thing], namespace: str) -> Finding:
    """Boards of a label against workers that look for one: one worker per board."""
    check = "cluster.boards"
    has = Counter(role for node in nodes if (role := _role(node)) is not None)
    wants = Counter[str]()
    for one in sets:
        if role := _selector(one).get(ROLE_LABEL):
            wants[role] += _replicas(one)
    if short := [role for role in _ROLES if has[role] < wants[role]]:
        role = short[0]
        return fail(
            check,
            ", ".join(f"{wants[one]} {one} workers for {has[one]} boards of that label" for one in short),
            why="there is one worker to a board: the others stay Pending",
            do="label more boards, or apply with fewer replicas (also in the overlay, or the next apply takes it back)",
            commands=[
                f"kubectl label node --overwrite NODE {ROLE_LABEL}={role}",
                f"kubectl -n {namespace} scale statefulset/edge-llm-{role} --replicas={has[role]}",
            ],
        )
    if idle := [role for role in _ROLES if has[role] > wants[role]]:
        return warn(
            check,
            ", ".join(f"{has[role]} boards labelled {role}, {wants[role]} workers" for role in idle),
            why="the other boards do nothing",
            do="raise the replicas, also in the overlay",
            commands=[
                f"kubectl -n {namespace} scale statefulset/edge-llm-{role} --replicas={has[role]}" for role in idle
            ],
        )
    return ok(check, "a board for each worker")


def images(nodes: Sequence[Thing], works: Sequence[Thing]) -> Finding:
    """Images of a local name come from nowhere: each board that may run one must have it."""
    check = "cluster.images"
    wanted = sorted({name for work in works for name in _images(work) if name.startswith("localhost/")})
    if not wanted:
        return ok(check, "from a registry")
    used = [node for node in nodes if _role(node) in _ROLES] or list(nodes)
    lacks = {_name(node): [name for name in wanted if name not in _node_images(node)] for node in used}
    cut = {_name(node) for node in used if len(node.get("status", {}).get("images") or ()) >= _MOST_IMAGES}
    missing = sorted(name for name, what in lacks.items() if what and name not in cut)
    if missing:
        return fail(
            check,
            f"{', '.join(missing)}: no {', '.join(lacks[missing[0]])}",
            why="an image of a local name is not pulled: pods there end in ErrImagePull",
            do=f"import it on the board ({_MADE_BY}, step 3); a node tells of a new image after a minute",
            commands=[f"sudo k3s ctr images import {_archive(lacks[missing[0]][0], missing[0], nodes)}"],
        )
    if any(what for what in lacks.values()):
        return unknown(check, f"nodes with more images than they name: {', '.join(sorted(cut))}")
    return ok(check, f"{', '.join(wanted)} on {len(used)} nodes")


def _archive(image: str, node: str, nodes: Sequence[Thing]) -> str:
    """The file that `make image` leaves for this board; of any other image it is not known what it is called."""
    name, _, version = image.removeprefix("localhost/").partition(":")
    found = next((one for one in nodes if _name(one) == node), {})
    machine = found.get("status", {}).get("nodeInfo", {}).get("architecture", "arm64")
    return f"{name}-{version}-{machine}.oci.tar" if name == "edge-llm" and version else "FILE"


def pods_run(pods: Sequence[Thing], namespace: str) -> Finding:
    check = "cluster.pods"
    left = [pod for pod in pods if pod.get("status", {}).get("phase") == "Failed"]
    waiting = {_name(pod): why for pod in pods if pod not in left and (why := _why_not(pod)) is not None}
    if not pods:
        return fail(
            check,
            "none",
            why="something refuses them",
            do="the events say what",
            commands=[f"kubectl -n {namespace} get events --sort-by=.lastTimestamp"],
        )
    if not waiting and left:
        return warn(
            check,
            f"{len(pods) - len(left)}, all ready; failed and still listed: {', '.join(map(_name, left))}",
            why="others stand in for them: they were evicted, or are Jobs that failed",
            do="when you know why, remove them",
            commands=[
                f"kubectl -n {namespace} describe pod {_name(left[0])}",
                f"kubectl -n {namespace} delete pod --field-selector=status.phase=Failed",
            ],
        )
    if not waiting:
        return ok(check, f"{len(pods)}, all ready")
    is_getting_there = all(is_on_its_way for _why, is_on_its_way, _container in waiting.values())
    commands = []
    for name, (_why, _is, container) in list(waiting.items())[:3]:
        logs = f"kubectl -n {namespace} logs {name}" + (f" -c {container}" if container else "")
        commands.append(logs if container else f"kubectl -n {namespace} describe pod {name}")
    return (warn if is_getting_there else fail)(
        check,
        "\n".join(f"{name}: {why}" for name, (why, _is, _container) in waiting.items()),
        why="a worker that is not ready gets no requests",
        do="wait: it is on its way" if is_getting_there else "see what it says",
        commands=commands,
    )


# -- objects of the API


def _why_not(pod: Thing) -> tuple[str, bool, str] | None:
    """Why a pod is not ready, whether it is on its way all the same, and the container to ask; None: it is ready."""
    status = pod.get("status", {})
    if status.get("phase") == "Succeeded" or _condition(pod, "Ready").get("status") == "True":
        return None
    scheduled = _condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        return f"not placed: {scheduled.get('message', 'no reason given')}", False, ""
    for one in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        state = one.get("state", {})
        waiting, ended = state.get("waiting"), state.get("terminated")
        if waiting and waiting.get("reason") not in (*_NOT_YET, None):
            asks = one["name"] if waiting["reason"] == "CrashLoopBackOff" else ""
            return f"{waiting['reason']} {waiting.get('message', '')}".strip(), False, asks
        if ended and ended.get("exitCode"):
            return f"{one['name']} ended with {ended['exitCode']}: {ended.get('reason', '')}", False, one["name"]
        if "running" in state and not one.get("ready"):
            return f"{one['name']} runs, not ready yet", True, one["name"]
    return f"{status.get('phase', 'unknown')}", status.get("phase") in ("Pending", "Running"), ""


def _secret_keys(get: Get) -> frozenset[str] | None:
    """Names of what it holds; None: there is none. What they hold is dropped unread."""
    found = get("secret", _SECRET, "--ignore-not-found")
    return None if not found else frozenset(found.get("data") or ())


def _items(found: Thing) -> list[Thing]:
    return list(found.get("items", ()))


def _name(thing: Thing) -> str:
    return str(thing.get("metadata", {}).get("name", "?"))


def _role(node: Thing) -> str | None:
    return (node.get("metadata", {}).get("labels") or {}).get(ROLE_LABEL)


def _condition(thing: Thing, kind: str) -> Thing:
    conditions: Sequence[Thing] = thing.get("status", {}).get("conditions") or ()
    return next((one for one in conditions if one.get("type") == kind), {})


def _is_ready(node: Thing) -> bool:
    return _condition(node, "Ready").get("status") == "True"


def _replicas(work: Thing) -> int:
    return int(work.get("spec", {}).get("replicas", 1))


def _pod_spec(work: Thing) -> Thing:
    spec: Thing = work.get("spec", {}).get("template", {}).get("spec", {})
    return spec


def _selector(work: Thing) -> Mapping[str, str]:
    return _pod_spec(work).get("nodeSelector") or {}


def _images(work: Thing) -> set[str]:
    spec = _pod_spec(work)
    return {str(one.get("image", "")) for one in (*spec.get("initContainers", ()), *spec.get("containers", ()))}


def _node_images(node: Thing) -> set[str]:
    return {name for image in node.get("status", {}).get("images") or () for name in image.get("names") or ()}
