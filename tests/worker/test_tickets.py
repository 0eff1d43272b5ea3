from __future__ import annotations

import itertools

import pytest

from edge_llm.errors import ConfigError, Overloaded, Unauthorized
from edge_llm.worker import tickets
from edge_llm.worker.tickets import (
    LIFETIME_S,
    MAX_LIFETIME_S,
    MAX_NONCES,
    MAX_SKEW_S,
    Claims,
    KeyRing,
    ReplayGuard,
    ticket_of,
)

NOW_S = 1_800_000_000.0
OLD, NEW = "old1:" + "11" * 32, "new2:" + "22" * 32
KEYS = KeyRing.parse(OLD, "test")


def claims(**changes: object) -> Claims:
    values: dict[str, object] = {
        "audience": "p1",
        "operation": "prefill",
        "request_id": "r1",
        "issued_s": NOW_S,
        "nonce": "n1",
        "ids_sha256": "a" * 64,
    }
    return Claims(**(values | changes))  # type: ignore[arg-type]


def test_a_ticket_gives_its_claims_back() -> None:
    signed = claims(peers={"p2": "10.0.0.2:9000"}, body_sha256="b" * 64)
    assert KEYS.verify(KEYS.sign(signed), "p1", "prefill", NOW_S) == signed


def test_every_changed_character_is_noticed() -> None:
    ticket = KEYS.sign(claims())
    for at in range(len(ticket)):
        forged = ticket[:at] + ("0" if ticket[at] != "0" else "1") + ticket[at + 1 :]
        with pytest.raises(Unauthorized):
            KEYS.verify(forged, "p1", "prefill", NOW_S)


@pytest.mark.parametrize(
    "ticket", ["", ".", "..", "old1", "old1..", "old1.e30.", "old1.\xff.\xff", "x" * 10_000, "old1.e30.é"]
)
def test_noise_is_unauthorized_and_nothing_else(ticket: str) -> None:
    with pytest.raises(Unauthorized):
        KEYS.verify(ticket, "p1", "prefill", NOW_S)


def test_authentic_claims_of_another_form_are_refused() -> None:
    """Signed with the right key, but not the claims this version knows: parsed only after the MAC, and closed."""
    kid, key = next(iter(KEYS.keys.items()))
    for body in ("e30", "eyJhIjoxfQ", "bm90IGpzb24", "%%%"):
        mac = tickets._mac(key, "ticket", f"{kid}.{body}").hex()
        with pytest.raises(Unauthorized, match="claims"):
            KEYS.verify(f"{kid}.{body}.{mac}", "p1", "prefill", NOW_S)


def test_a_ticket_of_another_cluster_is_refused() -> None:
    stranger = KeyRing.parse("old1:" + "33" * 32, "test")
    with pytest.raises(Unauthorized, match="authentic"):
        KEYS.verify(stranger.sign(claims()), "p1", "prefill", NOW_S)


def test_a_ticket_serves_one_worker_and_one_operation() -> None:
    ticket = KEYS.sign(claims())
    with pytest.raises(Unauthorized, match="worker p1, this is p2"):
        KEYS.verify(ticket, "p2", "prefill", NOW_S)
    with pytest.raises(Unauthorized, match="allows prefill, not decode"):
        KEYS.verify(ticket, "p1", "decode", NOW_S)


def test_clocks_may_differ_by_the_stated_skew_and_no_more() -> None:
    ticket = KEYS.sign(claims())
    for now_s in (NOW_S - MAX_SKEW_S, NOW_S + LIFETIME_S + MAX_SKEW_S):
        KEYS.verify(ticket, "p1", "prefill", now_s)
    for now_s in (NOW_S - MAX_SKEW_S - 0.1, NOW_S + LIFETIME_S + MAX_SKEW_S + 0.1):
        with pytest.raises(Unauthorized, match="clocks"):
            KEYS.verify(ticket, "p1", "prefill", now_s)


def test_a_ticket_that_has_to_wait_lives_longer_but_not_for_ever() -> None:
    ticket = KEYS.sign(claims(lifetime_s=300.0))
    KEYS.verify(ticket, "p1", "prefill", NOW_S + 300.0 + MAX_SKEW_S)
    with pytest.raises(Unauthorized, match="expired"):
        KEYS.verify(ticket, "p1", "prefill", NOW_S + 300.1 + MAX_SKEW_S)
    endless = KEYS.sign(claims(lifetime_s=1e9))
    KEYS.verify(endless, "p1", "prefill", NOW_S + MAX_LIFETIME_S)
    with pytest.raises(Unauthorized, match="expired"):
        KEYS.verify(endless, "p1", "prefill", NOW_S + MAX_LIFETIME_S + MAX_SKEW_S + 0.1)


def test_a_time_that_is_no_number_is_refused() -> None:
    for issued_s in (float("inf"), float("-inf")):
        with pytest.raises(Unauthorized):
            KEYS.verify(KEYS.sign(claims(issued_s=issued_s)), "p1", "prefill", NOW_S)


