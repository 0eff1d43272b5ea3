"""GET /cluster: what this gateway believes of its workers and what it has decided, as JSON for people and tools.

Owns the shape of that answer (README, "Watching it"). Refuses to compute anything: it shows what is at hand (about 1 ms
of an x86 core with 8 workers and 200 decisions), so that it can be asked every second. It has numbers, names and
addresses; no key, no prompt, no text of a request. Every key may see it: of what a worker has to do it shows sums,
never one request by another, and of decisions those that its caller may see.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from edge_llm.cluster.cost import Work
from edge_llm.cluster.discovery import Heard
from edge_llm.cluster.view import Node, Place

SHOWN_SILENT: Final = 50


def overview(
    gateway: str,
    requests: Mapping[str, int],
    nodes: Iterable[Node],
    booked: Mapping[str, Work],
    now_s: float,
    pools: Mapping[str, str] | None = None,
    decisions: Sequence[object] = (),
    pool_events: Sequence[object] = (),
    discovery: Mapping[str, object] | None = None,
    caller: Mapping[str, object] | None = None,
) -> bytes:
    """The JSON. `booked`: the work that this gateway believes each worker to have; `now_s` on the clock of
    `Node.seen_s`; `pools`: for which phase a worker stands now, where that is not what its role says; `decisions`:
    those that the caller may see; `discovery`: `found_by`; `caller`: who asks, and whether it may change workers."""
    return msgspec.json.encode(
        {
            "gateway": gateway,
            "requests": requests,
            "nodes": [
                node_entry(node, booked.get(node.worker), now_s)
                | {"pool": (pools or {}).get(node.worker, node.status.role)}
                for node in nodes
            ],
            "decisions": decisions,
            "pool_events": pool_events,
            "discovery": discovery,
            "caller": caller,
        }
    )


def found_by(places: int, heard: Heard, silent: Sequence[tuple[Place, str]]) -> dict[str, object]:
    """Where workers may be: how many places, how fresh that is, and who of them does not answer for what reason."""
    return {
        "places": places,
        "age_s": None if heard.age_s is None else round(heard.age_s, 1),
        "problem": heard.problem,
        "silent": len(silent),
        "silent_workers": [
            {"worker": place.worker, "address": place.address, "message": message}
            for place, message in silent[:SHOWN_SILENT]
        ],
    }


def node_entry(node: Node, booked: Work | None, now_s: float) -> dict[str, Any]:
    """All about one node but its pool."""
    status = node.status
    return {
        "worker": node.worker,
        "address": node.place.address,
        "role": status.role,
        "is_ready": status.is_ready,
        "is_draining": status.is_draining,
        "model": status.model,
        "level": status.level,
        "level_reason": status.level_reason,
        "exactness_class": status.exactness_class,
        "compatibility": status.compatibility,
        "kv_bytes_per_token": status.kv_bytes_per_token,
        "model_sha256": status.model_sha256,
        "quantization": status.quantization,
        "slots": status.slots,
        "n_ctx": status.n_ctx,
        "chunk_tokens": status.chunk_tokens,
        "splits": status.splits,
        "split_reason": status.split_reason,
        "serves_prompts": status.serves_prompts,
        "policy": status.policy,
        "version": status.version,
        "pid": status.pid,
        "started_at": status.started_at,
        "build": status.build,
        "memory_bytes": status.memory_bytes,
        "board": _whole(status.board),
        "load": _whole(status.load),
        "booked": None if booked is None else _sums(booked),
        "seen_ago_s": round(max(0.0, now_s - node.seen_s), 3),
    }


def _whole(value: object) -> object:
    """A message with what has its default too: between processes that is left out, people look for it."""
    if isinstance(value, msgspec.Struct):
        return {name: _whole(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, list | tuple):
        return [_whole(one) for one in value]
    return value


def _sums(work: Work) -> dict[str, int]:
    """`prompts` are still to be read, `served` of them for other workers; they have `pending_tokens` together."""
    return {
        "sequences": work.sequences,
        "decoding": work.decoding,
        "prompts": len(work.prompts),
        "served": work.served,
        "pending_tokens": work.pending_tokens,
    }
