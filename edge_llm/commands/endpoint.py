"""Ask an HTTP endpoint from a command: what is an address of one, and straight at it when it is on this machine.

Owns the check of addresses that people give, and when a proxy of the environment is used. Refuses to know what is asked
and what an answer means.
"""

from __future__ import annotations

import http.client
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import click


class Address(click.ParamType[str]):
    """`http://HOST:PORT`. Without the /v1 that OpenAI's clients want, and `edge-llm up` shows: requests bring it."""

    name = "URL"

    def convert(self, value: object, param: click.Parameter | None, context: click.Context | None) -> str:
        try:
            return address_of(str(value))
        except ValueError as error:
            self.fail(str(error), param, context)


def address_of(text: str) -> str:
    """Raises ValueError that says what an address looks like."""
    if not _is_address(text):
        raise ValueError(f"{text!r} is no address of a server: write http://HOST:PORT")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # half an IPv6 address, a port that is none
        return False
    return is_address and text.isascii() and text.isprintable() and " " not in text


def open_url(request: Request, timeout_s: float) -> http.client.HTTPResponse:
    """The reply, nothing of it read. Raises what urllib raises: OSError, ValueError, HTTPException."""
    host = urlsplit(request.full_url).hostname or ""
    is_here = host in {"localhost", "::1"} or host.startswith("127.")
    # a proxy is another machine, or knows another loopback: it would not reach ours
    opener = build_opener(ProxyHandler({} if is_here else None))
    reply: http.client.HTTPResponse = opener.open(request, timeout=timeout_s)
    return reply
