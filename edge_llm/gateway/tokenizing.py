"""Who turns a text into token ids: a ready worker of its model, another one when that fails or keeps us waiting.

Owns the choice and the second tries. Refuses to know what is done with ids. Any worker is as good as another one, those
that only read prompts too: it takes no time of their engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from edge_llm.cluster.view import ClusterView, Node
from edge_llm.errors import EdgeLLMError, Overloaded, RemoteProtocolError, WorkerError
from edge_llm.gateway.orders import peer_of
from edge_llm.worker.client import WorkerClient
from edge_llm.worker.messages import TokenizeReply, TokenizeRequest

# A worker that has not tokenized by then may be stopped or cut off: another one is asked as well.
TOKENIZE_S: Final = 1.0


class Tokenizers:
    """The tokenizers of the workers in `view`."""

    def __init__(self, client: WorkerClient, view: Callable[[], ClusterView]) -> None:
        self._client, self._view = client, view

    async def tokenize(self, model: str, request: TokenizeRequest, trace: str = "") -> tuple[Node, TokenizeReply]:
        """By the least busy worker, else any. Raises Overloaded with nobody to ask, or what the last one said."""
        ready = sorted(self._view().ready(model), key=lambda n: (n.status.load.sequences_running, n.worker))
        if not ready:
            raise Overloaded(f"no worker of {model} is ready: {self._others()}", retry_after_s=2.0)
        first, *others = ready
        if not others:
            return first, await self._ask(first, request, trace)
        with suppress(TimeoutError, WorkerError, Overloaded, RemoteProtocolError):
            # in this task: under load each further one waits for its turn
            async with asyncio.timeout(TOKENIZE_S):
                return first, await self._ask(first, request, trace)
        return await self._by_any([*others, first], request, trace)

    def _others(self) -> str:
        roles = ", ".join(f"{node.worker} ({node.status.role})" for node in self._view().nodes)
        return f"the cluster has {roles}" if roles else "the cluster has none at all"

    async def _ask(self, node: Node, request: TokenizeRequest, trace: str) -> TokenizeReply:
        return await self._client.tokenize(peer_of(node), request, trace)

    async def _by_any(self, nodes: Sequence[Node], request: TokenizeRequest, trace: str) -> tuple[Node, TokenizeReply]:
        """The first reply; one after another is asked, and those before are heard, too."""
        failure: EdgeLLMError | None = None
        unasked = list(reversed(nodes))
        asked: dict[asyncio.Task[TokenizeReply], Node] = {}
        try:
            while unasked or asked:
                if unasked:
                    node = unasked.pop()
                    asked[asyncio.create_task(self._ask(node, request, trace))] = node
                patience_s = TOKENIZE_S if unasked else None
                done, _ = await asyncio.wait(asked, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    node = asked.pop(task)
                    try:
                        return node, task.result()
                    except (WorkerError, Overloaded, RemoteProtocolError) as error:
                        failure = error
        finally:
            for task in asked:
                task.cancel()
        assert failure is not None
        raise failure
