from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_llm.engine.sampling import Floats, sample, uniform
from edge_llm.errors import EngineFailed
from edge_llm.request import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
logit_lists = st.lists(st.sampled_from([-4.0, -1.0, 0.0, 0.5, 1.0, 1.0, 2.5, 6.0]), min_size=1, max_size=400)
truncations = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 40]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 2**64 - 1),
)


def oracle(logits: Floats, params: SamplingParams, position: int) -> int:
    """The same distribution by sorting everything, one rule after the other."""
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    if params.top_k:
        order = order[: params.top_k]
    best = float(logits[order[0]])
    p = {i: np.exp(float(logits[i]) - best) for i in order}
    if params.top_p < 1.0:
        total, mass, kept = sum(p.values()), 0.0, []
        for i in order:
            kept.append(i)
            mass += p[i]
            if mass >= params.top_p * total:
                break
        order = kept
    if params.min_p:
        order = [i for i in order if float(logits[i]) >= best + np.log(params.min_p)] or order[:1]
    if not params.top_k and params.top_p >= 1.0 and not params.min_p:
        order = sorted(order)
    weights = [np.exp((float(logits[i]) - best) / params.temperature) for i in order]
    mark, mass = uniform(params.seed, position) * sum(weights), 0.0
    for i, weight in zip(order, weights, strict=True):
        mass += weight
        if mass > mark:
            return i
    return order[-1]


@settings(max_examples=300)
@given(logit_lists, truncations, st.integers(0, 9))
def test_partial_selection_draws_what_a_full_sort_draws(
    values: list[float], params: SamplingParams, position: int
) -> None:
    logits = np.array(values, np.float32)
    assert sample(logits, [], params, position) == oracle(logits, params, position)


def test_ties_go_to_the_lowest_id() -> None:
    logits = np.zeros(1000, np.float32)
    assert sample(logits, [], GREEDY, 0) == 0
    two = SamplingParams(top_k=2, seed=1)
    assert {sample(logits, [], two, position) for position in range(50)} == {0, 1}


def test_the_same_seed_and_position_draw_the_same_token_whatever_was_drawn_in_between() -> None:
    logits = np.random.default_rng(0).normal(size=500).astype(np.float32)
    params = SamplingParams(seed=2**64 - 1)
    first = [sample(logits, [], params, position) for position in range(40)]
    again = [sample(logits, [], params, position) for position in reversed(range(40))]
    assert first == again[::-1]
    assert first != [sample(logits, [], SamplingParams(seed=7), position) for position in range(40)]


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    draws = 20_000
    found = Counter(sample(logits, [], SamplingParams(seed=3), position) for position in range(draws))
    expected = np.array([0.5, 0.3, 0.15, 0.05]) * draws
    chi2 = sum((found[i] - expected[i]) ** 2 / expected[i] for i in range(4))
    assert chi2 < 16.3  # 99.9 % point of three degrees of freedom


def test_the_counter_based_draw_is_uniform_over_seeds_and_positions() -> None:
    values = np.array([uniform(seed, position) for seed in range(100) for position in range(100)])
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 43.8  # 99.9 % point of nineteen degrees of freedom
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.04


def test_penalties_touch_only_what_was_seen_and_never_the_callers_array() -> None:
    logits = np.array([2.0, 1.9, -1.0, 0.0], np.float32)
    before = logits.copy()
    assert sample(logits, [0], SamplingParams(temperature=0, repeat_penalty=1.5), 1) == 1
    assert sample(logits, [0, 0], SamplingParams(temperature=0, frequency_penalty=0.06), 2) == 1
    assert sample(logits, [0], SamplingParams(temperature=0, presence_penalty=0.05), 1) == 0
    assert sample(logits, [0, 3, 3], SamplingParams(temperature=0, repeat_penalty=1.5, penalty_last_n=2), 3) == 0
    assert sample(logits, [], SamplingParams(temperature=0, logit_bias={3: 5.0, 99: 100.0}), 0) == 3
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_k=3, top_p=0.5)])
def test_logits_that_are_not_numbers_are_the_engines_fault(bad: float, params: SamplingParams) -> None:
    with pytest.raises(EngineFailed):
        sample(np.array([0.0, bad, 1.0], np.float32), [], params, 0)


def test_a_bias_is_added_to_its_tokens_alone_and_one_of_no_token_is_nothing() -> None:
    logits = np.array([0.0, 1.0, 2.0, 3.0], np.float32)
    biased = SamplingParams(temperature=0.0, logit_bias={0: 4.5, 3: -100.0, 99: 100.0, -1: 100.0})
    assert sample(logits, [], biased, 0) == 0
    assert logits.tolist() == [0.0, 1.0, 2.0, 3.0], "the caller's logits stay"
    assert sample(logits, [], SamplingParams(temperature=0.0, logit_bias={2: 1.5}), 0) == 2


@pytest.mark.parametrize("temperature", [1e-320, 1e-50, 1e-44, 1e-38])
@pytest.mark.parametrize("more", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_temperature_that_is_nearly_nothing_is_greedy(temperature: float, more: dict[str, float]) -> None:
    logits = np.array([0.5, 3.0, 2.999, -1.0] * 40, np.float32)
    params = SamplingParams(temperature=temperature, **more)  # type: ignore[arg-type]
    with np.errstate(all="ignore"):
        assert {sample(logits, [], params, position) % 4 for position in range(20)} == {1}
