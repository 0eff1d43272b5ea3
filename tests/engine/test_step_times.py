"""What a step says about time: only decoding counts as decoding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from edge_llm.engine.backend import Interrupted, Logits, Row
from edge_llm.engine.batch import cells_read
from edge_llm.engine.rates import NOTHING_KNOWN, Rates
from edge_llm.engine.sequencer import Sequencer
from edge_llm.engine.simulated import SimulatedBackend, SimulatedSettings, SimulatedVocabulary
from edge_llm.kv.codec import StateBlob
from edge_llm.kv.snapshot import Level
from edge_llm.request import Generation, SamplingParams

STEP_S, EXPORT_S = 0.005, 0.05
GREEDY = SamplingParams(temperature=0.0)


class Timed(SimulatedBackend):
    """Takes time on a clock of its own: a step for decoding and more for deep rows, a tenth of a step for a prompt
    token, ten steps for reading KV out."""

    def __init__(self, slots: int = 2, cell_s: float = 0.0, level: Level = "exact") -> None:
        super().__init__(SimulatedSettings(slots=slots, level=level))
        self.now_s, self.cell_s = 0.0, cell_s
        self.calls: list[list[int]] = []

    def clock(self) -> float:
        return self.now_s

    def decode(self, rows: Sequence[Row]) -> Logits:
        self.calls.append([row.slot for row in rows])
        cells = cells_read(max(row.position for row in rows) + 1)
        self.now_s += STEP_S + len(rows) * cells * self.cell_s
        return super().decode(rows)

    def prompt(self, slot: int, ids: Sequence[int], p0: int) -> None:
        self.now_s += len(ids) * STEP_S / 10
        super().prompt(slot, ids, p0)

    def export(self, slot: int, n_tokens: int) -> StateBlob:
        self.now_s += EXPORT_S
        return super().export(slot, n_tokens)


@pytest.mark.parametrize(("tpot_steps", "most_tokens"), [(None, 12), (100.0, 80), (4.0, 24), (2.0, 12), (0.5, 12)])
def test_pieces_of_a_prompt_are_as_long_as_the_limit_of_the_stream_beside_it_allows(
    tpot_steps: float | None, most_tokens: int
) -> None:
    backend = Timed()
    engine = Sequencer(backend, SimulatedVocabulary(), clock=backend.clock)
    limit_s = None if tpot_steps is None else tpot_steps * STEP_S
    engine.begin(0, Generation("running", 0, tuple(range(5, 25)), 500, GREEDY, tpot_s=limit_s))
    while engine.step().decoded_rows < 1:
        pass
    first_s, gaps, pieces = backend.now_s, 0, list[int]()
    engine.begin(1, Generation("arriving", 0, tuple(5 + at % 200 for at in range(900)), 2, GREEDY))
    while sum(pieces) < 899:
        step = engine.step()
        pieces.append(step.prompt_tokens)
        gaps += 1
        if limit_s is not None and tpot_steps is not None and tpot_steps > 1:
            assert (backend.now_s - first_s) / gaps <= limit_s, "its mean time per token, at each of them"
    assert max(pieces) == most_tokens
    assert all(a or b for a, b in pairwise(pieces)), "of two steps one leaves room for the prompt"


def test_a_short_answer_gets_its_next_tokens_before_the_prompt_that_arrives_beside_it() -> None:
    backend = Timed()
    engine = Sequencer(backend, SimulatedVocabulary(), clock=backend.clock)
    engine.begin(0, Generation("short", 0, tuple(range(5, 25)), 2, GREEDY, tpot_s=1.8 * STEP_S))
    while engine.step().decoded_rows < 1:
        pass
    engine.begin(1, Generation("arriving", 0, tuple(range(5, 105)), 2, GREEDY))
    assert [engine.step().prompt_tokens for _ in range(2)] == [0, 99], "then it has all the time"


def test_at_level_same_plan_pieces_are_whole_chunks_whatever_runs_beside_them() -> None:
    backend = Timed(level="same-plan")
    engine = Sequencer(backend, SimulatedVocabulary(), clock=backend.clock)
    engine.begin(0, Generation("running", 0, tuple(range(5, 25)), 500, GREEDY, tpot_s=2 * STEP_S))
    while engine.step().decoded_rows < 1:
        pass
    engine.begin(1, Generation("arriving", 0, tuple(5 + at % 200 for at in range(300)), 2, GREEDY))
    steps = [engine.step() for _ in range(8)]
    assert [step.prompt_tokens for step in steps if step.prompt_tokens] == [128, 128, 43]


@pytest.mark.parametrize("keeps_kv", [False, True])
def test_reading_out_what_is_kept_is_no_part_of_a_decode_step(keeps_kv: bool) -> None:
    backend = Timed()
    engine = Sequencer(backend, SimulatedVocabulary(), clock=backend.clock)
    kept = 0
    for number in range(5):
        engine.begin(0, Generation(f"r{number}", 0, (5, 6), 4, GREEDY), keeps_kv=lambda: keeps_kv)
        while engine.has_work:
            step = engine.step()
            kept += len(step.kept)
            if step.decoded_rows:
                assert step.decode_s == pytest.approx(STEP_S)
    assert kept == (5 if keeps_kv else 0)


def test_of_answers_that_end_together_one_is_kept() -> None:
    """Each is a copy of a sequence's whole KV, and running streams wait for it."""
    backend = Timed()
    engine = Sequencer(backend, SimulatedVocabulary(), clock=backend.clock)
    for slot in range(2):
        engine.begin(slot, Generation(f"r{slot}", 0, (5 + slot,), 4, GREEDY), keeps_kv=lambda: True)
    kept = [found.request_id for _ in range(20) for found in engine.step().kept]
    assert kept == ["r0"]


