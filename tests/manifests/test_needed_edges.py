"""Why the table of edges lets every worker reach every other: each pair of roles is seen to exchange KV."""

from __future__ import annotations

from typing import Final

import pytest

from edge_llm.engine.simulated import SimulatedSettings
from edge_llm.worker.messages import Role
from tests.gateway.conftest import COMPLETIONS, asking, serving
from tests.loopback import CHUNK, prompt_of, running_cluster, undisturbed, until

pytestmark = pytest.mark.anyio
SLOW: Final = SimulatedSettings(n_ctx=512, slots=2, chunk_tokens=CHUNK, decode_run_s=0.01)
ROLES: Final[tuple[Role, ...]] = ("prefill", "decode", "mixed")
PROMPT, TOKENS = prompt_of(3 * CHUNK), 60


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("source", ROLES)
@pytest.mark.parametrize("taker", ROLES)
async def test_a_worker_fetches_from_one_that_stops_whatever_the_roles_of_both(taker: Role, source: Role) -> None:
    async with running_cluster() as cluster, serving(cluster) as service:
        stopping = await service.start(source, "source", SLOW, prefix_cache_bytes=1 << 20)
        async with service.streaming(COMPLETIONS, asking(PROMPT, max_tokens=TOKENS)) as streamed:
            await streamed.heard(lambda so_far: len(so_far.chunks) >= 2)
            taking = await service.start(taker, "taker", SLOW, prefix_cache_bytes=1 << 20)
            await until(lambda: len(service.gateway.dispatcher.view.ready()) == 2)
            await stopping.worker.drain()
            await streamed.whole()
        assert streamed.own["token_ids"] == undisturbed(PROMPT, TOKENS)
        assert streamed.own["decode_node"] == "taker"
        assert [link.peer for link in taking.worker.links.published] == ["source"]
