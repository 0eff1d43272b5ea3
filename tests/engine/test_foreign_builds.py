"""Builds of llama-cpp-python that are not ours: what is done without, and what a worker says about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_llm.engine.load import LlamaSettings, recorded_level
from edge_llm.engine.native import has_shape_dependent_kernels, has_tile_kernels
from edge_llm.kv.snapshot import Identity, Policy

OURS = "CPU : SSE3 = 1 | AVX2 = 1 | AVX512 = 1 | OPENMP = 1 | REPACK = 1 | "
IDENTITY = Identity("a" * 64, "b" * 64)


def reason(system_info: str, policy: Policy) -> str:
    settings = LlamaSettings(Path("m.gguf"), "m", "0" * 64, policy=policy)
    return recorded_level(settings, IDENTITY, {"system_info": system_info}).reason


def test_kernels_that_harm_are_seen_in_llama_cpps_own_list() -> None:
    assert has_tile_kernels(f"{OURS}AMX_INT8 = 1 | ")
    assert has_shape_dependent_kernels(f"{OURS}LLAMAFILE = 1 | ")
    for info in (OURS, f"{OURS}AMX_INT8 = 0 | LLAMAFILE = 0 | ", f"{OURS}NOT_AMX_INT8 = 1 | "):
        assert not has_tile_kernels(info)
        assert not has_shape_dependent_kernels(info)


@pytest.mark.parametrize(
    ("policy", "flag", "says"),
    [("exact", "LLAMAFILE", "tinyBLAS"), ("fast", "AMX_INT8", "AMX kernels, which may crash")],
)
def test_a_worker_says_what_such_a_build_costs_and_how_to_get_another(policy: Policy, flag: str, says: str) -> None:
    told = reason(f"{OURS}{flag} = 1 | ", policy)
    assert says in told
    assert "`make up`" in told
    assert "`make up`" not in reason(OURS, policy)


@pytest.mark.parametrize(("policy", "flag"), [("fast", "LLAMAFILE"), ("exact", "AMX_INT8")])
def test_it_says_nothing_of_kernels_that_the_policy_does_not_use(policy: Policy, flag: str) -> None:
    assert "`make up`" not in reason(f"{OURS}{flag} = 1 | ", policy)