def test_a_prompt_that_others_cancellations_interrupt_again_and_again_goes_on_in_smaller_pieces() -> None:
    class Disturbed(SimulatedBackend):
        """Somebody cancels more often than a whole chunk takes."""

        def prompt(self, slot: int, ids: Sequence[int], p0: int) -> None:
            if len(ids) > 50:
                raise Interrupted
            super().prompt(slot, ids, p0)

    backend = Disturbed(SimulatedSettings(n_ctx=512, slots=1, chunk_tokens=128))
    engine = Sequencer(backend, SimulatedVocabulary())
    engine.begin(0, Generation("long", 0, tuple(range(5, 205)), 4, GREEDY))
    done = [progress.done for _ in range(30) for progress in engine.step().progress]
    assert done[-1] == 199
    assert max(later - earlier for earlier, later in pairwise([0, *done])) <= 50


def test_what_could_not_be_kept_when_it_ends_is_not_read_out() -> None:
    backend, has_time = Timed(), [True, False, True]
    engine = Sequencer(backend, SimulatedVocabulary(), clock=backend.clock)
    kept = list[str]()
    for number in range(3):
        engine.begin(0, Generation(f"r{number}", 0, (5,), 4, GREEDY), keeps_kv=lambda: has_time.pop(0))
        kept += [found.request_id for _ in range(10) for found in engine.step().kept]
    assert kept == ["r0", "r2"]


def test_a_restored_sequence_lets_running_streams_take_a_step_before_it_joins() -> None:
    """Else one gap of theirs would hold the restore and a wider step."""
    backend = Timed()
    engine = Sequencer(backend, SimulatedVocabulary(), clock=backend.clock)
    engine.begin(0, Generation("running", 0, (5,), 50, GREEDY))
    engine.step()
    donor = SimulatedBackend(SimulatedSettings(slots=1))
    donor.prompt(0, [7, 8, 9], 0)
    engine.begin(1, Generation("restored", 0, (7, 8, 9, 6), 5, GREEDY), donor.export(0, 3))
    assert [engine.step().decoded_rows for _ in range(3)] == [1, 2, 2]


def test_a_restored_sequence_alone_does_not_wait() -> None:
    backend = Timed()
    engine = Sequencer(backend, SimulatedVocabulary(), clock=backend.clock)
    donor = SimulatedBackend(SimulatedSettings(slots=1))
    donor.prompt(0, [7, 8, 9], 0)
    engine.begin(0, Generation("restored", 0, (7, 8, 9, 6), 5, GREEDY), donor.export(0, 3))
    assert engine.step().decoded_rows == 1


def test_a_sequence_whose_prompt_was_just_computed_lets_running_streams_take_a_step_before_it_joins() -> None:
    """Else one gap of theirs would hold its last piece and a wider step."""
    backend = Timed()
    engine = Sequencer(backend, SimulatedVocabulary(), clock=backend.clock)
    engine.begin(0, Generation("running", 0, (5,), 50, GREEDY))
    engine.step()
    engine.begin(1, Generation("computed", 0, (7, 8), 5, GREEDY))
    rows = [(step.prompt_tokens, step.decoded_rows) for step in (engine.step() for _ in range(3))]
    assert rows == [(1, 1), (0, 2), (0, 2)]


def test_streams_do_not_pay_for_the_depth_of_another_and_all_get_their_tokens() -> None:
    def deep(backend: Timed, first: Rates) -> tuple[dict[str, list[int]], set[int]]:
        engine = Sequencer(backend, SimulatedVocabulary(), clock=backend.clock, first=first)
        ids: dict[str, list[int]] = {"short": [], "long": [], "other": []}
        engine.begin(0, Generation("short", 0, (5, 6), 120, GREEDY))
        engine.begin(1, Generation("other", 0, (5, 7), 120, GREEDY))
        engine.begin(2, Generation("long", 0, (9,) * 300, 120, GREEDY))
        widest = set[int]()
        while engine.has_work:
            step = engine.step()
            for event in step.events:
                ids[event.request_id].append(event.token_id)
            if step.decoded_rows == 3:
                widest.add(step.widest_call)
        return ids, widest

    apart, widest = deep(Timed(3, 1e-4), Rates(run_s=STEP_S, cell_s=1e-4))
    assert widest == {2}
    together, widest = deep(Timed(3), NOTHING_KNOWN)
    assert widest == {3}
    assert apart == together
    assert {len(found) for found in apart.values()} == {120}


def test_an_engine_learns_from_its_own_steps_what_depth_costs() -> None:
    backend = Timed(2, 1e-4)
    engine = Sequencer(backend, SimulatedVocabulary(), clock=backend.clock)
    engine.begin(0, Generation("short", 0, (5, 6), 1000, GREEDY))
    for _ in range(40):
        engine.step()
    engine.begin(1, Generation("long", 0, (9,) * 400, 1000, GREEDY))
    for _ in range(180):
        engine.step()
    assert engine.rates.cell_s == pytest.approx(1e-4, rel=0.05)
    assert backend.calls[-2:] == [[0], [1]]


def test_an_engine_that_starts_with_a_wrong_law_comes_to_share_calls_again() -> None:
    """With nothing for a run and much for a cell every row would get a call of its own, and nothing else be seen."""
    backend = Timed(2)
    wrong = Rates(run_s=0.0, row_s=STEP_S, cell_s=1e-4)
    engine = Sequencer(backend, SimulatedVocabulary(), clock=backend.clock, first=wrong)
    engine.begin(0, Generation("short", 0, (5, 6), 1500, GREEDY))
    engine.begin(1, Generation("long", 0, (9,) * 400, 1500, GREEDY))
    for _ in range(1200):
        engine.step()
    assert backend.calls[-1] == [0, 1]
