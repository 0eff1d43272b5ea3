"""Each instruction is met by an answer that keeps to it, and not by one that nearly does."""

from __future__ import annotations

from typing import Any

import pytest

from edge_llm.bench.accuracy.instructions import _CHECKS, follows, sentences, words
from edge_llm.bench.accuracy.items import Instruction
from edge_llm.errors import ConfigError

CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["red", "blue"]}, "Blue and RED.", "Blue alone."),
    ("keywords:frequency", {"keyword": "go", "relation": "at least", "frequency": 2}, "Go, go!", "Go."),
    ("keywords:frequency", {"keyword": "go", "relation": "less than", "frequency": 2}, "Go.", "Go, go!"),
    ("keywords:forbidden_words", {"forbidden_words": ["can"]}, "A canal.", "Yes we CAN."),
    (
        "keywords:letter_frequency",
        {"letter": "Q", "let_relation": "at least", "let_frequency": 2},
        "Quite queer.",
        "Quite odd.",
    ),
    ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 3}, "One. Two!", "A. B. C"),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 3}, "one two-three", "one two"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***one *** two", "one *** *** two"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        "First.\n\n'then, we went.",
        "Then.\n\nFirst.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] at [place]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Hi.\nP.S. Bye", "Hi.\nPS Bye"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Hi.\nP.P.S Bye", "Hi.\nP.S. Bye"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n- two", "* one\n**two**"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and **"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION 1\na\nSECTION b",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<A day>>\nIt rained.", "<< >>\nIt rained."),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. It.", "I say it."),
    ("startend:end_checker", {"end_phrase": "The end."}, 'So. "the end."', "The end. Or not"),
    ("startend:quotation", {}, '"quoted"', '"quoted" not'),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "at least", "capital_frequency": 2},
        "GO AWAY now",
        "GO away",
    ),
    ("change_case:english_capital", {}, "ALL OF IT.", "ALL of IT."),
    ("change_case:english_lowercase", {}, "all of it.", "All of it."),
    ("punctuation:no_comma", {}, "None here.", "One, here."),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES, ids=[case[0] for case in CASES])
def test_an_instruction_is_kept_or_broken(name: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    assert follows(Instruction(name, arguments), good, "q")
    assert not follows(Instruction(name, arguments), bad, "q")


def test_every_kind_is_tried() -> None:
    assert {case[0] for case in CASES} == set(_CHECKS)
    assert len(_CHECKS) == 24


def test_an_empty_answer_follows_nothing() -> None:
    assert not follows(Instruction("punctuation:no_comma"), " \n", "q")


def test_the_prompt_itself_is_repeated_where_no_other_text_is_given() -> None:
    assert follows(Instruction("combination:repeat_prompt"), "Who are you? I am.", "Who are you?")


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("punctuation:no_colon", {}, "unknown instruction"),
        ("keywords:existence", {}, "keywords"),
        ("length_constraints:number_words", {"relation": "about", "num_words": 3}, "relation"),
    ],
)
def test_an_instruction_that_cannot_be_checked_is_an_error(name: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        follows(Instruction(name, arguments), "text", "q")


def test_sentences_and_words_are_counted_plainly() -> None:
    assert sentences('He said "no." Then he left! Why? Because') == 4
    assert sentences("") == 0
    assert words("don't stop - now") == 4
