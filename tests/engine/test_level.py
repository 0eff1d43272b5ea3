from __future__ import annotations

from pathlib import Path

from edge_llm.engine.level import UNVERIFIED, LevelRecord, capped, read_level, write_level
from edge_llm.kv.snapshot import Identity

HERE = Identity(compatibility="a" * 64, exactness_class="b" * 64)
ELSEWHERE = Identity(compatibility="a" * 64, exactness_class="c" * 64)
EXACT = LevelRecord("exact", "all rows equal", 8)


def test_a_level_is_believed_only_for_the_identity_it_was_measured_on(tmp_path: Path) -> None:
    write_level(tmp_path, HERE, EXACT)
    assert read_level(tmp_path, HERE) == EXACT
    assert read_level(tmp_path, ELSEWHERE) == UNVERIFIED


def test_a_damaged_level_file_is_unverified(tmp_path: Path) -> None:
    path = write_level(tmp_path, HERE, EXACT)
    for content in ("", "{", "[]", '{"schema": 99, "level": "exact"}', '{"schema": 1, "level": "perfect"}'):
        path.write_text(content)
        assert read_level(tmp_path, HERE) == UNVERIFIED


def test_a_cap_lowers_a_level_and_never_raises_one() -> None:
    assert capped(EXACT, "exact") == EXACT
    assert capped(EXACT, "same-plan").level == "same-plan"
    assert capped(UNVERIFIED, "exact") == UNVERIFIED
