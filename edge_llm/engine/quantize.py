"""Requantizing a GGUF file through llama.cpp itself, with its origin noted beside the result.

Owns the call and the provenance note. `python -m edge_llm.engine.quantize SOURCE TARGET TYPE` does the same in its own
process, for callers that may not load llama.cpp; what they may read of a failure is its last line.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_llm.catalogue.gguf import file_type
from edge_llm.engine.native import build_facts, library
from edge_llm.errors import CatalogueError, EdgeLLMError


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a requantized file came from."""

    source: str
    source_sha256: str
    quantization: str
    sha256: str
    llama_cpp_python: str


def quantize(source: Path, target: Path, name: str, threads: int = 0) -> Provenance:
    """Write `source` requantized to `name` as `target`, whole or not at all; `target`.json holds the provenance."""
    lib = library()
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = file_type(name), threads, True
    draft = target.with_name(f"{target.name}.{os.getpid()}.draft")
    status = lib.llama_model_quantize(os.fsencode(source), os.fsencode(draft), ctypes.byref(params))
    if status != 0:
        draft.unlink(missing_ok=True)
        raise CatalogueError(f"llama.cpp could not requantize {source.name} to {name} (status {status})")
    version = build_facts()["llama_cpp_python"]
    made = Provenance(source.name, _sha256(source), name, _sha256(draft), version)
    target.with_name(f"{target.name}.json").write_text(json.dumps(asdict(made), indent=1))
    draft.replace(target)
    return made


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    try:
        quantize(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    except EdgeLLMError as error:
        sys.exit(error.message)
