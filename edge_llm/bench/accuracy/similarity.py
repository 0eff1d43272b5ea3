"""How near two texts are in meaning, by all-MiniLM-L6-v2 on onnxruntime: a measure of drift, never of truth.

Owns the model's files (entries of models.yaml like any other), mean pooling and the cosine. Refuses to know answers and
tasks. Texts longer than MAX_TOKENS are compared by their beginnings. onnxruntime is imported when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edge_llm.bench.accuracy.wordpiece import WordPiece
from edge_llm.errors import CatalogueError

MODEL: Final = "all-minilm-l6-v2-int8"
TOKENIZER: Final = "all-minilm-l6-v2-tokenizer"
MAX_TOKENS: Final = 256
Vectors = npt.NDArray[np.float32]
# Token ids and which of them are real -> a vector for each token.
Encoder = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], Vectors]


class Embedder:
    """Unit vectors of texts; the same text gives the same vector, whatever is beside it in a batch."""

    def __init__(self, encode: Encoder, pieces: WordPiece) -> None:
        self._encode, self._pieces = encode, pieces

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """Each text alone: int8 activations are scaled over a whole call, so company would change them."""
        return np.stack([self._one(text) for text in texts])

    def cosines(self, one: Sequence[str], other: Sequence[str]) -> list[float]:
        """Pair by pair; 1.0 for equal texts."""
        if len(one) != len(other):
            raise ValueError(f"{len(one)} texts against {len(other)}")
        if not one:
            return []
        return [float(value) for value in (self.vectors(one) * self.vectors(other)).sum(axis=1)]

    def _one(self, text: str) -> Vectors:
        ids = np.asarray([self._pieces.ids(text, MAX_TOKENS)], np.int64)
        tokens = self._encode(ids, np.ones_like(ids))
        vector = tokens[0].mean(axis=0)  # nothing is padded, so every token counts
        return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12), np.float32)


def load(model: Path, tokenizer: Path, threads: int = 1) -> Embedder:
    """Raises CatalogueError when the files are no such model."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session: Any = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises kinds of its own that share nothing else
        raise CatalogueError(f"onnxruntime cannot load {model.name}: {error}") from error
    names = {value.name for value in session.get_inputs()}

    def encode(ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> Vectors:
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        tokens: Vectors = session.run(None, {name: given[name] for name in names})[0]
        return tokens

    return Embedder(encode, WordPiece.parse(tokenizer.read_bytes()))
