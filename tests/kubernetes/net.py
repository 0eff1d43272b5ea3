"""The network of the test cluster: a namespace per node, one for the client outside, a switch between them.

Owns links, their rates and pod routes. No namespace has a default route: nothing in here can reach any other network,
and an image that somebody tries to pull fails at once. Refuses to know what runs on the nodes.
"""

from __future__ import annotations

from typing import Final

from tests.kubernetes.shell import inside, run
from tests.kubernetes.site import LAN, NODES_NET, OUTSIDE, OUTSIDE_IP, SERVICES_NET, Node, Site

GIGABIT: Final = "1gbit"
FAST_ETHERNET: Final = "100mbit"
_OUTSIDE_PORT: Final = "v0"
_BRIDGE: Final = "switch"


def connect(site: Site) -> None:
    """Everything up at 1 Gbit/s."""
    run("ip", "netns", "add", LAN)
    run("ip", "-n", LAN, "link", "set", "lo", "up")
    run("ip", "-n", LAN, "link", "add", _BRIDGE, "type", "bridge")
    run("ip", "-n", LAN, "link", "set", _BRIDGE, "up")
    _plug(OUTSIDE, _OUTSIDE_PORT, OUTSIDE_IP)
    for node in site.nodes:
        _plug(node.namespace, node.port, node.ip)
        run(*inside(node.namespace), "sysctl", "-qw", "net.ipv4.ip_forward=1")
    for node in site.nodes:
        for other in site.nodes:
            if other != node:  # what flannel's host-gw writes
                run("ip", "-n", node.namespace, "route", "add", other.pods_net, "via", other.ip)
        # kube-proxy turns it into a pod's address on the way out, but a route must be there before that
        run("ip", "-n", node.namespace, "route", "add", SERVICES_NET, "dev", "e0")
    shape(site, GIGABIT)


def _plug(namespace: str, port: str, ip: str) -> None:
    run("ip", "netns", "add", namespace)
    run("ip", "link", "add", "e0", "netns", namespace, "type", "veth", "peer", "name", port, "netns", LAN)
    run("ip", "-n", LAN, "link", "set", port, "master", _BRIDGE, "up")
    run("ip", "-n", namespace, "link", "set", "lo", "up")
    run("ip", "-n", namespace, "addr", "add", f"{ip}/{NODES_NET.rpartition('/')[2]}", "dev", "e0")
    run("ip", "-n", namespace, "link", "set", "e0", "up")


def shape(site: Site, rate: str) -> None:
    """Both directions of every cable."""
    ends = [(OUTSIDE, "e0"), (LAN, _OUTSIDE_PORT)]
    ends += [end for node in site.nodes for end in ((node.namespace, "e0"), (LAN, node.port))]
    for namespace, device in ends:
        words = ("qdisc", "replace", "dev", device, "root", "tbf", "rate", rate, "burst", "256kb", "latency", "20ms")
        run("tc", "-n", namespace, *words)


def cut(node: Node) -> None:
    """Pull the node's cable: nobody is told, packets stop."""
    run("ip", "-n", LAN, "link", "set", node.port, "down")


def mend(node: Node) -> None:
    run("ip", "-n", LAN, "link", "set", node.port, "up")


def routes(namespace: str) -> str:
    """All IPv4 and IPv6 routes of a namespace, as `ip` prints them."""
    return run("ip", "-n", namespace, "route") + run("ip", "-n", namespace, "-6", "route", may_fail=True)


def disconnect(site: Site) -> None:
    """Remove all of it, of an earlier run, too."""
    there = run("ip", "netns", "list", may_fail=True)
    known = {line.split()[0] for line in there.splitlines() if line.strip()}
    for name in (*(node.namespace for node in site.nodes), OUTSIDE, LAN):
        if name in known:
            run("ip", "netns", "del", name, may_fail=True)
