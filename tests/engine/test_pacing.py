"""What prompts may take from running streams."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.engine.pacing import OF_LIMIT, PROMPT_STEPS, Pace, room_s, whole_rows

STEP_S = 0.020


def gaps(paces: list[Pace], count: int, step_s: float = STEP_S) -> list[float]:
    """Seconds between the tokens of streams that run together while there is always a prompt to read."""
    found: list[float] = []
    skipped = 0
    for made in range(1, count + 1):
        now = [pace._replace(tokens=made, age_s=sum(found), left=1000) for pace in paces]
        room = room_s(step_s, now, skipped)
        skipped = 0 if room else skipped + 1
        found.append(room + step_s)
    return found


def test_prompt_work_between_two_tokens_is_bounded_by_the_measured_step() -> None:
    assert room_s(STEP_S, [Pace(), Pace()]) == pytest.approx(0.030)
    assert [whole_rows(tokens) for tokens in (30.7, 3.9, 0.2, -5.0)] == [28, 3, 1, 1], "whole blocks of rows"


def test_a_stream_that_has_just_begun_gets_its_next_token_at_once_and_the_mean_of_its_gaps_stays_in_its_limit() -> None:
    seen = gaps([Pace(0.040)], 50)
    assert seen[0] == pytest.approx(STEP_S)
    assert max(seen) == pytest.approx(0.050), "as long as without a limit at most"
    for count in range(1, 51):
        assert sum(seen[:count]) / count <= OF_LIMIT * 0.040 + 1e-9
    assert sum(seen) / 50 > 0.034, "what it can bear is used"


def test_a_short_answer_keeps_its_limit_though_a_step_of_it_takes_longer_than_foreseen() -> None:
    limit_s = 2.2 * STEP_S
    for count in (1, 2, 3):
        late_s = 0.25 * STEP_S
        assert (sum(gaps([Pace(limit_s)], count)) + late_s) / count <= OF_LIMIT * limit_s + 1e-9
    assert sum(gaps([Pace(limit_s)], 50)) / 50 > 0.98 * OF_LIMIT * limit_s, "to a long one it is nothing"


def test_what_a_stream_had_beyond_its_pace_is_given_to_prompts() -> None:
    ahead = Pace(0.040, tokens=100, age_s=100 * STEP_S)
    assert room_s(STEP_S, [ahead]) == pytest.approx(0.030)
    behind = Pace(0.040, tokens=100, age_s=100 * 0.0399, left=100)
    assert room_s(STEP_S, [ahead, behind]) == 0.0
    assert room_s(STEP_S, [Pace(0.040, tokens=0, age_s=5.0)]) == pytest.approx(0.030), "no second token is awaited"


def test_where_every_stream_bears_it_prompts_get_longer_pieces() -> None:
    assert room_s(STEP_S, [Pace(0.100, 9, 9 * STEP_S)] * 2) == pytest.approx(0.070), "90 ms of the limit, less the step"
    assert room_s(STEP_S, [Pace(60.0, 9, 9 * STEP_S)]) == pytest.approx(0.160), "nor does a stream seem to hang"
    assert room_s(STEP_S, [Pace(0.100, 9, 9 * STEP_S), Pace()]) == pytest.approx(0.030), "one of them said nothing"
    waiting = [Pace(0.100, 9, 9 * STEP_S), Pace(0.100)]
    assert room_s(STEP_S, waiting) == pytest.approx(0.030), "one of them waits for its first token"


def test_nothing_is_left_for_a_limit_that_is_lost() -> None:
    lost = Pace(0.040, tokens=50, age_s=50 * 0.080, left=50)
    assert room_s(STEP_S, [lost]) == pytest.approx(0.030)
    assert room_s(STEP_S, [lost._replace(left=500)]) == 0.0, "it can be made good"
    ahead = Pace(0.038, tokens=20, age_s=0.38, left=492)
    assert room_s(0.050, [ahead]) == pytest.approx(0.075), "steps are too long for it, and it has 0.25 s of a lead"
    assert room_s(0.050, [ahead._replace(age_s=0.62)]) == 0.0, "it has none, and is not behind"
    assert room_s(0.020, [Pace(0.015, 9, 9.0, 9), Pace(1.0, 9, 0.18)]) == pytest.approx(0.160), "nor from others"
    assert room_s(STEP_S, [lost, Pace(0.040, tokens=1, left=50)]) == 0.0, "others can"
    assert gaps([Pace(0.015)], 5) == pytest.approx([0.050] * 5), "not even without prompts"


def test_prompts_go_on_beside_streams_that_can_hardly_bear_any() -> None:
    seen = gaps([Pace(0.0222)], 40)
    assert sum(seen) / 40 == pytest.approx(1.125 * STEP_S, rel=0.05), "an eighth of a step for each"
    assert max(seen) <= 2 * STEP_S + 1e-9


@given(
    limits=st.lists(st.one_of(st.none(), st.floats(0.001, 1.0)), min_size=1, max_size=5),
    step_s=st.floats(0.001, 0.2),
)
def test_prompts_never_starve_and_no_gap_is_longer_than_without_limits_or_than_all_of_them(
    limits: list[float | None], step_s: float
) -> None:
    seen = gaps([Pace(tpot_s) for tpot_s in limits], 30, step_s)
    known = [tpot_s for tpot_s in limits if tpot_s is not None]
    longest = (1 + PROMPT_STEPS) * step_s
    if len(known) == len(limits):  # those that are lost for good do not count
        longest = max(
            longest, OF_LIMIT * min((one for one in known if OF_LIMIT * one > 1.125 * step_s), default=max(known))
        )
    assert max(seen) <= longest + 1e-9
    for begin in range(23):
        assert sum(seen[begin : begin + 8]) >= 9 * step_s - 1e-9, "of eight steps one leaves room for a step's worth"
