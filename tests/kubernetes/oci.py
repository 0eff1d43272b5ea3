"""OCI archives written without any tool: of a few files (what holds a pod's namespaces), and of images that differ in
a few files from a given one (other builds of it).

Pure but for the files that it reads and writes. Refuses to know registries. The same files give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import IO, Any, Final

_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
_MEDIA: Final = "application/vnd.oci.image"
_LAYER: Final = f"{_MEDIA}.layer.v1.tar"


def write_image(path: Path, name: str, files: Mapping[str, bytes], entrypoint: Sequence[str]) -> None:
    """`files`: executables by their path in the image. `name` is what a pod calls it, with its tag."""
    layer = _tar({file: (data, 0o755) for file, data in files.items()})
    config = _json(
        {
            "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": {"Entrypoint": list(entrypoint), "User": "65535:65535"},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        }
    )
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": f"{_MEDIA}.manifest.v1+json",
            "config": _described(config, f"{_MEDIA}.config.v1+json"),
            "layers": [_described(layer, _LAYER)],
        }
    )
    blobs = {_path(_digest(blob)): blob for blob in (layer, config, manifest)}
    parts = {"oci-layout": _json({"imageLayoutVersion": "1.0.0"}), "index.json": _index({name: manifest})} | blobs
    path.write_bytes(_tar({part: (data, 0o644) for part, data in parts.items()}))


def find_file(archive: Path, ending: str) -> tuple[str, bytes]:
    """Path and bytes of the file whose path ends so, the uppermost layer's. Raises LookupError."""
    with tarfile.open(archive) as whole:
        for layer in reversed(_manifest(whole)["layers"]):
            with tarfile.open(fileobj=whole.extractfile(_path(layer["digest"])), mode="r:*") as members:
                for member in members:
                    if member.isfile() and member.name.endswith(ending):
                        found = members.extractfile(member)
                        assert found is not None
                        return member.name, found.read()
    raise LookupError(f"{archive.name} has no file ...{ending}")


def labels(archive: Path) -> dict[str, str]:
    """Of the archive's first image."""
    with tarfile.open(archive) as whole:
        config = json.load(_member(whole, _path(_manifest(whole)["config"]["digest"])))
    return dict(config["config"].get("Labels") or {})


def write_others(path: Path, archive: Path, others: Mapping[str, Mapping[str, bytes | None]]) -> None:
    """The archive's first image but for these files (None: not there any more), by what a pod calls each."""
    with tarfile.open(archive) as whole, tarfile.open(path, "w") as made:
        manifest = _manifest(whole)
        config = json.load(_member(whole, _path(manifest["config"]["digest"])))
        for descriptor in manifest["layers"]:
            entry = whole.getmember(_path(descriptor["digest"]))
            made.addfile(entry, whole.extractfile(entry))
        manifests: dict[str, bytes] = {}
        blobs: dict[str, bytes] = {}
        for name, files in others.items():
            parts = _other(manifest, config, files)
            manifests[name] = parts[-1]
            blobs |= {_path(_digest(part)): part for part in parts}
        blobs |= {"oci-layout": _json({"imageLayoutVersion": "1.0.0"}), "index.json": _index(manifests)}
        for name, data in blobs.items():
            made.addfile(*_entry(name, data, 0o644))


def _other(
    manifest: Mapping[str, Any], config: Mapping[str, Any], files: Mapping[str, bytes | None]
) -> tuple[bytes, bytes, bytes]:
    """Layer, configuration and manifest: one layer more."""
    layer = _tar({_layered(name, data): (data or b"", 0o644) for name, data in files.items()})
    changed = deepcopy(dict(config))
    changed["rootfs"]["diff_ids"].append(_digest(layer))
    if "history" in changed:
        changed["history"].append({"created_by": "another build, for tests"})
    described = _json(changed)
    more = {
        **manifest,
        "config": {**manifest["config"], "digest": _digest(described), "size": len(described)},
        "layers": [*manifest["layers"], _described(layer, _LAYER)],
    }
    return layer, described, _json(more)


def _layered(name: str, data: bytes | None) -> str:
    """What is taken away is an entry, too: a whiteout."""
    if data is not None:
        return name
    folder, _, file = name.rpartition("/")
    return f"{folder}/.wh.{file}"


def _manifest(whole: tarfile.TarFile) -> dict[str, Any]:
    """Of the archive's first image."""
    first = json.load(_member(whole, "index.json"))["manifests"][0]
    found: dict[str, Any] = json.load(_member(whole, _path(first["digest"])))
    return found


def _member(whole: tarfile.TarFile, name: str) -> IO[bytes]:
    found = whole.extractfile(name)
    if found is None:
        raise LookupError(f"{name} is no file")
    return found


def _index(manifests: Mapping[str, bytes]) -> bytes:
    """By what a pod calls each, with its tag."""
    entries = []
    for name, manifest in manifests.items():
        tag = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}
        entries.append(_described(manifest, f"{_MEDIA}.manifest.v1+json") | {"annotations": tag})
    return _json({"schemaVersion": 2, "manifests": entries})


def _path(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def _tar(files: Mapping[str, tuple[bytes, int]]) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for name, (data, mode) in files.items():
            archive.addfile(*_entry(name, data, mode))
    return whole.getvalue()


def _entry(name: str, data: bytes, mode: int) -> tuple[tarfile.TarInfo, io.BytesIO]:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    return entry, io.BytesIO(data)


def _json(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, sort_keys=True).encode()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _described(data: bytes, kind: str) -> dict[str, Any]:
    return {"mediaType": kind, "digest": _digest(data), "size": len(data)}
