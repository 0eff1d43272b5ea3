"""How long the KV of a sequence that left this worker is held for whoever goes on with it.

Owns the leases, and the waits for them. Refuses to know engines, slots, and how a sequence leaves (decode.py).

Rules:
- A lease lasts as long as its bytes may take on the slowest way known, LEASE_S at least and LONGEST_S at most.
- The leases of one hand-over run in parallel: each counts from its beginning, or from the last time that one was
  fetched. Where nobody fetches, many sequences take no longer than one. Whoever leaves after that is held for CALL_S.
- What is past its lease is forgotten, and nothing of one hand-over counts in the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from edge_llm.worker.links import Links

LEASE_S: Final = 10.0
LONGEST_S: Final = 120.0
# A gateway plans again and the next worker calls within less. A transfer that has begun keeps what it sends, and a
# worker that ends waits for it: the lease has done its part then.
CALL_S: Final = 0.5
# Others share the way, and a rate that was measured in bursts is not kept up.
_MARGIN: Final = 2.0
# A hand-over that is taken back notices within this.
_LOOK_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class _Lease:
    n_bytes: int
    until_s: float


class Leases:
    """Of one worker. `links`: the ways to it; those from it are taken to be as slow."""

    def __init__(self, links: Links, clock: Callable[[], float]) -> None:
        self._links, self._clock = links, clock
        self._held: dict[str, _Lease] = {}
        self._since_s = clock()
        self._fetched = asyncio.Event()

    @property
    def held_bytes(self) -> int:
        """What is still to be fetched."""
        now_s = self._clock()
        self._held = {key: lease for key, lease in self._held.items() if lease.until_s > now_s}
        return sum(lease.n_bytes for lease in self._held.values())

    def begin(self) -> None:
        """A hand-over begins: what an earlier one left is waited for no more."""
        self._held.clear()
        self._since_s = self._clock()

    def hold(self, request_id: str, n_bytes: int) -> None:
        """The KV of this request is here and nowhere else."""
        until_s = max(self._since_s + self._lease_s(n_bytes), self._clock() + CALL_S)
        self._held[request_id] = _Lease(n_bytes, until_s)

    def given(self, request_id: str) -> None:
        """Another worker has fetched what was kept of this request."""
        if self._held.pop(request_id, None) is not None:
            self._since_s = self._clock()
            self._fetched.set()

    async def wait(self, room_bytes: int, goes_on: Callable[[], bool]) -> None:
        """Until no more than `room_bytes` are held, while the hand-over `goes_on`."""
        while self.held_bytes > max(0, room_bytes) and goes_on():
            left_s = min(lease.until_s for lease in self._held.values()) - self._clock()
            self._fetched.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(_LOOK_S, left_s)):
                    await self._fetched.wait()

    def _lease_s(self, n_bytes: int) -> float:
        rates = [link.bytes_per_s for link in self._links.published if link.bytes_per_s]
        needed_s = _MARGIN * n_bytes / min(rates) if rates else 0.0
        return min(LONGEST_S, max(LEASE_S, needed_s))
