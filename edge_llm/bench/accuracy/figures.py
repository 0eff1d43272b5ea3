"""Cases of accuracy -> figures: shares with errors and intervals, chance, perplexity, divergence, drift. Pure.

Owns what a run's figures mean; they are computed from the cases alone, so that they can be computed again from the
lines beside a record. Refuses to know models, prompts and where cases come from.

`acc` and its kin are shares of items: standard error sqrt(p (1 - p) / (n - 1)), Wilson's 95 % interval. `p_value` is
of an exact two-sided binomial test against `chance`, the mean of 1 / choices; where items differ in their number of
choices it is a little too large, never too small. Items that failed are counted apart and are in no share.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from edge_llm.bench.stats import deviation, mean, percentile, wilson

Case = Mapping[str, Any]
Figures = dict[str, Any]
Cosines = Callable[[Sequence[str], Sequence[str]], list[float]]
SHARES: Final = ("acc", "acc_norm", "acc_flexible", "acc_loose")
SIGNIFICANT: Final = 0.05
_Z: Final = 1.959964
# An answer that MiniLM calls this near is one that says the same, mostly; a mark to count by, not a truth.
NEAR: Final = 0.8


def figures(cases: Sequence[Case], reference: str | None = None, cosines: Cosines | None = None) -> Figures:
    """By model and task. `reference`: the model that others are compared with."""
    models = list(dict.fromkeys(case["model"] for case in cases))
    found: Figures = {"models": {model: _by_task([c for c in cases if c["model"] == model]) for model in models}}
    if reference is None or len(models) < 2:
        return found
    found["reference"] = reference
    found["against_reference"] = {
        model: compared(_of(cases, reference), _of(cases, model), cosines) for model in models if model != reference
    }
    return found


def task_figures(cases: Sequence[Case]) -> Figures:
    """Of one model and one task."""
    good = [case for case in cases if "failed" not in case]
    found: Figures = {"n": len(good), "failed": len(cases) - len(good)}
    if not good:
        return found
    if "nll" in good[0]:
        return found | perplexity(good) | (divergence(good) if "kl" in good[0] else {})
    for key in SHARES:
        values = [case[key] for case in good if case.get(key) is not None]
        if values:
            found[key] = share(values)
    if "mc2" in good[0]:
        found["mc2"] = average([case["mc2"] for case in good])
    if "n_choices" in good[0]:
        found |= _chance(good)
    if "logprob" in good[0]:
        words = [-case["logprob"] for case in good]
        found["word_perplexity"] = math.exp(mean(words))
    if "strict" in good[0]:
        found |= _instructions(good)
    return found


def share(values: Sequence[float]) -> Figures:
    """Of items that are right (1.0) or not (0.0)."""
    n, right = len(values), int(sum(values))
    p = right / n
    low, high = wilson(right, n)
    return {"value": p, "stderr": math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None, "low": low, "high": high, "n": n}


def average(values: Sequence[float]) -> Figures:
    """A mean with the normal interval."""
    middle, error = mean(values), deviation(values) / math.sqrt(len(values))
    return {"value": middle, "stderr": error, "low": middle - _Z * error, "high": middle + _Z * error, "n": len(values)}


def binomial_p(successes: int, n: int, chance: float) -> float:
    """Exact two-sided test: the probability of everything that is no likelier than what was seen."""
    if not 0.0 < chance < 1.0:
        return 1.0 if successes == round(chance * n) else 0.0
    logs = [
        math.lgamma(n + 1)
        - math.lgamma(k + 1)
        - math.lgamma(n - k + 1)
        + k * math.log(chance)
        + (n - k) * math.log1p(-chance)
        for k in range(n + 1)
    ]
    limit = logs[successes] + 1e-7
    return min(1.0, math.fsum(math.exp(log) for log in logs if log <= limit))


def perplexity(cases: Sequence[Case]) -> Figures:
    """Over all scored tokens, with llama-perplexity's standard error."""
    count = sum(case["count"] for case in cases)
    nll, error = _mean_and_error(_total(cases, "nll"), _total(cases, "nll_squares"), count)
    return {"tokens": count, "perplexity": math.exp(nll), "perplexity_stderr": math.exp(nll) * error}


