"""What commands print, read back through the types they publish: nothing is unnamed, nothing is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_llm.bench.node_rows import LLAMA_BENCH_COLUMNS, OUR_COLUMNS
from edge_llm.bench.schemas import PRINTED, schema
from tests.published import reads_back

RECORDS = Path(__file__).parents[2] / "bench_results"


def newest(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(sorted(RECORDS.glob(f"*-{kind}-*.json"))[-1].read_bytes())["figures"]
    return found


@pytest.mark.parametrize("kind", [kind for kind in PRINTED if any(RECORDS.glob(f"*-{kind}-*.json"))])
def test_the_newest_record_of_each_kind_is_what_the_published_type_says(kind: str) -> None:
    assert reads_back(newest(kind), PRINTED[kind])


def test_there_are_records_of_these_kinds_to_test_with() -> None:
    assert {kind for kind in PRINTED if any(RECORDS.glob(f"*-{kind}-*.json"))} >= {"node", "accuracy", "goodput"}


def test_the_schema_of_a_node_names_every_column_of_a_row() -> None:
    required = schema("node")["$defs"]["row"]["required"]
    assert required == [*LLAMA_BENCH_COLUMNS, *OUR_COLUMNS]
    assert all(set(required) <= set(row) for row in newest("node")["rows"])


@pytest.mark.parametrize("kind", PRINTED)
def test_figures_with_the_name_of_their_record_are_what_is_printed(kind: str) -> None:
    properties = schema(kind)["$defs"][PRINTED[kind].__name__]["properties"]
    assert "record" in properties
