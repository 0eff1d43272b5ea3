"""Records of runs that never were, for reports and comparisons; tests change what they are about."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec

from edge_llm.bench.record import (
    SCHEMA_VERSION,
    EngineBuild,
    ModelFacts,
    Node,
    Record,
    Source,
    run_id,
    statistics_of,
)
from edge_llm.bench.stats import summary

STARTED = datetime(2026, 11, 23, 10, 15, 2, tzinfo=UTC)
PI = Node("pi-1", "Cortex-A76", "aarch64", 4, (0, 1, 2, 3), 8 << 30, "6.6.31", 16384, board="Raspberry Pi 5")
MODEL = ModelFacts("tiny-q4_0", "a.gguf", "f" * 64, 10_000_000, "Q4_0", kv_bytes_per_token=1000)


def a_record(**changes: object) -> Record:
    record = Record(
        schema_version=SCHEMA_VERSION,
        run_id=run_id(STARTED, 12345),
        kind="engine",
        is_complete=True,
        started_at=STARTED,
        finished_at=STARTED + timedelta(seconds=90),
        tool_version="0.1",
        command=["edge-llm", "bench", "engine"],
        config={"core": 1},
        source=Source("0123456789" * 4, False),
        models=[MODEL],
        engines=[EngineBuild("ours", {"flags": "-DGGML_LLAMAFILE=OFF"})],
        nodes=[PI],
        processes=[],
        figures={"decode_ratio": 1.01},
        samples={"decode_tokens_per_s": [10.0, 10.1, 10.2, 10.3, 10.4, 10.5]},
        statistics={},
        failures=[],
    )
    made = msgspec.structs.replace(record, **changes)
    statistics = statistics_of({name: summary(values) for name, values in made.samples.items() if values})
    return msgspec.structs.replace(made, statistics=statistics)
