from __future__ import annotations

import pytest

from edge_llm.errors import RemoteProtocolError
from edge_llm.worker.messages import Link, decode, encode


def test_a_link_as_fast_as_memory_is_no_reason_to_lose_its_worker() -> None:
    """Loopback moves some 10 GB/s: a bound meant for seconds took the worker out of the view."""
    link = Link(peer="p1", bytes_per_s=2e10, round_trip_s=1e-5, samples=3)
    assert decode(Link, encode(link)) == link


@pytest.mark.parametrize("wrong", [b'{"peer":"p","bytes_per_s":-1,"round_trip_s":0,"samples":0}', b"{}", b"[1"])
def test_what_is_no_message_is_refused_with_its_kind(wrong: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="Link"):
        decode(Link, wrong)
