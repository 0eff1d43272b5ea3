"""The engine protocol: a model in this process, driven by exactly one thread.

Owns the seam between the loop (worker/loop.py) and whatever computes tokens. Implementation: the `Sequencer`, over
`LlamaBackend` (llama.cpp) or `SimulatedBackend` (hashes and a clock). Knows no network, no JSON, no asyncio.

Life of a sequence: `begin` (slot becomes busy; a snapshot restores part of its KV) -> `step` ... `step`
(prompt rest, then one token a step) -> the event with `finish_reason`, or `end` -> slot free.
Life of a served prompt: `serve` (a snapshot restores its beginning) -> `step` ... `step` (chunks of KV come out) ->
`is_last` chunk, or `end_served`.

Invariants: only `interrupt` may be called from another thread. `step` never blocks on anything but compute.
Rows of one decode call are in ascending slot order; prompt rows and decode rows never share a call.
Every error that concerns one sequence is reported in `Step.failures` and leaves the others running.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from edge_llm.engine.rates import Rates
from edge_llm.errors import EdgeLLMError
from edge_llm.kv.codec import BlobLayout, StateBlob
from edge_llm.kv.snapshot import Identity, Level, MemoryKind, Policy, VLayout
from edge_llm.request import NO_OPTIONS, Generation, TemplateOption, TokenEvent


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine is; fixed after start. Published by workers, recorded by benches.

    n_ctx: cells per sequence. slots: sequences that can decode at once (0: no decode context).
    chunk_tokens: borders of exported KV are absolute multiples of it.
    layout: how this engine's *decode* context lays out a state (None without decode context); prompt_layout: the same
    of its prompt context.
    v_layout: how V lies in payloads this engine exports.
    splits: whether KV can travel; split_reason says why not.
    """

    model_name: str
    model_sha256: str
    architecture: str
    quantization: str
    memory: MemoryKind
    n_ctx: int
    n_ctx_train: int
    slots: int
    serves_prompts: bool
    chunk_tokens: int
    vocab_size: int
    kv_bytes_per_token: int
    splits: bool
    split_reason: str
    identity: Identity
    layout: BlobLayout | None
    prompt_layout: BlobLayout | None
    v_layout: VLayout
    policy: Policy
    is_flash_attention: bool
    level: Level
    level_reason: str
    build: dict[str, str] = field(default_factory=dict)
    memory_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServedPrompt:
    """A prompt computed for another worker: KV of ids[:-1], shipped from position `start` on."""

    request_id: str
    ids: tuple[int, ...]
    start: int = 0


@dataclass(frozen=True, slots=True)
class KVChunk:
    """Canonical payload of positions [p0, p1) of a served prompt, in the engine's `v_layout`."""

    request_id: str
    p0: int
    p1: int
    payload: bytes
    is_last: bool


@dataclass(frozen=True, slots=True)
class KeptKV:
    """KV of a sequence, positions [0, len(ids)) of `ids`: its prompt and, as far as it is, its answer."""

    request_id: str
    ids: tuple[int, ...]
    state: StateBlob
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """`done` of `total` prompt positions have KV here (total = tokens before the one decode evaluates)."""

    request_id: str
    done: int
    total: int
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """A sequence or served prompt that cannot go on; its slot is already free."""

    request_id: str
    error: EdgeLLMError
    epoch: int = 0


class Step(NamedTuple):
    """What one step did. `decoded_rows` rows were decoded, `widest_call` of them in one call; `prompt_tokens` were
    prefilled."""

    events: tuple[TokenEvent, ...] = ()
    chunks: tuple[KVChunk, ...] = ()
    progress: tuple[PromptProgress, ...] = ()
    failures: tuple[Failure, ...] = ()
    kept: tuple[KeptKV, ...] = ()
    decoded_rows: int = 0
    widest_call: int = 0
    prompt_tokens: int = 0
    decode_s: float = 0.0
    prompt_s: float = 0.0


class Engine(Protocol):
    """One model in one process. Single-threaded: only worker/loop.py calls it."""

    @property
    def facts(self) -> EngineFacts: ...

    @property
    def rates(self) -> Rates:
        """How long work takes here, as measured so far. Any thread."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        ...

    def begin(
        self,
        slot: int,
        generation: Generation,
        snapshot: StateBlob | None = None,
        *,
        keeps_kv: Callable[[], bool] | None = None,
    ) -> int:
        """Start a generation on free slot `slot` (0 <= slot < facts.slots).

        With a snapshot, positions [0, snapshot.filled_to) are restored, the rest of `context_ids[:-1]` is
        prefilled here by later steps. Returns the number of restored positions. `keeps_kv` is asked in the step that
        ends it, on the engine's thread: whether that step shall give its KeptKV, for which running streams wait.
        Raises RestoreRefused (slot stays free and clean), ContextTooLong, InvalidRequest.
        """
        ...

    def serve(self, prompt: ServedPrompt, snapshot: StateBlob | None = None) -> None:
        """Start computing a prompt for another worker, from the end of a snapshot (of `facts.prompt_layout`) on.

        One at a time: raises Overloaded when busy; RestoreRefused leaves nothing begun."""
        ...

    def hold_served(self, is_held: bool) -> None:
        """Back-pressure: keep the served prompt where it is until released; `has_work` ignores it meanwhile.
        Running streams and local prompts go on. Idempotent, also without a served prompt."""
        ...

    def step(self) -> Step:
        """Prompt work of a micro-batch at most (what running streams leave time for), a row of each running stream."""
        ...

    def end(self, slot: int) -> None:
        """Drop the sequence on `slot`, if any, and free its KV. Idempotent."""
        ...

    def end_served(self, request_id: str) -> None:
        """Drop the served prompt if it is still the current one. Idempotent."""
        ...

    def export(self, slot: int) -> KeptKV:
        """Whole KV of a *running* sequence as far as it is (drain, checkpoint); the sequence goes on."""
        ...

    def interrupt(self) -> None:
        """Any thread: abort the prompt call that runs now, if one does; that piece is simply done again by a
        later step unless its owner was ended (`end` / `end_served`) in between. Harmless at any moment: post the
        cancellation first, then interrupt."""
        ...

    def close(self) -> None:
        """Free native memory. No call may follow."""
        ...


class Vocabulary(Protocol):
    """Text <-> ids, chat template, pieces. Its own copy of the vocabulary: never behind a decode step.

    Thread rule: one thread at a time."""

    @property
    def size(self) -> int: ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """End-of-generation tokens."""
        ...

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]: ...

    def render_chat(
        self, messages: Sequence[dict[str, str]], options: Mapping[str, TemplateOption] = NO_OPTIONS
    ) -> str:
        """Apply the model's chat template (sandboxed), generation prompt added; what it does not know of `options` it
        passes over. Raises InvalidRequest."""
        ...

    def piece(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token; may be a part of a character. Control tokens give b""."""
        ...