def test_keys_rotate_without_a_moment_in_which_tickets_fail() -> None:
    """As the head of tickets.py says: whatever of a step has been restarted yet, who is asked knows who asks."""
    old, new_second, new_first, new = (
        KeyRing.parse(text, "test") for text in (OLD, f"{OLD}\n{NEW}", f"{NEW}\n{OLD}", NEW)
    )
    steps = (
        ((old, new_second), (old, new_second)),
        ((new_second, new_first), (new_second,)),
        ((new_first, new), (new_second, new)),
    )
    for gateways, workers in steps:
        for gateway, worker in itertools.product(gateways, workers):
            assert worker.verify(gateway.sign(claims()), "p1", "prefill", NOW_S) == claims()
    with pytest.raises(Unauthorized, match="does not have"):
        old.verify(new_first.sign(claims()), "p1", "prefill", NOW_S)
    with pytest.raises(Unauthorized, match="does not have"):
        new.verify(KEYS.sign(claims()), "p1", "prefill", NOW_S)


def test_a_ticket_works_once() -> None:
    guard = ReplayGuard()
    guard.use(claims(), NOW_S)
    with pytest.raises(Unauthorized, match="used before"):
        guard.use(claims(), NOW_S + LIFETIME_S)
    guard.use(claims(nonce="n2"), NOW_S)


@pytest.mark.parametrize("lifetime_s", [LIFETIME_S, 300.0, 1e9])
def test_the_replay_memory_outlives_every_ticket_it_must_know(lifetime_s: float) -> None:
    """At the last moment at which `verify` accepts a ticket, a full memory has not forgotten it."""
    guard = ReplayGuard()
    signed = claims(lifetime_s=lifetime_s)
    guard.use(signed, NOW_S - MAX_SKEW_S)
    for number in range(MAX_NONCES - 1):
        guard.use(claims(nonce=f"fill{number}", lifetime_s=lifetime_s), NOW_S)
    last_s = NOW_S + min(lifetime_s, MAX_LIFETIME_S) + MAX_SKEW_S
    KEYS.verify(KEYS.sign(signed), "p1", "prefill", last_s)
    with pytest.raises(Unauthorized, match="used before"):
        guard.use(signed, last_s)


def test_the_replay_memory_is_bounded_and_recovers() -> None:
    guard = ReplayGuard()
    for number in range(MAX_NONCES):
        guard.use(claims(nonce=str(number)), NOW_S)
    with pytest.raises(Overloaded):
        guard.use(claims(nonce="one more"), NOW_S)
    guard.use(claims(nonce="later", issued_s=NOW_S + 200), NOW_S + 200)


def test_a_transfer_key_belongs_to_one_ticket_and_needs_the_cluster_key() -> None:
    ticket, other = KEYS.sign(claims()), KEYS.sign(claims(nonce="n2"))
    assert KEYS.transfer_key(ticket) == KEYS.transfer_key(ticket) != KEYS.transfer_key(other)
    assert len(KEYS.transfer_key(ticket)) == 32
    with pytest.raises(Unauthorized):
        KEYS.transfer_key(ticket[:-1] + ("0" if ticket[-1] != "0" else "1"))


def test_an_answer_is_proven_by_a_holder_of_the_key_for_one_ticket_and_one_body() -> None:
    ticket, other = KEYS.sign(claims()), KEYS.sign(claims(nonce="n2"))
    proof = KEYS.prove(ticket, b"an answer")
    assert KEYS.is_proven(proof, ticket, b"an answer")
    for wrong in (KEYS.prove(other, b"an answer"), KEYS.prove(ticket, b"another"), "", proof[:-1], "\udcff"):
        assert not KEYS.is_proven(wrong, ticket, b"an answer")
    with pytest.raises(Unauthorized):
        KeyRing({"k9": b"x" * 32}).prove(ticket, b"an answer")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no key"),
        ("just-hex", "key 1"),
        ("a:zz", "kid:hex"),
        ("a:" + "11" * 31, "32 bytes"),
        (f"{OLD}\n{OLD}", "key 2"),
        ("a.b:" + "11" * 32, "key 1"),
        (":" + "11" * 32, "key 1"),
    ],
)
def test_a_wrong_key_file_is_named_without_showing_key_material(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        KeyRing.parse(text, "keys.txt")
    assert "keys.txt" in caught.value.message
    assert "1111" not in caught.value.message


@pytest.mark.parametrize("header", [None, "", "EdgeLLM", "EdgeLLM ", "Bearer abc", "edgellm abc"])
def test_a_header_without_a_ticket_is_unauthorized(header: str | None) -> None:
    with pytest.raises(Unauthorized):
        ticket_of(header)
    assert ticket_of("EdgeLLM abc") == "abc"
