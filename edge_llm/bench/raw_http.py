"""What clients that hardly look at what comes have in common: a request as bytes, marks to count by, the last event.

Owns the bytes. Refuses to know connections, times and what is counted. Who shares a core with a thousand streams cannot
parse every event (load_client.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, cast

TEXT: Final = b'"text":"'
EMPTY_TEXT: Final = b'"text":""'
DONE: Final = b"data: [DONE]"
# Enough for the last event of an answer, which says what was generated.
TAIL_BYTES: Final = 8 << 10


def request_bytes(host: str, port: int, body: Mapping[str, Any]) -> bytes:
    """POST /v1/completions on a connection of its own."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
    return f"{head}connection: close\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data


def last_object(tail: bytes, key: str) -> dict[str, Any]:
    """The object of this name in the last event that has one; empty without."""
    for line in reversed(tail.split(b"\n")):
        if line.startswith(b"data: {") and f'"{key}":{{'.encode() in line:
            try:
                return cast(dict[str, Any], json.loads(line.removeprefix(b"data: "))[key])
            except (ValueError, KeyError):
                return {}
    return {}


def generated_tokens(tail: bytes) -> int:
    """What the last event says was generated; 0 when it did not come."""
    return int(last_object(tail, "timings").get("predicted_n", 0))
