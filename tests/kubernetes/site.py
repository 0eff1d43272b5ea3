"""Where the test cluster is: names, addresses and folders of its nodes, all in one place.

Owns naming. Everything has a name of its own (`elt-`), so that what is found under it is ours to remove. The addresses
exist in network namespaces only. Refuses to know how anything is started.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

PREFIX: Final = "elt"
LAN: Final = f"{PREFIX}-lan"
OUTSIDE: Final = f"{PREFIX}-out"
OUTSIDE_IP: Final = "10.77.0.100"
NODES_NET: Final = "10.77.0.0/24"
PODS_NET: Final = "10.78.0.0/16"
SERVICES_NET: Final = "10.79.0.0/24"
DOMAIN: Final = "cluster.local"
NODE_PORT: Final = 30080


@dataclass(frozen=True, slots=True)
class Node:
    """One node: a network namespace with a kubelet, a containerd and a kube-proxy of its own."""

    name: str
    number: int

    @property
    def namespace(self) -> str:
        return f"{PREFIX}-{self.number}"

    @property
    def ip(self) -> str:
        return f"10.77.0.{10 + self.number}"

    @property
    def pods_net(self) -> str:
        return f"10.78.{self.number}.0/24"

    @property
    def port(self) -> str:
        """Its end of the cable at the switch."""
        return f"v{self.number}"

    @property
    def cgroup(self) -> str:
        return f"{PREFIX}-{self.number}"


@dataclass(frozen=True, slots=True)
class Site:
    """The whole of it. The first node carries the control plane. Socket paths must be short: keep `run` short."""

    run: Path
    binaries: Path
    nodes: tuple[Node, ...]

    @property
    def control(self) -> Node:
        return self.nodes[0]

    @property
    def pki(self) -> Path:
        return self.run / "pki"

    @property
    def kubeconfigs(self) -> Path:
        return self.run / "kc"

    @property
    def admin(self) -> Path:
        return self.kubeconfigs / "super-admin.conf"

    def folder(self, node: Node) -> Path:
        return self.run / node.name

    def socket(self, node: Node) -> Path:
        """Of the node's containerd."""
        return self.folder(node) / "containerd.sock"


def site(run: Path, binaries: Path, count: int = 3) -> Site:
    """`count` nodes: node-a, node-b, ..."""
    return Site(run, binaries, tuple(Node(f"node-{chr(ord('a') + at)}", at + 1) for at in range(count)))
