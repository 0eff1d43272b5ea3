"""What goes between our processes, also while they are of two versions."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge_llm.errors import RemoteProtocolError
from edge_llm.worker.messages import CancelRequest, EventBatch, Link, Message, WorkerStatus, decode, encode
from tests.nodes import node_of

# What the first build that served in a cluster says at least. Never to be changed: what it lacks needs a default.
FIRST_STATUS: dict[str, Any] = {
    "worker": "d-0",
    "role": "decode",
    "is_ready": True,
    "is_draining": False,
    "model": "m",
    "model_sha256": "00",
    "architecture": "llama",
    "quantization": "Q4_0",
    "memory": "full",
    "n_ctx": 512,
    "slots": 4,
    "chunk_tokens": 128,
    "vocab_size": 1000,
    "kv_bytes_per_token": 64,
    "splits": True,
    "split_reason": "",
    "compatibility": "a" * 64,
    "exactness_class": "b" * 64,
    "policy": "exact",
    "level": "exact",
    "level_reason": "",
    "version": "0.1.0",
    "pid": 1,
    "serves_prompts": False,
    "build": {},
    "memory_bytes": {},
    "load": {
        "slots_free": 4,
        "sequences_running": 0,
        "sequences_waiting": 0,
        "pending_prompt_tokens": 0,
        "kv_cells_free": 2048,
        "decode_step_s": 0.1,
        "prefill_tokens_per_s": 20.0,
        "links": [{"peer": "p-0", "bytes_per_s": 1.0, "round_trip_s": 0.1, "samples": 1}],
        "rates": {},
    },
    "board": {"cpu_share": 0.5, "ram_share": 0.5},
}


def test_what_the_first_build_said_of_itself_is_still_read() -> None:
    status = decode(WorkerStatus, json.dumps(FIRST_STATUS).encode())
    assert (status.worker, status.load.links[0].peer) == ("d-0", "p-0")


def test_a_worker_of_a_later_build_may_say_more_of_itself() -> None:
    status = json.loads(encode(node_of("d-0", "decode").status)) | {"mood": "fine"}
    status["load"] |= {"rates": {"joules": 1}, "links": [FIRST_STATUS["load"]["links"][0] | {"hops": 2}], "later": [1]}
    status["board"] = FIRST_STATUS["board"] | {"fans": 3}
    read = decode(WorkerStatus, json.dumps(status).encode())
    assert read.load.links[0].peer == "p-0"
    assert read.board is not None


@pytest.mark.parametrize(
    ("kind", "text"), [(CancelRequest, '{"request_id":"r","epoch":0,"x":1}'), (EventBatch, '{"x":1}')]
)
def test_what_asks_for_something_says_nothing_that_is_not_understood(kind: type[Message], text: str) -> None:
    with pytest.raises(RemoteProtocolError, match="unknown field `x`"):
        decode(kind, text.encode())


@pytest.mark.parametrize("field", ["kv_bytes_per_token", "slots", "n_ctx"])
@pytest.mark.parametrize("wrong", [-1, 10**400])
def test_numbers_that_no_worker_has_are_refused_before_anybody_counts_with_them(field: str, wrong: int) -> None:
    status = {**FIRST_STATUS, field: wrong}
    with pytest.raises(RemoteProtocolError):
        decode(WorkerStatus, json.dumps(status).encode())


def test_a_load_that_no_worker_has_is_refused() -> None:
    for field, wrong in {"sequences_waiting": 10**9, "prefix_limit_bytes": -1}.items():
        status = {**FIRST_STATUS, "load": {**FIRST_STATUS["load"], field: wrong}}
        with pytest.raises(RemoteProtocolError, match=field):
            decode(WorkerStatus, json.dumps(status).encode())


def test_a_link_as_fast_as_memory_is_no_reason_to_lose_its_worker() -> None:
    """Loopback moves some 10 GB/s: a bound meant for seconds took the worker out of the view."""
    link = Link(peer="p1", bytes_per_s=2e10, round_trip_s=1e-5, samples=3)
    assert decode(Link, encode(link)) == link


@pytest.mark.parametrize("wrong", [b'{"peer":"p","bytes_per_s":-1,"round_trip_s":0,"samples":0}', b"{}", b"[1"])
def test_what_is_no_message_is_refused_with_its_kind(wrong: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="Link"):
        decode(Link, wrong)
