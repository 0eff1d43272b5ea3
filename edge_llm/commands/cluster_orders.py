"""`edge-llm cluster drain|role`: take a worker out and in again, and let it stand for another role.

Both go to the gateway, which passes them on with a ticket of the cluster key: they need an operator's API key, and no
way to the workers. The worker itself keeps what it was told and reports it to every gateway; started again, it takes
work in the role of its settings. On Kubernetes a role for good is where a worker runs: with --kubeconfig the board
gets the other label and the workloads other sizes (cluster_moves.py), and the worker is replaced.

Owns the two commands, waiting, what is refused to keep a model served, and what is said of a move that did not come to
its end. Refuses to know tickets.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from edge_llm.commands.cluster_gateway import Gateway, gateway_options
from edge_llm.errors import ClientError, ConfigError, EdgeLLMError, NotOperator, WorkerUnreachable
from edge_llm.words import counted

if TYPE_CHECKING:
    from edge_llm.commands.kubectl import Kubectl

POLL_S: Final = 0.5
# A gateway asks its workers how they are about once a second, and gives up a question after 1.5 s.
SEEN_S: Final = 5.0
SEEN_POLL_S: Final = 0.1
INTERRUPTED: Final = 130
_force = click.option("--force", is_flag=True, help="Even if nobody else serves its model.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@click.argument("node")
@click.option("--undo", is_flag=True, help="Let it take work again.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Until nothing runs there any more.")
@click.option("--timeout-s", type=click.FloatRange(min=0), default=180.0, show_default=True, help="How long to wait.")
@_force
@gateway_options
@_json
def drain(
    node: str,
    undo: bool,
    wait: bool,
    timeout_s: float,
    force: bool,
    url: str,
    api_key_file: Path | None,
    as_json: bool,
) -> None:
    """Take worker NODE out: it takes nothing new and hands what runs, KV and all, to other workers."""
    gateway = Gateway.of(url, api_key_file)
    before = _overview(gateway)
    found(before, node)
    if undo:
        now = _ordered(gateway, node, "drain", "is_draining", False)
        _tell(now, as_json, f"{node} takes work again")
        return
    if not force:
        _refuse_to_strand(before, [node])
    now = _ordered(gateway, node, "drain", "is_draining", True)
    if wait:
        now = _drained(gateway, now, timeout_s)
    left = left_of(now)
    back = _takes_back(gateway, node)
    _tell(now, as_json, f"{node} takes nothing new, {left} left there; {back}" if left else f"{node} is empty; {back}")
    if wait and left:
        sys.exit(1)


@click.command()
@click.argument("node")
@click.argument("role", type=click.Choice(["prefill", "decode", "mixed"]))
@click.option(
    "--kubeconfig",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="For good, on Kubernetes: move the board to the other workload; its worker is replaced.",
)
@click.option("--namespace", default="edge-llm", show_default=True, help="Of the workloads, with --kubeconfig.")
@click.option(
    "--timeout-s",
    type=click.FloatRange(min=0),
    default=180.0,
    show_default=True,
    help="With --kubeconfig: how long to wait until what runs there has been handed over.",
)
@click.option("--force", is_flag=True, help="Even if nobody else serves its model, or something still runs there.")
@gateway_options
@_json
def role(
    node: str,
    role: str,
    kubeconfig: Path | None,
    namespace: str,
    timeout_s: float,
    force: bool,
    url: str,
    api_key_file: Path | None,
    as_json: bool,
) -> None:
    """Let worker NODE stand for another ROLE: at once and without a restart, until it starts again."""
    gateway = Gateway.of(url, api_key_file)
    if kubeconfig is not None:
        moved = _move(gateway, node, role, _kubectl(kubeconfig, namespace), timeout_s, force)
        _tell(moved, as_json, _moved_words(moved))
        return
    before = _overview(gateway)
    was = found(before, node)
    if was["role"] == role:
        _tell(was, as_json, f"{node} has role {role} already: nothing was changed")
        return
    if not force:
        _refuse_to_leave_to_helpers(before, was, role)
    now = _ordered(gateway, node, "role", "role", role)
    lines = [f"{node}: {was['role']} -> {now['role']}, until it starts again"]
    lines += remarks({**before, "nodes": [*_others(before, node), now]}, now)
    _tell(now, as_json, "\n".join(lines))


def _overview(gateway: Gateway) -> dict[str, Any]:
    """GET /cluster for somebody who is going to change it. Raises NotOperator for a key that may not (a gateway of an
    older version says so only when it gets the order)."""
    overview = gateway.overview()
    caller = overview.get("caller") or {}
    if not caller.get("is_operator", True):
        raise NotOperator(caller["id"])
    return overview


def found(overview: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The node of that name. Raises ConfigError that says who is there, or why this one is not."""
    for node in overview["nodes"]:
        if node["worker"] == name:
            return dict(node)
    for silent in (overview.get("discovery") or {}).get("silent_workers", ()):
        if silent["worker"] == name:
            raise WorkerUnreachable(f"{name} at {silent['address']} does not answer the gateway: {silent['message']}")
    known = ", ".join(sorted(node["worker"] for node in overview["nodes"])) or "none"
    raise ConfigError(f"the gateway knows no worker {name}; it knows {known}")


