"""How fast KV comes from each peer, measured while it comes.

Owns the arithmetic from arrival times to a rate and a round trip. Refuses to know sockets: whoever reads one says when
bytes came. Pure; clocks are handed in.

A prefill worker sends each chunk when it is computed, so bytes over time say how fast it computes, not how fast the
link is. What says that is a burst: reads that follow each other closely, after the first of which everything was there
to be sent. Bytes that lay in the socket's buffer before the first read make a burst look faster than the link; of
bursts larger than such a buffer that part is small, and of smaller ones nothing is concluded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from edge_llm.worker.messages import Link

# The gap between two reads of one burst; a chunk of a slow board takes a hundred times longer to compute.
GAP_S: Final = 0.005
MIN_BURST_BYTES: Final = 1 << 20
_SMOOTHING: Final = 0.2
# A peer that nothing was asked of for so long is no peer any more: it must not slow drains down.
FORGOTTEN_S: Final = 86_400.0
# A round trip that has not been seen for long is not the shortest any more: it grows by this share with each sample.
_FADING: Final = 0.02


@dataclass(slots=True)
class _Way:
    bytes_per_s: float = 0.0
    round_trip_s: float = 0.0
    samples: int = 0
    asked_s: float = 0.0


class Links:
    """The ways from all peers to this worker."""

    def __init__(self) -> None:
        self._ways: dict[str, _Way] = {}

    def meter(self, peer: str, clock: Callable[[], float]) -> Meter:
        """For one transfer that is asked for now."""
        now_s = clock()
        self._ways = {name: way for name, way in self._ways.items() if now_s - way.asked_s < FORGOTTEN_S}
        way = self._ways.setdefault(peer, _Way())
        way.asked_s = now_s
        return Meter(way, clock)

    @property
    def published(self) -> list[Link]:
        return [
            Link(peer=peer, bytes_per_s=way.bytes_per_s, round_trip_s=way.round_trip_s, samples=way.samples)
            for peer, way in sorted(self._ways.items())
            if way.samples
        ]


class Meter:
    """One transfer. Call `answered` once, then `came` after each read."""

    def __init__(self, way: _Way, clock: Callable[[], float]) -> None:
        self._way, self._clock = way, clock
        self._asked_s = self._last_s = clock()
        self._burst_s = 0.0
        self._burst_bytes = 0

    def answered(self) -> None:
        """The peer's answer began."""
        now_s = self._last_s = self._clock()
        way, took_s = self._way, now_s - self._asked_s
        way.round_trip_s = min(took_s, way.round_trip_s * (1 + _FADING)) if way.samples else took_s
        way.samples += 1

    def came(self, size: int) -> None:
        """`size` bytes were read."""
        now_s = self._clock()
        if now_s - self._last_s <= GAP_S:
            self._burst_s += now_s - self._last_s
            self._burst_bytes += size
        else:
            self._burst_s, self._burst_bytes = 0.0, 0  # what came first came before we looked
        self._last_s = now_s
        if self._burst_bytes >= MIN_BURST_BYTES and self._burst_s > 0.0:
            rate = self._burst_bytes / self._burst_s
            way = self._way
            way.bytes_per_s = way.bytes_per_s + _SMOOTHING * (rate - way.bytes_per_s) if way.bytes_per_s else rate
            self._burst_s, self._burst_bytes = 0.0, 0
