"""The network: the link that KV travels over, firewalls, ports that are taken, and the clock that tickets need.

Owns reading these under a root and judging them; the judging functions are pure. Refuses to ask other boards
(peers.py).

Sources: link trouble of the Pi 5 with energy saving, raspberrypi/linux#7511 and #6065; ports of K3s and what ufw must
let through, K3s documentation, requirements; the mark of a synchronised clock, systemd-timesyncd(8).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from edge_llm.doctor.files import Files
from edge_llm.doctor.finding import Finding, fail, ok, unknown, warn

FULL_MBIT_S: Final = 1000
_USUAL_MTU: Final = 1500
_FLAPS_PER_HOUR: Final = 2.0
_FEW_FLAPS: Final = 10
_LISTENS: Final = "0A"
# Held by K3s and the container runtime on every node, or on a server.
K3S_PORTS: Final = frozenset({2379, 2380, 2381, 2382, 5001, 6443, 6444, *range(10248, 10260), 10010})


@dataclass(frozen=True, slots=True)
class Link:
    """One interface. None: it does not say. `changes`: how often its carrier came or went since boot, coming up
    included."""

    name: str
    is_wireless: bool
    is_virtual: bool
    speed_mbit_s: int | None
    duplex: str | None
    mtu: int | None
    changes: int | None


@dataclass(frozen=True, slots=True)
class NetworkFacts:
    """`is_synchronized`: the clock, by the kernel or by its service; `max_error_s`: the kernel's bound on its error."""

    link: Link | None
    uptime_s: float | None
    listening: frozenset[int] | None
    has_firewall: bool | None
    is_synchronized: bool | None
    max_error_s: float | None


def read_network(files: Files, clock: tuple[bool, float] | None) -> NetworkFacts:
    """`clock`: what the running kernel says of its own, synchronised or not and the bound in seconds."""
    uptime = (files.text("proc/uptime") or "").split()
    is_synchronized = clock[0] if clock else None
    if is_synchronized is not True and files.exists("run/systemd/timesync/synchronized"):
        is_synchronized = True
    firewall = files.fields("etc/ufw/ufw.conf", "=").get("ENABLED")
    return NetworkFacts(
        link=_default_link(files),
        uptime_s=float(uptime[0]) if uptime and uptime[0].replace(".", "").isdigit() else None,
        listening=_listening(files),
        has_firewall=None if firewall is None else firewall.strip("\"'").lower() == "yes",
        is_synchronized=is_synchronized,
        max_error_s=clock[1] if clock else None,
    )


def check_network(
    facts: NetworkFacts, *, kv_bytes_per_token: int, has_k3s: bool, ports: Sequence[int]
) -> list[Finding]:
    """`ports`: those that the workers and the gateway of this board would listen on."""
    found = [link_speed(facts, kv_bytes_per_token), link_health(facts), clock(facts), firewall(facts, has_k3s, ports)]
    return [finding for finding in found if finding is not None]


# --- the link -----------------------------------------------------------------------------------------------------


def link_speed(facts: NetworkFacts, kv_bytes_per_token: int) -> Finding:
    check, link = "network.link", facts.link
    if link is None:
        return unknown(check, "no interface with a default route", do="one board alone needs none; a cluster does")
    if link.is_virtual:
        return unknown(check, f"{link.name} is virtual: the link behind it is not seen from here")
    if link.is_wireless:
        return warn(
            check,
            f"{link.name} is wireless",
            why="KV of a prompt travels between boards while it is computed: on radio it arrives late and irregularly",
            do="use the Ethernet socket; or serve whole requests here: edge-llm serve worker --role mixed",
        )
    if link.speed_mbit_s is None:
        return unknown(check, f"{link.name} does not say its speed")
    words = f"{link.name}: {link.speed_mbit_s} Mbit/s, {link.duplex or 'duplex not known'}, MTU {link.mtu or '?'}"
    if link.duplex == "half":
        return fail(
            check,
            words,
            why="half duplex: both ends disagree, and packets collide",
            do="set both ends to automatic negotiation, or change the cable",
            commands=[f"sudo ethtool -s {link.name} autoneg on"],
        )
    if link.speed_mbit_s < FULL_MBIT_S:
        return warn(
            check,
            words,
            why=_slow_words(link.speed_mbit_s, kv_bytes_per_token),
            do="use a cable with all eight wires and a gigabit port, then negotiate again",
            commands=[f"sudo ethtool -s {link.name} autoneg on && ethtool {link.name} | grep Speed"],
        )
    return ok(check, words)


def _slow_words(mbit_s: int, kv_bytes_per_token: int) -> str:
    if not kv_bytes_per_token:
        return "KV of every prompt travels over it"
    rate = mbit_s * 1e6 / 8 * 0.94 / kv_bytes_per_token  # 0.94: what TCP leaves of an Ethernet frame
    return f"KV of the configured model ({kv_bytes_per_token >> 10} KiB a token) moves at {rate:,.0f} tokens/s at most"


