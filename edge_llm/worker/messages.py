"""The contract between gateway and workers, and between workers: one file, frozen, versioned, closed.

Every JSON body between our own processes is one of these. Unknown fields, wrong types and numbers out of
bounds are refused (`decode` raises RemoteProtocolError). No pickle, no class lookup by name. One exception: what a
worker says of itself (WorkerStatus and its parts) may have fields that are not known here. While a cluster is updated,
an older gateway must see newer workers, and a field that says more asks for nothing. New fields there need a default.
Pure: knows neither sockets nor engines. Bytes of KV are kv/frames.py's business.

Routes of a worker (every one but /healthz, /readyz and /metrics needs a ticket, worker/tickets.py; those three answer
with a word or with numbers about the worker as a whole):
  POST /tokenize  TokenizeRequest -> TokenizeReply           op "tokenize"
  POST /decode    DecodeRequest   -> DecodeReply (202)       op "decode"
  POST /cancel    CancelRequest   -> CancelReply             op "cancel"
  GET  /events?gateway=ID -> application/x-ndjson, one EventBatch a line, one connection per gateway; op "events"
  POST /prefill   PrefillRequest  -> KV frames               op "prefill" (called by other workers)
  POST /keep      KeepRequest     -> KeepReply               op "keep"
  GET  /status    -> WorkerStatus                            op "status"
  POST /drain     DrainRequest    -> WorkerStatus            op "drain" (what an operator asked a gateway for)
  POST /role      RoleRequest     -> WorkerStatus            op "role"  (the same)
Errors: HTTP status of the EdgeLLMError class and a body ErrorReply.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from edge_llm.errors import RemoteProtocolError
from edge_llm.kv.snapshot import Level, MemoryKind, Policy
from edge_llm.request import FinishReason

PROTOCOL: Final = 1
MAX_TOKENS_IN_MESSAGE: Final = 1 << 20
# A stream with nothing to say sends something this often; a reader takes three missed ones for silence.
HEARTBEAT_S: Final = 2.0
# How long a prefill worker may send without getting further, unless it was predicted to take longer: a prompt may stand
# behind another one on a slow board, and 4,096 tokens at 40 tokens/s are 102 s.
ADVANCE_S: Final = 120.0

Role = Literal["prefill", "decode", "mixed"]
Mode = Literal["split", "local"]
Trouble = Literal["", "mismatch", "timeout"]
Id = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]
Address = Annotated[str, Meta(pattern=r"^[A-Za-z0-9.\[\]:_-]{1,255}:[0-9]{1,5}$")]
TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Ids = Annotated[list[TokenId], Meta(max_length=MAX_TOKENS_IN_MESSAGE)]
Count = Annotated[int, Meta(ge=0, le=1 << 40)]
# Sequences of one worker: each becomes an object where plans are made.
Few = Annotated[int, Meta(ge=0, le=1 << 16)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Rate = Annotated[float, Meta(ge=0, le=1e15)]
# Scalars only: a chat template may do much work with a list.
OptionName = Annotated[str, Meta(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]{0,63}$")]
Option = bool | Annotated[int, Meta(ge=-(1 << 31), lt=1 << 31)] | Annotated[str, Meta(max_length=1024)]
Tenant = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{0,64}$")]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Base of all messages: closed, immutable. What has its default is left out, so that a peer of an older version
    meets a newer field only where it is used."""


