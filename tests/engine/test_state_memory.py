"""The memory of a state is free when nobody holds the state: it is large, and Python looks for cycles seldom."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest

from edge_llm.engine.llama import LlamaBackend
from edge_llm.kv.codec import BlobLayout, StateBlob

IDS = [5, 9, 33, 41, 7, 100, 64, 12]
LoadBackend = Callable[..., LlamaBackend]


@pytest.fixture(autouse=True)
def _no_search_for_cycles() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def snapshot_of(layout: BlobLayout | None, state: StateBlob) -> StateBlob:
    """The same KV as `state` has, in memory of its own, for the context of `layout`."""
    assert layout is not None
    snapshot = StateBlob(layout, state.n_tokens, 0)
    snapshot.place(0, state.n_tokens, state.payload(0, state.n_tokens), state.layout.v_layout)
    return snapshot


def test_a_state_that_was_put_into_the_engine_is_not_held_by_it(backend_of: LoadBackend) -> None:
    backend = backend_of()
    backend.prompt(0, IDS, 0)
    state = backend.export(0, len(IDS))
    backend.drop(0)
    for layout, put in (
        (backend.facts.layout, lambda snapshot: backend.restore(0, snapshot)),
        (backend.facts.prompt_layout, backend.serve_open),
    ):
        snapshot = snapshot_of(layout, state)
        held = weakref.ref(snapshot.memory)
        put(snapshot)
        del snapshot
        assert held() is None


def test_a_state_that_was_read_out_is_not_held_by_the_engine(backend_of: LoadBackend) -> None:
    backend = backend_of()
    backend.prompt(0, IDS, 0)
    state = backend.export(0, len(IDS))
    held = weakref.ref(state.memory.base.obj)  # type: ignore[union-attr]
    del state
    assert held() is None
