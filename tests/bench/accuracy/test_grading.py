"""What an answer is worth, case by case."""

from __future__ import annotations

from typing import Any

import pytest

from edge_llm.bench.accuracy.grading import choice, instructions, last_word, number, truth
from edge_llm.bench.accuracy.items import Instruction, Item


def scores(*logprobs: float) -> list[dict[str, Any]]:
    return [{"logprob": logprob, "tokens": 1, "is_greedy": False} for logprob in logprobs]


def test_a_long_choice_may_be_right_per_character_only() -> None:
    item = Item("x", {}, ("yes", "a much longer answer"), (1,))
    found = choice(item, scores(-3.0, -10.0))
    assert (found["acc"], found["acc_norm"]) == (0.0, 1.0)
    assert (found["chosen"], found["chosen_norm"], found["n_choices"]) == (0, 1, 2)


def test_the_first_of_equals_is_chosen() -> None:
    assert choice(Item("x", {}, ("a", "b"), (1,)), scores(-1.0, -1.0))["chosen"] == 0


def test_mc1_asks_for_the_best_answer_and_mc2_for_the_mass_of_all_right_ones() -> None:
    item = Item("x", {}, ("best", "good", "bad", "worse"), (0, 1))
    found = truth(item, scores(-1000.0, -999.0, -1001.0, -1001.0))
    assert found["acc"] == 1.0, "a better second right answer takes nothing away"
    assert found["n_choices"] == 3
    assert found["mc2"] == pytest.approx((1 + 2.718281828) / (1 + 2.718281828 + 2 / 2.718281828))
    assert truth(item, scores(-5.0, -1.0, -5.0, -9.0))["acc"] == 0.0, "an incorrect one is as likely"


def test_a_last_word_is_right_when_greedy_decoding_says_it() -> None:
    found = last_word({"logprob": -2.5, "tokens": 2, "is_greedy": True})
    assert found == {"acc": 1.0, "logprob": -2.5, "tokens": 2}


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("So 3 * 4 = 12.\n#### 12", 1.0, 1.0),
        ("#### 12.00", 1.0, 1.0),
        ("That makes $12.", 0.0, 1.0),
        ("#### 12\nor is it 13", 1.0, 0.0),
        ("#### 1,2", 1.0, 1.0),
        ("-12", 0.0, 0.0),
        ("120", 0.0, 0.0),
        ("no idea", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_the_last_number_is_compared_as_a_number(text: str, strict: float, flexible: float) -> None:
    found = number(Item("x", {}, answer="3 * 4 = <<3*4=12>>12\n#### 12"), text)
    assert (found["acc"], found["acc_flexible"]) == (strict, flexible)


def test_thousands_and_signs_do_not_matter() -> None:
    assert number(Item("x", {}, answer="#### 1,234"), "It is $1234.00 in all.\n#### 1234")["acc"] == 1.0
    assert number(Item("x", {}, answer="#### -5"), "#### -5.")["acc"] == 1.0


def test_a_prompt_with_an_instruction_that_is_not_checked_is_no_right_or_wrong_one() -> None:
    comma, language = Instruction("punctuation:no_comma"), Instruction("language:response_language", {"language": "de"})
    item = Item("x", {"question": "q"}, instructions=(comma, language))
    found = instructions(item, "Keine Kommas hier.")
    assert found == {"strict": [True], "loose": [True], "unchecked": 1, "acc": None, "acc_loose": None}


def test_a_preface_is_forgiven_loosely() -> None:
    item = Item("x", {"question": "q"}, instructions=(Instruction("punctuation:no_comma"),))
    found = instructions(item, "Sure, here it is:\nNo commas.")
    assert (found["acc"], found["acc_loose"]) == (0.0, 1.0)
