"""Text -> the token ids of a BERT model, as its tokenizer.json describes them. Pure.

Owns BERT's normalizing (clean, lower case, no accents), its splitting at blanks and punctuation, and the greedy search
for word pieces. It exists because the extra `tokenizers` is a large wheel that not every board has. Refuses to know
models and files. Only what all-MiniLM-L6-v2 uses is known: another kind of tokenizer is refused, not guessed at.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from edge_llm.errors import CatalogueError

_PREFIX: Final = "##"
_MAX_WORD: Final = 100
# CJK ideographs stand alone; the ranges are BERT's own.
_IDEOGRAPHS: Final = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


@dataclass(frozen=True, slots=True)
class WordPiece:
    """Vocabulary and special tokens."""

    vocabulary: Mapping[str, int]
    unknown: int
    first: int
    last: int
    padding: int

    @classmethod
    def parse(cls, data: bytes) -> WordPiece:
        """Of a tokenizer.json. Raises CatalogueError."""
        try:
            tree = json.loads(data)
            model, normalizer = tree["model"], tree["normalizer"]
            kinds = (model["type"], normalizer["type"], tree["pre_tokenizer"]["type"], normalizer["lowercase"])
            if kinds != ("WordPiece", "BertNormalizer", "BertPreTokenizer", True):
                raise CatalogueError(f"this tokenizer.json is of another kind: {kinds}")
            words: dict[str, int] = model["vocab"]
            return cls(words, words["[UNK]"], words["[CLS]"], words["[SEP]"], words["[PAD]"])
        except (ValueError, KeyError, TypeError) as error:
            raise CatalogueError(f"this is no tokenizer.json of BERT: {type(error).__name__} {error}") from error

    def ids(self, text: str, limit: int) -> list[int]:
        """At most `limit` ids, the first and the last special one among them."""
        found = [piece for word in _words(_normal(text)) for piece in self._pieces(word)]
        return [self.first, *found[: limit - 2], self.last]

    def _pieces(self, word: str) -> list[int]:
        """The longest known beginning, then the longest known rest, or one unknown token for the whole word."""
        if len(word) > _MAX_WORD:
            return [self.unknown]
        found: list[int] = []
        start = 0
        while start < len(word):
            prefix = _PREFIX if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self.vocabulary), None)
            if end is None:
                return [self.unknown]
            found.append(self.vocabulary[prefix + word[start:end]])
            start = end
        return found


def _normal(text: str) -> str:
    clean = "".join(_cleaned(char) for char in text)
    plain = unicodedata.normalize("NFD", clean)
    # each character alone: a Greek sigma at a word's end stays what it is
    return "".join(char.lower() for char in plain if unicodedata.category(char) != "Mn")


def _cleaned(char: str) -> str:
    code = ord(char)
    if char in "\t\n\r" or unicodedata.category(char) == "Zs":
        return " "
    if code in (0, 0xFFFD) or unicodedata.category(char).startswith("C"):
        return ""
    return f" {char} " if any(low <= code <= high for low, high in _IDEOGRAPHS) else char


def _words(text: str) -> Iterator[str]:
    """Punctuation stands alone."""
    for part in text.split():
        word = ""
        for char in part:
            if _is_punctuation(char):
                if word:
                    yield word
                yield char
                word = ""
            else:
                word += char
        if word:
            yield word


def _is_punctuation(char: str) -> bool:
    """Every ASCII sign that is no letter or digit, and what Unicode calls punctuation."""
    is_ascii_sign = char.isascii() and char.isprintable() and not char.isalnum() and char != " "
    return is_ascii_sign or unicodedata.category(char).startswith("P")
