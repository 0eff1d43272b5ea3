"""Sequences on slots: which runs next, what it emits, when it ends. The engine, over any backend.

Owns slots, the prompt queue, the time budget, sampling calls, stop rules and token events. Refuses to know
llama.cpp, networks, tickets and JSON. Implements `engine.Engine`; the same class drives the real and the
simulated backend, so the rules below exist once.

One `step`: a piece of the oldest prompt that may advance, if running streams leave room for one, then a row for
every sequence whose KV is complete up to its last token, in one decode call or in several where depths differ much.

Invariants: `kv_tokens` positions of a slot have KV, always contiguous from 0; a sequence decodes exactly when
`kv_tokens == len(ids) - 1`; an interrupted piece leaves no KV and is simply done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edge_llm.engine.backend import Backend, Interrupted, Logits, Row
from edge_llm.engine.batch import RowCost, calls, cells_read, next_border, piece_end, smoothed
from edge_llm.engine.engine import EngineFacts, Failure, KeptKV, KVChunk, PromptProgress, ServedPrompt, Step, Vocabulary
from edge_llm.engine.pacing import ROW_BLOCK, Pace, room_s, whole_rows
from edge_llm.engine.rates import NOTHING_KNOWN, RateBook, Rates
from edge_llm.engine.sampling import sample
from edge_llm.engine.text import TextStream
from edge_llm.errors import ContextTooLong, EdgeLLMError, EngineFailed, InvalidRequest, LocalProtocolError, Overloaded
from edge_llm.kv.codec import StateBlob
from edge_llm.request import FinishReason, Generation, TokenEvent


@dataclass(slots=True)
class _Sequence:
    slot: int
    generation: Generation
    ids: list[int]
    kv_tokens: int
    text: TextStream
    keeps_kv: Callable[[], bool] | None
    # Its KV became complete in this step: running streams waited for that, a new row must not add to it.
    waits_a_step: bool = False
    # Tokens that its client has, and since when the first of them.
    drawn: int = 0
    first_s: float = 0.0

    @property
    def is_decoding(self) -> bool:
        return self.kv_tokens == len(self.ids) - 1

    @property
    def index(self) -> int:
        """Index of the next generated token."""
        return len(self.ids) - len(self.generation.prompt_ids)

    @property
    def left(self) -> int:
        """How many tokens may still be drawn."""
        return self.generation.max_tokens - self.index


@dataclass(slots=True)
class _Served:
    prompt: ServedPrompt
    kv_tokens: int = 0
    exported: int = 0
    is_held: bool = False

    @property
    def total(self) -> int:
        return len(self.prompt.ids) - 1


@dataclass(slots=True)
class _Outcome:
    """What a step collects; becomes a `Step`."""

    events: list[TokenEvent] = field(default_factory=list)
    chunks: list[KVChunk] = field(default_factory=list)
    progress: list[PromptProgress] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    kept: list[KeptKV] = field(default_factory=list)
    decoded_rows: int = 0
    widest_call: int = 0
    prompt_tokens: int = 0
    decode_s: float = 0.0
    prompt_s: float = 0.0


class Sequencer:
    """`engine.Engine` over a backend. See the protocol for the contract of each method."""

    def __init__(
        self,
        backend: Backend,
        vocabulary: Vocabulary,
        clock: Callable[[], float] = time.perf_counter,
        first: Rates = NOTHING_KNOWN,
    ) -> None:
        """`first`: what is known of durations before any work."""
        self._backend = backend
        self._vocabulary = vocabulary
        self._clock = clock
        self._sequences: dict[int, _Sequence] = {}
        self._prompts: list[int] = []  # slots with prompt work, oldest first
        self._served: _Served | None = None
        self._is_served_turn = True
        self._skipped_steps = 0
        self._interrupts = 0  # in a row
        self._prompt_token_s = first.token_s
        self._decode_step_s = first.run_s + first.row_s
        self._book = RateBook(first)
        # Level same-plan promises equal text only for equal pieces (blueprint section 4); below it nothing is promised,
        # and streams keep their pace.
        self._has_fixed_pieces = backend.facts.level == "same-plan"

    @property
    def facts(self) -> EngineFacts:
        return self._backend.facts

    @property
    def rates(self) -> Rates:
        return self._book.rates

    @property
    def has_work(self) -> bool:
        return bool(self._sequences) or self._can_serve

    @property
    def _has_streams(self) -> bool:
        return any(sequence.is_decoding for sequence in self._sequences.values())

    @property
    def _can_serve(self) -> bool:
        return self._served is not None and not self._served.is_held

    def begin(
        self,
        slot: int,
        generation: Generation,
        snapshot: StateBlob | None = None,
        *,
        keeps_kv: Callable[[], bool] | None = None,
    ) -> int:
        self._check_room(slot, generation)
        ids = list(generation.context_ids)
        restored = 0
        if snapshot is not None and snapshot.filled_to:
            if snapshot.filled_to > len(ids) - 1:
                raise InvalidRequest(f"a snapshot of {snapshot.filled_to} positions for {len(ids)} tokens")
            self._backend.restore(slot, snapshot)
            restored = snapshot.filled_to
        sequence = _Sequence(slot, generation, ids, restored, TextStream(generation.stop), keeps_kv)
        if generation.age_s:
            sequence.drawn, sequence.first_s = len(generation.delivered_ids), self._clock() - generation.age_s
        for token_id in generation.delivered_ids:
            sequence.text.push(self._vocabulary.piece(token_id))
        sequence.waits_a_step = restored > 0 and self._has_streams
        self._sequences[slot] = sequence
        if not sequence.is_decoding:
            self._prompts.append(slot)
        return restored

    def serve(self, prompt: ServedPrompt, snapshot: StateBlob | None = None) -> None:
        if not self.facts.serves_prompts:
            raise EngineFailed("this worker has no prompt context: its role is decode")
        if self._served is not None:
            raise Overloaded("a prompt of another request is being computed here")
        if len(prompt.ids) - 1 > self.facts.n_ctx:
            raise ContextTooLong(
                f"the prompt has {len(prompt.ids)} tokens, the context {self.facts.n_ctx}", param="prompt"
            )
        total, restored = len(prompt.ids) - 1, snapshot.filled_to if snapshot is not None else 0
        if restored >= max(total, 1):
            raise InvalidRequest(f"a snapshot of {restored} positions leaves nothing of {total} to compute")
        self._backend.serve_open(snapshot)
        self._served = _Served(prompt, kv_tokens=restored, exported=min(prompt.start, total))

    def hold_served(self, is_held: bool) -> None:
        """Back-pressure: do not advance the served prompt until released. Idempotent, also without a prompt."""
        if self._served is not None:
            self._served.is_held = is_held

    def step(self) -> Step:
        self._backend.arm()
        outcome = _Outcome()
        self._advance_prompt(outcome)
        self._decode(outcome)
        return Step(
            tuple(outcome.events),
            tuple(outcome.chunks),
            tuple(outcome.progress),
            tuple(outcome.failures),
            tuple(outcome.kept),
            outcome.decoded_rows,
            outcome.widest_call,
            outcome.prompt_tokens,
            outcome.decode_s,
            outcome.prompt_s,
        )

    def end(self, slot: int) -> None:
        if self._sequences.pop(slot, None) is not None:
            self._forget_prompt(slot)
            self._backend.drop(slot)

    def end_served(self, request_id: str) -> None:
        if self._served is not None and self._served.prompt.request_id == request_id:
            self._served = None

    def export(self, slot: int) -> KeptKV:
        sequence = self._sequences.get(slot)
        if sequence is None or not sequence.kv_tokens:
            raise LocalProtocolError(f"slot {slot} has no KV to export")
        return self._export(sequence)

    def interrupt(self) -> None:
        self._backend.interrupt()

    def close(self) -> None:
        self._backend.close()

    def _check_room(self, slot: int, generation: Generation) -> None:
        if not 0 <= slot < self.facts.slots or slot in self._sequences:
            raise LocalProtocolError(f"slot {slot} is not a free slot of {self.facts.slots}")
        if generation.cells > self.facts.n_ctx:
            raise ContextTooLong(
                f"prompt and max_tokens need {generation.cells} tokens of context, there are {self.facts.n_ctx}",
                param="max_tokens",
            )
        worst = max(max(generation.prompt_ids), max(generation.delivered_ids, default=0))
        if worst >= self.facts.vocab_size or min(generation.prompt_ids) < 0:
            raise InvalidRequest(
                f"token id {worst} is outside the vocabulary of {self.facts.vocab_size}", param="prompt"
            )

    def _forget_prompt(self, slot: int) -> None:
        if slot in self._prompts:
            self._prompts.remove(slot)

    # -- prompt work

    def _advance_prompt(self, outcome: _Outcome) -> None:
        """One piece: of the oldest local prompt and of the served one in turn, so that neither starves."""
        if not self._prompts and not self._can_serve:
            self._skipped_steps = 0
            return
        room = self._prompt_room_s()
        if room == 0.0:
            self._skipped_steps += 1
            return
        if self._served is not None and self._can_serve and (self._is_served_turn or not self._prompts):
            self._is_served_turn = False
            self._advance_served(self._served, room, outcome)
        elif self._prompts:
            self._is_served_turn = True
            self._advance_local(self._sequences[self._prompts[0]], room, outcome)
        if outcome.prompt_tokens:
            self._skipped_steps = 0

    def _prompt_room_s(self) -> float | None:
        """Time that running streams leave for a prompt now; None: nobody waits, pieces are fixed, or no step was ever
        made."""
        streams = [sequence for sequence in self._sequences.values() if sequence.is_decoding]
        if not streams or self._has_fixed_pieces:
            return None
        now_s, rows = self._clock(), len(streams)
        cells = rows * cells_read(max(len(sequence.ids) for sequence in streams))
        step_s = self._book.step_s(rows, cells) or self._decode_step_s
        paces = [Pace(one.generation.tpot_s, one.drawn, now_s - one.first_s, one.left) for one in streams]
        return room_s(step_s, paces, self._skipped_steps) if step_s else None

    def _piece_end(self, p0: int, total: int, room: float | None) -> int:
        budget = None
        if room is not None:
            tokens = self._book.tokens_in(room, p0)
            if tokens is None:
                tokens = room / self._prompt_token_s if self._prompt_token_s else ROW_BLOCK
            budget = whole_rows(tokens)
        if self._interrupts and not self._has_fixed_pieces:
            # whoever cancels does not ask whose prompt it is: others' go on in pieces that end in time
            least = max(ROW_BLOCK, self.facts.chunk_tokens >> self._interrupts)
            budget = least if budget is None else min(budget, least)
        return piece_end(p0, total, self.facts.chunk_tokens, budget)

    def _advance_local(self, sequence: _Sequence, room: float | None, outcome: _Outcome) -> None:
        p0, total = sequence.kv_tokens, len(sequence.ids) - 1
        p1 = self._piece_end(p0, total, room)
        generation = sequence.generation

        def compute() -> None:
            self._backend.prompt(sequence.slot, sequence.ids[p0:p1], p0)

        try:
            if not self._timed_prompt(compute, p0, p1, outcome):
                return
        except EngineFailed as error:
            self._fail(sequence, error, outcome)
            return
        sequence.waits_a_step = p1 == total and self._has_streams
        sequence.kv_tokens = p1
        outcome.progress.append(PromptProgress(generation.request_id, p1, total, generation.epoch))
        # oldest first keeps time to first token fair; a finished prompt leaves the queue
        if sequence.is_decoding:
            self._forget_prompt(sequence.slot)

    def _advance_served(self, served: _Served, room: float | None, outcome: _Outcome) -> None:
        p0 = served.kv_tokens
        p1 = self._piece_end(p0, served.total, room)
        prompt = served.prompt
        try:
            if not self._timed_prompt(lambda: self._backend.serve_prompt(prompt.ids[p0:p1], p0), p0, p1, outcome):
                return
            served.kv_tokens = p1
            self._export_served(served, outcome)
        except EngineFailed as error:
            self._served = None
            outcome.failures.append(Failure(prompt.request_id, error))
            return
        outcome.progress.append(PromptProgress(prompt.request_id, p1, served.total))
        if p1 == served.total:
            self._served = None

    def _export_served(self, served: _Served, outcome: _Outcome) -> None:
        """Ship what became complete: whole chunks up to the last border, everything at the end."""
        done, total = served.kv_tokens, served.total
        ready = total if done == total else next_border(done, self.facts.chunk_tokens) - self.facts.chunk_tokens
        while served.exported < ready:
            p0 = served.exported
            p1 = min(ready, next_border(p0, self.facts.chunk_tokens))
            payload = self._backend.serve_export(p0, p1)
            outcome.chunks.append(KVChunk(served.prompt.request_id, p0, p1, payload, p1 == total))
            served.exported = p1

    def _timed_prompt(self, compute: Callable[[], None], p0: int, p1: int, outcome: _Outcome) -> bool:
        """Run a prompt call; False when it was interrupted (its piece stays to be done)."""
        started_s = self._clock()
        try:
            compute()
        except Interrupted:
            self._interrupts += 1
            return False
        self._interrupts = 0
        outcome.prompt_s += self._clock() - started_s
        outcome.prompt_tokens += p1 - p0
        self._prompt_token_s = smoothed(self._prompt_token_s, outcome.prompt_s / (p1 - p0))
        self._book.on_prompt(p0, p1, outcome.prompt_s)
        return True

    # -- decode work

    def _decode(self, outcome: _Outcome) -> None:
        running = self._rows_of_this_step()
        if not running:
            return
        is_observed, ended = self._book.begin_step(), list[_Sequence]()
        started_s = self._clock()
        for part in self._calls(running):
            ended += self._decode_call(part, is_observed, outcome)
        if outcome.decoded_rows:
            outcome.decode_s = self._clock() - started_s
            self._decode_step_s = smoothed(self._decode_step_s, outcome.decode_s)
        for sequence in ended:  # after the clock was read: it is no part of a decode step
            self._keep(sequence, outcome)
            self.end(sequence.slot)

    def _calls(self, running: list[_Sequence]) -> list[list[_Sequence]]:
        if len(running) == 1:
            return [running]
        cells = [len(sequence.ids) for sequence in running]
        return [running[part.start : part.stop] for part in calls(cells, RowCost(*self._book.decode_law))]

    def _decode_call(self, running: Sequence[_Sequence], is_observed: bool, outcome: _Outcome) -> list[_Sequence]:
        """One call for neighbouring slots; those that ended with it. A call that fails leaves the others alone."""
        rows = [Row(sequence.slot, sequence.ids[-1], len(sequence.ids) - 1) for sequence in running]
        cells = cells_read(max(row.position for row in rows) + 1)
        started_s = self._clock()
        try:
            logits = self._backend.decode(rows)
        except EngineFailed as error:
            for sequence in running:
                self._fail(sequence, error, outcome)
            return []
        ended = [
            sequence
            for sequence, row_logits in zip(running, logits, strict=True)
            if self._draw(sequence, row_logits, outcome)
        ]
        outcome.decoded_rows += len(rows)
        outcome.widest_call = max(outcome.widest_call, len(rows))
        if is_observed:
            self._book.on_decode(len(rows), len(rows) * cells, self._clock() - started_s)
        return ended

    def _rows_of_this_step(self) -> list[_Sequence]:
        """Sequences whose KV is complete, in slot order; one whose KV became whole just now joins at the next step."""
        able = [self._sequences[slot] for slot in sorted(self._sequences) if self._sequences[slot].is_decoding]
        running = [sequence for sequence in able if not sequence.waits_a_step]
        for sequence in able:
            sequence.waits_a_step = False
        return running

    def _draw(self, sequence: _Sequence, logits: Logits, outcome: _Outcome) -> bool:
        """Draw a token; whether it ended its sequence."""
        sequence.kv_tokens += 1
        try:
            token_id = sample(logits, sequence.ids, sequence.generation.sampling, len(sequence.ids))
        except EdgeLLMError as error:
            self._fail(sequence, error, outcome)
            return False
        if not sequence.drawn:
            sequence.first_s = self._clock()
        sequence.drawn += 1
        outcome.events.append(self._accept(sequence, token_id))
        return outcome.events[-1].finish_reason is not None

    def _keep(self, sequence: _Sequence, outcome: _Outcome) -> None:
        """Read the KV out before the slot is freed, of one sequence a step: running streams wait for it. What cannot be
        read is not kept: the answer is whole anyway."""
        if sequence.keeps_kv is None or outcome.kept or not sequence.keeps_kv():
            return
        try:
            outcome.kept.append(self._export(sequence))
        except EdgeLLMError:
            return

    def _export(self, sequence: _Sequence) -> KeptKV:
        state = self._backend.export(sequence.slot, sequence.kv_tokens)
        generation = sequence.generation
        return KeptKV(generation.request_id, tuple(sequence.ids[: sequence.kv_tokens]), state, generation.epoch)

    def _accept(self, sequence: _Sequence, token_id: int) -> TokenEvent:
        """Append a drawn token and say what it means for the text and the end of the answer."""
        generation, index = sequence.generation, sequence.index
        sequence.ids.append(token_id)
        reason: FinishReason | None = None
        if token_id in generation.stop_ids:
            text, reason = sequence.text.flush(), "stop"
        else:
            text, is_stopped = sequence.text.push(self._vocabulary.piece(token_id))
            if is_stopped:
                reason = "stop"
            elif index + 1 == generation.max_tokens:
                text, reason = text + sequence.text.flush(), "length"
        return TokenEvent(generation.request_id, generation.epoch, index, token_id, text, reason)

    def _fail(self, sequence: _Sequence, error: EdgeLLMError, outcome: _Outcome) -> None:
        self.end(sequence.slot)
        outcome.failures.append(Failure(sequence.generation.request_id, error, sequence.generation.epoch))
