"""The other boards of the workers file: do they answer, and is their clock near ours?

Owns asking `/healthz`, which needs no ticket and says the time in its Date header, and judging the answers. Refuses to
ask anything else. Threads, because each board that is off takes the whole deadline.
"""

from __future__ import annotations

import http.client
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final

from edge_llm.cluster.view import Place
from edge_llm.doctor.finding import Finding, fail, ok, unknown, warn
from edge_llm.worker.tickets import MAX_SKEW_S

DEADLINE_S: Final = 2.0
_TOGETHER: Final = 16
_NEAR_S: Final = 5.0
# The header has whole seconds, and its writer may renew it once a second only.
_COARSE_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Peer:
    """One answer. `ahead_s`: its clock less ours, good to about a second; None: it did not say."""

    name: str
    address: str
    error: str = ""
    ahead_s: float | None = None


def ask_peers(places: Sequence[Place], now: Callable[[], float], deadline_s: float = DEADLINE_S) -> list[Peer]:
    """All at once, in the order of `places`. `now`: seconds since the epoch."""
    if not places:
        return []
    with ThreadPoolExecutor(min(_TOGETHER, len(places))) as pool:
        return list(pool.map(lambda place: _ask(place, now, deadline_s), places))


def _ask(place: Place, now: Callable[[], float], deadline_s: float) -> Peer:
    host, _, port = place.address.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=deadline_s)
    try:
        before_s = now()
        connection.request("GET", "/healthz")
        reply = connection.getresponse()
        middle_s = (before_s + now()) / 2
        date = reply.headers.get("date")
        reply.read()
        if reply.status != http.client.OK:
            return Peer(place.worker, place.address, f"it answers {reply.status}: another program is there")
        ahead_s = None if date is None else parsedate_to_datetime(date).timestamp() + 0.5 - middle_s
        return Peer(place.worker, place.address, ahead_s=ahead_s)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Peer(place.worker, place.address, str(error) or type(error).__name__)
    finally:
        connection.close()


def answers_here(port: int, deadline_s: float = 1.0) -> bool:
    """Whether what listens on this port of this machine answers as a gateway or worker of ours does."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=deadline_s)
    try:
        connection.request("GET", "/healthz")
        reply = connection.getresponse()
        return reply.status == http.client.OK and reply.read(64).replace(b" ", b"") == b'{"status":"ok"}'
    except (OSError, http.client.HTTPException, ValueError):
        return False
    finally:
        connection.close()


def check_peers(peers: Sequence[Peer]) -> list[Finding]:
    return [_peer(peer) for peer in peers]


def _peer(peer: Peer) -> Finding:
    check, who = f"peers.{peer.name}", f"{peer.name} ({peer.address})"
    if peer.error:
        return warn(
            check,
            f"{who} does not answer: {peer.error}",
            why="the gateway cannot use it",
            do="on that board: is the worker running, and does it listen on this address (--host)?",
            commands=["edge-llm doctor", f"curl -s http://{peer.address}/healthz"],
        )
    if peer.ahead_s is None:
        return unknown(check, f"{who} answers, and does not say its time")
    off_s = abs(peer.ahead_s)
    words = f"{who}: its clock is {off_s:.0f} s {'ahead of' if peer.ahead_s > 0 else 'behind'} ours"
    sync = ["sudo timedatectl set-ntp true && timedatectl"]
    if off_s > MAX_SKEW_S - _COARSE_S:
        why = f"tickets are refused when clocks differ by more than {MAX_SKEW_S:.0f} s: nothing runs there"
        return fail(check, words, why=why, do="synchronise both boards", commands=sync)
    if off_s > _NEAR_S:
        why = f"from {MAX_SKEW_S:.0f} s on tickets are refused, and clocks that drift get there"
        return warn(check, words, why=why, do="synchronise both boards", commands=sync)
    return ok(check, f"{who} answers, clocks agree to {max(off_s, 1):.0f} s")
