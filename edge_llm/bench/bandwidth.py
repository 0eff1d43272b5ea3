"""Memory bandwidth as a few lines of numpy see it: `python -m edge_llm.bench.bandwidth`, JSON lines in and out.

Owns the way it is measured: each thread works on its own slice of two arrays that together are several times the last
cache, all threads begin together, and the best of a few passes counts (as STREAM has it). Three passes: `copy` (reads
and writes, counted both), `scale` (the same with a multiplication) and `read` (one array, read only). numpy gives up
the interpreter's lock in all of them, so threads run side by side. A process of its own, so that its arrays are not
in the memory of what is measured afterwards, and so that it is pinned as that is.

Refuses to know models. Protocol: that of edge_llm/engine/measure.py.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edge_llm.machine import available_memory_bytes

Array = npt.NDArray[np.float64]
Kernel = Callable[[Array, Array], object]
_PASSES: Final = 5
_LEAST_BYTES: Final = 64 << 20
_MOST_BYTES: Final = 1 << 30
_CACHES: Final = 4  # arrays this many times the last cache: what a pass finds there from the last one is little
HOW: Final = (
    "the best of {passes} passes of numpy over two arrays of {mebibytes} MiB, {threads} thread(s) on slices of their "
    "own: the highest of copy, scale (both counted as one read and one write) and read"
)


def array_bytes(last_cache_bytes: int, available_bytes: int) -> int:
    """Size of one of the two arrays: outside the cache, and never more than an eighth of the free memory."""
    wanted = min(max(_LEAST_BYTES, _CACHES * last_cache_bytes), _MOST_BYTES)
    return max(8 << 10, min(wanted, available_bytes // 8) // 4096 * 4096)


def last_cache_bytes(root: Path = Path("/")) -> int:
    """The largest cache of the first core; 0 when the system does not say."""
    sizes = []
    for path in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text().strip()
            sizes.append(int(text.rstrip("KMG")) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1))
        except (OSError, ValueError):
            continue
    return max(sizes, default=0)


def measure(threads: int, n_bytes: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """Bytes per second of each kind, and the highest."""
    source, target = np.ones(n_bytes // 8), np.ones(n_bytes // 8)
    kinds: Mapping[str, tuple[Kernel, int]] = {
        "copy": (lambda a, b: np.copyto(b, a), 2),
        "scale": (lambda a, b: np.multiply(a, 3.0, out=b), 2),
        "read": (lambda a, _b: np.bitwise_or.reduce(a.view(np.uint64)), 1),
    }
    found: dict[str, float] = {}
    for name, (kernel, arrays) in kinds.items():
        slices = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
        best_s = min(_timed(kernel, slices, clock) for _ in range(_PASSES))
        found[name] = arrays * source.nbytes / best_s
    how = HOW.format(passes=_PASSES, mebibytes=n_bytes >> 20, threads=threads)
    return {"bytes_per_s": max(found.values()), "kinds": found, "threads": threads, "array_bytes": n_bytes, "how": how}


def _timed(kernel: Kernel, slices: list[tuple[Array, Array]], clock: Callable[[], float]) -> float:
    """Seconds from the common start until the last thread is done."""
    if len(slices) == 1:
        started_s = clock()
        kernel(*slices[0])
        return clock() - started_s
    start = threading.Barrier(len(slices) + 1)
    workers = [threading.Thread(target=_work, args=(start, kernel, *one)) for one in slices]
    for worker in workers:
        worker.start()
    start.wait()
    started_s = clock()
    for worker in workers:
        worker.join()
    return clock() - started_s


def _work(start: threading.Barrier, kernel: Kernel, source: Array, target: Array) -> None:
    start.wait()
    kernel(source, target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve requests from stdin until it ends. An argument: bytes of an array, instead of several times the cache."""
    given = sys.argv[1:] if arguments is None else arguments
    n_bytes = int(given[0]) if given else array_bytes(last_cache_bytes(), available_memory_bytes())
    print(json.dumps({"event": "ready", "array_bytes": n_bytes}), flush=True)
    for line in sys.stdin:
        threads = int(json.loads(line)["threads"])
        print(json.dumps({"event": "result", **measure(threads, n_bytes)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
