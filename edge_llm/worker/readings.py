"""What a worker measures, as its status and a scrape say it. Refuses to know how it is measured (engine/rates.py,
machine.py, power.py)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edge_llm.board import board_facts
from edge_llm.engine.engine import Engine
from edge_llm.engine.pacing import (
    LEAST_PIECE_STEPS,
    LEAST_PROMPT_STEPS,
    MOST_PROMPT_STEPS,
    OF_LIMIT,
    PROMPT_STEPS,
)
from edge_llm.machine import (
    CoreTime,
    NetworkBytes,
    anonymous_bytes,
    board_state,
    core_times,
    cpu_share,
    group_memory_bytes,
    memory_bytes,
    network_bytes,
    node_facts,
    ram_share,
)
from edge_llm.power import energy_j, monitor_rails_w
from edge_llm.worker.messages import Board, Rates


@dataclass(frozen=True, slots=True)
class Consumed:
    """What this board and this process use and have used: counters, and sizes in bytes. None and empty: not known.

    Only of files that are read in no time: whoever scrapes must not hold up a stream.
    """

    cores: Mapping[int, CoreTime]
    network: NetworkBytes | None
    energy_j: Mapping[str, float]
    power_w: Mapping[str, float]
    ram_used_bytes: int | None
    group_bytes: int | None
    group_peak_bytes: int | None
    anonymous_bytes: int | None


def consumed(root: Path = Path("/")) -> Consumed:
    """The machine and this process now."""
    memory, (group_bytes, group_peak_bytes) = memory_bytes(root), group_memory_bytes(root)
    return Consumed(
        cores=core_times(root),
        network=network_bytes(root),
        energy_j={package: joules for package, (joules, _) in energy_j(root).items()},
        power_w=monitor_rails_w(root),
        ram_used_bytes=memory[1] if memory else None,
        group_bytes=group_bytes,
        group_peak_bytes=group_peak_bytes,
        anonymous_bytes=anonymous_bytes(os.getpid(), root),
    )


@cache
def about_node() -> Mapping[str, str]:
    """What this board is: none of it changes while a process lives. Empty: not known."""
    node, more = node_facts(), board_facts(Path())
    return {
        "board": node.board or "",
        "cpu": node.cpu,
        "cores": str(node.cores),
        "ram_bytes": str(node.ram_bytes),
        "page_bytes": str(node.page_bytes),
        "kernel": node.kernel,
        "os": more.os or "",
    }


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
        prompt_steps=0.0 if has_fixed_pieces else PROMPT_STEPS,
        of_limit=OF_LIMIT,
        least_prompt_steps=LEAST_PROMPT_STEPS,
        most_prompt_steps=MOST_PROMPT_STEPS,
        least_piece_steps=LEAST_PIECE_STEPS,
    )
