"""A llama.cpp compiled for another CPU is refused with words, before it is loaded."""

from __future__ import annotations

import json
import platform
import struct
from pathlib import Path

import pytest

from edge_llm.engine.cpu import NEEDS, check_cpu, refusal
from edge_llm.errors import ConfigError
from edge_llm.image.wheel import BASELINES, NEEDS_CPU
from edge_llm.machine import cpu_features

NEEDED: dict[str, object] = {
    "machine": "aarch64",
    "features": ["asimd", "asimddp"],
    "boards": "boards with dotprod",
    "flags": [],
}


def package(folder: Path, **needs: object) -> Path:
    (folder / "lib").mkdir()
    (folder / NEEDS).write_text(json.dumps(NEEDED | needs))
    return folder


def test_a_board_with_everything_may_go_on() -> None:
    assert refusal(NEEDED, "aarch64", {"asimd", "asimddp", "fphp"}) is None


def test_a_raspberry_pi_4_is_told_what_it_lacks_and_what_to_do() -> None:
    found = refusal(NEEDED, "aarch64", {"asimd"})
    assert found is not None
    assert "this CPU has no asimddp" in found
    assert "make up" in found


def test_a_library_for_another_architecture_is_refused() -> None:
    found = refusal(NEEDED, "x86_64", {"avx2"})
    assert found is not None
    assert "this is a x86_64" in found


def test_a_wheel_that_was_compiled_for_this_cpu_is_not_asked(tmp_path: Path) -> None:
    check_cpu(tmp_path)


def test_the_wheels_file_and_the_boards_are_compared(tmp_path: Path) -> None:
    (tmp_path / "root/proc").mkdir(parents=True)
    (tmp_path / "root/proc/cpuinfo").write_text("flags\t\t: fpu avx\n" if platform.machine() == "x86_64" else "")
    (tmp_path / "llama_cpp").mkdir()
    folder = package(tmp_path / "llama_cpp", machine=platform.machine(), features=["no-such-feature"])
    with pytest.raises(ConfigError, match="no-such-feature"):
        check_cpu(folder, tmp_path / "root")


def test_this_machine_has_its_own_architectures_first_feature(tmp_path: Path) -> None:
    first = {"x86_64": "fpu", "aarch64": "asimd"}[platform.machine()]
    check_cpu(package(tmp_path, machine=platform.machine(), features=[first]))


def test_who_writes_the_file_and_who_reads_it_agree_on_its_place() -> None:
    assert f"llama_cpp/{NEEDS}" == NEEDS_CPU
    assert all(baseline.features for baseline in BASELINES.values())


def arm_board(root: Path, hwcap: int) -> Path:
    """An emulated board: its own bits, and the /proc/cpuinfo of the host that emulates it."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/auxv").write_bytes(struct.pack("@LLLLLL", 6, 4096, 16, hwcap, 0, 0))
    (root / "proc/cpuinfo").write_text("flags\t\t: fpu avx2\n")
    return root


def test_on_arm_the_processs_own_bits_count_not_the_emulating_hosts_list(tmp_path: Path) -> None:
    features = cpu_features(arm_board(tmp_path, 1 << 1 | 1 << 10 | 1 << 20), "aarch64")
    assert features == {"asimd", "asimdhp", "asimddp"}


def test_every_feature_that_an_arm_image_needs_has_a_known_bit(tmp_path: Path) -> None:
    assert set(BASELINES["arm64"].features) <= cpu_features(arm_board(tmp_path, (1 << 32) - 1), "aarch64")


def test_without_those_bits_the_kernels_list_counts(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd asimddp\n")
    assert cpu_features(tmp_path, "aarch64") == {"fp", "asimd", "asimddp"}