class Sampling(Message, frozen=True, kw_only=True):
    """request.SamplingParams on the wire; bounds are checked again by that class."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    seed: Annotated[str, Meta(pattern=r"^[0-9]{1,20}$")] = "0"  # 64 bits do not fit every JSON reader
    logit_bias: dict[str, float] = {}


class ChatMessage(Message, frozen=True, kw_only=True):
    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: Annotated[str, Meta(max_length=8 << 20)]


class TokenizeRequest(Message, frozen=True, kw_only=True):
    """Exactly one of `messages` (rendered by the chat template, which is told `template_options`, too) and `text`."""

    protocol: Literal[1] = 1
    messages: list[ChatMessage] | None = None
    text: Annotated[str, Meta(max_length=8 << 20)] | None = None
    template_options: Annotated[dict[OptionName, Option], Meta(max_length=16)] = {}


class TokenizeReply(Message, frozen=True, kw_only=True):
    protocol: Literal[1] = 1
    ids: Ids
    stop_ids: Ids


class PrefillCandidate(Message, frozen=True, kw_only=True):
    """A worker that may give the prompt's KV, where it is, and the ticket to hand to it.

    only_stored: it gives what it holds already (a draining decode worker's running sequence) and computes nothing.
    patience_s: how long it may take from one step to the next, where that is more than ADVANCE_S.
    """

    worker: Id
    address: Address
    ticket: Annotated[str, Meta(max_length=8192)]
    only_stored: bool = False
    patience_s: Seconds = 0.0


class DecodeRequest(Message, frozen=True, kw_only=True):
    """Generate. `candidates` in order of preference; empty means compute the prompt here (mode local).

    tenant: whose kept KV may be used. cache_prompt False: nothing kept is used and nothing is kept (measurements).
    time_left_s: the work is dropped when it is not done by then; 0 = no deadline. holder: this worker itself, for a
    prefill worker that would rather fetch the beginning of the prompt from here than compute it again. must_split: the
    client asked for a split, so a prefill worker is asked even where this one would be done soon. tpot_s: the limit
    that prompts which are read beside its answer leave room for; 0 = none. age_s: for how long the client has had the
    first of delivered_ids, where it has a limit.
    """

    protocol: Literal[1] = 1
    request_id: Id
    epoch: Count
    gateway: Id
    prompt_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_TOKENS_IN_MESSAGE)]
    delivered_ids: Ids = []
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS_IN_MESSAGE)]
    sampling: Sampling
    stop: list[str] = []
    stop_ids: Ids = []
    candidates: list[PrefillCandidate] = []
    tenant: Tenant = ""
    cache_prompt: bool = True
    time_left_s: Seconds = 0.0
    holder: PrefillCandidate | None = None
    must_split: bool = False
    tpot_s: Seconds = 0.0
    age_s: Seconds = 0.0


class DecodeReply(Message, frozen=True, kw_only=True):
    protocol: Literal[1] = 1
    accepted: Literal[True] = True


class CancelRequest(Message, frozen=True, kw_only=True):
    protocol: Literal[1] = 1
    request_id: Id
    epoch: Count


class CancelReply(Message, frozen=True, kw_only=True):
    protocol: Literal[1] = 1
    found: bool


class PrefillRequest(Message, frozen=True, kw_only=True):
    """From a decode worker: compute ids[:-1], ship KV from position `start` on, in frames. `holder` has what is before
    `start`. From a prefill worker to a holder: `only_stored`, up to `end` (0: all). From a worker that keeps a
    checkpoint: the same, `is_running`, out of the sequence that generates for this request. The other fields are those
    of DecodeRequest and PrefillCandidate."""

    protocol: Literal[1] = 1
    request_id: Id
    ids: Annotated[list[TokenId], Meta(min_length=2, max_length=MAX_TOKENS_IN_MESSAGE)]
    start: Count = 0
    compatibility: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    tenant: Tenant = ""
    cache_prompt: bool = True
    only_stored: bool = False
    time_left_s: Seconds = 0.0
    end: Count = 0
    holder: PrefillCandidate | None = None
    is_running: bool = False


class KeepRequest(Message, frozen=True, kw_only=True):
    """A checkpoint: KV of ids[:-1] is to be kept here, and what of it is not here yet is to be fetched from `source`,
    where the sequence runs on meanwhile."""

    protocol: Literal[1] = 1
    request_id: Id
    ids: Annotated[list[TokenId], Meta(min_length=2, max_length=MAX_TOKENS_IN_MESSAGE)]
    tenant: Tenant = ""
    source: PrefillCandidate


class KeepReply(Message, frozen=True, kw_only=True):
    """How many positions are kept now, and how many bytes came for that."""

    protocol: Literal[1] = 1
    kept_tokens: Count
    fetched_bytes: Count


class DrainRequest(Message, frozen=True, kw_only=True):
    """Take nothing new and hand over what runs; False: take work again."""

    protocol: Literal[1] = 1
    is_draining: bool


class RoleRequest(Message, frozen=True, kw_only=True):
    """Stand for this role from now on."""

    protocol: Literal[1] = 1
    role: Role


class PromptReport(Message, frozen=True, kw_only=True):
    """How the prompt's KV came to be; durations on the decode worker's monotonic clock, in ms.

    wait_ms: from acceptance to the first frame (split) or until the prompt's turn came (local). prefill_ms: from
    then until P said that its last call ended, or the local prompt was done. handoff_ms: what the split adds after
    that: the last chunk in flight, then adopt_ms. handoff_bytes arrived in all, overlapped_bytes of them before P's
    last call ended. restored_tokens were not computed here: cached_tokens of them were kept here from earlier requests,
    the others came from P, which itself had prefill_cached_tokens kept. fallback: why the plan changed. trouble: the
    kind of reason, of the last prefill worker that failed for one of these: its KV is of another model or cache type;
    it said nothing or got nowhere for too long. troubled: all that failed so.
    """

    mode: Mode
    prefill_worker: str
    wait_ms: float
    prefill_ms: float
    handoff_ms: float
    adopt_ms: float
    handoff_bytes: Count
    overlapped_bytes: Count
    restored_tokens: Count
    computed_tokens: Count
    is_same_class: bool
    cached_tokens: Count = 0
    prefill_cached_tokens: Count = 0
    fallback: str | None = None
    trouble: Trouble = ""
    troubled: list[Id] = []


class Token(Message, frozen=True, kw_only=True, array_like=True):
    """One TokenEvent as an array: [request_id, epoch, index, token_id, text, finish_reason]."""

    request_id: str
    epoch: int
    index: int
    token_id: int
    text: str
    finish_reason: FinishReason | None = None


class Progress(Message, frozen=True, kw_only=True, array_like=True):
    """[request_id, epoch, done, total] positions of the prompt."""

    request_id: str
    epoch: int
    done: int
    total: int


class Prompted(Message, frozen=True, kw_only=True, array_like=True):
    """The prompt is done; sent before the first token of a request."""

    request_id: str
    epoch: int
    report: PromptReport


class Failed(Message, frozen=True, kw_only=True, array_like=True):
    """The request ended without finish_reason: the gateway may replan when `is_retryable`."""

    request_id: str
    epoch: int
    code: str
    message: str
    status: int
    is_retryable: bool


class EventBatch(Message, frozen=True, kw_only=True):
    """Everything one engine step has to say to one gateway. An empty batch is a heartbeat."""

    tokens: list[Token] = []
    prompted: list[Prompted] = []
    progress: list[Progress] = []
    failed: list[Failed] = []


class Rates(Message, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """How long work takes on a worker, in seconds, as measured (engine/rates.py; 0 samples: estimated at start, or not
    at all when the coefficients are 0 too):

    decode step = run_s + row_s * rows + cell_s * KV cells read; prompt piece of n positions from p0 on
    = call_s + token_s * n + pair_s * n * (2 * p0 + n) / 2.
    prompt_steps: prompt work between two decode steps takes as long as this many of them; 0: one whole chunk.
    of_limit: beside a stream with a limit of time per token less, so that a gap is this share of it on average (0:
    limits count for nothing there), but not less than least_prompt_steps; beside streams that all have one up to
    most_prompt_steps where that keeps it (0: not more than prompt_steps). Pieces shorter than least_piece_steps are
    saved up (0: it does not count what a stream has had, DecodeRequest.age_s).
    """

    run_s: Seconds = 0.0
    row_s: Seconds = 0.0
    cell_s: Seconds = 0.0
    call_s: Seconds = 0.0
    token_s: Seconds = 0.0
    pair_s: Seconds = 0.0
    decode_samples: Count = 0
    prompt_samples: Count = 0
    prompt_steps: Seconds = 0.0
    of_limit: Annotated[float, Meta(ge=0, le=1)] = 0.0
    least_prompt_steps: Seconds = 0.0
    most_prompt_steps: Seconds = 0.0
    least_piece_steps: Seconds = 0.0


class Link(Message, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """The way from `peer` to this worker, measured while it sent KV: how fast bytes came that were there to be sent
    (0: too few came at once), and the shortest time between a question and the beginning of its answer."""

    peer: str
    bytes_per_s: Rate
    round_trip_s: Seconds
    samples: Count


class Board(Message, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """The machine under a worker. Shares are 0 to 1, of all cores and of all memory; what a board cannot tell is None
    or missing. `throttled`: what holds it back now, by kind."""

    cpu_share: float
    ram_share: float
    temperature_c: float | None = None
    frequency_hz: float | None = None
    throttled: dict[str, bool] = {}


# `verify` compares decode calls of up to so many rows.
WIDE_ROWS: Final = 8


class Load(Message, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """What changes while a worker runs. Since start: widest_decode_rows shared one decode call, wide_decode_calls had
    WIDE_ROWS rows or more; prompts_met found another prompt being computed when they came; of prefix_query_tokens
    looked up, prefix_hit_tokens were kept here; generated_tokens were made and computed_tokens of prompts read."""

    slots_free: Few
    sequences_running: Few
    sequences_waiting: Few
    pending_prompt_tokens: Count
    kv_cells_free: Count
    decode_step_s: Seconds
    prefill_tokens_per_s: Rate
    widest_decode_rows: Count = 0
    wide_decode_calls: Count = 0
    prompts_met: Count = 0
    prefix_bytes: Count = 0
    prefix_limit_bytes: Count = 0
    prefix_query_tokens: Count = 0
    prefix_hit_tokens: Count = 0
    generated_tokens: Count = 0
    computed_tokens: Count = 0
    rates: Rates = Rates()
    links: list[Link] = []


class WorkerStatus(Message, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """What a worker is and how busy it is.

    role is what it was started as or told to be since; what it can do is said by slots (> 0: decodes) and
    serves_prompts (computes prompts for others). pid and started_at (seconds since the epoch) together name one life
    of it.
    """

    protocol: Literal[1] = 1
    worker: str
    role: Role
    is_ready: bool
    is_draining: bool
    model: str
    model_sha256: str
    architecture: str
    quantization: str
    memory: MemoryKind
    n_ctx: Count
    slots: Few
    chunk_tokens: Annotated[int, Meta(ge=1, le=1 << 20)]
    vocab_size: Count
    kv_bytes_per_token: Count
    splits: bool
    split_reason: str
    compatibility: str
    exactness_class: str
    policy: Policy
    level: Level
    level_reason: str
    version: str
    pid: Count
    serves_prompts: bool
    started_at: float = 0.0
    board: Board | None = None
    build: dict[str, str]
    memory_bytes: dict[str, Count]
    load: Load


class ErrorReply(Message, frozen=True, kw_only=True):
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


MessageType = TypeVar("MessageType", bound=Message)


def encode(message: Message) -> bytes:
    """JSON bytes of a message."""
    return msgspec.json.encode(message)


def decode(kind: type[MessageType], data: bytes | bytearray | memoryview) -> MessageType:
    """Parse a peer's bytes; raise RemoteProtocolError that says which field is wrong."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"not a valid {kind.__name__}: {error}") from error
