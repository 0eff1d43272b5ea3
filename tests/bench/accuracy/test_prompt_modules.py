"""A prompt is what its modules say: each is hashed and can be swapped, and the answer is in none of them."""

from __future__ import annotations

import pytest

from edge_llm.bench.accuracy.items import Item
from edge_llm.bench.accuracy.prompts import KINDS, Module, Prompt, context, shown
from edge_llm.bench.accuracy.tasks import TASKS, asked, chosen, pairs
from edge_llm.errors import ConfigError

ITEM = Item(
    "x/1", {"question": "Which is red?", "subject": "plain_colours"}, ("a leaf", "a rose"), (1,), answer="a rose"
)
OTHER = Item("x/2", {"question": "Which is green?", "subject": "plain_colours"}, ("a leaf", "a rose"), (0,), answer="4")


def test_choices_are_asked_behind_one_context_without_the_answer() -> None:
    task = TASKS["arc_easy"]
    assert pairs(task, ITEM, []) == [
        ["Question: Which is red?\nAnswer:", " a leaf"],
        ["Question: Which is red?\nAnswer:", " a rose"],
    ]


def test_examples_stand_before_the_item_with_their_answers() -> None:
    (first, _), _ = pairs(TASKS["arc_easy"], ITEM, [OTHER])
    assert first == "Question: Which is green?\nAnswer: a leaf\n\nQuestion: Which is red?\nAnswer:"


def test_mmlu_shows_the_choices_and_asks_for_a_letter() -> None:
    (before, first), (_, second) = pairs(TASKS["mmlu"], ITEM, [OTHER])
    assert before == (
        "The following are multiple choice questions (with answers) about plain colours.\n\n"
        "Which is green?\nA. a leaf\nB. a rose\nAnswer: A\n\n"
        "Which is red?\nA. a leaf\nB. a rose\nAnswer:"
    )
    assert (first, second) == (" A", " B")


def test_winogrande_scores_one_end_behind_two_contexts() -> None:
    item = Item("w/1", {"question": ""}, ("ran away.",) * 2, (0,), contexts=("So Ann", "So Bob"))
    assert pairs(TASKS["winogrande"], item, []) == [["So Ann", " ran away."], ["So Bob", " ran away."]]
    assert pairs(TASKS["winogrande"], item, [item])[1][0] == "So Ann ran away.\n\nSo Bob"


def test_the_examples_of_truthfulqa_are_a_module_of_their_own() -> None:
    before = pairs(TASKS["truthfulqa"], ITEM, [])[0][0]
    assert before.startswith("Q: What is human life expectancy")
    assert before.endswith("Barcelona, Spain.\n\nQ: Which is red?\nA:")


def test_a_generated_answer_is_asked_for_with_the_system_text_apart() -> None:
    task = TASKS["gsm8k"]
    prompt = task.prompt.swapped(Module("system", "polite", "Be brief."))
    system, text = asked(type(task)(task.name, task.kind, prompt), OTHER, [])
    assert system == "Be brief."
    assert "Be brief." not in text
    assert text.endswith("Question: Which is green?\nAnswer:")


def test_a_swapped_module_changes_the_hash_and_only_its_own_part() -> None:
    before = TASKS["mmlu"].prompt
    after = before.swapped(Module("task", "mine", "Choose a letter."))
    assert before.sha256 != after.sha256
    assert after.text("format") == before.text("format")
    assert context(after, ITEM, []).startswith("Choose a letter.\n\nWhich is red?")
    assert after.swapped(Module("task", "other name", before.text("task"))).sha256 == before.sha256, "texts, not names"


def test_moving_a_text_to_another_kind_is_another_prompt() -> None:
    hashes = {Prompt((Module(kind, "x", "the same text"),)).sha256 for kind in KINDS}
    assert len(hashes) == len(KINDS)


def test_braces_in_data_are_data() -> None:
    item = Item("x/3", {"question": "What is {choices} in C?"}, ("{}", "{0}"), (0,))
    assert shown(item, "{question}\n{choices}") == "What is {choices} in C?\nA. {}\nB. {0}"


@pytest.mark.parametrize("layout", ["{passage}", "{question", "{0}", "{question.x}"])
def test_a_format_that_does_not_fit_names_the_fields_there_are(layout: str) -> None:
    with pytest.raises(ConfigError, match="question"):
        shown(ITEM, layout)


def test_instructions_have_no_examples() -> None:
    with pytest.raises(ConfigError, match="--shots 0"):
        asked(TASKS["ifeval"], ITEM, [OTHER])


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="arc_easy"):
        chosen(["arc_hard"])
    assert [task.name for task in chosen(["piqa", "piqa", "mmlu"])] == ["piqa", "mmlu"]