def divergence(cases: Sequence[Case]) -> Figures:
    """From the reference model, with llama-perplexity's definitions."""
    count = sum(case["count"] for case in cases)
    kl, kl_error = _mean_and_error(_total(cases, "kl_sum"), _total(cases, "kl_squares"), count)
    own, own_error = _mean_and_error(_total(cases, "nll"), _total(cases, "nll_squares"), count)
    base, base_error = _mean_and_error(_total(cases, "base_nll"), _total(cases, "base_nll_squares"), count)
    together = (_total(cases, "nll_products") / count - own * base) / max(1, count - 1)
    values = [value for case in cases for value in case["kl"]]
    top = _total(cases, "same_top") / count
    return {
        "kl": kl,
        "kl_stderr": kl_error,
        "kl_median": percentile(values, 0.5),
        "kl_p99": percentile(values, 0.99),
        "kl_max": max(values),
        "same_top": top,
        "same_top_stderr": math.sqrt(top * (1 - top) / max(1, count - 1)),
        "shift_rms": math.sqrt(_total(cases, "shift_squares") / count),
        "reference_perplexity": math.exp(base),
        "ln_ratio": own - base,
        "ln_ratio_stderr": math.sqrt(max(0.0, own_error**2 + base_error**2 - 2 * together)),
    }


def compared(reference: Sequence[Case], own: Sequence[Case], cosines: Cosines | None = None) -> Figures:
    """On the items that both have: how often they agree, who is right more often, how far answers drifted."""
    found: Figures = {}
    for task in dict.fromkeys(case["task"] for case in own):
        theirs = {case["item"]: case for case in reference if case["task"] == task and "failed" not in case}
        both = [(theirs[case["item"]], case) for case in own if case["task"] == task and case["item"] in theirs]
        both = [(a, b) for a, b in both if "failed" not in b and a["setup"] == b["setup"]]
        if both and "acc" in both[0][0]:
            found[task] = _flips(both)
        if both and "text" in both[0][0]:
            found[task] |= _drift([a["text"] for a, _ in both], [b["text"] for _, b in both], cosines)
    return found


def _flips(both: Sequence[tuple[Case, Case]]) -> Figures:
    """`p_value`: McNemar's exact test on the items that one of them alone has right."""
    judged = [(a, b) for a, b in both if a["acc"] is not None and b["acc"] is not None]
    gained, lost = sum(b["acc"] > a["acc"] for a, b in judged), sum(b["acc"] < a["acc"] for a, b in judged)
    return {
        "n": len(both),
        **_same_answer(both),
        "gained": gained,
        "lost": lost,
        "p_value": binomial_p(gained, gained + lost, 0.5) if gained + lost else 1.0,
    }


def _same_answer(both: Sequence[tuple[Case, Case]]) -> Figures:
    """Share of items, but for those where neither answer has anything to extract. Nothing where a case does not say
    what was answered: two answers that are wrong, or both not judged, are not the same for that."""
    key = next((key for key in ("chosen", "found") if all(key in case for pair in both for case in pair)), None)
    if key is None:
        return {}
    said = [(a[key], b[key]) for a, b in both if a[key] not in (None, "") or b[key] not in (None, "")]
    return {"same_answer": sum(one == other for one, other in said) / len(said)} if said else {}


def _drift(theirs: Sequence[str], own: Sequence[str], cosines: Cosines | None) -> Figures:
    found: Figures = {"same_text": sum(a == b for a, b in zip(theirs, own, strict=True)) / len(own)}
    if cosines is not None:
        near = cosines(theirs, own)
        found["drift"] = {
            "similarity_mean": mean(near),
            "similarity_p5": percentile(near, 0.05),
            "share_near": sum(value >= NEAR for value in near) / len(near),
            "n": len(near),
        }
    return found


def _chance(cases: Sequence[Case]) -> Figures:
    chance = mean([1 / case["n_choices"] for case in cases])
    right = int(sum(case["acc"] for case in cases))
    p_value = binomial_p(right, len(cases), chance)
    found: Figures = {"chance": chance, "p_value": p_value, "differs_from_chance": p_value < SIGNIFICANT}
    places = Counter(case["gold"][0] for case in cases if case["gold"])
    if "mc2" not in cases[0] and places:
        found["majority"] = max(places.values()) / len(cases)  # what always choosing one place would get
    return found


def _instructions(cases: Sequence[Case]) -> Figures:
    strict = [float(good) for case in cases for good in case["strict"]]
    loose = [float(good) for case in cases for good in case["loose"]]
    found: Figures = {"instructions_unchecked": sum(case["unchecked"] for case in cases)}
    return found | ({"instructions": share(strict), "instructions_loose": share(loose)} if strict else {})


def _by_task(cases: Sequence[Case]) -> Figures:
    return {
        task: task_figures([case for case in cases if case["task"] == task])
        for task in dict.fromkeys(case["task"] for case in cases)
    }


def _of(cases: Sequence[Case], model: str) -> list[Case]:
    return [case for case in cases if case["model"] == model]


def _total(cases: Sequence[Case], key: str) -> float:
    return math.fsum(case[key] for case in cases)


def _mean_and_error(total: float, squares: float, count: int) -> tuple[float, float]:
    middle = total / count
    spread = squares / count - middle**2
    return middle, math.sqrt(spread / (count - 1)) if spread > 0 and count > 1 else 0.0
