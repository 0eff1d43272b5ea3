"""llama-cpp-python for boards other than this one: compiled for a named baseline, cross-compiled where they differ.

Owns the baselines (which instructions a wheel may use), the cross compile and the finished wheel: right platform tag,
no second copy of anything, and `llama_cpp/lib/needs_cpu.json`, which engine/cpu.py reads before the library is loaded.
Refuses to know images. Runs in the image's build stage with the standard library and bootstrap.py only.

Invariants: a wheel in the cache is whole (one rename); the same inputs give the same bytes (a fixed build folder, one
date for every member); the flags that exactness depends on are bootstrap's own.

2026-11-28, why a baseline and no run-time choice: llama.cpp can build one CPU library per generation and take the
best one at start (GGML_CPU_ALL_VARIANTS). Then two boards with the same image could compute with different kernels,
and the choice would include AMX, which crashes (bootstrap.FLAGS). One baseline makes one exactness class per
architecture. x86-64-v3 without AVX-512 is every Intel since Haswell and every AMD since Zen; ARMv8.2 with dotprod and
fp16 is the Raspberry Pi 5 (Cortex-A76). A Raspberry Pi 4 has no dotprod: it is refused, with a message.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_llm import bootstrap

NEEDS_CPU: Final = "llama_cpp/lib/needs_cpu.json"
# What is installed twice: the package loads llama_cpp/lib alone.
_UNUSED: Final = ("lib/", "lib64/", "include/", "bin/", "share/")
_DATE: Final = (1980, 1, 1, 0, 0, 0)
_FOLDER: Final = Path("/tmp/edge-llm-wheel")  # asserts carry their file's path into the library


@dataclass(frozen=True, slots=True)
class Baseline:
    """One architecture's oldest CPU. `machine` is uname's word, `features` are named as the kernel names them."""

    machine: str
    triplet: str
    flags: tuple[str, ...]
    features: tuple[str, ...]
    boards: str


BASELINES: Final[Mapping[str, Baseline]] = {
    "amd64": Baseline(
        machine="x86_64",
        triplet="x86_64-linux-gnu",
        flags=(
            *(f"-DGGML_{name}=ON" for name in ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C")),
            *(f"-DGGML_{name}=OFF" for name in ("AVX_VNNI", "AVX512", "AVX512_VNNI", "AVX512_BF16", "AVX512_VBMI")),
            "-DGGML_AMX_TILE=OFF",
        ),
        features=("sse4_2", "avx", "avx2", "bmi2", "fma", "f16c"),
        boards="x86-64-v3: Intel since Haswell, AMD since Zen",
    ),
    "arm64": Baseline(
        machine="aarch64",
        triplet="aarch64-linux-gnu",
        flags=("-DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod+fp16",),
        features=("asimd", "asimddp", "asimdhp", "fphp"),
        boards="ARMv8.2 with dotprod and fp16: Raspberry Pi 5, Cortex-A76 and newer",
    ),
}


def architecture_of(machine: str) -> str:
    """`amd64` or `arm64` for uname's word. Raises SetupError."""
    for name, baseline in BASELINES.items():
        if baseline.machine == machine:
            return name
    raise bootstrap.SetupError(f"no image for {machine}: there are {', '.join(BASELINES)}")


def flags(architecture: str) -> tuple[str, ...]:
    """CMake's: bootstrap's own but for those that compile for the CPU at hand."""
    kept = tuple(flag for flag in bootstrap.FLAGS if not flag.startswith(("-DGGML_NATIVE", "-DCMAKE_C")))
    return (*kept, "-DGGML_NATIVE=OFF", *BASELINES[architecture].flags)


def toolchain(baseline: Baseline) -> str:
    """A CMake toolchain file for Debian's cross compilers."""
    root = f"/usr/{baseline.triplet}"
    return "\n".join(
        (
            "set(CMAKE_SYSTEM_NAME Linux)",
            f"set(CMAKE_SYSTEM_PROCESSOR {baseline.machine})",
            f"set(CMAKE_C_COMPILER {baseline.triplet}-gcc)",
            f"set(CMAKE_CXX_COMPILER {baseline.triplet}-g++)",
            f"set(CMAKE_FIND_ROOT_PATH {root})",
            "set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)",
            "set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)",
            "set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)",
            "",
        )
    )


def compilers(baseline: Baseline, machine: str) -> tuple[str, str]:
    """C and C++ compiler for `baseline` on a `machine`."""
    return ("gcc", "g++") if machine == baseline.machine else (f"{baseline.triplet}-gcc", f"{baseline.triplet}-g++")


def cache_key(version: str, given: Sequence[str], compiler: str) -> str:
    """Everything a wheel depends on."""
    return f"{version}-{hashlib.sha256(repr((tuple(given), compiler)).encode()).hexdigest()[:16]}"


# --- the finished wheel -------------------------------------------------------------------------------------------


