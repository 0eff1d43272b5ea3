from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from edge_llm.errors import EngineFailed, Overloaded
from edge_llm.request import Generation, SamplingParams, TokenEvent
from edge_llm.worker.messages import EventBatch, decode
from edge_llm.worker.outbox import MAX_GATEWAYS, MAX_QUEUED_BYTES, Outboxes

LEASE_S = 10.0
pytestmark = pytest.mark.anyio


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def token(index: int, request_id: str = "r1", text: str = "x") -> TokenEvent:
    return TokenEvent(request_id, 0, index, 7, text)


async def read(stream: AsyncGenerator[bytes | memoryview, None]) -> list[EventBatch]:
    lines = bytes(await anext(stream)).splitlines()
    return [decode(EventBatch, line) for line in lines]


async def test_one_line_carries_all_tokens_of_a_step() -> None:
    boxes = Outboxes(Clock(), LEASE_S)
    boxes.add_token("g", token(0, "r1"))
    boxes.add_token("g", token(5, "r2"))
    boxes.flush()
    (batch,) = await read(boxes.stream("g"))
    assert [(t.request_id, t.index) for t in batch.tokens] == [("r1", 0), ("r2", 5)]


async def test_gateways_hear_only_what_is_theirs() -> None:
    boxes = Outboxes(Clock(), LEASE_S)
    boxes.add_token("g1", token(0, "r1"))
    boxes.add_failed("g2", Generation("r2", 3, (1,), 4, SamplingParams()), EngineFailed("broken"))
    boxes.flush()
    (first,), (second,) = await read(boxes.stream("g1")), await read(boxes.stream("g2"))
    assert [t.request_id for t in first.tokens] == ["r1"]
    assert not first.failed
    failed = second.failed[0]
    assert (failed.request_id, failed.epoch, failed.code, failed.is_retryable) == ("r2", 3, "engine_failed", True)


async def test_lines_wait_for_a_gateway_that_comes_back_within_its_lease() -> None:
    clock = Clock()
    boxes = Outboxes(clock, LEASE_S)
    boxes.open("g")
    for index in range(3):
        boxes.add_token("g", token(index))
        boxes.flush()
    clock.now_s += LEASE_S
    assert boxes.expired() == []
    batches = await read(boxes.stream("g"))
    assert [t.index for batch in batches for t in batch.tokens] == [0, 1, 2]


async def test_a_gateway_that_stays_away_is_named_once_and_forgotten() -> None:
    clock = Clock()
    boxes = Outboxes(clock, LEASE_S)
    boxes.open("g")
    clock.now_s += LEASE_S + 0.1
    assert boxes.expired() == ["g"]
    assert boxes.expired() == []


async def test_a_gateway_that_reads_keeps_its_lease_and_one_that_does_not_loses_it() -> None:
    clock = Clock()
    boxes = Outboxes(clock, LEASE_S)
    stream = boxes.stream("g")
    for index in range(4):
        clock.now_s += LEASE_S - 1
        boxes.add_token("g", token(index))
        boxes.flush()
        await read(stream)
        assert boxes.expired() == []
    # the write of the last line never returns: nobody asks the stream for more
    clock.now_s += LEASE_S + 1
    boxes.add_token("g", token(4))
    boxes.flush()
    assert boxes.expired() == ["g"]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_gateway_too_far_behind_is_given_up_before_memory_is() -> None:
    boxes = Outboxes(Clock(), LEASE_S)
    for index in range(MAX_QUEUED_BYTES // 1_000_000 + 1):
        boxes.add_token("g", token(index, text="x" * 1_000_000))
        boxes.flush()
    assert boxes.expired() == ["g"]


async def test_a_newer_connection_takes_over_without_losing_a_line() -> None:
    boxes = Outboxes(Clock(), LEASE_S)
    old = boxes.stream("g")
    boxes.add_token("g", token(0))
    boxes.flush()
    await read(old)
    waiting = asyncio.create_task(anext(old))
    await asyncio.sleep(0)
    new = boxes.stream("g")
    reading = asyncio.create_task(read(new))
    await asyncio.sleep(0)
    boxes.add_token("g", token(1))
    boxes.flush()
    (batch,) = await reading
    assert [t.index for t in batch.tokens] == [1]
    with pytest.raises(StopAsyncIteration):
        await waiting


async def test_a_closed_outbox_says_everything_and_ends() -> None:
    boxes = Outboxes(Clock(), LEASE_S)
    stream = boxes.stream("g")
    boxes.add_token("g", token(0))
    boxes.close()
    (batch,) = await read(stream)
    assert [t.index for t in batch.tokens] == [0]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_the_number_of_gateways_is_bounded() -> None:
    boxes = Outboxes(Clock(), LEASE_S)
    for number in range(MAX_GATEWAYS):
        boxes.open(f"g{number}")
    boxes.open("g0")
    with pytest.raises(Overloaded):
        boxes.open("one more")
