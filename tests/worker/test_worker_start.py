"""What a worker says when it starts."""

from __future__ import annotations

from dataclasses import replace

from structlog.testing import capture_logs

from edge_llm.engine.simulated import SimulatedSettings, create_simulated
from edge_llm.worker.serve import warn_of_context


def test_a_context_that_is_longer_than_the_models_own_is_said_once() -> None:
    facts = create_simulated(SimulatedSettings(n_ctx=4096))[0].facts
    with capture_logs() as lines:
        warn_of_context(facts)
        warn_of_context(replace(facts, n_ctx_train=0))  # its file does not say
    assert not lines
    with capture_logs() as lines:
        warn_of_context(replace(facts, n_ctx_train=2048))
    (line,) = lines
    assert (line["log_level"], line["n_ctx"], line["n_ctx_train"]) == ("warning", 4096, 2048)
    assert "--n-ctx 2048" in line["message"]
