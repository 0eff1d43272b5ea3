"""How long things will take on a node: arithmetic on the rates it published and the work it has.

Pure. Owns the predictions that the scheduler weighs, each of which can be checked by hand. Refuses to know how a node
is chosen, and clocks. All results in seconds.

Forms: a decode step is linear in rows and KV cells read, a prompt piece linear in its positions and in the pairs it
attends to (worker/messages.py, Rates; papers.md 3.4). Beside running streams a worker computes one piece of a prompt
between two decode steps, so that both go on, each slower: `beside`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from edge_llm.worker.messages import Link, Rates, WorkerStatus

# Assumed of a worker that has measured nothing: only the order of equals depends on it.
_UNMEASURED_TOKENS_PER_S: Final = 100.0
_UNMEASURED_STEP_S: Final = 0.05
# Assumed of a way that has carried nothing: 1 GbE (blueprint section 1).
UNMEASURED_BYTES_PER_S: Final = 117e6
_UNMEASURED_ROUND_TRIP_S: Final = 0.001
# A sequence of which nothing is known but that it is there: medians of the Azure conversation trace (papers.md 2.2).
TYPICAL_PROMPT_TOKENS: Final = 1020
TYPICAL_ANSWER_TOKENS: Final = 129
_NOTHING_S: Final = 1e-9


@dataclass(frozen=True, slots=True)
class PromptWork:
    """Positions [start, start + tokens) of a prompt that a node has to compute; `is_served`: for another worker.
    due_s: from now, when its limit of TTFT is over (None: it has none)."""

    tokens: int
    start: int = 0
    is_served: bool = False
    due_s: float | None = None


@dataclass(frozen=True, slots=True)
class Stream:
    """A sequence that decodes on a node from `begins_s` on (0: it does) for `left` tokens and reads `cells` KV cells.
    `tokens` came in the `age_s` since it began (of one that goes on after its worker was lost: until it will);
    tpot_s: its limit, if any. ahead: how many of the node's prompts are read before it begins, the last one its own
    (0: it has none there)."""

    left: float
    cells: int = 0
    begins_s: float = 0.0
    tokens: int = 0
    age_s: float = 0.0
    tpot_s: float | None = None
    ahead: int = 0

    @property
    def is_lost(self) -> bool:
        """Whether its limit is over whenever the rest of it comes."""
        return self.tpot_s is not None and self.age_s > self.tpot_s * (self.tokens + self.left)


class Limits(NamedTuple):
    """What streams beside each other ask of the prompts that are read between their steps: the limits of theirs,
    strictest first; `is_each`: nobody is without one."""

    tpots_s: tuple[float, ...] = ()
    is_each: bool = True

    @classmethod
    def of(cls, streams: Collection[Stream], unknown: int) -> Limits:
        """A stream that is behind for good has nothing to ask for; nobody knows what `unknown` ones can bear."""
        tpots_s = {stream.tpot_s for stream in streams if stream.tpot_s is not None and not stream.is_lost}
        is_each = not unknown and all(stream.tpot_s is not None for stream in streams)
        return cls(tuple(sorted(tpots_s)), is_each)

    def beside(self, tpot_s: float | None) -> Limits:
        """The same with one more stream."""
        if tpot_s is None:
            return Limits(self.tpots_s, False)
        return self if tpot_s in self.tpots_s else Limits(tuple(sorted((*self.tpots_s, tpot_s))), self.is_each)

    def to_keep_s(self, step_s: float) -> float | None:
        """The strictest one that a stream can keep where a step takes so long; None: there is none."""
        return next((tpot_s for tpot_s in self.tpots_s if tpot_s > step_s), None)


NO_STREAMS: Final = Limits()


class Piece(NamedTuple):
    """Prompt work between two decode steps, on average: how long it takes, and how long as much would take where
    nothing runs beside it. Short pieces read less in their time: each is a call."""

    takes_s: float
    reads_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """What a node has to do. Of `sequences` that hold slots, `decoding` are past their prompts: their rows read
    `cells` KV cells in a step and will go on for `tokens_left` tokens, all together. `reserved_cells`: prompt and
    longest answer of all sequences. `streams`: them one by one, known only where somebody has limits (slo.py);
    unknown: how many of `decoding` are not among them, another gateway's or all; has_limits: somebody here can be made
    late. coming: of `sequences`, those that will decode here when their prompts have been read here."""

    sequences: int = 0
    decoding: int = 0
    cells: int = 0
    tokens_left: float = 0.0
    reserved_cells: int = 0
    prompts: tuple[PromptWork, ...] = ()
    streams: tuple[Stream, ...] = ()
    coming: tuple[Stream, ...] = ()
    limits: Limits = field(init=False)
    has_limits: bool = field(init=False)
    unknown: int = field(init=False)

    def __post_init__(self) -> None:
        # once: a thousand streams are looked at for each of a thousand plans
        unknown = max(0, self.decoding - sum(stream.begins_s <= 0.0 for stream in self.streams))
        object.__setattr__(self, "unknown", unknown)
        object.__setattr__(self, "limits", Limits.of(self.streams, unknown))
        due_s = (*(stream.tpot_s for stream in self.streams), *(prompt.due_s for prompt in self.prompts))
        object.__setattr__(self, "has_limits", any(limit_s is not None for limit_s in due_s))

    @property
    def served(self) -> int:
        """Prompts that are computed here for others, or wait for it."""
        return sum(prompt.is_served for prompt in self.prompts)

    @property
    def pending_tokens(self) -> int:
        return sum(prompt.tokens for prompt in self.prompts)

    @property
    def left(self) -> float:
        """Tokens that a stream here still has to come, on average."""
        return self.tokens_left / self.decoding if self.decoding else 0.0


def work_of(status: WorkerStatus) -> Work:
    """What a node says of itself, where nobody knows it better."""
    load = status.load
    depth = min(TYPICAL_PROMPT_TOKENS, status.n_ctx)
    prompts = load.sequences_waiting + 1 if load.pending_prompt_tokens else 0
    return Work(
        sequences=load.sequences_running,
        decoding=load.sequences_running,
        cells=load.sequences_running * depth,
        tokens_left=load.sequences_running * TYPICAL_ANSWER_TOKENS,
        reserved_cells=load.sequences_running * depth,
        prompts=tuple(
            PromptWork(load.pending_prompt_tokens // prompts, is_served=status.role != "decode") for _ in range(prompts)
        ),
    )


@dataclass(frozen=True, slots=True)
class NodeCost:
    """Predictions about one node."""

    rates: Rates
    chunk_tokens: int
    kv_bytes_per_token: int

    @classmethod
    def of(cls, status: WorkerStatus) -> NodeCost:
        rates, load = status.load.rates, status.load
        if not (rates.token_s or rates.call_s or rates.pair_s):
            token_s = 1 / (load.prefill_tokens_per_s or _UNMEASURED_TOKENS_PER_S)
            rates = _with(rates, token_s=token_s)
        if not (rates.run_s or rates.row_s or rates.cell_s):
            rates = _with(rates, run_s=load.decode_step_s or _UNMEASURED_STEP_S)
        return cls(rates, status.chunk_tokens, status.kv_bytes_per_token)

    def prefill_s(self, tokens: int, start: int = 0) -> float:
        """Positions [start, start + tokens) with nothing beside them."""
        if tokens <= 0:
            return 0.0
        end = start + tokens
        pieces = -(-end // self.chunk_tokens) - start // self.chunk_tokens
        rates = self.rates
        return pieces * rates.call_s + tokens * rates.token_s + rates.pair_s * tokens * (start + end) / 2

    def step_s(self, rows: float, cells: float) -> float:
        """One decode step."""
        return self.rates.run_s + rows * self.rates.row_s + cells * self.rates.cell_s if rows else 0.0

    def row_s(self, cells: float) -> float:
        """What one more sequence of `cells` KV cells adds to a step."""
        return self.rates.row_s + cells * self.rates.cell_s

    def queued_s(self, work: Work) -> float:
        """All prompt work that is there, with nothing beside it."""
        return sum(self.prefill_s(prompt.tokens, prompt.start) for prompt in work.prompts)

    def piece(self, step_s: float, limits: Limits = NO_STREAMS) -> Piece:
        """Prompt work between two decode steps of `step_s` (engine/pacing.py): bounded by their length and the streams'
        limits, or a chunk."""
        chunk_s, rates = self.prefill_s(self.chunk_tokens), self.rates
        if not rates.prompt_steps:
            return Piece(chunk_s, chunk_s)
        room_s = rates.prompt_steps * step_s
        tpot_s = limits.to_keep_s(step_s)
        if tpot_s is not None and rates.of_limit:
            most_s = max(room_s, rates.most_prompt_steps * step_s) if limits.is_each else room_s
            room_s = min(most_s, max(rates.of_limit * tpot_s - step_s, rates.least_prompt_steps * step_s))
        takes_s = min(chunk_s, max(room_s, rates.token_s))
        at_once_s = min(chunk_s, max(takes_s, rates.least_piece_steps * step_s))
        return Piece(takes_s, takes_s * min(1.0, self._of_call(at_once_s) / self._of_call(chunk_s)))

    def _of_call(self, piece_s: float) -> float:
        """Which part of a piece of that length is spent on its tokens."""
        rates = self.rates
        least_s = rates.call_s + rates.token_s
        return (max(piece_s, least_s) - rates.call_s) / max(piece_s, least_s) if least_s > rates.call_s else 1.0


@dataclass(frozen=True, slots=True)
class Beside:
    """What prompt work and a running stream cost each other: in so many turns, one piece and one step each."""

    turns: float
    prompt_loses_s: float
    stream_loses_s: float


def beside(prompt_s: float, piece: Piece, step_s: float, tokens: float) -> Beside:
    """`prompt_s` of prompt work, a `piece` at a time, beside streams with `tokens` steps of `step_s` to go."""
    if piece.reads_s <= 0.0:
        return Beside(0.0, 0.0, 0.0)
    turns = min(prompt_s / piece.reads_s, tokens)
    return Beside(turns, turns * (step_s + piece.takes_s - piece.reads_s), turns * piece.takes_s)


def handoff_tail_s(link: Link | None, total_bytes: float, last_bytes: float, compute_s: float) -> float:
    """What remains to be carried when the last piece was computed: that piece, or more on a way that is slower than
    the computing."""
    rate = link.bytes_per_s if link and link.bytes_per_s else UNMEASURED_BYTES_PER_S
    round_trip_s = link.round_trip_s if link and link.samples else _UNMEASURED_ROUND_TRIP_S
    return round_trip_s + max(last_bytes / rate, total_bytes / rate - compute_s)


@dataclass(frozen=True, slots=True)
class Side:
    """A node in a plan: how fast it is, what it has to do, how many positions of this prompt it holds already."""

    cost: NodeCost
    work: Work
    held: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """What counts of a request. `behind`: requests that are expected to wait for the node that computes its prompt.
    tpot_s: its limit, if any."""

    prompt_tokens: int
    answer_tokens: float
    behind: float = 0.0
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """From now on: until the first token, until the last, and what everybody else loses by it, summed."""

    ttft_s: float
    completion_s: float
    harm_s: float

    @property
    def everybody_s(self) -> float:
        """What a plan is judged by: the seconds that all wait."""
        return self.completion_s + self.harm_s


def predict_local(request: Request, decode: Side) -> Prediction:
    """The decode node computes the prompt itself, beside its streams."""
    reading = _reading(request, decode)
    return _decoding(request, decode, reading.ends_s, reading.harm_s, prompts=())


def predict_split(request: Request, prefill: Side, decode: Side, link: Link | None) -> Prediction:
    """The prefill node computes the prompt, its KV comes to the decode node meanwhile."""
    reading = _reading(request, prefill)
    positions = request.prompt_tokens - 1
    kv = decode.cost.kv_bytes_per_token
    last = min(positions, prefill.cost.chunk_tokens)
    missing = max(0, positions - decode.held)
    # nothing of it can be carried while others' prompts are computed
    tail_s = handoff_tail_s(link, missing * kv, min(missing, last) * kv, reading.ends_s - reading.begins_s)
    return _decoding(request, decode, reading.ends_s + tail_s, reading.harm_s, prompts=decode.work.prompts)


class _Reading(NamedTuple):
    """From when until when a prompt is computed, from now on, and what others lose there by it."""

    begins_s: float
    ends_s: float
    harm_s: float


def _reading(request: Request, side: Side) -> _Reading:
    cost, work = side.cost, side.work
    held = min(side.held, request.prompt_tokens - 1)
    own_s = cost.prefill_s(request.prompt_tokens - 1 - held, held)
    queued_s = [cost.prefill_s(prompt.tokens, prompt.start) for prompt in work.prompts]
    turn = read_in_turn(cost, work, [*queued_s, own_s])
    return _Reading(turn.begins_s, turn.ends_s, turn.harm_s + request.behind * own_s)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Of a decode step: `count` streams that all have `left` tokens to go."""

    count: int
    left: float
    cells: float


