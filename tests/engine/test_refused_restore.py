"""A state that llama.cpp refuses must leave nothing behind, and a context that it did poison must not go on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edge_llm.engine.backend import Row
from edge_llm.engine.llama import LlamaBackend, PoisonedContext
from edge_llm.errors import RestoreRefused
from edge_llm.kv.codec import StateBlob

IDS = [5, 9, 33, 41, 7, 100, 64, 12]


LoadBackend = Callable[..., LlamaBackend]


def answer(backend: LlamaBackend, slot: int) -> bytes:
    backend.prompt(slot, IDS[:-1], 0)
    logits = backend.decode([Row(slot, IDS[-1], len(IDS) - 1)]).tobytes()
    backend.drop(slot)
    return logits


def damaged(backend: LlamaBackend) -> StateBlob:
    """A state whose first layer claims another type: llama.cpp reads cells and refuses what follows."""
    layout = backend.facts.layout
    assert layout is not None
    backend.prompt(0, IDS[:-1], 0)
    state = backend.export(0, len(IDS) - 1)
    backend.drop(0)
    kind = bytes([layout.geometry.caches[0].layers[0].k_type, 0, 0, 0])
    row = layout.geometry.caches[0].layers[0].k_row_bytes.to_bytes(8, "little")
    at = bytes(state.buffer).index(kind + row)
    state.buffer[at] ^= 7
    return state


def test_a_refused_state_leaves_a_slot_that_answers_as_before(backend_of: LoadBackend) -> None:
    backend = backend_of()
    before = answer(backend, 1)
    with pytest.raises(RestoreRefused):
        backend.restore(1, damaged(backend))
    assert answer(backend, 1) == before


def test_a_refusal_just_after_a_cancellation_is_a_refusal_and_no_poisoned_context(backend_of: LoadBackend) -> None:
    """The interrupt of a call that is over must not break off the check."""
    backend = backend_of()
    bad = damaged(backend)
    backend.interrupt()
    with pytest.raises(RestoreRefused):
        backend.restore(1, bad)


class Poisoned(LlamaBackend):
    """Gives another answer after a state was refused."""

    def __init__(self, real: LlamaBackend) -> None:
        self.__dict__ = real.__dict__

    def _known_answer(self, slot: int) -> bytes:
        return super()._known_answer(slot)[::-1]


def test_a_context_that_answers_otherwise_after_a_refusal_is_not_asked_again(backend_of: LoadBackend) -> None:
    backend = Poisoned(backend_of())
    with pytest.raises(PoisonedContext):
        backend.restore(1, damaged(backend))
