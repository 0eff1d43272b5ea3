"""One scenario after another until all are played or the time is up, and what comes of each.

Owns the bounds in time and the judgement: passed, failed with its logs kept, or not tried and why. Time that is up is
nobody's failure. Refuses to know what scenarios do, and who asks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import aiohttp

from edge_llm.config import cache_dir
from edge_llm.errors import EdgeLLMError
from tests.kubernetes.shell import end_runs
from tests.kubernetes.stage import NotHere, Scenario, Stage

OUT_OF_TIME: Final = "not finished in time"
_SCENARIO_S: Final = 1200.0
_LOGS: Final = "logs"


@dataclass(frozen=True, slots=True)
class Ends:
    """When to stop. `limit_s` after `began_s`; None: when all is done."""

    began_s: float
    limit_s: float | None = None

    @property
    def left_s(self) -> float | None:
        return None if self.limit_s is None else max(0.0, self.began_s + self.limit_s - time.monotonic())

    @property
    def is_over(self) -> bool:
        return self.left_s == 0


async def play(
    stage: Stage,
    first: Sequence[Scenario],
    rest: Sequence[Scenario],
    ends: Ends,
    after_each: Callable[[], None],
    *,
    is_tried_again: bool = False,
) -> None:
    """`first`: without these nothing else can be tried. `is_tried_again`: what failed is played once more at the end:
    what a busy machine failed does not fail twice. What waits in other threads is ended with it."""
    failed = []
    try:
        for scenario in (*first, *rest):
            is_well = await _play(stage, scenario, ends)
            after_each()
            if not is_well:
                failed.append(scenario)
            if not is_well and scenario in first:
                stage.ledger.say("without that nothing else can be tried")
                return
        for scenario in failed if is_tried_again and not ends.is_over else ():
            stage.ledger.say(f"again: {scenario.name}")
            await _play(stage, scenario, ends)
            after_each()
    finally:
        stage.cluster.ends.set()
        end_runs()


async def _play(stage: Stage, scenario: Scenario, ends: Ends) -> bool:
    if ends.is_over:
        stage.ledger.leaves_out(scenario.name, OUT_OF_TIME)
        return True
    began_s = time.monotonic()
    try:
        async with asyncio.timeout(min(_SCENARIO_S, ends.left_s or _SCENARIO_S)):
            if scenario.settles:
                await stage.settle()
            began_s = time.monotonic()
            detail = await scenario.play(stage)
    except NotHere as error:
        stage.ledger.leaves_out(scenario.name, str(error))
        return True
    except (EdgeLLMError, aiohttp.ClientError, TimeoutError, OSError, LookupError) as error:
        if ends.is_over:  # whatever was raised: it was told to stop
            stage.ledger.leaves_out(scenario.name, OUT_OF_TIME)
            return True
        why = error.message if isinstance(error, EdgeLLMError) else repr(error)
        stage.ledger.fails(scenario.name, why, time.monotonic() - began_s)
        folder = cache_dir() / "kubernetes" / _LOGS / scenario.name.replace(" ", "-")
        await asyncio.to_thread(stage.edge.keep_logs, folder)
        stage.say(f"logs: {folder}")
        return False
    stage.ledger.passes(scenario.name, detail, time.monotonic() - began_s)
    return True