def read_in_turn(cost: NodeCost, work: Work, prompts_s: Sequence[float]) -> _Reading:
    """The last one of so much prompt work, one after another, beside the streams of the node, and the answers that
    begin as their prompts are read: harm_s is what all these lose by the last one. Answers whose prompts are read
    elsewhere are left out: when they come is too uncertain, and counting them made plans worse."""
    rows = [_Rows(work.decoding, work.left, work.cells)] if work.decoding and work.left > 0 else []
    begins_s = read_s = lose_s = 0.0
    for number, rest_s in enumerate(prompts_s, 1):
        begins_s, lose_s = read_s, 0.0
        while rows and rest_s > _NOTHING_S:
            step_s = cost.step_s(sum(row.count for row in rows), sum(row.cells for row in rows))
            piece = cost.piece(step_s, work.limits)
            if piece.reads_s <= 0.0:
                break
            turns = min(rest_s / piece.reads_s, min(row.left for row in rows))
            read_s, rest_s = read_s + turns * (step_s + piece.takes_s), rest_s - turns * piece.reads_s
            lose_s += sum(row.count for row in rows) * turns * piece.takes_s
            rows = [replace(row, left=row.left - turns) for row in rows if row.left - turns > _NOTHING_S]
        read_s += max(0.0, rest_s)
        rows += [_Rows(1, stream.left, stream.cells) for stream in work.coming if stream.ahead == number]
    return _Reading(begins_s, read_s, lose_s)


