"""The network policies let through what work needs, and nothing else: every pair and port, against a table."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pytest

from tests.manifests.reachability import Edge, Peer, Port, reachable
from tests.manifests.rendering import FOLDER, OVERLAYS, of_kind, overlay, rendered, varied, workloads

HTTP, WORKER, API, HTTPS = Port(8080), Port(9001), Port(6443), Port(443)
DNS: Final = (Port(53, "UDP"), Port(53))
# What is not asked for by anybody must be refused, too.
PORTS: Final = (HTTP, WORKER, API, HTTPS, *DNS, Port(22), Port(80), Port(30080))
OURS: Final = "edge-llm"
NAMESPACES: Final = {
    name: {"kubernetes.io/metadata.name": name} for name in (OURS, "kube-system", "monitoring", "default")
}
AROUND: Final = (
    Peer("stranger", "10.42.0.90", OURS, {"app.kubernetes.io/name": "something-else"}),
    Peer("dns", "10.42.0.2", "kube-system", {"k8s-app": "kube-dns"}),
    Peer("traefik", "10.42.0.3", "kube-system", {"app.kubernetes.io/name": "traefik"}),
    Peer("prometheus", "10.42.0.4", "monitoring", {"app.kubernetes.io/name": "prometheus"}),
    Peer("grafana", "10.42.0.5", "monitoring", {"app.kubernetes.io/name": "grafana"}),
    Peer(
        "other", "10.42.0.6", "default", {"app.kubernetes.io/name": "edge-llm", "app.kubernetes.io/component": "worker"}
    ),
    Peer("board", "192.168.1.10"),
    Peer("client", "192.168.1.50"),
    Peer("internet", "151.101.0.223"),
    Peer("internet6", "2a04:4e42::223"),
)
WORKERS: Final = ("prefill", "decode", "mixed")
PODS_ELSEWHERE: Final = ("dns", "traefik", "prometheus", "grafana", "other")
OUTSIDE: Final = ("board", "client", "internet", "internet6")


def needed(roles: Sequence[str], *, downloads: bool = True, is_scraped: bool = False) -> frozenset[Edge]:
    """Every edge that some part of this project opens, for workers of these roles (two of each)."""
    workers = [f"{role}-{number}" for role in roles for number in (0, 1)]
    edges: set[Edge] = set()
    # clients, from wherever they are (an API key says who may what); Traefik as an ingress, Prometheus with a key
    edges |= {(who, "gateway", HTTP) for who in ("bench", *PODS_ELSEWHERE, *OUTSIDE)}
    # gateway/dispatch.py, cluster/probe.py, gateway/listen.py: status, events, tokenize, decode, cancel, keep
    edges |= {("gateway", worker, WORKER) for worker in workers}
    # worker/pull.py, who fetches KV from whom (test_needed_edges.py shows each pair of roles at it):
    # decode <- prefill   the hand-off
    # prefill <- decode   what only a conversation's decode worker holds (worker/holders.py)
    # decode <- decode    a worker that stops gives its sequences away; checkpoints (worker/checkpoint.py)
    # prefill <- prefill  two of them, of which one decodes in its spare slots
    # mixed               all of these
    edges |= {(one, other, WORKER) for one in workers for other in workers if one != other}
    # cluster/kubernetes.py: the watch. No selector can name the API server, and it is at a private address
    edges |= {("gateway", who, API) for who in ("board", "client")}
    # `edge-llm bench` as a Job: by the Service's name, and each worker
    edges |= {("bench", worker, WORKER) for worker in workers} | {("bench", "dns", port) for port in DNS}
    if downloads:  # catalogue/fetch.py, in the init container
        edges |= {(worker, "dns", port) for worker in workers for port in DNS}
        edges |= {(worker, who, HTTPS) for worker in workers for who in ("internet", "internet6")}
    if is_scraped:
        edges |= {("prometheus", worker, WORKER) for worker in workers}
    return frozenset(edges)


def peers_of(items: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[Peer]]:
    """The roles that are rendered; their pods with the labels that they really get, and who is around them."""
    (bench,) = of_kind(rendered(FOLDER / "bench"), "CronJob")
    labels = bench["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"]
    found, roles = [*AROUND, Peer("bench", "10.42.1.99", OURS, labels)], []
    for number, workload in enumerate(workloads(items)):  # type: ignore[arg-type]
        labels = workload["spec"]["template"]["metadata"]["labels"]
        role = labels["edge-llm/role"]
        if role == "gateway":
            found.append(Peer("gateway", f"10.42.1.{number}", OURS, labels))
            continue
        roles.append(role)
        found += [Peer(f"{role}-{n}", f"10.42.2.{10 * number + n}", OURS, labels) for n in (0, 1)]
    return roles, found


def between(items: Sequence[Mapping[str, Any]]) -> tuple[list[str], frozenset[Edge]]:
    """Roles, and the edges that have one of our pods at an end."""
    roles, peers = peers_of(items)
    ours = {peer.name for peer in peers if peer.namespace == OURS}
    edges = reachable(of_kind(items, "NetworkPolicy"), NAMESPACES, peers, PORTS)  # type: ignore[arg-type]
    return roles, frozenset(edge for edge in edges if ours & set(edge[:2]))


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_can_be_reached_is_what_is_needed(name: str) -> None:
    roles, edges = between(overlay(name))
    assert set(roles) <= set(WORKERS)
    assert roles
    assert edges == needed(roles)


@pytest.mark.parametrize("source", ["model-image-volume", "model-on-board"])
def test_without_downloads_no_worker_has_a_way_out(source: str) -> None:
    roles, edges = between(varied("pi5-1p3d", source))
    assert edges == needed(roles, downloads=False)
    assert not {edge for edge in edges if edge[0].startswith(WORKERS) and not edge[1].startswith(WORKERS)}


def test_prometheus_reaches_workers_only_where_it_was_asked_for() -> None:
    roles, edges = between(varied("pi5-2p2d", additions=("components/service-monitor",)))
    assert edges == needed(roles, is_scraped=True)


def test_a_policy_taken_away_shows_up() -> None:
    items = [item for item in overlay("pi5-1p3d") if item["metadata"]["name"] != "edge-llm-default-deny"]
    _, edges = between(items)
    assert ("client", "stranger", Port(22)) in edges


def test_a_policy_too_wide_shows_up() -> None:
    items = copy.deepcopy(overlay("pi5-1p3d"))
    worker = next(
        item for item in items if item["kind"] == "NetworkPolicy" and item["metadata"]["name"] == "edge-llm-worker"
    )
    del worker["spec"]["ingress"][0]["from"]
    roles, edges = between(items)
    assert ("client", "decode-0", WORKER) in edges - needed(roles)


def test_selectors_are_read_as_kubernetes_reads_them() -> None:
    def one(pods: Mapping[str, Any]) -> bool:
        policy = {"metadata": {"namespace": OURS}, "spec": {"podSelector": pods, "policyTypes": ["Ingress"]}}
        pod, client = Peer("pod", "10.0.0.1", OURS, {"a": "1"}), Peer("client", "10.0.0.2")
        return ("client", "pod", HTTP) not in reachable([policy], NAMESPACES, [pod, client], [HTTP])

    expressions = {
        "In": ({"values": ["1"]}, True),
        "NotIn": ({"values": ["1"]}, False),
        "Exists": ({}, True),
        "DoesNotExist": ({}, False),
    }
    assert one({})
    assert one({"matchLabels": {"a": "1"}})
    assert not one({"matchLabels": {"a": "2"}})
    for operator, (rest, expected) in expressions.items():
        assert one({"matchExpressions": [{"key": "a", "operator": operator, **rest}]}) is expected
