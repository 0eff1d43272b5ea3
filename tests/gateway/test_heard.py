"""A worker is told nothing before the gateway hears it: what it says would be lost with a connection that broke."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from edge_llm.gateway.running import Finish
from edge_llm.worker.client import Peer
from edge_llm.worker.messages import EventBatch
from tests.gateway.test_sessions_under_faults import Client, Wire, Worker, dispatching, leaping, undisturbed

PROMPT = [1, 2, 3]


class SlowToOpen(Wire):
    """Calls come through at once, event connections when it is said."""

    def __init__(self, workers: dict[str, Worker]) -> None:
        super().__init__(workers)
        self.opens = asyncio.Event()

    async def events(self, peer: Peer, on_open: Callable[[], None] = lambda: None) -> AsyncIterator[EventBatch]:
        await self.opens.wait()
        async for batch in super().events(peer, on_open):
            yield batch


async def _answered_after_the_connection_opens() -> None:
    workers = {name: Worker(name, is_up=name in ("p1", "d1")) for name in ("p1", "d1", "d2", "d3")}
    wire = SlowToOpen(workers)
    dispatcher, _ = await dispatching(wire)
    client = Client(PROMPT, 4)
    asking = asyncio.create_task(client.ask(dispatcher, "r", 0.0))
    await asyncio.sleep(1.0)
    assert not workers["d1"].sequences, "it would answer to nobody"
    wire.opens.set()
    await asyncio.sleep(1.0)
    (sequence,) = workers["d1"].sequences.values()
    while not sequence.is_over:
        workers["d1"].say(sequence.step())
    await asking
    whole, reason = undisturbed(PROMPT, 4)
    assert (client.heard, client.finish) == (whole, Finish(reason))
    await dispatcher.close()


def test_a_request_waits_for_the_connection_over_which_its_answer_will_come() -> None:
    leaping(_answered_after_the_connection_opens())
