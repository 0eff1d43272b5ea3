"""Which memory of a process lies on huge pages: caches and buffers of computing, not weights.

Owns glibc's tunable, which is read at exec only and makes every large buffer ask for huge pages, and the exception from
it. Refuses to know models. The KV cache is walked in strides: on 4 KiB pages a decode step of several sequences spends
much of its time in page walks. Weights are read from one end to the other: there huge pages gain nothing, and steps of
one sequence in Q4_0 were slower with them in every pair of processes tried on an Intel Xeon.

Invariant: where the kernel does not take part, everything works on ordinary pages.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from edge_llm.machine import file_text

_TUNABLES: Final = "GLIBC_TUNABLES"
_HUGE_PAGES: Final = "glibc.malloc.hugetlb"
# Linux: prctl(2), madvise(2).
_PR_SET_THP_DISABLE: Final = 41
_MADV_NOHUGEPAGE: Final = 15
Range = tuple[int, int]
_RANGE: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


def huge_page_environment(environ: Mapping[str, str], root: Path = Path("/")) -> dict[str, str]:
    """What to add to a process's environment before it starts, so that glibc asks for huge pages for large buffers.

    The tunable (glibc.malloc.hugetlb) is there since glibc 2.35. Empty where the kernel never gives huge pages, or
    where whoever started us has set the tunable.
    """
    tunables = environ.get(_TUNABLES, "")
    if _HUGE_PAGES in tunables or "[never]" in (
        file_text(root / "sys/kernel/mm/transparent_hugepage/enabled") or "[never]"
    ):
        return {}
    return {_TUNABLES: ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))}


@contextmanager
def ordinary_pages() -> Iterator[None]:
    """What this process touches first inside lies on pages of the usual size, and stays there: the kernel's own thread
    would make huge pages of it later. No other thread may need huge pages meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = _own_ranges()
    if libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0:
        yield
        return
    try:
        yield
        for start, end in beyond(_own_ranges(), before):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_NOHUGEPAGE)
    finally:
        libc.prctl(_PR_SET_THP_DISABLE, 0, 0, 0, 0)


def asking(smaps: str) -> list[Range]:
    """Address ranges that ask for huge pages, out of the text of /proc/PID/smaps (proc(5): VmFlags, `hg`)."""
    ranges: list[Range] = []
    found: re.Match[str] | None = None
    for line in smaps.splitlines():
        if head := _RANGE.match(line):
            found = head
        elif found and line.startswith("VmFlags:") and "hg" in line.split():
            ranges.append((int(found[1], 16), int(found[2], 16)))
    return ranges


def beyond(after: Sequence[Range], before: Sequence[Range]) -> list[Range]:
    """What of `after` is not in `before`: the kernel joins neighbours, so a new range may be part of a grown one."""
    left = list(after)
    for start, end in before:
        left = [(low, high) for a, b in left for low, high in ((a, min(b, start)), (max(a, end), b)) if low < high]
    return left


def _own_ranges() -> list[Range]:
    return asking(file_text(Path("/proc/self/smaps")) or "")
