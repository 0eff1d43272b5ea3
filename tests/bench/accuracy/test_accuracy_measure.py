"""What was measured stays, what failed is counted, what is known is not measured again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_llm.bench.accuracy.figures import figures
from edge_llm.bench.accuracy.measure import Child, Facts, Key, Measured, Plan, key_of, measure
from edge_llm.bench.accuracy.resume import finished
from edge_llm.bench.accuracy.tasks import TASKS
from edge_llm.bench.engine import BenchModel
from edge_llm.bench.processes import MeasureFailed
from edge_llm.bench.record import ModelFacts, Process
from edge_llm.bench.run import Run
from edge_llm.errors import ConfigError

Request = dict[str, Any]


def model(name: str) -> BenchModel:
    return BenchModel(Path(f"{name}.gguf"), ModelFacts(name, f"{name}.gguf", f"sha-{name}", 1, "Q4_0"))


ONE, TWO = model("one"), model("two")


class Scripted:
    """A child that prefers the first choice, says `12` to every prompt, and does what `disturb` wants."""

    def __init__(self, disturb: Callable[[str, Request], None] = lambda operation, arguments: None) -> None:
        self.facts: dict[str, Any] = {"has_chat_template": True, "build": {"llama_cpp_python": "0"}}
        self.asked: list[tuple[str, Request]] = []
        self.is_alive = True
        self.pid = os.getpid()
        self.tokens = 600
        self.ids = "ids"
        self._disturb = disturb

    def usage(self) -> Process | None:
        return Process("scripted", (), 1.0, 1.0, 0, 0, 0) if self.is_alive else None

    def ask(self, operation: str, deadline_s: float = 600.0, **arguments: Any) -> dict[str, Any]:
        self.asked.append((operation, arguments))
        self._disturb(operation, arguments)
        if operation == "score":
            count = len(arguments["pairs"])
            return {"scores": [{"logprob": -1.0 - at, "tokens": 1, "is_greedy": True} for at in range(count)]}
        if operation == "generate":
            return {"answers": [{"text": f"#### 12 {prompt[:9]}", "tokens": 3} for prompt in arguments["prompts"]]}
        if operation == "text":
            return {"tokens": self.tokens, "ids_sha256": self.ids}
        losses = {"event": "result", "nll": 3.0, "nll_squares": 9.0, "count": 1}
        if not arguments["against"] if "against" in arguments else True:
            return losses
        extra = {"base_nll": 2.0, "base_nll_squares": 4.0, "nll_products": 6.0, "same_top": 1, "shift_squares": 0.1}
        return losses | extra | {"kl": [0.5], "kl_sum": 0.5, "kl_squares": 0.25}


class Starting:
    """Starts one scripted child for each model, and counts."""

    def __init__(self, **children: Scripted) -> None:
        self.children = children
        self.started: list[str] = []

    @contextmanager
    def _running(self, name: str) -> Iterator[Child]:
        self.started.append(name)
        yield self.children[name]

    def __call__(self, wanted: BenchModel) -> AbstractContextManager[Child]:
        return self._running(wanted.facts.name)


def run_of(folder: Path | None = None) -> Run:
    return Run("accuracy", ["test"], {}, folder=folder, idle_s=0.0)


def plan(*names: str, **changes: Any) -> Plan:
    return Plan(tuple(TASKS[name] for name in names), **({"limit": 6} | changes))


def go(wanted: Plan, start: Starting, found: Measured, folder: Path, **options: Any) -> dict[str, Any]:
    models = options.pop("models", [ONE])
    reference = options.pop("reference", None)
    return measure(wanted, models, reference, start, found, lambda what, done, total: None, folder, **options)


def known_of(measured: Measured) -> dict[Key, Facts]:
    return {key_of(case): case for case in measured.cases}


def test_each_item_is_a_case_that_says_what_it_is_of(tmp_path: Path) -> None:
    found = Measured(run_of())
    figure = go(plan("own_choice"), Starting(one=Scripted()), found, tmp_path)
    assert figure["models"]["one"]["own_choice"]["n"] == 6
    assert found.run.cases[0]["case"].startswith("one/own_choice/own_choice/")
    assert {case["setup"] for case in found.cases} == {"policy exact, K f16, 0 shots"}
    assert found.run.models == [ONE.facts]
    assert [process.name for process in found.run.processes] == ["scripted"]


def test_an_item_that_fails_is_counted_and_the_next_is_asked(tmp_path: Path) -> None:
    def fail_once(_operation: str, arguments: Request) -> None:
        if "penguin" in arguments["pairs"][1][1] or "penguin" in str(arguments["pairs"]):
            raise MeasureFailed("score one: 9 tokens do not fit")

    figure = go(plan("own_choice", limit=0), Starting(one=Scripted(fail_once)), found := Measured(run_of()), tmp_path)
    task = figure["models"]["one"]["own_choice"]
    assert (task["n"], task["failed"]) == (39, 1)
    assert [case["failed"] for case in found.cases if "failed" in case] == ["score one: 9 tokens do not fit"]


def test_a_model_whose_process_is_gone_is_a_failure_and_the_next_one_is_measured(tmp_path: Path) -> None:
    dead = Scripted()

    def die(_operation: str, _arguments: Request) -> None:
        if len(dead.asked) == 3:
            dead.is_alive = False
            raise MeasureFailed("score one ended without an answer")

    dead._disturb = die
    found = Measured(run_of())
    figure = go(plan("own_choice"), Starting(one=dead, two=Scripted()), found, tmp_path, models=[ONE, TWO])
    assert figure["models"]["one"]["own_choice"]["n"] == 2, "what it had answered stays"
    assert figure["models"]["two"]["own_choice"]["n"] == 6
    assert [failure.what for failure in found.run.failures] == ["accuracy of one"]


def test_a_task_that_cannot_be_done_takes_no_other_with_it(tmp_path: Path) -> None:
    short = Scripted()
    short.tokens = 10
    found = Measured(run_of())
    figure = go(plan("own_prose", "own_choice"), Starting(one=short), found, tmp_path)
    assert "own_prose" not in figure["models"]["one"]
    assert figure["models"]["one"]["own_choice"]["n"] == 6
    assert "less than a window of 256" in found.run.failures[0].why


def test_a_prompt_that_is_too_long_takes_no_other_of_its_batch_with_it(tmp_path: Path) -> None:
    def refuse(_operation: str, arguments: Request) -> None:
        if any("eggs" in prompt for prompt in arguments["prompts"]):
            raise MeasureFailed("too long")

    found = Measured(run_of())
    figure = go(plan("own_arithmetic", limit=0), Starting(one=Scripted(refuse)), found, tmp_path)
    task = figure["models"]["one"]["own_arithmetic"]
    assert (task["n"], task["failed"]) == (9, 1)


def test_answers_are_asked_for_by_the_chat_template_where_there_is_one(tmp_path: Path) -> None:
    plain = Scripted()
    plain.facts["has_chat_template"] = False
    start = Starting(one=Scripted(), two=plain)
    found = Measured(run_of())
    go(plan("own_arithmetic"), start, found, tmp_path, models=[ONE, TWO])
    assert [arguments["is_chat"] for _, arguments in start.children["one"].asked] == [True, True]
    assert [arguments["is_chat"] for _, arguments in plain.asked] == [False, False]
    assert {case["setup"].split(", ")[3] for case in found.cases} == {"chat", "plain"}


def test_answers_are_written_together_only_where_that_changes_none(tmp_path: Path) -> None:
    for policy, sizes in (("exact", [4, 2]), ("fast", [1] * 6)):
        child = Scripted()
        go(plan("own_arithmetic", policy=policy), Starting(one=child), Measured(run_of()), tmp_path)
        assert [len(arguments["prompts"]) for _, arguments in child.asked] == sizes


def test_what_is_known_is_not_asked_again_and_is_a_case_of_this_run(tmp_path: Path) -> None:
    before = Measured(run_of(tmp_path))
    tasks = plan("own_choice", "own_arithmetic", "own_prose")
    first = go(tasks, Starting(one=Scripted()), before, tmp_path)
    (path,) = tmp_path.glob("*.cases.jsonl")
    known = finished(path)
    assert set(known) == {key_of(case) for case in before.cases}
    again, child = Measured(run_of(), known), Scripted()
    assert go(tasks, Starting(one=child), again, tmp_path) == first
    assert [operation for operation, _ in child.asked] == ["text"], "only to know how many windows there are"
    assert len(again.run.cases) == len(before.cases)


def test_another_model_prompt_or_setup_is_measured_anew(tmp_path: Path) -> None:
    before = Measured(run_of())
    go(plan("own_choice"), Starting(one=Scripted()), before, tmp_path)
    known = known_of(before)
    for changed in (plan("own_choice", k_type="q8_0"), plan("own_choice", shots=2), plan("own_choice", policy="fast")):
        child = Scripted()
        go(changed, Starting(one=child), Measured(run_of(), known), tmp_path)
        assert len(child.asked) == 6
    child = Scripted()
    go(plan("own_choice"), Starting(two=child), Measured(run_of(), known), tmp_path, models=[TWO])
    assert len(child.asked) == 6


def test_another_build_is_measured_anew(tmp_path: Path) -> None:
    before = Measured(run_of())
    go(plan("own_choice"), Starting(one=Scripted()), before, tmp_path)
    child = Scripted()
    child.facts["build"] = {"llama_cpp_python": "1"}
    go(plan("own_choice"), Starting(one=child), Measured(run_of(), known_of(before)), tmp_path)
    assert len(child.asked) == 6


@pytest.mark.parametrize("changed", ["gsm8k/test.jsonl", "gsm8k/train_first200.jsonl"])
def test_other_data_in_the_same_place_is_measured_anew(changed: str, tmp_path: Path) -> None:
    for file in ("gsm8k/test.jsonl", "gsm8k/train_first200.jsonl"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    wanted, before = plan("gsm8k", data=tmp_path, shots=1), Measured(run_of())
    go(wanted, Starting(one=Scripted()), before, tmp_path)
    same, other = Scripted(), Scripted()
    go(wanted, Starting(one=same), Measured(run_of(), known_of(before)), tmp_path)
    (tmp_path / changed).write_text('{"question": "1 + 2?", "answer": "#### 3"}\n')
    go(wanted, Starting(one=other), Measured(run_of(), known_of(before)), tmp_path)
    assert (len(same.asked), len(other.asked)) == (0, 1)


def test_what_failed_before_is_tried_again(tmp_path: Path) -> None:
    lines = [{"model_sha256": "a", "task": "t", "item": str(n), "setup": "s"} for n in range(2)]
    path = tmp_path / "x.cases.jsonl"
    text = "\n".join(json.dumps(line) for line in [lines[0], lines[1] | {"failed": "why"}]) + '\n{"cut'
    path.write_text(text)
    assert [case["item"] for case in finished(path).values()] == ["0"]
    path.write_text("{}\n")
    with pytest.raises(ConfigError, match="no finished case"):
        finished(path)
    with pytest.raises(ConfigError, match="cannot read"):
        finished(tmp_path / "absent")


def test_a_stop_in_the_middle_leaves_the_lines_that_were_finished(tmp_path: Path) -> None:
    def interrupt(_operation: str, _arguments: Request) -> None:
        if len(child.asked) == 4:
            raise KeyboardInterrupt

    child = Scripted(interrupt)
    found = Measured(run_of(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        go(plan("own_choice"), Starting(one=child), found, tmp_path)
    (path,) = tmp_path.glob("*.cases.jsonl")
    assert len(finished(path)) == 3
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert figures(lines)["models"]["one"]["own_choice"]["n"] == 3, "figures come from lines alone"


def test_the_reference_comes_first_and_lays_down_the_logits_of_each_window(tmp_path: Path) -> None:
    start = Starting(one=Scripted(), two=Scripted())
    found = Measured(run_of())
    figure = go(plan("own_prose"), start, found, tmp_path, models=[ONE, TWO], reference=TWO)
    assert start.started == ["two", "one", "two"], "itself, then beside the other"
    assert [facts.name for facts in found.run.models] == ["two", "one"]
    assert "kl" not in figure["models"]["two"]["own_prose"]
    assert figure["models"]["one"]["own_prose"]["kl"] == 0.5
    saved = [arguments["save"] for operation, arguments in start.children["two"].asked if arguments.get("save")]
    read = [arguments["against"] for operation, arguments in start.children["one"].asked if operation == "window"]
    assert saved == read == [str(tmp_path / "logits")] * 2


def test_models_that_read_other_tokens_have_no_divergence(tmp_path: Path) -> None:
    other = Scripted()
    other.ids = "other ids"
    found = Measured(run_of())
    figure = go(
        plan("own_prose"), Starting(one=Scripted(), two=other), found, tmp_path, models=[ONE, TWO], reference=ONE
    )
    assert list(figure["models"]) == ["one"]
    assert "other tokens" in found.run.failures[0].why


def test_few_shots_stand_in_every_context(tmp_path: Path) -> None:
    child = Scripted()
    go(plan("own_choice", shots=3), Starting(one=child), Measured(run_of()), tmp_path)
    contexts = [arguments["pairs"][0][0] for _, arguments in child.asked]
    assert all(text.count("Question:") == 4 for text in contexts)
    assert len({text.rpartition("Question:")[0] for text in contexts}) == 1, "they begin alike: computed once"