def link_health(facts: NetworkFacts) -> Finding | None:
    check, link = "network.link_health", facts.link
    if link is None or link.is_virtual:
        return None
    if link.mtu is not None and link.mtu < _USUAL_MTU:
        return warn(
            check,
            f"{link.name}: MTU {link.mtu}",
            why="every frame carries less, and paths that drop fragments make a transfer hang",
            do="set it back, unless a tunnel needs it",
            commands=[f"sudo ip link set {link.name} mtu {_USUAL_MTU}"],
        )
    hours = max(1.0, (facts.uptime_s or 0.0) / 3600)
    changes = link.changes or 0
    if changes > _FEW_FLAPS and changes / hours > _FLAPS_PER_HOUR:
        return warn(
            check,
            f"{link.name} went up or down {changes} times in {hours:.0f} h",
            why="each time running hand-offs break and are computed again; on a Pi 5 it is often energy saving (EEE)",
            do="try another cable and port, switch EEE off at the switch, and update the kernel",
            commands=["dmesg | grep -i 'link is' | tail"],
        )
    return ok(check, f"{link.name}: {changes} changes of the carrier since boot")


def _default_link(files: Files) -> Link | None:
    """The interface of the default route with the smallest metric, IPv4 first."""
    routes = [row for row in files.rows("proc/net/route", skip=1) if len(row) > 6 and row[1] == "00000000"]
    routes = [row for row in routes if row[6].isdigit() and not row[0].startswith("lo")]
    if routes:
        return _link(files, min(routes, key=lambda row: int(row[6]))[0])
    six = [row for row in files.rows("proc/net/ipv6_route") if len(row) > 9 and row[0] == "0" * 32 and row[1] == "00"]
    names = [row[9] for row in six if row[9] != "lo"]
    return _link(files, names[0]) if names else None


def _link(files: Files, name: str) -> Link:
    folder = f"sys/class/net/{name}"
    speed, mtu, changes = (files.number(f"{folder}/{leaf}") for leaf in ("speed", "mtu", "carrier_changes"))
    duplex = files.text(f"{folder}/duplex")
    is_virtual = not files.exists(f"{folder}/device") or speed is None or speed <= 0
    is_wireless = files.exists(f"{folder}/wireless") or files.exists(f"{folder}/phy80211")
    return Link(
        name=name,
        is_wireless=is_wireless,
        is_virtual=is_virtual and not is_wireless,
        speed_mbit_s=int(speed) if speed and speed > 0 else None,
        duplex=duplex if duplex in ("full", "half") else None,
        mtu=None if mtu is None else int(mtu),
        changes=None if changes is None else int(changes),
    )


# --- clock and firewall -------------------------------------------------------------------------------------------


def clock(facts: NetworkFacts) -> Finding:
    check = "network.clock"
    why = "workers refuse tickets when clocks differ by more than 30 s; a Pi without a battery wakes up wrong"
    commands = ["sudo timedatectl set-ntp true", "timedatectl"]
    if facts.is_synchronized:
        bound = "" if facts.max_error_s is None else f", at most {facts.max_error_s:.2f} s off"
        return ok(check, f"synchronised{bound}")
    if facts.is_synchronized is None:
        return unknown(check, "whether it is synchronised is not said", why=why, do="look", commands=["timedatectl"])
    return warn(check, "not synchronised", why=why, do="let the system set it", commands=commands)


def firewall(facts: NetworkFacts, has_k3s: bool, ports: Sequence[int]) -> Finding | None:
    """Only whether ufw is on: its rules need root to be read."""
    check = "network.firewall"
    if not facts.has_firewall:
        return None
    own = [f"sudo ufw allow from 10.0.0.0/8 to any port {port} proto tcp" for port in ports if port]
    k3s = [
        "sudo ufw allow 6443/tcp",
        "sudo ufw allow from 10.42.0.0/16 to any",
        "sudo ufw allow from 10.43.0.0/16 to any",
    ]
    return warn(
        check,
        "ufw is on",
        why="boards of a cluster must reach each other; a port that is closed looks like a worker that is gone",
        do="open the ports to your own network (10.0.0.0/8 here: put in yours), and those of K3s",
        commands=[*own, *(k3s if has_k3s else [])],
    )


# --- ports --------------------------------------------------------------------------------------------------------


def check_ports(
    listening: frozenset[int] | None, wanted: Mapping[str, int], ours: frozenset[int], *, has_k3s: bool
) -> list[Finding]:
    """`wanted`: what this board would listen on, by whom (`gateway`); `ours`: ports of clusters that run already."""
    found = []
    for who, port in wanted.items():
        check = f"ports.{who}"
        if not port:
            continue
        if has_k3s and port in K3S_PORTS:
            found.append(_taken(check, port, "K3s uses it", who))
        elif listening is None:
            found.append(unknown(check, f"port {port}: /proc/net/tcp cannot be read"))
        elif port in ours:
            found.append(ok(check, f"port {port} is used by a cluster of `edge-llm up`"))
        elif port in listening:
            found.append(_taken(check, port, "another program listens there", who))
        else:
            found.append(ok(check, f"port {port} is free"))
    return found


def _taken(check: str, port: int, words: str, who: str) -> Finding:
    return fail(
        check,
        f"port {port}: {words}",
        why=f"the {who} cannot start (if it is edge-llm itself that runs there, all is well)",
        do=f"see who it is, or give the {who} another port with --port",
        commands=[f"sudo ss -ltnp 'sport = :{port}'"],
    )


def _listening(files: Files) -> frozenset[int] | None:
    """Local TCP ports in state LISTEN (proc(5): `sl local_address rem_address st ...`, in hexadecimal)."""
    tables = [name for name in ("proc/net/tcp", "proc/net/tcp6") if files.text(name) is not None]
    if not tables:
        return None
    rows = (row for name in tables for row in files.rows(name, skip=1))
    return frozenset(int(row[1].rpartition(":")[2], 16) for row in rows if len(row) > 3 and row[3] == _LISTENS)
