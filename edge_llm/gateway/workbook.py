"""What every worker has to do, as this gateway knows it: its own requests there, and what others seem to have there.

Pure: time is an argument. Owns the sums that predictions rest on. Refuses to know sessions, plans and connections.

Other gateways' work is what a worker's status shows beyond our own at that moment. It is believed when two statuses in
a row show it: a status and an event may cross on their way, and what is over must not count for another second.
Tokens come all the time and change sums a little: they are added up anew every `REFRESH_S`, everything else at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from edge_llm.cluster.cost import PromptWork, Stream, Work, work_of
from edge_llm.worker.messages import WorkerStatus

REFRESH_S: Final = 0.25
# A prompt that is overdue: its answer has not begun, so it is nobody who decodes.
_SOON_S: Final = 1e-3


@dataclass(slots=True)
class Booking:
    """A request at its workers. `reader` computes the prompt: `decode` itself, or another one. Of `prompt_tokens`,
    `held` were there before; the answer is expected to go on for `answer_tokens`. `delivered` is read, never changed:
    the tokens so far, `before` of which came from an earlier worker and are part of the prompt.

    On the caller's clock: by when its first token has to come (`due_s`), when it is expected (`expected_s`), when its
    prompt was whole (`prompted_s`), when the first of those `before` came (`first_token_s`). tpot_s: its limit."""

    decode: str
    reader: str
    prompt_tokens: int
    max_tokens: int
    answer_tokens: float
    held: int
    delivered: Sequence[int]
    before: int = 0
    read_tokens: int = 0
    is_prompted: bool = False
    due_s: float | None = None
    expected_s: float = 0.0
    prompted_s: float = 0.0
    first_token_s: float = 0.0
    tpot_s: float | None = None

    @property
    def generated(self) -> int:
        """Tokens that its decode worker made."""
        return len(self.delivered) - self.before

    @property
    def left(self) -> float:
        """Tokens that its answer is expected to go on for."""
        return left_of(self.answer_tokens, self.generated, self.max_tokens)

    @property
    def workers(self) -> frozenset[str]:
        return frozenset({self.decode, self.reader})

    @property
    def prompt_work(self) -> PromptWork:
        """What of the prompt is still to be computed; the last token is a decode step."""
        total = self.prompt_tokens - 1
        start = min(total, max(self.held, self.read_tokens))
        return PromptWork(total - start, start, is_served=self.reader != self.decode)

    def prompt_at(self, now_s: float) -> PromptWork:
        """The same with its limit."""
        work = self.prompt_work
        return work if self.due_s is None else replace(work, due_s=self.due_s - now_s)

    def stream_at(self, now_s: float, prompts: int) -> Stream:
        """What it is, or will be, at its decode worker, which has so many prompts to read before its own."""
        begins_s = 0.0 if self.is_prompted else max(_SOON_S, self.expected_s - now_s)
        since_s = self.first_token_s if self.before else self.prompted_s
        return Stream(
            left=self.left,
            cells=self.prompt_tokens + self.generated,
            begins_s=begins_s,
            tokens=len(self.delivered),
            age_s=max(0.0, now_s + begins_s - since_s) if self.is_prompted or self.before else 0.0,
            tpot_s=self.tpot_s,
            ahead=prompts + 1 if self.reader == self.decode and not self.is_prompted else 0,
        )


def left_of(expected: float, generated: int, most: int) -> float:
    """Of an answer that was expected to be so long and may have `most` tokens. Lengths are spread so widely that one
    that is longer than expected is not about to end: half of what was expected is still to come, it is assumed."""
    return max(1.0, min(max(expected - generated, expected / 2), most - generated))


@dataclass(slots=True)
class _Desk:
    bookings: dict[str, Booking] = field(default_factory=dict)
    foreign: Work = field(default_factory=Work)
    shown: Work = field(default_factory=Work)
    sum: Work | None = None
    summed_s: float = 0.0


class WorkBook:
    """All workers' work."""

    def __init__(self) -> None:
        self._desks: dict[str, _Desk] = {}
        self._bookings: dict[str, Booking] = {}

    def book(self, request_id: str, booking: Booking) -> None:
        """The request is given to its workers."""
        self.remove(request_id)
        self._bookings[request_id] = booking
        for worker in booking.workers:
            self._desk(worker).bookings[request_id] = booking
            self._desk(worker).sum = None

    def remove(self, request_id: str) -> None:
        """Its workers do not have it any more. Idempotent."""
        booking = self._bookings.pop(request_id, None)
        for worker in booking.workers if booking else ():
            del self._desk(worker).bookings[request_id]
            self._desk(worker).sum = None

    def read(self, request_id: str, tokens: int) -> None:
        """So many positions of its prompt are computed."""
        if (booking := self._bookings.get(request_id)) is not None:
            booking.read_tokens = tokens
            self._desk(booking.reader).sum = None

    def prompted(self, request_id: str, now_s: float) -> None:
        """Its prompt is whole: it decodes."""
        if (booking := self._bookings.get(request_id)) is not None:
            booking.is_prompted, booking.prompted_s = True, now_s
            for worker in booking.workers:
                self._desk(worker).sum = None

    def seen(self, status: WorkerStatus) -> None:
        """A worker said how it is."""
        desk = self._desk(status.worker)
        now = _beyond(work_of(status), _sum(status.worker, desk, 0.0))  # counts only: no time in them
        desk.foreign, desk.shown, desk.sum = _both(now, desk.shown), now, None

    def work(self, worker: str, now_s: float) -> Work:
        """What it has to do."""
        desk = self._desk(worker)
        if desk.sum is None or now_s - desk.summed_s > REFRESH_S:
            desk.sum, desk.summed_s = _joined(desk.foreign, _sum(worker, desk, now_s, len(desk.foreign.prompts))), now_s
        return desk.sum

    def foreign(self, worker: str) -> int:
        """How many sequences of other gateways it seems to have."""
        return self._desk(worker).foreign.decoding

    def fetching(self, worker: str) -> dict[str, Booking]:
        """Requests whose KV a decode worker is to get from elsewhere and does not have yet."""
        bookings = self._desk(worker).bookings.items()
        return {
            request_id: booking
            for request_id, booking in bookings
            if booking.decode == worker != booking.reader and not booking.is_prompted
        }

    def _desk(self, worker: str) -> _Desk:
        desk = self._desks.get(worker)
        if desk is None:
            desk = self._desks[worker] = _Desk()
        return desk


