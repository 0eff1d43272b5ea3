"""What `edge-llm verify` found for one build, model and policy, kept where workers find it.

Owns the file format and the lookup. A level is believed only for the very exactness class and compatibility it
was measured on; anything else is `unverified`. Refuses to know how levels are measured (engine/verify.py).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, get_args

from edge_llm.kv.snapshot import Identity, Level, digest_of

SCHEMA: Final = 1
_ORDER: Final[dict[Level, int]] = {"exact": 3, "same-plan": 2, "none": 1, "unverified": 0}


@dataclass(frozen=True, slots=True)
class LevelRecord:
    """`width` is the widest decode batch that was compared: wider batches were not verified."""

    level: Level
    reason: str
    width: int


UNVERIFIED: Final = LevelRecord("unverified", "run `edge-llm verify` on this node to measure it", 0)


def capped(record: LevelRecord, cap: Level) -> LevelRecord:
    """`record`, promising no more than the setting `level_cap` allows."""
    if _ORDER[record.level] <= _ORDER[cap]:
        return record
    return LevelRecord(cap, f"capped to {cap} by the setting level_cap", record.width)


def read_level(folder: Path, identity: Identity) -> LevelRecord:
    """The recorded level of `identity`, or UNVERIFIED when there is none that can be read."""
    try:
        data = json.loads(_path(folder, identity).read_text())
    except (OSError, ValueError):
        return UNVERIFIED
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or data.get("level") not in get_args(Level):
        return UNVERIFIED
    return LevelRecord(data["level"], str(data.get("reason", "")), int(data.get("width", 0)))


def write_level(folder: Path, identity: Identity, record: LevelRecord) -> Path:
    """Keep `record` for `identity`; the file appears whole or not at all."""
    path = _path(folder, identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps({"schema": SCHEMA, **asdict(record), **asdict(identity)}, indent=1))
    draft.replace(path)
    return path


def _path(folder: Path, identity: Identity) -> Path:
    return folder / f"{digest_of([identity.compatibility, identity.exactness_class])[:32]}.json"
