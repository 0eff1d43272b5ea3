"""The manifests that come with this program: where they are, what of them counts in a plan, a copy beside an overlay.

Owns reading and copying. Refuses to change them: what differs is the overlay's.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from edge_llm.errors import ConfigError
from edge_llm.plan.changes import Earlier, earlier_of
from edge_llm.plan.description import bytes_of
from edge_llm.plan.overlay import HEADER, ON_BOARD, OVERLAY, SHIPPED, VERIFY, Shipped

# What an overlay is made of; not the shipped overlays and the dashboards.
_PARTS: Final = ("base", "workers", "components")


def manifests_folder() -> Path:
    """A checkout has it at the top level, an installed package carries a copy. Raises ConfigError."""
    package = Path(__file__).parent.parent
    is_checkout = (package.parent / "pyproject.toml").is_file()
    folder = (package.parent if is_checkout else package) / "k3s_manifests"
    if not (folder / "base" / OVERLAY).is_file():
        raise ConfigError(f"the manifests are not at {folder}: install edge-llm again, or work in a checkout")
    return folder


def read_shipped(folder: Path) -> Shipped:
    worker = _only(folder / "workers" / "any", "StatefulSet", "edge-llm")
    gateway = _only(folder / "base", "Deployment", "edge-llm-gateway")
    pod = worker["spec"]["template"]["spec"]
    claims = worker["spec"].get("volumeClaimTemplates") or []
    storage = [claim["spec"]["resources"]["requests"]["storage"] for claim in claims]
    return Shipped(
        components=frozenset(
            path.parent.name for path in (folder / "components").glob(f"*/{OVERLAY}") if path.is_file()
        ),
        gateway_bytes=bytes_of(gateway["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]["memory"]),
        verifies=any(container["name"] == VERIFY for container in pod.get("initContainers") or []),
        storage_bytes=bytes_of(storage[0]) if storage else 0,
        volumes=tuple(
            document
            for document in _documents(folder / "components" / ON_BOARD)
            if document.get("kind") == "PersistentVolume"
        ),
    )


def read_earlier(target: Path) -> Earlier:
    """What was rendered into this folder before; of what is not ours, nothing. Raises ConfigError."""
    file = target / OVERLAY
    try:
        text = file.read_text() if file.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
    return earlier_of(text) if text.startswith(HEADER) else Earlier()


def write_overlay(target: Path, files: Mapping[str, str], folder: Path) -> None:
    """A copy of the manifests, and over it `files` (overlay.py), by their place in `target`: nothing outside of it is
    needed to apply it. Raises ConfigError when something that is not ours lies there."""
    file, copy = target / OVERLAY, target / SHIPPED
    try:
        if file.exists() and not file.read_text().startswith(HEADER):
            raise ConfigError(f"{file} was not rendered by this command: name another folder with -o")
        if not file.exists() and copy.exists():
            raise ConfigError(f"{copy} is in the way: name another folder with -o")
        if copy.exists():
            shutil.rmtree(copy)
        for part in _PARTS:
            shutil.copytree(folder / part, copy / part)
        for place, text in files.items():
            (target / place).write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror or error}") from error


def _only(folder: Path, kind: str, name: str) -> Any:
    for document in _documents(folder):
        if document.get("kind") == kind and document["metadata"]["name"] == name:
            return document
    raise ConfigError(f"the manifests in {folder} have no {kind} {name}: they are of another version than this program")


def _documents(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.yaml")):
        yield from filter(None, yaml.safe_load_all(path.read_text()))
