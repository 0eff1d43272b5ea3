"""llama.cpp's own tools in the cache: a tree is there with all of them or counts as absent, and lost ones are added."""

from __future__ import annotations

import os
import tarfile
from io import BytesIO
from pathlib import Path

import msgspec
import pytest

from edge_llm.bench.reference_tools import (
    TOOLS,
    Manifest,
    ReferenceToolsError,
    ToolTree,
    added,
    find,
    jobs,
    lacking,
    package_version,
    require,
    step_of,
    tree_folder,
    unpack,
)
from edge_llm.machine import cpu_kind

MANIFEST = Manifest("llama-cpp-python 0", "ours", ("-DA=1",), "c++", "cpu")


def a_program(path: Path, text: str = "true") -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def a_tree(root: Path, tools: tuple[str, ...] = TOOLS) -> Path:
    folder = tree_folder("ours", package_version(), cpu_kind(), root)
    folder.mkdir(parents=True)
    for name in tools:
        a_program(folder / name)
    (folder / "libllama.so").write_text("a library")
    (folder / "manifest.json").write_bytes(msgspec.json.encode(MANIFEST))
    return folder


def test_a_tree_with_all_tools_is_found(tmp_path: Path) -> None:
    assert find("ours", tmp_path) is None
    folder = a_tree(tmp_path)
    assert find("ours", tmp_path) == ToolTree(folder, MANIFEST)


def test_a_tree_that_lacks_a_tool_is_not_built_and_the_error_says_what_to_do(tmp_path: Path) -> None:
    folder = a_tree(tmp_path, TOOLS[:-1])
    assert lacking(folder) == [TOOLS[-1]]
    assert find("ours", tmp_path) is None
    with pytest.raises(ReferenceToolsError, match="reference-tools"):
        require("ours", tmp_path)


def test_a_tool_that_cannot_be_run_is_lacking(tmp_path: Path) -> None:
    folder = a_tree(tmp_path)
    (folder / TOOLS[0]).chmod(0o644)
    assert lacking(folder) == [TOOLS[0]]


def with_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: str) -> dict[str, str]:
    """Programs that stand for cmake and make; the folder of programs is all that PATH has."""
    programs = tmp_path / "programs"
    programs.mkdir()
    a_program(programs / "cmake", 'while [ "$1" != -B ]; do shift; done; /bin/mkdir -p "$2"')
    if make:
        a_program(programs / "make", make)
    monkeypatch.setenv("PATH", str(programs))
    return {"cmake": str(programs / "cmake")}


def test_a_missing_tool_is_built_alone_beside_the_libraries_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ToolTree(a_tree(tmp_path / "cache", TOOLS[:-1]), MANIFEST)
    make = (
        f'echo "$@" > {tmp_path}/asked; [ -f "$2/bin/libllama.so" ] && /bin/cp "$2/bin/{TOOLS[0]}" "$2/bin/{TOOLS[-1]}"'
    )
    tools = with_make(tmp_path, monkeypatch, make)
    built = added(kept, tmp_path / "source", tmp_path / "ours", tools, lambda what, done, total: None)
    assert built is not None
    assert lacking(built) == []
    asked = (tmp_path / "asked").read_text()
    assert f"{TOOLS[-1]}/fast" in asked
    assert f"{TOOLS[0]}/fast" not in asked
    assert lacking(kept.folder) == [TOOLS[-1]]  # the tree in the cache is replaced by one rename, later


@pytest.mark.parametrize("make", ["", "exit 2"])
def test_what_cannot_be_added_is_built_whole(make: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ToolTree(a_tree(tmp_path / "cache", TOOLS[:-1]), MANIFEST)
    tools = with_make(tmp_path, monkeypatch, make)
    assert added(kept, tmp_path / "source", tmp_path / "ours", tools, lambda what, done, total: None) is None


def test_another_build_has_another_folder(tmp_path: Path) -> None:
    folders = {
        tree_folder("ours", "1", "x86_64/a", tmp_path).parent,
        tree_folder("default", "1", "x86_64/a", tmp_path).parent,
        tree_folder("ours", "2", "x86_64/a", tmp_path).parent,
        tree_folder("ours", "1", "x86_64/b", tmp_path).parent,
    }
    assert len(folders) == 4
    assert all(os.sep not in folder.name for folder in folders)


def test_only_files_of_llama_cpp_leave_an_archive(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as bundle:
        for name in ("p/vendor/llama.cpp/src/a.cpp", "p/other.txt", "p/vendor/llama.cpp/../../../out.txt"):
            member = tarfile.TarInfo(name)
            member.size = 1
            bundle.addfile(member, BytesIO(b"x"))
        link = tarfile.TarInfo("p/vendor/llama.cpp/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        bundle.addfile(link)
    assert unpack(archive, tmp_path / "to") == 1
    assert [path.name for path in (tmp_path / "to").rglob("*") if path.is_file()] == ["a.cpp"]
    assert not (tmp_path / "out.txt").exists()


def test_memory_and_cores_bound_the_jobs() -> None:
    assert jobs(4_000_000_000, 2) == 2
    assert jobs(900_000_000, 4) == 1
    assert jobs(0, 4) == 1


def test_ninjas_steps_are_progress() -> None:
    assert step_of("[3/120] Building CXX object") == (3, 120)
    assert step_of("ninja: error") is None
