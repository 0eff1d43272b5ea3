"""Threads for copies: modest, and never a reason to fail."""

from __future__ import annotations

import os
import threading

import pytest

from edge_llm.worker.offload import BIG_BYTES, modest_threads, off_loop

pytestmark = pytest.mark.anyio


def _niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


async def test_copies_take_less_of_a_core_than_the_thread_that_asks_for_them() -> None:
    with modest_threads() as threads:
        assert threads.submit(_niceness).result() == min(19, _niceness() + 5)


async def test_few_bytes_are_worked_on_at_once_and_many_in_another_thread() -> None:
    here = threading.get_ident()
    assert await off_loop(BIG_BYTES, threading.get_ident) == here
    assert await off_loop(BIG_BYTES + 1, threading.get_ident) != here


def test_a_process_that_is_nicer_already_gets_threads_all_the_same() -> None:
    found: list[int] = []

    def nicer() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 18)
        with modest_threads() as threads:  # its threads inherit 18
            found.append(threads.submit(_niceness).result())

    thread = threading.Thread(target=nicer)
    thread.start()
    thread.join()
    assert found == [19]
