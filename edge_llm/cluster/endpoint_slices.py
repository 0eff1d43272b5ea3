"""What EndpointSlices say about where workers may be.

Pure. Owns the few fields of `discovery.k8s.io/v1` that are read here, and the rules by which slices become places:

- A place is a pod by its own address and the port named `worker` (where there is only one port, that one), never a
  Service's: a ClusterIP goes on sending to a node that died for most of a minute.
- A pod is one place however many slices name it: two Services, two address families (IPv4 goes first), the old and
  the new slice while the control plane moves an endpoint.
- Conditions never remove a place. A pod that loads or drains is listed as not ready and must be seen all the same: what
  it reports itself decides whether it gets work, and a pod that is gone does not answer. That one became ready is news.

Refuses to know how slices are fetched, and roles: a label is a role's first value, the worker reports what it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

import msgspec

from edge_llm.cluster.view import Place

ROLE_LABEL: Final = "edge-llm/role"
# The gateway's own Service bears a role, too; nobody is asked there.
SELECTOR: Final = f"app.kubernetes.io/part-of=edge-llm,{ROLE_LABEL},{ROLE_LABEL}!=gateway"
ROLES: Final = ("prefill", "decode", "mixed")
PORT_NAME: Final = "worker"


class Conditions(msgspec.Struct, frozen=True):
    """What the control plane believes; None is unknown, which the API's rules read as ready, not terminating."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Target(msgspec.Struct, frozen=True):
    """The object behind an endpoint."""

    kind: str = ""
    name: str = ""


class Endpoint(msgspec.Struct, frozen=True, rename="camel"):
    """One backend. All of `addresses` mean the same; the control plane writes one."""

    addresses: tuple[str, ...] = ()
    conditions: Conditions | None = None
    target_ref: Target | None = None


class Port(msgspec.Struct, frozen=True):
    """A port of all endpoints of a slice."""

    name: str | None = None
    port: int | None = None


class Metadata(msgspec.Struct, frozen=True, rename="camel"):
    """Of an object or a list."""

    name: str = ""
    resource_version: str = ""
    labels: dict[str, str] | None = None


class EndpointSlice(msgspec.Struct, frozen=True, rename="camel"):
    """Some endpoints of one Service in one address family."""

    metadata: Metadata
    address_type: str = "IPv4"
    endpoints: tuple[Endpoint, ...] | None = None
    ports: tuple[Port, ...] | None = None

    @property
    def role(self) -> str:
        return (self.metadata.labels or {}).get(ROLE_LABEL, "")


@dataclass(frozen=True, slots=True)
class Found:
    """A place, and whether the control plane calls it ready: news of it, never a reason to leave it out."""

    place: Place
    is_ready: bool


def places_of(slices: Iterable[EndpointSlice]) -> tuple[Found, ...]:
    """Every worker once, by name."""
    best: dict[str, tuple[_Rank, Found]] = {}
    for one in slices:
        if one.role not in ROLES:
            continue
        for rank, found in _found_in(one):
            known = best.get(found.place.worker)
            if known is None or rank < known[0]:
                best[found.place.worker] = rank, found
    return tuple(best[name][1] for name in sorted(best))


def unknown_roles(slices: Iterable[EndpointSlice]) -> dict[str, str]:
    """Slices by name whose role label means nothing here: their workers are never found."""
    return {one.metadata.name: one.role for one in slices if one.role not in ROLES}


def news(before: Iterable[Found], after: Iterable[Found]) -> frozenset[str]:
    """Workers that came, went, moved, or became ready or not."""
    return frozenset(found.place.worker for found in set(before) ^ set(after))


_Rank = tuple[bool, bool, bool, int, str]
"""What speaks against an entry, the worst first; the address makes the order total, whatever order slices come in."""


def _found_in(one: EndpointSlice) -> Iterator[tuple[_Rank, Found]]:
    port = _port_of(one.ports or ())
    if port is None:
        return
    for endpoint in one.endpoints or ():
        target, conditions = endpoint.target_ref, endpoint.conditions or Conditions()
        address = _address_of(endpoint.addresses, port)
        if target is None or target.kind != "Pod" or not target.name or address is None:
            continue
        is_ready = conditions.ready is not False
        is_serving = is_ready if conditions.serving is None else conditions.serving
        family, text = address
        # a new pod of a StatefulSet has the old one's name: of the two the one that ends is the stale one
        rank = (bool(conditions.terminating), not is_ready, not is_serving, family, text)
        yield rank, Found(Place(target.name, text), is_ready)


def _port_of(ports: Iterable[Port]) -> int | None:
    numbers: Mapping[str | None, int] = {port.name: port.port for port in ports if port.port}
    if len(numbers) == 1:
        return next(iter(numbers.values()))
    return numbers.get(PORT_NAME)


def _address_of(addresses: tuple[str, ...], port: int) -> tuple[int, str] | None:
    """Family and `IP:port`; None for what is no IP, as in slices of host names."""
    try:
        ip = ip_address(addresses[0])
    except (IndexError, ValueError):
        return None
    return ip.version, f"{ip}:{port}" if ip.version == 4 else f"[{ip}]:{port}"
