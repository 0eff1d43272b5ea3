"""Work on many bytes leaves the event loop: tokens of other requests must not wait for a copy.

Owns the border between "here" and "in a thread". Refuses to know what is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

# Copying or authenticating so many bytes takes about a millisecond.
BIG_BYTES: Final = 1 << 20
Result = TypeVar("Result")


async def off_loop(size: int, work: Callable[[], Result]) -> Result:
    """Run `work` on `size` bytes: more than about a millisecond of it in a thread."""
    return await asyncio.to_thread(work) if size > BIG_BYTES else work()
