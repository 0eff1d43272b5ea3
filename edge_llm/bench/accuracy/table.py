"""Figures of accuracy as people read them: rows, what each measure in them means, how each task was asked. Pure.

Owns the definitions that are printed with the numbers (of the measures shown, and no others), and the warning that our
own small sets rank nothing. Refuses to know how a figure is computed (figures.py) and where it is printed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from edge_llm.bench.accuracy.beside import DEFINITIONS as BESIDE
from edge_llm.bench.accuracy.figures import NEAR, SIGNIFICANT
from edge_llm.bench.accuracy.measure import Plan
from edge_llm.bench.accuracy.tasks import OWN, Task

Row = tuple[str, ...]
HEAD: Final[Row] = ("model", "task", "measure", "value", "+-", "95 %", "n", "against chance")
RANKS_NOTHING: Final = "ranks nothing"
_HASH_CHARS: Final = 8
_BESIDE: Final = " / llama-perplexity's"
_ERROR: Final = "+-"
_INTERVAL: Final = "95 %"
_CHANCE: Final = "against chance"
DEFINITIONS: Final[Mapping[str, str]] = {
    "acc": "share of right items. Of choices: the one of the highest log-likelihood is right; of numbers: the last one "
    "behind #### is; of instructions: all of an item are kept; of a last word: greedy decoding says it",
    "acc_norm": "the same, by log-likelihood per character of the choice",
    "acc_flexible": "the same, by the last number of the answer, wherever it stands",
    "acc_loose": "the same, where an answer also counts without its first or last line, or without asterisks",
    "mc2": "probability of the true choices over that of all choices (TruthfulQA)",
    "instructions": "share of single instructions that are kept, of all that can be checked",
    "instructions_loose": "the same, where an answer also counts without its first or last line, or without asterisks",
    "perplexity": "exp of the mean negative log-likelihood of a token, over the second half of each window, as "
    "llama-perplexity counts; lower is better, and only the same text and tokenizer can be compared",
    "KL from reference": "mean over tokens of KL(reference model || this one), in nats; 0: the same",
    "same likeliest token": "share of tokens whose likeliest next one is the reference model's",
    "perplexity of words": "exp of the mean negative log-likelihood of a whole last word",
    "failed": "items that could not be asked (too long, mostly); they are in no share",
    "same as reference": "share of items that are answered as the reference model does, right or wrong; gained, lost: "
    "items that only this one has right, or only the reference; p: McNemar's exact test of these",
    "same text": "share of answers that are the reference model's, letter by letter",
    "similarity": "mean cosine of an answer and the reference model's, by all-MiniLM-L6-v2; nearly the same: from "
    f"{NEAR} up. How far answers drifted, never whether they are true",
    _ERROR: "standard error",
    _INTERVAL: "interval of the share, Wilson's (mc2: normal)",
    _CHANCE: "exact two-sided binomial test against the mean of 1 / choices, which is what guessing gets; differs: p "
    f"below {SIGNIFICANT}",
}


def rows_of(figures: Mapping[str, Any]) -> list[Row]:
    """One for each model, task and measure."""
    rows = [(model, task, *row) for model, task, found in _each(figures["models"]) for row in _rows(task, found)]
    against = figures.get("against_reference", {})
    rows += [(model, task, *row) for model, task, found in _each(against) for row in _compared(found)]
    beside = figures.get("against_llama_perplexity", {}).get("models", {})
    rows += [(model, task, *row) for model, task, found in _each(beside) for row in _beside_rows(found)]
    return rows


def definitions_of(rows: Sequence[Row]) -> dict[str, str]:
    """Of what these rows have, in the order of DEFINITIONS."""
    measures = {row[HEAD.index("measure")] for row in rows}
    filled = {head for head in (_ERROR, _INTERVAL) if any(row[HEAD.index(head)] for row in rows)}
    if any(row[HEAD.index("measure")] == "acc" and row[HEAD.index(_CHANCE)] for row in rows):
        filled.add(_CHANCE)
    found = {name: text for name, text in DEFINITIONS.items() if name in measures | filled}
    return found | {f"{name}{_BESIDE}": text for name, text in BESIDE.items() if f"{name}{_BESIDE}" in measures}


def asked_of(plan: Plan) -> dict[str, dict[str, Any]]:
    """How each task is asked: what a figure depends on beside the model. Hashes are of the modules' texts, which the
    record has whole."""
    return {task.name: _asked(plan, task) for task in plan.tasks}


def _asked(plan: Plan, task: Task) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": task.kind, "is_own_set": task.name in OWN, "note": task.note}
    if task.kind == "text":
        return found | {"window": plan.window_of(task)}
    modules = {module.kind: module.sha256[:_HASH_CHARS] for module in task.prompt.modules}
    return found | {"shots": plan.shots, "seed": plan.seed, "prompt": modules}


def lines_of(figures: Mapping[str, Any]) -> list[str]:
    """A line for each task: items, examples, prompt, what is special to it."""
    lines = []
    for task, how in figures.get("tasks", {}).items():
        counts = [found[task] for found in figures["models"].values() if task in found]
        count = max((found["n"] + found["failed"] for found in counts), default=0)
        lines.append(f"{task}: {'; '.join(part for part in (_said(count, how), how['note']) if part)}")
    return lines


def _said(count: int, how: Mapping[str, Any]) -> str:
    if "window" in how:
        return f"{count} windows of {how['window']} tokens, from the beginning"
    prompt = ", ".join(f"{kind} {digest}" for kind, digest in how["prompt"].items())
    return f"{count} items, {how['shots']} examples before each, seed {how['seed']}, prompt: {prompt or 'none'}"


def sentences_of(tasks: Iterable[str]) -> list[str]:
    """What must not be overlooked."""
    own = [task for task in tasks if task in OWN]
    if not own:
        return []
    return [
        f"{', '.join(own)}: small sets of our own. They show that a model answers at all, and what requantizing it "
        "changes; they rank no models, and a share of them is nobody's benchmark, whatever it differs from"
    ]


# -- rows


def _each(tree: Mapping[str, Any]) -> Iterable[tuple[str, str, Mapping[str, Any]]]:
    return ((model, task, found) for model, tasks in tree.items() for task, found in tasks.items())


def _rows(task: str, found: Mapping[str, Any]) -> list[Row]:
    """Of one task."""
    verdict = _verdict(task, found)
    rows: list[Row] = [
        (key, *_share(value), verdict if key == "acc" else "")
        for key, value in found.items()
        if isinstance(value, Mapping)
    ]
    if "perplexity" in found:
        tokens = f"{found['tokens']:,}"
        rows.append(("perplexity", f"{found['perplexity']:.4f}", f"{found['perplexity_stderr']:.4f}", "", tokens, ""))
    if "kl" in found:
        tokens, top = f"{found['tokens']:,}", f"{100 * found['same_top']:.2f} %"
        rows.append(("KL from reference", f"{found['kl']:.6f}", f"{found['kl_stderr']:.6f}", "", tokens, ""))
        rows.append(("same likeliest token", top, f"{100 * found['same_top_stderr']:.2f} %", "", tokens, ""))
    if "word_perplexity" in found:
        rows.append(("perplexity of words", f"{found['word_perplexity']:.3f}", "", "", str(found["n"]), ""))
    if found["failed"]:
        rows.append(("failed", str(found["failed"]), "", "", "", ""))
    return rows


def _beside_rows(found: Mapping[str, Any]) -> list[Row]:
    """Ours over llama-perplexity's. What stands where others have chance are the two figures."""
    return [
        (
            f"{name}{_BESIDE}",
            f"{pair['ratio']:.5f}" if pair["ratio"] is not None else "-",
            "",
            "",
            f"{found['windows']} windows",
            f"{pair['ours']:.6g} for {pair['llama_perplexity']:.6g}",
        )
        for name, pair in found.items()
        if isinstance(pair, Mapping)
    ]


