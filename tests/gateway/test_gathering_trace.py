"""Streams gathered on some of a cluster's mixed nodes, under recorded conversations in simulated time.

All are told the limits here: split, local and auto differ in nothing but who reads which prompt and where streams run.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import pytest
from msgspec import structs

from edge_llm.bench.goodput import GOALS, STRICT_TPOT, STRICT_TTFT, Goodput, Regime, goodput
from edge_llm.cluster.slo import Slo
from edge_llm.gateway.situation import Mode
from edge_llm.worker.messages import Rates
from tests.gateway.test_slo_trace import RATES, Simulation, limits_of, ran
from tests.nodes import PACED

# a step reads all weights, another stream costs it a tenth: decode that is bound by memory
BY_MEMORY: Final = structs.replace(PACED, run_s=0.030, row_s=0.003, cell_s=1e-6, call_s=0.010, token_s=0.004)
# another stream costs a third of a step, a token of a prompt as much
BY_BOTH: Final = structs.replace(PACED, run_s=0.050, row_s=0.019, cell_s=4e-6, call_s=0.020, token_s=0.018)
# of a pair of nodes; the last ones are too many for everybody
RATES_PER_S: Final = {BY_MEMORY: (0.3, 0.5, 0.7), BY_BOTH: (0.10, 0.15, 0.20), RATES: (0.4, 0.6, 0.8)}
NAMES: Final = {BY_MEMORY: "by memory", BY_BOTH: "by both", RATES: "by arithmetic"}
CLUSTERS: Final = ((BY_MEMORY, 1), (BY_MEMORY, 2), (BY_BOTH, 2), (RATES, 1), (RATES, 2))


def told(rate_per_s: float, mode: Mode, rates: Rates, regime: Regime = STRICT_TPOT, pairs: int = 1) -> Simulation:
    limits = limits_of("conv", regime.name, rates)
    return ran("conv", pairs * rate_per_s, mode, Slo(limits.ttft_s, limits.tpot_s), rates, pairs)


@cache
def goodput_of(mode: Mode, rates: Rates, regime: Regime = STRICT_TPOT, pairs: int = 1) -> Goodput:
    """Of a pair of nodes."""
    limits = limits_of("conv", regime.name, rates)
    points = [told(rate, mode, rates, regime, pairs).point(rate, limits) for rate in RATES_PER_S[rates]]
    return goodput(points, GOALS[0])


@pytest.mark.parametrize("pairs", [1, 2])
def test_where_weights_are_read_once_for_all_streams_auto_splits_and_serves_more_than_split_and_local(
    pairs: int,
) -> None:
    split, local, auto = (goodput_of(mode, BY_MEMORY, pairs=pairs) for mode in ("split", "local", "auto"))
    assert split.rate_per_s > local.rate_per_s, "here splitting wins"
    assert auto.rate_per_s > 1.1 * split.rate_per_s
    assert told(0.5, "auto", BY_MEMORY, pairs=pairs).split_share > 0.25


@pytest.mark.parametrize("regime", [STRICT_TPOT, STRICT_TTFT], ids=lambda regime: regime.name)
@pytest.mark.parametrize(("rates", "pairs"), CLUSTERS, ids=[f"{NAMES[rates]}, {pairs}" for rates, pairs in CLUSTERS])
def test_auto_serves_within_5_percent_of_the_better_of_split_and_local(
    rates: Rates, pairs: int, regime: Regime
) -> None:
    split, local, auto = (goodput_of(mode, rates, regime, pairs) for mode in ("split", "local", "auto"))
    assert auto.rate_per_s >= 0.95 * max(split.rate_per_s, local.rate_per_s)


@pytest.mark.parametrize(("rates", "pairs"), [(BY_MEMORY, 1), (BY_BOTH, 2), (RATES, 1)], ids=NAMES.values())
def test_streams_are_gathered_only_where_it_pays(rates: Rates, pairs: int) -> None:
    busy = RATES_PER_S[rates][1]
    strict, loose = (told(busy, "auto", rates, regime, pairs) for regime in (STRICT_TPOT, STRICT_TTFT))
    assert _gathered(strict) == (rates is not RATES)
    assert not _gathered(loose), "a pace that every node keeps beside prompts"


def test_nothing_is_arranged_for_requests_that_never_split() -> None:
    assert not _gathered(told(0.5, "local", BY_MEMORY))


def _gathered(simulation: Simulation) -> bool:
    return any(event.kind == "repurpose" for event in simulation.planner.pool_events)
