"""Is this model, on this machine, by this build, exact? Measured bit for bit on logits.

Owns the rows of `edge-llm verify` and the level that follows from them. Works on any backend (tests plant faults in
one). Refuses to know the command line and where levels are kept.

Each row states one independence and compares every logit of at least STEPS decode steps with a reference: the same
text computed alone, in slot 0, in whole chunks. Steps are teacher-forced, so that one early difference does not hide
later ones. A first logit that agrees proves little: in a unified cache 18 of 24 runs that diverged later began equal.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from edge_llm.engine.backend import Backend, Logits, Row
from edge_llm.engine.level import LevelRecord
from edge_llm.engine.native import has_shape_dependent_kernels
from edge_llm.errors import EdgeLLMError
from edge_llm.kv.codec import StateBlob
from edge_llm.kv.frames import NEED_DATA, Chunk, FrameDecoder, FrameEncoder, Header
from edge_llm.kv.snapshot import UNSPLIT, Level, ids_digest

STEPS: Final = 64
RESUMED: Final = 32  # tokens that a resumed run gets as prompt instead of decoding them
DEPTHS: Final = (0, 600, 1500)
_TRANSFER_KEY: Final = bytes(32)
# Which slots take part in a decode call, in turn: every width, and holes at the start, the middle and the end.
_PATTERNS: Final = (
    (0, 1, 2, 3, 4, 5, 6, 7),
    (0, 1),
    (0, 1, 2, 4, 5, 6, 7),
    (2, 3, 4),
    (0, 2, 4, 6),
    (3,),
    (0, 1, 2, 3, 4),
    (1, 7),
    (1, 3, 4, 5, 6, 7),
    (5, 6, 7),
    (0, 7),
)
_PIECES: Final = (1, 7, 32, 100, 3, 64, 128)


class Verifiable(Backend, Protocol):
    """A backend whose threads can be changed while it runs."""

    def use_threads(self, threads: int | None) -> None:
        """Of both phases; None: as configured."""
        ...


@dataclass(slots=True)
class Comparison:
    """One row. `compared` logit vectors; differences counted, the first named, the largest kept."""

    name: str
    question: str
    compared: int = 0
    different: int = 0
    first_divergence: str | None = None
    largest_difference: float = 0.0
    error: str | None = None
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        return self.compared > 0 and not self.different and self.error is None

    def add(self, got: Logits, expected: Logits, where: str) -> None:
        """Compare two logit vectors bit for bit."""
        self.compared += 1
        if got.tobytes() == expected.tobytes() and np.isfinite(got).all():  # NaN everywhere is equal, too
            return
        self.different += 1
        self.first_divergence = self.first_divergence or where
        apart = np.abs(got - expected)
        if np.isfinite(apart).any():
            self.largest_difference = max(self.largest_difference, float(apart[np.isfinite(apart)].max()))


@dataclass(frozen=True, slots=True)
class Report:
    """What was found. `width` is the widest decode call that was compared."""

    rows: tuple[Comparison, ...]
    level: Level
    reason: str
    width: int
    seconds: float

    @property
    def record(self) -> LevelRecord:
        return LevelRecord(self.level, self.reason, self.width)

    @property
    def split_equals_whole(self) -> bool:
        """Under the same plan; also true for a model that does not split at all."""
        return all(row.holds for row in self.rows if row.name == "split")


@dataclass(slots=True)
class _Reference:
    """A text, alone in slot 0: prompt ids, teacher ids, and the logits after each of them."""

    prompt: list[int]
    teacher: list[int]
    logits: list[Logits] = field(default_factory=list)
    blob: StateBlob | None = None

    @property
    def depth(self) -> int:
        return len(self.prompt) - 1

    def row(self, slot: int, step: int) -> Row:
        """The decode row that gives `logits[step]`: the last prompt token, then the teacher's."""
        token = self.prompt[-1] if step == 0 else self.teacher[step - 1]
        return Row(slot, token, self.depth + step)


Progress = Callable[[int, int], None]


