"""Another build differs from the one under test in what it says it is, and in nothing else."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

import edge_llm
from tests.kubernetes import oci
from tests.kubernetes.builds import Build, checkout, later, write_images
from tests.kubernetes.shell import Broken
from tests.manifests.rendering import containers_of, named, of_kind, rendered, workloads

_SITE = "opt/edge-llm/lib/python3.11/site-packages/edge_llm"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "ours.tar"
    text = f'__version__ = "{edge_llm.__version__}"\n'.encode()
    oci.write_image(path, "localhost/edge-llm:ours", {f"{_SITE}/__init__.py": text, "else": b"kept"}, ["/else"])
    return path


def _blob(whole: tarfile.TarFile, digest: str) -> bytes:
    found = whole.extractfile("blobs/" + digest.replace(":", "/"))
    assert found is not None
    data = found.read()
    assert hashlib.sha256(data).hexdigest() == digest.partition(":")[2]
    return data


def _images(archive: Path) -> dict[str, tuple[dict[str, Any], list[bytes]]]:
    """Configuration and layers of each image, by its name."""
    with tarfile.open(archive) as whole:
        index = whole.extractfile("index.json")
        assert index is not None
        found = {}
        for entry in json.load(index)["manifests"]:
            manifest = json.loads(_blob(whole, entry["digest"]))
            layers = [_blob(whole, layer["digest"]) for layer in manifest["layers"]]
            config = json.loads(_blob(whole, manifest["config"]["digest"]))
            found[entry["annotations"]["io.containerd.image.name"]] = (config, layers)
        return found


def test_every_build_is_the_same_image_and_one_layer_with_its_version(tmp_path: Path, archive: Path) -> None:
    builds = [Build(later(1)), Build(later(2))]
    write_images(tmp_path / "others.tar", archive, builds)
    ((config, ours),) = _images(archive).values()
    others = _images(tmp_path / "others.tar")
    assert set(others) == {f"localhost/edge-llm:{one.version}" for one in builds}
    for build in builds:
        theirs, layers = others[build.image]
        assert layers[:-1] == ours
        assert theirs["config"] == config["config"]
        assert theirs["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
        with tarfile.open(fileobj=io.BytesIO(layers[-1])) as members:
            assert sorted(members.getnames()) == [
                f"{_SITE}/__init__.py",
                f"{_SITE}/__pycache__/.wh.__init__.cpython-311.pyc",  # else Python would believe the old one
            ]
            source = members.extractfile(f"{_SITE}/__init__.py")
            assert source is not None
            assert source.read() == f'__version__ = "{build.version}"\n'.encode()


def test_an_image_of_another_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "old.tar"
    oci.write_image(path, "localhost/edge-llm:old", {f"{_SITE}/__init__.py": b'__version__ = "0.0.1"\n'}, ["/else"])
    with pytest.raises(Broken, match="make image"):
        write_images(tmp_path / "others.tar", path, [Build(later(1))])


def test_its_checkout_gives_the_same_objects_of_its_version_and_settings(tmp_path: Path) -> None:
    build = Build(later(1), {"EDGE_LLM_WORKER_K_TYPE": "q8_0"})
    items = rendered(checkout(tmp_path, build, 2))
    assert {one["image"] for workload in workloads(items) for one in containers_of(workload)} == {build.image}
    for workload in workloads(items):
        assert workload["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/version"] == build.version
    assert named(items, "StatefulSet", "edge-llm-decode")["spec"]["replicas"] == 2
    settings = named(items, "ConfigMap", "edge-llm-worker")["data"]
    assert settings["EDGE_LLM_WORKER_K_TYPE"] == "q8_0"
    before = rendered(checkout(tmp_path / "ours", Build(edge_llm.__version__), 2))
    assert [item["kind"] for item in items] == [item["kind"] for item in before]
    assert of_kind(items, "NetworkPolicy", "Service", "Role") != []


def test_a_setting_that_no_checkout_has_is_a_mistake_and_said(tmp_path: Path) -> None:
    with pytest.raises(Broken, match="EDGE_LLM_WORKER_NO_SUCH"):
        checkout(tmp_path, Build(later(1), {"EDGE_LLM_WORKER_NO_SUCH": "1"}), 1)
