from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from operator import methodcaller

import pytest

from edge_llm.engine.engine import Engine, EngineFacts, KeptKV, ServedPrompt, Step
from edge_llm.engine.rates import NOTHING_KNOWN, Rates
from edge_llm.errors import EngineFailed, Overloaded
from edge_llm.kv.codec import StateBlob
from edge_llm.request import Generation
from edge_llm.worker.loop import STUCK_AT_FIRST_S, STUCK_S, STUCK_TIMES, EngineLoop

pytestmark = pytest.mark.anyio
DEADLINE_S = 5.0


class ScriptedEngine:
    """An engine of the protocol whose steps are a list of functions; it has work while some are left."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], Step]] = []
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.interrupted = threading.Event()

    @property
    def facts(self) -> EngineFacts:
        raise NotImplementedError

    @property
    def rates(self) -> Rates:
        return NOTHING_KNOWN

    @property
    def has_work(self) -> bool:
        return bool(self.steps)

    def step(self) -> Step:
        self.threads.add(threading.get_ident())
        self.calls.append("step")
        return self.steps.pop(0)()

    def begin(
        self, slot: int, generation: Generation, snapshot: StateBlob | None = None, *, keeps_kv: object = None
    ) -> int:
        raise NotImplementedError

    def serve(self, prompt: ServedPrompt, snapshot: StateBlob | None = None) -> None:
        raise Overloaded("busy")

    def hold_served(self, is_held: bool) -> None:
        raise NotImplementedError

    def end(self, slot: int) -> None:
        self.calls.append(f"end {slot}")

    def end_served(self, request_id: str) -> None:
        raise NotImplementedError

    def export(self, slot: int) -> KeptKV:
        raise NotImplementedError

    def interrupt(self) -> None:
        self.interrupted.set()

    def close(self) -> None:
        raise NotImplementedError


class Running:
    def __init__(self) -> None:
        self.engine = ScriptedEngine()
        self.watched: list[tuple[int, Step]] = []
        self.now_s = 0.0
        self.loop = EngineLoop(
            self.engine,
            lambda engine, step: self.watched.append((threading.get_ident(), step)),
            clock=lambda: self.now_s,
        )
        self.steps: list[Step] = []
        self.deaths: list[EngineFailed] = []
        self.died = asyncio.Event()
        self._stepped = asyncio.Event()

    def on_step(self, step: Step) -> None:
        self.steps.append(step)
        self._stepped.set()

    async def until_steps(self, number: int) -> None:
        while len(self.steps) < number:
            self._stepped.clear()
            await self._stepped.wait()

    def on_death(self, error: EngineFailed) -> None:
        self.deaths.append(error)
        self.died.set()

    async def put(self, *steps: Callable[[], Step]) -> None:
        await self.loop.call(lambda engine: self.engine.steps.extend(steps))


@asynccontextmanager
async def running() -> AsyncIterator[Running]:
    made = Running()
    made.loop.start(made.on_step, made.on_death)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield made
    finally:
        await made.loop.stop()


async def test_steps_run_on_one_thread_and_are_delivered_in_order_on_the_event_loop() -> None:
    async with running() as r:
        made = [Step(prompt_tokens=number) for number in range(20)]
        await r.put(*(lambda step=step: step for step in made))
        await r.until_steps(len(made))
        assert r.steps == made
        assert len(r.engine.threads) == 1
        assert {thread for thread, _ in r.watched} == r.engine.threads != {threading.get_ident()}
        assert [step for _, step in r.watched] == made


async def test_mail_is_read_in_order_before_the_next_step() -> None:
    async with running() as r:
        begun, go_on = threading.Event(), threading.Event()

        def slow() -> Step:
            begun.set()
            assert go_on.wait(DEADLINE_S)
            return Step()

        await r.put(slow, Step)
        await asyncio.to_thread(begun.wait)
        futures = [r.loop.post(methodcaller("end", slot)) for slot in (3, 1, 2)]
        go_on.set()
        await asyncio.gather(*map(asyncio.wrap_future, futures))
        await r.until_steps(2)
        assert r.engine.calls == ["step", "end 3", "end 1", "end 2", "step"]


async def test_an_idle_engine_is_not_stepped() -> None:
    async with running() as r:
        for _ in range(50):
            await r.loop.call(lambda engine: None)
        assert r.engine.calls == []


async def test_our_errors_are_answers_and_the_loop_goes_on() -> None:
    async with running() as r:
        with pytest.raises(Overloaded):
            await r.loop.call(lambda engine: engine.serve(ServedPrompt("r", (1, 2))))
        assert await r.loop.call(lambda engine: 42) == 42
        assert r.loop.is_alive


async def test_a_call_that_nobody_waits_for_any_more_is_not_made() -> None:
    async with running() as r:
        begun, go_on = threading.Event(), threading.Event()

        def slow() -> Step:
            begun.set()
            assert go_on.wait(DEADLINE_S)
            return Step()

        await r.put(slow)
        await asyncio.to_thread(begun.wait)
        task = asyncio.create_task(r.loop.call(lambda engine: engine.end(9)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        go_on.set()
        await r.loop.call(lambda engine: engine.end(1))
        assert "end 9" not in r.engine.calls


async def test_an_interrupt_comes_after_its_letter_is_in_the_box() -> None:
    async with running() as r:
        begun = threading.Event()

        def until_interrupted() -> Step:
            begun.set()
            assert r.engine.interrupted.wait(DEADLINE_S)
            return Step()

        await r.put(until_interrupted, Step)
        await asyncio.to_thread(begun.wait)
        await asyncio.wrap_future(r.loop.interrupt_with(lambda engine: engine.end(0)))
        assert r.engine.calls[:2] == ["step", "end 0"]


def broken() -> Step:
    raise MemoryError("llama.cpp said something nobody expected")


async def test_an_unexpected_error_ends_the_loop_and_answers_everything_that_waits() -> None:
    async with running() as r:
        begun, go_on = threading.Event(), threading.Event()

        def slowly_broken() -> Step:
            begun.set()
            assert go_on.wait(DEADLINE_S)
            return broken()

        await r.put(slowly_broken)
        await asyncio.to_thread(begun.wait)
        waiting = r.loop.post(lambda engine: engine.end(0))
        go_on.set()
        with pytest.raises(EngineFailed, match="nobody expected"):
            await asyncio.wrap_future(waiting)
        await r.died.wait()
        assert len(r.deaths) == 1
        assert not r.loop.is_alive
        assert "end 0" not in r.engine.calls, "a broken engine was asked again"


async def test_a_letter_with_an_unexpected_error_ends_the_loop_too() -> None:
    async with running() as r:
        with pytest.raises(EngineFailed):
            await r.loop.call(lambda engine: broken())
        await r.died.wait()
        with pytest.raises(EngineFailed):
            await r.loop.call(lambda engine: None)
        r.loop.interrupt_with(lambda engine: None)
        assert not r.engine.interrupted.is_set(), "the native side of a dead engine was touched"


async def test_a_stopped_loop_refuses_instead_of_leaving_callers_waiting() -> None:
    async with running() as r:
        assert await r.loop.stop()
        with pytest.raises(EngineFailed, match="stopped"):
            await r.loop.call(lambda engine: None)
        assert r.deaths == []


async def test_no_letter_is_lost_while_the_thread_dies() -> None:
    """Letters posted from many threads around the moment of death all get an answer."""
    async with running() as r:
        start = threading.Barrier(5)

        def post_many() -> list[BaseException | None]:
            start.wait()
            futures = [r.loop.post(lambda engine: None) for _ in range(200)]
            return [future.exception(DEADLINE_S) for future in futures]

        def dies() -> Step:
            start.wait()
            return broken()

        await r.put(dies)
        answers = await asyncio.gather(*(asyncio.to_thread(post_many) for _ in range(4)))
        assert all(answer is None or isinstance(answer, EngineFailed) for several in answers for answer in several)
        assert any(isinstance(answer, EngineFailed) for several in answers for answer in several)


def _the_script_is_an_engine(engine: ScriptedEngine) -> Engine:
    return engine


# -- an engine that does not come back


class Call:
    """A step that lasts as long as the test wants."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> Step:
        self.begun.set()
        assert self.go_on.wait(DEADLINE_S)
        return Step()


