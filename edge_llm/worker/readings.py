"""What a worker measures, as its status says it. Refuses to know how it is measured (engine/rates.py, machine.py)."""

from __future__ import annotations

from edge_llm.engine.batch import PROMPT_STEPS_PER_DECODE_STEP
from edge_llm.engine.engine import Engine
from edge_llm.machine import board_state, cpu_share, ram_share
from edge_llm.worker.messages import Board, Rates


def board() -> Board:
    """The machine now. CPU since the last time this was asked."""
    state = board_state()
    return Board(
        cpu_share=cpu_share(),
        ram_share=ram_share(),
        temperature_c=state.temperature_c,
        frequency_hz=state.frequency_hz,
        throttled=dict(state.throttled),
    )


def rates(engine: Engine) -> Rates:
    """How long work takes, and how much of it comes between two decode steps."""
    found, has_fixed_pieces = engine.rates, engine.facts.level == "same-plan"
    return Rates(
        run_s=found.run_s,
        row_s=found.row_s,
        cell_s=found.cell_s,
        call_s=found.call_s,
        token_s=found.token_s,
        pair_s=found.pair_s,
        decode_samples=found.decode_samples,
        prompt_samples=found.prompt_samples,
        prompt_steps=0.0 if has_fixed_pieces else PROMPT_STEPS_PER_DECODE_STEP,
    )