class Verifier:
    """All rows over one backend, with references of `depths` prompt tokens, one of them at least above 0. `run` leaves
    the backend empty."""

    def __init__(
        self,
        backend: Verifiable,
        depths: Sequence[int] = DEPTHS,
        steps: int = STEPS,
        threads: Sequence[int] = (1, 2, 4),
        on_progress: Progress = lambda done, total: None,
    ) -> None:
        self._backend, self._steps, self._threads = backend, steps, threads
        facts = backend.facts
        room = facts.n_ctx - steps - RESUMED - 2
        self._depths = sorted({min(depth, room) for depth in depths})
        self._on_progress = on_progress
        self._references: list[_Reference] = []

    def run(self) -> Report:
        started_s = time.perf_counter()
        rows = [Comparison(name, question) for name, question, _ in self._plan()]
        self._references = [self._reference(depth) for depth in self._depths]
        for number, (row, (_, _, compare)) in enumerate(zip(rows, self._plan(), strict=True)):
            self._on_progress(number, len(rows))
            row_started_s = time.perf_counter()
            try:
                compare(row)
            except EdgeLLMError as error:
                row.error = error.message
            self._clear()
            row.seconds = time.perf_counter() - row_started_s
        self._on_progress(len(rows), len(rows))
        return self._judge(rows, time.perf_counter() - started_s)

    def _plan(self) -> list[tuple[str, str, Callable[[Comparison], None]]]:
        rows: list[tuple[str, str, Callable[[Comparison], None]]] = [
            ("batch", "decode does not depend on the batch (widths 1 to 8, holes in the slots)", self._compare_batches),
            ("chunks", "prefill does not depend on the size of its pieces", self._compare_chunks),
            ("placement", "neither slot nor earlier prompts on the same worker show", self._compare_placement),
            ("threads", f"thread counts {', '.join(map(str, self._threads))} agree", self._compare_threads),
            ("resumed", "prompt + delivered tokens continue like the undisturbed run", self._compare_resumed),
        ]
        if self._can_split:
            rows.insert(3, ("split", "split equals whole, through frames and adoption", self._compare_split))
        return rows

    @property
    def _can_split(self) -> bool:
        facts = self._backend.facts
        return facts.splits and facts.layout is not None and facts.serves_prompts

    @property
    def _with_prompts(self) -> list[_Reference]:
        """Those that have something to prefill, the shortest first."""
        return [reference for reference in self._references if reference.depth]

    @property
    def width(self) -> int:
        return min(self._backend.facts.slots, 8)

    # -- references

    def _reference(self, depth: int) -> _Reference:
        ids = _text(self._backend.facts.vocab_size, depth + 1 + self._steps + RESUMED, seed=depth)
        reference = _Reference(ids[: depth + 1], ids[depth + 1 :])
        self._prompt(0, reference.prompt[:-1])
        if self._can_split and depth and self._backend.facts.memory == "full":
            reference.blob = self._backend.export(0, depth)
        for step in range(self._steps + RESUMED):
            reference.logits.append(self._decode([reference.row(0, step)])[0])
        self._clear()
        return reference

    def _prompt(self, slot: int, ids: Sequence[int], pieces: Iterator[int] | None = None) -> None:
        """Whole chunks, or pieces of the given sizes."""
        for p0, p1 in self._spans(len(ids), pieces):
            self._backend.prompt(slot, ids[p0:p1], p0)

    def _spans(self, total: int, pieces: Iterator[int] | None) -> Iterator[tuple[int, int]]:
        """[p0, p1) of each piece; without `pieces` they are chunks."""
        chunk_tokens, position = self._backend.facts.chunk_tokens, 0
        while position < total:
            size = next(pieces) if pieces else chunk_tokens
            end = min(total, position + min(size, chunk_tokens))
            yield position, end
            position = end

    def _decode(self, rows: Sequence[Row]) -> Logits:
        return np.array(self._backend.decode(rows))

    def _place(self, slot: int, reference: _Reference) -> None:
        """The reference's prompt into `slot`, by copying its KV where possible (faster than computing it again)."""
        if reference.blob is not None:
            self._backend.restore(slot, reference.blob)
        else:
            self._prompt(slot, reference.prompt[:-1])

    def _follow(self, row: Comparison, reference: _Reference, slot: int, first: int = 0) -> None:
        """Decode alone in `slot` and compare each step."""
        for step in range(first, first + self._steps):
            got = self._decode([reference.row(slot, step)])[0]
            row.add(got, reference.logits[step], f"depth {reference.depth}, step {step}")

    def _clear(self) -> None:
        for slot in range(self._backend.facts.slots):
            self._backend.drop(slot)

    # -- rows

    def _compare_batches(self, row: Comparison) -> None:
        """Sequences of all depths side by side; each call takes another set of slots."""
        lanes = [self._references[slot % len(self._references)] for slot in range(self.width)]
        for slot, reference in enumerate(lanes):
            self._place(slot, reference)
        steps = [0] * self.width
        turn = 0
        while min(steps) < self._steps:
            wanted = _PATTERNS[turn % len(_PATTERNS)]
            slots = [slot for slot in wanted if slot < self.width and steps[slot] < self._steps]
            turn += 1
            if not slots:
                continue
            logits = self._decode([lanes[slot].row(slot, steps[slot]) for slot in slots])
            for slot, got in zip(slots, logits, strict=True):
                where = f"slot {slot} of {len(slots)} rows, depth {lanes[slot].depth}, step {steps[slot]}"
                row.add(got, lanes[slot].logits[steps[slot]], where)
                steps[slot] += 1
        self._clear()
        self._compare_finished(row, lanes)

    def _compare_finished(self, row: Comparison, lanes: Sequence[_Reference]) -> None:
        """A slot in the middle is empty, as after a finished answer: the backend may fill the hole."""
        hole = self.width // 2
        slots = [slot for slot in range(self.width) if slot != hole]
        for slot in slots:
            self._place(slot, lanes[slot])
        for step in range(self._steps if slots else 0):
            logits = self._decode([lanes[slot].row(slot, step) for slot in slots])
            for slot, got in zip(slots, logits, strict=True):
                row.add(got, lanes[slot].logits[step], f"slot {slot}, slot {hole} empty, step {step}")

    def _compare_chunks(self, row: Comparison) -> None:
        reference = self._with_prompts[0]
        for shift in (0, 3):
            self._prompt(0, reference.prompt[:-1], _cycle(_PIECES, shift))
            self._follow(row, reference, 0)
            self._clear()
            if self._can_split:  # a mixed worker serves others in pieces too, out of another context
                self._backend.restore(0, self._serve(reference.prompt, _cycle(_PIECES, shift)))
                self._follow(row, reference, 0)
                self._clear()

    def _compare_placement(self, row: Comparison) -> None:
        """The last slot; and the prompt context after another prompt was there."""
        last = self._backend.facts.slots - 1
        for reference in self._references[:2]:
            self._prompt(last, reference.prompt[:-1])
            self._follow(row, reference, last)
            self._clear()
        if self._can_split and len(self._references) > 1:
            self._serve(self._references[0].prompt + self._references[0].teacher[:40])
            reference = self._references[1]
            self._backend.restore(0, self._serve(reference.prompt))
            self._follow(row, reference, 0)

    def _compare_split(self, row: Comparison) -> None:
        """Prompt context -> frames -> adoption in the last slot, every depth."""
        for reference in self._with_prompts:
            slot = self._backend.facts.slots - 1
            self._backend.restore(slot, self._serve(reference.prompt))
            self._follow(row, reference, slot)
            self._clear()

    def _compare_threads(self, row: Comparison) -> None:
        """Prefill and decode: a reference without a prompt would compare decode steps alone."""
        reference = self._with_prompts[0]
        try:
            for threads in self._threads:
                self._backend.use_threads(threads)
                self._prompt(0, reference.prompt[:-1])
                self._follow(row, reference, 0)
                self._clear()
                if self._can_split:
                    self._backend.restore(0, self._serve(reference.prompt))
                    self._follow(row, reference, 0)
                    self._clear()
        finally:
            self._backend.use_threads(None)

    def _compare_resumed(self, row: Comparison) -> None:
        for reference in self._references[:2]:
            self._prompt(0, reference.prompt + reference.teacher[: RESUMED - 1])
            self._follow(row, reference, 0, first=RESUMED)
            self._clear()

    def _serve(self, ids: Sequence[int], pieces: Iterator[int] | None = None) -> StateBlob:
        """ids[:-1] as two workers would: through the prompt context (whole chunks, or pieces of the given sizes), real
        frames and a StateBlob."""
        facts, backend = self._backend.facts, self._backend
        assert facts.layout is not None
        total = len(ids) - 1
        encoder = FrameEncoder(_TRANSFER_KEY)
        decoder = FrameDecoder(_TRANSFER_KEY, facts.kv_bytes_per_token, total, facts.chunk_tokens)
        identity = facts.identity
        header = Header(
            identity.compatibility,
            identity.exactness_class,
            facts.v_layout,
            facts.chunk_tokens,
            total,
            0,
            ids_digest(ids),
            "verify",
        )
        sent = list(encoder.send(header))
        backend.serve_open()
        for index, (p0, p1) in enumerate(self._spans(total, pieces)):
            backend.serve_prompt(ids[p0:p1], p0)
            sent += encoder.send(Chunk(index, p0, p1, backend.serve_export(p0, p1)))
        blob = StateBlob(facts.layout, total, 0)
        for part in (*sent, *encoder.end(total)):
            decoder.feed(part)
        while (event := decoder.next_event()) is not NEED_DATA:
            if isinstance(event, Chunk):
                blob.place(event.p0, event.p1, event.payload, facts.v_layout)
        decoder.eof()
        return blob

    # -- verdict

    def _judge(self, rows: Sequence[Comparison], seconds: float) -> Report:
        broken = [row for row in rows if not row.holds]
        split = [row for row in rows if row.name == "split"]
        level: Level = "exact" if not broken else "same-plan" if split and all(row.holds for row in split) else "none"
        names = ", ".join(row.name for row in broken)
        reason = f"differs: {names}; {self._cause()}" if broken else f"all {len(rows)} rows equal bit for bit"
        if not self._can_split:
            reason += f"; not split: {self._backend.facts.split_reason}"
        return Report(tuple(rows), level, reason, self.width, seconds)

    def _cause(self) -> str:
        """The known things that break exactness, as far as they are on here."""
        facts = self._backend.facts
        causes = []
        if facts.is_flash_attention:
            causes.append("flash attention picks kernels by row count and depth (--flash-attention off)")
        if has_shape_dependent_kernels(facts.build.get("system_info", "")):
            causes.append("this build has tinyBLAS, which picks kernels by shape (rebuild with -DGGML_LLAMAFILE=OFF)")
        if facts.policy == "fast":
            causes.append("policy fast leaves repacked and tiled kernels on (--policy exact)")
        if facts.memory in UNSPLIT:
            causes.append(f"{facts.memory} state is computed by chunk")
        return "; ".join(causes) or f"the cause is not known; formats here: {facts.quantization}"


def thread_counts() -> tuple[int, ...]:
    """1, and counts that use this machine's cores in other ways; more threads than cores is a fair test too."""
    cores = len(os.sched_getaffinity(0))
    return tuple(sorted({1, 2, cores, min(4, cores + 1)}))


def _text(vocab_size: int, count: int, seed: int) -> list[int]:
    """Ordinary tokens, the same everywhere."""
    rng = np.random.default_rng(seed)
    return [int(token) for token in rng.integers(3, vocab_size, count)]


def _cycle(values: Sequence[int], shift: int) -> Iterator[int]:
    index = shift
    while True:
        yield values[index % len(values)]
        index += 1
