"""What the tests of workers share: a cluster of one's own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.loopback import Cluster, running_cluster


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, as the workers do."""
    return "asyncio"


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    """A cluster of this test alone."""
    async with running_cluster() as made:
        yield made
