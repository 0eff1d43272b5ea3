"""What was tried and how it went: lines for people while it happens, and one record at the end.

Owns counting, the last lines, and the record (kind `test-cluster`). A scenario that cannot be tried here is said, never
passed. Refuses to know scenarios.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from edge_llm.bench.record import write
from edge_llm.bench.run import Run

# What this cluster does not have, whatever passes on it.
NOT_COVERED: Final = (
    "K3s itself (flannel, kine, Traefik, servicelb, local-path, its Helm controller)",
    "cluster DNS",
    "enforcement of network policies",
    "arm64 nodes",
    "cgroup v2 where the machine has v1, and the other way round",
    "more than one machine: all nodes share its cores",
)


@dataclass(slots=True)
class Ledger:
    """The lines of this run. `run` becomes the record."""

    run: Run
    kubernetes: str
    began_s: float = field(default_factory=time.monotonic)
    lines: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    untested: dict[str, str] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    def say(self, line: str) -> None:
        """A line of progress, kept too."""
        self.lines.append(line)
        print(line, flush=True)

    def passes(self, name: str, detail: str, took_s: float, **facts: object) -> None:
        if name in self.failed:  # it was tried again; its failure stays in the record
            self.failed.remove(name)
        self.passed.append(name)
        self.say(f"PASS {name:<38} {took_s:6.1f} s  {detail}")
        self.run.case({"case": name, "outcome": "passed", "detail": detail, "took_s": round(took_s, 3), **facts})

    def fails(self, name: str, why: str, took_s: float) -> None:
        if name not in self.failed:
            self.failed.append(name)
        self.say(f"FAIL {name:<38} {took_s:6.1f} s  {why}")
        self.run.case({"case": name, "outcome": "failed", "detail": why, "took_s": round(took_s, 3)})
        self.run.fail(name, why)

    def leaves_out(self, name: str, why: str) -> None:
        """Not tried, or, of one that failed, not tried again: then it stays failed."""
        if name in self.failed:
            return
        self.untested[name] = why
        self.say(f"---- {name:<38}           not tested: {why}")
        self.run.case({"case": name, "outcome": "not tested", "detail": why})

    def last_lines(self) -> None:
        """What a reader looks at first."""
        self.say(f"{len(self.passed)} passed, {len(self.failed)} failed")
        self.say(f"upstream Kubernetes {self.kubernetes}, {self.run.before.machine}")
        for line in (*(f"{name}: {why}" for name, why in self.untested.items()), *NOT_COVERED):
            self.say(f"not covered: {line}")

    def figures(self) -> dict[str, Any]:
        return {
            "passed": len(self.passed),
            "failed": len(self.failed),
            "kubernetes": self.kubernetes,
            "scenarios": {name: "passed" for name in self.passed} | dict.fromkeys(self.failed, "failed"),
            "not_covered": [*NOT_COVERED, *(f"{name}: {why}" for name, why in self.untested.items())],
            "measured": self.measured,
            "log": self.lines,
        }

    def write(self, is_complete: bool, folder: Path) -> Path:
        return write(self.run.record(self.figures(), is_complete), folder)
