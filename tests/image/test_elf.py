"""ELF headers made by hand: what a kernel with pages of 16 KiB can load, and what it cannot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edge_llm.image.elf import Elf, problem, read_elf
from tests.image.headers import LOAD, NOTE, OBJECT_FILE, X86_64, elf


def test_the_smallest_alignment_of_the_loaded_segments_counts() -> None:
    assert read_elf(elf((LOAD, 65536), (LOAD, 4096), (NOTE, 4))) == Elf("aarch64", 4096)


def test_segments_that_are_not_loaded_do_not_count() -> None:
    assert problem(elf((LOAD, 65536), (NOTE, 4)), "aarch64") is None


def test_pages_of_4_kib_only_are_a_problem_that_says_so() -> None:
    found = problem(elf((LOAD, 4096)), "aarch64")
    assert found is not None
    assert "4096" in found
    assert "16384" in found


def test_x86_64_has_pages_of_4_kib_and_is_asked_for_no_more() -> None:
    assert problem(elf((LOAD, 4096), machine=X86_64), "x86_64") is None


@pytest.mark.parametrize("align", [16384, 65536, 1 << 21])
def test_larger_alignments_are_fine(align: int) -> None:
    assert problem(elf((LOAD, align)), "aarch64") is None


def test_a_library_of_another_architecture_is_a_problem() -> None:
    assert problem(elf((LOAD, 65536), machine=X86_64), "aarch64") == "is for x86_64, not aarch64"


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF", b"\x7fELF\x01\x01" + bytes(80)])
def test_what_is_no_64_bit_program_is_nothing_to_load(content: bytes) -> None:
    assert read_elf(content) is None
    assert problem(content, "aarch64") is None


def test_an_object_file_is_nothing_to_load() -> None:
    assert read_elf(elf((LOAD, 1), kind=OBJECT_FILE)) is None


def test_a_header_that_points_past_the_end_is_not_followed() -> None:
    assert read_elf(elf((LOAD, 4096))[:80]) is None


def test_the_running_python_is_an_elf_file_of_this_machine() -> None:
    found = read_elf(Path(sys.executable).resolve().read_bytes())
    assert found is not None
    assert found.machine in ("x86_64", "aarch64")
    assert found.align_bytes >= 4096