def finish(built: Path, folder: Path, architecture: str, given: Sequence[str]) -> Path:
    """`built` as a wheel for `architecture` in `folder`; how it was built is written inside."""
    baseline = BASELINES[architecture]
    tag = f"py3-none-linux_{baseline.machine}"
    name, version, *_ = built.name.split("-")
    target = folder / f"{name}-{version}-{tag}.whl"
    needs = {"machine": baseline.machine, "features": baseline.features, "boards": baseline.boards, "flags": given}
    with zipfile.ZipFile(built) as source:
        members = dict(_members(source, tag, f"{name}-{version}.dist-info"))
    members[NEEDS_CPU] = (json.dumps(needs, indent=1) + "\n").encode()
    record = f"{name}-{version}.dist-info/RECORD"
    lines = [f"{path},sha256={_digest(content)},{len(content)}" for path, content in sorted(members.items())]
    members[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    part = target.with_suffix(".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as wheel:
        for path, content in sorted(members.items()):
            entry = zipfile.ZipInfo(path, _DATE)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            wheel.writestr(entry, content)
    part.replace(target)
    return target


def _members(source: zipfile.ZipFile, tag: str, info: str) -> Iterator[tuple[str, bytes]]:
    """What is kept, with the platform tag corrected. RECORD is made anew."""
    for path in source.namelist():
        if path.startswith(_UNUSED) or path.endswith("/") or path == f"{info}/RECORD":
            continue
        content = source.read(path)
        if path == f"{info}/WHEEL":
            kept = [line for line in content.decode().splitlines() if line and not line.startswith("Tag:")]
            content = "\n".join([*kept, f"Tag: {tag}", ""]).encode()
        yield path, content


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


# --- compiling ----------------------------------------------------------------------------------------------------


def build(architecture: str, lock: str, python: str, cache: Path) -> Path:
    """The wheel from the cache, or compiled now by `python`'s pip (which has scikit-build-core, cmake and ninja)."""
    baseline, given = BASELINES[architecture], flags(architecture)
    machine = os.uname().machine
    c, cxx = compilers(baseline, machine)
    said = subprocess.run([cxx, "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout
    compiler = said.partition("\n")[0]
    pinned = bootstrap.only(bootstrap.PACKAGE, lock)
    version = pinned.partition("==")[2].split()[0]
    kept = cache / f"{architecture}-{cache_key(version, given, compiler)}"
    for found in kept.glob("*.whl"):
        return found
    shutil.rmtree(_FOLDER, ignore_errors=True)
    source = _source(pinned, python)
    arguments = list(given)
    if machine != baseline.machine:
        (_FOLDER / "toolchain.cmake").write_text(toolchain(baseline))
        arguments.append(f"-DCMAKE_TOOLCHAIN_FILE={_FOLDER}/toolchain.cmake")
    count = bootstrap.jobs(bootstrap.free_memory(Path("/")), len(os.sched_getaffinity(0)))
    words = {"CMAKE_ARGS": " ".join(arguments), "CC": c, "CXX": cxx, "CMAKE_BUILD_PARALLEL_LEVEL": count}
    command = ["env", *(f"{name}={value}" for name, value in words.items()), "SOURCE_DATE_EPOCH=315532800"]
    command += [python, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    command += [f"--config-settings=build-dir={_FOLDER}/build", "--wheel-dir", str(_FOLDER), str(source)]
    subprocess.run(command, check=True)
    (built,) = _FOLDER.glob("*.whl")
    kept.mkdir(parents=True, exist_ok=True)
    return finish(built, kept, architecture, given)


def _source(pinned: str, python: str) -> Path:
    """The published source, whose hash the lock holds, unpacked."""
    _FOLDER.mkdir(parents=True)
    wanted = _FOLDER / "source.txt"
    wanted.write_text(pinned)
    command = [python, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    command += ["--require-hashes", "--no-binary", bootstrap.PACKAGE, "--dest", str(_FOLDER)]
    subprocess.run([*command, "--requirement", str(wanted)], check=True)
    (archive,) = _FOLDER.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(_FOLDER / "source")  # no filter before Python 3.12; the lock's hash was checked
    (folder,) = (_FOLDER / "source").iterdir()
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile llama-cpp-python for an image.")
    parser.add_argument("--arch", choices=BASELINES, default=None)
    parser.add_argument("--lock", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="the folder that gets the wheel")
    options = parser.parse_args(argv)
    try:
        architecture = options.arch or architecture_of(os.uname().machine)
        wheel = build(architecture, options.lock.read_text(), sys.executable, options.cache)
    except bootstrap.SetupError as error:
        sys.stderr.write(f"edge-llm: {error}\n")
        return 1
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"edge-llm: compiling failed, its output is above: {' '.join(map(str, error.cmd))}\n")
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    shutil.copy(wheel, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
