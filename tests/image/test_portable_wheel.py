"""Wheels for other boards: which flags, which name, and what is inside."""

from __future__ import annotations

import base64
import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from edge_llm import bootstrap
from edge_llm.image.wheel import (
    BASELINES,
    NEEDS_CPU,
    architecture_of,
    cache_key,
    compilers,
    finish,
    flags,
    toolchain,
)

INFO = "llama_cpp_python-0.3.36.dist-info"


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """What a cross compile on x86-64 leaves: the wrong tag, and everything twice."""
    path = tmp_path / "llama_cpp_python-0.3.36-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("llama_cpp/__init__.py", "")
        wheel.writestr("llama_cpp/lib/libllama.so", b"\x7fELF library")
        wheel.writestr("lib/libllama.so", b"\x7fELF library")
        wheel.writestr("include/llama.h", "")
        wheel.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-linux_x86_64\n\n")
        wheel.writestr(f"{INFO}/RECORD", "stale,,\n")
    return path


@pytest.mark.parametrize("architecture", BASELINES)
def test_what_exactness_depends_on_is_the_same_as_at_home(architecture: str) -> None:
    found = flags(architecture)
    assert "-DGGML_LLAMAFILE=OFF" in found
    assert {flag for flag in bootstrap.FLAGS if flag.startswith("-DLLAMA_BUILD")} <= set(found)


@pytest.mark.parametrize("architecture", BASELINES)
def test_nothing_is_compiled_for_the_building_machine(architecture: str) -> None:
    found = flags(architecture)
    assert "-DGGML_NATIVE=OFF" in found
    assert "-DGGML_NATIVE=ON" not in found


def test_the_pi_5_gets_dotprod_and_fp16() -> None:
    assert "-DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod+fp16" in flags("arm64")


def test_an_x86_image_uses_no_instruction_beyond_v3() -> None:
    found = flags("amd64")
    assert "-DGGML_AVX512=OFF" in found
    assert not [flag for flag in found if flag.endswith("=ON") and ("512" in flag or "AMX" in flag or "VNNI" in flag)]


def test_a_baseline_names_the_features_that_its_flags_use() -> None:
    assert {"asimddp", "asimdhp", "fphp"} <= set(BASELINES["arm64"].features)
    assert {"avx2", "fma", "f16c", "bmi2"} <= set(BASELINES["amd64"].features)


def test_a_machine_without_a_baseline_is_refused() -> None:
    assert architecture_of("aarch64") == "arm64"
    with pytest.raises(bootstrap.SetupError, match="riscv64"):
        architecture_of("riscv64")


def test_a_pi_compiles_for_itself_with_its_own_compiler() -> None:
    assert compilers(BASELINES["arm64"], "aarch64") == ("gcc", "g++")
    assert compilers(BASELINES["arm64"], "x86_64") == ("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++")


def test_the_toolchain_names_the_target_and_never_runs_its_programs() -> None:
    text = toolchain(BASELINES["arm64"])
    assert "set(CMAKE_SYSTEM_PROCESSOR aarch64)" in text
    assert "MODE_PROGRAM NEVER" in text


def test_flags_and_compiler_are_part_of_the_caches_key() -> None:
    keys = {cache_key("0.3.36", flags("arm64"), "g++ 12"), cache_key("0.3.36", flags("arm64"), "g++ 13")}
    keys.add(cache_key("0.3.36", flags("amd64"), "g++ 12"))
    assert len(keys) == 3


def test_a_finished_wheel_is_tagged_for_its_target_in_name_and_content(built: Path, tmp_path: Path) -> None:
    found = finish(built, tmp_path, "arm64", flags("arm64"))
    assert found.name == "llama_cpp_python-0.3.36-py3-none-linux_aarch64.whl"
    with zipfile.ZipFile(found) as wheel:
        lines = wheel.read(f"{INFO}/WHEEL").decode().splitlines()
    assert [line for line in lines if line.startswith("Tag:")] == ["Tag: py3-none-linux_aarch64"]
    assert "Root-Is-Purelib: false" in lines


def test_a_finished_wheel_holds_nothing_twice_and_says_what_cpu_it_needs(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(finish(built, tmp_path, "arm64", ("-DX=1",))) as wheel:
        names = wheel.namelist()
        needs = json.loads(wheel.read(NEEDS_CPU))
    assert "llama_cpp/lib/libllama.so" in names
    assert not [name for name in names if name.startswith(("lib/", "include/"))]
    assert needs["machine"] == "aarch64"
    assert needs["features"] == list(BASELINES["arm64"].features)
    assert needs["flags"] == ["-DX=1"]


def test_the_record_of_a_finished_wheel_is_right(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(finish(built, tmp_path, "arm64", ())) as wheel:
        record = dict(line.split(",", 1) for line in wheel.read(f"{INFO}/RECORD").decode().splitlines())
        assert record.keys() == set(wheel.namelist())
        content = wheel.read(NEEDS_CPU)
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    assert record[NEEDS_CPU] == f"sha256={digest},{len(content)}"


def test_the_same_build_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    first = finish(built, tmp_path, "arm64", ()).read_bytes()
    assert finish(built, tmp_path, "arm64", ()).read_bytes() == first
