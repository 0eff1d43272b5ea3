"""What nodes can do together, against numbers worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.cluster.capacity import serves_per_s
from edge_llm.cluster.view import Node
from edge_llm.worker.messages import Rates, Role
from tests.nodes import load_of, node_of

# 100 tokens are read in 1 s; four rows take 0.2 s a step, so 20 tokens take each of them 20 * 0.2 / 4 = 1 s of the node
RATES = Rates(run_s=0.16, row_s=0.01, token_s=0.01)


def node(worker: str, role: Role, rates: Rates = RATES) -> Node:
    return node_of(worker, role, load=load_of(rates=rates))


def test_a_node_that_does_all_of_it_shares_its_time_out() -> None:
    assert serves_per_s([node("m1", "mixed")], 100, 20) == pytest.approx(1 / 2)
    assert serves_per_s([node("m1", "mixed"), node("m2", "mixed")], 100, 20) == pytest.approx(1)


def test_a_prefill_worker_takes_prompts_off_it_until_it_only_writes() -> None:
    slow, fast = Rates(token_s=0.04), Rates(token_s=0.001)
    # a quarter of a prompt per second is read elsewhere: 0.625 * (1 + 1) - 0.25 s of reading = 1 s
    assert serves_per_s([node("d1", "decode"), node("p1", "prefill", slow)], 100, 20) == pytest.approx(0.625)
    assert serves_per_s([node("d1", "decode"), node("p1", "prefill", fast)], 100, 20) == pytest.approx(1)


def test_of_nodes_that_say_nothing_nothing_is_believed() -> None:
    assert serves_per_s([node("m1", "mixed", Rates())], 100, 20) is None
    assert serves_per_s([node("p1", "prefill")], 100, 20) is None
    assert serves_per_s([], 100, 20) is None


@given(st.integers(1, 4000), st.floats(1, 1000), st.integers(1, 4), st.integers(0, 4))
def test_more_nodes_never_serve_less_and_longer_requests_never_faster(
    prompt_tokens: int, answer_tokens: float, decoders: int, readers: int
) -> None:
    nodes = [node(f"d{at}", "decode") for at in range(decoders)] + [node(f"p{at}", "prefill") for at in range(readers)]
    found = serves_per_s(nodes, prompt_tokens, answer_tokens)
    assert found is not None
    for more in (node("d9", "decode"), node("p9", "prefill")):
        assert (serves_per_s([*nodes, more], prompt_tokens, answer_tokens) or 0) >= found * (1 - 1e-9)
    assert (serves_per_s(nodes, prompt_tokens + 100, answer_tokens) or 0) <= found * (1 + 1e-9)
    assert (serves_per_s(nodes, prompt_tokens, answer_tokens + 50) or 0) <= found * (1 + 1e-9)
