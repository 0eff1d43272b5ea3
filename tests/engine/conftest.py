"""Engines under test, and models that are made here in a second."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edge_llm.engine.engine import Engine, Vocabulary
from edge_llm.engine.llama import LlamaBackend
from edge_llm.engine.load import LlamaSettings, load, load_backend
from edge_llm.engine.random_model import make_model
from edge_llm.engine.simulated import SimulatedSettings, create_simulated

N_CTX, SLOTS, CHUNK_TOKENS = 512, 4, 32


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("random-models")


def llama_settings(path: Path, **changes: object) -> LlamaSettings:
    """Settings of a small worker for `path`."""
    settings = LlamaSettings(
        model_path=path,
        model_name=path.stem,
        model_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        n_ctx=N_CTX,
        slots=SLOTS,
        chunk_tokens=CHUNK_TOKENS,
    )
    return replace(settings, **changes)  # type: ignore[arg-type]


EngineMaker = Callable[[], tuple[Engine, Vocabulary]]


@pytest.fixture(scope="session", params=["llama", "simulated"])
def make_engine(request: pytest.FixtureRequest, models_dir: Path) -> EngineMaker:
    """Makes engines of one kind; every contract test runs on both kinds."""
    if request.param == "simulated":
        settings = SimulatedSettings(n_ctx=N_CTX, slots=SLOTS, chunk_tokens=CHUNK_TOKENS)
        return lambda: create_simulated(settings)
    path = make_model(models_dir, "dense", "Q4_0")
    return lambda: load(llama_settings(path))


@pytest.fixture
def backend_of(models_dir: Path) -> Iterator[Callable[..., LlamaBackend]]:
    """Loads random-weight models; closes what it loaded."""
    opened: list[LlamaBackend] = []

    def load_random(shape: str = "dense", quantization: str = "Q4_0", **changes: object) -> LlamaBackend:
        path = make_model(models_dir, shape, quantization)
        opened.append(load_backend(llama_settings(path, **changes)))
        return opened[-1]

    yield load_random
    for backend in opened:
        backend.close()
