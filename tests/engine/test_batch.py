from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_llm.engine.batch import RowCost, fillers, next_border, piece_end, smoothed, token_budget


@given(st.integers(0, 5000), st.integers(1, 5000), st.integers(1, 512), st.integers(1, 600) | st.none())
def test_a_piece_never_crosses_a_chunk_border_or_the_end_and_always_advances(
    position: int, more: int, chunk_tokens: int, budget: int | None
) -> None:
    end = piece_end(position, position + more, chunk_tokens, budget)
    assert position < end <= position + more
    assert end <= next_border(position, chunk_tokens)
    assert budget is None or end - position <= max(1, budget)


@given(st.integers(0, 3000), st.integers(1, 200), st.lists(st.integers(1, 64), min_size=1, max_size=8))
def test_pieces_of_any_size_visit_every_chunk_border(total: int, chunk_tokens: int, budgets: list[int]) -> None:
    position, ends, turn = 0, set(), 0
    while position < total:
        position = piece_end(position, total, chunk_tokens, budgets[turn % len(budgets)])
        ends.add(position)
        turn += 1
    assert set(range(chunk_tokens, total, chunk_tokens)) <= ends


def test_prompt_work_between_two_tokens_is_bounded_by_the_measured_step() -> None:
    assert token_budget(decode_step_s=0.020, prompt_token_s=0.001) == 28
    assert token_budget(decode_step_s=0.001, prompt_token_s=0.010) == 1
    assert token_budget(decode_step_s=0.020, prompt_token_s=0.0) > 0


def test_a_hole_is_filled_only_when_a_row_costs_less_than_another_graph_run() -> None:
    memory_bound, compute_bound = RowCost(run_s=0.010, row_s=0.001), RowCost(run_s=0.001, row_s=0.010)
    slots = [0, 1, 2, 4, 5, 6, 7]
    assert fillers(slots, set(), memory_bound) == [3]
    assert fillers(slots, set(), compute_bound) == []
    assert fillers([0, 9], set(), RowCost(run_s=0.004, row_s=0.001)) == []
    assert fillers([3], set(), memory_bound) == []


def test_a_hole_that_holds_kv_is_never_filled() -> None:
    memory_bound = RowCost(run_s=0.010, row_s=0.001)
    assert fillers([0, 2, 4], {0, 1, 2, 4}, memory_bound) == [3]
    assert fillers([0, 3], {0, 2, 3}, memory_bound) == []


def test_row_cost_is_fitted_from_two_call_widths() -> None:
    cost = RowCost.fit(one_row_s=0.010, many_rows_s=0.013, rows=4)
    assert abs(cost.row_s - 0.001) < 1e-12
    assert abs(cost.run_s - 0.009) < 1e-12
    assert RowCost.fit(0.010, 0.010, 1) == RowCost(0.0, 0.010)


def test_a_running_mean_starts_at_the_first_sample_and_moves_towards_later_ones() -> None:
    mean = smoothed(0.0, 8.0)
    assert mean == 8.0
    assert smoothed(mean, 16.0) == 9.0
