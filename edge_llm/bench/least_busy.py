"""Which of several equal servers a client asks next: the one with the fewest of its requests open.

Owns the counting. It is what stands before servers that have no gateway: it knows neither their phases nor their KV,
only what it sent itself. Of equally busy ones the one that was asked longest ago.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class LeastBusy:
    """Addresses of servers, one or more, and how many requests each has open."""

    def __init__(self, urls: Sequence[str]) -> None:
        if not urls:
            raise ValueError("no server to ask")
        self._open = dict.fromkeys(urls, 0)
        self._asked = dict.fromkeys(urls, -1)
        self._turns = itertools.count()

    @contextmanager
    def chosen(self) -> Iterator[str]:
        """A server for one request, counted as busy with it until the end of the block."""
        url = min(self._open, key=lambda url: (self._open[url], self._asked[url]))
        self._open[url] += 1
        self._asked[url] = next(self._turns)
        try:
            yield url
        finally:
            self._open[url] -= 1
