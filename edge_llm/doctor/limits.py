"""What this process may use: the limits that a container, a pod or a systemd unit puts on it.

Owns finding this process's own control group, of both versions, and judging its limits. Refuses to know whether the
model fits (model.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from edge_llm.doctor.files import Files, gib
from edge_llm.doctor.finding import Finding, ok, unknown, warn

_ROOT: Final = "sys/fs/cgroup"
_UNLIMITED: Final = 1 << 60
# So many of the quota's periods may end early before it is said.
_THROTTLED_SHARE: Final = 0.05
_UNREAD: Final = "neither /proc/self/cgroup nor /sys/fs/cgroup can be read"


@dataclass(frozen=True, slots=True)
class LimitFacts:
    """None: no limit, where `is_known`; else nobody could read any. `throttled_share`: of the periods with work, how
    many ended because the quota was used up."""

    memory_bytes: int | None
    cpu_cores: float | None
    throttled_share: float | None
    killed: int
    is_known: bool = True


def read_limits(files: Files) -> LimitFacts:
    """The tightest limit of this process's group and of those above it."""
    memory = [
        size for name in _files(files, "memory", "memory.max", "memory.limit_in_bytes") if (size := _size(files, name))
    ]
    quotas = [cores for name in _files(files, "cpu", "cpu.max", "cpu.cfs_quota_us") if (cores := _cores(files, name))]
    stats = [files.fields(name, " ") for name in _files(files, "cpu", "cpu.stat", "cpu.stat")]
    events = [files.fields(name, " ") for name in _files(files, "memory", "memory.events", "memory.oom_control")]
    shares = [share for stat in stats if (share := _throttled_share(stat)) is not None]
    return LimitFacts(
        memory_bytes=min(memory, default=None),
        cpu_cores=min(quotas, default=None),
        throttled_share=max(shares, default=None),
        killed=max((int(event.get("oom_kill", "0") or 0) for event in events), default=0),
        is_known=bool(files.text("proc/self/cgroup") or files.names(_ROOT)),
    )


def check_limits(facts: LimitFacts, cores: int) -> list[Finding]:
    return [memory_limit(facts), cpu_limit(facts, cores)]


def memory_limit(facts: LimitFacts) -> Finding:
    check = "limits.memory"
    if not facts.is_known:
        return unknown(check, _UNREAD)
    words = "none" if facts.memory_bytes is None else gib(facts.memory_bytes)
    if facts.killed:
        return warn(
            check,
            f"{words}; {facts.killed} processes of this group were killed for their memory",
            why="a worker that is killed takes its answers with it; others compute them again",
            do="give the group more memory, or the worker fewer slots (model.memory below has the sum)",
        )
    return ok(check, words)


def cpu_limit(facts: LimitFacts, cores: int) -> Finding:
    check = "limits.cpu"
    if not facts.is_known:
        return unknown(check, _UNREAD)
    if facts.cpu_cores is None or (cores and facts.cpu_cores >= cores):
        return ok(check, "none")
    share = facts.throttled_share
    words = f"{facts.cpu_cores:g} of {cores} cores"
    is_whole = float(facts.cpu_cores).is_integer()
    if is_whole and (share or 0.0) < _THROTTLED_SHARE:
        return ok(check, words)
    stopped = "" if share is None else f"; {share:.0%} of the periods ended early"
    return warn(
        check,
        words + stopped,
        why="a quota stops all threads of a decode step for the rest of its period, up to 0.1 s at a time",
        do="in Kubernetes leave resources.limits.cpu out, or give whole cores; requests.cpu is enough",
    )


def _files(files: Files, controller: str, v2: str, v1: str) -> Iterator[str]:
    """The same file in this process's group and in all above it, of whichever version has it."""
    for line in (files.text("proc/self/cgroup") or "0::/").splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        if parts[1] == "":
            yield from (name for name in _chain(_ROOT, parts[2], v2) if files.exists(name))
        elif controller in parts[1].split(","):
            yield from (name for name in _chain(f"{_ROOT}/{controller}", parts[2], v1) if files.exists(name))


def _chain(base: str, path: str, name: str) -> Iterator[str]:
    """Inside a container the path may lead outside of what is mounted: then only `base` is there."""
    parts = [part for part in path.split("/") if part and part != ".."]
    for length in range(len(parts), -1, -1):
        yield "/".join([base, *parts[:length], name])


def _size(files: Files, name: str) -> int | None:
    text = files.text(name) or ""
    return int(text) if text.isdigit() and int(text) < _UNLIMITED else None


def _cores(files: Files, name: str) -> float | None:
    """`<quota> <period>` of version 2; two files of version 1, where -1 is no limit."""
    words = (files.text(name) or "").split()
    if name.endswith("cpu.cfs_quota_us"):
        words.append(files.text(name.replace("quota", "period")) or "")
    if len(words) != 2 or not all(word.isdigit() for word in words) or not int(words[1]):
        return None
    return int(words[0]) / int(words[1])


def _throttled_share(stat: dict[str, str]) -> float | None:
    try:
        periods, throttled = int(stat["nr_periods"]), int(stat["nr_throttled"])
    except (KeyError, ValueError):
        return None
    return throttled / periods if periods else None
