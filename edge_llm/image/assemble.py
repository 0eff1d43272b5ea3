"""The environment that an image carries, put together in its build stage: /opt/edge-llm, and nothing else.

Owns which packages go in, how they are installed for another architecture without running its code, what is dropped,
and the checks before it leaves the stage. Refuses to know compilers (wheel.py) and images (build.py). Runs with the
build stage's Python and the standard library only.

Invariants: every file that pip brings is checked against the lock's hashes; byte code is valid by content, not by
date, and made here, because the image's root is read-only; two runs give the same files; one file on disk per library,
so that nothing is loaded twice under two names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any, Final

from edge_llm import bootstrap
from edge_llm.image.elf import problem
from edge_llm.image.sbom import Installed, Subject, bill, canonical, debian_packages, debian_release, hashes_of
from edge_llm.image.wheel import BASELINES, NEEDS_CPU

SBOM: Final = "sbom.cdx.json"
_ENTRY: Final = "#!{python} -P\nfrom edge_llm.cli import main\n\nmain()\n"
_OLDEST_GLIBC: Final = 17  # manylinux2014 is glibc 2.17
_SOURCE: Final = f"source of {bootstrap.PACKAGE}"
_LICENCE_FIELDS: Final = ("License-Expression", "License")
_TESTS: Final = ("numpy", "kubernetes", "onnxruntime")  # packages that install their tests with them


@dataclass(frozen=True, slots=True)
class Places:
    """Folders of the build stage."""

    source: Path
    wheels: Path
    runtime: Path
    root: Path

    @property
    def site(self) -> Path:
        return self.root / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"


# --- what goes in -------------------------------------------------------------------------------------------------


def needed(lock: str, pyproject: dict[str, Any]) -> str:
    """The lock's entries without those that only building this project needs, and without the one that we compile.

    uv writes under each entry who asked for it; an entry is needed when somebody needed asked for it."""
    project = pyproject["project"]
    setup = {canonical(_name(line)) for line in project["optional-dependencies"]["setup"]}
    itself = f"{project['name']} (pyproject.toml)"
    entries: dict[str, list[str]] = {}  # one package may have an entry for each of several Pythons
    for entry in bootstrap.requirements(lock):
        entries.setdefault(canonical(_name(entry)), []).append(entry)
    askers = {name: {asker for entry in found for asker in _askers(entry)} for name, found in entries.items()}
    kept = {name for name, asked in askers.items() if itself in asked and name not in setup}
    while more := {name for name, asked in askers.items() if name not in kept and asked & kept}:
        kept |= more
    return "\n".join(entry for name in sorted(kept - {bootstrap.PACKAGE}) for entry in entries[name]) + "\n"


def _name(requirement: str) -> str:
    return re.split(r"[=<>!~;\[\s]", requirement, maxsplit=1)[0]


def _askers(entry: str) -> Iterator[str]:
    """`# via a` on one line, or `# via` and a line for each."""
    _, _, after = entry.partition("# via")
    for line in after.splitlines():
        word = line.strip().lstrip("#").strip()
        if word:
            yield word if word.endswith("(pyproject.toml)") else canonical(word)


def platforms(machine: str, glibc: int) -> list[str]:
    """Wheel platforms that a Debian with glibc 2.`glibc` runs, newest first, and the plain one of our own wheel."""
    numbered = [f"manylinux_2_{minor}_{machine}" for minor in range(glibc, _OLDEST_GLIBC - 1, -1)]
    return [*numbered, f"manylinux2014_{machine}", f"linux_{machine}"]


# --- installing ---------------------------------------------------------------------------------------------------


def install(places: Places, machine: str) -> dict[str, str]:
    """Everything into the environment; SHA-256 by package name of the files that came from an index, and of the source
    that was compiled."""
    subprocess.run(["/usr/bin/env", "python3", "-m", "venv", "--clear", str(places.root)], check=True, env=_plain())
    _pip(places, "uninstall", "--yes", "--quiet", "setuptools")  # of Debian's ensurepip; pip stays: it fetches models
    lock = (places.source / bootstrap.LOCKS[False]).read_text()
    wanted, report = places.wheels / "packages.txt", places.wheels / "report.json"
    wanted.write_text(needed(lock, tomllib.loads((places.source / "pyproject.toml").read_text())))
    words = [f"--platform={name}" for name in platforms(machine, _glibc())]
    target = ["install", "--no-deps", "--no-compile", "--only-binary=:all:", "--target", str(places.site), *words]
    build = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    from_index = ["--no-cache-dir", "--require-hashes", "--report", str(report), "--requirement", str(wanted)]
    subprocess.run([*build, *target, *from_index], check=True)
    ours = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(places.wheels)]
    subprocess.run([*build, *ours, str(places.source)], check=True)
    subprocess.run([*build, *target, "--no-index", *map(str, sorted(places.wheels.glob("*.whl")))], check=True)
    compiled = re.findall(r"--hash=sha256:(\w+)", bootstrap.only(bootstrap.PACKAGE, lock))  # one: its source
    return hashes_of(json.loads(report.read_text())) | {_SOURCE: " ".join(compiled)}


def _pip(places: Places, *words: str) -> None:
    subprocess.run([str(places.root / "bin/python3"), "-m", "pip", *words], check=True)


def _plain() -> dict[str, str]:
    """Without the build environment in front: the image's `python3` is the system's."""
    return {"PATH": "/usr/local/bin:/usr/bin:/bin"}


def _glibc() -> int:
    """Minor version of this stage's glibc; the image's last stage is of the same Debian release."""
    return int((os.confstr("CS_GNU_LIBC_VERSION") or "glibc 2.36").rpartition(".")[2])


# --- making it small and the same each time -----------------------------------------------------------------------


def prune(places: Places) -> None:
    """Without what nobody runs: pip's own launchers, activation scripts, tests, type stubs and headers."""
    for name in ("include", "lib64", "share"):
        _remove(places.root / name)
    for script in (places.root / "bin").iterdir():
        if not re.fullmatch(r"python3?", script.name):
            _remove(script)
    for path in [*places.site.glob("*.pyi"), *places.site.rglob("*.pyi"), *places.site.rglob("*.a")]:
        _remove(path)
    for package in _TESTS:
        for path in list((places.site / package).rglob("tests")):
            _remove(path)
    _remove(places.site / "numpy/_core/include")
    _remove(places.site / "bin")  # launchers of packages, whose first line names the build stage's Python
    entry = places.root / "bin/edge-llm"
    entry.write_text(_ENTRY.format(python=places.root / "bin/python3"))
    entry.chmod(0o755)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def merge(folder: Path) -> int:
    """Equal files of one folder become links to the one with the longest name; the bytes saved. Wheels hold no links,
    so a library is in them under each of its names, and would be loaded under each."""
    saved, kept = 0, dict[str, Path]()
    files = [path for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
    for path in sorted(files, key=lambda path: (-len(path.name), path.name)):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        first = kept.setdefault(digest, path)
        if first is not path:
            saved += path.stat().st_size
            path.unlink()
            path.symlink_to(first.name)
    return saved


def compile_all(places: Places) -> None:
    """Byte code that is valid whatever dates files get in a layer; one job, because the order is part of the bytes."""
    for folder in list(places.root.rglob("__pycache__")):
        shutil.rmtree(folder)
    command = ["env", "PYTHONHASHSEED=0", sys.executable, "-m", "compileall", "-q", "-f", "-j", "1"]
    command += ["--invalidation-mode", "unchecked-hash", str(places.site)]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL)  # templates and Python 2 in packages do not compile


