"""What goes into an image's environment, and what is made of it there."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from edge_llm import bootstrap
from edge_llm.image.assemble import Places, faults, installed, merge, missing, needed, platforms, prune
from tests.image.headers import AARCH64, LOAD, elf

ROOT = Path(__file__).parent.parent.parent
PROJECT = {"project": {"name": "edge-llm", "optional-dependencies": {"setup": ["hatchling==1.31.0", "editables>=0.5"]}}}
LOCK = """\
click==8.5.1 \\
    --hash=sha256:11
    # via
    #   edge-llm (pyproject.toml)
    #   uvicorn
hatchling==1.31.0 \\
    --hash=sha256:22
    # via edge-llm (pyproject.toml)
llama-cpp-python==0.3.36 \\
    --hash=sha256:33
    # via edge-llm (pyproject.toml)
pluggy==1.7.0 \\
    --hash=sha256:44
    # via hatchling
diskcache==5.6.3 \\
    --hash=sha256:55
    # via llama-cpp-python
uvicorn==0.54.0 ; sys_platform != 'win32' \\
    --hash=sha256:66
    # via edge-llm (pyproject.toml)
h11==0.16.0 \\
    --hash=sha256:77
    # via uvicorn
numpy==2.4.6 ; python_full_version < '3.12' \\
    --hash=sha256:88
    # via edge-llm (pyproject.toml)
numpy==2.5.5 ; python_full_version >= '3.12' \\
    --hash=sha256:99
    # via edge-llm (pyproject.toml)
"""


def names(text: str) -> list[str]:
    return [entry.partition("==")[0] for entry in bootstrap.requirements(text)]


def test_what_only_building_needs_stays_out_with_all_that_it_brings() -> None:
    assert names(needed(LOCK, PROJECT)) == ["click", "diskcache", "h11", "numpy", "numpy", "uvicorn"]


def test_entries_keep_their_hashes() -> None:
    assert needed(LOCK, PROJECT).count("--hash=sha256:") == 6


def test_the_projects_own_lock_gives_what_its_dependencies_say() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = set(names(needed((ROOT / "requirements.lock").read_text(), project)))
    assert {"fastapi", "kubernetes", "numpy", "pydantic-core", "h11"} <= found
    assert not {"hatchling", "editables", "trove-classifiers", bootstrap.PACKAGE} & found


def test_wheels_for_a_newer_glibc_than_the_images_are_not_taken() -> None:
    found = platforms("aarch64", 36)
    assert found[0] == "manylinux_2_36_aarch64"
    assert {"manylinux_2_17_aarch64", "manylinux2014_aarch64", "linux_aarch64"} <= set(found)
    assert "manylinux_2_37_aarch64" not in found
    assert not [name for name in found if "x86_64" in name]


def test_equal_files_become_links_to_one(tmp_path: Path) -> None:
    for name in ("libggml.so", "libggml.so.0", "libggml.so.0.25.3"):
        (tmp_path / name).write_bytes(b"same")
    (tmp_path / "libllama.so").write_bytes(b"other")
    assert merge(tmp_path) == 8
    assert (tmp_path / "libggml.so").readlink() == Path("libggml.so.0.25.3")
    assert (tmp_path / "libggml.so.0").read_bytes() == b"same"
    assert not (tmp_path / "libllama.so").is_symlink()


@pytest.fixture
def places(tmp_path: Path) -> Places:
    found = Places(tmp_path, tmp_path / "wheels", tmp_path / "runtime", tmp_path / "root")
    for path in ("bin/python3", "bin/pip", "bin/activate"):
        (found.root / path).parent.mkdir(parents=True, exist_ok=True)
        (found.root / path).touch()
    for path in ("numpy/core.py", "numpy/core.pyi", "numpy/tests/test_core.py", "edge_llm/models.yaml", "bin/uvicorn"):
        (found.site / path).parent.mkdir(parents=True, exist_ok=True)
        (found.site / path).touch()
    return found


def test_tests_stubs_and_launchers_of_the_build_stage_are_dropped(places: Places) -> None:
    prune(places)
    left = {path.relative_to(places.site).as_posix() for path in places.site.rglob("*") if path.is_file()}
    assert left == {"numpy/core.py", "edge_llm/models.yaml"}
    assert sorted(path.name for path in (places.root / "bin").iterdir()) == ["edge-llm", "python3"]


def test_the_command_runs_by_the_environments_own_python(places: Places) -> None:
    prune(places)
    entry = places.root / "bin/edge-llm"
    assert entry.read_text().startswith(f"#!{places.root}/bin/python3 ")
    assert entry.stat().st_mode & 0o111


def test_a_library_that_a_pi_5_cannot_load_is_found_by_name(places: Places) -> None:
    (places.site / "numpy/fine.so").write_bytes(elf((LOAD, 65536), machine=AARCH64))
    (places.site / "numpy/small.so").write_bytes(elf((LOAD, 4096), machine=AARCH64))
    (found,) = faults(places.root, "aarch64")
    assert "numpy/small.so has segments aligned to 4096" in found


def test_a_package_that_another_requires_in_any_case_must_be_there(places: Places) -> None:
    for name, requires in {"a_b": "c.d>=1", "e": 'f; extra == "x"'}.items():
        info = places.site / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\nRequires-Dist: {requires}\n")
    assert missing(places.site) == ["c.d, which a_b requires"]


def test_our_build_of_llama_cpp_is_described_with_its_flags(places: Places) -> None:
    info = places.site / "llama_cpp_python-0.3.36.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.36\nLicense: MIT\n")
    needs = places.site / "llama_cpp/lib/needs_cpu.json"
    needs.parent.mkdir(parents=True)
    needs.write_text('{"flags": ["-DA=1", "-DB=2"], "boards": "all"}')
    (found,) = installed(places.site, {"llama-cpp-python": "ab"})
    assert (found.version, found.licence, found.sha256) == ("0.3.36", "MIT", "ab")
    assert ("edge-llm:cmake-flags", "-DA=1 -DB=2") in found.properties
    (found,) = installed(places.site, {"source of llama-cpp-python": "cd"})
    assert ("edge-llm:source-sha256", "cd") in found.properties
