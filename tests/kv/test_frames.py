from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_llm.errors import LocalProtocolError, RemoteProtocolError
from edge_llm.kv.frames import (
    MAC_BYTES,
    NEED_DATA,
    Chunk,
    End,
    Error,
    Event,
    FrameDecoder,
    FrameEncoder,
    Header,
    Progress,
)
from edge_llm.kv.snapshot import VLayout

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
BYTES_PER_TOKEN = 6
HEADER = Header("c" * 64, "e" * 64, "columns", 4, 10, 0, "a" * 64, "request-1", 3)


def payload(p0: int, p1: int) -> bytes:
    return bytes((7 * i) % 251 for i in range(p0 * BYTES_PER_TOKEN, p1 * BYTES_PER_TOKEN))


def transfer(key: bytes = KEY) -> list[bytes]:
    """A whole small transfer, frame by frame."""
    encoder = FrameEncoder(key)
    events: list[Event] = [
        HEADER,
        Chunk(0, 0, 4, payload(0, 4)),
        Progress(4, 10),
        Chunk(1, 4, 8, payload(4, 8)),
        Chunk(2, 8, 10, payload(8, 10)),
    ]
    sent = [b"".join(map(bytes, encoder.send(event))) for event in events]
    return [*sent, b"".join(map(bytes, encoder.end(10)))]


def plain(event: Event) -> Event:
    return Chunk(event.index, event.p0, event.p1, bytes(event.payload)) if isinstance(event, Chunk) else event


def decode(parts: Iterable[bytes], key: bytes = KEY) -> list[Event]:
    decoder = FrameDecoder(key, BYTES_PER_TOKEN, max_tokens=16, max_chunk_tokens=8)
    events: list[Event] = []
    for part in parts:
        decoder.feed(part)
        while (event := decoder.next_event()) is not NEED_DATA:
            events.append(plain(event))
    decoder.eof()
    return events


WHOLE = b"".join(transfer())
EVENTS = decode([WHOLE])


def test_a_transfer_arrives_as_it_was_sent() -> None:
    assert EVENTS[0] == HEADER
    assert b"".join(bytes(event.payload) for event in EVENTS if isinstance(event, Chunk)) == payload(0, 10)
    assert isinstance(EVENTS[-1], End)
    assert Progress(4, 10) in EVENTS


def test_the_decoder_does_not_care_where_the_network_cuts() -> None:
    for cut in range(len(WHOLE) + 1):
        assert decode([WHOLE[:cut], WHOLE[cut:]]) == EVENTS
    assert decode(bytes([byte]) for byte in WHOLE) == EVENTS


def test_a_stream_cut_anywhere_is_refused_and_gives_no_wrong_event() -> None:
    for cut in range(len(WHOLE)):
        decoder = FrameDecoder(KEY, BYTES_PER_TOKEN, max_tokens=16, max_chunk_tokens=8)
        decoder.feed(WHOLE[:cut])
        seen = []
        while (event := decoder.next_event()) is not NEED_DATA:
            seen.append(plain(event))
        assert seen == EVENTS[: len(seen)]
        with pytest.raises(RemoteProtocolError):
            decoder.eof()


def test_any_flipped_bit_is_refused() -> None:
    for at in range(len(WHOLE)):
        damaged = bytearray(WHOLE)
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises(RemoteProtocolError):
            decode([bytes(damaged)])


def test_frames_dropped_repeated_swapped_or_of_another_transfer_are_refused() -> None:
    frames, foreign = transfer(), transfer(OTHER_KEY)
    for number in range(len(frames)):
        with pytest.raises(RemoteProtocolError):
            decode(frames[:number] + frames[number + 1 :])
        with pytest.raises(RemoteProtocolError):
            decode(frames[: number + 1] + frames[number:])
        with pytest.raises(RemoteProtocolError):
            decode([*frames[:number], foreign[number], *frames[number + 1 :]])
    for number in range(len(frames) - 1):
        swapped = [*frames]
        swapped[number], swapped[number + 1] = swapped[number + 1], swapped[number]
        with pytest.raises(RemoteProtocolError):
            decode(swapped)
    with pytest.raises(RemoteProtocolError):
        decode(frames, OTHER_KEY)


