"""Which memory lies on huge pages, in processes of their own: the tunable is read at exec."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from edge_llm.pages import asking, beyond, huge_page_environment

_PROGRAM = """
import ctypes, re
from contextlib import nullcontext
from edge_llm.pages import ordinary_pages
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def huge_kib():
    return int(re.search(r"AnonHugePages: +([0-9]+)", open("/proc/self/smaps_rollup").read())[1])

def touch():
    before = huge_kib()
    libc.memset(libc.malloc(128 << 20), 1, 128 << 20)
    return huge_kib() - before

with ordinary_pages():
    inside = touch()
kept = touch()
with ordinary_pages():
    pass
print(inside, kept, touch())
"""


def _touched() -> list[int]:
    environment = {**os.environ, **huge_page_environment(os.environ)}
    done = subprocess.run([sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_memory_touched_inside_stays_off_huge_pages_and_later_memory_does_not() -> None:
    inside_kib, outside_kib, later_kib = _touched()
    assert inside_kib == 0
    if huge_page_environment({}) and _gives_huge_pages():
        assert outside_kib > 0
        assert later_kib > 0


def _gives_huge_pages() -> bool:
    """Whether pages of at most 4 MiB are given here: 128 MiB then hold many."""
    size = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
    return size.exists() and int(size.read_text()) <= 4 << 20


def test_only_ranges_with_the_flag_ask() -> None:
    smaps = (
        "7f00-7f10 rw-p 00000000 00:00 0\nRss: 4 kB\nVmFlags: rd wr mr mw me ac hg \n"
        "7f20-7f30 rw-p 00000000 00:00 0\nVmFlags: rd wr mr mw me ac \n"
        "7f40-7f50 r--p 00000000 08:01 7 /a file of hg\nVmFlags: rd mr mw me nh \n"
    )
    assert asking(smaps) == [(0x7F00, 0x7F10)]


ranges = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda pair: (pair[0], pair[0] + pair[1])), max_size=6
)


@given(ranges, ranges)
def test_what_is_beyond_is_in_the_later_ranges_and_not_in_the_earlier_ones(
    after: list[tuple[int, int]], before: list[tuple[int, int]]
) -> None:
    def places(of: list[tuple[int, int]]) -> set[int]:
        return {place for start, end in of for place in range(start, end)}

    assert places(beyond(after, before)) == places(after) - places(before)


def test_a_tunable_of_the_user_stays(tmp_path: Path) -> None:
    enabled = tmp_path / "sys/kernel/mm/transparent_hugepage/enabled"
    enabled.parent.mkdir(parents=True)
    enabled.write_text("always [madvise] never\n")
    assert huge_page_environment({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=2"}, tmp_path) == {}
    both = huge_page_environment({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, tmp_path)
    assert both == {"GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.hugetlb=1"}
    enabled.write_text("always madvise [never]\n")
    assert huge_page_environment({}, tmp_path) == {}