def _share(value: Mapping[str, Any]) -> tuple[str, str, str, str]:
    error = f"{100 * value['stderr']:.1f}" if value["stderr"] is not None else "-"
    interval = f"{100 * value['low']:.1f} to {100 * value['high']:.1f}"
    return f"{100 * value['value']:.1f} %", error, interval, str(value["n"])


def _verdict(task: str, found: Mapping[str, Any]) -> str:
    if "chance" not in found:
        return ""
    word = "differs" if found["differs_from_chance"] else "does not differ"
    warning = f"; own set: {RANKS_NOTHING}" if task in OWN else ""
    return f"{word} from {100 * found['chance']:.1f} % (p {found['p_value']:.2g}){warning}"


def _compared(found: Mapping[str, Any]) -> list[Row]:
    n = str(found["n"])
    words = f"{found['gained']} gained, {found['lost']} lost (p {found['p_value']:.2g})"
    same = f"{100 * found['same_answer']:.1f} %" if "same_answer" in found else "-"
    rows: list[Row] = [("same as reference", same, "", "", n, words)]
    if "same_text" in found:
        rows.append(("same text", f"{100 * found['same_text']:.1f} %", "", "", n, ""))
    if "drift" in found:
        near = found["drift"]
        words = f"{100 * near['share_near']:.0f} % say nearly the same; drift, not truth"
        rows.append(("similarity", f"{near['similarity_mean']:.3f}", "", "", n, words))
    return rows
