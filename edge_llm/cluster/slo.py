"""Who keeps its limits of latency under a plan: the request itself, those that run beside it, those that will come.

Pure. Owns the predicted breaches that the scheduler counts before it weighs seconds: a request is served well when it
keeps its limits of TTFT and of TPOT, both, and the goal is as many of those as possible (goodput: DistServe, OSDI 2024,
section 2; papers.md section 3). Refuses to know how nodes are found and chosen, and clocks. Rests on cost.py's rates.

Rules: a request that is late already cannot be made late. A stream can lose what its limit leaves of its pace so far
and of its predicted pace; a prompt read beside it takes its decode worker's time in pieces (cost.py, `beside`), another
stream a row of every step that both are in. `exposed` looks one prompt ahead: how many streams would be slowed beyond
their limits by the next one, wherever it does least harm and can still come in time. That is what keeps one of two
mixed nodes free of streams while limits of TPOT are strict; where streams can bear a prompt beside them it is 0.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from edge_llm.cluster.cost import NodeCost, Piece, Prediction, Request, Side, Stream, Work, beside


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits of one request, in seconds; None: no limit. tpot_s is of the mean between two tokens of its answer."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    @property
    def is_set(self) -> bool:
        return self.ttft_s is not None or self.tpot_s is not None

    def or_else(self, default: Slo) -> Slo:
        """What this one leaves open is as in `default`."""
        return Slo(
            default.ttft_s if self.ttft_s is None else self.ttft_s,
            default.tpot_s if self.tpot_s is None else self.tpot_s,
        )


NO_LIMITS: Final = Slo()


@dataclass(frozen=True, slots=True)
class Past:
    """What a request has behind it: `since_arrival_s` since its client sent it and, of an answer that goes on after its
    worker was lost, so many `tokens` in the `age_s` since the first of them."""

    since_arrival_s: float = 0.0
    tokens: int = 0
    age_s: float = 0.0


NOTHING_PAST: Final = Past()


class Verdict(NamedTuple):
    """Of a plan; the smaller one is better. broken: requests that it makes late. exposed: module docstring."""

    broken: int = 0
    exposed: int = 0


NOBODY_LATE: Final = Verdict()


@dataclass(frozen=True, slots=True)
class _Watched:
    """A stream with a limit that it keeps as things are. `behind_s`: how much prompt work will be left when it begins,
    a `piece` of it between two steps; negative: it begins so long after all is read. It loses `loses_s` by that, and
    can lose `slack_s` more."""

    stream: Stream
    step_s: float
    piece: Piece
    behind_s: float
    loses_s: float
    slack_s: float

    def loses_more_s(self, more_s: float) -> float:
        """What it loses by `more_s` of prompt work behind what waits."""
        all_of_it = beside(max(0.0, self.behind_s + more_s), self.piece, self.step_s, self.stream.left)
        return all_of_it.stream_loses_s - self.loses_s

    @property
    def bears_s(self) -> float:
        """So much prompt work behind what waits it can bear."""
        bears_s = self.loses_s + self.slack_s
        if self.stream.left * self.piece.takes_s <= bears_s:
            return math.inf  # a piece in every step to its end
        return bears_s * self.piece.reads_s / self.piece.takes_s - self.behind_s


@dataclass(frozen=True, slots=True)
class _Watch:
    """Of a node. bears_s: of all `streams`, in order."""

    streams: tuple[_Watched, ...]
    bears_s: Sequence[float]

    def overcome(self, more_s: float) -> int:
        """How many cannot bear so much prompt work."""
        return bisect_left(self.bears_s, more_s)


_NOBODY: Final = _Watch((), ())


class Watches:
    """Who is watched, per node: worked out once for all requests that are judged by the same Work of it."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[NodeCost, Work, _Watch]] = {}

    def of(self, worker: str, side: Side) -> _Watch:
        kept = self._kept.get(worker)
        # the very same Work: comparing a thousand streams would cost what is saved
        if kept is None or kept[1] is not side.work or kept[0] != side.cost:
            kept = self._kept[worker] = (side.cost, side.work, _watch(side))
        return kept[2]


