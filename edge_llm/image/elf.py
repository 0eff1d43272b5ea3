"""What an ELF file says about where it can be loaded: machine, and the alignment that its segments ask for.

Owns the reading of 64-bit little-endian headers. Refuses to know images.

A Raspberry Pi 5 runs a kernel with pages of 16 KiB: a library whose segments are aligned to less cannot be mapped
there ("ELF load command alignment not page-aligned"), and every board with pages of 4 KiB hides that.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

# The largest page of any kernel that boards of the architecture are sold with.
LARGEST_PAGE: Final = {"x86_64": 4 << 10, "aarch64": 16 << 10}
MACHINES: Final = {62: "x86_64", 183: "aarch64"}
_IDENT: Final = b"\x7fELF\x02\x01"  # 64-bit, little-endian
_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_LOAD: Final = 1
_LOADABLE: Final = (2, 3)  # programs and shared objects; not object files


@dataclass(frozen=True, slots=True)
class Elf:
    """`machine` as uname says it, or ELF's number; `align_bytes` is the smallest of all loaded segments."""

    machine: str
    align_bytes: int


def read_elf(content: bytes) -> Elf | None:
    """None: not a program or library of this kind, or one that loads nothing. Reads headers only, which come first."""
    if not content.startswith(_IDENT) or len(content) < _HEADER.size:
        return None
    _, kind, machine, _, _, offset, _, _, _, size, count, *_ = _HEADER.unpack_from(content)
    if kind not in _LOADABLE or size < _SEGMENT.size or offset + size * count > len(content):
        return None
    segments = (_SEGMENT.unpack_from(content, offset + size * index) for index in range(count))
    aligns = [align for kind, *_, align in segments if kind == _LOAD]
    return Elf(MACHINES.get(machine, str(machine)), min(aligns)) if aligns else None


def problem(content: bytes, machine: str) -> str | None:
    """Why this file cannot be loaded on every `machine`. None: it can, or it is nothing to load."""
    found, page_bytes = read_elf(content), LARGEST_PAGE[machine]
    if found is None:
        return None
    if found.machine != machine:
        return f"is for {found.machine}, not {machine}"
    if found.align_bytes % page_bytes:
        return f"has segments aligned to {found.align_bytes} bytes, pages of {page_bytes} bytes need more"
    return None
