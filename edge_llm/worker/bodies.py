"""Bodies of the worker's HTTP: read whole within bounds of size and time, written from messages.

Owns the bounds and the shape of errors. Refuses to know routes and what bodies mean.
"""

from __future__ import annotations

import asyncio
from typing import Final

from fastapi import Request, Response

from edge_llm.errors import EdgeLLMError, InvalidRequest, Overloaded, PayloadTooLarge
from edge_llm.worker.messages import ErrorReply, Message, encode
from edge_llm.worker.tickets import PROOF_HEADER, KeyRing

MAX_BODY_BYTES: Final = 16 << 20
BODY_S: Final = 30.0


async def read_body(request: Request, limit: int = MAX_BODY_BYTES) -> bytes:
    """The whole body, refused as soon as it is, or says it is, too large."""
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced) > limit:
        raise PayloadTooLarge(f"the body is larger than {limit} bytes")
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                data += part
                if len(data) > limit:
                    raise PayloadTooLarge(f"the body is larger than {limit} bytes")
    except TimeoutError as late:
        raise InvalidRequest(f"the body did not arrive within {BODY_S:.0f} s") from late
    return bytes(data)


def reply_of(message: Message, status: int = 200) -> Response:
    """A message as the wire has it."""
    return Response(encode(message), status, media_type="application/json")


def proven_reply_of(message: Message, keys: KeyRing, ticket: str) -> Response:
    """The same, with the proof that this worker has the cluster key: anything may listen at an address."""
    reply = reply_of(message)
    reply.headers[PROOF_HEADER] = keys.prove(ticket, bytes(reply.body))
    return reply


def error_reply(error: EdgeLLMError) -> Response:
    """An error of our tree as the wire has it."""
    retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else None
    body = ErrorReply(code=error.code, message=error.message, param=error.param, retry_after_s=retry_after_s)
    return reply_of(body, error.status)
