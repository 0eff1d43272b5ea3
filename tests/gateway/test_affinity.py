"""What workers are believed to hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from edge_llm.gateway.affinity import Affinity, Chain, chain_of

CHUNK = 4
IDS = tuple(range(100, 120))


def chain(ids: Sequence[int], tenant: str = "t") -> Chain:
    return chain_of(tenant, ids, CHUNK)


def affinity(room: int = 100) -> Affinity:
    made = Affinity()
    made.meet("d1", "first life", room)
    return made


def test_nothing_is_believed_of_who_was_sent_nothing() -> None:
    assert affinity().held("d1", chain(IDS)) == 0
    assert Affinity().held("d1", chain(IDS)) == 0


def test_a_beginning_in_common_counts_in_whole_chunks() -> None:
    made = affinity()
    made.keep("d1", chain(IDS[:10]))
    assert made.held("d1", chain(IDS)) == 8, "of ten tokens two chunks are whole"
    assert made.held("d1", chain((*IDS[:6], 1, 2, 3))) == 4
    assert made.held("d1", chain((1, *IDS))) == 0
    assert made.held("d2", chain(IDS)) == 0


def test_one_tenant_knows_nothing_of_another() -> None:
    made = affinity()
    made.keep("d1", chain(IDS, "a"))
    assert made.held("d1", chain(IDS, "b")) == 0


def test_a_worker_that_was_started_again_holds_nothing() -> None:
    made = affinity()
    made.keep("d1", chain(IDS))
    made.meet("d1", "first life", 100)
    assert made.held("d1", chain(IDS)) == 20
    made.meet("d1", "second life", 100)
    assert made.held("d1", chain(IDS)) == 0


def test_what_was_used_least_recently_goes_first_and_the_end_before_the_beginning() -> None:
    made = affinity(room=5)
    old, new = tuple(range(12)), tuple(range(50, 62))
    made.keep("d1", chain(old))
    made.keep("d1", chain(new))
    assert (made.held("d1", chain(old)), made.held("d1", chain(new))) == (8, 12)
    made.keep("d1", chain(old))
    assert (made.held("d1", chain(old)), made.held("d1", chain(new))) == (12, 8)


def test_a_worker_that_may_keep_less_now_is_believed_to_hold_less() -> None:
    made = affinity()
    made.keep("d1", chain(IDS))
    made.meet("d1", "first life", 2)
    assert made.held("d1", chain(IDS)) == 8
    made.meet("d1", "first life", 0)
    assert made.held("d1", chain(IDS)) == 0


def test_what_a_worker_did_not_have_is_not_believed_any_longer() -> None:
    made = affinity()
    made.keep("d1", chain(IDS))
    made.correct("d1", chain(IDS), 8)
    assert made.held("d1", chain(IDS)) == 8
    made.correct("d1", chain(IDS), 0)
    assert made.held("d1", chain(IDS)) == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), max_size=30), st.integers(0, 8))
def test_never_more_is_believed_than_fits_and_only_what_was_sent(sent: list[tuple[int, int]], room: int) -> None:
    made, seen = affinity(room), OrderedDict[tuple[int, ...], None]()
    for base, length in sent:
        ids = tuple(range(1000 * base, 1000 * base + length))
        made.keep("d1", chain(ids))
        seen[ids] = None
    believed = 0
    for base in range(4):
        ids = tuple(range(1000 * base, 1000 * base + 40))
        held = made.held("d1", chain(ids))
        assert held <= max((len(old) for old in seen if old[:1] == ids[:1]), default=0)
        believed += held
    assert believed <= room * CHUNK