# --- checking and describing --------------------------------------------------------------------------------------


def faults(root: Path, machine: str) -> list[str]:
    """Files that cannot be loaded on the image's boards."""
    found = []
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink() and (why := problem(path.read_bytes(), machine)):
            found.append(f"{path.relative_to(root)} {why}")
    return found


def missing(site: Path) -> list[str]:
    """Packages that an installed one requires in any case, and that are not there."""
    found = list(distributions(path=[str(site)]))
    names = {canonical(each.metadata["Name"]) for each in found}
    wanted = {(each.metadata["Name"], line) for each in found for line in each.requires or [] if ";" not in line}
    return sorted(f"{_name(line)}, which {who} requires" for who, line in wanted if canonical(_name(line)) not in names)


def installed(site: Path, hashes: dict[str, str]) -> list[Installed]:
    """What is in the environment. Our own build of llama.cpp says how it was compiled."""
    needs = site / NEEDS_CPU
    return [_described(found, hashes, needs) for found in distributions(path=[str(site)])]


def _described(found: Distribution, hashes: dict[str, str], needs: Path) -> Installed:
    metadata = found.metadata
    licence = next((metadata[key] for key in _LICENCE_FIELDS if key in metadata), None) or _classified(found)
    name = str(metadata["Name"])
    properties: tuple[tuple[str, str], ...] = ()
    if canonical(name) == bootstrap.PACKAGE and needs.is_file():
        built = json.loads(needs.read_text())
        properties = (("edge-llm:cmake-flags", " ".join(built["flags"])), ("edge-llm:boards", built["boards"]))
        properties += (("edge-llm:source-sha256", hashes[_SOURCE]),) if _SOURCE in hashes else ()
    short = licence if licence and "\n" not in licence and len(licence) < 120 else None
    return Installed(name, found.version, short, hashes.get(canonical(name)), properties)


def _classified(found: Distribution) -> str | None:
    words = [line.rpartition(" :: ")[2] for line in found.metadata.get_all("Classifier") or [] if "License ::" in line]
    return " and ".join(sorted(words)) or None


def describe(places: Places, subject: Subject, hashes: dict[str, str]) -> str:
    """The image's SBOM. The runtime folder holds the last stage's dpkg status and os-release."""
    status, release = (places.runtime / name for name in ("status", "os-release"))
    debian = debian_packages(status.read_text())
    return bill(subject, installed(places.site, hashes), debian, debian_release(release.read_text()))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Put together what an image carries.")
    parser.add_argument("--arch", choices=BASELINES, required=True)
    parser.add_argument("--source", type=Path, default=Path.cwd())
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--runtime", type=Path, required=True, help="status and os-release of the last stage")
    parser.add_argument("--root", type=Path, required=True)
    options = parser.parse_args(argv)
    places = Places(options.source, options.wheels, options.runtime, options.root)
    machine = BASELINES[options.arch].machine
    try:
        hashes = install(places, machine)
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"edge-llm: installing failed, its output is above: {' '.join(map(str, error.cmd))}\n")
        return 1
    prune(places)
    merge(places.site / "llama_cpp/lib")
    if found := [*faults(places.root, machine), *(f"has no {line}" for line in missing(places.site))]:
        sys.stderr.write("edge-llm: this environment would not work on the image's boards:\n  ")
        sys.stderr.write("\n  ".join(found) + "\n")
        return 1
    (version,) = (package.version for package in installed(places.site, {}) if package.name == "edge-llm")
    (places.root / SBOM).write_text(describe(places, Subject("edge-llm", version, options.arch), hashes))
    compile_all(places)
    return 0


if __name__ == "__main__":
    sys.exit(main())