def _decoding(
    request: Request, decode: Side, ready_s: float, harm_s: float, prompts: tuple[PromptWork, ...]
) -> Prediction:
    """From a prompt that is there after `ready_s` to the last token, beside `prompts` that are still being read."""
    cost, work = decode.cost, decode.work
    depth = request.prompt_tokens + request.answer_tokens / 2
    # who reads a prompt now will decode beside this one
    step_s = cost.step_s(work.sequences + 1, work.cells + depth)
    alone_s = cost.step_s(work.decoding, work.cells)
    queued_s = sum(cost.prefill_s(prompt.tokens, prompt.start) for prompt in prompts)
    piece = cost.piece(step_s, work.limits.beside(request.tpot_s))
    others = beside(max(0.0, queued_s - ready_s), piece, step_s, request.answer_tokens)
    first_s = step_s + min(piece.takes_s, others.stream_loses_s)
    completion_s = ready_s + request.answer_tokens * step_s + others.stream_loses_s
    left_then = max(0.0, work.left - ready_s / alone_s) if alone_s else 0.0
    row_s = cost.row_s(depth)
    harm_s += work.decoding * min(request.answer_tokens, left_then) * row_s
    harm_s += len(prompts) * others.turns * row_s
    return Prediction(ready_s + first_s, completion_s, harm_s)


def _with(rates: Rates, **changes: float) -> Rates:
    return Rates(**({name: getattr(rates, name) for name in rates.__struct_fields__} | changes))
