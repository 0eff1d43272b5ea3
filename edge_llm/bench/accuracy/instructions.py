"""Whether an answer keeps to instructions that a program can check: IFEval's 25 kinds, but one. Pure.

Owns the rules, written from the paper and the behaviour of its checkers (Zhou et al. 2023, arXiv:2311.07911). Where the
original uses a trained splitter of sentences or words, a plain one stands here: counts of sentences and of words in
capitals can differ on abbreviations. The language of an answer is not checked (UNCHECKED), not even as a part of
`english_capital` and `english_lowercase`: no detector is small and right. Refuses to know prompts and scores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from edge_llm.bench.accuracy.items import Instruction
from edge_llm.errors import ConfigError

Arguments = Mapping[str, Any]
Check = Callable[[str, Arguments], bool]
UNCHECKED: Final = frozenset({"language:response_language"})
_ANSWERS: Final = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_SENTENCE_END: Final = re.compile(r"[.!?]+[\"')\]]*(?:\s+|$)")
_WORD: Final = re.compile(r"\w+")
_CAPITAL_WORD: Final = re.compile(r"[^\W\d_](?:[\w'-]*\w)?")
_FENCES: Final = ("```json", "```Json", "```JSON", "```")


def follows(instruction: Instruction, text: str, prompt: str) -> bool:
    """Raises ConfigError for an instruction that is unknown or lacks an argument. An empty answer follows none."""
    check = _CHECKS.get(instruction.name)
    if check is None:
        raise ConfigError(f"unknown instruction {instruction.name!r}: known are {', '.join(sorted(_CHECKS))}")
    try:
        return bool(text.strip()) and check(text, {"prompt_to_repeat": prompt, **instruction.arguments})
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"instruction {instruction.name} lacks or misnames an argument: {error}") from error


def loosened(text: str) -> list[str]:
    """The answer without its first line, last line, both, and each without asterisks: a preface is forgiven."""
    lines = text.split("\n")
    cuts = [text, "\n".join(lines[1:]).strip(), "\n".join(lines[:-1]).strip(), "\n".join(lines[1:-1]).strip()]
    return [form for cut in cuts for form in (cut, cut.replace("*", ""))]


def sentences(text: str) -> int:
    """How many sentences: ends of them, and what is left without one."""
    ends = list(_SENTENCE_END.finditer(text.strip()))
    rest = text.strip()[ends[-1].end() :] if ends else text
    return len(ends) + bool(rest.strip())


def words(text: str) -> int:
    return len(_WORD.findall(text))


def _compared(count: int, relation: str, wanted: int) -> bool:
    if relation == "at least":
        return count >= wanted
    if relation == "less than":
        return count < wanted
    raise ConfigError(f"unknown relation {relation!r}: known are 'at least' and 'less than'")


def _occurrences(text: str, keyword: str) -> int:
    return len(re.findall(re.escape(keyword), text, re.IGNORECASE))


def _forbidden(text: str, arguments: Arguments) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in arguments["forbidden_words"])


def _letters(text: str, arguments: Arguments) -> bool:
    count = text.lower().count(arguments["letter"].lower())
    return _compared(count, arguments["let_relation"], arguments["let_frequency"])


def _paragraphs(text: str, arguments: Arguments) -> bool:
    """Divided by ***; only the first and the last may be empty, and do not count then."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    if not all(parts[1:-1]):
        return False
    return bool(sum(map(bool, parts)) == arguments["num_paragraphs"])


def _first_word(text: str, arguments: Arguments) -> bool:
    """Divided by empty lines: the right number of paragraphs, and one of them begins with the word."""
    parts = text.split("\n\n")
    full, nth = sum(bool(part.strip()) for part in parts), arguments["nth_paragraph"]
    if nth > full or not parts[nth - 1].strip():
        return False
    word = parts[nth - 1].split()[0].lstrip("'\"")
    word = re.split(r"[.,?!'\"]", word)[0].lower()
    return bool(full == arguments["num_paragraphs"] and word == arguments["first_word"].lower())


def _postscript(text: str, arguments: Arguments) -> bool:
    marker = arguments["postscript_marker"]
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(known.get(marker, re.escape(marker.lower())), text.lower()) is not None


def _bullets(text: str, arguments: Arguments) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return bool(len(stars) + len(dashes) == arguments["num_bullets"])


def _highlights(text: str, arguments: Arguments) -> bool:
    """*So* and **so**, as many as the original finds: a double one may count twice."""
    found = re.findall(r"\*[^\n\*]*\*", text) + re.findall(r"\*\*[^\n\*]*\*\*", text)
    return bool(sum(bool(part.strip("*").strip()) for part in found) >= arguments["num_highlights"])


def _sections(text: str, arguments: Arguments) -> bool:
    parts = re.split(rf"\s?{re.escape(arguments['section_spliter'])}\s?\d+\s?", text)
    return bool(len(parts) - 1 >= arguments["num_sections"])


def _json(text: str, _arguments: Arguments) -> bool:
    bare = text.strip()
    for fence in _FENCES:
        bare = bare.removeprefix(fence)
    try:
        json.loads(bare.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, _arguments: Arguments) -> bool:
    return any(title.strip("<>").strip() for title in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str, _arguments: Arguments) -> bool:
    parts = [part.strip() for part in text.split("******")]
    full = [part for part in parts if part]
    return all(parts[1:-1]) and len(full) == 2 and full[0] != full[1]


def _repeats(text: str, arguments: Arguments) -> bool:
    return text.strip().lower().startswith(arguments["prompt_to_repeat"].strip().lower())


def _ends(text: str, arguments: Arguments) -> bool:
    return text.strip().strip('"').lower().endswith(arguments["end_phrase"].strip().lower())


def _quoted(text: str, _arguments: Arguments) -> bool:
    bare = text.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


def _capital_words(text: str, arguments: Arguments) -> bool:
    count = sum(word.isupper() for word in _CAPITAL_WORD.findall(text))
    return _compared(count, arguments["capital_relation"], arguments["capital_frequency"])


_CHECKS: Final[Mapping[str, Check]] = {
    "keywords:existence": lambda text, a: all(_occurrences(text, word) for word in a["keywords"]),
    "keywords:frequency": lambda text, a: _compared(_occurrences(text, a["keyword"]), a["relation"], a["frequency"]),
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "length_constraints:number_sentences": lambda text, a: _compared(
        sentences(text), a["relation"], a["num_sentences"]
    ),
    "length_constraints:number_words": lambda text, a: _compared(words(text), a["relation"], a["num_words"]),
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": lambda text, a: (
        len(re.findall(r"\[.*?\]", text)) >= a["num_placeholders"]
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda text, _: any(answer in text for answer in _ANSWERS),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda text, _: text.isupper(),
    "change_case:english_lowercase": lambda text, _: text.islower(),
    "punctuation:no_comma": lambda text, _: "," not in text,
}
