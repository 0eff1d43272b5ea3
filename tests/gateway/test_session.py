"""One request's life: every edge of the table, every edge that is not in it, and what may be delivered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.errors import LocalProtocolError, RemoteProtocolError
from edge_llm.gateway.session import FINAL, TRANSITIONS, Event, Session, State
from edge_llm.request import FinishReason, TokenEvent

PAIRS: Final = [(state, event) for state in State for event in Event]
LIVE: Final = [state for state in State if state not in FINAL]
# A way into each state, by events alone.
WAYS: Final[dict[State, tuple[Event, ...]]] = {
    State.QUEUED: (),
    State.PREFILLING: (Event.PLANNED,),
    State.DECODING: (Event.PLANNED, Event.PROMPTED),
    State.REPLANNING: (Event.PLANNED, Event.WORKER_LOST),
    State.DONE: (Event.PLANNED, Event.PROMPTED, Event.FINISHED),
    State.FAILED: (Event.GAVE_UP,),
    State.CANCELLED: (Event.CLIENT_GONE,),
}


def session_in(state: State) -> Session:
    session = Session("r1")
    for event in WAYS[state]:
        session.on(event)
    assert session.state is state
    return session


def token(index: int, epoch: int = 0, finish_reason: FinishReason | None = None) -> TokenEvent:
    return TokenEvent("r1", epoch, index, 1000 + index, f"t{index}", finish_reason)


@given(st.lists(st.sampled_from(Event)))
def test_a_worker_has_a_request_once_at_most_and_at_the_end_none_has(events: list[Event]) -> None:
    held: list[int] = []
    session = Session("r1", on_held=held.append)
    for event in (*events, Event.CLIENT_GONE):
        if event in TRANSITIONS[session.state]:
            session.on(event)
        assert sum(held) == session.is_with_worker
    assert (session.is_over, sum(held)) == (True, 0)


def name_of(pair: tuple[State, Event]) -> str:
    return f"{pair[1].value} in {pair[0].value}"


@pytest.mark.parametrize("pair", PAIRS, ids=name_of)
def test_every_event_in_every_state_follows_the_table_or_is_our_bug(pair: tuple[State, Event]) -> None:
    state, event = pair
    session = session_in(state)
    target = TRANSITIONS[state].get(event)
    if target is None:
        with pytest.raises(LocalProtocolError, match=f"r1: {event.value} in state {state.value}"):
            session.on(event)
        assert session.state is state, "a refused event changed the state"
    else:
        epoch = session.epoch
        session.on(event)
        assert session.state is target
        assert session.epoch == epoch + (target is State.REPLANNING)


def test_the_table_knows_every_state_and_only_the_three_ends_are_final() -> None:
    assert TRANSITIONS.keys() == set(State)
    assert {State.DONE, State.FAILED, State.CANCELLED} == FINAL


@pytest.mark.parametrize("state", LIVE)
def test_a_client_may_leave_and_the_gateway_may_give_up_in_every_live_state(state: State) -> None:
    assert TRANSITIONS[state][Event.CLIENT_GONE] is State.CANCELLED
    assert TRANSITIONS[state][Event.GAVE_UP] is State.FAILED


@pytest.mark.parametrize("state", State)
def test_only_what_a_worker_says_while_it_has_the_request_is_current(state: State) -> None:
    session = session_in(state)
    assert session.is_current(session.epoch) == (state in (State.PREFILLING, State.DECODING))
    assert not session.is_current(session.epoch + 1)
    assert not session.is_current(session.epoch - 1)


def test_tokens_are_delivered_in_order_and_the_last_one_ends_the_session() -> None:
    session = session_in(State.DECODING)
    assert [session.deliver(token(index)) for index in range(3)] == [True] * 3
    assert session.deliver(token(3, finish_reason="stop"))
    assert session.delivered == [1000, 1001, 1002, 1003]
    assert (session.state, session.finish_reason, session.is_over) == (State.DONE, "stop", True)


@pytest.mark.parametrize("index", [0, 1, 3, 7])
def test_a_skipped_or_repeated_index_is_the_workers_fault_and_delivers_nothing(index: int) -> None:
    session = session_in(State.DECODING)
    for at in range(2):
        session.deliver(token(at))
    with pytest.raises(RemoteProtocolError, match=f"token {index} after 2 tokens"):
        session.deliver(token(index))
    assert session.delivered == [1000, 1001]
    assert session.state is State.DECODING
    assert session.deliver(token(2)), "the session must be able to go on, with this worker or another"


@pytest.mark.parametrize("finish_reason", [None, "stop"])
def test_a_token_before_its_prompts_report_is_the_workers_fault_and_delivers_nothing(
    finish_reason: FinishReason | None,
) -> None:
    session = session_in(State.PREFILLING)
    with pytest.raises(RemoteProtocolError, match="before its prompt was done"):
        session.deliver(token(0, finish_reason=finish_reason))
    assert (session.delivered, session.finish_reason, session.state) == ([], None, State.PREFILLING)


def test_a_lost_worker_raises_the_epoch_and_whatever_it_still_says_is_dropped() -> None:
    session = session_in(State.DECODING)
    session.deliver(token(0))
    session.on(Event.WORKER_LOST)
    assert not session.deliver(token(1)), "old epoch while replanning"
    session.on(Event.PLANNED)
    session.on(Event.PROMPTED)
    assert not session.deliver(token(1)), "old epoch while the new one runs"
    assert session.deliver(token(1, epoch=1))
    assert session.delivered == [1000, 1001]


@pytest.mark.parametrize("state", [State.QUEUED, State.REPLANNING, *FINAL], ids=lambda state: str(state.value))
def test_a_token_that_nobody_waits_for_is_dropped(state: State) -> None:
    session = session_in(state)
    assert not session.deliver(token(0, epoch=session.epoch))
    assert (session.delivered, session.state) == ([], state)


@dataclass
class Worker:
    """What a decode worker would say in one epoch: tokens from `start` on."""

    epoch: int
    start: int
    sent: int = 0

    def next_token(self) -> TokenEvent:
        self.sent += 1
        return token(self.start + self.sent - 1, self.epoch)


@dataclass
class Story:
    """A session, the worker that has it, and workers it was taken from, which do not know."""

    session: Session = field(default_factory=lambda: session_in(State.DECODING))
    now: Worker = field(default_factory=lambda: Worker(0, 0))
    lost: list[Worker] = field(default_factory=list)
    heard: list[int] = field(default_factory=list)

    def hear(self, event: TokenEvent) -> None:
        if self.session.deliver(event):
            self.heard.append(event.token_id)

    def lose(self) -> None:
        self.session.on(Event.WORKER_LOST)
        self.lost.append(self.now)
        self.now = Worker(self.session.epoch, len(self.session.delivered))
        self.session.on(Event.PLANNED)
        self.session.on(Event.PROMPTED)


@given(st.lists(st.sampled_from(["token", "late token", "skip", "repeat", "lose"]), max_size=60))
def test_whatever_workers_say_and_whoever_is_lost_the_client_hears_every_token_once(events: list[str]) -> None:
    story = Story()
    for event in events:
        if event == "token":
            story.hear(story.now.next_token())
        elif event == "late token" and story.lost:
            story.hear(story.lost[len(story.heard) % len(story.lost)].next_token())
        elif event == "lose":
            story.lose()
        elif event in ("skip", "repeat"):
            wrong = len(story.heard) + (1 if event == "skip" else -1)
            with pytest.raises(RemoteProtocolError):
                story.hear(token(wrong, story.session.epoch))
            story.lose()
        assert story.heard == story.session.delivered == [1000 + at for at in range(len(story.heard))]
