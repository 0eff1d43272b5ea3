"""Where workers may be: what every way of finding them offers to the prober and the gateway.

Owns the contract. Implementations: static.py (a file), kubernetes.py (a namespace). Refuses to know whether anybody
answers there; that is the prober's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from edge_llm.cluster.view import Place

OnNews = Callable[[Collection[str]], None]
"""Is told the names of workers that came, went, moved or became ready: ask these now."""


@dataclass(frozen=True, slots=True)
class Heard:
    """How fresh the places are. `age_s`: since somebody last said so; None where nobody is asked. `problem`: why there
    is no newer word, for people; empty while all is well."""

    age_s: float | None = None
    problem: str = ""


class Discovery(Protocol):
    """Where workers may be."""

    def places(self) -> tuple[Place, ...]:
        """The current list. Raises ConfigError when it cannot be read."""
        ...

    def watching(self, on_news: OnNews) -> AbstractAsyncContextManager[None]:
        """Entered while the gateway runs: what has to be kept up is kept up meanwhile."""
        return nullcontext()

    def heard(self) -> Heard:
        return Heard()
