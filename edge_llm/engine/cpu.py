"""Whether this board's CPU has what the installed llama.cpp was compiled for: asked before the library is loaded.

Owns the question and its answer for people. Refuses to load anything: a library compiled for another CPU ends the
process with SIGILL, at a moment of its own choosing and without a word.

A wheel that is made for boards other than the building one carries `needs_cpu.json` beside its libraries
(image/wheel.py). A wheel without one was compiled for the CPU it is on (bootstrap.py), and is not asked.
"""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Collection
from pathlib import Path
from typing import Final

from edge_llm.errors import ConfigError
from edge_llm.machine import cpu_features

NEEDS: Final = "lib/needs_cpu.json"


def check_cpu(package: Path | None = None, root: Path = Path("/")) -> None:
    """Raises ConfigError with what is missing. `package` is llama_cpp's folder; None: the installed one."""
    folder = _installed() if package is None else package
    try:
        needs = json.loads((folder / NEEDS).read_text()) if folder else None
    except FileNotFoundError:
        return
    if needs and (found := refusal(needs, platform.machine(), cpu_features(root))):
        raise ConfigError(found)


def refusal(needs: dict[str, object], machine: str, features: Collection[str]) -> str | None:
    """Why this llama.cpp cannot run here. None: it can."""
    boards = f"this llama.cpp is compiled for {needs['boards']}"
    if machine != needs["machine"]:
        return f"{boards}; this is a {machine}: use the image or wheel for it"
    wanted = needs["features"]
    missing = sorted(set(wanted) - set(features)) if isinstance(wanted, list) else []
    if not missing:
        return None
    return (
        f"{boards}; this CPU has no {', '.join(missing)}: run it on such a board, or compile for this one "
        "(`make up` in a checkout on it)"
    )


def _installed() -> Path | None:
    """llama_cpp's folder, without importing it."""
    found = importlib.util.find_spec("llama_cpp")
    places = found.submodule_search_locations if found else None
    return Path(places[0]) if places else None
