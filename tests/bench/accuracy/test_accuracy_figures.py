"""Figures are what their definitions say, and can be computed again from cases alone."""

from __future__ import annotations

import math
from typing import Any

import pytest

from edge_llm.bench.accuracy.figures import average, binomial_p, compared, figures, share, task_figures

Case = dict[str, Any]


def case(item: str, acc: float | None, *, model: str = "m", task: str = "t", **facts: Any) -> Case:
    return {"model": model, "task": task, "item": item, "setup": "s", "acc": acc, **facts}


@pytest.mark.parametrize(
    ("successes", "n", "chance", "p"),
    [
        (7, 10, 0.5, 0.34375),  # by hand: 2 (120 + 45 + 10 + 1) / 1024
        (0, 10, 0.5, 2 / 1024),
        (5, 10, 0.5, 1.0),
        (0, 4, 0.25, 148 / 256),  # 81, and 54 + 12 + 1 for k = 2, 3, 4; k = 1 (108) is likelier
        (3, 3, 0.25, 1 / 64),
    ],
)
def test_the_binomial_test_is_exact_on_both_sides(successes: int, n: int, chance: float, p: float) -> None:
    assert binomial_p(successes, n, chance) == pytest.approx(p, rel=1e-9)


def test_the_binomial_test_bears_thousands_of_items() -> None:
    assert binomial_p(3520, 14_079, 0.25) > 0.9
    assert binomial_p(4000, 14_079, 0.25) < 1e-15


