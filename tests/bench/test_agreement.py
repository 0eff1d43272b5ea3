"""What `make agreement` makes of its rounds."""

from __future__ import annotations

from edge_llm.bench.run import Run
from tests.bench.agreement import COMPARED, ratios


def test_each_round_is_compared_with_itself_and_the_middle_one_counts() -> None:
    run = Run("agreement", [], {})
    for machine, ours in ((1.0, 1.01), (2.0, 0.99), (4.0, 1.5)):  # a machine that drifts, and one disturbed round
        for name in COMPARED:
            run.add(f"theirs_{name}", machine)
            run.add(f"ours_{name}", machine * ours)
    assert ratios(run) == {f"{name}_ratio": 1.01 for name in COMPARED}
    run.add("ours_ttft_ms", 100.0)
    assert ratios(run)["ttft_ms_ratio"] == 1.01, "a round that was cut after the first client is none"