async def test_a_call_is_stuck_when_it_lasts_far_longer_than_the_longest_before_it() -> None:
    async with running() as r:
        calls = [Call(), Call(), Call()]
        await r.put(*calls)
        for call, before_s, bound_s in zip(
            calls, (0.0, 1.0, STUCK_S), (STUCK_AT_FIRST_S, STUCK_S, STUCK_TIMES * STUCK_S), strict=True
        ):
            await asyncio.to_thread(call.begun.wait)
            began_s = r.now_s
            r.now_s = began_s + bound_s
            assert not r.loop.is_stuck, f"after {before_s} s before it"
            r.now_s += 0.001
            assert r.loop.is_stuck
            r.now_s = began_s + (1.0 if call is calls[0] else STUCK_S)  # what it took after all
            call.go_on.set()
        await r.until_steps(3)
        r.now_s += 1e6
        assert not r.loop.is_stuck, "an idle engine waits for mail"


async def test_an_abandoned_engine_is_told_as_dead_once_and_every_letter_is_answered_also_when_it_comes_back() -> None:
    async with running() as r:
        call = Call()
        await r.put(call, Step)
        await asyncio.to_thread(call.begun.wait)
        waiting = r.loop.post(methodcaller("end", 1))
        r.loop.abandon()
        await r.died.wait()
        with pytest.raises(EngineFailed, match="stuck"):
            await asyncio.wrap_future(waiting)
        with pytest.raises(EngineFailed, match="stuck"):
            await r.loop.call(methodcaller("end", 2))
        assert not r.loop.is_alive
        call.go_on.set()
        while not await r.loop.stop():  # it is given no time to end: one that is stuck would need for ever
            await asyncio.to_thread(time.sleep, 0.01)
        assert r.engine.calls == ["step"], "nothing more is computed"
        assert len(r.deaths) == 1
