"""Data sets are read as their READMEs describe them; what is wrong with a file is said with its name and line."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_llm.bench.accuracy.datasets import SOURCES, TEXTS, read, unmarked, wiki_text
from edge_llm.bench.accuracy.grading import number
from edge_llm.bench.accuracy.instructions import UNCHECKED, follows
from edge_llm.bench.accuracy.items import Item, drawn
from edge_llm.bench.accuracy.measure import OWN_DATA, Plan, check_data, items_of
from edge_llm.bench.accuracy.sources import PUBLISHED, wanted
from edge_llm.bench.accuracy.tasks import OWN, TASKS
from edge_llm.errors import ConfigError


def own(name: str) -> list[Item]:
    return read(OWN_DATA / SOURCES[name].file, SOURCES[name].read)


def test_our_questions_have_no_favourite_place() -> None:
    items = own("own_choice")
    assert Counter(item.gold[0] for item in items) == dict.fromkeys(range(4), 10)
    assert all(len(set(item.choices)) == 4 for item in items)
    assert len({item.fields["question"] for item in items}) == 40


def test_our_word_problems_are_solved_rightly() -> None:
    items = own("own_arithmetic")
    assert len(items) == 10
    for item in items:
        steps = re.findall(r"([\d +*/-]+) = (\d+)", item.answer)
        for step, result in steps:
            first, sign, second, *rest = step.split()
            assert not rest
            found = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}[sign](
                int(first), int(second)
            )
            assert found == int(result), item.answer
        assert number(item, item.answer)["acc"] == 1.0
        assert item.answer.endswith(f"#### {steps[-1][1]}"), "the last step is the result"


def test_our_instructions_can_be_checked_and_are_not_met_by_chance() -> None:
    items = own("own_instructions")
    assert len(items) == 10
    for item in items:
        assert item.instructions
        assert not any(one.name in UNCHECKED for one in item.instructions)
        words = "Well, I would rather not. Ask ME something else, please. " + "It is cold in the snow. " * 4 + "Or not?"
        assert not all(follows(one, words, item.fields["question"]) for one in item.instructions), item.id


def test_our_page_is_long_enough_for_windows() -> None:
    assert len(wiki_text(OWN_DATA, TEXTS["own_prose"]).split()) > 700


def lines(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    path = folder / SOURCES[name].file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def items(folder: Path, name: str) -> list[Item]:
    return read(folder / SOURCES[name].file, SOURCES[name].read)


def test_each_layout_is_read(tmp_path: Path) -> None:
    lines(tmp_path, "arc_easy", [{"id": "a/0", "question": "q", "choices": ["x", "y", "z"], "answer": 2}])
    lines(tmp_path, "piqa", [{"query": "Question: dresser\n", "choices": ["x", "y"], "gold": 1}])
    lines(tmp_path, "boolq", [{"query": "Passage: p\nQuestion: q\nAnswer:", "choices": ["no", "yes"], "gold": 0}])
    lines(tmp_path, "winogrande", [{"context_options": ["So A", "So B"], "continuation": "won.", "gold": 1}])
    lines(tmp_path, "lambada", [{"context": "He said ", "continuation": "no"}])
    lines(tmp_path, "mmlu", [{"id": "m", "subject": "s", "question": " q ", "choices": [1, 2, 3, 4], "answer": 0}])
    assert items(tmp_path, "arc_easy") == [Item("a/0", {"question": "q"}, ("x", "y", "z"), (2,))]
    assert items(tmp_path, "piqa") == [Item("piqa/0", {"question": "dresser"}, ("x", "y"), (1,))]
    assert items(tmp_path, "boolq")[0].fields["question"] == "Passage: p\nQuestion: q"
    assert items(tmp_path, "winogrande")[0].contexts == ("So A", "So B")
    assert items(tmp_path, "winogrande")[0].choices == ("won.", "won.")
    assert items(tmp_path, "lambada") == [Item("lambada/0", {"question": "He said"}, answer="no")]
    assert items(tmp_path, "mmlu")[0].choices == ("1", "2", "3", "4")


def test_marks_of_wikihow_go_as_in_the_usual_harness() -> None:
    assert unmarked("[header] How to sew [title] Take thread. [step] Tie it.") == "How to sew. Take thread. Tie it."


def test_truthfulqa_has_the_best_answer_first_and_no_answer_on_both_sides(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
        'A,B,"Why, then?",It rains,"It is wet; It rains; It rains",Magic; It is wet; Luck,x\n'
    )
    (item,) = read(path, SOURCES["truthfulqa"].read)
    assert item.choices == ("It rains", "It is wet", "Magic", "Luck")
    assert item.gold == (0, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1"),
        ('{"id": "a", "question": "q", "choices": ["x"], "answer": 0}\n[]', "line 2"),
        ('\n{"id": "a"}', r"line 2 .*question"),
        ('{"id": "a", "question": "q", "choices": ["x"], "answer": "B"}', r"line 1, .*'B', not the index"),
        ('{"id": "a", "question": "q", "choices": ["x"], "answer": null}', r"line 1, .*None, not the index"),
        ('{"id": "a", "question": "q", "choices": ["x"], "answer": 1}', "not one of 1"),
        ("\n", "no items"),
        ("\xff", "cannot read"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=words) as caught:
        read(path, SOURCES["arc_easy"].read)
    assert "data.jsonl" in caught.value.message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("q,b,c," + "x" * 200_000, "is not CSV after line 1: field larger"),
        ("q,b", "line 2 is not laid out"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(row: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text(f"Question,Best Answer,Correct Answers,Incorrect Answers\n{row}\n")
    with pytest.raises(ConfigError, match=words) as caught:
        read(path, SOURCES["truthfulqa"].read)
    assert "data.csv" in caught.value.message


def test_data_that_is_missing_is_named_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"piqa\.jsonl"):
        check_data(Plan((TASKS["piqa"],), data=tmp_path))
    with pytest.raises(ConfigError, match="--data"):
        check_data(Plan((TASKS["piqa"],)))
    with pytest.raises(ConfigError, match="256 tokens does not fit into a context of 128"):
        check_data(Plan((TASKS["own_prose"],), n_ctx=128))
    with pytest.raises(ConfigError, match="--shots 0"):
        check_data(Plan((TASKS["own_instructions"],), shots=1))
    assert set(check_data(Plan(tuple(TASKS[name] for name in OWN)))) == set(OWN)


def test_a_draw_is_the_same_for_the_same_seed_and_keeps_the_order() -> None:
    everything = own("own_choice")
    some = drawn(everything, 7, seed=3)
    assert some == drawn(everything, 7, seed=3) != drawn(everything, 7, seed=4)
    assert [everything.index(item) for item in some] == sorted(everything.index(item) for item in some)
    assert drawn(everything, 0, 0) == drawn(everything, 99, 0) == everything


def test_what_is_shown_as_an_example_is_not_asked() -> None:
    asked, pool = items_of(Plan((), shots=5, limit=0), TASKS["own_choice"])
    shown = pool.examples(asked[0])
    assert len(shown) == 5
    assert shown == pool.examples(asked[-1]), "the same for all: what begins alike is computed once"
    assert {item.id for item in asked}.isdisjoint({item.id for item in shown})
    assert len(asked) == 35


@pytest.mark.parametrize("shots", [10, 11])
def test_examples_that_leave_nothing_to_ask_are_refused_before_anything_starts(shots: int) -> None:
    with pytest.raises(ConfigError, match=f"--shots {shots} leaves nothing to ask of own_arithmetic: it has 10 items"):
        check_data(Plan((TASKS["own_arithmetic"],), shots=shots))
    assert len(items_of(Plan((), shots=9), TASKS["own_arithmetic"])[0]) == 1


def test_examples_of_mmlu_are_of_the_same_subject(tmp_path: Path) -> None:
    row = {"question": "q", "choices": ["a", "b"], "answer": 0}
    lines(tmp_path, "mmlu", [{"id": f"t{s}", "subject": s, **row} for s in ("law", "art")])
    dev = tmp_path / "mmlu/mmlu_dev.jsonl"
    dev.write_text(
        "\n".join(json.dumps({"id": f"d{n}", "subject": s, **row}) for n, s in enumerate(["art", "law"] * 5))
    )
    asked, pool = items_of(Plan((), data=tmp_path, shots=2), TASKS["mmlu"])
    assert [item.id for item in pool.examples(asked[0])] == ["d1", "d3"]
    assert [item.id for item in pool.examples(asked[1])] == ["d0", "d2"]


def test_what_can_be_fetched_by_name_is_proved_by_a_hash_and_lands_where_it_is_read(tmp_path: Path) -> None:
    found = wanted(list(PUBLISHED), tmp_path)
    assert [path for _, path in found] == [tmp_path / SOURCES[name].file for name in PUBLISHED]
    for entry, _ in found:
        assert entry.sha256
        assert entry.sources[0].url
        assert re.search(r"/[0-9a-f]{40}/", entry.sources[0].url), "a commit, not a branch"
    with pytest.raises(ConfigError, match="boolq"):
        wanted(["arc_easy"], tmp_path)
