"""The program: Python, the llama.cpp that it computes with, and what was verified with it.

Owns judging these; pure but for `read_levels`. Refuses to load llama.cpp: what it says of itself comes from a process
of its own (edge_llm/engine/about.py), because a build for another CPU dies with SIGILL, and takes its process with it.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_llm.doctor.finding import Finding, fail, ok, unknown, warn

OLDEST_PYTHON: Final = (3, 11)
_REBUILD: Final = "compile it for this CPU, with the flags that exactness needs (minutes, once)"
_MAKE: Final = ("make setup",)
_LOAD: Final = "edge-llm doctor --load"
_TINYBLAS: Final = re.compile(r"\bLLAMAFILE = 1\b")
_IS_ON: Final = re.compile(r"(\w+) = 1\b")
# What the kernel calls a feature, and what ggml's list of build features calls it (ggml-cpu.cpp).
_FEATURES: Final = {
    "asimddp": "DOTPROD",
    "asimdhp": "FP16_VA",
    "i8mm": "MATMUL_INT8",
    "sve": "SVE",
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx_vnni": "AVX_VNNI",
}
_NEEDED: Final = frozenset({"asimddp", "asimdhp", "avx2", "fma", "f16c"})


@dataclass(frozen=True, slots=True)
class BuildFacts:
    """`status`: how the asking process ended, below 0 by a signal, None when it was not asked or took too long.
    `wanted_version`: what edge-llm names in its requirements. `has_wheel` None: no checkout, or no compiler to tell
    by."""

    python: tuple[int, int, int]
    pointer_bytes: int
    status: int | None
    error: str
    version: str | None
    wanted_version: str | None
    system_info: str
    has_wheel: bool | None


@dataclass(frozen=True, slots=True)
class Level:
    """One record of `edge-llm verify`: when, by the file's clock."""

    level: str
    recorded_s: float


def check_build(facts: BuildFacts, features: frozenset[str], policy: str) -> list[Finding]:
    """All about the program, in the order they are shown."""
    found = [python(facts), llama_cpp(facts), tiny_blas(facts, policy), cpu_build(facts, features), wheel(facts)]
    return [finding for finding in found if finding is not None]


def python(facts: BuildFacts) -> Finding:
    check, words = "build.python", ".".join(map(str, facts.python))
    if facts.pointer_bytes < 8:
        return fail(
            check,
            f"{words}, 32 bits",
            why="a model larger than 2 GiB cannot be mapped, and no wheel is made for it",
            do="install the 64-bit edition of the system",
            commands=["getconf LONG_BIT"],
        )
    if facts.python[:2] < OLDEST_PYTHON:
        do = "install a newer one and set up again"
        return fail(check, words, why="3.11 or newer is needed", do=do, commands=["make setup PYTHON=python3.11"])
    return ok(check, words)


def llama_cpp(facts: BuildFacts) -> Finding:
    check = "build.llama_cpp"
    if facts.status == -signal.SIGILL:
        return fail(
            check,
            "it dies with SIGILL: it was compiled for another CPU",
            why="no worker can start",
            do=_REBUILD,
            commands=_MAKE,
        )
    if facts.version is None and facts.status is None:
        return unknown(check, facts.error or "it was not asked")
    if facts.version is None or (facts.status or 0) < 0:
        status = facts.status or 0
        how = f"signal {-status}" if status < 0 else facts.error or f"status {status}"
        return fail(check, f"it cannot be loaded: {how}", why="no worker can start", do=_REBUILD, commands=_MAKE)
    if facts.wanted_version is not None and facts.version != facts.wanted_version:
        return warn(
            check,
            f"llama-cpp-python {facts.version}; this edge-llm was made for {facts.wanted_version}",
            why="its low-level interface changes between versions, and boards of different versions share no exact KV",
            do=_REBUILD,
            commands=_MAKE,
        )
    return ok(check, f"llama-cpp-python {facts.version}")


def tiny_blas(facts: BuildFacts, policy: str) -> Finding | None:
    check = "build.tiny_blas"
    if not facts.system_info:
        return None
    if not _TINYBLAS.search(facts.system_info):
        return ok(check, "off, as exactness needs")
    if policy == "fast":
        return ok(check, "on; policy fast promises nothing that it could break")
    return warn(
        check,
        "on",
        why="tinyBLAS picks kernels by shape: tokens then depend on batch and chunks, and no level above none holds",
        do=_REBUILD,
        commands=_MAKE,
    )


