"""Who waits for a worker of his own exactness class holds up nobody who may go to another one."""

from __future__ import annotations

import asyncio

from edge_llm.gateway.running import Finish
from edge_llm.worker.client import Peer
from edge_llm.worker.messages import WorkerStatus
from tests.gateway.test_sessions_under_faults import Client, Decoding, Wire, Worker, dispatching, leaping, undisturbed
from tests.nodes import node_of

BEGUN, NOT_BEGUN = [1, 2, 3], list(range(20))


class TwoKinds(Wire):
    """d1 is of one exactness class, d2 of another; nobody reads for others."""

    async def status(self, peer: Peer) -> WorkerStatus:
        worker = await self._reached(peer, 1.0)
        return node_of(peer.worker, "decode", pid=worker.life, slots=2, exactness_class=peer.worker[-1] * 64).status


def _work(worker: Worker, request_id: str) -> Decoding:
    sequence = worker.sequences[request_id]
    worker.say(sequence.step())
    return sequence


async def _served_elsewhere() -> None:
    workers = {name: Worker(name, is_up=name == "d1") for name in ("p1", "d1", "d2", "d3")}
    dispatcher, prober = await dispatching(TwoKinds(workers), cross_class="never")
    begun, not_begun = Client(BEGUN, 4), Client(NOT_BEGUN, 4)
    tasks = [asyncio.create_task(begun.ask(dispatcher, "begun", 0.0))]
    tasks += [asyncio.create_task(not_begun.ask(dispatcher, "not begun", 0.0))]
    await asyncio.sleep(1.0)
    for _ in range(2):  # its prompt, and a token
        _work(workers["d1"], "begun")
    await asyncio.sleep(1.0)
    assert len(begun.heard) == 1
    workers["d2"].is_up = True
    await prober.probe_all()
    workers["d1"].die()
    await asyncio.sleep(1.0)
    assert "begun" not in workers["d2"].sequences
    while not _work(workers["d2"], "not begun").is_over:
        pass
    await tasks[1]
    whole, reason = undisturbed(NOT_BEGUN, 4)
    assert (not_begun.heard, not_begun.finish) == (whole, Finish(reason))
    tasks[0].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await dispatcher.close()


def test_a_request_that_must_go_on_in_its_class_does_not_hold_up_one_that_has_not_begun() -> None:
    leaping(_served_elsewhere())
