"""The one thread that owns the engine: mail in, steps out.

Owns the bridge between asyncio and the synchronous engine. Mail is a function of the engine, run between two steps;
its result comes back as a future. What a step produced is handed to asyncio in one call per step. Refuses to know
HTTP, tickets and what the mail means.

Invariants: nobody else touches the engine (except `interrupt`); an idle engine costs nothing (the thread sleeps on
its mailbox); an error that is not ours ends the thread, fails everything that waits and is told to `on_death`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import structlog

from edge_llm.engine.engine import Engine, Step
from edge_llm.errors import EdgeLLMError, EngineFailed

Result = TypeVar("Result")
log = structlog.get_logger()


class EngineLoop:
    """Start it inside a running event loop; `on_step` and `on_death` are called there."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._mail: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._death: EngineFailed | None = None
        self._on_step: Callable[[Step], None] = lambda step: None
        self._on_death: Callable[[EngineFailed], None] = lambda error: None
        self._asyncio: asyncio.AbstractEventLoop | None = None

    @property
    def is_alive(self) -> bool:
        return self._death is None and self._thread.is_alive()

    def start(self, on_step: Callable[[Step], None], on_death: Callable[[EngineFailed], None]) -> None:
        self._on_step, self._on_death = on_step, on_death
        self._asyncio = asyncio.get_running_loop()
        self._thread.start()

    async def call(self, letter: Callable[[Engine], Result]) -> Result:
        """Run `letter` on the engine thread between two steps and give its result."""
        return await asyncio.wrap_future(self.post(letter))

    def post(self, letter: Callable[[Engine], Result]) -> Future[Result]:
        """The same without waiting."""
        future: Future[Result] = Future()
        if self._death is not None:
            future.set_exception(self._death)
        else:
            self._mail.put(lambda: _answer(future, letter, self._engine))
        return future

    def interrupt_with(self, letter: Callable[[Engine], Result]) -> Future[Result]:
        """Post `letter` and end the prompt call that runs now, so that it is read at once."""
        future = self.post(letter)
        self._engine.interrupt()
        return future

    async def stop(self) -> None:
        """End the thread after the step that runs now."""
        if self._thread.is_alive():
            self._mail.put(None)
            self._engine.interrupt()
            await asyncio.to_thread(self._thread.join, 30.0)

    def _run(self) -> None:
        try:
            while self._take_mail():
                step = self._engine.step()
                self._deliver(step)
        except Exception as error:  # top of the thread: whatever it was, the engine cannot be trusted
            log.error("engine thread died", error=repr(error), exc_info=True)
            self._die(EngineFailed(f"the engine of this worker died: {error!r}"))

    def _take_mail(self) -> bool:
        """Read all mail; sleep on the mailbox while there is nothing to compute. False: time to stop."""
        while True:
            try:
                letter = self._mail.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if letter is None:
                return False
            letter()

    def _deliver(self, step: Step) -> None:
        if self._asyncio is not None and not self._asyncio.is_closed():
            self._asyncio.call_soon_threadsafe(self._on_step, step)

    def _die(self, error: EngineFailed) -> None:
        self._death = error
        while not self._mail.empty():
            if (letter := self._mail.get()) is not None:
                letter()
        if self._asyncio is not None and not self._asyncio.is_closed():
            self._asyncio.call_soon_threadsafe(self._on_death, error)


def _answer(future: Future[Result], letter: Callable[[Engine], Result], engine: Engine) -> None:
    """Our errors are answers; anything else also ends the loop."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(letter(engine))
    except EdgeLLMError as error:
        future.set_exception(error)
    except BaseException as error:
        future.set_exception(EngineFailed(f"the engine of this worker failed: {error!r}"))
        raise