class Judge:
    """Judges plans for one request. `sides`: all nodes that are looked at; `readers`: who of them reads prompts;
    `next_tokens`: the prompt that is expected to come next; `past`: of the request; `watches`: what was worked out for
    requests before it."""

    def __init__(
        self,
        slo: Slo,
        request: Request,
        sides: Mapping[str, Side],
        readers: Collection[str],
        next_tokens: float,
        past: Past = NOTHING_PAST,
        watches: Watches | None = None,
    ) -> None:
        watches = Watches() if watches is None else watches
        self._slo, self._request, self._sides, self._past = slo, request, sides, past
        self._readers = [worker for worker in readers if worker in sides]
        self._queued_s = {worker: side.cost.queued_s(side.work) for worker, side in sides.items()}
        self._next_s = {worker: side.cost.prefill_s(max(1, round(next_tokens))) for worker, side in sides.items()}
        self._watch = {worker: watches.of(worker, side) for worker, side in sides.items()}
        self._exposed = {worker: self._watch[worker].overcome(self._next_s[worker]) for worker in self._readers}

    def verdict(self, reader: str, decode: str, prediction: Prediction) -> Verdict:
        """Of the plan in which `reader` computes the prompt and `decode` the answer."""
        own_s = self._own_s(reader)
        begins_s = prediction.ttft_s
        # on a node that reads the prompt itself all others have been read by then
        beside_s = max(0.0, self._queued_s[decode] - begins_s) if reader != decode else 0.0
        tpot_s = own_tpot_s(self._request, self._sides[decode], begins_s, beside_s)
        slack_s = self._slack_s(begins_s, tpot_s)
        broken = int(slack_s < 0.0 or self._is_late(begins_s))
        for worker in {reader, decode}:
            reads_s = own_s if worker == reader else 0.0
            broken += self._pushed(worker, reads_s, begins_s if worker == decode else None)
        broken += self._delayed(decode, begins_s)
        bears_next = slack_s < 0.0 or self._loses_next_s(decode, tpot_s) <= slack_s
        return Verdict(broken, self._exposed_after(reader, own_s, None if bears_next else decode))

    def _own_s(self, reader: str) -> float:
        side, positions = self._sides[reader], self._request.prompt_tokens - 1
        held = min(side.held, positions)
        return side.cost.prefill_s(positions - held, held)

    def _is_late(self, ttft_s: float) -> bool:
        limit_s = self._slo.ttft_s
        return limit_s is not None and self._past.since_arrival_s + ttft_s > limit_s

    def _slack_s(self, ttft_s: float, tpot_s: float) -> float:
        """What its limit of TPOT leaves of the answer's time; its client counts from the first token, wherever that
        was made."""
        limit_s, answer, past = self._slo.tpot_s, self._request.answer_tokens, self._past
        if limit_s is None or past.tokens + answer < 2:
            return math.inf
        behind_s = past.tokens * limit_s - past.age_s - ttft_s if past.tokens else 0.0
        return (limit_s - tpot_s) * answer + behind_s

    # -- those that run

    def _pushed(self, worker: str, reads_s: float, begins_s: float | None) -> int:
        """Streams on a node that would be late if it read for `reads_s` more and, from `begins_s` on, made this
        answer."""
        if begins_s is None:
            return self._watch[worker].overcome(reads_s)
        cost, answer = self._sides[worker].cost, self._request.answer_tokens
        row_s = cost.row_s(self._request.prompt_tokens + answer / 2)
        pushed = 0
        for watched in self._watch[worker].streams:
            stream = watched.stream
            steps = common_steps(begins_s, answer, stream.begins_s, stream.left, watched.step_s)
            pushed += watched.loses_more_s(reads_s) + row_s * steps > watched.slack_s
        return pushed

    def _delayed(self, decode: str, begins_s: float) -> int:
        """Prompts on a node that would come late if it made this answer from `begins_s` on."""
        side = self._sides[decode]
        cost, work = side.cost, side.work
        step_s = cost.step_s(work.decoding, work.cells)
        with_it_s = cost.step_s(work.decoding + 1, work.cells + self._request.prompt_tokens)
        piece = cost.piece(step_s, work.limits)
        with_it_piece = cost.piece(with_it_s, work.limits.beside(self._request.tpot_s))
        read_s, delayed = 0.0, 0
        for prompt in work.prompts:
            read_s += cost.prefill_s(prompt.tokens, prompt.start)
            if prompt.due_s is None:
                continue
            now_s = read_s + beside(read_s, piece, step_s, work.left).prompt_loses_s
            rest_s = max(0.0, read_s - begins_s)
            without_s = beside(rest_s, piece, step_s, work.left).prompt_loses_s
            with_it = beside(rest_s, with_it_piece, with_it_s, max(work.left, self._request.answer_tokens))
            delayed += now_s <= prompt.due_s < now_s + max(0.0, with_it.prompt_loses_s - without_s)
        return delayed

    # -- those that will come

    def _exposed_after(self, reader: str, own_s: float, tender: str | None) -> int:
        """Streams that could not bear the next prompt where it does least harm, of the nodes that would read it in
        time, if any. tender: the node on which this answer is one of them."""
        found: list[tuple[bool, int]] = []
        for worker in self._readers:
            waits_s = self._queued_s[worker] + self._next_s[worker] + (own_s if worker == reader else 0.0)
            is_late = self._slo.ttft_s is not None and waits_s > self._slo.ttft_s
            found.append((is_late, self._exposed[worker] + (worker == tender)))
        return min(found)[1] if found else 0

    def _loses_next_s(self, decode: str, tpot_s: float) -> float:
        """What this answer would lose by the next prompt beside it."""
        cost, work = self._sides[decode].cost, self._sides[decode].work
        # of its predicted pace, steps alone
        step_s = cost.step_s(work.decoding + 1, work.cells + self._request.prompt_tokens)
        piece = cost.piece(step_s, work.limits.beside(self._request.tpot_s))
        return beside(self._next_s[decode], piece, tpot_s, self._request.answer_tokens).stream_loses_s


