"""Memory bandwidth: what is counted, by an injected clock, and arrays outside the cache and inside the memory."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import pytest

from edge_llm.bench.bandwidth import array_bytes, last_cache_bytes, main, measure

MIB = 1 << 20


def test_arrays_are_several_times_the_cache_and_never_more_than_an_eighth_of_the_memory() -> None:
    assert array_bytes(2 * MIB, 64 << 30) == 64 * MIB
    assert array_bytes(32 * MIB, 64 << 30) == 128 * MIB
    assert array_bytes(480 * MIB, 64 << 30) == 1024 * MIB
    assert array_bytes(480 * MIB, 800 * MIB) == 100 * MIB
    assert array_bytes(0, 0) > 0


def test_the_largest_cache_counts_and_a_board_that_names_none_has_none(tmp_path: Path) -> None:
    assert last_cache_bytes(tmp_path) == 0
    for index, text in enumerate(("64K", "2048K", "nonsense")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{index}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(text + "\n")
    assert last_cache_bytes(tmp_path) == 2 * MIB


@pytest.mark.parametrize("threads", [1, 3])
def test_a_copy_counts_twice_a_read_once_and_the_highest_is_the_bandwidth(threads: int) -> None:
    ticks = itertools.count()
    found = measure(threads, MIB, clock=lambda: float(next(ticks)))  # every pass takes a second
    assert found["kinds"] == {"copy": 2.0 * MIB, "scale": 2.0 * MIB, "read": 1.0 * MIB}
    assert found["bytes_per_s"] == 2.0 * MIB
    assert f"{threads} thread(s)" in found["how"]


def test_the_process_answers_line_by_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("edge_llm.bench.bandwidth.available_memory_bytes", lambda: 8 * MIB)
    monkeypatch.setattr("sys.stdin", io.StringIO('{"op": "bandwidth", "threads": 2}\n'))
    assert main([]) == 0
    ready, result = map(json.loads, capsys.readouterr().out.splitlines())
    assert ready == {"event": "ready", "array_bytes": MIB}
    assert (result["event"], result["threads"], result["bytes_per_s"] > 0) == ("result", 2, True)
