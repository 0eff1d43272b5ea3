"""Reading an OCI archive: its configuration, every file of its layers, and what of that must not be.

Owns the archive's format and the checks on a finished image. Refuses to know how it was built.

The checks are made on the file that will be carried to the boards, not on a build stage: what a base image brings is
loaded there too.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from edge_llm.image.elf import problem
from edge_llm.image.wheel import BASELINES

USER: Final = "10001:10001"
SBOM_PATH: Final = "opt/edge-llm/sbom.cdx.json"
# What a builder mounts or has of its own; finding it means that it was left behind.
_LEFT_BEHIND: Final = ("run/secrets/", "etc/pip.conf", "root/.cache/", "root/.config/", "var/cache/edge-llm/")
_HEADERS: Final = 1 << 16  # an ELF file's headers are in its first pages


@dataclass(frozen=True, slots=True)
class Contents:
    """What was found in an archive. `bytes_unpacked` as the layers' files sum up."""

    architecture: str
    config: dict[str, Any]
    names: tuple[str, ...]
    sbom: str | None
    bytes_unpacked: int
    unloadable: tuple[str, ...]


class OciArchive:
    """A tar file with an OCI image layout, for boards that we build for. Raises ValueError for anything else."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        try:
            index = json.load(self._open("index.json"))
            self.names = tuple(_name(manifest) for manifest in index["manifests"])
            self.manifest = self._json(index["manifests"][0])
            self.image = self._json(self.manifest["config"])
            self.architecture = str(self.image["architecture"])
        except (KeyError, IndexError, json.JSONDecodeError) as error:
            raise ValueError(f"this is no OCI archive: {error}") from error
        if self.architecture not in BASELINES:
            raise ValueError(f"this image is for {self.architecture}: there are {', '.join(BASELINES)}")

    def files(self) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
        """Members of all layers, the lowest first; a stream for plain files."""
        for layer in self.manifest["layers"]:
            with tarfile.open(fileobj=self._blob(layer), mode="r:*") as members:
                for member in members:
                    yield member, members.extractfile(member) if member.isfile() else None

    def _json(self, descriptor: dict[str, Any]) -> Any:
        return json.load(self._blob(descriptor))

    def _blob(self, descriptor: dict[str, Any]) -> IO[bytes]:
        return self._open("blobs/" + descriptor["digest"].replace(":", "/"))

    def _open(self, name: str) -> IO[bytes]:
        stream = self._tar.extractfile(name)
        if stream is None:
            raise KeyError(name)
        return stream


def _name(manifest: dict[str, Any]) -> str:
    return str(manifest.get("annotations", {}).get("org.opencontainers.image.ref.name", ""))


def read_archive(path: Path) -> Contents:
    """Raises ValueError, or OSError for a file that cannot be read."""
    try:
        return _read(path)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no whole tar file: {error}") from error


def _read(path: Path) -> Contents:
    with ExitStack() as stack:
        archive = OciArchive(stack.enter_context(tarfile.open(path)))
        machine = BASELINES[archive.architecture].machine
        found: list[str] = []
        unloadable: list[str] = []
        sbom, size = None, 0
        for member, stream in archive.files():
            name = member.name.removeprefix("./")
            found.append(name)
            size += member.size
            if stream is None:
                continue
            if name == SBOM_PATH:
                sbom = stream.read().decode()
            elif why := problem(stream.read(_HEADERS), machine):
                unloadable.append(f"/{name} {why}")
    return Contents(
        architecture=archive.architecture,
        config=archive.image.get("config", {}),
        names=tuple(found),
        sbom=sbom,
        bytes_unpacked=size,
        unloadable=tuple(unloadable),
    )


def complaints(contents: Contents, architecture: str) -> list[str]:
    """What is wrong with a finished image, one line each."""
    found = list(contents.unloadable)
    if contents.architecture != architecture:
        found.append(f"the image says {contents.architecture}, not {architecture}")
    if contents.config.get("User") != USER:
        found.append(f"it runs as {contents.config.get('User') or 'root'}, not as {USER}")
    if contents.sbom is None:
        found.append(f"it has no /{SBOM_PATH}")
    found += [f"/{name} was left behind by the build" for name in contents.names if _is_left_behind(name)]
    pythons = {name for name in contents.names if name.startswith(("usr/bin/python3.", "usr/local/bin/python3."))}
    versions = {name.rpartition("/")[2] for name in pythons}
    sites = {name.split("/")[3] for name in contents.names if name.startswith("opt/edge-llm/lib/python3")}
    if not sites & versions:
        wanted, given = ", ".join(sorted(sites)) or "none", ", ".join(sorted(versions)) or "none"
        found.append(f"its packages are for {wanted}, its Python is {given}: BASE and BUILD_BASE must be one release")
    return found


def _is_left_behind(name: str) -> bool:
    """Folders in the list end with a slash: they may be there, empty."""
    return any(name == place or (place.endswith("/") and name.startswith(place)) for place in _LEFT_BEHIND)
