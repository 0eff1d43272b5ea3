"""Ask an HTTP endpoint from a command: straight at it when it is on this machine.

Owns when a proxy of the environment is used. Refuses to know what is asked and what an answer means.
"""

from __future__ import annotations

import http.client
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener


def open_url(request: Request, timeout_s: float) -> http.client.HTTPResponse:
    """The reply, nothing of it read. Raises what urllib raises: OSError, ValueError, HTTPException."""
    host = urlsplit(request.full_url).hostname or ""
    is_here = host in {"localhost", "::1"} or host.startswith("127.")
    # a proxy is another machine, or knows another loopback: it would not reach ours
    opener = build_opener(ProxyHandler({} if is_here else None))
    reply: http.client.HTTPResponse = opener.open(request, timeout=timeout_s)
    return reply
