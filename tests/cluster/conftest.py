"""What the tests of the cluster share."""

from __future__ import annotations

import pytest


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, as the prober does."""
    return "asyncio"