def test_an_oversized_frame_is_refused_from_its_preamble_alone() -> None:
    encoder = FrameEncoder(KEY)
    head = b"".join(map(bytes, encoder.send(HEADER)))
    giant = b"".join(map(bytes, encoder.send(Chunk(0, 0, 4, bytes(1 << 20)))))
    decoder = FrameDecoder(KEY, BYTES_PER_TOKEN, max_tokens=16, max_chunk_tokens=8)
    decoder.feed(head + giant[:32])
    assert decoder.next_event() == HEADER
    with pytest.raises(RemoteProtocolError, match="larger than this worker takes"):
        decoder.next_event()
    with pytest.raises(RemoteProtocolError, match="already refused"):
        decoder.next_event()


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(0, 0, 4, payload(0, 3)),  # wrong length
        Chunk(0, 1, 4, payload(1, 4)),  # gap
        Chunk(0, 4, 4, b""),  # empty
        Chunk(0, 0, 11, payload(0, 11)),  # past the end
    ],
)
def test_an_authentic_chunk_of_a_wrong_place_or_size_is_refused(chunk: Chunk) -> None:
    encoder = FrameEncoder(KEY)
    sent = [bytes(b) for event in (HEADER, chunk) for b in encoder.send(event)]
    with pytest.raises(RemoteProtocolError):
        decode(sent)


@pytest.mark.parametrize(
    "header",
    [
        Header("c", "e", cast(VLayout, "diagonal"), 4, 10, 0, "a", "r"),
        Header("c", "e", "rows", 4, 10, 11, "a", "r"),
        Header("c", "e", "rows", 4, 17, 0, "a", "r"),
        Header("c", "e", "rows", 0, 10, 0, "a", "r"),
        Header("c", "e", "rows", 4, True, 0, "a", "r"),
    ],
)
def test_a_header_out_of_bounds_is_refused(header: Header) -> None:
    with pytest.raises(RemoteProtocolError):
        decode([bytes(b) for b in FrameEncoder(KEY).send(header)])


def test_an_error_frame_ends_the_stream_at_any_point() -> None:
    failure = Error("prefill_failed", "out of memory on pi-3", True)
    assert decode([bytes(b) for b in FrameEncoder(KEY).send(failure)]) == [failure]
    encoder = FrameEncoder(KEY)
    assert decode([bytes(b) for event in (HEADER, failure) for b in encoder.send(event)]) == [HEADER, failure]


def test_the_encoder_refuses_to_talk_nonsense() -> None:
    with pytest.raises(LocalProtocolError):
        FrameEncoder(KEY).send(Chunk(0, 0, 4, payload(0, 4)))
    encoder = FrameEncoder(KEY)
    encoder.send(HEADER)
    with pytest.raises(LocalProtocolError):
        encoder.send(Chunk(1, 0, 4, payload(0, 4)))


def test_a_transfer_that_starts_late_carries_only_what_is_missing() -> None:
    encoder = FrameEncoder(KEY)
    late = Header("c" * 64, "e" * 64, "rows", 4, 10, 7, "a" * 64, "r")
    events: list[Event] = [late, Chunk(0, 7, 8, payload(7, 8)), Chunk(1, 8, 10, payload(8, 10))]
    sent = [bytes(b) for event in events for b in encoder.send(event)] + [bytes(b) for b in encoder.end(10)]
    assert decode(sent)[:3] == events


def test_a_chunk_of_more_positions_than_the_header_announced_is_refused() -> None:
    encoder = FrameEncoder(KEY)
    sent = [*encoder.send(HEADER), *encoder.send(Chunk(0, 0, 5, payload(0, 5)))]
    with pytest.raises(RemoteProtocolError, match="does not follow"):
        decode(map(bytes, sent))


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_bytes_of_strangers_never_do_more_than_be_refused(data: bytes) -> None:
    decoder = FrameDecoder(KEY, BYTES_PER_TOKEN, max_tokens=16, max_chunk_tokens=8)
    decoder.feed(data)
    try:
        assert decoder.next_event() is NEED_DATA
    except RemoteProtocolError:
        pass


def test_payloads_are_sent_without_a_copy_and_the_overhead_is_small() -> None:
    encoder = FrameEncoder(KEY)
    encoder.send(HEADER)
    data = payload(0, 4)
    buffers = encoder.send(Chunk(0, 0, 4, data))
    assert any(part is data for part in buffers)
    assert sum(map(len, buffers)) - len(data) < 64 + MAC_BYTES
