"""What a check found: the words, the status, and what all of them together mean for the exit code.

Pure. Owns the shape of a finding and of the report (its JSON and schema). Refuses to know what is checked and how.

Invariants: what is not well says why it matters and what to do; a reading that a board does not have is `unknown`,
never `ok`; `commands` are lines to type as they stand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final, Literal

import msgspec

SCHEMA_VERSION: Final = 1
WARNED: Final = 1
FAILED: Final = 2
Status = Literal["ok", "warn", "fail", "unknown"]
# The worst first: what a whole report is called by. What is not known is no fault.
_ORDER: Final[tuple[Status, ...]] = ("fail", "warn", "ok", "unknown")


class Finding(msgspec.Struct, frozen=True):
    """One check. `check` names it (`area.thing`), `do` is for people, `commands` for their shell."""

    check: str
    status: Status
    found: str
    why: str = ""
    do: str = ""
    commands: tuple[str, ...] = ()

    @property
    def area(self) -> str:
        return self.check.partition(".")[0]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `edge-llm doctor --json` prints. Fields are only ever added, with a default."""

    schema_version: int
    tool_version: str
    checked_at: datetime
    status: Status
    counts: dict[str, int]
    ignored: tuple[str, ...]
    findings: tuple[Finding, ...]


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def warn(check: str, found: str, *, why: str, do: str = "", commands: Sequence[str] = ()) -> Finding:
    return Finding(check, "warn", found, why, do, tuple(commands))


def fail(check: str, found: str, *, why: str, do: str = "", commands: Sequence[str] = ()) -> Finding:
    return Finding(check, "fail", found, why, do, tuple(commands))


def unknown(check: str, found: str, *, why: str = "", do: str = "", commands: Sequence[str] = ()) -> Finding:
    return Finding(check, "unknown", found, why, do, tuple(commands))


def report_of(findings: Iterable[Finding], ignored: Sequence[str], at: datetime, tool_version: str) -> Report:
    """All findings but those of the `ignored` checks (`board.governor`) and areas (`k3s`)."""
    kept = tuple(found for found in findings if not {found.check, found.area} & set(ignored))
    counts: dict[str, int] = {status: sum(found.status == status for found in kept) for status in _ORDER}
    worst: Status = next((status for status in _ORDER if counts[status]), "unknown")
    return Report(
        schema_version=SCHEMA_VERSION,
        tool_version=tool_version,
        checked_at=at,
        status=worst,
        counts=counts,
        ignored=tuple(ignored),
        findings=kept,
    )


def exit_code(report: Report) -> int:
    """0 all well as far as is known, 1 warnings, 2 failures."""
    return {"fail": FAILED, "warn": WARNED}.get(report.status, 0)


def schema() -> dict[str, Any]:
    """JSON schema of a report."""
    return msgspec.json.schema(Report)
