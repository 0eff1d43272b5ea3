"""What a step says about time: only decoding counts as decoding."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from edge_llm.engine.backend import Logits, Row
from edge_llm.engine.sequencer import Sequencer
from edge_llm.engine.simulated import SimulatedBackend, SimulatedSettings, SimulatedVocabulary
from edge_llm.kv.codec import StateBlob
from edge_llm.request import Generation, SamplingParams

STEP_S, EXPORT_S = 0.005, 0.05
GREEDY = SamplingParams(temperature=0.0)


class Timed(SimulatedBackend):
    """Takes time on a clock of its own: a step for decoding, ten steps for reading KV out."""

    def __init__(self) -> None:
        super().__init__(SimulatedSettings(slots=2))
        self.now_s = 0.0

    def clock(self) -> float:
        return self.now_s

    def decode(self, rows: Sequence[Row]) -> Logits:
        self.now_s += STEP_S
        return super().decode(rows)

    def export(self, slot: int, n_tokens: int) -> StateBlob:
        self.now_s += EXPORT_S
        return super().export(slot, n_tokens)


@pytest.mark.parametrize("keeps_kv", [False, True])
def test_reading_out_what_is_kept_is_no_part_of_a_decode_step(keeps_kv: bool) -> None:
    backend = Timed()
    engine = Sequencer(backend, SimulatedVocabulary(), clock=backend.clock)
    kept = 0
    for number in range(5):
        engine.begin(0, Generation(f"r{number}", 0, (5, 6), 4, GREEDY), keeps_kv=keeps_kv)
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
        engine.begin(slot, Generation(f"r{slot}", 0, (5 + slot,), 4, GREEDY), keeps_kv=True)
    kept = [found.request_id for _ in range(20) for found in engine.step().kept]
    assert kept == ["r0"]


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
