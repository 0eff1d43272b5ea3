"""Work on many bytes leaves the event loop: tokens of other requests must not wait for a copy.

Owns the border between "here" and "in a thread", and how much of a core such threads may take from a busy engine.
Refuses to know what is done.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, TypeVar

# Copying or authenticating so many bytes takes about a millisecond.
BIG_BYTES: Final = 1 << 20
# Where one core does everything, a thread of this niceness gets a quarter of it beside a busy engine (sched(7): weight
# 335 against 1024), all of it beside an idle one. At equal shares a running stream waits for a copy as long as the
# copy takes; so it waits a little in several steps, and the copy takes longer.
_NICENESS: Final = 5
Result = TypeVar("Result")


def modest_threads() -> ThreadPoolExecutor:
    """Threads that leave most of the core to the engine. Linux only; elsewhere they are like any other."""
    return ThreadPoolExecutor(thread_name_prefix="bytes", initializer=_be_modest)


def _be_modest() -> None:
    if sys.platform == "linux":
        # on Linux niceness belongs to threads (setpriority(2), notes); one that may not change it works all the same
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS)


async def off_loop(size: int, work: Callable[[], Result]) -> Result:
    """Run `work` on `size` bytes: more than about a millisecond of it in a thread."""
    return await asyncio.to_thread(work) if size > BIG_BYTES else work()