def own_tpot_s(request: Request, decode: Side, begins_s: float, prompts_s: float) -> float:
    """Predicted mean between two tokens of an answer that begins then, beside `prompts_s` of prompt work."""
    cost, work, answer = decode.cost, decode.work, request.answer_tokens
    depth = request.prompt_tokens + answer / 2
    step_s = cost.step_s(work.decoding + 1, work.cells + depth)
    piece = cost.piece(step_s, work.limits.beside(request.tpot_s))
    beside_s = beside(prompts_s, piece, step_s, answer).stream_loses_s
    for stream in work.streams:
        steps = common_steps(begins_s, answer, stream.begins_s, stream.left, step_s)
        beside_s += steps * cost.row_s(stream.cells)
    beside_s += answer * _unknown_rows_s(cost, work)
    return cost.step_s(1, depth) + beside_s / answer


def _unknown_rows_s(cost: NodeCost, work: Work) -> float:
    """What streams that are not known one by one, of another gateway, add to a step; nor is it known when they end."""
    return work.unknown * cost.row_s(work.cells / work.decoding) if work.unknown else 0.0


def common_steps(begins_s: float, tokens: float, other_begins_s: float, other_tokens: float, step_s: float) -> float:
    """Steps of `step_s` that two sequences are in together."""
    ends_s = min(begins_s + tokens * step_s, other_begins_s + other_tokens * step_s)
    return max(0.0, ends_s - max(begins_s, other_begins_s)) / step_s if step_s else 0.0


def paces_s(cost: NodeCost, work: Work) -> list[float]:
    """Predicted mean between two tokens of every stream of a node, each with the rows of the others as long as both
    decode (`common_steps`, all of the length that a step has for one stream of mean depth). One pass over beginnings
    and ends in order: a node may have a thousand streams."""
    streams = work.streams
    alone_s = cost.step_s(1, sum(stream.cells for stream in streams) / len(streams)) if streams else 0.0
    rows_s = [cost.row_s(stream.cells) for stream in streams]
    spans = [(stream.begins_s, stream.begins_s + stream.left * alone_s) for stream in streams]
    begin = ((begins_s, row_s) for (begins_s, _), row_s in zip(spans, rows_s, strict=True))
    end = ((ends_s, -row_s) for (_, ends_s), row_s in zip(spans, rows_s, strict=True))
    at_s, rows, area = (
        [0.0],
        [0.0],
        [0.0],
    )  # from then on so many seconds of rows a step; their sum over time until then
    for moment_s, change in sorted([*begin, *end]):
        area.append(area[-1] + rows[-1] * (moment_s - at_s[-1]))
        rows.append(rows[-1] + change)
        at_s.append(moment_s)

    def until(moment_s: float) -> float:
        before = bisect_right(at_s, moment_s) - 1
        return area[before] + rows[before] * (moment_s - at_s[before])

    found, unknown_s = [], _unknown_rows_s(cost, work)
    for stream, row_s, (begins_s, ends_s) in zip(streams, rows_s, spans, strict=True):
        others_s = (until(ends_s) - until(begins_s)) / alone_s - stream.left * row_s if alone_s else 0.0
        found.append(cost.step_s(1, stream.cells) + unknown_s + max(0.0, others_s) / stream.left)
    return found


def _watch(side: Side) -> _Watch:
    """Streams that keep their limits while all prompts that wait now are read."""
    cost, work = side.cost, side.work
    if all(stream.tpot_s is None for stream in work.streams):
        return _NOBODY
    after_s = [0.0]  # prompt work from each prompt on, the last one first
    for prompt in reversed(work.prompts):
        after_s.append(after_s[-1] + cost.prefill_s(prompt.tokens, prompt.start))
    found = []
    for stream, step_s in zip(work.streams, paces_s(cost, work), strict=True):
        if stream.tpot_s is None:
            continue
        behind_s = after_s[max(0, len(work.prompts) - stream.ahead)] - (0.0 if stream.ahead else stream.begins_s)
        piece = cost.piece(step_s, work.limits)
        loses_s = beside(max(0.0, behind_s), piece, step_s, stream.left).stream_loses_s
        allowed_s = stream.tpot_s * (stream.tokens + stream.left)
        slack_s = allowed_s - stream.age_s - stream.left * step_s - loses_s
        if slack_s >= 0:
            found.append(_Watched(stream, step_s, piece, behind_s, loses_s, slack_s))
    return _Watch(tuple(found), sorted(one.bears_s for one in found))
