"""The real backend: one GGUF model, a context for decode slots and one for prompts of others.

Owns the calls on both contexts, the start-up self-test, and the moves between native state bytes and `StateBlob`.
Refuses to know how a model is chosen, measured and loaded (engine/load.py), requests, sampling, text and networks.

Life of a start: state layout learned from a real blob -> split and rejoined once -> restored once -> a row and a short
prompt timed. What fails the self-test is served unsplit, with the reason in `facts.split_reason`.

Invariants: the prompt context is unified, holds one prompt, from cell 0; the decode context has one stream per
slot. Local prompts are computed in their slot's own stream (blueprint section 4 has them computed in the prompt
context and adopted: measured equal bit for bit, and here their KV is held once instead of twice).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from edge_llm.engine.backend import Interrupted, Logits, Row
from edge_llm.engine.batch import CELL_BLOCK, RowCost, cells_read, fillers
from edge_llm.engine.engine import EngineFacts
from edge_llm.engine.native import NativeContext, NativeModel
from edge_llm.engine.pacing import ROW_BLOCK
from edge_llm.engine.rates import Rates
from edge_llm.engine.vocabulary import LlamaVocabulary
from edge_llm.errors import LocalProtocolError, RestoreRefused, WorkerError
from edge_llm.kv.codec import BlobLayout, StateBlob, UnaccountedState, cut, extract, learn

_SELF_TEST_TOKENS: Final = 24
_TIMED_TOKENS: Final = 64  # enough rows for the kernels of prompts, under 2 s at 40 tokens/s
_TIMED_CELLS: Final = 1000  # with the timed rows they stay in their last block
_TIMED_STEPS: Final = 4
_SERVED, _EXPORT = 0, 1  # sequence ids of the prompt context


class PoisonedContext(Exception):
    """A context whose results are not what they were. None of our errors on purpose: no caller may go on with it."""


def known_ids(n_vocab: int, count: int) -> list[int]:
    """A fixed text of ordinary tokens, the same on every node."""
    return [3 + (7919 * i + 104729) % (n_vocab - 3) for i in range(count)]


class LlamaBackend:
    """`Backend` over llama.cpp. Build it with `load`; one thread, except `interrupt`."""

    def __init__(
        self,
        model: NativeModel,
        facts: EngineFacts,
        decode: NativeContext | None,
        prompts: NativeContext | None,
        window: int = 0,
    ) -> None:
        self._model = model
        self._decode_context, self._prompt_context = decode, prompts
        self._contexts = [context for context in (decode, prompts) if context is not None]
        self._export_buffer = bytearray()
        self._facts = facts
        self._row_cost = RowCost(0.0, 0.0)
        self._prompt_call_s = self._prompt_token_s = 0.0
        self._window = window
        self._filled: set[int] = set()  # slots with KV: a hole there is no place for a throw-away row
        self._canary = b""
        self._can_abort = facts.memory in ("full", "sliding-window")

    @property
    def facts(self) -> EngineFacts:
        return self._facts

    @property
    def row_cost(self) -> RowCost:
        return self._row_cost

    @property
    def first_rates(self) -> Rates:
        """What `start` measured, before any work."""
        cost = self._row_cost
        return Rates(cost.run_s, cost.row_s, cost.cell_s, self._prompt_call_s, self._prompt_token_s)

    @property
    def pieces(self) -> LlamaVocabulary:
        """Token texts for the engine thread, from the loaded model itself."""
        return LlamaVocabulary(self._model)

    def prompt(self, slot: int, ids: Sequence[int], p0: int) -> None:
        self._filled.add(slot)
        if not self._slots.prompt(ids, p0, slot):
            raise Interrupted

    def decode(self, rows: Sequence[Row]) -> Logits:
        context = self._slots
        if len(rows) == 1:  # nothing to arrange, and it is what a lone stream waits for
            (row,) = rows
            self._filled.add(row.slot)
            return context.decode([row.token_id], [row.position], [row.slot])
        slots = [row.slot for row in rows]
        self._filled.update(slots)
        idle = fillers(slots, self._filled, self._row_cost, max(row.position for row in rows) + 1)
        if not idle:
            return context.decode([row.token_id for row in rows], [row.position for row in rows], slots)
        every = sorted([*rows, *(Row(slot, 0, 0) for slot in idle)], key=lambda row: row.slot)
        try:
            logits = context.decode(
                [row.token_id for row in every], [row.position for row in every], [row.slot for row in every]
            )
        finally:
            for slot in idle:
                context.remove(slot)
        return logits[[row.slot not in idle for row in every]]

    def drop(self, slot: int) -> None:
        self._filled.discard(slot)
        self._slots.remove(slot)

    def restore(self, slot: int, blob: StateBlob) -> None:
        try:
            self._slots.set_state(slot, blob.buffer)
            last = self._slots.last_position(slot)
            if last != blob.filled_to - 1:
                raise RestoreRefused(
                    f"llama.cpp restored {last + 1} of {blob.filled_to} positions; recomputing the prompt here"
                )
        except RestoreRefused:
            self._slots.remove(slot)
            self._check_canary(slot)
            raise
        self._filled.add(slot)

    def _check_canary(self, slot: int) -> None:
        """After a refused restore: does this slot still give the known answer? llama.cpp has left K and V of a refused
        state in place (its issue 27068); in masked cells finite numbers do no harm, and others do not get here
        (kv/payload.py). A context that does not is not asked again: this error ends the engine."""
        if self._canary and self._known_answer(slot) != self._canary:
            raise PoisonedContext(
                f"slot {slot} gives other logits since llama.cpp refused a state; this worker starts anew"
            )

    def _known_answer(self, slot: int) -> bytes:
        ids = known_ids(self._model.n_vocab, _SELF_TEST_TOKENS + 1)
        try:
            # an interrupt that was meant for an earlier call must not leave half of it out
            self._slots.prompt(ids[:-1], 0, slot, can_abort=False)
            return self._slots.decode(ids[-1:], [len(ids) - 1], [slot]).tobytes()
        finally:
            self._slots.remove(slot)

    def export(self, slot: int, n_tokens: int) -> StateBlob:
        if self._facts.layout is None:
            raise WorkerError(f"the KV of this model cannot travel: {self._facts.split_reason}")
        if 0 < self._window < n_tokens:
            # llama_kv_cache::state_write leaves out what the window masks
            raise WorkerError(f"only the last {self._window} positions of a running sequence of this model travel")
        # asking llama.cpp for the size costs as much as the copy, zeroing a buffer more; running streams wait for both
        try:
            state = np.empty(self._facts.layout.size(n_tokens), np.uint8).data
        except MemoryError as error:  # where memory is limited for real: the sequence itself is well
            raise WorkerError(f"there is no memory to read out the KV of {n_tokens} positions") from error
        self._slots.state_into(slot, state)
        return StateBlob.from_native(self._facts.layout, state, n_tokens)

    def serve_open(self, blob: StateBlob | None = None) -> None:
        context = self._prompts
        context.clear()
        if blob is None:
            return
        context.set_state(_SERVED, blob.buffer)
        if context.last_position(_SERVED) != blob.filled_to - 1:
            context.clear()
            raise RestoreRefused(f"llama.cpp restored another number of positions than {blob.filled_to}")

    def serve_prompt(self, ids: Sequence[int], p0: int) -> None:
        if not self._prompts.prompt(ids, p0, _SERVED):
            raise Interrupted

    def serve_export(self, p0: int, p1: int) -> bytes:
        layout = self._facts.prompt_layout
        assert layout is not None
        context, size = self._prompts, layout.size(p1 - p0)
        if len(self._export_buffer) < size:
            self._export_buffer = bytearray(size)
        state = memoryview(self._export_buffer)[:size]
        context.mark(_SERVED, _EXPORT, p0, p1)
        try:
            context.state_into(_EXPORT, state)
        finally:
            context.remove(_EXPORT)
        return extract(layout, state, p0, p1)

    def interrupt(self) -> None:
        """No-op for recurrent state: llama.cpp cannot take back part of it, so a piece there runs to its end."""
        if self._can_abort:
            for context in self._contexts:
                context.abort()

    def arm(self) -> None:
        for context in self._contexts:
            context.arm()

    def use_threads(self, threads: int | None) -> None:
        """Threads of both phases from the next call on; `verify` compares counts. None: as configured."""
        for context in self._contexts:
            context.use_threads(threads)

    def close(self) -> None:
        for context in self._contexts:
            context.close()
        self._model.close()

    @property
    def _slots(self) -> NativeContext:
        if self._decode_context is None:
            raise LocalProtocolError("this worker has no decode context")
        return self._decode_context

    @property
    def _prompts(self) -> NativeContext:
        if self._prompt_context is None:
            raise LocalProtocolError("this worker has no prompt context")
        return self._prompt_context

    # -- start-up

    def start(self) -> None:
        """Learn the state layouts, split and rejoin one sequence, time a row and a run."""
        ids = known_ids(self._model.n_vocab, _SELF_TEST_TOKENS + 1)
        try:
            if not self._facts.splits:
                raise UnaccountedState(self._facts.split_reason)
            layouts = [self._learn(context, ids) for context in self._contexts]
            self._adopt_layouts(layouts, ids)
        except (UnaccountedState, RestoreRefused, WorkerError) as error:
            self._facts = replace(
                self._facts, splits=False, split_reason=error.message, layout=None, prompt_layout=None
            )
        if self._decode_context is not None:
            self._canary = self._known_answer(0)
            self._row_cost = self._measure_rows()
        self._prompt_call_s, self._prompt_token_s = self._time_prompt(self._contexts[-1])

    def _learn(self, context: NativeContext, ids: Sequence[int]) -> BlobLayout:
        context.prompt(ids[:-1], 0, 0)
        try:
            return learn(context.state(0), _SELF_TEST_TOKENS)
        finally:
            context.remove(0)

    def _adopt_layouts(self, layouts: list[BlobLayout], ids: Sequence[int]) -> None:
        if len({layout.geometry for layout in layouts}) != 1:
            raise UnaccountedState("prompt and decode context keep different KV")
        prompt_layout = layouts[-1] if self._prompt_context is not None else None
        decode_layout = layouts[0] if self._decode_context is not None else None
        v_layout = layouts[-1].v_layout
        self._facts = replace(
            self._facts,
            layout=decode_layout,
            prompt_layout=prompt_layout,
            v_layout=v_layout,
            kv_bytes_per_token=layouts[-1].geometry.kv_bytes_per_token,  # what a real state has, not what a header says
        )
        if prompt_layout is not None:
            self._check_split(ids[:-1], prompt_layout)
        if decode_layout is not None:
            self._check_restore(ids, decode_layout)

    def _check_split(self, ids: Sequence[int], layout: BlobLayout) -> None:
        """Chunks joined are the whole state, byte for byte."""
        half = len(ids) // 2 + 1
        self.serve_open()
        self.serve_prompt(ids[:half], 0)
        joined = StateBlob(layout, len(ids), _SERVED)
        joined.place(0, half, self.serve_export(0, half), self._facts.v_layout)
        self.serve_prompt(ids[half:], half)
        joined.place(half, len(ids), self.serve_export(half, len(ids)), self._facts.v_layout)
        whole = cut(layout, self._prompts.state(_SERVED), len(ids), 0, len(ids))
        self._prompts.clear()
        if bytes(joined.payload(0, len(ids))) != bytes(whole):
            raise UnaccountedState("self-test failed: KV chunks joined differ from the whole state")

    def _check_restore(self, ids: Sequence[int], layout: BlobLayout) -> None:
        """A restored sequence gives the bits of the one it was copied from (in another slot where there is one)."""
        target = self._facts.slots - 1
        self.prompt(0, ids[:-1], 0)
        blob = StateBlob.from_native(layout, self._slots.state(0), len(ids) - 1)
        before = self._slots.decode(ids[-1:], [len(ids) - 1], [0]).tobytes()
        self.drop(0)
        self.restore(target, blob)
        after = self._slots.decode(ids[-1:], [len(ids) - 1], [target]).tobytes()
        self.drop(target)
        if before != after:
            raise UnaccountedState(
                "self-test failed: a restored sequence gives other logits than the one it was copied from"
            )

    def _measure_rows(self) -> RowCost:
        rows = min(self._facts.slots, 4)
        one_row_s, many_rows_s = self._time_rows(1), self._time_rows(rows)
        cost = RowCost.fit(one_row_s, many_rows_s, rows)
        return replace(cost, cell_s=self._time_cell(one_row_s))

    def _time_cell(self, one_row_s: float) -> float:
        """Seconds of reading one KV cell, from a row behind many cells of zeros; 0 where that cannot be tried."""
        layout = self._facts.layout
        cells = min(_TIMED_CELLS, self._facts.n_ctx - _TIMED_STEPS)
        if layout is None or cells < _TIMED_CELLS // 2:
            return 0.0
        zeros = StateBlob(layout, cells, 0)
        for p0 in range(0, cells, _TIMED_TOKENS):  # in pieces: memory for one state is what a worker counts with
            p1 = min(cells, p0 + _TIMED_TOKENS)
            zeros.place(p0, p1, bytes(layout.geometry.payload_bytes(p1 - p0)), layout.v_layout)
        try:
            self.restore(0, zeros)
            best_s = min(self._timed_row(cells + step) for step in range(_TIMED_STEPS))
        except RestoreRefused:
            return 0.0
        finally:
            self.drop(0)
        return max(0.0, best_s - one_row_s) / (cells_read(cells) - CELL_BLOCK)

    def _timed_row(self, position: int) -> float:
        started_s = time.perf_counter()
        self._slots.decode([1], [position], [0])
        return time.perf_counter() - started_s

    def _time_prompt(self, context: NativeContext) -> tuple[float, float]:
        """Seconds per piece of a prompt and per token of it, at its beginning: from a long piece and a short one."""
        most = min(_TIMED_TOKENS, self._facts.chunk_tokens, self._facts.n_ctx - 1)
        seconds: list[float] = []
        for tokens in (most, min(ROW_BLOCK, most)):
            started_s = time.perf_counter()
            context.prompt(known_ids(self._model.n_vocab, tokens), 0, 0)
            seconds.append(time.perf_counter() - started_s)
            context.remove(0)
        long_s, short_s = seconds
        if most <= ROW_BLOCK:
            return 0.0, long_s / most
        call_s = max(0.0, (short_s * most - long_s * ROW_BLOCK) / (most - ROW_BLOCK))
        return call_s, max(0.0, long_s - call_s) / most

    def _time_rows(self, rows: int) -> float:
        best_s = float("inf")
        for position in range(4):
            started_s = time.perf_counter()
            self._slots.decode([1] * rows, [position] * rows, range(rows))
            best_s = min(best_s, time.perf_counter() - started_s)
        for slot in range(rows):
            self.drop(slot)
        return best_s
