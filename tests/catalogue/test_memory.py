from __future__ import annotations

import pytest

from edge_llm.catalogue.memory import ModelSizes, check_fits, plan_memory
from edge_llm.errors import ConfigError

SMALL = ModelSizes(
    weights_bytes=100 << 20,
    repacked_bytes=0,
    kv_bytes_per_token=23040,
    vocab_size=49152,
    n_head=9,
    n_embd=576,
    n_ff=1536,
)


def test_kv_of_all_slots_is_counted_up_front_and_once_more_for_an_adoption() -> None:
    plan = plan_memory(SMALL, n_ctx=4096, slots=8, serves_prompts=False, rows=128)
    assert plan.parts["KV of 8 slots"] == 720 << 20  # the figure of blueprint section 6
    assert plan.parts["one snapshot in adoption"] == 90 << 20
    assert plan.parts["KV of the prompt context"] == 0


def test_what_may_be_kept_of_finished_prompts_is_counted() -> None:
    plan = plan_memory(SMALL, n_ctx=4096, slots=8, serves_prompts=True, rows=128, prefix_cache_bytes=256 << 20)
    assert plan.parts["kept prefixes"] == 256 << 20


def test_a_prefill_worker_needs_no_slots_and_no_snapshot() -> None:
    plan = plan_memory(SMALL, n_ctx=4096, slots=0, serves_prompts=True, rows=128)
    assert plan.parts["one snapshot in adoption"] == 0
    assert plan.parts["KV of the prompt context"] == 90 << 20


def test_chunks_that_are_on_their_way_are_counted_at_either_end_of_a_hand_off() -> None:
    for slots, serves_prompts in ((8, False), (0, True)):
        plan = plan_memory(SMALL, n_ctx=4096, slots=slots, serves_prompts=serves_prompts, rows=128)
        assert plan.parts["chunks on their way"] == 3 * 128 * 23040
    assert (
        plan_memory(SMALL, n_ctx=64, slots=1, serves_prompts=True, rows=128).parts["chunks on their way"]
        == 3 * 64 * 23040
    )


def test_what_does_not_fit_is_refused_with_the_sum_and_what_to_change() -> None:
    plan = plan_memory(SMALL, n_ctx=4096, slots=8, serves_prompts=True, rows=128)
    check_fits(plan, plan.total_bytes, "m")
    with pytest.raises(ConfigError) as refusal:
        check_fits(plan, plan.total_bytes - 1, "m")
    for part in (*plan.parts, "sum", "--n-ctx", "--slots"):
        assert part in refusal.value.message
