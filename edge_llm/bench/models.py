"""Which model files a bench runs on: names and paths to files with facts, and the same weights in another format.

Owns the cache of requantized files. Refuses to load models: requantizing runs in a child process (import contract).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

from edge_llm.bench.engine import BenchModel
from edge_llm.bench.processes import MeasureFailed, run_tool
from edge_llm.bench.record import ModelFacts
from edge_llm.bench.reference_tools import package_version
from edge_llm.catalogue.fetch import sha256_of
from edge_llm.catalogue.gguf import ModelCard, file_type, read_card
from edge_llm.catalogue.resolve import resolve
from edge_llm.config import cache_dir
from edge_llm.errors import CatalogueError

Progress = Callable[[str, int, int], None]
_DEADLINE_S: Final = 3600.0


def local_model(name_or_path: str, progress: Progress) -> BenchModel:
    """Fetched if needed. Raises CatalogueError."""
    found = resolve(name_or_path, lambda done, total: progress(f"fetching {name_or_path}", done, total or 0))
    return BenchModel(found.path, _facts(found.name, read_card(found.path), found.sha256))


def requantized(model: BenchModel, kind: str, progress: Progress) -> BenchModel:
    """`model` in another quantization, made once and kept in the cache. Raises CatalogueError."""
    file_type(kind)  # before a process is started that could only say the same
    folder = cache_dir() / "requantized"
    path = folder / f"{model.path.stem}-{kind}-{model.facts.sha256[:12]}-{package_version()}.gguf"
    if not path.exists():
        progress(f"requantizing {model.facts.name} to {kind}", 0, 0)
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        command = [sys.executable, "-m", "edge_llm.engine.quantize", str(model.path), str(part), kind]
        try:
            run_tool(command, {}, [], _DEADLINE_S)
        except MeasureFailed as error:
            raise CatalogueError(f"{model.facts.name} was not requantized to {kind}: {error.message}") from error
        part.rename(path)
    return BenchModel(path, _facts(f"{model.facts.name}-as-{kind.lower()}", read_card(path), sha256_of(path)))


def _facts(name: str, card: ModelCard, sha256: str) -> ModelFacts:
    return ModelFacts(
        name=name,
        file=card.path.name,
        sha256=sha256,
        size_bytes=card.path.stat().st_size,
        quantization=card.quantization,
        architecture=card.architecture,
        kv_bytes_per_token=card.kv_bytes_per_token(),
        n_params=card.n_params,
        n_ctx_train=card.n_ctx_train,
    )
