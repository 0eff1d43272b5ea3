from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_llm.engine.batch import RowCost, calls, fillers, next_border, piece_end, smoothed


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


COST = RowCost(run_s=0.002, row_s=0.010, cell_s=4e-6)


def call_s(cells: list[int], cost: RowCost) -> float:
    """llama.cpp: weights once, and for every row as many blocks of 256 cells as the deepest one has."""
    return cost.run_s + len(cells) * (cost.row_s + -(-max(cells) // 256) * 256 * cost.cell_s)


def test_a_long_sequence_gets_a_call_of_its_own_when_its_neighbours_would_read_as_far() -> None:
    assert calls([400, 400, 400, 400, 1700], COST) == [range(0, 4), range(4, 5)]
    assert calls([400, 1700, 400], COST) == [range(0, 1), range(1, 2), range(2, 3)]


def test_rows_of_like_depth_stay_in_one_call() -> None:
    assert calls([400, 410, 395, 402], COST) == [range(0, 4)]
    assert calls([17], COST) == [range(0, 1)]
    assert calls([2, 250, 19, 99, 4, 201, 7, 30], COST) == [range(0, 8)], "all of them read one block"


def test_where_weights_cost_more_than_cells_or_nothing_is_known_one_call_does_it() -> None:
    assert calls([400, 1700, 400], RowCost(run_s=0.1, row_s=0.01, cell_s=4e-6)) == [range(0, 3)]
    assert calls([400, 1700, 400], RowCost(run_s=0.0, row_s=0.0)) == [range(0, 3)]


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=6), st.floats(0.001, 0.05), st.floats(0, 1e-5))
def test_no_other_way_to_cut_neighbours_into_calls_is_cheaper(cells: list[int], run_s: float, cell_s: float) -> None:
    cost = RowCost(run_s, 0.01, cell_s)
    found = calls(cells, cost)
    assert [index for part in found for index in part] == list(range(len(cells)))
    took_s = sum(call_s(cells[part.start : part.stop], cost) for part in found)
    for cuts in range(2 ** (len(cells) - 1)):
        ends = [i + 1 for i in range(len(cells) - 1) if cuts >> i & 1] + [len(cells)]
        other_s = sum(call_s(cells[a:b], cost) for a, b in zip([0, *ends], ends, strict=False))
        assert took_s <= other_s + 1e-12


def test_calls_are_not_free_even_where_a_fit_says_so() -> None:
    assert calls([10, 300], RowCost(run_s=0.0, row_s=0.01, cell_s=1e-6)) == [range(0, 2)]
    assert calls([10, 10], RowCost(run_s=0.0, row_s=0.0, cell_s=1e-6)) == [range(0, 2)]
    assert calls([10, 10, 2000], RowCost(run_s=0.0, row_s=0.0, cell_s=1e-6)) == [range(0, 2), range(2, 3)]


def test_a_hole_beside_a_long_sequence_costs_what_a_row_reads_there() -> None:
    memory_bound = RowCost(run_s=0.010, row_s=0.001, cell_s=4e-6)
    assert fillers([0, 2], set(), memory_bound, cells=500) == [1]
    assert fillers([0, 2], set(), memory_bound, cells=4000) == []
