"""A real prompt call is broken off by llama.cpp itself, and leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from edge_llm.engine.backend import Interrupted, Row
from edge_llm.engine.llama import LlamaBackend
from edge_llm.kv.codec import StateBlob

IDS = [int(token) for token in np.random.default_rng(1).integers(5, 200, 100)]
LoadBackend = Callable[..., LlamaBackend]


def answer(backend: LlamaBackend) -> bytes:
    backend.prompt(0, IDS[:-1], 0)
    logits = backend.decode([Row(0, IDS[-1], len(IDS) - 1)]).tobytes()
    backend.drop(0)
    return logits


def test_an_interrupt_breaks_off_the_call_that_runs_and_it_can_be_done_again(backend_of: LoadBackend) -> None:
    backend = backend_of(chunk_tokens=128)
    expected = answer(backend)
    backend.interrupt()
    with pytest.raises(Interrupted):
        backend.prompt(0, IDS[:-1], 0)
    backend.arm()
    assert answer(backend) == expected, "half of the call was left behind"


def test_a_prompt_for_another_worker_is_broken_off_and_done_again_too(backend_of: LoadBackend) -> None:
    backend = backend_of(chunk_tokens=128)
    backend.serve_open()
    backend.serve_prompt(IDS[:64], 0)
    backend.serve_prompt(IDS[64:], 64)
    expected = backend.serve_export(0, len(IDS))
    backend.serve_open()
    backend.serve_prompt(IDS[:64], 0)
    backend.interrupt()
    with pytest.raises(Interrupted):
        backend.serve_prompt(IDS[64:], 64)
    backend.arm()
    backend.serve_prompt(IDS[64:], 64)
    assert backend.serve_export(0, len(IDS)) == expected


def test_an_interrupt_from_another_thread_is_heard_while_the_call_runs(backend_of: LoadBackend) -> None:
    """However long it takes until the other thread comes: calls are repeated until one is broken off."""
    backend = backend_of(chunk_tokens=128)
    began, breaker = threading.Event(), threading.Event()

    def interrupt() -> None:
        began.wait()
        backend.interrupt()
        breaker.set()

    thread = threading.Thread(target=interrupt)
    thread.start()
    backend.arm()
    try:
        with pytest.raises(Interrupted):
            for _ in range(100_000):
                began.set()
                backend.prompt(0, IDS[:-1], 0)
                backend.drop(0)
    finally:
        began.set()
        thread.join()
    assert breaker.is_set()


def test_decoding_hears_no_interrupt(backend_of: LoadBackend) -> None:
    backend = backend_of()
    backend.prompt(0, IDS[:8], 0)
    state: StateBlob = backend.export(0, 8)
    backend.interrupt()
    assert np.isfinite(backend.decode([Row(0, 7, 8)])).all()
    backend.drop(0)
    backend.restore(0, state)
