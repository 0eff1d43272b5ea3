"""A row of `verify` counts only if a planted fault makes it fail: each fault below breaks one thing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from edge_llm.engine.backend import Logits, Row
from edge_llm.engine.llama import LlamaBackend
from edge_llm.engine.verify import Report, Verifier
from edge_llm.errors import EngineFailed
from edge_llm.kv.codec import StateBlob

DEPTHS = (0, 70, 140)
LoadBackend = Callable[..., LlamaBackend]


class Faulty(LlamaBackend):
    """A real backend that is right until a subclass says otherwise."""

    def __init__(self, real: LlamaBackend) -> None:
        self.__dict__ = real.__dict__


class DependsOnBatch(Faulty):
    """One bit of one logit differs in calls of more than four rows."""

    def decode(self, rows: Sequence[Row]) -> Logits:
        logits = np.array(super().decode(rows))
        if len(rows) > 4:
            logits.view(np.uint32)[0, 7] ^= 1
        return logits


class DependsOnHoles(Faulty):
    """Rows behind a hole are computed a little differently."""

    def decode(self, rows: Sequence[Row]) -> Logits:
        logits = np.array(super().decode(rows))
        slots = [row.slot for row in rows]
        if slots[-1] - slots[0] >= len(slots):
            logits.view(np.uint32)[-1, 0] ^= 1
        return logits


class DependsOnPieces(Faulty):
    """The last token of a piece that ends off a border is forgotten and computed as another one."""

    def prompt(self, slot: int, ids: Sequence[int], p0: int) -> None:
        if (p0 + len(ids)) % 32 == 1 and len(ids) < 8:
            ids = [*ids[:-1], (ids[-1] + 1) % self.facts.vocab_size]
        super().prompt(slot, ids, p0)


class DependsOnSlot(Faulty):
    def decode(self, rows: Sequence[Row]) -> Logits:
        logits = np.array(super().decode(rows))
        if len(rows) == 1 and rows[0].slot == self.facts.slots - 1:
            logits.view(np.uint32)[0, 1] ^= 1
        return logits


class LeavesEarlierPrompt(Faulty):
    """The prompt context is not cleared: the next prompt meets the KV of the one before."""

    opened = 0

    def serve_open(self, blob: StateBlob | None = None) -> None:
        self.opened += 1
        if self.opened == 1:
            super().serve_open(blob)


class LosesABit(Faulty):
    """One bit of the KV that is shipped flips."""

    def serve_export(self, p0: int, p1: int) -> bytes:
        payload = bytearray(super().serve_export(p0, p1))
        payload[len(payload) // 3] ^= 16
        return bytes(payload)


class SwapsChunks(Faulty):
    """The second chunk carries the positions of the first."""

    def serve_export(self, p0: int, p1: int) -> bytes:
        return super().serve_export(0, p1 - p0) if p0 else super().serve_export(p0, p1)


class RestoresLess(Faulty):
    """Adoption drops the newest positions without a word."""

    def restore(self, slot: int, blob: StateBlob) -> None:
        short = StateBlob(blob.layout, blob.filled_to - 1, 0)
        short.place(0, blob.filled_to - 1, blob.payload(0, blob.filled_to - 1), blob.layout.v_layout)
        super().restore(slot, short)


class DependsOnThreads(Faulty):
    threads: int | None = 1

    def use_threads(self, threads: int | None) -> None:
        self.threads = threads
        super().use_threads(threads)

    def decode(self, rows: Sequence[Row]) -> Logits:
        logits = np.array(super().decode(rows))
        if self.threads == 2:
            logits.view(np.uint32)[0, 3] ^= 1
        return logits


class PrefillDependsOnThreads(Faulty):
    """Decode does not; a prompt that two threads compute is another one."""

    threads: int | None = 1

    def use_threads(self, threads: int | None) -> None:
        self.threads = threads
        super().use_threads(threads)

    def prompt(self, slot: int, ids: Sequence[int], p0: int) -> None:
        if self.threads == 2:
            ids = [*ids[:-1], (ids[-1] + 1) % self.facts.vocab_size]
        super().prompt(slot, ids, p0)


class ServesByPieces(Faulty):
    """Prompts of this worker are right, those that it computes for others are not when a piece is odd."""

    def serve_prompt(self, ids: Sequence[int], p0: int) -> None:
        if len(ids) == 7:
            ids = [*ids[:-1], (ids[-1] + 1) % self.facts.vocab_size]
        super().serve_prompt(ids, p0)


class ServesByThreads(Faulty):
    """Only a prompt for others that two threads compute is another one."""

    threads: int | None = 1

    def use_threads(self, threads: int | None) -> None:
        self.threads = threads
        super().use_threads(threads)

    def serve_prompt(self, ids: Sequence[int], p0: int) -> None:
        if self.threads == 2:
            ids = [*ids[:-1], (ids[-1] + 1) % self.facts.vocab_size]
        super().serve_prompt(ids, p0)


class GivesNoNumbers(Faulty):
    """The same nonsense whatever is asked: bit for bit equal."""

    def decode(self, rows: Sequence[Row]) -> Logits:
        return np.full_like(super().decode(rows), np.nan)


class DecodesUnlikePrefill(Faulty):
    """KV written by decode differs from KV written by prefill: a resumed run then continues differently."""

    def decode(self, rows: Sequence[Row]) -> Logits:
        return super().decode([Row(row.slot, (row.token_id + 1) % self.facts.vocab_size, row.position) for row in rows])


def verify(backend: LlamaBackend) -> Report:
    return Verifier(backend, DEPTHS, steps=24, threads=(1, 2)).run()


def broken(report: Report) -> set[str]:
    return {row.name for row in report.rows if not row.holds}


def test_an_exact_backend_is_exact_in_every_row(backend_of: LoadBackend) -> None:
    report = verify(backend_of())
    assert broken(report) == set()
    assert report.level == "exact"
    assert [row.name for row in report.rows] == ["batch", "chunks", "placement", "split", "threads", "resumed"]
    assert all(row.compared >= 24 for row in report.rows)


@pytest.mark.parametrize(
    ("fault", "row", "level"),
    [
        (DependsOnBatch, "batch", "same-plan"),
        (DependsOnHoles, "batch", "same-plan"),
        (DependsOnPieces, "chunks", "same-plan"),
        (DependsOnSlot, "placement", "none"),
        (LeavesEarlierPrompt, "placement", "none"),
        (LosesABit, "split", "none"),
        (SwapsChunks, "split", "none"),
        (RestoresLess, "split", "none"),
        (DependsOnThreads, "threads", "same-plan"),
        (PrefillDependsOnThreads, "threads", "same-plan"),
        (ServesByPieces, "chunks", "same-plan"),
        (ServesByThreads, "threads", "same-plan"),
        (GivesNoNumbers, "split", "none"),
        (DecodesUnlikePrefill, "resumed", "same-plan"),
    ],
)
def test_a_planted_fault_turns_its_row_red(backend_of: LoadBackend, fault: type[Faulty], row: str, level: str) -> None:
    report = verify(fault(backend_of(slots=8)))
    assert row in broken(report)
    assert report.level == level
    red = next(found for found in report.rows if found.name == row)
    assert red.error or (red.first_divergence and red.largest_difference >= 0 and red.different)
    assert row in report.reason


def test_a_row_whose_engine_fails_is_red_and_says_why(backend_of: LoadBackend) -> None:
    class Fails(Faulty):
        def serve_prompt(self, ids: Sequence[int], p0: int) -> None:
            raise EngineFailed("no KV cells left")

    report = verify(Fails(backend_of()))
    assert not report.split_equals_whole
    assert next(row for row in report.rows if row.name == "split").error == "no KV cells left"


def test_flash_attention_lowers_the_level_and_is_named_as_the_cause(backend_of: LoadBackend) -> None:
    report = Verifier(backend_of(n_ctx=1024, chunk_tokens=128, flash_attention="on"), (0, 300, 600), threads=(1,)).run()
    assert report.level == "same-plan"
    assert "flash attention" in report.reason
