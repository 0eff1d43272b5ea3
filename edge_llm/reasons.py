"""Errors of the standard library in words, for people.

Owns what urllib wraps around them. Refuses to know what was asked for.
"""

from __future__ import annotations

from urllib.error import HTTPError, URLError


def reason_of(error: Exception) -> str:
    """What went wrong: `Connection refused` instead of `<urlopen error [Errno 111] Connection refused>`."""
    if isinstance(error, URLError) and not isinstance(error, HTTPError):
        return str(error.reason)
    return str(error)
