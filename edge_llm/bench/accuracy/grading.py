"""What an answer is worth: scores and texts of a model -> the facts of one case. Pure.

Owns the rules of each kind of task. `acc` takes the choice of the highest log-likelihood, `acc_norm` of the highest per
character (both lm-eval's; the first of equals wins). Refuses to know models, prompts and statistics (figures.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from edge_llm.bench.accuracy.instructions import UNCHECKED, follows, loosened
from edge_llm.bench.accuracy.items import Item

Facts = dict[str, Any]
_STRICT_NUMBER: Final = re.compile(r"#### (-?[0-9.,]+)")
_ANY_NUMBER: Final = re.compile(r"-?\$?[0-9][0-9.,]*")


def choice(item: Item, scores: Sequence[Mapping[str, Any]]) -> Facts:
    """One right answer among several."""
    logprobs = [float(score["logprob"]) for score in scores]
    sizes = [max(1, len(text)) for text in item.choices]
    chosen = _best(logprobs)
    chosen_norm = _best([logprob / size for logprob, size in zip(logprobs, sizes, strict=True)])
    return {
        "logprobs": logprobs,
        "chosen": chosen,
        "chosen_norm": chosen_norm,
        "gold": list(item.gold),
        "n_choices": len(item.choices),
        "acc": float(chosen in item.gold),
        "acc_norm": float(chosen_norm in item.gold),
    }


def truth(item: Item, scores: Sequence[Mapping[str, Any]]) -> Facts:
    """MC1: is the best answer more likely than every incorrect one; MC2: the share of the correct ones' probability."""
    logprobs = [float(score["logprob"]) for score in scores]
    right = len(item.gold)
    wrong = logprobs[right:]
    highest = max(logprobs)
    masses = [math.exp(logprob - highest) for logprob in logprobs]
    return {
        "logprobs": logprobs,
        "gold": list(item.gold),
        "n_choices": 1 + len(wrong),
        "chosen": _best([logprobs[0], *wrong]),
        "acc": float(all(logprobs[0] > logprob for logprob in wrong)),
        "mc2": math.fsum(masses[:right]) / math.fsum(masses),
    }


def last_word(score: Mapping[str, Any]) -> Facts:
    """LAMBADA: does greedy decoding say it, and how likely is it."""
    return {"acc": float(score["is_greedy"]), "logprob": float(score["logprob"]), "tokens": score["tokens"]}


def number(item: Item, text: str) -> Facts:
    """Exact match of the last number. `acc` takes the one behind ####, `acc_flexible` any that comes last."""
    wanted = _plain(_last(_STRICT_NUMBER, item.answer) or _last(_ANY_NUMBER, item.answer))
    strict, flexible = _plain(_last(_STRICT_NUMBER, text)), _plain(_last(_ANY_NUMBER, text))
    return {
        "wanted": wanted,
        "found": flexible,
        "acc": float(bool(strict) and strict == wanted),
        "acc_flexible": float(bool(flexible) and flexible == wanted),
    }


def instructions(item: Item, text: str) -> Facts:
    """IFEval, strict and loose; an instruction that is not checked here leaves the whole prompt out of `acc`."""
    checked = [one for one in item.instructions if one.name not in UNCHECKED]
    strict = [follows(one, text, item.fields["question"]) for one in checked]
    loose = [any(follows(one, form, item.fields["question"]) for form in loosened(text)) for one in checked]
    whole = len(checked) == len(item.instructions)
    return {
        "strict": strict,
        "loose": loose,
        "unchecked": len(item.instructions) - len(checked),
        "acc": float(all(strict)) if whole else None,
        "acc_loose": float(all(loose)) if whole else None,
    }


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _last(pattern: re.Pattern[str], text: str) -> str:
    found = list(pattern.finditer(text))
    if not found:
        return ""
    return found[-1].group(1) if pattern.groups else found[-1].group()


def _plain(text: str) -> str:
    """1,234. and $1234.00 are the same number."""
    bare = text.replace(",", "").replace("$", "").rstrip(".")
    try:
        value = float(bare)
    except ValueError:
        return bare
    return str(int(value)) if value.is_integer() else str(value)
