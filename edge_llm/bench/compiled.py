"""How the llama-cpp-python of this environment was compiled, as far as that can be proven.

Owns the answer for a record: the wheel, its hash, and the flags it was compiled with. pip remembers which file it
installed from; set-up keeps its wheels in a folder whose name is a hash of version, flags, CPU and compiler, so that
name says whether the flags are today's. Refuses to guess: a wheel from elsewhere has no flags.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlparse

from edge_llm import bootstrap

UNKNOWN = "unknown: not compiled by set-up with this compiler on this CPU"


@cache
def compiled_facts() -> dict[str, str]:
    """`version`, `wheel`, `wheel_sha256`, `compiler`, `cmake_flags`; empty where llama-cpp-python is not installed."""
    try:
        found = distribution(bootstrap.PACKAGE)
    except PackageNotFoundError:
        return {}
    compiler = bootstrap.compiler_version(os.environ) or ""
    return {"version": found.version} | facts_of(json.loads(found.read_text("direct_url.json") or "{}"), compiler)


def facts_of(installed: Mapping[str, Any], compiler: str, root: Path = bootstrap.ROOT) -> dict[str, str]:
    """The same of pip's direct_url.json (PEP 610)."""
    place = PurePosixPath(unquote(urlparse(installed.get("url", "")).path))
    digest = installed.get("archive_info", {}).get("hashes", {}).get("sha256", "")
    facts = {"wheel": place.name, "wheel_sha256": digest, "cmake_flags": UNKNOWN}
    if not compiler or not (root / bootstrap.LOCKS[False]).exists():
        return facts
    paths = bootstrap.Paths(root, root / ".venv", Path())
    ours = bootstrap.wheel_folder(paths, compiler, bootstrap.cpu_features(Path("/")))
    if place.parent.name != ours.name:
        return facts
    return facts | {"compiler": compiler, "cmake_flags": " ".join(bootstrap.FLAGS)}
