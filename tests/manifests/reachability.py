"""Who can open a connection to whom, worked out from NetworkPolicies as Kubernetes defines them.

Pure. Owns the rules: a pod that no policy of a direction selects is open in that direction; one that is selected may do
what the union of these policies allows; a connection needs the sender's egress and the receiver's ingress. Refuses to
know our manifests. Where network plugins differ (whether an ipBlock covers pods) it says yes: what it calls refused is
refused by all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

Manifest = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Peer:
    """A pod, or with namespace None an address outside of the cluster's pods (a board, a host, the internet)."""

    name: str
    ip: str
    namespace: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Port:
    number: int
    protocol: str = "TCP"


Edge = tuple[str, str, Port]


def reachable(
    policies: Sequence[Manifest],
    namespaces: Mapping[str, Mapping[str, str]],
    peers: Sequence[Peer],
    ports: Iterable[Port],
) -> frozenset[Edge]:
    """All (from, to, port) that are allowed, between different peers of which at least one is a pod."""
    world = _World(policies, namespaces)
    return frozenset(
        (sender.name, receiver.name, port)
        for port in ports
        for sender in peers
        for receiver in peers
        if sender is not receiver
        and (sender.namespace or receiver.namespace)
        and world.allows("Egress", sender, receiver, port)
        and world.allows("Ingress", receiver, sender, port)
    )


@dataclass(frozen=True, slots=True)
class _World:
    policies: Sequence[Manifest]
    namespaces: Mapping[str, Mapping[str, str]]

    def allows(self, direction: str, subject: Peer, other: Peer, port: Port) -> bool:
        """Whether `subject`'s policies of this direction let `other` through."""
        selecting = [policy for policy in self.policies if self._selects(policy, direction, subject)]
        rules = (rule for policy in selecting for rule in policy["spec"].get(direction.lower(), ()))
        return not selecting or any(self._matches(rule, direction, subject, other, port) for rule in rules)

    def _selects(self, policy: Manifest, direction: str, subject: Peer) -> bool:
        spec = policy["spec"]
        return (
            policy["metadata"]["namespace"] == subject.namespace
            and direction in spec.get("policyTypes", ("Ingress",))
            and selects(spec["podSelector"], subject.labels)
        )

    def _matches(self, rule: Manifest, direction: str, subject: Peer, other: Peer, port: Port) -> bool:
        who = rule.get("to" if direction == "Egress" else "from")
        is_port = not rule.get("ports") or any(_is_port(one, port) for one in rule["ports"])
        return is_port and (not who or any(self._is_peer(one, subject, other) for one in who))

    def _is_peer(self, selector: Manifest, subject: Peer, other: Peer) -> bool:
        if "ipBlock" in selector:
            return _in_block(selector["ipBlock"], other.ip)
        if other.namespace is None:
            return False
        if "namespaceSelector" in selector:
            is_there = selects(selector["namespaceSelector"], self.namespaces[other.namespace])
        else:
            is_there = other.namespace == subject.namespace
        return is_there and selects(selector.get("podSelector", {}), other.labels)


def selects(selector: Manifest, labels: Mapping[str, str]) -> bool:
    """A label selector; the empty one selects everything."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    return all(_holds(expression, labels) for expression in selector.get("matchExpressions", ()))


def _holds(expression: Manifest, labels: Mapping[str, str]) -> bool:
    key, values = expression["key"], expression.get("values", ())
    match expression["operator"]:
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
    raise ValueError(f"unknown operator {expression['operator']!r}")


def _is_port(allowed: Manifest, port: Port) -> bool:
    if allowed.get("protocol", "TCP") != port.protocol:
        return False
    first = allowed.get("port")
    if isinstance(first, str):  # a name may mean another port in every pod
        raise NotImplementedError(f"port {first!r} by name")
    return first is None or first <= port.number <= allowed.get("endPort", first)


def _in_block(block: Manifest, ip: str) -> bool:
    address = ip_address(ip)
    return address in ip_network(block["cidr"]) and not any(
        address in ip_network(part) for part in block.get("except", ())
    )
