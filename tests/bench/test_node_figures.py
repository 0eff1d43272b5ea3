"""What repetitions come to: rates, the roofline, ratios, and what misses the bar."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from edge_llm.bench.node_figures import Board, Loaded, Measured, Repetition, label_of, missed, row_of
from edge_llm.bench.node_rows import LLAMA_BENCH_COLUMNS, OUR_COLUMNS, SAMPLES, NodeTest
from edge_llm.bench.roofline import read_weights_bytes, roofline_share, step_bytes
from edge_llm.catalogue.gguf import ModelCard, Tensor, read_card
from edge_llm.engine.random_model import make_model

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
BOARD = Board("a cpu", 4, (3,))


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return read_card(make_model(tmp_path_factory.mktemp("models"), "dense", "Q4_0"))


@pytest.fixture
def loaded(card: ModelCard) -> Loaded:
    return Loaded("m.gguf", card, "llama 1M Q4_0", {"llama_cpp_python": "0.3", "repacked_tensors": "7"}, True)


def measured(test: NodeTest, *seconds: float, **changes: Any) -> Measured:
    repetitions = [Repetition(int(one * 1e9), one / 2, 1000 + number) for number, one in enumerate(seconds)]
    found = Measured(test, NOW, repetitions)
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_a_row_has_every_column_and_its_samples(loaded: Loaded) -> None:
    row = row_of(measured(NodeTest(512, 0), 2.0, 4.0), loaded, BOARD, is_complete=True)
    assert set(row) == {*LLAMA_BENCH_COLUMNS, *OUR_COLUMNS, *SAMPLES} - {"llama_bench_samples_ts"}
    assert (row["samples_ns"], row["samples_ts"]) == ([2_000_000_000, 4_000_000_000], [256.0, 128.0])
    assert (row["avg_ts"], row["avg_ns"], row["test_time"]) == (192.0, 3_000_000_000, "2026-01-02T03:04:05Z")
    assert row["stddev_ts"] == pytest.approx(90.5097, abs=1e-3)
    assert (row["n_prompt"], row["n_gen"], row["repack"], row["cpu_mask"]) == (512, 0, True, "0x8")


def test_cpu_is_a_share_of_the_whole_board_and_memory_the_highest_of_all_repetitions(loaded: Loaded) -> None:
    row = row_of(measured(NodeTest(8, 0), 1.0, 3.0), loaded, BOARD, is_complete=True)
    assert row["cpu_share"] == pytest.approx(0.5 / 4)
    assert row["rss_peak_bytes"] == 1001


def test_tokens_of_parallel_sequences_all_count(loaded: Loaded) -> None:
    row = row_of(measured(NodeTest(0, 100, n_parallel=4), 2.0), loaded, BOARD, is_complete=True)
    assert row["avg_ts"] == 200.0
    assert row["stddev_ts"] == 0.0


def test_only_decode_rows_have_a_share_of_the_roofline(loaded: Loaded) -> None:
    for test in (NodeTest(8, 0), NodeTest(8, 4)):
        row = row_of(measured(test, 1.0, bandwidth_bytes_per_s=1e9), loaded, BOARD, is_complete=True)
        assert row["roofline_share"] is row["bandwidth_bytes_per_s"] is row["step_bytes"] is None
    row = row_of(measured(NodeTest(0, 10), 1.0, bandwidth_bytes_per_s=1e9), loaded, BOARD, is_complete=True)
    assert row["roofline_share"] == pytest.approx(row["step_bytes"] * 10 / 1e9)
    assert row_of(measured(NodeTest(0, 10), 1.0), loaded, BOARD, is_complete=True)["roofline_share"] is None


def test_more_sequences_read_the_weights_once_and_their_kv_each(loaded: Loaded) -> None:
    def step(rows: int, depth: int) -> int:
        test = NodeTest(0, 1, depth, n_parallel=rows)
        return int(row_of(measured(test, 1.0), loaded, BOARD, is_complete=True)["step_bytes"])

    kv = loaded.card.kv_bytes_per_token()
    assert step(4, 99) - step(1, 99) == 3 * 100 * kv
    assert step(1, 100) - step(1, 0) == 100 * kv


def tensor(name: str, n_bytes: int) -> Tensor:
    return Tensor(name, "F16", (1, n_bytes // 2), n_bytes)


def test_an_embedding_is_read_only_where_it_is_the_output_too() -> None:
    tied = [tensor("token_embd.weight", 1000), tensor("blk.0.ffn_up.weight", 10)]
    assert read_weights_bytes(tied, 1) == 1010
    assert read_weights_bytes([*tied, tensor("output.weight", 500)], 1) == 510


def test_a_mixture_reads_the_experts_that_its_tokens_choose_and_never_more_than_all() -> None:
    weights = [tensor("output.weight", 100), tensor("blk.0.ffn_up_exps.weight", 800)]
    assert read_weights_bytes(weights, 1, expert_share=0.25) == 300
    assert read_weights_bytes(weights, 2, expert_share=0.25) == 500
    assert read_weights_bytes(weights, 9, expert_share=0.25) == 900


def test_the_kv_of_a_test_is_that_of_its_mean_depth() -> None:
    found = step_bytes(1000, 2, rows=3, n_depth=10, n_gen=3)
    assert (found.kv_bytes, found.total_bytes) == (3 * 2 * 12, 1072)
    assert roofline_share(500, 10.0, 10_000.0) == 0.5
    assert roofline_share(500, 10.0, 0.0) is None


def test_a_ratio_is_of_medians_and_one_beyond_the_bar_is_missed_in_both_directions(loaded: Loaded) -> None:
    def ratio(theirs: list[float]) -> list[str]:
        row = row_of(measured(NodeTest(100, 0), 1.0, 1.0, 9.0, reference=theirs), loaded, BOARD, is_complete=True)
        assert row["llama_bench_samples_ts"] == theirs
        return missed([row])

    assert ratio([99.0, 1.0, 102.0]) == []
    assert ratio([104.0]) == ["m.gguf: pp100 is 0.962 of llama-bench's, more than 3% off"]
    assert len(ratio([96.0])) == 1


def test_what_has_no_ratio_misses_no_bar(loaded: Loaded) -> None:
    assert missed([row_of(measured(NodeTest(8, 0), 1.0), loaded, BOARD, is_complete=True)]) == []
    assert len(missed([{"model_filename": "m", "test": "t", "ratio": float("nan")}])) == 1


def test_tests_of_one_sweep_have_different_labels() -> None:
    tests = [
        NodeTest(0, 8),
        NodeTest(0, 8, 16),
        NodeTest(0, 8, n_threads=2),
        NodeTest(0, 8, type_k="q8_0"),
        NodeTest(0, 8, policy="fast"),
        NodeTest(0, 8, n_ubatch=64),
        NodeTest(0, 8, n_parallel=2),
        NodeTest(0, 8, flash_attention="on"),
        NodeTest(8, 8, n_threads_batch=2),
        NodeTest(8, 8),
    ]
    assert len({label_of(test) for test in tests}) == len(tests)