def cpu_build(facts: BuildFacts, features: frozenset[str]) -> Finding | None:
    """Whether the build uses what the CPU has, and nothing that it has not."""
    check = "build.cpu_features"
    built = set(_IS_ON.findall(facts.system_info))
    if not facts.system_info or not features:
        return None
    foreign = [name for flag, name in _FEATURES.items() if name in built and flag not in features]
    foreign = [name for name in foreign if any(flag in features for flag in _same_family(name))]
    if foreign:
        return fail(
            check,
            f"compiled with {', '.join(foreign)}, which this CPU does not have",
            why="it dies with SIGILL in the middle of a prompt",
            do=_REBUILD,
            commands=_MAKE,
        )
    unused = [name for flag, name in _FEATURES.items() if flag in features and name not in built]
    needed = [name for flag, name in _FEATURES.items() if name in unused and flag in _NEEDED]
    if needed:
        return warn(
            check,
            f"compiled without {', '.join(needed)}, which this CPU has",
            why="a build for any CPU reads prompts several times slower",
            do=_REBUILD,
            commands=_MAKE,
        )
    more = f"; not used: {', '.join(unused)}" if unused else ""
    return ok(check, f"{', '.join(sorted(built & set(_FEATURES.values())))}{more}")


def _same_family(name: str) -> Sequence[str]:
    """The features that a CPU of the same architecture has anyway: a list without any is not that architecture's."""
    arm = ("DOTPROD", "FP16_VA", "MATMUL_INT8", "SVE")
    return ("asimd", "fp") if name in arm else ("sse2", "fpu")


def wheel(facts: BuildFacts) -> Finding | None:
    check = "build.wheel"
    if facts.has_wheel is None:
        return None
    if facts.has_wheel:
        return ok(check, "one for this CPU and compiler is kept")
    return ok(check, "none is kept for this CPU and compiler: the next `make setup` may compile for some minutes")


def read_levels(folder: Path) -> tuple[Level, ...]:
    """What `edge-llm verify` left here, for whatever model and build; files that are no records are passed over."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(Level(str(json.loads(path.read_text())["level"]), path.stat().st_mtime))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return tuple(found)


def check_levels(levels: Sequence[Level], built_s: float | None, model: str, policy: str) -> Finding:
    """A level is of one model, build and policy. Which ones a record is of is known only to who loads them."""
    check, commands = "build.level", [f"edge-llm verify --model {model}"]
    why = (
        "workers publish what was measured here; unverified ones promise nothing, and KV between boards gets level none"
    )
    if not levels:
        if policy == "fast":
            return ok(check, "nothing was verified; policy fast promises nothing anyway")
        return warn(check, "nothing was verified on this board", why=why, do="measure it, minutes", commands=commands)
    current = [level for level in levels if built_s is None or level.recorded_s >= built_s]
    if not current:
        # the same wheel may have been installed again: then a record is still of this build
        found = f"{len(levels)} records, all older than this installation"
        return unknown(check, found, why=why, do="see which level a worker would publish", commands=[_LOAD])
    newest = max(current, key=lambda level: level.recorded_s)
    words = (
        f"{newest.level} in the newest of {len(current)} records since this installation (--load says of which model)"
    )
    return ok(check, words)


def check_published(published: Mapping[str, str], model: str) -> Finding:
    """What a worker would publish, after the model was loaded as a worker loads it: `level` and `reason`, or the
    `problem` it had."""
    check = "build.level"
    if problem := published.get("problem"):
        return fail(check, f"{model} cannot be loaded: {problem}", why="no worker can start with these settings")
    level, reason = published["level"], published["reason"]
    if level in ("exact", "same-plan"):
        return ok(check, f"{level} for {model}: {reason}")
    return warn(
        check,
        f"{level} for {model}: {reason}",
        why="KV between boards gets level none",
        do="measure it, minutes",
        commands=[f"edge-llm verify --model {model}"],
    )
