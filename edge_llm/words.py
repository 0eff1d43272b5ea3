"""Words for people that depend on figures.

Owns the plural. Refuses to know what is counted.
"""

from __future__ import annotations


def counted(number: int, what: str) -> str:
    """`1 slot`, `2 slots`, `8,192 tokens`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
