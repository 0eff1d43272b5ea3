"""Whether figures are what a published type says they are."""

from __future__ import annotations

import json
from typing import Any

import msgspec


def reads_back(figures: dict[str, Any], of: type[msgspec.Struct]) -> bool:
    """Whether `figures` fit the type and nothing is lost on the way: a field that it does not name would be."""
    plain = json.loads(json.dumps(figures))
    return bool(json.loads(msgspec.json.encode(msgspec.convert(plain, of, strict=True))) == plain)
