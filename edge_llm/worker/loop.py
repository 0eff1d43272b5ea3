"""The one thread that owns the engine: mail in, steps out.

Owns the bridge between asyncio and the synchronous engine. Mail is a function of the engine, run between two steps;
its result comes back as a future. What a step produced is handed to asyncio in one call per step. Refuses to know
HTTP, tickets and what the mail means.

Invariants: nobody else touches the engine (except `interrupt`); mail is read in the order it was posted, all of it
before the next step; an idle engine costs nothing (the thread sleeps on its mailbox); every letter is answered, also
one that is posted while the thread ends; an error that is not ours ends the thread and is told to `on_death`, and so is
a call that does not come back (`is_stuck`, `abandon`): the thread is left where it is.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

import structlog

from edge_llm.engine.engine import Engine, Step
from edge_llm.errors import EdgeLLMError, EngineFailed

Result = TypeVar("Result")
STOP_S: Final = 30.0
# A call is stuck when it takes longer than this and than so many times the longest so far. A chunk of an 8B model takes
# a minute on a Pi 4; before the first step has shown what is usual here, its pages may come from a slow card.
STUCK_S: Final = 120.0
STUCK_TIMES: Final = 5.0
STUCK_AT_FIRST_S: Final = 600.0
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

    def __init__(
        self,
        engine: Engine,
        watch: Callable[[Engine, Step], None] = lambda engine, step: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._watch, self._clock = watch, clock
        self._busy_since_s: float | None = None  # while the engine is in a call
        self._longest_s = 0.0
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

    @property
    def is_stuck(self) -> bool:
        """Whether the engine is in a call that will not come back: a card that died under its pages, a native deadlock.
        The process lives and answers, so nobody else can tell."""
        since_s, longest_s = self._busy_since_s, self._longest_s
        bound_s = max(STUCK_S, STUCK_TIMES * longest_s) if longest_s else STUCK_AT_FIRST_S
        return self._closed is None and since_s is not None and self._clock() - since_s > bound_s

    def abandon(self) -> None:
        """Give up an engine that is stuck."""
        self._close(EngineFailed("the engine of this worker is stuck in a call"), is_death=True)

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
            await asyncio.to_thread(self._thread.join, STOP_S if self._closed is None else 0.0)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._take_mail():
                self._busy_since_s = began_s = self._clock()
                step = self._engine.step()
                self._busy_since_s = None
                self._longest_s = max(self._longest_s, self._clock() - began_s)
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
                return self._closed is None
            if letter is None:
                return False
            if self._closed is not None:
                letter.refuse(self._closed)
                return False
            self._busy_since_s = self._clock()
            letter.answer(self._engine)
            self._busy_since_s = None

    def _deliver(self, step: Step) -> None:
        if self._asyncio is not None and not self._asyncio.is_closed():
            self._asyncio.call_soon_threadsafe(self._on_step, step)

    def _close(self, error: EngineFailed, *, is_death: bool) -> None:
        """No letter gets in from here on; those that wait are refused, the engine is not asked again."""
        with self._closing:
            if self._closed is not None:
                return  # abandoned, and came back after all
            self._closed = error
        with suppress(queue.Empty):
            while True:
                if (letter := self._mail.get_nowait()) is not None:
                    letter.refuse(error)
        if is_death and self._asyncio is not None and not self._asyncio.is_closed():
            self._asyncio.call_soon_threadsafe(self._on_death, error)
