"""Other builds of edge-llm, as an upgrade brings them: their images, and their manifests as their checkout has them.

Owns what differs: the version, and settings of workers. Everything else is the build that is tested, bit for bit: two
builds are told apart by what they say they are. Refuses to know Kubernetes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import edge_llm
from edge_llm.image.build import IMAGE
from tests.kubernetes import oci
from tests.kubernetes.deploy import OVERLAYS, SHIPPED
from tests.kubernetes.shell import Broken

_ROOT: Final = SHIPPED.parent
_INIT: Final = "/edge_llm/__init__.py"


@dataclass(frozen=True, slots=True)
class Build:
    """`settings`: what its base/worker.env says otherwise."""

    version: str
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def image(self) -> str:
        return f"{IMAGE}:{self.version}"


def later(number: int) -> str:
    """The version that comes so many after this one."""
    return f"{edge_llm.__version__}.post{number}"


def write_images(path: Path, archive: Path, builds: Sequence[Build]) -> None:
    """One archive with an image for each build, made of the one under test."""
    file, text = oci.find_file(archive, _INIT)
    compiled = _compiled(file)
    ours = edge_llm.__version__.encode()
    if text.count(ours) != 1:
        raise Broken(f"{archive}: {file} does not say version {edge_llm.__version__}: `make image` builds a newer one")
    # compiled files of the image are believed unread: without it, Python reads the source
    others = {one.image: {file: text.replace(ours, one.version.encode()), compiled: None} for one in builds}
    oci.write_others(path, archive, others)


def _compiled(file: str) -> str:
    """Where the image's Python has the compiled one."""
    found = re.search(r"^(.*python(\d)\.(\d+)/.*)/__init__\.py$", file)
    if found is None:
        raise Broken(f"{file} is not where a Python has its packages")
    return f"{found[1]}/__pycache__/__init__.cpython-{found[2]}{found[3]}.pyc"


def checkout(folder: Path, build: Build, decode: int) -> Path:
    """The test's overlay with so many decode workers, out of the manifests as that build's checkout has them."""
    for part in (SHIPPED, OVERLAYS):
        shutil.copytree(part, folder / part.relative_to(_ROOT), dirs_exist_ok=True)
    manifests, overlays = (folder / part.relative_to(_ROOT) for part in (SHIPPED, OVERLAYS))
    _replace(manifests / "components/release/kustomization.yaml", re.escape(edge_llm.__version__), build.version)
    for name, value in build.settings.items():
        _replace(manifests / "base/worker.env", rf"(?m)^{name}=.*$", f"{name}={value}")
    overlay = overlays / "chat"
    _replace(overlay / "kustomization.yaml", r"edge-llm-decode, count: \d+", f"edge-llm-decode, count: {decode}")
    return overlay


def _replace(path: Path, pattern: str, text: str) -> None:
    made, count = re.subn(pattern, text, path.read_text())
    if not count:
        raise Broken(f"{path.name} has no {pattern}")
    path.write_text(made)