def stranded(overview: Mapping[str, Any], names: Collection[str]) -> str | None:
    """The model that nobody would decode without these workers."""
    serving = [node for node in overview["nodes"] if node["is_ready"] and node["slots"]]
    left = {node["model"] for node in serving if node["worker"] not in names}
    return next((str(node["model"]) for node in serving if node["model"] not in left), None)


def left_of(node: Mapping[str, Any]) -> str:
    """What still runs there, for people; empty: nothing."""
    load = node["load"]
    sequences, tokens = load["sequences_running"], load["pending_prompt_tokens"]
    words = [counted(sequences, "sequence")] if sequences else []
    if tokens or load["sequences_waiting"]:
        words.append(f"{counted(tokens, 'prompt token')} to read for others")
    return ", ".join(words)


def remarks(overview: Mapping[str, Any], node: Mapping[str, Any]) -> list[str]:
    """What is worth knowing of a node in its new role."""
    nodes = [other for other in overview["nodes"] if other["model"] == node["model"]]
    lines = []
    most = max(other["slots"] for other in nodes)
    if node["role"] != "prefill" and node["slots"] < most:
        lines.append(
            f"it was loaded with {counted(node['slots'], 'slot')}, others have {most}: started again with role "
            f"{node['role']} it gets all (on Kubernetes: --kubeconfig)"
        )
    for wanted, does in (("prefill", "reads prompts for others"), ("decode", "decodes")):
        if not any(other["role"] in (wanted, "mixed") for other in nodes):
            lines.append(f"no worker of {node['model']} has role {wanted} or mixed now: who {does} does it as a helper")
    return lines


