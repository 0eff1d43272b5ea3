"""An OCI archive of a few files, written without any tool: the image that holds a pod's namespaces.

Pure but for the one file that it writes. Refuses to know registries. The same files give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
_MEDIA: Final = "application/vnd.oci.image"


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
            "layers": [_described(layer, f"{_MEDIA}.layer.v1.tar")],
        }
    )
    first = _described(manifest, f"{_MEDIA}.manifest.v1+json")
    tag = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}
    index = _json({"schemaVersion": 2, "manifests": [first | {"annotations": tag}]})
    blobs = {f"blobs/sha256/{_digest(blob).partition(':')[2]}": blob for blob in (layer, config, manifest)}
    parts = {"oci-layout": _json({"imageLayoutVersion": "1.0.0"}), "index.json": index} | blobs
    path.write_bytes(_tar({part: (data, 0o644) for part, data in parts.items()}))


def _tar(files: Mapping[str, tuple[bytes, int]]) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for name, (data, mode) in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), mode
            archive.addfile(entry, io.BytesIO(data))
    return whole.getvalue()


def _json(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, sort_keys=True).encode()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _described(data: bytes, kind: str) -> dict[str, Any]:
    return {"mediaType": kind, "digest": _digest(data), "size": len(data)}
