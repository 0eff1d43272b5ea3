"""What the doctor's tests share: small model files, and folders of the user of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.catalogue.conftest import Maker, make_gguf

__all__ = ["make_gguf"]


@pytest.fixture
def tiny(make_gguf: Maker, tmp_cache: Path) -> dict[str, str]:
    """The environment of a user whose settings name a small model that is there."""
    del tmp_cache  # only its folders are needed
    return {"EDGE_LLM_WORKER_MODEL": str(make_gguf())}
