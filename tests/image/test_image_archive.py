"""Checks on a finished image, on OCI archives made by hand."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from edge_llm.image.archive import SBOM_PATH, USER, complaints, read_archive
from tests.image.headers import LOAD, X86_64, elf

GOOD: Mapping[str, bytes] = {
    "usr/bin/python3.11": elf((LOAD, 65536)),
    "opt/edge-llm/lib/python3.11/site-packages/edge_llm/cli.py": b"",
    SBOM_PATH: b'{"components": []}',
}


def packed(files: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def archive(path: Path, *layers: Mapping[str, bytes], user: str = USER, architecture: str = "arm64") -> Path:
    blobs: dict[str, bytes] = {}

    def keep(content: bytes) -> dict[str, str]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = content
        return {"digest": f"sha256:{digest}"}

    kept = [keep(packed(layer)) for layer in layers]
    config = keep(json.dumps({"architecture": architecture, "config": {"User": user}}).encode())
    manifest = keep(json.dumps({"config": config, "layers": kept}).encode())
    named = {**manifest, "annotations": {"org.opencontainers.image.ref.name": "localhost/edge-llm:0.1.0"}}
    blobs["index.json"] = json.dumps({"manifests": [named]}).encode()
    path.write_bytes(packed(blobs))
    return path


def found(tmp_path: Path, *layers: Mapping[str, bytes], **more: str) -> list[str]:
    return complaints(read_archive(archive(tmp_path / "image.tar", *layers, **more)), "arm64")


def test_a_good_image_has_nothing_against_it(tmp_path: Path) -> None:
    assert found(tmp_path, GOOD) == []


def test_the_sbom_comes_out_of_the_image(tmp_path: Path) -> None:
    assert read_archive(archive(tmp_path / "image.tar", GOOD)).sbom == '{"components": []}'


def test_an_image_that_runs_as_root_is_refused(tmp_path: Path) -> None:
    assert found(tmp_path, GOOD, user="") == [f"it runs as root, not as {USER}"]


def test_libraries_of_every_layer_are_checked(tmp_path: Path) -> None:
    below = {"usr/lib/small.so": elf((LOAD, 4096)), "usr/lib/other.so": elf((LOAD, 65536), machine=X86_64)}
    lines = found(tmp_path, below, GOOD)
    assert len(lines) == 2
    assert lines[0].startswith("/usr/lib/small.so has segments aligned to 4096")
    assert lines[1] == "/usr/lib/other.so is for x86_64, not aarch64"


@pytest.mark.parametrize("name", ["run/secrets/ca", "etc/pip.conf", "root/.cache/pip/x", "./root/.config/pip/pip.conf"])
def test_what_the_builder_mounted_must_not_be_left_behind(tmp_path: Path, name: str) -> None:
    assert found(tmp_path, {**GOOD, name: b""}) == [f"/{name.removeprefix('./')} was left behind by the build"]


def test_packages_for_another_python_than_the_images_are_refused(tmp_path: Path) -> None:
    files = {name: content for name, content in GOOD.items() if "usr/bin" not in name}
    (line,) = found(tmp_path, {**files, "usr/bin/python3.13": b""})
    assert "packages are for python3.11, its Python is python3.13" in line


def test_an_image_for_another_architecture_is_refused(tmp_path: Path) -> None:
    files = {name: content for name, content in GOOD.items() if "usr/bin" not in name} | {"usr/bin/python3.11": b""}
    assert found(tmp_path, files, architecture="amd64") == ["the image says amd64, not arm64"]


def test_an_image_without_a_list_of_its_packages_is_refused(tmp_path: Path) -> None:
    files = {name: content for name, content in GOOD.items() if name != SBOM_PATH}
    assert found(tmp_path, files) == [f"it has no /{SBOM_PATH}"]


def test_a_tar_file_of_something_else_says_so(tmp_path: Path) -> None:
    (tmp_path / "other.tar").write_bytes(packed({"a": b""}))
    with pytest.raises(ValueError, match="no OCI archive"):
        read_archive(tmp_path / "other.tar")


def test_an_image_for_boards_that_there_is_no_build_for_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="for riscv64: there are amd64, arm64"):
        found(tmp_path, GOOD, architecture="riscv64")


def test_an_archive_that_was_cut_off_says_so(tmp_path: Path) -> None:
    whole = archive(tmp_path / "image.tar", GOOD)
    whole.write_bytes(whole.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"image\.tar is no whole tar file"):
        read_archive(whole)
