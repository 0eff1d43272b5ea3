"""Examining a board that is a folder, with everything outside of files in the test's hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edge_llm.doctor.build import BuildFacts
from edge_llm.doctor.examination import Examination, Outside
from edge_llm.doctor.files import Files
from edge_llm.doctor.finding import Finding

NOW_S = 1_800_000_000.0
GOOD_BUILD = BuildFacts(
    python=(3, 11, 9),
    pointer_bytes=8,
    status=0,
    error="",
    version="0.3.36",
    wanted_version="0.3.36",
    system_info="CPU : NEON = 1 | ARM_FMA = 1 | FP16_VA = 1 | DOTPROD = 1 | OPENMP = 1 | REPACK = 1 |",
    has_wheel=True,
)


def mute(_command: Sequence[str]) -> str | None:
    """No program is installed."""
    return None


def outside(build: BuildFacts = GOOD_BUILD, published: Mapping[str, str] | None = None) -> Outside:
    """A machine without programs, clock and neighbours."""
    return Outside(
        ask=mute,
        room=lambda _folder: 20 << 30,
        clock=lambda: None,
        page_bytes=4096,
        answers_here=lambda _port: False,
        build=lambda _environ, _settings: (build, dict(published or {})),
        built_s=lambda: None,
    )


def examined(
    root: Path,
    environ: Mapping[str, str] | None = None,
    *,
    config: Path | None = None,
    ignored: Sequence[str] = (),
    around: Outside | None = None,
) -> dict[str, Finding]:
    """Findings by check."""
    run = Examination(Files(root), config, environ or {}, lambda: NOW_S, outside=around or outside())
    found = run.run(ignored)
    assert len({finding.check for finding in found}) == len(found), "two findings of one name"
    return {finding.check: finding for finding in found}


def statuses(found: Mapping[str, Finding]) -> dict[str, str]:
    return {check: finding.status for check, finding in found.items()}
