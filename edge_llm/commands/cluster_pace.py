"""How fast each node works now: differences of its counters between two looks.

Pure: the time of a look is an argument. Owns what is remembered between looks. A node says its counters about once a
second; between two of its answers the last pace stays. One that was started again begins anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

# Two answers closer than this are one: a rate over less is mostly the clock's noise.
LEAST_S: Final = 0.3


@dataclass(frozen=True, slots=True)
class Pace:
    """Tokens a second; None before two answers came."""

    generated: float | None = None
    computed: float | None = None


@dataclass(frozen=True, slots=True)
class _Look:
    life: tuple[Any, ...]
    at_s: float
    generated: int
    computed: int
    pace: Pace = Pace()


@dataclass(slots=True)
class Paces:
    """Of all nodes of one cluster."""

    _looks: dict[str, _Look] = field(default_factory=dict)

    def of(self, nodes: Iterable[Mapping[str, Any]], now_s: float) -> dict[str, Pace]:
        """By worker. `now_s`: when the overview came."""
        self._looks = {node["worker"]: self._look(node, now_s) for node in nodes}
        return {worker: look.pace for worker, look in self._looks.items()}

    def _look(self, node: Mapping[str, Any], now_s: float) -> _Look:
        load = node["load"]
        at_s = now_s - node["seen_ago_s"]
        new = _Look(
            (node["pid"], node["started_at"]), at_s, load.get("generated_tokens", 0), load.get("computed_tokens", 0)
        )
        last = self._looks.get(node["worker"])
        if last is None or last.life != new.life:
            return new
        passed_s = at_s - last.at_s
        if passed_s < LEAST_S:
            return last
        pace = Pace((new.generated - last.generated) / passed_s, (new.computed - last.computed) / passed_s)
        return _Look(new.life, at_s, new.generated, new.computed, pace)
