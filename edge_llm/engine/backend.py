"""What differs between a real model and a simulated one: the least a sequencer needs to run sequences.

Owns the seam below engine/sequencer.py. Two implementations: `LlamaBackend` (engine/llama.py) and
`SimulatedBackend` (engine/simulated.py). A backend knows tokens, positions and KV; it knows no requests,
sampling, text, budgets or network. Blueprint section 5 draws two engines; here one sequencer drives two
backends, so that scheduling, stop rules and slot bookkeeping exist once and the simulated engine tests them.

Invariants the sequencer keeps: one thread; `decode` rows in ascending slot order; positions of a slot are
contiguous from 0; a slot that failed is dropped before it is used again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from edge_llm.engine.engine import EngineFacts
from edge_llm.kv.codec import StateBlob

Logits = npt.NDArray[np.float32]


class Interrupted(Exception):
    """The running prompt call was aborted by `interrupt`; it left no KV behind and can be done again."""


class Row(NamedTuple):
    """One decode row: evaluate `token_id` at `position` of `slot`, give its logits. A tuple: there is one for every
    token, and making a dataclass takes several times as long."""

    slot: int
    token_id: int
    position: int


class Backend(Protocol):
    """One model, one thread."""

    @property
    def facts(self) -> EngineFacts: ...

    def prompt(self, slot: int, ids: Sequence[int], p0: int) -> None:
        """Compute KV of `ids` at positions p0.. on `slot`, without logits. Raises Interrupted, EngineFailed."""
        ...

    def decode(self, rows: Sequence[Row]) -> Logits:
        """One call for all rows. Returns float32 [len(rows), vocab_size], valid until the next call."""
        ...

    def drop(self, slot: int) -> None:
        """Free all KV of `slot`. Idempotent."""
        ...

    def restore(self, slot: int, blob: StateBlob) -> None:
        """Put positions [0, blob.filled_to) on empty `slot`. Raises RestoreRefused and leaves the slot empty."""
        ...

    def export(self, slot: int, n_tokens: int) -> StateBlob:
        """Whole KV of `slot`, positions [0, n_tokens)."""
        ...

    def serve_open(self, blob: StateBlob | None = None) -> None:
        """Clear the prompt context: the next served prompt starts at cell 0, with the positions of `blob` restored.
        Raises RestoreRefused and leaves the context empty."""
        ...

    def serve_prompt(self, ids: Sequence[int], p0: int) -> None:
        """Compute KV of `ids` at positions p0.. in the prompt context. Raises Interrupted, EngineFailed."""
        ...

    def serve_export(self, p0: int, p1: int) -> bytes:
        """Canonical payload of positions [p0, p1) of the prompt context, V in `facts.v_layout`."""
        ...

    def interrupt(self) -> None:
        """Any thread: abort the prompt call that runs now (`prompt` or `serve_prompt`), if one does."""
        ...

    def arm(self) -> None:
        """Forget earlier interrupts: called at the start of each step, after the loop took its mail."""
        ...

    def close(self) -> None: ...
