"""Texts become ids as BERT has it, and vectors that do not depend on what is beside them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edge_llm.bench.accuracy.similarity import MAX_TOKENS, MODEL, TOKENIZER, Embedder, load
from edge_llm.bench.accuracy.wordpiece import WordPiece
from edge_llm.catalogue.manifest import load_manifest
from edge_llm.errors import CatalogueError

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "cafe",
    "##s",
    "##teri",
    "##a",
    "!",
    "=",
    "'",
    "水",
    "now",
    "i",
    "$",
    "σασ",
]
TREE: dict[str, Any] = {
    "normalizer": {"type": "BertNormalizer", "lowercase": True},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "model": {"type": "WordPiece", "vocab": {word: number for number, word in enumerate(WORDS)}},
}


@pytest.fixture
def pieces() -> WordPiece:
    return WordPiece.parse(json.dumps(TREE).encode())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cafe", ["a", "cafe"]),
        ("CAFÉS", ["cafe", "##s"]),
        ("cafe\u0301s", ["cafe", "##s"]),
        ("cafeteria!", ["cafe", "##teri", "##a", "!"]),
        ("a'a=$a", ["a", "'", "a", "=", "$", "a"]),
        ("a水水a", ["a", "水", "水", "a"]),
        ("now\tnow\u00a0now\u0000\u200b", ["now", "now", "now"]),
        ("cafex now", ["[UNK]", "now"]),
        ("x" * 101 + " a", ["[UNK]", "a"]),
        ("ΣΑΣ", ["σασ"]),
        ("“a”", ["[UNK]", "a", "[UNK]"]),
        ("", []),
    ],
)
def test_words_fall_into_the_longest_known_pieces(text: str, expected: list[str], pieces: WordPiece) -> None:
    ids = pieces.ids(text, 64)
    assert [WORDS[i] for i in ids] == ["[CLS]", *expected, "[SEP]"]


def test_a_long_text_is_cut_before_its_end_mark(pieces: WordPiece) -> None:
    ids = pieces.ids("a " * 100, 10)
    assert len(ids) == 10
    assert (WORDS[ids[0]], WORDS[ids[-1]]) == ("[CLS]", "[SEP]")


@pytest.mark.parametrize(
    "data",
    [b"{", b"[]", b"{}", json.dumps(TREE | {"pre_tokenizer": {"type": "ByteLevel"}}).encode()],
)
def test_another_tokenizer_is_refused_not_guessed_at(data: bytes) -> None:
    with pytest.raises(CatalogueError):
        WordPiece.parse(data)


def counting(ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """A vector for each token: where its id lies in a row of zeros."""
    assert ids.shape == mask.shape == (1, ids.shape[1])
    assert mask.all(), "nothing is padded"
    return np.eye(len(WORDS), dtype=np.float32)[ids]


def test_equal_texts_are_nearest_and_company_changes_nothing(pieces: WordPiece) -> None:
    embedder = Embedder(counting, pieces)
    texts = ["a cafe now", "now a cafe!", "水"]
    assert embedder.cosines(texts, texts) == pytest.approx([1.0, 1.0, 1.0])
    together = embedder.vectors(texts)
    assert np.array_equal(together[2], embedder.vectors(["水"])[0])
    near, far = embedder.cosines(["a cafe now", "a cafe now"], ["now a cafe!", "水"])
    assert 1.0 > near > far > 0.0, "the marks at both ends are common to all"
    assert embedder.cosines([], []) == []
    with pytest.raises(ValueError, match="1 texts against 2"):
        embedder.cosines(["a"], ["a", "a"])


def test_only_the_beginning_of_a_long_text_is_compared(pieces: WordPiece) -> None:
    embedder = Embedder(counting, pieces)
    same = "a " * MAX_TOKENS
    assert embedder.cosines([same + "now"], [same + "水"]) == pytest.approx([1.0])


def test_a_file_that_is_no_such_model_is_an_error_of_the_catalogue(tmp_path: Any) -> None:
    model, tokenizer = tmp_path / "m.onnx", tmp_path / "t.json"
    model.write_bytes(b"no model")
    tokenizer.write_bytes(json.dumps(TREE).encode())
    with pytest.raises(CatalogueError, match=r"m\.onnx"):
        load(model, tokenizer)


def test_its_files_stand_in_the_catalogue_with_hashes() -> None:
    entries = load_manifest()
    assert entries[MODEL].sha256
    assert entries[TOKENIZER].sha256
    assert entries[MODEL].licence == entries[TOKENIZER].licence == "Apache-2.0"
