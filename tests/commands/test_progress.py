"""Progress where no terminal is: few lines, and no total that nobody knows."""

from __future__ import annotations

import pytest

from edge_llm.commands.progress import progress

MIB = 1 << 20


def lines(capsys: pytest.CaptureFixture[str], steps: list[tuple[int, int | None]], *, is_bytes: bool) -> list[str]:
    with progress("m.gguf", is_bytes=is_bytes) as report:
        for done, total in steps:
            report(done, total)
    return capsys.readouterr().err.splitlines()


def test_a_line_at_the_start_and_at_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    said = lines(capsys, [(n * MIB, 100 * MIB) for n in range(101)], is_bytes=True)
    assert said[:2] == ["m.gguf: 0 of 100 MiB", "m.gguf: 10 of 100 MiB"]
    assert len(said) == 11


def test_without_a_total_only_what_is_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    said = lines(capsys, [(n * MIB // 2, None) for n in range(200)], is_bytes=True)
    assert said == [f"m.gguf: {n} MiB" for n in (0, 1, 2, 4, 8, 16, 32, 64)]


def test_things_have_no_unit(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(capsys, [(0, 4), (1, 4), (4, 4)], is_bytes=False) == [f"m.gguf: {n} of 4" for n in (0, 1, 4)]
