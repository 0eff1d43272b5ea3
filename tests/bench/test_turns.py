from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edge_llm.bench.engine import BenchModel
from edge_llm.bench.layout import Layout
from edge_llm.bench.record import ModelFacts
from edge_llm.bench.run import Run
from edge_llm.bench.turns import Plan, figures, measure, missed
from edge_llm.commands.local_cluster import local_cluster
from edge_llm.engine.simulated import VOCAB_SIZE

SIMULATED = BenchModel(Path("none.gguf"), ModelFacts("simulated", "none.gguf", "0" * 64, 0, "none", "simulated", 64))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_a_second_turn_on_real_processes_computes_only_what_is_new() -> None:
    plan = Plan(repetitions=2, vocab_size=VOCAB_SIZE, prompt_tokens=400, answer_tokens=20, new_tokens=10)
    run = Run("turns", ["test"], {})

    def simulated(layout: Layout) -> object:
        return local_cluster(replace(layout, options=(*layout.options, "--simulate")), "simulated")

    found = await measure(plan, SIMULATED, simulated, run, lambda what, done, total: None)  # type: ignore[arg-type]
    assert found["ids_equal"] is True
    assert found["cached_tokens"] == 400 + 20 - 1, "all but the token that was drawn last"
    assert len(run.samples["second_turn_ttft_share"]) == 2


def test_bars_are_missed_by_slow_second_turns_and_by_other_tokens() -> None:
    run = Run("turns", ["test"], {})
    assert len(missed(figures(run))) == 2, "what was not measured is not met"
    run.add("second_turn_ttft_share", 0.1)
    run.add("ids_equal", 1.0)
    assert missed(figures(run)) == []
    run.add("ids_equal", 0.0)
    run.add("second_turn_ttft_share", 0.5)
    run.add("second_turn_ttft_share", 0.5)
    assert len(missed(figures(run))) == 2
