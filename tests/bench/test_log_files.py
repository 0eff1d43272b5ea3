"""Files inside a log: whole and checked, or refused; everything else passes."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.bench.log_files import BadFile, LogReader, lines_of_file


def read(lines: list[str]) -> tuple[dict[str, bytes], list[str]]:
    reader = LogReader()
    passed = [text for line in lines if (text := reader.take(line)) is not None]
    reader.end()
    return reader.files, passed


@given(st.binary(max_size=20_000))
def test_what_goes_in_comes_out(data: bytes) -> None:
    files, passed = read(["before", *lines_of_file("a-1.cases.jsonl", data), "after"])
    assert files == {"a-1.cases.jsonl": data}
    assert passed == ["before", "after"]


def test_no_line_is_longer_than_what_a_container_runtime_keeps_in_one_piece() -> None:
    lines = list(lines_of_file("a.json", os.urandom(100_000)))
    assert len(lines) > 3
    assert max(len(line) for line in lines) < 16_000


def test_several_files_follow_each_other_and_the_last_of_a_name_counts() -> None:
    lines = [*lines_of_file("a.json", b"1"), *lines_of_file("b.json", b"2"), *lines_of_file("a.json", b"3")]
    assert read(lines)[0] == {"a.json": b"3", "b.json": b"2"}


def test_a_file_that_is_cut_off_is_no_file() -> None:
    lines = list(lines_of_file("a.json", b"x" * 100))
    with pytest.raises(BadFile, match=r"a\.json is cut off"):
        read(lines[:-1])
    with pytest.raises(BadFile, match=r"a\.json is cut off"):
        read([*lines[:-1], *lines_of_file("b.json", b"2")])


@pytest.mark.parametrize("damage", ["!", "AAAA", ""])
def test_a_file_that_is_damaged_is_no_file(damage: str) -> None:
    head, _, end = lines_of_file("a.json", b"hello")
    with pytest.raises(BadFile, match="damaged"):
        read([head, damage, end])


def test_a_file_that_unpacks_to_more_than_it_said_is_refused_without_unpacking_all() -> None:
    head, *body = lines_of_file("a.json", b"0" * 10_000_000)
    with pytest.raises(BadFile, match="damaged"):
        read([head.replace("bytes 10000000", "bytes 10"), *body])
    with pytest.raises(BadFile, match="no record"):
        read([head.replace("bytes 10000000", "bytes 999999999999"), *body])


@pytest.mark.parametrize("name", ["../a.json", "a/b.json", "", ".hidden", "a b"])
def test_names_that_are_no_plain_ones_are_refused_by_both_sides(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        list(lines_of_file(name, b""))
    head, *body = lines_of_file("a.json", b"1")
    try:
        files, _ = read([head.replace("a.json", name), *body])
    except BadFile:
        return
    assert files == {}  # the head is a line like any other
