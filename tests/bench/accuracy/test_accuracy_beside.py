"""llama-perplexity's figures beside ours: what is compared, what is judged, and what happens when it cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_llm.bench.accuracy.beside import Beside, compared, missed
from edge_llm.bench.accuracy.llama_perplexity import Said
from edge_llm.bench.accuracy.measure import Measured, Plan
from edge_llm.bench.accuracy.tasks import TASKS
from edge_llm.bench.engine import BenchModel
from edge_llm.bench.processes import MeasureFailed
from edge_llm.bench.record import ModelFacts, Process
from edge_llm.bench.reference_tools import Manifest, ToolTree
from edge_llm.bench.run import Run

TREE = ToolTree(Path("tools"), Manifest("llama-cpp-python 0", "ours", (), "c++", "cpu"))
ONE, TWO = (BenchModel(Path(f"{n}.gguf"), ModelFacts(n, f"{n}.gguf", f"sha-{n}", 1, "Q4_0")) for n in ("one", "two"))
FACTS = {"vocab_size": 100, "build": {"repacked_tensors": "0"}}
CHUNK = "   1  45.8 ± 11.4  0.1 ± 0.06  0.26 ± 0.01  8.4 ± 0.8 %  67.7 ± 4.1 %\n"


class Tool:
    """Says what llama-perplexity would of three windows, and keeps how it was asked."""

    def __init__(self, perplexity: float = 20.0, kl: float = 0.1, leaves_logits: bool = True) -> None:
        self.perplexity, self.kl, self.leaves_logits = perplexity, kl, leaves_logits
        self.asked: list[Sequence[str]] = []
        self.text = b""

    def __call__(
        self, command: Sequence[str], environment: Mapping[str, str], cores: Sequence[int], deadline_s: float
    ) -> tuple[str, Process]:
        self.asked.append(command)
        used = Process("llama-perplexity", (), 1.0, 1.0, 0, 0, 0)
        if "--kl-divergence" in command:
            means = f"Mean PPL(Q)  :  {self.perplexity:.6f} ±  1.0\nMean PPL(base)  :  19.0 ±  1.0\n"
            return (
                CHUNK * 3 + means + f"Mean    KLD:   {self.kl:.6f} ±   0.009870\nSame top p: 68.110 ± 2.930 %\n",
                used,
            )
        self.text = Path(command[command.index("-f") + 1]).read_bytes()
        if "--kl-divergence-base" in command and self.leaves_logits:
            Path(command[command.index("--kl-divergence-base") + 1]).write_bytes(b"logits")
        return "".join(f"{at * 256:>8}  {self.perplexity:.4f}  2.995732  0.1\n" for at in range(3)), used


def figures(**changes: Any) -> dict[str, Any]:
    own = {"n": 3, "failed": 0, "tokens": 381, "perplexity": 20.02} | changes
    return {"models": {"one": {"own_prose": own}, "two": {"own_prose": own | {"kl": 0.101, "same_top": 0.68}}}}


def go(tool: Tool, found: Measured, folder: Path, own: dict[str, Any], reference: BenchModel | None = ONE) -> Beside:
    beside = Beside(TREE, Plan((TASKS["own_prose"], TASKS["own_choice"])), tool)
    models = [ONE] if reference is None else [TWO, ONE]
    beside.measure(models, reference, found, own, lambda what, done, total: None, folder)
    return beside


def measured() -> Measured:
    return Measured(Run("accuracy", ["test"], {}, idle_s=0.0), facts={"one": FACTS, "two": FACTS})


def test_the_reference_goes_first_and_the_other_model_is_compared_with_what_it_left(tmp_path: Path) -> None:
    tool, found = Tool(), measured()
    beside = go(tool, found, tmp_path, figures())
    assert [Path(command[command.index("-m") + 1]).stem for command in tool.asked] == ["one", "two"]
    assert beside.found["one"]["own_prose"]["perplexity"] == {
        "ours": 20.02,
        "llama_perplexity": 20.0,
        "ratio": pytest.approx(1.001),
    }
    assert beside.found["two"]["own_prose"]["kl"]["ratio"] == pytest.approx(1.01)
    assert missed(beside.figures()) == []
    assert [case["case"] for case in found.run.cases] == [
        "one/own_prose/llama-perplexity",
        "two/own_prose/llama-perplexity",
    ]
    assert list(tmp_path.iterdir()) == [tmp_path / "text"]
    assert "llama.cpp tools, tree ours" in [engine.name for engine in found.run.engines]


def test_it_reads_the_text_that_we_read(tmp_path: Path) -> None:
    tool = Tool()
    go(tool, measured(), tmp_path, figures())
    page = Path("edge_llm/bench/data/accuracy/prose.txt")
    source = Path(__file__).parents[3] / page
    assert tool.text.removesuffix(b"\n") == source.read_bytes().removesuffix(b"\n")
    assert tool.text.endswith(b"\n")


def test_a_lone_model_keeps_no_probabilities(tmp_path: Path) -> None:
    tool = Tool()
    beside = go(tool, measured(), tmp_path, figures(), reference=None)
    assert "--kl-divergence-base" not in tool.asked[0]
    assert beside.found["one"]["own_prose"].keys() == {"windows", "window_tokens", "perplexity"}


def test_what_is_farther_than_the_bars_is_named_with_both_figures(tmp_path: Path) -> None:
    beside = go(Tool(perplexity=20.2, kl=0.104), measured(), tmp_path, figures())
    lines = missed(beside.figures())
    assert len(lines) == 3
    assert "perplexity of one on own_prose is not within 0.5 %" in lines[0]
    assert "20.02 for 20.2" in lines[0]
    assert any(line.startswith("kl of two") and "2 %" in line for line in lines)


def test_a_divergence_that_its_16_bits_drown_is_shown_but_not_judged() -> None:
    own = {"perplexity": 20.0, "kl": 0.0002}
    pair = compared(own, Said(20.0, kl=0.0001))
    assert pair["kl"]["ratio"] == pytest.approx(2.0)
    assert missed({"against_llama_perplexity": {"models": {"m": {"t": pair}}}}) == []


def test_a_divergence_of_nothing_has_no_ratio() -> None:
    assert compared({"perplexity": 1.0, "kl": 0.0}, Said(1.0, kl=0.0))["kl"]["ratio"] is None


def test_windows_of_ours_that_failed_are_compared_with_nothing(tmp_path: Path) -> None:
    tool, found = Tool(), measured()
    beside = go(tool, found, tmp_path, figures(failed=1))
    assert tool.asked == []
    assert beside.found == {}
    assert [failure.what for failure in found.run.failures] == [
        "llama-perplexity on one, own_prose",
        "llama-perplexity on two, own_prose",
    ]


def test_a_tool_that_fails_on_the_reference_leaves_nothing_to_compare_with(tmp_path: Path) -> None:
    found = measured()
    beside = go(Tool(leaves_logits=False), found, tmp_path, figures())
    assert list(beside.found) == ["one"]
    assert "no probabilities" in found.run.failures[0].why


def test_a_file_that_the_disk_cannot_hold_is_refused_before_it_is_written(tmp_path: Path) -> None:
    tool, found = Tool(), measured()
    found.facts["one"] = FACTS | {"vocab_size": 1 << 50}
    go(tool, found, tmp_path, figures())
    assert tool.asked == []
    assert "fewer --windows" in found.run.failures[0].why


def test_a_tool_that_ends_is_a_failure_of_the_run(tmp_path: Path) -> None:
    def broken(*_: Any) -> tuple[str, Process]:
        raise MeasureFailed("llama-perplexity ended with status 1: it said nothing")

    found = measured()
    beside = Beside(TREE, Plan((TASKS["own_prose"],)), broken)
    beside.measure([ONE], None, found, figures(), lambda what, done, total: None, tmp_path)
    assert "status 1" in found.run.failures[0].why