def _others(overview: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    return [node for node in overview["nodes"] if node["worker"] != name]


def _refuse_to_strand(overview: Mapping[str, Any], names: Collection[str]) -> None:
    if (model := stranded(overview, names)) is not None:
        raise ConfigError(
            f"without {' and '.join(names)} no ready worker decodes {model}: requests would wait, and those that run "
            "would stop, until another one comes; --force does it all the same"
        )


def _refuse_to_leave_to_helpers(overview: Mapping[str, Any], node: Mapping[str, Any], role: str) -> None:
    """Raises ConfigError for the last worker whose role is to decode: after that only helpers would."""
    decoders = {
        other["worker"]
        for other in overview["nodes"]
        if other["model"] == node["model"] and other["is_ready"] and other["slots"] and other["role"] != "prefill"
    }
    if role == "prefill" and decoders == {node["worker"]}:
        raise ConfigError(
            f"without {node['worker']} no ready worker of {node['model']} has role decode or mixed: answers would be "
            "left to the spare slots of those who read prompts; --force does it all the same"
        )


def _ordered(gateway: Gateway, name: str, what: str, key: str, value: object) -> dict[str, Any]:
    """Order it, and wait a moment until the gateway sees it: the next command goes by what the gateway shows. How the
    worker is then; a worker that says goodbye to its sequences may be out of sight for longer."""
    now = gateway.order(name, what, {key: value})
    until_s = time.monotonic() + SEEN_S
    while time.monotonic() < until_s:
        shown = next((node for node in gateway.overview()["nodes"] if node["worker"] == name), None)
        if shown is not None and shown[key] == now[key]:
            return dict(shown)
        time.sleep(SEEN_POLL_S)
    return now


def _drained(gateway: Gateway, now: dict[str, Any], timeout_s: float, ordered: Collection[str] = ()) -> dict[str, Any]:
    """Wait until the node is empty, or for so long; how it is then. `now`: what it said when it was told to drain. What
    was ordered stays so when this is interrupted; `ordered`: all that were, if not this one alone."""
    name, until_s, said = now["worker"], time.monotonic() + timeout_s, ""
    names = ordered or (name,)
    try:
        while left_of(now) and time.monotonic() < until_s:
            if left_of(now) != said:
                said = left_of(now)
                click.echo(f"{name}: {said} left", err=True)
            time.sleep(POLL_S)
            now = _later(gateway.overview(), now)
    except KeyboardInterrupt:
        for one in names:
            click.echo(f"{one} goes on draining; {_takes_back(gateway, one)}", err=True)
        sys.exit(INTERRUPTED)
    return now


def _later(overview: Mapping[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The same node as the gateway sees it, once that is news: until it has asked again it shows the time before the
    order, and while the node says goodbye to its sequences it may be taken for gone. Raises WorkerUnreachable."""
    node = next((node for node in overview["nodes"] if node["worker"] == now["worker"]), None)
    if node is not None and node["started_at"] != now["started_at"]:
        raise WorkerUnreachable(f"{now['worker']} was started again meanwhile, and takes work")
    return dict(node) if node is not None and node["is_draining"] else now


def _kubectl(kubeconfig: Path, namespace: str) -> Kubectl:
    from edge_llm.commands.kubectl import Kubectl

    return Kubectl(kubeconfig, namespace)


def _move(gateway: Gateway, name: str, role: str, kubectl: Kubectl, timeout_s: float, force: bool) -> dict[str, Any]:
    """Replace a worker by one of another role on the same board, after everything that stops has been handed over."""
    from edge_llm.commands.cluster_moves import commands, moves

    # first, so that a kubeconfig that leads nowhere is said before anything of the gateway
    workloads = {one["metadata"]["name"]: one["spec"] for one in kubectl.get("statefulset")["items"]}
    overview = _overview(gateway)
    was = found(overview, name)
    board = str(kubectl.get("pod", name)["spec"]["nodeName"])
    replicas = {workload: int(spec["replicas"]) for workload, spec in workloads.items()}
    # the manifests give a claim back with its pod where it binds the pod to a board
    kept = workloads.get(name.rpartition("-")[0], {}).get("persistentVolumeClaimRetentionPolicy", {})
    plan = moves(name, role, board, replicas, is_bound=kept.get("whenScaled") == "Delete")
    if not force:
        _refuse_to_strand(overview, plan.stopped)
        _refuse_to_leave_to_helpers(overview, was, role)
    _emptied(gateway, plan.stopped, timeout_s, force)
    for number, step in enumerate(plan.steps):
        click.echo(f"kubectl -n {kubectl.namespace} {' '.join(step)}", err=True)
        try:
            kubectl.run(*step)
        except ConfigError as error:
            rest = commands(plan.steps[number:], kubectl.kubeconfig, kubectl.namespace)
            raise ConfigError(f"{error.message}\n{_half_moved(gateway, rest, plan.stopped)}") from error
        except KeyboardInterrupt:
            rest = commands(plan.steps[number:], kubectl.kubeconfig, kubectl.namespace)
            click.echo(_half_moved(gateway, rest, plan.stopped), err=True)
            sys.exit(INTERRUPTED)
    return {"board": board, "role": role, "stopped": list(plan.stopped), "replicas": dict(plan.replicas)}


def _emptied(gateway: Gateway, names: Sequence[str], timeout_s: float, force: bool) -> None:
    """Drain all of them. Raises an error that says how they serve again where that does not work, and when something
    still runs there after so long and `force` does not take that."""
    until_s = time.monotonic() + timeout_s
    leaving: list[dict[str, Any]] = []
    try:
        for name in names:
            leaving.append(_ordered(gateway, name, "drain", "is_draining", True))
        waited = [_drained(gateway, node, max(0.0, until_s - time.monotonic()), names) for node in leaving]
        last = gateway.overview()  # the others went on while one was waited for
        drained = [_later(last, node) if left_of(node) else node for node in waited]
    except EdgeLLMError as error:
        if not leaving and isinstance(error, ClientError):
            raise  # refused: nobody drains
        raise ConfigError(f"{error.message}\n{_serve_again(gateway, names)}") from error
    left = "; ".join(f"{node['worker']}: {words}" for node in drained if (words := left_of(node)))
    if left and not force:
        raise ConfigError(
            f"nothing was moved: after {timeout_s:g} s something still runs that no other worker took over ({left}). "
            "They take nothing new. The same command waits again (longer with --timeout-s); with --force it moves then "
            "all the same, and what still runs is computed again by other workers, or fails without any\n"
            f"{_serve_again(gateway, names)}"
        )


def _half_moved(gateway: Gateway, rest: Sequence[str], stopped: Sequence[str]) -> str:
    """`rest`: the commands of the steps that were not done, the one that failed first."""
    return "\n".join(
        [
            "these steps were not done; do them in this order, a board between two roles gets no worker when its own "
            "starts again:",
            *(f"  {line}" for line in rest),
            _serve_again(gateway, stopped),
        ]
    )


def _serve_again(gateway: Gateway, names: Sequence[str]) -> str:
    lines = [f"  {gateway.command('drain', name, '--undo')}" for name in names]
    return "\n".join(["until they are stopped, drained workers serve again with", *lines])


def _takes_back(gateway: Gateway, name: str) -> str:
    return f"`{gateway.command('drain', name, '--undo')}` takes it back"


def _moved_words(moved: Mapping[str, Any]) -> str:
    sizes = ", ".join(f"{workload} {count}" for workload, count in moved["replicas"].items())
    return (
        f"{moved['board']} starts a worker of role {moved['role']}; `edge-llm cluster status` shows it when its model "
        f"is loaded\nreplicas are now {sizes}: say so in your overlay, or the next `kubectl apply -k` takes it back"
    )


def _tell(node: Mapping[str, Any], as_json: bool, words: str) -> None:
    click.echo(json.dumps(node) if as_json else words)
