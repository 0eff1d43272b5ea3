"""What workers have to do, added up from bookings and statuses."""

from __future__ import annotations

from typing import Any

import pytest

from edge_llm.cluster.cost import TYPICAL_ANSWER_TOKENS, PromptWork, Stream, Work
from edge_llm.gateway.workbook import REFRESH_S, Booking, WorkBook, left_of
from edge_llm.worker.messages import WorkerStatus
from tests.nodes import load_of, node_of


def booking(reader: str = "p1", **changes: Any) -> Booking:
    return Booking(
        **{
            "decode": "d1",
            "reader": reader,
            "prompt_tokens": 101,
            "max_tokens": 50,
            "answer_tokens": 20.0,
            "held": 0,
            "delivered": [],
            **changes,
        }
    )


def status(worker: str, **load: Any) -> WorkerStatus:
    return node_of(worker, "prefill" if worker.startswith("p") else "decode", load=load_of(**load)).status


def test_a_split_request_takes_a_slot_at_one_worker_and_gives_a_prompt_to_another() -> None:
    book = WorkBook()
    book.book("r1", booking())
    assert book.work("d1", 0.0) == Work(sequences=1, reserved_cells=151)
    assert book.work("p1", 0.0) == Work(prompts=(PromptWork(100, is_served=True),))


def test_a_local_request_is_both_at_one_worker() -> None:
    book = WorkBook()
    book.book("r1", booking("d1"))
    to_come = Stream(left=20.0, cells=101, begins_s=0.001, ahead=1)
    work = book.work("d1", 0.0)
    assert work == Work(sequences=1, reserved_cells=151, prompts=(PromptWork(100),), coming=(to_come,))
    book.prompted("r1", 0.0)
    assert book.work("d1", 0.0).coming == (), "it has come"


def test_what_is_read_and_what_was_held_is_no_work() -> None:
    book = WorkBook()
    book.book("r1", booking(held=30))
    assert book.work("p1", 0.0).prompts == (PromptWork(70, 30, is_served=True),)
    book.read("r1", 80)
    assert book.work("p1", 0.0).prompts == (PromptWork(20, 80, is_served=True),)


def test_a_prompt_that_is_overdue_does_not_stand_for_another_gateways_stream() -> None:
    book = WorkBook()
    for _ in range(2):  # two statuses that agree
        book.seen(status("d1", sequences_running=1))
    book.book("r1", booking(tpot_s=0.1, expected_s=11.0))
    work = book.work("d1", 20.0)
    assert (work.decoding, work.unknown, work.limits.is_each) == (1, 1, False)
    book.prompted("r1", 20.0)
    assert book.work("d1", 20.0).unknown == 1


def test_with_limits_sequences_are_known_one_by_one_with_what_they_had_so_far() -> None:
    book, delivered = WorkBook(), list[int]()
    book.book("r1", booking(delivered=delivered, tpot_s=0.1, due_s=12.0, expected_s=11.0))
    book.book("r2", booking("d1", expected_s=15.0))
    assert book.work("p1", 10.0).prompts == (PromptWork(100, is_served=True, due_s=2.0),)
    assert book.work("d1", 10.0).streams == (Stream(20.0, 101, 1.0, tpot_s=0.1), Stream(20.0, 101, 5.0, ahead=1))
    book.prompted("r1", 11.0)
    delivered += [1, 2, 3]
    assert book.work("d1", 14.0).streams == (Stream(17.0, 104, 0.0, 3, 3.0, 0.1), Stream(20.0, 101, 1.0, ahead=1))


def test_without_limits_nobody_is_known_one_by_one() -> None:
    book = WorkBook()
    book.book("r1", booking("d1"))
    assert book.work("d1", 0.0).streams == ()


def test_a_prompt_that_is_whole_becomes_a_stream() -> None:
    book, delivered = WorkBook(), [1, 2]
    book.book("r1", booking(delivered=delivered, before=2))
    book.prompted("r1", 0.0)
    assert book.work("p1", 0.0) == Work()
    assert book.work("d1", 0.0) == Work(1, 1, 101, 20.0, 151)
    delivered += [3, 4, 5]
    assert book.work("d1", REFRESH_S).cells == 101, "added up anew only now and then"
    assert book.work("d1", 2 * REFRESH_S) == Work(1, 1, 104, 17.0, 151)


def test_an_answer_that_is_longer_than_expected_goes_on_as_far_as_it_may() -> None:
    book = WorkBook()
    book.book("r1", booking(delivered=[0] * 45))
    book.prompted("r1", 0.0)
    assert book.work("d1", 0.0).tokens_left == 5.0, "of the 50 that it may have"


def test_a_request_that_is_over_leaves_nothing_and_may_be_booked_anew() -> None:
    book = WorkBook()
    book.book("r1", booking())
    book.remove("r1")
    book.remove("r1")
    assert book.work("d1", 0.0) == book.work("p1", 0.0) == Work()
    book.book("r1", booking())
    book.book("r1", booking("p2", decode="d2"))
    assert (book.work("d1", 0.0).sequences, book.work("d2", 0.0).sequences) == (0, 1)


def test_late_news_of_a_request_that_is_gone_changes_nothing() -> None:
    book = WorkBook()
    book.read("r1", 10)
    book.prompted("r1", 0.0)
    assert book.work("d1", 0.0) == Work()


def test_others_work_is_believed_when_two_statuses_show_it() -> None:
    book = WorkBook()
    busy = status("d1", sequences_running=3, pending_prompt_tokens=400)
    book.seen(busy)
    assert book.work("d1", 0.0) == Work(), "an event may have crossed the status"
    book.seen(busy)
    work = book.work("d1", 0.0)
    assert (work.sequences, work.decoding, work.pending_tokens) == (3, 3, 400)
    assert work.tokens_left == 3 * TYPICAL_ANSWER_TOKENS
    book.seen(status("d1"))
    assert book.work("d1", 0.0) == Work(), "one status without it is enough"


def test_others_prompts_are_read_before_ours() -> None:
    """Their prompt is the first of the list: a stream that waits for two of two is not disturbed by its own."""
    book = WorkBook()
    for _ in range(2):
        book.seen(status("d1", pending_prompt_tokens=400))
    book.book("r1", booking("d1", tpot_s=0.1))
    work = book.work("d1", 0.0)
    assert [prompt.tokens for prompt in work.prompts] == [400, 100]
    assert work.streams[0].ahead == 2


def test_our_own_work_in_a_status_does_not_count_twice() -> None:
    book = WorkBook()
    book.book("r1", booking("d1"))
    for _ in range(2):
        book.seen(status("d1", sequences_running=2, pending_prompt_tokens=100))
    work = book.work("d1", 0.0)
    assert (work.sequences, work.decoding, work.prompts) == (2, 1, (PromptWork(100),))


@pytest.mark.parametrize(
    ("generated", "most", "left"),
    [(0, 600, 100), (20, 600, 80), (130, 600, 50), (590, 600, 10), (600, 600, 1), (5, 8, 3)],
)
def test_an_answer_that_is_longer_than_expected_is_not_about_to_end(generated: int, most: int, left: float) -> None:
    assert left_of(100.0, generated, most) == left
