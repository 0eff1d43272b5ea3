"""A worker is told nothing before the gateway hears it: what it says would be lost with a connection that broke."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from edge_llm.errors import WorkerUnreachable
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


class NeverOpens(SlowToOpen):
    """When it is said, event connections break off."""

    async def events(self, peer: Peer, on_open: Callable[[], None] = lambda: None) -> AsyncIterator[EventBatch]:
        await self.opens.wait()
        raise WorkerUnreachable(f"{peer.worker} was reset")
        yield  # to be a generator, as all are


def tasks_of(request_id: str) -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name().endswith(f" {request_id}")]


async def _left_before_the_connection_breaks() -> None:
    workers = {name: Worker(name, is_up=name in ("p1", "d1")) for name in ("p1", "d1", "d2", "d3")}
    wire = NeverOpens(workers)
    dispatcher, _ = await dispatching(wire)
    asking = asyncio.create_task(Client(PROMPT, 4).ask(dispatcher, "r", 0.0))
    await asyncio.sleep(1.0)
    assert tasks_of("r")
    asking.cancel()
    await asyncio.wait({asking})
    wire.opens.set()
    await asyncio.sleep(1.0)
    assert not tasks_of("r")
    assert not workers["d1"].sequences, "nobody waits for it"
    await dispatcher.close()


def test_of_a_request_whose_client_left_before_its_worker_was_heard_nothing_stays() -> None:
    leaping(_left_before_the_connection_breaks())