def _sum(worker: str, desk: _Desk, now_s: float, foreign_prompts: int = 0) -> Work:
    """Our own requests at one worker, which reads so many prompts of others before: they are there already."""
    sequences = decoding = cells = reserved = 0
    left, prompts, streams, coming = 0.0, list[PromptWork](), list[Stream](), list[Stream]()
    has_limits = any(booking.tpot_s is not None for booking in desk.bookings.values())
    for booking in desk.bookings.values():
        if booking.decode == worker:
            sequences += 1
            reserved += booking.prompt_tokens + booking.max_tokens
            if has_limits or not booking.is_prompted:
                stream = booking.stream_at(now_s, foreign_prompts + len(prompts))
                streams += [stream] if has_limits else []
                coming += [stream] if stream.ahead else []
            if booking.is_prompted:
                decoding += 1
                cells += booking.prompt_tokens + booking.generated
                left += booking.left
        if booking.reader == worker and not booking.is_prompted:
            prompts.append(booking.prompt_at(now_s))
    return Work(sequences, decoding, cells, left, reserved, tuple(prompts), tuple(streams), tuple(coming))


def _beyond(shown: Work, own: Work) -> Work:
    """What a status shows that is not ours."""
    sequences = max(0, shown.sequences - own.sequences)
    tokens = max(0, shown.pending_tokens - own.pending_tokens)
    prompts = max(0, len(shown.prompts) - len(own.prompts)) if tokens else 0
    share = sequences / shown.sequences if shown.sequences else 0.0
    return Work(
        sequences=sequences,
        decoding=sequences,
        cells=int(shown.cells * share),
        tokens_left=shown.tokens_left * share,
        reserved_cells=int(shown.reserved_cells * share),
        prompts=tuple(PromptWork(tokens // prompts, is_served=shown.prompts[0].is_served) for _ in range(prompts)),
    )


def _both(now: Work, before: Work) -> Work:
    """What two statuses agree on."""
    fewer = now if now.sequences <= before.sequences else before
    prompts = min(now.prompts, before.prompts, key=len)
    return Work(fewer.sequences, fewer.decoding, fewer.cells, fewer.tokens_left, fewer.reserved_cells, prompts)


def _joined(a: Work, b: Work) -> Work:
    """`b`'s streams count `a`'s prompts among those before their own."""
    return Work(
        a.sequences + b.sequences,
        a.decoding + b.decoding,
        a.cells + b.cells,
        a.tokens_left + b.tokens_left,
        a.reserved_cells + b.reserved_cells,
        (*a.prompts, *b.prompts),
        (*a.streams, *b.streams),
        (*a.coming, *b.coming),
    )
