"""ELF files made by hand: headers only."""

from __future__ import annotations

import struct

AARCH64, X86_64 = 183, 62
SHARED_OBJECT, OBJECT_FILE = 3, 1
LOAD, NOTE = 1, 4


def elf(*segments: tuple[int, int], machine: int = AARCH64, kind: int = SHARED_OBJECT) -> bytes:
    """A file with such segments: (type, alignment) each."""
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", kind, machine, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0
    )
    return header + b"".join(struct.pack("<IIQQQQQQ", kind, 5, 0, 0, 0, 0, 0, align) for kind, align in segments)