def test_a_share_has_the_sample_error_and_wilsons_interval() -> None:
    found = share([1.0] * 30 + [0.0] * 10)
    assert found["value"] == 0.75
    assert found["stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 39))
    assert found["low"] < 0.75 < found["high"]
    assert share([1.0])["stderr"] is None, "one item says nothing about its error"


def test_failed_items_are_counted_and_in_no_share() -> None:
    found = task_figures([case("1", 1.0, n_choices=4, gold=[0]), {**case("2", None), "failed": "too long"}])
    assert (found["n"], found["failed"]) == (1, 1)
    assert found["acc"]["value"] == 1.0
    assert task_figures([{**case("2", None), "failed": "too long"}]) == {"n": 0, "failed": 1}


def test_chance_is_the_mean_over_items_and_a_favourite_place_is_shown() -> None:
    cases = [case(str(i), float(i < 20), n_choices=2 if i % 2 else 4, gold=[i % 4 == 0]) for i in range(40)]
    found = task_figures(cases)
    assert found["chance"] == pytest.approx(0.375)
    assert found["p_value"] == pytest.approx(binomial_p(20, 40, 0.375))
    assert found["differs_from_chance"] is False
    assert found["majority"] == 0.75


def test_prompts_with_unchecked_instructions_are_in_no_share_of_prompts_but_their_others_count() -> None:
    cases = [
        case("1", 1.0, acc_loose=1.0, strict=[True], loose=[True], unchecked=0),
        case("2", None, acc_loose=None, strict=[False], loose=[True], unchecked=1),
    ]
    found = task_figures(cases)
    assert found["acc"]["n"] == 1
    assert found["instructions"]["value"] == 0.5
    assert found["instructions_loose"]["value"] == 1.0
    assert found["instructions_unchecked"] == 1


def window(losses: list[float], base: list[float] | None = None, kl: list[float] | None = None) -> Case:
    found: Case = {"model": "m", "task": "text", "item": "w", "setup": "s", "count": len(losses)}
    found |= {"nll": sum(losses), "nll_squares": sum(loss**2 for loss in losses)}
    if base is None or kl is None:
        return found
    found |= {"base_nll": sum(base), "base_nll_squares": sum(loss**2 for loss in base), "same_top": 2}
    found |= {"nll_products": sum(a * b for a, b in zip(losses, base, strict=True))}
    shifts = [math.exp(-a) - math.exp(-b) for a, b in zip(losses, base, strict=True)]
    return found | {
        "shift_squares": sum(shift**2 for shift in shifts),
        "kl": kl,
        "kl_sum": sum(kl),
        "kl_squares": sum(value**2 for value in kl),
    }


def test_perplexity_is_over_tokens_not_over_windows() -> None:
    found = task_figures([window([1.0, 2.0, 3.0]), window([4.0])])
    assert found["tokens"] == 4
    assert found["perplexity"] == pytest.approx(math.exp(2.5))
    spread = math.sqrt((1 + 4 + 9 + 16) / 4 - 2.5**2)
    assert found["perplexity_stderr"] == pytest.approx(math.exp(2.5) * spread / math.sqrt(3))


def test_divergence_has_the_definitions_of_llama_perplexity() -> None:
    own, base, kl = [1.0, 2.0, 3.0], [1.5, 1.5, 2.0], [0.1, 0.2, 0.6]
    found = task_figures([window(own, base, kl)])
    assert found["kl"] == pytest.approx(0.3)
    assert found["kl_median"] == pytest.approx(0.2)
    assert found["kl_max"] == 0.6
    assert found["same_top"] == pytest.approx(2 / 3)
    assert found["ln_ratio"] == pytest.approx(1 / 3)
    assert found["reference_perplexity"] == pytest.approx(math.exp(5 / 3))
    differences = [a - b for a, b in zip(own, base, strict=True)]
    spread = sum(d**2 for d in differences) / 3 - (sum(differences) / 3) ** 2
    assert found["ln_ratio_stderr"] == pytest.approx(math.sqrt(spread / 2)), "the error of a paired difference"


def test_nothing_diverges_from_itself() -> None:
    same = task_figures([window([1.0, 2.0], [1.0, 2.0], [0.0, 0.0])])
    assert (same["kl"], same["kl_stderr"], same["ln_ratio"], same["ln_ratio_stderr"]) == (0.0, 0.0, 0.0, 0.0)


def test_models_are_compared_on_the_items_that_both_have() -> None:
    theirs = [case(str(i), 1.0, chosen=0) for i in range(10)]
    own = [case(str(i), float(i > 3), chosen=int(i <= 3), model="o") for i in range(8)]
    own += [case("99", 1.0, chosen=0, model="o"), {**case("9", None, model="o"), "failed": "x"}]
    found = compared(theirs, own)["t"]
    assert (found["n"], found["gained"], found["lost"]) == (8, 0, 4)
    assert found["same_answer"] == 0.5
    assert found["p_value"] == pytest.approx(2 / 16)


def answers(*found: str, model: str = "m") -> list[Case]:
    """All of them wrong."""
    return [case(str(number), 0.0, found=text, text=text, model=model) for number, text in enumerate(found)]


def test_two_different_wrong_answers_are_not_the_same_answer() -> None:
    found = compared(answers("1", "2", "3", "4"), answers("1", "5", "6", "7", model="o"))["t"]
    assert (found["same_answer"], found["gained"], found["lost"]) == (0.25, 0, 0)


def test_where_neither_has_an_answer_there_is_none_to_be_the_same() -> None:
    assert compared(answers("1", "", ""), answers("1", "", "2", model="o"))["t"]["same_answer"] == 0.5
    assert "same_answer" not in compared(answers(""), answers("", model="o"))["t"]


def test_of_what_has_no_answer_to_extract_none_is_the_same() -> None:
    found = compared([case("1", None), case("2", 0.0)], [case("1", None, model="o"), case("2", 0.0, model="o")])["t"]
    assert "same_answer" not in found
    assert found["n"] == 2


def test_other_setups_are_not_compared() -> None:
    theirs, own = case("1", 1.0, chosen=0), case("1", 1.0, chosen=0, model="o")
    assert compared([theirs | {"setup": "5 shots"}], [own]) == {}


def test_answers_drift_from_a_reference_and_equal_ones_do_not() -> None:
    theirs = [case("1", 1.0, text="a"), case("2", 0.0, text="b")]
    own = [case("1", 1.0, text="a", model="o"), case("2", 0.0, text="c", model="o")]
    found = figures(
        [*theirs, *own], "m", lambda one, other: [1.0 if a == b else 0.5 for a, b in zip(one, other, strict=True)]
    )
    against = found["against_reference"]["o"]["t"]
    assert against["same_text"] == 0.5
    assert against["drift"]["similarity_mean"] == 0.75
    assert against["drift"]["share_near"] == 0.5
    assert "drift" not in figures([*theirs, *own], "m")["against_reference"]["o"]["t"]


def test_a_lone_model_is_compared_with_nobody() -> None:
    assert set(figures([case("1", 1.0)], "m")) == {"models"}


def test_a_mean_has_the_normal_interval() -> None:
    found = average([0.0, 0.5, 1.0])
    assert found["value"] == 0.5
    assert found["stderr"] == pytest.approx(0.5 / math.sqrt(3))
    assert found["high"] - found["value"] == pytest.approx(1.959964 * found["stderr"])
