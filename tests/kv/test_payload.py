"""KV from elsewhere holds finite numbers only: an undefined one would spoil what is computed later in its cells."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from edge_llm.errors import RemoteProtocolError
from edge_llm.kv.payload import check_finite
from edge_llm.kv.snapshot import CacheShape, Geometry, LayerShape, ids_digest

F32, F16, Q4_0, Q8_0, I16, BF16 = 0, 1, 2, 8, 25, 30
TOKENS = 5


def geometry(k_type: int, k_row_bytes: int, v_type: int, v_row_bytes: int) -> Geometry:
    layer = LayerShape(k_type, k_row_bytes, v_type, v_row_bytes, 0)
    return Geometry((CacheShape((layer, layer)),))


HALVES = geometry(F16, 8, F16, 4)


def finite(of: Geometry) -> bytearray:
    """Any finite numbers: bytes whose exponents are small in every format."""
    return bytearray(np.random.default_rng(1).integers(0, 0x3B, of.payload_bytes(TOKENS), np.uint8).tobytes())


@pytest.mark.parametrize(
    "of",
    [
        HALVES,
        geometry(F32, 8, F32, 8),
        geometry(BF16, 8, F16, 4),
        geometry(Q8_0, 68, F16, 4),
        geometry(Q4_0, 18, F32, 8),
    ],
)
def test_finite_numbers_of_every_type_pass(of: Geometry) -> None:
    check_finite(of, finite(of))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
def test_one_element_that_is_no_finite_number_is_refused_wherever_it_lies(value: float) -> None:
    for at in range(0, HALVES.payload_bytes(TOKENS), 2):
        payload = finite(HALVES)
        payload[at : at + 2] = np.float16(value).tobytes()
        with pytest.raises(RemoteProtocolError, match="infinite or undefined"):
            check_finite(HALVES, payload)


def test_the_largest_finite_numbers_are_numbers() -> None:
    payload = np.full(HALVES.payload_bytes(TOKENS) // 2, np.finfo(np.float16).max, np.float16)
    check_finite(HALVES, payload.tobytes())
    check_finite(HALVES, (-payload).tobytes())


@pytest.mark.parametrize(
    ("kind", "row_bytes", "bad"),
    [
        (F32, 8, np.float32(np.nan).tobytes()),
        (BF16, 8, b"\x80\x7f"),
        (Q8_0, 68, np.float16(np.inf).tobytes()),
        (Q4_0, 36, np.float16(np.nan).tobytes()),
    ],
)
def test_other_types_and_the_scales_of_blocks_are_looked_at_too(kind: int, row_bytes: int, bad: bytes) -> None:
    of = geometry(kind, row_bytes, F16, 4)
    payload = finite(of)
    payload[row_bytes : row_bytes + len(bad)] = bad  # the second position of the first layer
    with pytest.raises(RemoteProtocolError):
        check_finite(of, payload)


def test_what_lies_behind_a_scale_is_no_floating_point_number() -> None:
    of = geometry(Q8_0, 34, F16, 4)
    payload = finite(of)
    payload[2:34] = b"\xff" * 32
    check_finite(of, payload)


def test_types_that_are_whole_numbers_hold_any_bits() -> None:
    of = geometry(I16, 8, I16, 4)
    check_finite(of, b"\xff" * of.payload_bytes(TOKENS))


def test_the_digest_of_token_ids_is_that_of_their_four_bytes_each() -> None:
    ids = (0, 1, 255, 256, 49_151, (1 << 31) - 1)
    data = b"".join(number.to_bytes(4, "little", signed=True) for number in ids)
    assert ids_digest(ids) == ids_digest(list(ids)) == hashlib.sha256(data).hexdigest()
