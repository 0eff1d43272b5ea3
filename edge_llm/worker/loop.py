"""The one thread that owns the engine: mail in, steps out.

Owns the bridge between asyncio and the synchronous engine. Mail is a function of the engine, run between two steps;
its result comes back as a future. What a step produced is handed to asyncio in one call per step. Refuses to know
HTTP, tickets and what the mail means.

Invariants: nobody else touches the engine (except `interrupt`); mail is read in the order it was posted, all of it
before the next step; an idle engine costs nothing (the thread sleeps on its mailbox); every letter is answered, also
one that is posted while the thread ends; an error that is not ours ends the thread and is told to `on_death`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

import structlog

from edge_llm.engine.engine import Engine, Step
from edge_llm.errors import EdgeLLMError, EngineFailed

Result = TypeVar("Result")
STOP_S: Final = 30.0
log = structlog.get_logger()


class _Mail(Protocol):
    def answer(self, engine: Engine) -> None: ...

    def refuse(self, error: EdgeLLMError) -> None: ...


@dataclass(frozen=True, slots=True)
class _Letter(Generic[Result]):
    work: Callable[[Engine], Result]
    future: Future[Result] = field(default_factory=Future)

    def answer(self, engine: Engine) -> None:
        """Our errors are answers; anything else also ends the loop."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.work(engine))
        except EdgeLLMError as error:
            self.future.set_exception(error)
        except BaseException as error:
            self.future.set_exception(EngineFailed(f"the engine of this worker failed: {error!r}"))
            raise

    def refuse(self, error: EdgeLLMError) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class EngineLoop:
    """Start it inside a running event loop; `on_step` and `on_death` are called there, `watch` on the engine thread."""

    def __init__(self, engine: Engine, watch: Callable[[Engine, Step], None] = lambda engine, step: None) -> None:
        self._engine = engine
        self._watch = watch
        self._mail: queue.SimpleQueue[_Mail | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed: EngineFailed | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._on_step: Callable[[Step], None] = lambda step: None
        self._on_death: Callable[[EngineFailed], None] = lambda error: None
        self._asyncio: asyncio.AbstractEventLoop | None = None

    @property
    def is_alive(self) -> bool:
        return self._closed is None and self._thread.is_alive()

    def start(self, on_step: Callable[[Step], None], on_death: Callable[[EngineFailed], None]) -> None:
        self._on_step, self._on_death = on_step, on_death
        self._asyncio = asyncio.get_running_loop()
        self._thread.start()

    async def call(self, work: Callable[[Engine], Result]) -> Result:
        """Run `work` on the engine thread between two steps and give its result."""
        return await asyncio.wrap_future(self.post(work))

    def post(self, work: Callable[[Engine], Result]) -> Future[Result]:
        """The same without waiting."""
        letter = _Letter(work)
        with self._closing:
            if self._closed is None:
                self._mail.put(letter)
                return letter.future
        letter.refuse(self._closed)
        return letter.future

    def interrupt_with(self, work: Callable[[Engine], Result]) -> Future[Result]:
        """Post `work` and end the prompt call that runs now, so that it is read at once.

        The interrupt may hit a prompt that `work` does not mean, or none: the engine does an interrupted piece again
        unless its owner was ended, and the letter is already in the box when the next step begins.
        """
        future = self.post(work)
        if self.is_alive:
            self._engine.interrupt()
        return future

    async def stop(self) -> bool:
        """End the thread after the step that runs now. False: it is stuck, the engine must not be closed."""
        if self._thread.is_alive():
            self._mail.put(None)
            self._engine.interrupt()
            await asyncio.to_thread(self._thread.join, STOP_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._take_mail():
                step = self._engine.step()
                self._watch(self._engine, step)
                self._deliver(step)
        except Exception as error:  # top of the thread: whatever it was, the engine cannot be trusted
            log.error("engine thread died", error=repr(error), exc_info=True)
            self._close(EngineFailed(f"the engine of this worker died: {error!r}"), is_death=True)
        else:
            self._close(EngineFailed("this worker was stopped"), is_death=False)

    def _take_mail(self) -> bool:
        """Read all mail; sleep on the mailbox while there is nothing to compute. False: time to stop."""
        while True:
            try:
                letter = self._mail.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if letter is None:
                return False
            letter.answer(self._engine)

    def _deliver(self, step: Step) -> None:
        if self._asyncio is not None and not self._asyncio.is_closed():
            self._asyncio.call_soon_threadsafe(self._on_step, step)

    def _close(self, error: EngineFailed, *, is_death: bool) -> None:
        """No letter gets in from here on; those that wait are refused, the engine is not asked again."""
        with self._closing:
            self._closed = error
        while not self._mail.empty():
            if (letter := self._mail.get()) is not None:
                letter.refuse(error)
        if is_death and self._asyncio is not None and not self._asyncio.is_closed():
            self._asyncio.call_soon_threadsafe(self._on_death, error)
